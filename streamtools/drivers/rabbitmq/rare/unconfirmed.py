"""A publisher's channel that confirms nothing any more, though its connection lives.

A channel whose first message to a queue finds no leader there stands still for 65 s (rabbit_fifo_client in 3.10:
net_ticktime + 5). And a channel can forget to send again what a queue has not got (seen on 3.10 when the writer of
its log was killed; github.com/rabbitmq/rabbitmq-server/pull/13095 and /14589 tell of other ways, up to 4.1). So each
queue concerned is asked over another connection, by a copy of one message: if that is confirmed, it is the channel
that stands still, and what waits is sent again over a new one; if not, it is the queue.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from streamtools.drivers.rabbitmq.connections import SharedConnection
from streamtools.errors import StreamToolsError
from streamtools.message import Message

if TYPE_CHECKING:  # which has one of these
    from streamtools.drivers.rabbitmq.publishing.batch import Batch
    from streamtools.drivers.rabbitmq.publishing.publisher_channel import PublisherChannel

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds without a confirmation after which another channel is asked whether it gets one from the same queue. With
#: TRIAL_TIMEOUT this is less than a sender waits by default, so that it helps.
CONFIRM_TIMEOUT: Final = 15.0
#: Checks in this time.
CHECKS: Final = 4
#: Seconds for the confirmation of a copy.
TRIAL_TIMEOUT: Final = 5.0
#: Seconds for a confirmation that may be on its way.
GRACE_TIMEOUT: Final = 1.0
#: Queues asked at once.
ASKED: Final = 50
#: Seconds until a queue that gave no answer is asked again; doubled each time, up to the last.
ASK_INTERVAL: Final = (15.0, 300.0)


class UnconfirmedWatch:
    """Looks after the messages of one channel that are not confirmed.

    Attributes:
        stuck: what was written long ago is not confirmed: nothing more is to be written on this channel.
        timer: runs until the next check; None while nothing is unconfirmed.
    """

    def __init__(self, channel: PublisherChannel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self.stuck: bool = False
        self.timer: asyncio.TimerHandle | None = None
        #: The tags that were written last at each of the last checks; 0 while the broker blocked the connection.
        self._checks: deque[int] = deque(maxlen=CHECKS)
        #: Queues that confirmed nothing here for long: whether they confirmed a copy.
        self._answers: dict[str, bool] = {}
        #: Those that did not: when they are asked again, on the loop's clock, and seconds until then.
        self._ask_at: dict[str, tuple[float, float]] = {}
        self._trial: asyncio.Task[None] | None = None

    @property
    def silence(self) -> str:
        """Why a message is sent again."""
        return f"A channel of RabbitMQ at {self._channel.connection.where} confirms nothing any more."

    def start(self) -> None:
        """Something was written, and no timer runs."""
        self._check_later()

    def stop(self) -> None:
        """Look no more."""
        if self.timer is not None:
            self.timer.cancel()
        if self._trial is not None:
            self._trial.cancel()

    def _check_later(self) -> None:
        self._checks.append(0 if self._channel.connection.blocked else self._channel.last_tag)
        self.timer = self._loop.call_later(CONFIRM_TIMEOUT / CHECKS, self._check)

    def _check(self) -> None:
        """Help what waits for its confirmation since the first of the last checks."""
        channel = self._channel
        late = self._checks[0] if len(self._checks) == CHECKS else 0
        oldest = next(iter(channel.pending), None)
        if oldest is not None and oldest <= late and not channel.connection.blocked:
            self.stuck = True
            channel.wake_all()
            self._help(self._checks[-1])  # what was written after it, too
        self.timer = None
        if channel.pending:
            self._check_later()
        else:
            self._checks.clear()

    def _help(self, last: int) -> None:
        """Of what was written up to `last`, have sent again what need not wait, and ask about the rest."""
        channel = self._channel
        unknown: dict[str, int] = {}
        for tag, batch in [(tag, batch) for tag, batch in channel.pending.items() if tag <= last]:
            queue, is_level = _confirms(batch.message(tag), batch)
            if self._answers.get(queue) or (is_level and queue in self._answers):
                channel.give_back(tag, self.silence)
            elif not batch.future.done() and self._ask_at.get(queue, (0.0, 0.0))[0] <= self._loop.time():
                if len(unknown) < ASKED:
                    unknown.setdefault(queue, tag)
        if unknown and (self._trial is None or self._trial.done()):
            self._trial = self._loop.create_task(self._try(unknown, last))

    async def _try(self, queues: dict[str, int], last: int) -> None:
        """Send a copy to each of these queues over another connection, a channel for each; help those that wait."""
        ours = self._channel.connection
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                connection = await ours.another()
        except (StreamToolsError, TimeoutError):
            return  # not only ours is in trouble; at the next check it is tried again
        try:
            other = SharedConnection(connection)
            held = await asyncio.gather(*(self._ask(other, tag) for tag in queues.values()))
            await asyncio.sleep(GRACE_TIMEOUT)
            if not (connection.lost or connection.blocked or ours.blocked):
                self._learn(dict(zip(queues.items(), held, strict=True)))
                self._help(last)
        finally:
            await connection.close()

    async def _ask(self, other: SharedConnection, tag: int) -> bool | None:
        """Whether the broker holds a copy of this message; None: it gives no answer."""
        batch = self._channel.pending.get(tag)
        if batch is None:
            return None
        message = batch.message(tag)
        try:
            async with asyncio.timeout(TRIAL_TIMEOUT):
                channel = await self._channel.open(other, self._channel.limits)
                return await channel.publish_copy(message, batch.delay_routes.get(id(message)))
        except (StreamToolsError, TimeoutError):
            return None

    def _learn(self, held: dict[tuple[str, int], bool | None]) -> None:
        waiting = {asked: holds for asked, holds in held.items() if asked[1] in self._channel.pending}
        for (queue, tag), holds in waiting.items():
            self._answers[queue] = holds is not None
            if holds is None:
                self._note_silence(queue, self._channel.pending[tag], tag)
            elif holds:
                self._channel.confirm_one(tag, True)
        if answering := [queue for (queue, _), holds in waiting.items() if holds is not None]:
            log.warning(
                "A channel of RabbitMQ at %s does not confirm messages to %s%s, and another one does; what it "
                "has not confirmed is sent again.",
                self._channel.connection.where, ", ".join(map(repr, answering[:5])), ", ..." if answering[5:] else "",
            )  # fmt: skip

    def _note_silence(self, queue: str, batch: Batch, tag: int) -> None:
        _, waited = self._ask_at.get(queue, (0.0, 0.0))
        wait = min(2 * waited, ASK_INTERVAL[1]) or ASK_INTERVAL[0]
        self._ask_at[queue] = self._loop.time() + wait, wait
        if _confirms(batch.message(tag), batch)[1]:
            self._channel.shared.chain.leaderless.avoid(queue)
        log.warning(
            "RabbitMQ at %s has not confirmed a message to %r for %g s, nor one over a new channel; its queue "
            "may have no leader: rabbitmq-queues quorum_status.",
            self._channel.connection.where, queue, CONFIRM_TIMEOUT,
        )  # fmt: skip


def _confirms(message: Message, batch: Batch) -> tuple[str, bool]:
    """What is to confirm this message, and whether that is a level of the delay chain."""
    if batch.delay_routes and id(message) in batch.delay_routes:
        return batch.delay_routes[id(message)][0], True
    return message.queue if message.exchange is None else f"{message.exchange.name} {message.queue}", False
