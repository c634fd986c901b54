"""Answers that are none of a broker's: right in length and number, and nothing but 0xFF."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager, suppress

import pytest

from streamtools import KafkaSettings
from streamtools.drivers.kafka import KafkaProducer
from streamtools.drivers.kafka.errors import GARBAGE, client_error, reading
from streamtools.errors import ConfigurationError, ConnectError, ConnectionLost
from tests.brokers.kafka.address import KafkaAddress

SETTINGS = KafkaSettings(host="127.0.0.1:1")


@asynccontextmanager
async def garbling(kafka: KafkaAddress, number: int, connections: int) -> AsyncIterator[str]:
    """A proxy's URL: of each of its first connections this answer is garbled."""
    host, port = kafka.bootstrap.split(",")[0].rsplit(":", 1)
    accepted = 0
    serving: set[asyncio.Task[None] | None] = set()  # asyncio itself keeps no task

    async def serve(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        nonlocal accepted
        accepted += 1
        serving.add(asyncio.current_task())
        mine = accepted
        behind, to = await asyncio.open_connection(host, int(port))
        up = asyncio.create_task(forward(reader, to))
        given = 0
        with suppress(OSError, asyncio.IncompleteReadError, asyncio.CancelledError):  # the test is over
            while True:
                head = await behind.readexactly(4)
                answer = await behind.readexactly(*struct.unpack(">i", head))
                answer = answer.replace(struct.pack(">i", int(port)), struct.pack(">i", own))
                if mine <= connections and given == number:
                    answer = answer[:4] + b"\xff" * (len(answer) - 4)
                given += 1
                writer.write(head + answer)
                await writer.drain()
        up.cancel()
        to.close()
        writer.close()

    server = await asyncio.start_server(serve, "127.0.0.1", 0)
    own = server.sockets[0].getsockname()[1]
    async with server:
        yield f"kafka://127.0.0.1:{own}/"


async def forward(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
    with suppress(OSError):
        while data := await reader.read(65536):
            writer.write(data)
            await writer.drain()


@pytest.mark.parametrize("number", [0, 1, 2])
async def test_an_answer_that_cannot_be_read_passes(kafka: KafkaAddress, queue: str, number: int) -> None:
    async with garbling(kafka, number, connections=2) as url, asyncio.timeout(40):
        async with KafkaProducer(queue, url=url) as producer:
            await producer.send("x")


@pytest.mark.parametrize("kind", GARBAGE)
def test_each_of_them_is_a_lost_connection_where_an_answer_is_read(kind: type[Exception]) -> None:
    with pytest.raises(ConnectionLost, match="cannot be read") as caught, reading(SETTINGS):
        raise kind("0xff")
    assert not caught.value.permanent and isinstance(caught.value.__cause__, kind)
    lost = client_error(kind("0xff"), SETTINGS)
    assert isinstance(lost, ConnectError) and not lost.permanent


def test_what_is_ours_already_stays_as_it_is() -> None:
    with pytest.raises(ConfigurationError, match="ours"), reading(SETTINGS):
        raise ConfigurationError("ours")
