"""Three Kafka brokers: the leader of the partition dies by kill -9 under load; then the group's coordinator."""

from __future__ import annotations

import asyncio
import secrets
import time
from collections import Counter

import pytest

from streamtools.drivers.kafka import KafkaProducer
from tests.brokers.kafka.node import KafkaCluster
from tests.chaos.tally import show
from tests.chaos.traffic import Traffic
from tests.drivers.kafka.conftest import records
from tests.lengths import length

#: Messages confirmed, at least.
NUMBER = length(15_000, 50_000)
#: Kafka's own topic with what groups have committed; whoever leads it coordinates them.
OFFSETS = "__consumer_offsets"


@pytest.mark.slow
@pytest.mark.timeout(400)
async def test_messages_survive_a_kill_9_of_their_leader_and_one_of_the_coordinator(
    kafka_cluster: KafkaCluster,
) -> None:
    queue = f"orders-{secrets.token_hex(4)}"
    async with KafkaProducer(queue, url=kafka_cluster.url, partitions=1):
        pass
    async with Traffic(kafka_cluster.url, queue=queue) as traffic:
        for topic in (queue, OFFSETS):
            await traffic.grows(NUMBER // 10)
            leader = await asyncio.to_thread(kafka_cluster.leader, topic)
            at_the_kill, then = traffic.counts(), time.monotonic()
            await asyncio.to_thread(leader.kill)
            await traffic.grows(NUMBER // 10)
            seconds = f"{time.monotonic() - then:.1f}"
            show(f"the leader of {topic} killed", at_the_kill, seconds_until_a_tenth_more_was_through=seconds)
            await asyncio.to_thread(kafka_cluster.start)
        await traffic.grows(max(0, NUMBER - len(traffic.handled)))
        await traffic.finish()

    held = Counter(int(record.value) for record in await records(kafka_cluster.address, queue))
    show("at the end", traffic.counts(), in_the_log_twice=held.total() - len(held))
    assert len(traffic.confirmed) >= NUMBER
    assert traffic.confirmed == set(held)
    assert traffic.missing == set()
