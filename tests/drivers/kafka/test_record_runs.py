"""Records that are alike travel as one, and become single records when something happens to one of them."""

from __future__ import annotations

import asyncio
from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import pytest
from aiokafka.record.memory_records import MemoryRecords
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka import KafkaProducer
from streamtools.drivers.kafka.producer import KafkaReceipt, _receipts
from streamtools.drivers.kafka.producing.batches import BATCH, BatchQueue, confirm
from streamtools.drivers.kafka.producing.partitions import STICKY, PartitionChooser
from streamtools.drivers.kafka.producing.record import (
    RecordRun,
    Records,
    not_held,
    records_of,
    records_to_send,
    refused,
    singles,
)
from streamtools.drivers.kafka.producing.unconfirmed import ByteLimit, UnconfirmedBatch
from streamtools.errors import SendError
from streamtools.message import Drafts, Message
from streamtools.settings import KafkaSettings

SETTINGS = KafkaSettings(host="127.0.0.1:1")
PRODUCER = SimpleNamespace(_txn_manager=SimpleNamespace(transactional_id=None))

bodies = st.lists(st.binary(max_size=300), min_size=1, max_size=200)
fields = st.fixed_dictionaries(
    {},
    optional={
        "key": st.text(min_size=1, max_size=5),
        "type": st.text(min_size=1, max_size=5),
        "source": st.just("shop"),
        "headers": st.dictionaries(st.text(min_size=1, max_size=5), st.text(max_size=5), max_size=3),
    },
)


def drafts(values: Sequence[bytes], **more: Any) -> Drafts:
    return Drafts({"queue": "orders", "time": 1e9, **more}, values, [f"{n:032x}" for n in range(len(values))])


def run_of(values: Sequence[bytes], **more: Any) -> RecordRun:
    [run] = records_to_send(drafts(values, **more))
    assert isinstance(run, RecordRun)
    return run


def distributed(
    items: Sequence[Records], *, count: int = 1, max_size: int = 2**20
) -> tuple[Any, dict[int, BatchQueue]]:
    """The records of one send in the queues of their partitions."""
    chooser, queues = PartitionChooser(SETTINGS), dict[int, BatchQueue]()
    chooser._counts["orders"] = count
    pending = UnconfirmedBatch(sum(item.number for item in items), ByteLimit())

    def queue_of(topic: str, partition: int) -> BatchQueue:
        return queues.setdefault(partition, BatchQueue())

    pending.limit.take(chooser.distribute(items, pending, queue_of, missing={}, max_size=max_size))
    return pending, queues


def read(builder: Any) -> list[tuple[Any, ...]]:
    batch = MemoryRecords(bytes(builder._build())).next_batch()
    assert batch is not None and batch.validate_crc()
    return [(r.offset, r.timestamp, r.key, r.value, r.headers) for r in batch]


@given(bodies, fields)
async def test_a_run_is_written_as_its_records_are_one_by_one(values: list[bytes], more: dict[str, Any]) -> None:
    batch = drafts(values, **more)
    written = []
    for items in (records_to_send(batch), records_of(list(batch))):
        pending, queues = distributed(items)
        sent, builder = queues[0].build(PRODUCER)
        confirm(sent, 0, 7)
        assert pending.future.done() and pending.limit._taken == 0
        written.append((read(builder), _receipts(items)))
    (as_a_run, receipts), (one_by_one, wanted) = written
    assert [record[2:] for record in as_a_run] == [record[2:] for record in one_by_one]
    assert len({record[1] for record in as_a_run}) == 1
    assert receipts == wanted == [KafkaReceipt(id_, "orders", 0, 7 + n) for n, id_ in enumerate(batch.ids)]


async def test_a_long_run_goes_in_parts_to_one_partition_after_the_other() -> None:
    run = run_of([b"%04d" % n * 100 for n in range(1000)])
    pending, queues = distributed([run], count=3)
    assert sorted(queues) == [0, 1, 2]
    assert all(part.size <= STICKY for queue in queues.values() for part in queue.waiting)
    for number, queue in queues.items():
        while queue.waiting:
            confirm(queue.build(PRODUCER)[0], number, 0)
    assert pending.future.done() and pending.limit._taken == 0
    assert [receipt.id for receipt in _receipts([run])] == list(run.ids)
    assert {(r.partition, r.offset) for r in _receipts([run])} > {(0, 0), (1, 0), (2, 0)}  # type: ignore[attr-defined]


