"""QueueAdmin: what an operator does with queues; list, create, delete, purge, stats, peek, move."""

from __future__ import annotations

import asyncio
import math
import time
from collections.abc import Callable, Iterable, Sequence
from datetime import datetime
from typing import TYPE_CHECKING, Any, Final, Self, Unpack

from streamtools.delivery import Delivery, Settlement
from streamtools.driver import AdminHooks, Reader
from streamtools.engine.messages.failures import redrive_copy
from streamtools.engine.messages.origin import check_failed_here, failed_there, queues_named
from streamtools.engine.options import check_known
from streamtools.engine.tasks.eventloops import LoopBound, at_end, forget
from streamtools.errors import ConfigurationError, ConnectError, QueueError, SendError, safe_str
from streamtools.exchange import TOPIC, Binding, Exchange
from streamtools.message import Message
from streamtools.options import AnyProducerOptions
from streamtools.protocols import NO_ADMIN, QUEUE_OPTIONS, targets
from streamtools.queues import GroupInfo, Place, QueueInfo, QueueSettings
from streamtools.registry import Registry
from streamtools.validation.checks import check_count, check_name, check_seconds
from streamtools.verdicts import ACK

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

#: Messages taken at once by `peek` and `move`.
BATCH: Final = 100
#: Seconds of silence after which a queue that should hold more is asked whether it is empty.
EMPTY_TIMEOUT: Final = 1.0
#: Seconds of silence after which nothing more is expected, whatever the queue says.
SLOW_TIMEOUT: Final = 30.0
#: Seconds between two looks at whether deliveries have gone back.
RETURN_POLL_INTERVAL: Final = 0.02

#: Protocol name to admin class.
ADMINS: Registry[QueueAdmin] = Registry("admin", targets("admin"), NO_ADMIN)


