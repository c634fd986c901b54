"""A publisher's channel confirms nothing any more, although its connection works.

If the first message of a channel to a queue finds no leader there, the channel confirms nothing for 65 s
(rabbit_fifo_client in 3.10: net_ticktime + 5). A channel in the broker can also forget to send messages to a queue
again (seen on 3.10 when the writer of its log was killed; github.com/rabbitmq/rabbitmq-server/pull/13095 and /14589
describe other ways, up to 4.1). So we send a copy of one message to each of these queues over another connection. If
the copy is confirmed, the channel is the cause, and its unconfirmed messages are sent again over a new channel. If
not, the queue is the cause.
"""

from __future__ import annotations

import asyncio
import logging
from collections import deque
from typing import TYPE_CHECKING, Final

from streamtools.drivers.rabbitmq.connections import SharedConnection
from streamtools.errors import StreamToolsError
from streamtools.message import Message

if TYPE_CHECKING:  # these modules import this one
    from streamtools.drivers.rabbitmq.publishing.batch import Batch
    from streamtools.drivers.rabbitmq.publishing.publisher_channel import PublisherChannel

log: logging.Logger = logging.getLogger("streamtools")

#: After this many seconds without a confirmation, a copy is sent over another channel. Together with TRIAL_TIMEOUT
#: this is less than the default time of a sender, so that it helps in time.
CONFIRM_TIMEOUT: Final = 15.0
#: The number of checks in CONFIRM_TIMEOUT.
CHECKS: Final = 4
#: Seconds to wait for the confirmation of a copy.
TRIAL_TIMEOUT: Final = 5.0
#: Seconds to wait for a confirmation that may be on its way.
GRACE_TIMEOUT: Final = 1.0
#: The most queues that get a copy at the same time.
ASKED: Final = 50
#: Seconds until a queue that gave no answer gets another copy; doubled each time, from the first to the last number.
ASK_INTERVAL: Final = (15.0, 300.0)


class UnconfirmedWatch:
    """Handles the messages of one channel whose confirmations do not come.

    Attributes:
        stuck: whether messages were not confirmed for long, so that nothing more may be written to this channel.
        timer: runs until the next check; None while all messages are confirmed.
    """

    def __init__(self, channel: PublisherChannel) -> None:
        self._channel = channel
        self._loop = asyncio.get_running_loop()
        self.stuck: bool = False
        self.timer: asyncio.TimerHandle | None = None
        #: The last written tag at each of the last checks; 0 if the broker blocked the connection then.
        self._checks: deque[int] = deque(maxlen=CHECKS)
        #: Queue that confirmed nothing here for long -> whether it confirmed a copy.
        self._answers: dict[str, bool] = {}
        #: Queue that did not confirm its copy -> when it gets another one, on the loop's clock, and after how long.
        self._ask_at: dict[str, tuple[float, float]] = {}
        self._trial: asyncio.Task[None] | None = None

    @property
    def silence(self) -> str:
        """The reason why a message is sent again."""
        return f"A channel of RabbitMQ at {self._channel.connection.where} confirms nothing any more."

    def start(self) -> None:
        """Begin to check, because a message was written and no timer runs."""
        self._check_later()

    def stop(self) -> None:
        """Stop checking."""
        if self.timer is not None:
            self.timer.cancel()
        if self._trial is not None:
            self._trial.cancel()

    def _check_later(self) -> None:
        self._checks.append(0 if self._channel.connection.blocked else self._channel.last_tag)
        self.timer = self._loop.call_later(CONFIRM_TIMEOUT / CHECKS, self._check)

    def _check(self) -> None:
        """If the oldest message has waited since the first of the last checks, help the waiting messages."""
        channel = self._channel
        late = self._checks[0] if len(self._checks) == CHECKS else 0
        oldest = next(iter(channel.pending), None)
        if oldest is not None and oldest <= late and not channel.connection.blocked:
            self.stuck = True
            channel.wake_all()
            self._help(self._checks[-1])  # also messages that were written later
        self.timer = None
        if channel.pending:
            self._check_later()
        else:
            self._checks.clear()

    def _help(self, last: int) -> None:
        """For messages up to the tag `last`: send them again if their queue answers; else ask their queue."""
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
        """Send a copy to each of these queues, each over its own channel of another connection; then help again."""
        ours = self._channel.connection
        try:
            async with asyncio.timeout(CONFIRM_TIMEOUT):
                connection = await ours.another()
        except (StreamToolsError, TimeoutError):
            return  # our connection is not the only one with a problem; the next check tries again
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
        """Return whether the broker holds a copy of this message; None if it gives no answer."""
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
                "A channel of RabbitMQ at %s does not confirm messages to %s%s, and another one does; the messages "
                "that it has not confirmed are sent again.",
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
    """Return the queue that has to confirm this message, and whether that is a level of the delay chain."""
    if batch.delay_routes and id(message) in batch.delay_routes:
        return batch.delay_routes[id(message)][0], True
    return message.queue if message.exchange is None else f"{message.exchange.name} {message.queue}", False
