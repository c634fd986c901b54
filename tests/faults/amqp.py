"""A broker that says no as a test wants it to: it speaks AMQP 0-9-1 to the client, and holds nothing."""

from __future__ import annotations

import asyncio
from types import TracebackType
from typing import Any, Final, Self

import pamqp.commands as spec
import pamqp.frame
from pamqp.body import ContentBody
from pamqp.header import ContentHeader, ProtocolHeader
from pamqp.heartbeat import Heartbeat

from tests.faults.ending import end_server

#: Codes that close a channel (specification 0-9-1, section 1.2: soft errors); all others close the connection.
SOFT: Final = (311, 312, 313, 403, 404, 405, 406)
#: Seconds for a client to go before it has the answer to its goodbye, which it is not to do.
PATIENCE: Final = 0.05
#: The answer to each request.
ANSWERS: Final[dict[str, Any]] = {
    "Connection.StartOk": lambda _: spec.Connection.Tune(2047, 131_072, 0),
    "Connection.Open": lambda _: spec.Connection.OpenOk(),
    "Connection.Close": lambda _: spec.Connection.CloseOk(),
    "Channel.Open": lambda _: spec.Channel.OpenOk(),
    "Channel.Close": lambda _: spec.Channel.CloseOk(),
    "Confirm.Select": lambda _: spec.Confirm.SelectOk(),
    "Queue.Declare": lambda frame: spec.Queue.DeclareOk(frame.queue, 0, 0),
    "Queue.Bind": lambda _: spec.Queue.BindOk(),
    "Exchange.Declare": lambda _: spec.Exchange.DeclareOk(),
    "Basic.Qos": lambda _: spec.Basic.QosOk(),
    "Basic.Consume": lambda frame: spec.Basic.ConsumeOk(frame.consumer_tag),
    "Basic.Cancel": lambda frame: spec.Basic.CancelOk(frame.consumer_tag),
}


class RefusingBroker:
    """Takes everything, but for one request that it refuses some times.

    Parameters:
        at: the request, as "Queue.Declare".
        code, text: its answer.
        times: how often.
        unroutable: messages that are given back first, as by a queue that cannot be reached.

    Attributes:
        refused: how often it has said no.
        held: bodies that it took.
        connections: how many were made.
        asked: the requests, in order.
        mute: requests that it does not answer.
        left_early: connections that ended without a goodbye, or before its answer.
    """

    def __init__(self, at: str, code: int, text: str, *, times: int, unroutable: int = 0) -> None:
        self._at, self._code, self._text, self.times = at, code, text, times
        self.unroutable = unroutable
        self.refused = 0
        self.held: list[bytes] = []
        self.connections = 0
        self.asked: list[str] = []
        self.mute: set[str] = set()
        self.left_early = 0
        self._server: asyncio.Server | None = None
        self._tasks: set[asyncio.Task[None]] = set()

    @property
    def url(self) -> str:
        """Where it listens."""
        assert self._server is not None
        return f"amqp://guest:guest@127.0.0.1:{self._server.sockets[0].getsockname()[1]}/%2F"

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        assert self._server is not None
        await end_server(self._server, self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        self.connections += 1
        peer = _Peer(self, reader, writer)
        try:
            await peer.run()
        except (OSError, asyncio.IncompleteReadError):  # the client has gone
            self.left_early += not peer.is_over
        except asyncio.CancelledError:
            pass  # the test is over
        finally:
            writer.transport.abort()
            self._tasks.discard(task)

    def answer(self, frame: Any) -> Any:
        """What it says to this request; None for nothing."""
        if frame.name == self._at and self.refused < self.times:
            self.refused += 1
            close = spec.Channel.Close if self._code in SOFT else spec.Connection.Close
            return close(self._code, self._text, 0, 0)
        make = ANSWERS.get(frame.name)
        return make(frame) if make is not None and frame.name not in self.mute else None


class _Peer:
    """One connection."""

    def __init__(self, broker: RefusingBroker, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._broker, self._reader, self._writer = broker, reader, writer
        self._publishing: dict[int, Any] = {}
        self._headers: dict[int, ContentHeader] = {}
        self._tags: dict[int, int] = {}
        self._closed: set[int] = set()
        #: The client has said goodbye, and waited for the answer.
        self.is_over = False

    async def run(self) -> None:
        """Answer until the client goes."""
        await self._reader.readexactly(8)
        self._say(0, spec.Connection.Start(0, 9, {"capabilities": {"publisher_confirms": True, "basic.nack": True}}))
        while True:
            head = await self._reader.readexactly(7)
            size = int.from_bytes(head[3:7], "big")
            _, channel, frame = pamqp.frame.unmarshal(head + await self._reader.readexactly(size + 1))
            self._broker.asked.append(frame.name)
            if frame.name == "Connection.Close":
                self.is_over = await self._is_waited_for()
            self._take(channel, frame)

    async def _is_waited_for(self) -> bool:
        try:
            async with asyncio.timeout(PATIENCE):
                return bool(await self._reader.read(1))
        except TimeoutError:
            return True

    def _take(self, channel: int, frame: Any) -> None:
        if isinstance(frame, Heartbeat | ProtocolHeader):
            return
        if channel in self._closed:
            if frame.name == "Channel.CloseOk":
                self._closed.discard(channel)
                self._tags.pop(channel, None)
            return
        if isinstance(frame, ContentHeader):
            self._headers[channel] = frame
            if frame.body_size == 0:
                self._published(channel, b"")
        elif isinstance(frame, ContentBody):
            self._published(channel, frame.value)
        elif frame.name == "Basic.Publish":
            self._publishing[channel] = frame
        elif (answer := self._broker.answer(frame)) is not None:
            self._say(channel, answer)

    def _published(self, channel: int, body: bytes) -> None:
        publish = self._publishing.pop(channel)
        refusal = self._broker.answer(publish)
        if refusal is not None:
            self._say(channel, refusal)
            return
        if self._broker.unroutable > 0:
            self._broker.unroutable -= 1
            self._say(channel, spec.Basic.Return(312, "NO_ROUTE", publish.exchange, publish.routing_key))
            for part in (self._headers[channel], ContentBody(body)):
                self._writer.write(pamqp.frame.marshal(part, channel))
        else:
            self._broker.held.append(body)
        tag = self._tags[channel] = self._tags.get(channel, 0) + 1
        self._say(channel, spec.Basic.Ack(tag))

    def _say(self, channel: int, frame: Any) -> None:
        if frame.name == "Channel.Close":
            self._closed.add(channel)
        elif frame.name == "Connection.Close":
            channel = 0
        self._writer.write(pamqp.frame.marshal(frame, channel))
