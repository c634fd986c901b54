"""Records as no client library writes them: header names of any bytes, any time."""

from __future__ import annotations

import struct
from collections.abc import Sequence

from aiokafka import TopicPartition
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest
from aiokafka.record.default_records import DefaultRecordBatchBuilder
from aiokafka.record.util import calc_crc32c

from tests.brokers.kafka.address import KafkaAddress

#: Of a batch, see https://kafka.apache.org/documentation/#recordbatch: bytes before the checksum, and before what it
#: covers.
CRC, COVERED = 17, 21

#: Key, value, headers, timestamp in ms.
Raw = tuple[bytes | None, bytes | None, Sequence[tuple[bytes, bytes | None]], int]


def batch_of(rows: Sequence[Raw]) -> bytes:
    """One batch with these records; no more than fifty headers in all, with names under 64 bytes."""
    builder = DefaultRecordBatchBuilder(2, 0, False, -1, -1, -1, 1 << 20)
    names: list[tuple[bytes, bytes]] = []
    for number, (key, value, headers, timestamp) in enumerate(rows):
        texts = []
        for name, content in headers:
            text = chr(ord("A") + len(names)) * len(name)  # as many bytes
            length = bytes([2 * len(name)])
            names.append((length + text.encode(), length + name))
            texts.append((text, content))
        assert builder.append(number, timestamp=timestamp, key=key, value=value, headers=texts) is not None
    data = bytes(builder.build())
    for stand_in, name in names:
        assert data.count(stand_in) == 1
        data = data.replace(stand_in, name)
    return data[:CRC] + struct.pack(">I", calc_crc32c(data[COVERED:])) + data[COVERED:]


async def produce_raw(address: KafkaAddress, topic: str, rows: Sequence[Raw], partition: int = 0) -> None:
    """Write these records, as they are, in one batch."""
    client = AIOKafkaClient(bootstrap_servers=address.bootstrap)
    await client.bootstrap()
    try:
        await client._wait_on_metadata(topic)
        node = client.cluster.leader_for_partition(TopicPartition(topic, partition))
        topics = [(topic, [(partition, batch_of(rows))])]
        answer = await client.send(node, ProduceRequest(None, -1, 30_000, topics))
        [(_, [(_, code, *_)])] = answer.topics
        if code:
            raise kafka.for_code(code)()
    finally:
        await client.close()
