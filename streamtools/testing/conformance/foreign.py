"""Cases of messages from other programs: whatever a message contains, no other message is affected.

A driver's test class says what another program may send, as a hypothesis strategy, and publishes it without
streamtools:

```python
class TestBoxes(ConformanceSuite):
    foreign = st.dictionaries(st.text(), st.binary())    # everything except the body, in any form that you choose

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        for letter in letters:
            await box.put(stage.queue, letter.body, headers=letter.beside)
        return ()
```

`STREAMTOOLS_FOREIGN=2000` makes 2,000 messages in each case instead of a few dozen, and `STREAMTOOLS_FOREIGN_SEED=7`
makes other messages.
"""

from __future__ import annotations

import asyncio
import gzip
import json
import os
from collections import Counter
from collections.abc import AsyncIterator, Callable, Collection, Iterable, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from typing import Any, ClassVar, Final

import pytest

from streamtools.admin import QueueAdmin
from streamtools.bus import Bus
from streamtools.delivery import current
from streamtools.errors import Reject
from streamtools.message import Message
from streamtools.redrive import ErrorFilter, group_errors
from streamtools.retry import Retry
from streamtools.runner import ConsumerRunner
from streamtools.testing.conformance.cases import Cases, needs
from streamtools.testing.conformance.stage import Stage
from streamtools.testing.waiting import eventually

#: The number of messages in each case, unless the environment sets another.
FEW: Final = 40
COUNT, SEED = "STREAMTOOLS_FOREIGN", "STREAMTOOLS_FOREIGN_SEED"
#: The number of messages that are published together.
TOGETHER: Final = 200
#: The most seconds for a hundred messages.
HUNDRED_TIMEOUT: Final = 20.0


@dataclass(frozen=True, slots=True)
class Letter:
    """A message of another program.

    Attributes:
        number: the number of the message.
        body: its bytes, which contain the number; None for a tombstone.
        beside: everything except the body, as the driver's strategy has made it.
    """

    number: int
    body: bytes | None
    beside: Any


def _event(number: int) -> bytes:
    event = {
        "specversion": "1.0",
        "id": f"event-{number}",
        "source": "/other",
        "type": "other.Event",
        "data": {"n": number},
    }
    return json.dumps(event).encode()


#: Bodies of many kinds; each contains its number.
BODIES: Final[dict[str, Callable[[int], bytes]]] = {
    "JSON": lambda n: b'{"n": %d}' % n,
    "text": lambda n: b"plain text %d" % n,
    "a number": lambda n: b"%d" % (10**9 + n),
    "bytes": lambda n: b"\x00\xff\xfe%d\x00" % n,
    "deep": lambda n: b"[" * 5000 + b"%d" % n,
    "no JSON": lambda n: b'{"n": %d, "x": NaN, }' % n,
    "a lone surrogate": lambda n: b'{"n": %d, "x": "\\ud800"}' % n,
    "UTF-16": lambda n: f'{{"n": {n}}}'.encode("utf-16"),
    "gzip": lambda n: gzip.compress(b'{"n": %d}' % n, mtime=0),
    "gzip that was cut": lambda n: gzip.compress(b"%d" % n + os.urandom(50), mtime=0)[:-10],
    "an event": _event,
    "a batch of events": lambda n: b"[" + _event(n) + b"]",
    "large": lambda n: (b"%d " % n) * 4000,
}
#: The errors that a failing handler raises.
FAILURES: Final[Sequence[Callable[[], BaseException]]] = (
    lambda: ValueError("wrong"),
    lambda: Reject("no: \udcff \x1b[31m"),
    lambda: RuntimeError("ä" * 100_000),
    lambda: KeyError("\ud800"),
)


