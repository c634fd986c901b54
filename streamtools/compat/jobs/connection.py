"""send_message and receive_message, and the connection that they use."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Any, Self

from streamtools import codec
from streamtools.compat.jobs.message import JobMessage
from streamtools.compat.jobs.receiving import LIMIT, Callback, call_for_each, check_callback, receive_list
from streamtools.consumer import Consumer
from streamtools.errors import SendError
from streamtools.message import Message, id_generator
from streamtools.producer import Producer
from streamtools.validation.checks import check_seconds, check_texts

if TYPE_CHECKING:
    from streamtools.settings import ProtocolSettings


class JobConnection:
    """Sends job messages over one connection, which it keeps open; see `connect`."""

    def __init__(self, url: str | ProtocolSettings | None = None) -> None:
        self._url = url
        self._new_id = id_generator()
        self._producer: Producer | None = None
        #: Queues that were declared.
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
        """Do what `streamtools.compat.jobs.send_message` does, over this connection. Safe to call from many tasks."""
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
            self._made.discard(queue)  # the queue may have been deleted; the next message declares it again
            raise

    async def _producer_for(self, queue: str) -> Producer:
        """Return the one producer that sends everything; another one declares the queue first, if necessary."""
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
        """Do what `streamtools.compat.jobs.receive_message` does.

        Each call receives over its own connection, because a connection that stays open would take messages from
        other receivers between the calls.
        """
        wait = check_seconds("max_wait_time", max_wait_time) or None
        if call_back_function is not None:
            check_callback(call_back_function)
            await call_for_each(Consumer(queue_name, url=self._url), wait, call_back_function)
            return []
        return await receive_list(Consumer(queue_name, url=self._url, prefetch=LIMIT - 1), wait)

    async def close(self) -> None:
        """Close the connection. Safe to repeat; the next message opens it again."""
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
    """Return a connection for `async with connect(url) as q:` and `q.send_message(...)`; the first message opens it.

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
    """Send one message to the queue `send_to`, create the queue if it does not exist, and return the message.

    Parameters: those of `JobMessage`, and
        url: the address; see `streamtools.settings`.

    Raises:
        pydantic.ValidationError: a field has the wrong type.
        ConfigurationError: `send_to` cannot be a queue's name.
        SendError: the broker did not confirm the message within 30 seconds.
        ConnectError: the broker cannot be reached within 30 seconds, or refuses the connection.
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
    """Receive the messages of one queue, which is created if it does not exist.

    Without a callback, this waits for the first message, and returns it with the other messages of the queue, up to
    1,000, that come within two seconds. It acknowledges them when it returns the list; after that the caller is
    responsible for them. A cancellation before that leaves them in the queue. A cancellation during the
    acknowledgement takes effect at the caller's next `await`, after it has the list.

    With a callback no message is lost: each is acknowledged when the callback has returned. If the callback raises,
    the message is handled again, five times with growing delays, and then moved to the error queue. A body that is
    not a JobMessage is moved there at once. The call does not wait for a retry that is due later than
    `max_wait_time`: the next call handles it.

    Parameters:
        queue_name: the queue, a str or a member of a `QueueName`.
        max_wait_time: the most seconds to wait for the first message; with a callback, return after this many seconds
            without a message, not counting the time without a connection. 0 waits for ever.
        call_back_function: called with each message, one after the other: an `async def`, or a `def`, which runs in a
            thread.
        url: the address; see `streamtools.settings`.

    Returns:
        The messages in order; an empty list if none came in time; with a callback always an empty list.

    Raises:
        ConfigurationError: the name or the time is not valid, or the callback does not take one message.
        ConnectError: the broker cannot be reached within 30 seconds, or refuses the connection.
    """
    return await connect(url).receive_message(queue_name, max_wait_time, call_back_function)