async def test_what_has_no_room_in_a_batch_goes_with_the_next() -> None:
    run = run_of([b"x" * 1000] * 1000)
    _, queues = distributed([run])
    sizes, offset = [], 0
    while queues[0].waiting:
        sent, builder = queues[0].build(PRODUCER)
        sizes.append(builder.size())
        confirm(sent, 0, offset)
        offset += builder.record_count()
    assert len(sizes) == 3 and max(sizes) <= BATCH
    assert [receipt.offset for receipt in _receipts([run])] == list(range(1000))  # type: ignore[attr-defined]


async def test_one_that_is_too_large_is_refused_and_the_others_go() -> None:
    values = [b"x"] * 5 + [b"x" * 2000] + [b"x"] * 5
    run = run_of(values)
    pending, queues = distributed([run], max_size=1000)
    confirm(queues[0].build(PRODUCER)[0], 0, 0)
    assert pending.future.done() and pending.limit._taken == 0
    assert list(pending.failed) == [run.ids[5]]
    assert [m.id for m in not_held(drafts(values), [run])] == [run.ids[5]]
    assert str(refused(pending.failed, SETTINGS, [run])).startswith("1 message refused by kafka://127.0.0.1:1")


async def test_a_batch_with_a_run_is_halved_until_one_record_is_refused() -> None:
    values = [b"%d" % n for n in range(100)]
    run = run_of(values)
    pending, queues = distributed([run])
    queue, offset = queues[0], 0
    while queue.waiting:
        sent, builder = queue.build(PRODUCER)
        if not any(value == b"37" for _, _, _, value, _ in read(builder)):
            confirm(sent, 0, offset)
            offset += builder.record_count()
        elif len(alone := singles(sent)) > 1:
            queue.halve(alone)
        else:
            alone[0].fail(ValueError("refused"))
    assert pending.future.done() and pending.limit._taken == 0
    assert list(pending.failed) == [run.ids[37]]
    held = [n for n in range(100) if n != 37]
    receipts = _receipts([run])
    assert [receipts[n].offset for n in held] == list(range(99))  # type: ignore[attr-defined]


async def test_a_run_that_nobody_waits_for_is_forgotten() -> None:
    pending, queues = distributed([run_of([b"x"] * 10)])
    pending.given_up = True
    assert queues[0].build(PRODUCER)[0] == [] and not queues[0].waiting
    assert pending.limit._taken == 0


async def test_a_run_that_cannot_be_written_is_refused_whole(monkeypatch: pytest.MonkeyPatch) -> None:
    run = run_of([b"x"] * 10)
    monkeypatch.setattr(run._like, "timestamp", 2**70)
    pending, queues = distributed([run])
    assert queues[0].build(PRODUCER)[0] == []
    assert pending.future.done() and pending.limit._taken == 0
    assert list(pending.failed) == list(run.ids)


async def test_receipts_of_what_kafka_held_already_have_no_offset() -> None:
    run = run_of([b"x"] * 3)
    _, queues = distributed([run])
    confirm(queues[0].build(PRODUCER)[0], 0, -1)
    assert _receipts([run]) == [KafkaReceipt(id_, "orders", 0, None) for id_ in run.ids]


async def test_of_many_payloads_the_one_that_the_topic_refuses_is_named(kafka: Any, queue: str) -> None:
    async with KafkaProducer(queue, url=kafka.url, partitions=2) as producer:
        settings = producer.settings.model_copy(update={"max_message": 4 * 2**20})
        async with KafkaProducer(queue, url=settings) as larger:
            payloads = [b"x" * 1000] * 700 + [b"x" * (2 * 2**20)] + [b"y" * 1000] * 700
            with pytest.raises(SendError) as caught:
                await larger.send_many(payloads)
        [message] = caught.value.messages
        assert len(message.body or b"") == 2 * 2**20 and list(caught.value.refused) == [message.id]
        receipts = await producer.send_many(payloads[:3])
    assert len({receipt.id for receipt in receipts}) == 3


async def test_many_that_send_at_once_get_their_own_receipts(kafka: Any, queue: str) -> None:
    async with KafkaProducer(queue, url=kafka.url, partitions=3) as producer:
        found = await asyncio.gather(*(producer.send_many([b"%d" % n] * 300) for n in range(20)))
    places = {(r.partition, r.offset) for receipts in found for r in receipts}  # type: ignore[attr-defined]
    assert len(places) == 6000
    assert len({r.id for receipts in found for r in receipts}) == 6000


def test_drafts_are_the_messages_that_they_say() -> None:
    batch = drafts([b"a", b"b", b"c"], type="t")
    wanted = [Message(body=b"%c" % (97 + n), queue="orders", id=f"{n:032x}", time=1e9, type="t") for n in range(3)]
    assert batch[1] == wanted[1] and batch[-1] == wanted[2]
    assert list(batch) == wanted and batch[1:] == wanted[1:] and len(batch) == 3
    assert batch[1] is batch[1] and wanted[2] in batch