class Ledger:
    """A handler that fails for every second letter, and counts the bodies that it handles."""

    def __init__(self, letters: Iterable[Letter], *, failing: bool = True) -> None:
        #: A tombstone has no number, so that all of them fail.
        self._fails = {x.body: x.number for x in letters if failing and (x.body is None or x.number % 2)}
        self.handled: Counter[bytes | None] = Counter()

    async def __call__(self, msg: Any, message: Message) -> None:
        delivery = current.get()
        assert delivery is not None
        body = delivery.message.body
        if (number := self._fails.get(body)) is not None:
            raise FAILURES[number % len(FAILURES)]()
        self.handled[body] += 1


class ForeignCases(Cases):
    """Every message of another program is handled, or goes to the error queue unchanged; no other is affected."""

    #: A hypothesis strategy of what may stand beside a body; None where nobody else can send.
    foreign: ClassVar[Any] = None

    async def publish_foreign(self, stage: Stage, letters: Sequence[Letter]) -> Collection[int]:
        """Publish letters to the queue of `stage`, as another program would.

        Returns:
            The numbers of those that were not taken, as whoever sent them was told.
        """
        raise TypeError(f"{type(self).__name__} does not say how others publish: write its publish_foreign().")

    async def look_at_foreign(self, stage: Stage, queue: str) -> None:
        """Read the queue by further means, such as commands; this must not change the queue."""

    @pytest.fixture
    def letters(self) -> list[Letter]:
        """The letters that other programs send in this case."""
        if self.foreign is None:
            pytest.skip(f"{type(self).__name__} says nothing of what others send (foreign)")
        count, seed = int(os.environ.get(COUNT, FEW)), int(os.environ.get(SEED, "0"))
        return draw_letters(self.foreign, count, tombstones=self.features.tombstones, seed=seed)

    async def test_whatever_others_send_costs_itself_alone(self, stage: Stage, letters: list[Letter]) -> None:
        ledger = Ledger(letters)
        async with self._running(stage, ledger):
            sent = await self._publish(stage, letters)
            failed = await self._all_are_somewhere(stage, ledger, sent)
            await self._goes_on(stage, ledger)
        if not self.features.error_queue or not self.features.admin:
            return
        admin, errors = await stage.admin(), f"{stage.queue}.error"
        await self._look(stage, admin, errors, failed)
        assert await admin.move(errors) == failed.total()
        again = Ledger(letters, failing=False)
        async with self._running(stage, again):
            refused = await self._all_are_somewhere(stage, again, failed)
        await self._take_by_hand(stage, errors, refused)

    @needs("error_queue", "admin")
    async def test_whatever_others_send_to_a_bus_costs_itself_alone(
        self, stage: Stage, letters: list[Letter]
    ) -> None:
        ledger = Ledger(letters)
        bus = Bus(
            stage.queue, url=stage.url, retry=Retry(retries=1, delay=0, jitter=0), concurrency=8,
            error_queue=f"{stage.queue}.error",
        )  # fmt: skip

        @bus.handler
        async def anything(msg: dict[str, Any], message: Message) -> None:
            await ledger(msg, message)

        async with ConsumerRunner(bus) as runner:
            sent = await self._publish(stage, letters)
            failed = await self._all_are_somewhere(stage, ledger, sent)
            assert all(loop.restarts == 0 for loop in runner.health().loops)
        await self._look(stage, await stage.admin(), f"{stage.queue}.error", failed)

    # --- the parts ------------------------------------------------------------------------------

    @asynccontextmanager
    async def _running(self, stage: Stage, ledger: Ledger) -> AsyncIterator[None]:
        async def handler(msg: Any, message: Message) -> None:
            await ledger(msg, message)

        retry = Retry(retries=1, delay=0, jitter=0)
        async with stage.running(handler, concurrency=8, retry=retry):
            yield

    async def _publish(self, stage: Stage, letters: Sequence[Letter]) -> Counter[bytes | None]:
        """Publish letters, and return the bodies of those that the broker accepted."""
        refused: set[int] = set()
        for start in range(0, len(letters), TOGETHER):
            refused.update(await self.publish_foreign(stage, letters[start : start + TOGETHER]))
        return Counter(letter.body for letter in letters if letter.number not in refused)

    async def _all_are_somewhere(
        self, stage: Stage, ledger: Ledger, sent: Counter[bytes | None]
    ) -> Counter[bytes | None]:
        """Wait until each letter was handled or rejected once, and return the bodies of the rejected ones."""
        if not self.features.error_queue or not self.features.admin:
            await eventually(lambda: ledger.handled == sent, "each that was taken was handled")
            return Counter()
        admin, errors = await stage.admin(), f"{stage.queue}.error"

        async def settled() -> bool:
            left = sent.total() - ledger.handled.total()
            # The number of those that wait may count more: the markers of transactions in Kafka's log.
            return (await admin.stats(errors)).ready >= left and len(await admin.peek(errors, 2 * left)) >= left

        try:
            await eventually(settled, timeout=HUNDRED_TIMEOUT * (1 + sent.total() / 100))
        except TimeoutError:
            pass
        found = Counter(message.body for message in await admin.peek(errors, 2 * sent.total()))
        somewhere = ledger.handled + found
        assert somewhere == sent, f"lost: {[*(sent - somewhere)]}; come twice: {[*(somewhere - sent)]}"
        return found

    async def _goes_on(self, stage: Stage, ledger: Ledger) -> None:
        """Check that the consumer works as before."""
        await stage.send({"after": "all of them"})
        body = b'{"after":"all of them"}'
        await eventually(lambda: ledger.handled.pop(body, 0), "what is sent afterwards is handled")

    async def _look(self, stage: Stage, admin: QueueAdmin, errors: str, failed: Counter[bytes | None]) -> None:
        seen = await admin.peek(errors, 2 * failed.total())
        assert Counter(message.body for message in seen) == failed
        assert sum(group.count for group in group_errors(seen)) == len(seen)
        for message in seen:
            assert message.error is not None and message.error.queue == stage.queue and message.error.reason
            assert ErrorFilter([f"queue={stage.queue}", "reason=*", "type=*", "key=*", "a*b"])(message) is False
        await self.look_at_foreign(stage, errors)
        await eventually(lambda: _holds(admin, errors, failed.total()), "looking has changed nothing")

    async def _take_by_hand(self, stage: Stage, queue: str, expected: Counter[bytes | None]) -> None:
        consumer = await stage.consumer(queue, error_queue="unused", prefetch=100)
        taken: Counter[bytes | None] = Counter()
        while taken.total() < expected.total():
            batch = await consumer.receive(100, timeout=HUNDRED_TIMEOUT)
            assert batch, f"{expected.total() - taken.total()} do not come: {[*(expected - taken)]}"
            taken.update(delivery.message.body for delivery in batch)
            await asyncio.gather(*(delivery.ack() for delivery in batch))
        assert taken == expected
        await consumer.close()


async def _holds(admin: QueueAdmin, queue: str, number: int) -> bool:
    return len(await admin.peek(queue, 2 * number)) == number


def draw_letters(beside: Any, count: int, *, tombstones: bool, seed: int = 0) -> list[Letter]:
    """Draw letters once for all cases: messages on a broker cannot be made smaller afterwards.

    Parameters:
        beside: the strategy of what stands beside a body.
        tombstones: some have no body.
        seed: another number makes other letters.
    """
    import hypothesis  # noqa: PLC0415 - the suite is imported without it
    from hypothesis import HealthCheck, Phase, given, settings  # noqa: PLC0415
    from hypothesis import strategies as st  # noqa: PLC0415

    found: list[Letter] = []
    kinds = st.sampled_from([*BODIES, *(["a tombstone"] if tombstones else [])])

    @hypothesis.seed(seed)
    @settings(
        max_examples=count,
        database=None,
        phases=[Phase.generate],
        deadline=None,
        suppress_health_check=[*HealthCheck],
    )
    @given(kinds, beside)
    def draw(kind: str, value: Any) -> None:
        number = len(found)
        found.append(Letter(number, BODIES[kind](number) if kind in BODIES else None, value))

    draw()
    return found
