"""A proxy between Kafka and its clients that knows which answer belongs to which question, and may change it.

    async with KafkaProxy(kafka, garble_first_of_each) as proxy:
        Producer("orders", url=proxy.url)

Brokers tell their clients where to come back to: here, to the proxy.
"""

from __future__ import annotations

import asyncio
import importlib
import inspect
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from types import TracebackType
from typing import Any, Self

from aiokafka.protocol.api import RequestStruct, Response
from aiokafka.protocol.types import Array, Schema

from tests.brokers.kafka.address import KafkaAddress
from tests.faults.ending import end_server

#: Of questions, by number: https://kafka.apache.org/protocol#protocol_api_keys
PRODUCE, FETCH, OFFSETS, METADATA = 0, 1, 2, 3
OFFSET_COMMIT, OFFSET_FETCH, COORDINATOR, JOIN, HEARTBEAT, SYNC, VERSIONS = 8, 9, 10, 11, 12, 14, 18
#: Those whose answers name brokers.
WITH_ADDRESSES = frozenset({METADATA, COORDINATOR})
#: Modules of the library that define answers.
MODULES = ("admin", "commit", "coordination", "fetch", "group", "metadata", "offset", "produce", "transaction")


@dataclass(frozen=True, slots=True)
class Answer:
    """What a broker has answered.

    Attributes:
        api, version: of the question.
        number: how many answers were there before it, over all connections.
        nth: how many of these were to such a question.
        body: all behind the correlation id.
    """

    api: int
    version: int
    number: int
    nth: int
    body: bytes


#: Makes what the client gets: another body, or None to end the connection instead.
Change = Callable[[Answer], bytes | None]


def garbled(answer: Answer) -> bytes:
    """As long, and nothing but 0xFF."""
    return b"\xff" * len(answer.body)


def with_brokers_at(answer: Answer, host: str, port: int) -> bytes:
    """An answer that tells of the brokers, with all of them at this address."""
    kind = kinds()[answer.api, answer.version]
    found = kind.decode(answer.body)
    found.brokers = [(number, host, port, *more) for number, _, _, *more in found.brokers]
    return bytes(found.encode())


def with_code(answer: Answer, code: int) -> bytes:
    """The same with this error in each place for one; as it is where its form is not known."""
    kind = kinds().get((answer.api, answer.version))
    if kind is None:
        return answer.body
    found = kind.decode(answer.body)
    values = [getattr(found, name) for name in kind.SCHEMA.names]
    return bytes(kind.SCHEMA.encode(_changed(kind.SCHEMA, values, code)))


def _changed(schema: Schema, values: Any, code: int) -> list[Any]:
    return [
        code if name == "error_code" else _changed_value(kind, value, code)
        for name, kind, value in zip(schema.names, schema.fields, values, strict=True)
    ]


def _changed_value(kind: Any, value: Any, code: int) -> Any:
    if isinstance(kind, Array) and isinstance(kind.array_of, Schema) and value is not None:
        return [_changed(kind.array_of, row, code) for row in value]
    return value


@cache
def kinds() -> dict[tuple[int, int], type[Response]]:
    """The form of each answer, by the question's number and version."""
    found: dict[tuple[int, int], type[Response]] = {}
    for name in MODULES:
        module = importlib.import_module(f"aiokafka.protocol.{name}")
        kind: Any
        for _, kind in inspect.getmembers(module, inspect.isclass):
            if issubclass(kind, RequestStruct) and kind is not RequestStruct and not kind.FLEXIBLE_VERSION:
                if kind.RESPONSE_TYPE.API_VERSION == kind.API_VERSION:
                    found[kind.API_KEY, kind.API_VERSION] = kind.RESPONSE_TYPE
    return found


class KafkaProxy:
    """Forwards to the first broker of an address.

    Parameters:
        change: what becomes of each answer; as it is where it returns the same.

    Attributes:
        url: where clients connect to.
        seen: how many answers there were to each kind of question.
        requests: likewise of questions.
    """

    def __init__(self, address: KafkaAddress, change: Change = lambda answer: answer.body) -> None:
        host, port = address.bootstrap.split(",")[0].rsplit(":", 1)
        self._host, self._port = host, int(port)
        self.change: Change = change
        self.seen: Counter[int] = Counter()
        self.requests: Counter[int] = Counter()
        self._tasks: set[asyncio.Task[None]] = set()
        self._server: asyncio.Server

    async def __aenter__(self) -> Self:
        self._server = await asyncio.start_server(self._accept, "127.0.0.1", 0)
        self.port: int = self._server.sockets[0].getsockname()[1]
        self.url: str = f"kafka://127.0.0.1:{self.port}/"
        return self

    async def __aexit__(
        self, kind: type[BaseException] | None, error: BaseException | None, tb: TracebackType | None
    ) -> None:
        await end_server(self._server, self._tasks)

    async def _accept(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._tasks.add(task)
        try:
            await self._link(reader, writer)
        except (OSError, asyncio.IncompleteReadError, asyncio.CancelledError):
            pass  # a side has ended, or the test
        finally:
            writer.close()
            self._tasks.discard(task)

    async def _link(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        back, to = await asyncio.open_connection(self._host, self._port)
        asked: dict[int, tuple[int, int]] = {}
        up = asyncio.create_task(self._questions(reader, to, asked))
        try:
            while True:
                frame = await _frame(back)
                if (changed := self._answer(frame, asked)) is None:
                    return
                writer.write(struct.pack(">i", len(changed)) + changed)
                await writer.drain()
        finally:
            up.cancel()
            await asyncio.gather(up, return_exceptions=True)
            to.close()

    async def _questions(
        self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter, asked: dict[int, tuple[int, int]]
    ) -> None:
        with suppress(OSError, asyncio.IncompleteReadError):
            while True:
                frame = await _frame(reader)
                api, version, number = struct.unpack(">hhi", frame[:8])
                asked[number] = api, version
                self.requests[api] += 1
                writer.write(struct.pack(">i", len(frame)) + frame)
                await writer.drain()
        writer.close()

    def _answer(self, frame: bytes, asked: dict[int, tuple[int, int]]) -> bytes | None:
        api, version = asked.pop(*struct.unpack(">i", frame[:4]))
        body = frame[4:]
        if api in WITH_ADDRESSES:
            body = body.replace(struct.pack(">i", self._port), struct.pack(">i", self.port))
        answer = Answer(api, version, self.seen.total(), self.seen[api], body)
        self.seen[api] += 1
        changed = self.change(answer)
        return None if changed is None else frame[:4] + changed


async def _frame(reader: asyncio.StreamReader) -> bytes:
    return await reader.readexactly(*struct.unpack(">i", await reader.readexactly(4)))
