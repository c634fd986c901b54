"""The client library's part of a connection: the handshake, the opening of channels, declarations and the heartbeat.

Only this module uses features of aio-pika and aiormq that are not documented:

- `aio_pika.Connection.kwargs`, which aio-pika passes on to aiormq: our transport, and our way to start tasks;
- `aio_pika.Connection.transport.connection`, which is aiormq's connection;
- its `channels`, `connection_tune` and `server_properties`, and that `channel()` takes a number;
- the loggers `aiormq.connection` and `aiormq.channel`.
"""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Collection, Coroutine
from contextvars import ContextVar, copy_context
from typing import Any, Final, TypeVar

import aio_pika
from aiormq.abc import AbstractConnection
from aiormq.connection import TransportFactory
from yarl import URL

from streamtools.engine.tasks.cancellation import end
from streamtools.engine.tasks.eventloops import unlisted
from streamtools.settings import RabbitMQSettings

T = TypeVar("T")

#: The most channels of one connection if the broker has no limit (channel_max 0).
CHANNEL_MAX: Final = 65_535
#: After the socket is closed, the library's tasks have this many seconds to end.
END_TIMEOUT: Final = 0.5
_ABOUT: Final = {"product": "streamtools"}

#: The client to which the running task or callback of the library belongs.
_working: Final[ContextVar[Client | None]] = ContextVar("streamtools_rabbitmq_client", default=None)


class _OurLines(logging.Filter):
    """Drops the library's log lines about requests and connections that have ended, which we log ourselves."""

    def filter(self, record: logging.LogRecord) -> bool:
        """Drop tracebacks, and warnings about requests that we gave up and about connections that have ended."""
        client = _working.get()
        if client is None or record.levelno != logging.WARNING:
            is_said = False
        else:
            is_said = client.has_ended or record.name == "aiormq.channel"
        if record.name == "aiormq.connection":
            record.exc_info = None
        return not is_said


for _name in ("aiormq.connection", "aiormq.channel"):
    logging.getLogger(_name).addFilter(_OurLines())


class _OpenTransport(TransportFactory):
    """Returns a transport that is already open to the library."""

    def __init__(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._pair = reader, writer

    async def create(self, url: URL, **kwargs: Any) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        return self._pair


class _UnlistedTasks:
    """Stands in for the event loop in the library: asyncio does not list the tasks that the library starts with it.

    At the end of an event loop, asyncio cancels all tasks that it lists. If the library's tasks were among them, they
    would close the socket, and the broker would drop the last acknowledgements unread and deliver these messages
    again. So the tasks go on until `Client.close`, which runs later and waits for them.

    Attributes:
        tasks: the tasks that have not ended.
    """

    def __init__(self, loop: asyncio.AbstractEventLoop, client: Client) -> None:
        self._loop = loop
        self._client = client
        self.tasks: set[asyncio.Task[Any]] = set()

    def create_task(self, work: Coroutine[Any, Any, T], **options: Any) -> asyncio.Task[T]:
        """Create a task as the event loop does, but one that asyncio does not list."""
        context = copy_context()
        context.run(_working.set, self._client)
        task = unlisted(self._loop.create_task(work, **{"context": context, **options}))
        self.tasks.add(task)
        task.add_done_callback(self.tasks.discard)
        return task

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loop, name)


class _LibraryConnection(aio_pika.Connection):
    """aio-pika's connection over our transport, with tasks that the end of the event loop does not cancel."""

    def __init__(
        self, url: URL, transport: TransportFactory, loop: _UnlistedTasks, properties: dict[str, Any]
    ) -> None:
        super().__init__(url, client_properties=properties)
        self.kwargs |= {"transport_factory": transport, "loop": loop}


class Client:
    """The library's connection, over an open transport.

    Attributes:
        has_ended: whether the connection is lost, or is being closed.
        frame_max: the largest frame that the broker accepts, in bytes; 0 for any.
        channel_max: the most channels that the connection may have.
        server_version: the broker's version; empty if it does not tell.
    """

    def __init__(self) -> None:
        self.has_ended: bool = False
        self._work = _UnlistedTasks(asyncio.get_running_loop(), self)
        self._connection: _LibraryConnection | None = None
        self.frame_max: int = 0
        self.channel_max: int = CHANNEL_MAX
        self.server_version: str = ""

    async def connect(self, url: URL, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, name: str) -> None:
        """Do the handshake. If it fails, close the transport and raise the library's error."""
        properties = {"connection_name": name, **_ABOUT}
        connection = _LibraryConnection(url, _OpenTransport(reader, writer), self._work, properties)
        try:
            await connection.connect()
        except BaseException:
            writer.transport.abort()
            # Without this close(), the object's finalizer would start a task, in whichever thread it runs.
            await connection.close()
            raise
        self._connection = connection
        tune = self._library.connection_tune
        self.frame_max = getattr(tune, "frame_max", 0) or 0
        self.channel_max = getattr(tune, "channel_max", 0) or CHANNEL_MAX
        self.server_version = str(self._library.server_properties.get("version", ""))

    @property
    def _library(self) -> AbstractConnection:
        assert self._connection is not None and self._connection.transport is not None  # it is connected
        return self._connection.transport.connection

    @property
    def channel_numbers(self) -> Collection[int]:
        """The numbers of the open channels."""
        return self._library.channels.keys()

    def channel(self, number: int, *, confirms: bool) -> Any:
        """Return a request that opens the channel with this number."""
        return self._library.channel(number, publisher_confirms=confirms)

    def run(self, work: Any) -> asyncio.Task[Any]:
        """Run a coroutine in a task that goes on if the caller is cancelled or the event loop ends."""
        task: asyncio.Task[Any] = self._work.create_task(work)
        task.add_done_callback(retrieve)
        return task

    async def close(self, timeout: float) -> None:
        """Close the library's side of a connection whose socket is closed."""
        if self._connection is None:
            return
        # In a separate task, because the library sometimes ignores a cancellation while it closes.
        closing = self.run(self._connection.close())
        await asyncio.wait({closing}, timeout=timeout)
        closing.cancel()  # has no effect if the task is done

    async def end_tasks(self) -> None:
        """Wait until the library's tasks have ended; their socket is closed, and nobody else waits for them."""
        if tasks := set(self._work.tasks):
            await asyncio.wait(tasks, timeout=END_TIMEOUT)
            await end(tasks, END_TIMEOUT)


def connection_url(settings: RabbitMQSettings, host: str, port: int) -> URL:
    """Return the address in the form that the library takes."""
    return URL.build(
        scheme="amqps" if settings.tls else "amqp",
        user=settings.username,
        password=settings.password.get_secret_value(),
        host=host,
        port=port,
        path="/" + settings.vhost,
        query={"heartbeat": str(settings.heartbeat)},
    )


def retrieve(task: asyncio.Future[Any]) -> None:
    """Retrieve the error of a future, so that asyncio does not log it if nobody waits for it; a done callback."""
    if not task.cancelled():
        task.exception()
