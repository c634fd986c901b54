"""Whatever a handler, its middleware or a body does: each delivery has one verdict, and the consumer lives."""

from __future__ import annotations

import asyncio
import tempfile
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from secrets import token_hex
from typing import Any

from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import BaseModel

from streamtools import CONSUMER_LOOPS, PRODUCERS, Consumer, Delivery, Message, Retry
from streamtools.delivery import Settlement, current
from streamtools.testing.waiting import TIMEOUT, eventually
from streamtools.types import Handler
from streamtools.verdicts import VerdictKind
from tests.core import behaviours
from tests.core.behaviours import FINE, HANGS, Behaviours

PROBE = "probe"


class Order(BaseModel):
    """What a handler may want."""

    id: int


@dataclass(frozen=True)
class Sent:
    """One message, and what is done in each of its runs; after those, all is well."""

    body: bytes
    content_type: str | None
    runs: tuple[Behaviours, ...]


@dataclass(frozen=True)
class Case:
    """A consumer and its messages."""

    messages: tuple[Sent, ...]
    wants: Any = Any
    threads: bool = False
    retries: int | None = 1
    concurrency: int = 1
    ordered_by: Any = None
    ack: Any = "after"
    prefetch: int = 10


def runs(handler: Sequence[str], layers: Sequence[str]) -> st.SearchStrategy[tuple[Behaviours, ...]]:
    """What is done in up to four runs, by two middlewares and the handler."""
    layer = st.sampled_from(layers) | st.just("pass")
    deed = st.builds(Behaviours, layers=st.tuples(layer, layer), handler=st.sampled_from(handler))
    return st.lists(deed, max_size=4).map(tuple)


bodies = st.sampled_from([b"1", b'{"id": 1}', b"[]", b"", b"\xff\xfe", b"{", b'"text"']) | st.binary(max_size=8)
content_types = st.sampled_from(
    [None, "application/json", "text/plain", "text/plain; charset=utf-16", "text/plain; charset=nonsense",
     "text/plain; charset=undefined", "text/x; charset=idna", "application/octet-stream", "a/b+json", "", ";", "\x00"]
) | st.text(max_size=8)  # fmt: skip


@st.composite
def cases(
    draw: st.DrawFn,
    handlers: Sequence[str] = behaviours.HANDLERS,
    layers: Sequence[str] = behaviours.MIDDLEWARE,
    **fixed: Any,
) -> Case:
    """Any consumer with any messages whose handler does any of these."""
    sent = st.builds(Sent, body=bodies, content_type=content_types, runs=runs(handlers, layers))
    options = {
        "messages": st.lists(sent, min_size=1, max_size=6).map(tuple),
        "wants": st.sampled_from([Any, int, str, bytes, Order, Message]),
        "retries": st.sampled_from([0, 1, 2, 3, None]),
        "concurrency": st.integers(1, 3),
        "ordered_by": st.sampled_from([None, None, "queue", "key"]),
        "ack": st.sampled_from(["after", "after", "on_receive"]),
        "prefetch": st.integers(1, 10),
        **{name: st.just(value) for name, value in fixed.items()},
    }
    return Case(**{name: draw(strategy) for name, strategy in options.items()})


def watched(protocol: str) -> type[Consumer]:
    """The protocol's consumer; it keeps what it gave and what was done with it."""

    class Watched(CONSUMER_LOOPS[protocol]):  # type: ignore[misc]
        def __init__(self, *args: Any, **kwargs: Any) -> None:
            super().__init__(*args, **kwargs)
            self.given: list[Delivery] = []
            self.verdicts: dict[Delivery, list[VerdictKind]] = defaultdict(list)

        async def _receive(self, limit: int) -> Sequence[Delivery]:
            batch = await super()._receive(limit)
            self.given += batch
            return batch

        async def _settle(self, settlements: Sequence[Settlement]) -> None:
            await super()._settle(settlements)
            for settlement in settlements:
                self.verdicts[settlement.delivery].append(settlement.verdict.kind)

    return Watched


