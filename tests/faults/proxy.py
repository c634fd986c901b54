"""A TCP proxy that misbehaves on demand: between a client and its broker, on loopback.

    async with Proxy("127.0.0.1", broker_port) as proxy:
        client = connect(f"amqp://127.0.0.1:{proxy.port}/")
        await proxy.cut()

There is no packet loss here: the kernel's own TCP hides it from both sides as latency.
"""

from __future__ import annotations

import asyncio
import socket
import struct
from collections.abc import Callable
from contextlib import suppress
from types import TracebackType
from typing import Self

from tests.brokers.processes import free_ports

#: Bytes read at once.
CHUNK = 64 * 1024
#: Seconds that a peer has to take the last bytes when a connection ends.
CLOSE_TIMEOUT = 1.0
#: Linger on with zero seconds: close() sends RST instead of FIN (socket(7)).
RESET = struct.pack("ii", 1, 0)

Writers = tuple[asyncio.StreamWriter, asyncio.StreamWriter]


class Proxy:
    """Forwards one local port to one target, both ways, until told otherwise.

    Parameters:
        host, port: the target.
        latency: seconds that every chunk waits, in each direction; may be changed at any time.
    """

    def __init__(self, host: str, port: int, *, latency: float = 0.0) -> None:
        self.target = (host, port)
        #: Where clients connect to; the same over `down` and `restore`.
        self.port = free_ports(1)[0]
        self.latency = latency
        #: What becomes of each chunk that the target sends.
        self.garble: Callable[[bytes], bytes] = _as_it_is
        #: How many connections were accepted so far.
        self.accepted = 0
        self._server: asyncio.Server | None = None
        self._links: dict[asyncio.Task[None], Writers | None] = {}
        #: Connections to the target whose client was broken off.
        self._abandoned: list[asyncio.StreamWriter] = []
        self._flowing = asyncio.Event()
        self._flowing.set()

    @property
    def connections(self) -> int:
        """How many connections pass through now."""
        return sum(writers is not None for writers in self._links.values())

    async def __aenter__(self) -> Self:
        await self.restore()
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await self.down()

    # --- faults --------------------------------------------------------------------------------------

    def hang(self) -> None:
        """Forward nothing more, keep everything open: a peer that fell silent. New connections hang too."""
        self._flowing.clear()

    def flow(self) -> None:
        """Forward again what has waited, in order."""
        self._flowing.set()

    async def cut(self) -> None:
        """Close every connection in an orderly way (FIN), as a restarting peer does; new ones are welcome."""
        await self._end_links(reset=False)

    async def reset(self) -> None:
        """Break every connection off (RST), as a crashed peer or a firewall does; new ones are welcome."""
        await self._end_links(reset=True)

    async def abandon(self) -> None:
        """Break the client's side off (RST), and leave the target's open: the target does not know for now."""
        for task, writers in dict(self._links).items():
            if writers is not None:
                self._abandoned.append(writers[1])
                _finish(writers[0], reset=True)
            task.cancel()
        await asyncio.gather(*self._links, return_exceptions=True)

    async def down(self) -> None:
        """Stop listening and break every connection: new ones are refused. Safe to repeat."""
        if self._server is not None:
            self._server.close()
            self._server = None
        await self._end_links(reset=True)
        abandoned, self._abandoned = self._abandoned, []
        for writer in abandoned:
            _finish(writer, reset=True)

    async def restore(self) -> None:
        """Undo whatever was done: listen again on the same port, forward, without a hang. Safe to repeat."""
        self.flow()
        if self._server is None:
            self._server = await asyncio.start_server(self._accept, "127.0.0.1", self.port, limit=CHUNK)

    # --- how -----------------------------------------------------------------------------------------

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        """One connection, from its first byte to its end; asyncio runs it as a task."""
        task = asyncio.current_task()
        assert task is not None
        self.accepted += 1
        self._links[task] = None
        try:
            await self._link(task, reader, writer)
        except (OSError, asyncio.CancelledError):
            writer.transport.abort()  # the target refused, or `_end_links` came first
        finally:
            del self._links[task]

    async def _link(
        self, task: asyncio.Task[None], reader: asyncio.StreamReader, writer: asyncio.StreamWriter
    ) -> None:
        await self._flowing.wait()
        target_reader, target_writer = await asyncio.open_connection(*self.target, limit=CHUNK)
        self._links[task] = (writer, target_writer)
        try:
            async with asyncio.TaskGroup() as group:
                group.create_task(self._pump(reader, target_writer, _as_it_is))
                group.create_task(self._pump(target_reader, writer, lambda chunk: self.garble(chunk)))
        finally:
            await _close(writer, *(() if target_writer in self._abandoned else (target_writer,)))

    async def _pump(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, change: Callable[[bytes], bytes]
    ) -> None:
        """Forward one direction to its end, and pass the end on: the other direction may go on."""
        with suppress(OSError):
            while chunk := await reader.read(CHUNK):
                if self.latency:
                    await asyncio.sleep(self.latency)
                await self._flowing.wait()
                writer.write(change(chunk))
                await writer.drain()
            await self._flowing.wait()
            if writer.can_write_eof():
                writer.write_eof()

    async def _end_links(self, *, reset: bool) -> None:
        links = dict(self._links)
        for task, writers in links.items():
            for writer in writers or ():
                _finish(writer, reset=reset)
            task.cancel()
        await asyncio.gather(*links, return_exceptions=True)


def _as_it_is(chunk: bytes) -> bytes:
    return chunk


def _finish(writer: asyncio.StreamWriter, *, reset: bool) -> None:
    if reset:
        sock: socket.socket = writer.get_extra_info("socket")
        with suppress(OSError):
            sock.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, RESET)
        writer.transport.abort()
    else:
        writer.close()


async def _close(*writers: asyncio.StreamWriter) -> None:
    for writer in writers:
        writer.close()
    for writer in writers:
        try:
            async with asyncio.timeout(CLOSE_TIMEOUT):
                await writer.wait_closed()
        except (OSError, TimeoutError):  # a frozen peer takes no more bytes
            writer.transport.abort()
