"""Stage: opens, sends and receives for a case, and closes everything at the end."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Generator, Iterable, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import TYPE_CHECKING, Any, Final

from streamtools.admin import ADMINS, QueueAdmin
from streamtools.consumer import CONSUMER_LOOPS, Consumer
from streamtools.delivery import Delivery
from streamtools.errors import SendError
from streamtools.features import Features
from streamtools.message import Message
from streamtools.producer import PRODUCERS, Producer
from streamtools.receipt import Receipt
from streamtools.retry import Retry
from streamtools.testing.waiting import TIMEOUT, eventually

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

#: Two retries without a delay.
QUICK: Final = Retry(retries=2, delay=0, jitter=0)
#: No retry: a failed message goes to the error queue.
NEVER: Final = Retry(retries=0)
#: Retries without an end and without a delay.
ALWAYS: Final = Retry(retries=None, delay=0, jitter=0)
#: Each queue has its own error queue, so that cases do not share one.
ERRORS: Final = "{queue}.error"


class Sent:
    """A send. With a broker it is finished when a case gets it; over HTTP it may still wait for its answer."""

    def __init__(self, task: asyncio.Task[list[Receipt]]) -> None:
        self.task = task

    def __await__(self) -> Generator[Any, None, list[Receipt]]:
        """Wait for the receipts."""
        return self._receipts().__await__()

    async def _receipts(self) -> list[Receipt]:
        async with asyncio.timeout(TIMEOUT):
            return await asyncio.shield(self.task)


class Stage:
    """The queue of one case, and everything that the case opens on it.

    Parameters:
        protocol: the driver's name in the registries.
        url: the address of the broker.
        queue: a queue name that no other case uses.
    """

    def __init__(self, protocol: str, url: str | ProtocolSettings, queue: str) -> None:
        self.protocol = protocol
        self.url = url
        self.queue = queue
        self.features: Features = CONSUMER_LOOPS[protocol].features
        self._stack = AsyncExitStack()
        self._sends: list[asyncio.Task[list[Receipt]]] = []
        self._sender: Producer | None = None

    # --- opening --------------------------------------------------------------------------------

    def new_producer(self, queue: str | None = None, **options: Any) -> Producer:
        """Return a producer that is not open yet."""
        producer = PRODUCERS[self.protocol](queue or self.queue, **{"url": self.url, **options})
        self._stack.push_async_callback(producer.close)
        return producer

    def new_consumer(self, queue: str | None = None, **options: Any) -> Consumer:
        """Return a consumer that is not open yet. Each case has its own group names, so that groups do not mix."""
        defaults = {"url": self.url, "retry": QUICK, "error_queue": ERRORS}
        if (group := options.get("group")) is not None:
            options["group"] = f"{group}-{self.queue}"
        consumer = CONSUMER_LOOPS[self.protocol](queue or self.queue, **{**defaults, **options})
        self._stack.push_async_callback(consumer.close)
        return consumer

    async def producer(self, queue: str | None = None, **options: Any) -> Producer:
        """Return an open producer."""
        return await self.new_producer(queue, **options).open()

    async def consumer(self, queue: str | None = None, **options: Any) -> Consumer:
        """Return an open consumer, to receive without a handler."""
        return await self.new_consumer(queue, **options).open()

    @asynccontextmanager
    async def running(
        self, handler: Callable[..., Any], queue: str | None = None, *, grace: float = TIMEOUT, **options: Any
    ) -> AsyncIterator[Consumer]:
        """Run a consumer with `handler` in this block, and stop it gracefully at the end."""
        consumer = self.new_consumer(queue, **options)
        task = await self.start(consumer, handler)
        try:
            yield consumer
        finally:
            consumer.stop(grace)
            async with asyncio.timeout(2 * TIMEOUT):
                await task

    async def start(self, consumer: Consumer, handler: Callable[..., Any]) -> asyncio.Task[None]:
        """Run the consumer's loop, and return its task when the loop receives."""
        started = asyncio.Event()
        bound = consumer.handler or consumer()(handler)
        task = asyncio.create_task(consumer.run(bound, on_started=started.set))
        self._stack.push_async_callback(_end, task)
        waiting = asyncio.create_task(started.wait())
        await asyncio.wait({task, waiting}, return_when=asyncio.FIRST_COMPLETED)
        waiting.cancel()
        if task.done():
            task.result()
        return task

    async def admin(self) -> QueueAdmin:
        """Return an open admin."""
        admin = await ADMINS[self.protocol](url=self.url).open()
        self._stack.push_async_callback(admin.close)
        return admin

    # --- sending --------------------------------------------------------------------------------

    async def send(self, payload: object, *, by: Producer | None = None, **options: Any) -> Sent:
        """Send one message."""
        producer = by or await self._default_producer()

        async def send() -> list[Receipt]:
            return [await producer.send(payload, **options)]

        return await self._begin(send())

    async def send_many(self, payloads: Iterable[object], *, by: Producer | None = None, **options: Any) -> Sent:
        """Send many messages, one after the other."""
        producer = by or await self._default_producer()
        return await self._begin(producer.send_many(payloads, **options))

    async def _default_producer(self) -> Producer:
        if self._sender is None:
            self._sender = await self.producer()
        return self._sender

    async def _begin(self, sending: Coroutine[Any, Any, list[Receipt]]) -> Sent:
        task = asyncio.create_task(sending)
        self._sends.append(task)
        sent = Sent(task)
        if not self.features.reply:
            await sent
        return sent

    # --- receiving ------------------------------------------------------------------------------

    async def take(self, consumer: Consumer, number: int) -> list[Delivery]:
        """Receive exactly `number` deliveries without a handler."""
        taken: list[Delivery] = []
        async with asyncio.timeout(TIMEOUT):
            while len(taken) < number:
                taken += await consumer.receive(number - len(taken), timeout=TIMEOUT)
        return taken

    async def errors(self, number: int, queue: str | None = None) -> list[Message]:
        """Receive and acknowledge exactly `number` messages of the error queue."""
        consumer = await self.consumer(queue or f"{self.queue}.error", error_queue="unused")
        taken = await self.take(consumer, number)
        for delivery in taken:
            await delivery.ack()
        await consumer.close()
        return [delivery.message for delivery in taken]

    async def rejected(self, sent: Sent) -> Message | None:
        """Wait until the message of a send was rejected, and return it from the error queue.

        Over HTTP there is no error queue: the sender gets the error, and this returns None.
        """
        if self.features.error_queue:
            return (await self.errors(1))[0]
        try:
            await sent
        except SendError as error:
            assert error.refused, "the error names the message that was refused"
            return None
        raise AssertionError("The handler rejected the message and its sender was not told.")

    async def nothing_waits(self, queue: str | None = None) -> None:
        """Check that no message can be received; close all other consumers before."""
        consumer = await self.consumer(queue, error_queue="unused")
        found = await consumer.receive(10, timeout=0)
        await consumer.close()
        assert not found, f"{found} should have been settled"

    # --- the end --------------------------------------------------------------------------------

    async def close(self) -> None:
        """Close everything that was opened."""
        for task in self._sends:
            task.cancel()
        await asyncio.gather(*self._sends, return_exceptions=True)
        async with asyncio.timeout(2 * TIMEOUT):
            await self._stack.aclose()


