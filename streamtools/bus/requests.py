"""Requests: the reply queue of a bus, and the requests that wait for a reply."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Awaitable, Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from secrets import token_hex
from typing import TYPE_CHECKING, Any, Final

from streamtools import codec
from streamtools.admin import ADMINS, QueueAdmin
from streamtools.compat.pikabus import REPLY_QUEUE, PikaBus
from streamtools.consumer import Consumer
from streamtools.engine.messages.failures import NAME_LIMIT, REASON_LIMIT
from streamtools.errors import Closed, QueueError, RemoteError, RequestTimeout, ResponseError, StreamToolsError
from streamtools.message import Message
from streamtools.receipt import Receipt
from streamtools.retry import Retry

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings

log: logging.Logger = logging.getLogger("streamtools")

#: The type of a reply that carries a failure.
FAILURE: Final = "streamtools.Failure"
#: Sends messages and returns when they are confirmed.
SendAll = Callable[[Sequence[Message]], Awaitable[list[Receipt]]]

#: Statuses of the response when the handler has failed: those of `settlement_response` (drivers/http/responses.py).
ANSWERED: Final = (400, 422, 500)
#: Replies that are received ahead.
PREFETCH: Final = 1000
#: Options of the bus's consumer that the consumer of the reply queue has, too.
SHARED: Final = ("client_id", "connect_timeout", "error_queue", "error_declare", "error_arguments")
#: The reply queue belongs to its connection, if the protocol can do that: it need not outlive the bus.
OPTIONS: Final[dict[str, Any]] = {"queue_type": "classic", "durable": False, "exclusive": True}


@dataclass(frozen=True, slots=True)
class Failure:
    """The reply to a request whose handler failed.

    Attributes:
        exception: the class name of the exception that it raised.
        reason: the text of that exception; empty where the service does not tell it.
    """

    exception: str = ""
    reason: str = ""


_FAILURE: Final = codec.decoder(Failure)
#: Why a request has no reply in time, by how far it came.
_NOT_SENT: Final = (
    "The request to {queue!r} was not sent: the queue for its reply was not open within {timeout:g} s. Does the "
    "broker answer? The log says what was tried."
)
_NOT_CONFIRMED: Final = (
    "The request to {queue!r} was not confirmed within {timeout:g} s. Does the broker answer? The request may be "
    "handled all the same."
)
_NO_REPLY: Final = (
    "No reply from {queue!r} within {timeout:g} s. Is its handler running, and does it reply? The request may be "
    "handled all the same."
)


class Requests:
    """The reply queue, which the first request creates, and the requests that wait for a reply.

    Parameters:
        name: the first part of the queue's name: the bus's client_id or its queue.
        url: the address of the broker.
        options: the options of the bus's consumer; the consumer of the reply queue takes some of them.
        style: writes and reads PikaBus's headers; None for our own headers.
    """

    def __init__(
        self,
        name: str,
        url: str | ProtocolSettings | None,
        options: Mapping[str, Any],
        style: PikaBus | None = None,
    ) -> None:
        self._prefix = f"{name.encode()[:200].decode(errors='ignore')}.replies."
        self.queue: str = self._new_name()
        self._url = url
        self._style = style
        shared = {name: options[name] for name in SHARED if name in options}
        self._options = {**shared, **(OPTIONS if style is None else REPLY_QUEUE)}
        self._waiting: dict[str, asyncio.Future[Message]] = {}
        self._loop: asyncio.Task[None] | None = None
        self._started = asyncio.Event()
        self._consumer: Consumer | None = None
        #: The tasks of reply queues that were given up, until they end.
        self._stranded: set[asyncio.Task[None]] = set()

    def _new_name(self) -> str:
        return self._prefix + token_hex(16)

    async def ask(self, message: Message, timeout: float, send: SendAll) -> Message:  # noqa: ASYNC109
        """Send a request and wait for its reply.

        Parameters:
            timeout: seconds.

        Raises:
            RequestTimeout: none came in time.
            RemoteError: the handler failed.
            StreamToolsError: it could not be sent, or replies cannot be received.
        """
        future: asyncio.Future[Message] = asyncio.get_running_loop().create_future()
        self._waiting[message.id] = future
        late = _NOT_SENT
        try:
            async with asyncio.timeout(timeout):
                await self._listen()
                late = _NOT_CONFIRMED
                await send([message.replace(reply_to=self.queue)])
                late = _NO_REPLY
                reply = await future
        except TimeoutError:
            raise RequestTimeout(late.format(queue=message.queue, timeout=timeout)) from None
        finally:
            self._waiting.pop(message.id, None)
            if future.done() and not future.cancelled():
                future.exception()  # retrieved: asyncio would log that it never was
        if reply.type == FAILURE:
            raise _failure(message, reply)
        return reply

    async def close(self) -> None:
        """Stop receiving replies; requests that still wait fail with `Closed`. Safe to repeat."""
        consumer, self._consumer = self._consumer, None
        task, self._loop = self._loop, None
        if consumer is None or task is None:
            return
        consumer.stop(0)
        try:
            with suppress(StreamToolsError):
                await task
        finally:
            self._end(task)
        if self._stranded:
            await asyncio.wait(self._stranded)
        if not getattr(consumer.options, "exclusive", False) and consumer.features.admin:
            admin: QueueAdmin = ADMINS[consumer.protocol](url=self._url)
            async with admin:
                with suppress(QueueError):
                    await admin.delete(self.queue)

    # --- listening ------------------------------------------------------------------------------

    async def _listen(self) -> None:
        """Wait until replies can be received.

        Raises:
            StreamToolsError: they cannot.
        """
        if self._loop is not None and self._is_stranded():
            self._leave(self._loop)
        if self._loop is None or self._loop.done():
            self._loop = self._start()
        loop = self._loop
        await self._started.wait()
        if loop.done():
            loop.result()

    def _is_stranded(self) -> bool:
        """Whether the connection that the reply queue belongs to is lost. The broker may keep the queue a while."""
        consumer = self._consumer
        if consumer is None or consumer.connected or not self._started.is_set():
            return False
        return bool(getattr(consumer.options, "exclusive", False))

    def _leave(self, loop: asyncio.Task[None]) -> None:
        """Give up the reply queue; the next one has another name. Replies on the way to this one are lost."""
        self._loop, self.queue = None, self._new_name()
        if self._consumer is not None:
            self._consumer.stop(0)
        self._stranded.add(loop)
        loop.add_done_callback(self._stranded.discard)

    def _start(self) -> asyncio.Task[None]:
        # Not awaited here: a request that is cancelled meanwhile must not end the reply queue of the others.
        consumer = self._consumer = Consumer(
            self.queue,
            url=self._url,
            ack="on_receive",
            retry=Retry(retries=0),
            prefetch=PREFETCH,
            **self._options,
        )
        if self._style is not None:
            self._style.install(consumer)
        started = self._started = asyncio.Event()
        task = asyncio.create_task(
            consumer.run(consumer()(self._take), on_started=started.set), name="streamtools-replies"
        )
        task.add_done_callback(self._ended)
        task.add_done_callback(lambda _: started.set())
        return task

    async def _take(self, reply: Message) -> None:
        # Found by the request's id, which only the service that was asked knows. A reply of another system has the
        # correlation id alone, which is the same id if the request began the conversation.
        named = reply.causation_id or reply.correlation_id or ""
        future = self._waiting.get(named)
        if future is None or future.done():
            log.info("A reply came late and is dropped, or nobody asked for it: %s, to request %s.", reply.id, named)
        else:
            future.set_result(reply)

    def _ended(self, task: asyncio.Task[None]) -> None:
        if task is self._loop:
            self._end(task)
        elif not task.cancelled():
            task.exception()

    def _end(self, task: asyncio.Task[None]) -> None:
        """Have the requests that wait fail, since no reply can come any more."""
        error = None if task.cancelled() else task.exception()
        for future in self._waiting.values():
            if not future.done():
                future.set_exception(error or Closed("The bus was stopped while this reply was awaited."))


async def call(message: Message, timeout: float, send: SendAll) -> Message:  # noqa: ASYNC109
    """Send a request whose reply is the response of the same call (`Features.reply`), without a reply queue.

    Raises:
        RequestTimeout: no response came in time.
        RemoteError: the handler failed or rejected it.
        SendError: it did not reach a handler.
    """
    try:
        async with asyncio.timeout(timeout):
            found: Any = (await send([message.replace(reply_to=None)]))[0]
    except TimeoutError:
        raise RequestTimeout(_NO_REPLY.format(queue=message.queue, timeout=timeout)) from None
    except ResponseError as error:
        if error.status not in ANSWERED:
            raise
        reason = error.body[:2048].decode(errors="replace")
        raise RemoteError(
            f"{message.type or 'The request'} failed at {message.queue!r}: {reason}", reason=reason
        ) from None
    # 202 has no body: the handler returned nothing.
    return Message(
        body=found.body or b"null", queue=message.queue, id=found.id, content_type=found.headers.get("Content-Type")
    )


def _failure(message: Message, reply: Message) -> RemoteError:
    found = _FAILURE(reply)
    exception, reason = found.exception[:NAME_LIMIT], found.reason[:REASON_LIMIT]
    said = f"{exception}: {reason}" if reason else f"{exception}. The reason stands in its log and its error queue"
    return RemoteError(
        f"{message.type or 'The request'} failed at {message.queue!r}: {said}", exception=exception, reason=reason
    )
