"""Jobs: messages of one fixed schema between queues; one function sends, one receives.

```python
await send_message(title="Label", message_type="print", send_from="l7", send_to="bioconnect-id-service")
messages = await receive_message("bioconnect-id-service", max_wait_time=1)
```

Each call opens and closes its own connection; `async with connect(url) as q:` keeps what it sends on.
Scripts without an event loop call `send_message_sync` and `receive_message_sync`.
"""

from __future__ import annotations

import asyncio
import inspect
import logging
import time
from collections.abc import Callable, Sequence
from contextlib import suppress
from enum import StrEnum
from queue import SimpleQueue
from types import TracebackType
from typing import TYPE_CHECKING, Annotated, Any, ClassVar, Final, Self

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, FiniteFloat

from streamtools import background, codec
from streamtools.binding import compile_handler, is_async, name_of
from streamtools.cancelling import finish, guard
from streamtools.checks import check_seconds, check_texts
from streamtools.consumer import BoundHandler, Consumer
from streamtools.delivery import Delivery, Settlement
from streamtools.dispatch import Dispatcher, chain
from streamtools.errors import ConfigurationError, ConnectError, DecodeError, SendError
from streamtools.message import Message, ids
from streamtools.producer import Producer
from streamtools.threads import Threads
from streamtools.types import Handler
from streamtools.verdicts import ACK
from streamtools.wire import from_rfc3339

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

log: logging.Logger = logging.getLogger("streamtools")

#: Messages that one call without a callback returns at most.
LIMIT: Final = 1000
#: Seconds after the first message in which such a call takes further ones, which may never cease to come.
GATHERING: Final = 2.0

#: What is called with each message: `def`, in a thread, or `async def`.
Callback = Callable[["JobMessage"], Any]


class QueueName(StrEnum):
    """The names of queues, to subclass: `class Queues(QueueName): L7 = "l7"`."""


def _seconds(value: object) -> object:
    seconds = from_rfc3339(value) if isinstance(value, str) else None
    return value if seconds is None else seconds


def _text(value: object) -> object:
    return "" if value is None else value


def _original(value: object) -> object:
    return str(value) if value is None or isinstance(value, JobMessage) else value


class JobMessage(BaseModel):
    """One job message; `str(message)` is its JSON document, which is also what travels.

    Parameters:
        title: what it is, for people.
        message_type: what it is, for programs.
        send_from: the sender's queue.
        send_to: the receiver's queue.
        create_time: when it was sent, in seconds since the epoch; now when not given. Read as text too.
        env: the deployment: dev, sqa, uat, prd.
        comments: free text.
        data: the application's own.
        original_message: the message that this one is about; "None" for none.
    """

    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True)

    title: str
    message_type: str
    send_from: str
    send_to: str
    create_time: Annotated[FiniteFloat, BeforeValidator(_seconds)] = Field(default_factory=time.time)
    env: Annotated[str, BeforeValidator(_text)] = ""
    comments: Annotated[str, BeforeValidator(_text)] = ""
    data: Annotated[dict[str, Any], BeforeValidator(lambda value: value or {})] = Field(default_factory=dict)
    original_message: Annotated[str, BeforeValidator(_original)] = "None"

    def __str__(self) -> str:
        return self.model_dump_json()


