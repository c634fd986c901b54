"""A service among messages of other programs: a route, a bus and whatever an operator types, all at once.

Rounds follow each other. In each of them honest messages and those of other programs are sent to a route and to a
bus, half of which fail, while commands run as processes of their own. At its end every message must be somewhere.
"""

from __future__ import annotations

import asyncio
import gc
import json
import os
import random
import sys
from collections import Counter
from collections.abc import Awaitable, Callable, Collection, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any, Final

from streamtools import Bus, ConsumerFactory, ConsumerRunner, Message, MessageContext, Producer, QueueAdmin, Retry
from streamtools.delivery import current
from streamtools.redrive import ErrorFilter, group_errors
from streamtools.testing.conformance.foreign import FAILURES, Letter
from streamtools.testing.waiting import eventually
from tests.brokers.address import ROOT

#: Messages of other programs in a round, for each of the two queues; and honest ones.
LETTERS: Final = 60
HONEST: Final = 40
#: Messages that are sent together.
TOGETHER: Final = 10
#: Commands at work at once.
COMMANDS: Final = 2
#: Seconds that a command, or what is left of a round, may take.
PATIENCE: Final = 90.0
#: Bytes by which the process may grow after its second round.
GROWTH: Final = 120 * 2**20

Publish = Callable[[str, Sequence[Letter]], Awaitable[Collection[int]]]
#: Makes the words of a command.
Command = Callable[["Mix"], Sequence[str]]


@dataclass
class Place:
    """Where a mix runs.

    Attributes:
        url: the address.
        queue: a name that nothing else uses.
        foreign: a strategy of what may stand beside a body.
        publish: sends letters to a queue as another program; the numbers of those that were not taken.
        options: of the route and of the bus.
        commands: what operators type there, in processes of their own.
    """

    url: str
    queue: str
    foreign: Any
    publish: Publish
    options: dict[str, Any] = field(default_factory=dict)
    commands: Sequence[Command] = ()

    @property
    def bus(self) -> str:
        """The queue of the bus."""
        return f"{self.queue}-bus"

    @property
    def out(self) -> str:
        """Where the handlers of honest messages send."""
        return f"{self.queue}-out"

    @property
    def errors(self) -> str:
        """The error queue of both."""
        return f"{self.queue}-errors"


class Book:
    """What became of the messages of one round."""

    def __init__(self) -> None:
        #: Bodies of other programs, by the queue that they were sent to.
        self.sent: Counter[bytes | None] = Counter()
        self.handled: Counter[bytes | None] = Counter()
        self.failing: dict[bytes | None, int] = {}
        self.honest: set[int] = set()
        self.runs: Counter[int] = Counter()
        self.done: Counter[int] = Counter()
        self.out: Counter[int] = Counter()

    def run(self, body: bytes | None) -> int | None:
        """A handler runs: raise for those that fail; the number of an honest one."""
        if body is not None and body.startswith(b'{"honest":'):
            number = int(body[10:-1])
            self.runs[number] += 1
            if number % 4 == 1 and self.runs[number] == 1 or number % 4 == 3 and self.runs[number] <= 2:
                raise ValueError(f"no luck with {number}")
            return number
        if (number := self.failing.get(body, -1)) >= 0:
            raise FAILURES[number % len(FAILURES)]()
        self.handled[body] += 1
        return None


