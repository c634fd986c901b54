"""The steps of the demo: send, handle, show what failed, redrive it, count."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextlib import suppress
from importlib.resources import files
from pathlib import Path
from secrets import token_hex
from typing import Final, Protocol

from streamtools.admin import QueueAdmin
from streamtools.cli.demo.service import Queues, Warehouses, build
from streamtools.cli.demo.tally import Result, Row, Tally
from streamtools.codec import JSON
from streamtools.errors import QueueError
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.redrive import ErrorFilter, ErrorGroup, group_errors, redrive

#: The number of events in one confirmed batch.
BATCH: Final = 500
#: The warehouse that is closed at first, in Tromsø.
CLOSED: Final = "TOS-1"
#: The filter that an operator would type after `streamtools errors redrive --filter`.
FILTER: Final = "exception=WarehouseClosed"
#: Seconds between two questions for a queue's depth, and the most seconds to ask.
POLL_INTERVAL: Final = 0.05
POLL_TIMEOUT: Final = 10.0


class Narrator(Protocol):
    """Prints what happens."""

    def phase(self, text: str, total: int) -> None:
        """Begin a phase of `total` messages."""

    def progress(self, done: int) -> None:
        """Show how many messages of the phase are done."""

    def errors(self, groups: Sequence[ErrorGroup]) -> None:
        """Show the content of the error queue."""


def load() -> list[bytes]:
    """Return the order events, one JSON line each.

    The file is `examples/data/orders.jsonl`, where readers find it. A wheel has a copy beside this module.
    """
    packed = files("streamtools.cli.demo") / "orders.jsonl"
    if packed.is_file():
        return packed.read_bytes().splitlines()
    checkout = Path(__file__).parents[3] / "examples" / "data" / "orders.jsonl"
    return checkout.read_bytes().splitlines()


def prepare(url: str) -> Course:
    """Prepare the demo at `url`, with queues of its own.

    Raises:
        ConfigurationError: the URL cannot be used, or its protocol has no error queue.
    """
    admin = QueueAdmin(url=url)
    return Course(url, Queues(f"streamtools-demo-{token_hex(3)}"), admin, load())


class Course:
    """One run of the demo.

    Parameters:
        queues: names that nothing else uses.
        admin: a QueueAdmin that is not open yet.
        events: the lines to send.
    """

    def __init__(self, url: str, queues: Queues, admin: QueueAdmin, events: Sequence[bytes]) -> None:
        self._url = url
        self._queues = queues
        self._admin = admin
        self._events = events
        self._tally = Tally()
        self._warehouses = Warehouses(CLOSED)
        self._sent = 0

    async def run(self, narrator: Narrator) -> Result:
        """Run all phases, and delete the queues at the end, whatever happens.

        Raises:
            StreamToolsError: the broker cannot be reached, or refuses an operation.
        """
        self._narrator = narrator
        async with self._admin:
            try:
                return await self._run()
            finally:
                for name in (*self._queues, self._queues.error):
                    with suppress(QueueError):  # the queue was never created
                        await self._admin.delete(name)

    async def _run(self) -> Result:
        begin = time.monotonic()
        await self._send(self._events)
        async with build(self._url, self._queues, self._warehouses, self._tally.watch):
            await self._handle()
            failed = await self._look()
            redriven = await self._put_back(failed)
        left = await self._depth(len(failed) - redriven)
        return self._result(failed, redriven, left, time.monotonic() - begin)

    async def _send(self, events: Sequence[bytes]) -> None:
        self._narrator.phase("Order events sent, as they came in", len(events))
        async with Producer(self._queues.orders, url=self._url) as producer:
            for start in range(0, len(events), BATCH):
                batch = [self._message(number, events[number]) for number in _range(start, BATCH, len(events))]
                self._sent += len(await producer.send_messages(batch))
                self._narrator.progress(self._sent)

    def _message(self, number: int, line: bytes) -> Message:
        # Not `producer.send(data)`, because the lines must arrive byte for byte, even invalid ones.
        return Message(
            body=line,
            queue=self._queues.orders,
            id=f"order-{number + 1:06}",
            type="demo.Order",
            content_type=JSON,
            time=time.time(),
        )

    async def _handle(self) -> None:
        self._narrator.phase("Handled: orders → payments → shipments", self._sent)
        await self._tally.until(self._all_ended)

    def _all_ended(self) -> bool:
        shipped = self._tally.handled[self._queues.shipments]
        ended = len(shipped) + sum(len(ids) for ids in self._tally.rejected.values())
        self._narrator.progress(ended)
        return ended >= self._sent

    async def _look(self) -> Sequence[Message]:
        rejected = sum(len(ids) for ids in self._tally.rejected.values())
        await self._depth(rejected)
        failed = await self._admin.peek(self._queues.error, limit=self._sent)
        self._narrator.errors(group_errors(failed))
        return failed

    async def _put_back(self, failed: Sequence[Message]) -> int:
        chosen = ErrorFilter([FILTER])
        number = sum(chosen(message) for message in failed)
        self._narrator.phase("Tromsø opens again: its shipments are redriven", number)
        self._warehouses.open(CLOSED)
        before = len(self._tally.handled[self._queues.shipments])
        moved = await redrive(self._admin, self._queues.error, where=chosen, failed_in=[self._queues.shipments])

        def shipped() -> bool:
            done = len(self._tally.handled[self._queues.shipments]) - before
            self._narrator.progress(done)
            return done >= moved

        await self._tally.until(shipped)
        return moved

    async def _depth(self, expected: int) -> int:
        """Return the depth of the error queue as soon as it is as expected, or after POLL_TIMEOUT seconds."""
        deadline = time.monotonic() + POLL_TIMEOUT
        # No broker says whether its count is up to date, so we ask again and again.
        while (depth := (await self._admin.stats(self._queues.error)).ready) != expected:
            if time.monotonic() > deadline:
                break
            await asyncio.sleep(POLL_INTERVAL)
        return depth

    def _result(self, failed: Sequence[Message], redriven: int, left: int, seconds: float) -> Result:
        queues, handled = self._queues, self._tally.handled
        sent = {
            queues.orders: self._sent,
            queues.payments: len(handled[queues.orders]),
            queues.shipments: len(handled[queues.payments]),
        }
        dead = {name: {m.id for m in failed if m.error is not None and m.error.queue == name} for name in queues}
        rows = tuple(
            Row(
                queue=name.rpartition(".")[2],
                sent=sent[name],
                handled=len(handled[name]),
                retried=len(self._tally.retried[name]),
                dead_lettered=len(dead[name]),
                redriven=redriven if name == queues.shipments else 0,
            )
            for name in queues
        )
        return Result(url=self._admin.settings.safe_url, rows=rows, left=left, seconds=seconds)


def _range(start: int, step: int, end: int) -> range:
    return range(start, min(start + step, end))