class JobConnection:
    """Sends job messages over one connection that it keeps; see `connect`."""

    def __init__(self, url: str | ProtocolSettings | None = None) -> None:
        self._url = url
        self._new_id = ids()
        self._producer: Producer | None = None
        #: Queues that are there.
        self._made: set[str] = set()

    async def send_message(
        self,
        *,
        title: str,
        message_type: str,
        send_from: str,
        send_to: str,
        env: str = "",
        comments: str = "",
        data: dict[str, Any] | None = None,
        original_message: str | JobMessage = "None",
    ) -> JobMessage:
        """As `streamtools.jobs.send_message`, over the kept connection; safe from many tasks at once."""
        message = JobMessage(
            title=title,
            message_type=message_type,
            send_from=send_from,
            send_to=send_to,
            env=env,
            comments=comments,
            data=data or {},
            original_message=str(original_message),
        )
        await self._send(message)
        return message

    async def _send(self, message: JobMessage) -> None:
        queue = message.send_to
        body, content_type = codec.encode(message)
        check_texts({"message_type": message.message_type})
        envelope = Message(
            body=body,
            queue=queue,
            id=self._new_id(),
            type=message.message_type,
            time=message.create_time,
            content_type=content_type,
        )
        try:
            await (await self._producer_for(queue)).send_messages([envelope])
        except SendError:
            self._made.discard(queue)  # it may have been deleted; the next message makes it again
            raise

    async def _producer_for(self, queue: str) -> Producer:
        """The one that sends everything; a queue that it did not make itself is made by another, for that alone."""
        if self._producer is None:
            self._producer = Producer(queue, url=self._url)
        elif queue not in self._made:
            async with Producer(queue, url=self._url):
                pass
        self._made.add(queue)
        return self._producer

    async def receive_message(
        self, queue_name: str, max_wait_time: float = 0, call_back_function: Callback | None = None
    ) -> list[JobMessage]:
        """As `streamtools.jobs.receive_message`.

        It receives over a connection of its own, for as long as it lasts: one that was kept would take
        messages from other receivers while nobody asks.
        """
        wait = check_seconds("max_wait_time", max_wait_time) or None
        if call_back_function is not None:
            _check(call_back_function)
            await _call_for_each(Consumer(queue_name, url=self._url), wait, call_back_function)
            return []
        return await _receive_list(Consumer(queue_name, url=self._url, prefetch=LIMIT - 1), wait)

    async def close(self) -> None:
        """Close the connection. Safe to repeat; it is opened again when needed."""
        producer, self._producer = self._producer, None
        self._made.clear()
        if producer is not None:
            await producer.close()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        await self.close()


def connect(url: str | ProtocolSettings | None = None) -> JobConnection:
    """`async with connect(url) as q:` keeps the connection for `q.send_message(...)`; nothing connects yet.

    Parameters:
        url: the address; see `streamtools.settings`.
    """
    return JobConnection(url)


async def send_message(
    *,
    title: str,
    message_type: str,
    send_from: str,
    send_to: str,
    env: str = "",
    comments: str = "",
    data: dict[str, Any] | None = None,
    original_message: str | JobMessage = "None",
    url: str | ProtocolSettings | None = None,
) -> JobMessage:
    """Send one message to the queue `send_to`, which is made if it is missing; the message as it was sent.

    Parameters: those of `JobMessage`, and
        url: the address; see `streamtools.settings`.

    Raises:
        pydantic.ValidationError: a field has the wrong type.
        ConfigurationError: `send_to` cannot be a queue's name.
        SendError: it was not confirmed within 30 seconds of trying.
        ConnectError: the broker cannot be reached within them, or refuses us.
    """
    async with connect(url) as q:
        return await q.send_message(
            title=title,
            message_type=message_type,
            send_from=send_from,
            send_to=send_to,
            env=env,
            comments=comments,
            data=data,
            original_message=original_message,
        )