class Mix:
    """One service, its senders and its operators.

    Parameters:
        place: where.
        letters: what other programs send.
        seed: another number makes another history.
    """

    def __init__(self, place: Place, letters: Sequence[Letter], seed: int) -> None:
        self.place = place
        self.letters = letters
        self.random = random.Random(seed)
        self.book = Book()
        self.numbers = 0
        self.redriving = asyncio.Lock()
        self.commands: Counter[str] = Counter()
        self.totals: Counter[str] = Counter()
        self.sizes: list[int] = []
        self._make()

    def _make(self) -> None:
        place = self.place
        options: dict[str, Any] = {
            "url": place.url, "retry": Retry(retries=1, delay=0, jitter=0), "concurrency": 8,
            "error_queue": place.errors,
        }  # fmt: skip
        consumers = ConsumerFactory(**options)
        self.producer = Producer(place.queue, url=place.url)
        results = Producer(place.out, url=place.url, outbox=True)
        self.bus = Bus(place.bus, **options, **place.options)

        @consumers.route(place.queue, **place.options)
        async def handle(msg: Any, message: Message) -> None:
            if (number := self.book.run(_body())) is not None:
                await results.send({"out": number})
                self.book.done[number] += 1

        @consumers.route(place.out)
        async def gather(msg: dict[str, int]) -> None:
            self.book.out[msg["out"]] += 1

        @self.bus.handler
        async def serve(msg: dict[str, Any], context: MessageContext) -> Any:
            if (number := self.book.run(_body())) is not None:
                await context.send({"out": number}, place.out)
                self.book.done[number] += 1
                return number
            return None

        self.runner = ConsumerRunner(consumers, self.bus, self.producer, results)

    # --- rounds ---------------------------------------------------------------------------------

    async def run(self, seconds: float) -> None:
        """Rounds until the time is over; at least one."""
        end = asyncio.get_running_loop().time() + seconds
        async with self.runner:
            while not self.totals["rounds"] or asyncio.get_running_loop().time() < end:
                await self._round()
            assert self.runner.health().ready
        if len(self.sizes) > 3:
            assert max(self.sizes[2:]) - self.sizes[1] < GROWTH, [size >> 20 for size in self.sizes]

    async def _round(self) -> None:
        self.book = Book()
        letters = self.random.sample(self.letters, 2 * LETTERS)
        async with asyncio.TaskGroup() as group:
            work = [group.create_task(self._send_foreign(letters)), group.create_task(self._send_honest())]
            if self.place.commands:
                for _ in range(COMMANDS):
                    group.create_task(self._operate(work))
        await self._check(await self._settled())
        assert all(loop.restarts == 0 for loop in self.runner.health().loops), self.runner.health()
        self._count()

    async def _send_foreign(self, letters: Sequence[Letter]) -> None:
        self.book.failing = {x.body: x.number for x in letters if x.body is None or x.number % 2}
        for start in range(0, len(letters), TOGETHER):
            batch = letters[start : start + TOGETHER]
            refused = await self.place.publish(self.random.choice([self.place.queue, self.place.bus]), batch)
            self.book.sent.update(letter.body for letter in batch if letter.number not in refused)

    async def _send_honest(self) -> None:
        for _ in range(0, HONEST, 4):
            numbers = range(self.numbers, self.numbers + 4)
            self.numbers += 4
            self.book.honest.update(numbers)
            a, b, c, d = ({"honest": number} for number in numbers)
            await self._ask(a)
            await self._insist(lambda b=b: self.producer.send(b))
            await self._insist(lambda c=c, d=d: self.bus.send(c, self.place.bus))
            await self._insist(lambda d=d: self.producer.send(d))

    async def _ask(self, payload: dict[str, int]) -> None:
        answer = await self.bus.request(payload, self.place.bus, timeout=PATIENCE, returns=int)
        assert answer == payload["honest"]

    async def _insist(self, send: Callable[[], Awaitable[Any]]) -> None:
        """Where a call is answered, its sender keeps what failed, and sends it again."""
        while True:
            try:
                await send()
                return
            except Exception:
                if not self.producer.features.reply:
                    raise

    # --- operators ------------------------------------------------------------------------------

    async def _operate(self, work: Sequence[asyncio.Task[Any]]) -> None:
        while not all(task.done() for task in work):
            await self._type(*self.random.choice(self.place.commands)(self))

    @property
    def redrive(self) -> Sequence[str]:
        """Without a question, to the two queues that are ours."""
        place = self.place
        return "errors", "redrive", "--queue", place.errors, "--yes", "--from", place.queue, "--from", place.bus

    def payload(self) -> str:
        """Of a new honest message."""
        number, self.numbers = self.numbers, self.numbers + 4
        self.book.honest.add(number)
        return json.dumps({"honest": number}, separators=(",", ":"))

    async def _type(self, *arguments: str) -> None:
        """Run a command, but only one redrive at a time: on Kafka the second of two is refused."""
        async with self.redriving if arguments[:2] == ("errors", "redrive") else nullcontext():
            await self._run_command(arguments)

    async def _run_command(self, arguments: Sequence[str]) -> None:
        """A crash, an unexpected exit code or a hang is a failure."""
        command = await asyncio.create_subprocess_exec(
            sys.executable, "-m", "streamtools", *arguments, "--url", self.place.url,
            cwd=ROOT, env={**os.environ, "PYTHONPATH": str(ROOT)},
            stdin=asyncio.subprocess.DEVNULL, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.PIPE,
        )  # fmt: skip
        try:
            async with asyncio.timeout(PATIENCE):
                out, err = await command.communicate()
        finally:
            if command.returncode is None:
                command.kill()
                await command.communicate()
        told = f"streamtools {' '.join(arguments)}: {command.returncode}\n{out[-2000:]!r}\n{err.decode()[-4000:]}"
        assert b"Traceback" not in err, told
        assert command.returncode == 0 or (command.returncode == 1 and _expected(err)), told
        self.commands[" ".join(word for word in arguments[:2] if word.isalpha())] += 1

    # --- the end of a round ---------------------------------------------------------------------

    async def _settled(self) -> list[Message]:
        """Wait until every message of the round is somewhere; what the error queue holds then."""
        book = self.book
        found: list[Message] = []

        async def settled() -> bool:
            found[:] = await self._failed()
            if honest := [message for message in found if (message.body or b"").startswith(b'{"honest":')]:
                await self._redrive(honest)
                return False
            return book.honest <= set(book.out) and not book.sent - book.handled - _bodies(found)

        try:
            await eventually(settled, timeout=PATIENCE)
        except TimeoutError:
            missing = book.honest - set(book.out)
            lost = book.sent - book.handled - _bodies(found)
            raise AssertionError(f"honest: {missing} (done {missing & set(book.done)}); others: {[*lost]}") from None
        return found

    async def _failed(self) -> list[Message]:
        if not self.producer.features.admin:
            return []
        async with QueueAdmin(url=self.place.url) as admin:
            return list(await admin.peek(self.place.errors, 10_000))

    async def _redrive(self, honest: Sequence[Message]) -> None:
        if self.place.commands:
            await self._type(*self.redrive, "--filter", '"honest"')
        else:
            ids = {message.id for message in honest}
            async with QueueAdmin(url=self.place.url) as admin:
                named = [self.place.queue, self.place.bus]
                await admin.move(self.place.errors, failed_in=named, where=lambda message: message.id in ids)

    async def _check(self, failed: Sequence[Message]) -> None:
        book = self.book
        strange = _bodies(failed) - book.sent
        assert not strange, f"nobody sent this to the error queue: {[*strange]}"
        for message in failed:
            assert message.error is not None and message.error.reason, message
            assert message.error.queue in (self.place.queue, self.place.bus), message.error
        assert sum(group.count for group in group_errors(failed)) == len(failed)
        assert not [message for message in failed if ErrorFilter(["reason=*", "type=*", "no such word"])(message)]
        if self.place.options.get("exactly_once"):
            twice = {number: times for number, times in book.out.items() if times != 1}
            assert not twice, f"what honest messages sent has left more than once: {twice}"
        if self.producer.features.admin:
            async with QueueAdmin(url=self.place.url) as admin:
                await admin.purge(self.place.errors)

    def _count(self) -> None:
        book = self.book
        gc.collect()
        self.sizes.append(_resident())
        self.totals.update(
            rounds=1,
            honest=len(book.honest),
            honest_repeats=book.out.total() - len(book.out),
            foreign=book.sent.total(),
            foreign_handled=book.handled.total(),
            foreign_repeats=(book.handled - book.sent).total(),
        )

    def counts(self) -> dict[str, object]:
        """What has happened, for the reader of the test's output."""
        sizes = [size >> 20 for size in (self.sizes[0], self.sizes[-1])]
        return {**self.totals, "commands": self.commands.total(), "MiB_at_first": sizes[0], "MiB_at_last": sizes[1]}