class QueueAdmin(AdminHooks, LoopBound):
    """Looks at queues and changes them: `async with ADMINS["sqlite"](url=...) as admin: await admin.list()`.

    Parameters:
        url: the address, or a settings object; see `streamtools.settings`.
        client_id: this client's name, as the broker shows it with its connections.
    """

    def __init_subclass__(cls, protocol: str | None = None, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        if protocol is not None:
            cls.protocol = protocol
            ADMINS[protocol] = cls

    def __new__(cls, *arguments: Any, **options: Any) -> Self:
        kind: Any = ADMINS.of_url(options.get("url")) if cls is QueueAdmin else cls
        return super().__new__(kind, *arguments, **options)  # type: ignore[no-any-return]

    def __init__(self, *, url: str | ProtocolSettings | None = None, client_id: str | None = None) -> None:
        self.settings: ProtocolSettings = self.settings_class.resolve(url)
        self.client_id = client_id

    # --- for users ------------------------------------------------------------------------------

    async def open(self) -> Self:
        """Connect.

        Raises:
            ConnectError: the broker cannot be reached, or refuses us.
        """
        here = self._here()
        await here._open()
        at_end(here)
        return self

    async def close(self) -> None:
        """Close the connection of the running event loop. Safe to repeat."""
        here = self._here()
        forget(here)
        await here._close()

    async def list(self) -> Sequence[QueueInfo]:
        """Every queue, by name."""
        return sorted(await self._here()._list(), key=lambda info: info.name)

    async def create(self, queue: str, **options: Unpack[AnyProducerOptions]) -> None:
        """Create a queue; safe to repeat.

        Parameters:
            options: options of the protocol, as for its Producer.

        Raises:
            QueueError: it exists with other options.
            TypeError: an option that no protocol knows.
        """
        check_name(queue)
        check_known(options, QUEUE_OPTIONS, owner=f"{type(self).__name__}.create")
        await self._here()._create(queue, dict(options))

    async def delete(self, queue: str) -> None:
        """Delete a queue with all that is in it.

        Raises:
            QueueError: there is no such queue.
        """
        await self._here()._delete(queue)

    async def purge(self, queue: str) -> int:
        """Delete every message that waits in the queue; returns how many there were.

        Raises:
            QueueError: there is no such queue.
        """
        return await self._here()._purge(queue)

    async def stats(self, queue: str) -> QueueInfo:
        """One queue's numbers.

        Raises:
            QueueError: there is no such queue.
        """
        return await self._here()._stats(queue)

    async def describe(self, queue: str) -> QueueSettings:
        """How a queue is kept.

        Raises:
            QueueError: there is no such queue.
            FeatureError: the protocol has nothing of the kind.
        """
        return await self._here()._describe(queue)

    async def alter(
        self,
        queue: str,
        *,
        partitions: int | None = None,
        retention: float | None = None,
        retention_bytes: float | None = None,
    ) -> None:
        """Change how a queue is kept; what is not given stays as it is. Safe to repeat.

        Parameters:
            partitions: the new number of partitions, never fewer than before. Afterwards, messages with a key may go
                to another partition than earlier ones with that key.
            retention: seconds that a message is kept; `math.inf` without a limit.
            retention_bytes: how much of each partition is kept; `math.inf` without a limit.

        Raises:
            QueueError: there is no such queue, or it has more partitions than that.
            ConfigurationError: nothing to change is given, or a number that is impossible.
            FeatureError: the protocol has nothing of the kind.
        """
        if partitions is None and retention is None and retention_bytes is None:
            raise ConfigurationError("alter() changes nothing: give partitions=, retention= or retention_bytes=.")
        if partitions is not None:
            check_count("partitions", partitions)
        if retention is not None and retention != math.inf:
            check_seconds("retention", retention)
        if retention_bytes is not None and retention_bytes != math.inf:
            check_count("retention_bytes", retention_bytes)  # type: ignore[arg-type]
        await self._here()._alter(queue, partitions, retention, retention_bytes)

    async def groups(self, queue: str) -> Sequence[GroupInfo]:
        """The groups that read a queue, and how far each has come. Looking moves none of them.

        Raises:
            QueueError: there is no such queue.
            FeatureError: the protocol has nothing of the kind.
        """
        return sorted(await self._here()._groups(queue), key=lambda group: group.name)

    async def seek(
        self, queue: str, to: Place, *, group: str | None = None, partition: int | None = None
    ) -> GroupInfo:
        """Move a group to another position in a queue: it then reads all messages from there on, again if it has read
        them before.

        The group's consumers must be stopped. Safe to repeat.

        Parameters:
            to: "beginning", "end", an offset (which needs a partition where there are several), or a time, with its
                time zone: the first message at or after it.
            group: the one that is named as the queue when None.
            partition: only this one.

        Raises:
            QueueError: there is no such queue or partition, the offset is not kept, or the group has consumers.
            FeatureError: the protocol cannot.
        """
        if isinstance(to, bool) or not (isinstance(to, int | datetime) or to in ("beginning", "end")):
            raise ConfigurationError(f"seek to {to!r}: 'beginning', 'end', an offset or a datetime.")
        if isinstance(to, datetime) and to.tzinfo is None:
            raise ConfigurationError(f"seek to {to!r}: say in which time zone, as in datetime.now(UTC).")
        if group is not None:
            check_name(group, "group")
        return await self._here()._seek(queue, to, queue if group is None else group, partition)

    async def bind(self, queue: str, topic: str, exchange: Exchange = TOPIC) -> None:
        """Have a queue receive the messages of a topic; safe to repeat.

        Parameters:
            topic: a topic, or a pattern of topics on a topic exchange.
            exchange: made if it is missing.

        Raises:
            FeatureError: the protocol has no exchanges.
            QueueError: there is no such queue, or the exchange is of another type.
        """
        await self._here()._bind(queue, Binding(topic, exchange))

    async def unbind(self, queue: str, topic: str, exchange: Exchange = TOPIC) -> None:
        """Undo `bind`; safe to repeat. Messages that already wait stay.

        Raises:
            FeatureError: the protocol has no exchanges.
        """
        await self._here()._unbind(queue, Binding(topic, exchange))

    async def cancel(self, queue: str, id: str) -> bool:  # noqa: A002 - the field's name everywhere
        """Cancel a message that is not due yet; returns False if it is due, delivered or unknown.

        Raises:
            FeatureError: the protocol cannot cancel a delayed message.
            QueueError: there is no such queue.
        """
        return await self._here()._cancel(queue, id)

    async def peek(self, queue: str, limit: int = 10) -> Sequence[Message]:
        """Return the first messages that wait, and leave them in the queue.

        Raises:
            QueueError: there is no such queue.
        """
        found: list[Message] = []

        async def keep(batch: Sequence[Delivery]) -> None:
            found.extend(delivery.message for delivery in batch)

        await self._here()._read(queue, limit, keep)
        return found

    async def move(
        self,
        source: str,
        target: str | None = None,
        *,
        failed_in: Iterable[str] | None = None,
        where: Callable[[Message], bool] | None = None,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Redrive: move what waits in `source` back to work, as attempt 1; returns the number moved.

        Its target holds a message before it leaves `source`: a crash in between can repeat one, never lose one.
        Messages that arrive meanwhile stay, and so do those that cannot be moved: all others are moved first.

        Parameters:
            target: where to; the queue that each message failed in when None.
            failed_in: only those that failed in one of these queues. A message says itself where it failed, and
                anyone who may write to `source` can write that. So without a `target` messages go only to queues that
                are named here. When None, they go to the queue whose own error queue `source` is, as `orders` for
                `orders.error`; others stay.
            where: moves only messages for which it returns true.
            limit: look at this many at most.
            progress: called with the number moved so far.

        Raises:
            QueueError: there is no such queue.
            ConfigurationError: there is no target, and messages do not say where they failed, or their queue is not
                named.
            SendError: a target does not take a message.
        """
        named = queues_named(failed_in)

        def outgoing(message: Message) -> tuple[Message, ...]:
            if target is None and named is None:
                check_failed_here(message, source)
            return (self._back(message, target),)

        return await self._here()._settle_where(source, failed_there(named, where), limit, progress, outgoing)

    async def discard(
        self,
        source: str,
        *,
        where: Callable[[Message], bool] | None = None,
        limit: int | None = None,
        progress: Callable[[int], None] | None = None,
    ) -> int:
        """Delete messages that wait in `source`, for good; returns how many. Parameters as for `move`.

        Raises:
            QueueError: there is no such queue.
        """
        return await self._here()._settle_where(source, where, limit, progress, lambda message: ())

    def __repr__(self) -> str:
        return f"<{type(self).__name__} at {self.settings.safe_url}>"

    # --- shared by peek, move and discard -------------------------------------------------------

    def _back(self, message: Message, target: str | None) -> Message:
        """What goes back to work; to the queue that it failed in when there is no target."""
        return redrive_copy(message, target)

    async def _settle_where(
        self,
        source: str,
        where: Callable[[Message], bool] | None,
        limit: int | None,
        progress: Callable[[int], None] | None,
        outgoing: Callable[[Message], tuple[Message, ...]],
    ) -> int:
        """Acknowledge those that `where` is true for, once their `outgoing` is held; the number of them."""
        waiting = (await self._stats(source)).ready
        number = waiting if limit is None else min(limit, waiting)
        reader = self._reader(source, number)
        settled, left = 0, list[Exception]()

        async def settle(batch: Sequence[Delivery]) -> None:
            nonlocal settled
            settlements = []
            for delivery in batch:
                if where is None or where(delivery.message):
                    try:
                        settlements.append(Settlement(delivery, ACK, outgoing(delivery.message)))
                    except ConfigurationError as error:
                        left.append(error)
            stay = await _settle_each(reader, settlements)
            left.extend(stay)
            settled += len(settlements) - len(stay)
            if progress is not None:
                progress(settled)

        await self._read_from(reader, source, number, settle)
        await self._returned(source, waiting - settled)
        if left:
            raise _stay(source, settled, left)
        return settled

    async def _read(self, queue: str, limit: int, use: Callable[[Sequence[Delivery]], Any]) -> None:
        waiting = (await self._stats(queue)).ready
        number = min(limit, waiting)
        await self._read_from(self._reader(queue, number), queue, number, use)
        await self._returned(queue, waiting)

    async def _read_from(
        self, reader: Reader, queue: str, number: int, use: Callable[[Sequence[Delivery]], Any]
    ) -> None:
        """Give `number` deliveries to `use`, in batches; what it leaves unsettled goes back at the end."""
        if number < 1:
            return
        await reader.open()
        try:
            seen = 0
            while seen < number and (batch := await self._next(reader, queue, min(BATCH, number - seen))):
                seen += len(batch)
                await use(batch)
            # RabbitMQ's quorum queues take some 32 single acknowledgements at once and keep the rest in
            # the channel, with which they would vanish; its answer that it delivers no more comes after them.
            await reader._stop()
        finally:
            await reader.close()

    async def _next(self, reader: Reader, queue: str, limit: int) -> Sequence[Delivery]:
        """The next deliveries; none if the queue has none, or gives none for `SLOW_TIMEOUT`.

        A slow broker or disk, or a lock, can keep messages back for more than a second.
        """
        deadline = time.monotonic() + SLOW_TIMEOUT
        while True:
            began = time.monotonic()
            if batch := await reader.receive(limit, timeout=EMPTY_TIMEOUT):
                return batch
            has_read_all = time.monotonic() - began < EMPTY_TIMEOUT / 2  # it has not waited
            if has_read_all or began > deadline or not (await self._stats(queue)).ready:
                return []

    async def _returned(self, queue: str, expected: int) -> None:
        """Wait until what a reader has left is back in its queue, so that who looks next finds it there.

        RabbitMQ takes deliveries back after the connection's end, and tells nobody when it has; while
        another consumer is at work on the queue the number is never reached, hence the limit.
        """
        deadline = time.monotonic() + EMPTY_TIMEOUT
        while (await self._stats(queue)).ready < expected and time.monotonic() < deadline:  # noqa: ASYNC110 - see above
            await asyncio.sleep(RETURN_POLL_INTERVAL)


async def _settle_each(reader: Reader, settlements: Sequence[Settlement]) -> list[Exception]:
    """Settle them together; if that fails, each by itself, so that one does not stop the others.

    Returns:
        Why some messages stay where they are.

    Raises:
        ConnectError: the connection ended.
        QueueError: a queue that concerns all of them is missing or differs.
    """
    if not settlements:
        return []
    try:
        await reader._settle(settlements)
    except ConnectError:
        raise
    except Exception as error:
        targets = {message.queue for settlement in settlements for message in settlement.outgoing}
        if len(settlements) == 1:
            return [error]
        if isinstance(error, QueueError) and len(targets) < 2:
            raise
    else:
        return []
    return [error for settlement in settlements for error in await _settle_each(reader, [settlement])]


def _stay(source: str, moved: int, left: Sequence[Exception]) -> Exception:
    """The error for messages that could not be moved: of the type of the first error, with a summary of all."""
    reasons = list(dict.fromkeys(safe_str(error).rstrip(".") for error in left))
    more = f", and {len(reasons) - 1} more reasons" if len(reasons) > 1 else ""
    text = f"{moved:,} moved; {len(left):,} stay in {source!r}: {reasons[0]}{more}."
    first = left[0]
    made = type(first)(text) if type(first) in (ConfigurationError, QueueError) else SendError(text)
    made.__cause__ = first
    return made