class Inbox:
    """A handler that keeps its payloads."""

    def __init__(self, answer: Callable[[Any], Any] | None = None) -> None:
        self.items: list[Any] = []
        self._answer = answer

    async def __call__(self, msg: Any) -> Any:
        self.items.append(msg)
        return self._answer(msg) if self._answer is not None else None

    async def holds(self, number: int) -> list[Any]:
        """Wait for this number of messages, and return all payloads."""
        await eventually(lambda: len(self.items) >= number, f"{number} messages handled, there are {len(self.items)}")
        return self.items


class Envelopes(Inbox):
    """A handler that keeps whole messages."""

    async def __call__(self, msg: Message) -> Any:
        return await super().__call__(msg)


class Gate:
    """A handler that waits until the case opens the gate."""

    def __init__(self) -> None:
        self.entered: list[Any] = []
        self.left: list[Any] = []
        self.opened: asyncio.Event = asyncio.Event()

    async def __call__(self, msg: Any) -> None:
        self.entered.append(msg)
        await self.opened.wait()
        self.left.append(msg)

    async def holds(self, number: int) -> None:
        """Wait until this number of handlers have entered."""
        await eventually(lambda: len(self.entered) >= number, f"{number} handlers at work")


async def gather(*work: Awaitable[Any]) -> Sequence[Any]:
    """Await everything at the same time, with a deadline."""
    async with asyncio.timeout(2 * TIMEOUT):
        return await asyncio.gather(*work)


async def _end(task: asyncio.Task[None]) -> None:
    task.cancel()
    await asyncio.wait({task})