def _body() -> bytes | None:
    """The body of the message in hand, as it came."""
    delivery = current.get()
    assert delivery is not None
    return delivery.message.body


def _bodies(messages: Sequence[Message]) -> Counter[bytes | None]:
    return Counter(message.body for message in messages)


def _resident() -> int:
    with open("/proc/self/statm", encoding="ascii") as file:
        return int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")


def _expected(err: bytes) -> bool:
    """Words of commands that found nothing to do."""
    return any(words in err for words in (b"cannot move", b"holds no such message"))


#: What operators type everywhere.
ANYWHERE: Final[Sequence[Command]] = (
    lambda mix: ("send", mix.place.queue, mix.payload()),
    lambda mix: ("doctor",),
)
#: And where there are queues to look into.
EVERYTHING: Final[Sequence[Command]] = (
    *ANYWHERE,
    lambda mix: ("errors", "list", "--queue", mix.place.errors),
    lambda mix: ("errors", "list", "--queue", mix.place.errors, "--json", "--filter", f"queue={mix.place.bus}"),
    lambda mix: ("errors", "show", "--queue", mix.place.errors, "--limit", "1000"),
    lambda mix: ("errors", "show", "--queue", mix.place.errors, "--limit", "1000", "--json"),
    lambda mix: ("errors", "redrive", "--queue", mix.place.errors, "--dry-run"),
    lambda mix: (*mix.redrive, "--limit", "10"),
    lambda mix: (*mix.redrive, "--filter", '"honest"'),
    lambda mix: ("receive", mix.place.queue, "--max", "20", "--timeout", "0.2"),
    lambda mix: ("receive", mix.place.bus, "--json", "--timeout", "0.2"),
    lambda mix: ("receive", mix.place.errors, "--json", "--max", "100", "--timeout", "0.2"),
    lambda mix: ("queues", "stats", mix.place.queue, mix.place.bus, mix.place.errors),
    lambda mix: ("queues", "list", "--json"),
)
