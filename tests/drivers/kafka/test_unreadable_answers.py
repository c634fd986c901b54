"""Answers that are none of a broker's: whoever asks, the connection ends, and what was asked is asked again."""

from __future__ import annotations

import asyncio
import struct
from collections.abc import Callable
from io import BytesIO
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.protocol.commit import OffsetFetchRequest_v3
from aiokafka.protocol.fetch import FetchRequest_v11
from aiokafka.protocol.metadata import MetadataRequest_v5
from aiokafka.protocol.produce import ProduceRequest_v8

from streamtools import KafkaSettings
from streamtools.drivers.kafka import KafkaAdmin, KafkaProducer
from streamtools.drivers.kafka.client.guard import _read, harden
from streamtools.drivers.kafka.errors import GARBAGE, client_error
from streamtools.errors import ConnectError
from streamtools.testing import eventually
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, Running, records
from tests.faults.kafka import (
    FETCH,
    JOIN,
    METADATA,
    OFFSET_FETCH,
    SYNC,
    VERSIONS,
    Answer,
    Change,
    KafkaProxy,
    with_brokers_at,
)

SETTINGS = KafkaSettings(host="127.0.0.1:1")
#: Seconds; more than enough where each kind of answer is spoiled once.
LONG = 60
#: Ways to spoil an answer, in turns.
WAYS: list[Callable[[bytes], bytes]] = [
    lambda body: b"\xff" * len(body),
    lambda body: body[: len(body) // 2],
    lambda body: body + b"\0",
]
#: Where the first answer to it is lost, the group's coordinator waits for a member that does not come: 10 s.
SPARED = {JOIN}


def spoiled(answer: Answer) -> bytes:
    """The first answer to each kind of question; what it is of the ways differs."""
    if answer.nth or answer.api in SPARED:
        return answer.body
    ways = WAYS[:2] if answer.api == VERSIONS else WAYS  # that one may grow
    return ways[answer.api % len(ways)](answer.body)


@pytest.mark.real_kafka("groups")
async def test_a_consumer_receives_all_where_the_first_answer_of_each_kind_cannot_be_read(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    sender = await producer(partitions=2)
    await sender.send_many(range(5))
    async with KafkaProxy(kafka, spoiled) as proxy, running(handle, url=proxy.url):
        await sender.send_many(range(5, 10))
        await eventually(lambda: set(seen) == set(range(10)), timeout=LONG)
        await eventually(lambda: {FETCH, OFFSET_FETCH, SYNC} <= set(proxy.seen))


@pytest.mark.real_kafka("transactions")
async def test_each_message_is_handled_exactly_once_where_answers_cannot_be_read(
    kafka: KafkaAddress, producer: MakeProducer, running: Running, queue: str
) -> None:
    sender, results = await producer(partitions=1), f"{queue}.results"
    await producer(results, partitions=1)
    async with KafkaProxy(kafka, spoiled) as proxy:
        out = KafkaProducer(results, url=proxy.url)

        async def handle(msg: int) -> None:
            await out.send(msg)

        await sender.send_many(range(5))
        async with running(handle, url=proxy.url, exactly_once=True):

            async def all_are_there() -> bool:
                return len(await records(kafka, results, committed=True)) >= 5

            await eventually(all_are_there, timeout=LONG)
        await out.close()
    values = sorted(record.value for record in await records(kafka, results, committed=True))
    assert values == [b"0", b"1", b"2", b"3", b"4"]


@pytest.mark.real_kafka("transactions")
async def test_a_producer_sends_each_message_once_where_answers_cannot_be_read(
    kafka: KafkaAddress, queue: str
) -> None:
    async with KafkaProxy(kafka, spoiled) as proxy, asyncio.timeout(LONG):
        async with KafkaProducer(queue, url=proxy.url, partitions=1) as producer:
            for number in range(3):
                await producer.send(number)
            async with producer.transaction():
                await producer.send(3)
    assert [record.value for record in await records(kafka, queue)] == [b"0", b"1", b"2", b"3"]


@pytest.mark.real_kafka("administration")
async def test_an_operator_sees_nothing_of_answers_that_cannot_be_read(
    kafka: KafkaAddress, producer: MakeProducer, queue: str
) -> None:
    async with KafkaProxy(kafka, spoiled) as proxy, asyncio.timeout(LONG):
        async with KafkaAdmin(url=proxy.url) as admin:
            await admin.create(queue, partitions=2)
            await (await producer()).send_many(["a", "b"])
            await admin.bind(queue, "some.topic")
            assert (await admin.describe(queue)).partitions == 2
            assert (await admin.stats(queue)).ready == 2
            assert len(await admin.peek(queue)) == 2
            assert await admin.purge(queue) == 2
            await admin.delete(queue)


@pytest.mark.real_kafka("groups")
@pytest.mark.parametrize(
    ("host", "port"), [("127.0.0.1", 1), ("127.0.0.1", 99431), ("127.0\x7f0.1", 9092)], ids=["none", "port", "host"]
)
async def test_producer_consumer_and_operator_go_on_where_answers_have_named_brokers_where_there_are_none(
    kafka: KafkaAddress, running: Running, queue: str, host: str, port: int
) -> None:
    def misleading(answer: Answer) -> bytes:
        misleads = answer.api == METADATA and not answer.nth % 2 and answer.nth < 8
        return with_brokers_at(answer, host, port) if misleads else answer.body

    await all_goes_well(kafka, misleading, running, queue)


@pytest.mark.real_kafka("groups", "transactions")
async def test_producer_consumer_and_operator_go_on_where_the_first_answer_of_each_kind_is_about_another_topic(
    kafka: KafkaAddress, running: Running, queue: str
) -> None:
    def of_another(answer: Answer) -> bytes:
        other = queue[:-1] + "x"
        return answer.body if answer.nth else answer.body.replace(queue.encode(), other.encode())

    await all_goes_well(kafka, of_another, running, queue)


async def all_goes_well(kafka: KafkaAddress, change: Change, running: Running, queue: str) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    async with asyncio.timeout(LONG):
        async with KafkaProxy(kafka, change) as proxy, KafkaProducer(queue, url=proxy.url, partitions=1) as sender:
            await sender.send(0)
            async with sender.transaction():
                await sender.send(1)
        async with KafkaProxy(kafka, change) as proxy, running(handle, url=proxy.url):
            await eventually(lambda: set(seen) == {0, 1}, timeout=LONG)
        async with KafkaProxy(kafka, change) as proxy, KafkaAdmin(url=proxy.url) as admin:

            async def all_are_read() -> bool:  # a list of groups by other names is as good as the right one
                return (await admin.stats(queue)).ready == 0

            await eventually(all_are_read)
            await admin.purge(queue)
    assert [record.value for record in await records(kafka, queue)] == []


@pytest.mark.real_kafka("groups")
async def test_all_go_back_to_the_addresses_they_were_given_when_all_brokers_have_moved(
    kafka: KafkaAddress, running: Running, queue: str
) -> None:
    seen: list[int] = []

    async def handle(msg: int) -> None:
        seen.append(msg)

    async with KafkaProxy(kafka) as given, asyncio.timeout(LONG):
        async with KafkaProxy(kafka) as old:
            here, there = struct.pack(">i", given.port), struct.pack(">i", old.port)
            given.change = lambda answer: answer.body.replace(here, there) if answer.api == METADATA else answer.body
            sender = KafkaProducer(queue, url=given.url, partitions=1)
            await sender.send(1)
            async with running(handle, url=given.url), KafkaAdmin(url=given.url) as admin:
                await eventually(lambda: 1 in seen)
                await admin.stats(queue)
                given.change = lambda answer: answer.body
                await old.__aexit__(None, None, None)
                await sender.send(2)
                await eventually(lambda: 2 in seen, timeout=LONG)
                await admin.stats(queue)
            await sender.close()


def answer_to(request: Any, body: bytes) -> Any:
    """What a connection makes of this body, as the answer to a question that it has sent."""
    future: Any = SimpleNamespace(answer=None)

    def handle(frame: bytes) -> None:
        future.answer = request.RESPONSE_TYPE.decode(BytesIO(frame))

    connection = SimpleNamespace(_requests=[(1, request, None)], host="k", port=1)
    _read(connection, handle, body)
    return future.answer


def fetch(**changes: Any) -> tuple[Any, bytes]:
    request = FetchRequest_v11(-1, 0, 0, 0, 0, 0, 0, [("orders", [(0, 0, 0, 0, 0)])], [], "")
    row = {"partition": 0, "code": 0, "end": 1, "stable": 1, "start": 0, "aborted": None, "replica": -1, "data": b""}
    rows = changes.get("rows", [tuple(row.values())])
    return request, request.RESPONSE_TYPE(0, 0, 0, changes.get("topics", [("orders", rows)])).encode()


def test_a_list_that_may_be_null_is_read_and_every_other_one_is_missed() -> None:
    assert answer_to(*fetch()).topics[0][0] == "orders"
    for changes in ({"topics": None}, {"rows": None}):
        with pytest.raises(ConnectionResetError, match="has no"):
            answer_to(*fetch(**changes))


@pytest.mark.parametrize("change", [lambda b: b + b"\0", lambda b: b[:-1], lambda b: b"\xff" * len(b)])
def test_an_answer_has_the_length_of_its_fields(change: Callable[[bytes], bytes]) -> None:
    request, body = fetch()
    with pytest.raises(ConnectionResetError, match="cannot be read"):
        answer_to(request, change(body))


@pytest.mark.parametrize(
    ("request_", "values"),
    [
        (ProduceRequest_v8(None, -1, 1, [("a", [(0, b"")])]), ([("b", [(0, 0, 1, 1, 1, [], None)])], 0)),
        (ProduceRequest_v8(None, -1, 1, [("a", [(0, b"")])]), ([("a", [(1, 0, 1, 1, 1, [], None)])], 0)),
        (ProduceRequest_v8(None, -1, 1, [("a", [(0, b"")])]), ([], 0)),
        (OffsetFetchRequest_v3("g", [("a", [0, 1])]), (0, [("a", [(0, 5, "", 0)])], 0)),
        (FetchRequest_v11(-1, 0, 0, 0, 0, 0, 0, [], [], ""), (0, 0, 0, [("a", [(0, 0, 1, 1, 0, None, -1, b"")])])),
        (MetadataRequest_v5(["a"], False), (0, [(1, "k", 9092, None)], "c", 1, [])),
        (MetadataRequest_v5(["a"], False), (0, [(1, "k", 9092, None)], "c", 1, [(0, "b", False, [])])),
        (MetadataRequest_v5(None, False), (0, [(1, "k", 0, None)], "c", 1, [])),
        (MetadataRequest_v5(None, False), (0, [(1, "", 9092, None)], "c", 1, [])),
    ],
)
def test_an_answer_about_what_was_not_asked_for_is_none(request_: Any, values: Any) -> None:
    with pytest.raises(ConnectionResetError, match="cannot be read"):
        answer_to(request_, request_.RESPONSE_TYPE(*values).encode())


@pytest.mark.parametrize(
    ("request_", "values"),
    [
        (FetchRequest_v11(-1, 0, 0, 0, 0, 0, 0, [("a", [(0, 0, 0, 0, 0)])], [], ""), (0, 0, 0, [])),  # held back
        (OffsetFetchRequest_v3("g", [("a", [0])]), (0, [], 16)),  # refused as a whole
        (OffsetFetchRequest_v3("g", None), (0, [("a", [(0, 5, "", 0)])], 0)),  # asked for all
        (MetadataRequest_v5(["a"], False), (0, [(1, "::1", 9092, None)], "c", 1, [(3, "a", False, [])])),
        (MetadataRequest_v5([], False), (0, [(1, "k_1.example", 9092, None)], "c", 1, [])),
    ],
)
def test_an_answer_may_say_less_where_kafka_does(request_: Any, values: Any) -> None:
    assert answer_to(request_, request_.RESPONSE_TYPE(*values).encode()) is not None


def test_a_frame_that_nobody_has_asked_for_ends_the_connection() -> None:
    def handle(frame: bytes) -> None:
        raise IndexError("no request")

    with pytest.raises(ConnectionResetError):
        _read(SimpleNamespace(_requests=[], host="k", port=1), handle, b"")


@pytest.mark.parametrize("kind", [*GARBAGE, AssertionError])
async def test_a_broker_that_cannot_be_used_is_as_one_that_cannot_be_reached(kind: type[Exception]) -> None:
    """A port of 70000, a name with an empty part, versions that are none."""

    async def broken(*_: Any) -> None:
        raise kind("no")

    looks: list[bool] = []
    client = SimpleNamespace(
        _get_conn=broken, _metadata_update=broken, bootstrap=broken, coordinator_lookup=broken,
        force_metadata_update=lambda: looks.append(True), hosts=[("k", 1, 0)], cluster=SimpleNamespace(),
    )  # fmt: skip
    harden(client)
    assert await client._get_conn(1) is None and looks == [True]
    assert await client._metadata_update(None, None) is False and looks == [True, True]


@pytest.mark.real_kafka("groups")
async def test_a_connection_whose_versions_are_not_told_is_made_anew(kafka: KafkaAddress, queue: str) -> None:
    def without(answer: Answer) -> bytes:
        return b"\0" * len(answer.body) if answer.api == VERSIONS and answer.nth in (0, 2, 3) else answer.body

    async with KafkaProxy(kafka, without) as proxy, KafkaProducer(queue, url=proxy.url) as producer:
        await producer.send("x")
        assert proxy.seen[VERSIONS] > 4


@pytest.mark.parametrize("kind", GARBAGE)
def test_each_of_them_passes(kind: type[Exception]) -> None:
    lost = client_error(kind("0xff"), SETTINGS)
    assert isinstance(lost, ConnectError) and not lost.permanent and "cannot be read" in str(lost)
