"""SQLiteProducer."""

from __future__ import annotations

import sqlite3
import time
from collections.abc import Iterable, Sequence
from itertools import chain
from typing import TYPE_CHECKING, ClassVar, Final, Unpack

from streamtools.driver import Options
from streamtools.drivers.sqlite.database import Session
from streamtools.drivers.sqlite.rows import Rows, encode_all, size_of
from streamtools.drivers.sqlite.schema import NoRoom, TooBig
from streamtools.drivers.sqlite.tables import Tables
from streamtools.errors import ConnectionLost, QueueError, SendError
from streamtools.exchange import Binding, another_type, no_subscriber
from streamtools.features import Features
from streamtools.message import Message
from streamtools.parameters import ProducerParameters, SendManyParameters, SendParameters
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.settings import SQLiteSettings
from streamtools.validation.checks import Declare

FEATURES: Final = Features(
    durable=True,
    processes=True,
    groups=True,
    redelivery=True,
    delivery_count=True,
    atomic=True,
    topics=True,
    cancel=True,
)


class SQLiteProducer(Producer, protocol="sqlite"):
    """Writes messages into a SQLite file; a send returns once they are on the disk.

    Sends of many tasks that wait at the same time share one transaction. A queue that consumers with
    `group=` read has one copy of each message for each group; see SQLiteConsumer.
    """

    features = FEATURES
    settings_class: ClassVar[type[SQLiteSettings]] = SQLiteSettings
    settings: SQLiteSettings
    _session: Session | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        def __init__(self, queue: str, **options: Unpack[ProducerParameters]) -> None: ...
        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[SendParameters]
        ) -> Receipt: ...
        async def send_many(  # type: ignore[override]
            self, payloads: Iterable[object], **options: Unpack[SendManyParameters]
        ) -> list[Receipt]: ...

    async def _open(self) -> None:
        await self._close()
        self._session = await Session.open(
            self.settings, wanted=f"queue {self.queue!r}" if self.declare == "passive" else None
        )
        await declare(self._session, [self.queue], self.declare)

    async def _send(self, batch: Sequence[Message], options: Options) -> None:
        if self._session is None:
            raise ConnectionLost(f"{self!r} is not open.")
        # The base gives up after send_timeout without knowing why; so be earlier and say it.
        patience = min(self.settings.busy_timeout, self.send_timeout * 0.9)
        try:
            rows = encode_all(batch)
            refused = await self._session.call(insert, rows, full=True, patience=patience, new=size_of(rows))
        except (NoRoom, TooBig) as error:
            ids = [m.id for m in batch]
            unfit = ids if isinstance(error, TooBig) else ()
            raise SendError(str(error), refused=ids, unfit=unfit, messages=batch) from error
        except (sqlite3.Error, ValueError, OverflowError) as error:
            why = f"SQLite does not take this: {error}."
            raise SendError(why, refused=[m.id for m in batch], messages=batch) from error
        if refused:
            raise missing(refused)

    def _why_unconfirmed(self) -> str:
        why = self._session.what_it_waits_for() if self._session is not None else None
        return super()._why_unconfirmed() if why is None else why

    async def _close(self) -> None:
        session, self._session = self._session, None
        if session is not None:
            await session.close()


async def declare(session: Session, queues: Sequence[str], how: Declare) -> None:
    """Make queues, or check that they are there.

    Raises:
        QueueError: one is missing, and is not to be made.
    """
    if how is False:
        return
    absent = await session.call(find_or_make, (queues, how is True), full=how is True)
    if absent:
        raise QueueError(
            f"There is no queue {absent[0]!r} in {session.path}. Open a consumer of it first, or use declare=True."
        )


def find_or_make(tables: Tables, arguments: Sequence[tuple[Sequence[str], bool]]) -> list[list[str]]:
    """For each: the queues that are missing, after making them where that is asked."""
    for queues, make in arguments:
        for queue in queues if make else ():
            tables.make_queue(queue)
    return [[queue for queue in queues if not tables.has_queue(queue)] for queues, _ in arguments]


def insert(tables: Tables, arguments: Sequence[Sequence[Rows]]) -> list[list[Rows]]:
    """Write all batches at once; for each, the rows whose queue is missing."""
    batches = arguments[0] if len(arguments) == 1 else [*chain.from_iterable(arguments)]
    absent = tables.insert(batches, time.time())
    if not absent:
        return [[]] * len(arguments)
    which = {id(rows) for rows in absent}
    return [[rows for rows in batches if id(rows) in which] for batches in arguments]


def bind(tables: Tables, arguments: Sequence[tuple[str, Binding]]) -> list[bool | QueueError | None]:
    """Bind each queue; None where it is missing, the error where it cannot be."""
    return [_bind(tables, queue, binding) if tables.has_queue(queue) else None for queue, binding in arguments]


def _bind(tables: Tables, queue: str, binding: Binding) -> bool | QueueError:
    found = tables.exchange_type(binding.exchange.name)
    if found not in (None, binding.exchange.type):
        return another_type(binding.exchange, str(found))
    tables.bind(queue, binding)
    return True


def missing(absent: Sequence[Rows]) -> SendError:
    """The error for rows whose queue does not exist, or whose topic no queue is bound to."""
    target = absent[0].target
    if target.exchange is None:
        number = sum(len(rows.metas) for rows in absent)
        several = "s" if number > 1 else ""
        why = (
            f"There is no queue {target.queue!r}, so {number} message{several} to it cannot be held. "
            "Open a consumer of it first, or a producer with declare=True."
        )
    elif target.clash is not None:
        why = str(another_type(target.exchange, target.clash))
    else:
        why = str(no_subscriber(target.queue, target.exchange))
    return refusal(why, absent)


def refusal(why: str, refused: Sequence[Rows], *, unfit: bool = False) -> SendError:
    """The error for rows that were not written.

    Parameters:
        unfit: they never can be, as they are.
    """
    messages = [message for rows in refused for message in rows.messages]
    ids = [message.id for message in messages]
    return SendError(why, refused=ids, unfit=ids if unfit else (), messages=messages)