async def receive_message(
    queue_name: str,
    max_wait_time: float = 0,
    call_back_function: Callback | None = None,
    *,
    url: str | ProtocolSettings | None = None,
) -> list[JobMessage]:
    """Receive the messages of one queue, which is made if it is missing.

    Without a callback: wait for the first message, and return it with all that is there, 1,000 at most, and what
    comes within two seconds. They are acknowledged as the list is returned: what becomes of them then is the
    caller's. Before, a cancellation leaves them in the queue; one that comes while they are acknowledged is held back
    until the caller has the list, and comes at its next `await`.

    A callback loses nothing: each message is acknowledged when it has returned. One that raises has its message run
    again, five times with growing delays, and then moved to the error queue, as is a body that is no JobMessage. The
    call does not wait for a message that is to be run again later than `max_wait_time`: the next call has it.

    Parameters:
        queue_name: the queue, a str or a member of a `QueueName`.
        max_wait_time: seconds for the first message; with a callback, seconds without a further one, not
            counting those without a connection. 0 waits for ever.
        call_back_function: called with each message, one after the other: `async def`, or `def`, in a thread.
        url: the address; see `streamtools.settings`.

    Returns:
        The messages in order, none when the time is over; with a callback always an empty list.

    Raises:
        ConfigurationError: a name or a time that cannot be, or a callback that does not take one message.
        ConnectError: the broker cannot be reached within 30 seconds, or refuses us.
    """
    return await connect(url).receive_message(queue_name, max_wait_time, call_back_function)


# --- receiving --------------------------------------------------------------------------------------


async def _receive_list(consumer: Consumer, wait: float | None) -> list[JobMessage]:
    await consumer.open()
    try:
        deliveries = await _all_there(consumer, wait)
        with suppress(ConnectError):  # which the acknowledgement meets as well
            # Else the broker delivers the next ones when these are acknowledged, only to have them back, and
            # RabbitMQ puts those that are under way at the queue's end.
            await guard(consumer._stop())
        read = [(delivery, await _read(delivery)) for delivery in deliveries]
    except BaseException:
        await consumer.close()
        raise
    # From here on nobody else has them: who gives up now gets them all the same.
    await finish(_take_over(consumer, [delivery for delivery, message in read if message is not None]))
    return [message for _, message in read if message is not None]


async def _all_there(consumer: Consumer, wait: float | None) -> list[Delivery]:
    deliveries = await consumer.receive(LIMIT, timeout=wait)
    loop = asyncio.get_running_loop()
    end = loop.time() + GATHERING
    while deliveries and len(deliveries) < LIMIT and loop.time() < end:
        more = await consumer.receive(LIMIT - len(deliveries), timeout=0)
        if not more:
            break
        deliveries += more
    return deliveries


async def _read(delivery: Delivery) -> JobMessage | None:
    """The delivery's message; None for a body that is none, which goes to the error queue."""
    try:
        message: JobMessage = _decode(delivery.message)
    except DecodeError as error:
        log.error("Message %s of %r is no job message: %s", delivery.message.id, delivery.message.queue, error)  # noqa: TRY400
        await delivery.reject(str(error))
        return None
    return message


async def _take_over(consumer: Consumer, deliveries: Sequence[Delivery]) -> None:
    # All at once: of many single ones RabbitMQ forgets those that it has not come to when the channel is closed.
    try:
        await guard(consumer._settle([Settlement(delivery, ACK) for delivery in deliveries]))
    except ConnectError as error:  # some may be acknowledged, so all are to be returned
        log.warning("Messages of %r may be delivered again: %s", consumer.queue, error)
    finally:
        await consumer.close()


_decode: Final = codec.decoder(JobMessage)


async def _call_for_each(consumer: Consumer, wait: float | None, callback: Callback) -> None:
    idle = Idle(consumer, wait)
    consumer.middleware.append(idle)
    try:
        await consumer.run(JobHandler(consumer, callback), on_started=idle.begin)
    finally:
        idle.end()


def _check(callback: object) -> None:
    if not callable(callback):
        raise ConfigurationError(
            f"call_back_function={callback!r} cannot be called: write def on_message(message): ..."
        )
    try:
        inspect.signature(callback).bind(None)
    except TypeError as error:
        raise ConfigurationError(
            f"{name_of(callback)} is to be called with one message: write def on_message(message): ..."
        ) from error
    except ValueError:  # a builtin that does not tell what it takes
        pass