class Service:
    """The case, at work."""

    def __init__(self, case: Case, protocol: str, url: str) -> None:
        self.case = case
        self.url = url
        self.protocol = protocol
        self.hanging = 0
        self.probed = asyncio.Event()
        self._runs: Counter[str] = Counter()
        self.consumer: Any = watched(protocol)(
            "orders", url=url, retry=Retry(retries=case.retries, delay=0, jitter=0), concurrency=case.concurrency,
            ordered_by=case.ordered_by, ack=case.ack, prefetch=case.prefetch,
            middleware=[self._count, *(self._layer(n) for n in range(2))],
        )  # fmt: skip

    async def _count(self, message: Message, call_next: Handler) -> Any:
        if message.id == PROBE:
            self.probed.set()
            return await _ack_by_hand() if self.case.ack == "manual" else None
        self._runs[message.id] += 1
        return await call_next(message)

    def _layer(self, number: int) -> Any:
        async def layer(message: Message, call_next: Handler) -> Any:
            layers = self._behaviours(message).layers
            return await behaviours.surround(layers[number] if number < len(layers) else "pass", message, call_next)

        return layer

    def _behaviours(self, message: Message) -> Behaviours:
        planned = self.case.messages[int(message.id)].runs
        run = self._runs[message.id] - 1
        return planned[run] if run < len(planned) else FINE

    def handler(self) -> Any:
        """The handler, which wants what the case says."""
        wants = self.case.wants

        async def handle(msg: wants, message: Message, delivery: Delivery) -> object:  # type: ignore[valid-type]
            deed = self._behaviours(message).handler
            if self.case.ack == "manual" and deed == "return":
                deed = "ack"
            self.hanging += deed in HANGS
            return await behaviours.do(deed, delivery)

        def handle_in_thread(msg: wants, message: Message) -> object:  # type: ignore[valid-type]
            return behaviours.do_at_once(self._behaviours(message).handler)

        chosen: Any = handle_in_thread if self.case.threads else handle
        chosen.__annotations__["msg"] = wants
        return chosen

    async def send(self) -> None:
        """All messages, and behind them one that shows whether anyone is alive."""
        batch = [
            Message(body=m.body, queue="orders", id=str(n), content_type=m.content_type, key=str(n % 2))
            for n, m in enumerate(self.case.messages)
        ]
        async with PRODUCERS[self.protocol]("orders", url=self.url) as producer:
            await producer.send_messages([*batch, Message(body=b"", queue="orders", id=PROBE)])

    def final(self) -> bool:
        """No message is on its way any more."""
        last = {d.message.id: kinds[-1] for d, kinds in self.consumer.verdicts.items()}
        done = [kind for kind in last.values() if kind not in (VerdictKind.RETRY, VerdictKind.RELEASE)]
        return len(done) == len(self.case.messages) + 1 and self.consumer.in_flight == 0

    async def leftovers(self, queue: str) -> list[str]:
        """The ids of what waits there."""
        async with CONSUMER_LOOPS[self.protocol](queue, url=self.url) as consumer:
            found = []
            while batch := await consumer.receive(100, timeout=0):
                found += [delivery.message.id for delivery in batch]
            return found


async def check(case: Case, protocol: str, url: str) -> Service:
    """Send, run until everything is done or a handler hangs, stop, and count."""
    service = Service(case, protocol, url)
    consumer = service.consumer
    await service.send()
    running = asyncio.create_task(consumer.run(consumer()(service.handler())))
    await eventually(
        lambda: running.done() or service.hanging or (service.probed.is_set() and service.final()), timeout=TIMEOUT
    )
    assert not running.done(), running.result()
    consumer.stop(0.0 if service.hanging else TIMEOUT)
    async with asyncio.timeout(TIMEOUT):
        await running
    counts = Counter(len(consumer.verdicts[delivery]) for delivery in consumer.given)
    assert set(counts) <= {1} or (service.hanging and counts.keys() <= {0, 1})
    assert counts[0] <= service.hanging
    gone = [d.message.id for d, (kind,) in consumer.verdicts.items() if kind in (VerdictKind.ACK, VerdictKind.DROP)]
    left = await service.leftovers("orders") + await service.leftovers("error")
    if case.ack != "on_receive":
        assert Counter(gone + left) == Counter([*(str(n) for n in range(len(case.messages))), PROBE])
    return service


async def _ack_by_hand() -> None:
    delivery = current.get()
    assert delivery is not None
    await delivery.ack()


def run(case: Case, protocol: str = "asyncio") -> Service:
    """In a loop and with a broker of its own."""
    if protocol == "asyncio":
        return asyncio.run(check(case, protocol, f"asyncio://{token_hex(4)}"))
    with tempfile.TemporaryDirectory() as directory:
        return asyncio.run(check(case, protocol, f"sqlite:///{directory}/queues.db"))


bounded = settings(max_examples=100, derandomize=False, print_blob=True, deadline=None)
fewer = settings(bounded, max_examples=20)


@bounded
@given(cases([*behaviours.HANDLERS, *behaviours.CANCELS]))
def test_every_delivery_has_one_verdict(case: Case) -> None:
    run(case)


@bounded
@given(cases(threads=True))
def test_of_a_def_handler_too(case: Case) -> None:
    run(case)


@bounded
@given(cases([*HANGS, *HANGS, "return", "an error"], ack="after"))
def test_what_hangs_at_the_end_goes_back(case: Case) -> None:
    run(case)


@bounded
@given(
    cases([*behaviours.BY_HAND, "an error", "drop"])
    | cases([*behaviours.BY_HAND, "an error"], behaviours.LOUD, ack="manual")
)
def test_by_hand_too(case: Case) -> None:
    run(case)


@fewer
@given(cases([*behaviours.HANDLERS, *behaviours.CANCELS]), st.just("sqlite"))
def test_in_a_file_too(case: Case, protocol: str) -> None:
    run(case, protocol)