class JobHandler(BoundHandler):
    """A callback as a handler: what it is given is a JobMessage, annotated or not."""

    def dispatch(self, consumer: Consumer, threads: Threads) -> Dispatcher:
        """The callback, compiled."""
        function = compile_handler(self.function, threads, consumer.resolvers, JobMessage)
        return consumer.dispatcher(chain(function, consumer.middleware), self.name)


class Idle:
    """Stops a consumer after so many seconds without a message.

    Parameters:
        consumer: which.
        wait: seconds; None never stops it.
    """

    def __init__(self, consumer: Consumer, wait: float | None) -> None:
        self._consumer = consumer
        #: Not less than it takes to see what is there.
        self._wait = None if wait is None else max(wait, consumer.look)
        self._timer: asyncio.TimerHandle | None = None

    def begin(self) -> None:
        """Count from now on."""
        self.end()
        if self._wait is not None:
            self._timer = asyncio.get_running_loop().call_later(self._wait, self._over)

    def end(self) -> None:
        """Count no more."""
        if self._timer is not None:
            self._timer.cancel()

    def _over(self) -> None:
        if self._consumer.connected:
            self._consumer.stop()
        else:
            self.begin()

    async def __call__(self, message: Message, call_next: Handler) -> Any:
        self.end()
        try:
            return await call_next(message)
        finally:
            self.begin()


# --- without an event loop --------------------------------------------------------------------------


def send_message_sync(
    *,
    title: str,
    message_type: str,
    send_from: str,
    send_to: str,
    env: str = "",
    comments: str = "",
    data: dict[str, Any] | None = None,
    original_message: str | JobMessage = "None",
    url: str | ProtocolSettings | None = None,
) -> JobMessage:
    """As `send_message`, for code without an event loop; safe from any thread."""
    return background.run(
        send_message(
            title=title,
            message_type=message_type,
            send_from=send_from,
            send_to=send_to,
            env=env,
            comments=comments,
            data=data,
            original_message=original_message,
            url=url,
        )
    )


def receive_message_sync(
    queue_name: str,
    max_wait_time: float = 0,
    call_back_function: Callback | None = None,
    *,
    url: str | ProtocolSettings | None = None,
) -> list[JobMessage]:
    """As `receive_message`, for code without an event loop; safe from any thread.

    A `def` callback is called in the calling thread, an `async def` one on the background loop.
    """
    if call_back_function is None or is_async(call_back_function):
        return background.run(receive_message(queue_name, max_wait_time, call_back_function, url=url))
    _check(call_back_function)
    calls: SimpleQueue[Call | None] = SimpleQueue()

    async def hand_over(message: JobMessage) -> Any:
        call = Call(message)
        calls.put(call)
        return await call.done

    hand_over.__qualname__ = name_of(call_back_function)  # as which it stands in the log and the error queue
    work = background.start(receive_message(queue_name, max_wait_time, hand_over, url=url))
    work.add_done_callback(lambda _: calls.put(None))
    try:
        while (call := calls.get()) is not None:
            call.make(call_back_function)
    except BaseException:  # Ctrl-C: the message that was at work goes back
        work.stop()
        raise
    return work.result()


class Call:
    """A message for a callback in another thread, and what it returns."""

    def __init__(self, message: JobMessage) -> None:
        self._message = message
        self._loop = asyncio.get_running_loop()
        self.done: asyncio.Future[Any] = self._loop.create_future()

    def make(self, callback: Callback) -> None:
        """Call it, in this thread."""
        try:
            result, error = callback(self._message), None
        except Exception as raised:
            result, error = None, raised
        self._loop.call_soon_threadsafe(self._tell, result, error)

    def _tell(self, result: Any, error: Exception | None) -> None:
        if self.done.done():
            return
        if isinstance(error, StopIteration):  # which no future takes
            error = RuntimeError(f"the callback raised {error!r}")
        if error is not None:
            self.done.set_exception(error)
        else:
            self.done.set_result(result)
