"""A cluster of three loses the node that everybody is connected to; everybody goes on at the next host of the URL."""

from __future__ import annotations

import asyncio

import pytest

from streamtools import Producer
from tests.brokers.rabbitmq import RabbitMQCluster
from tests.chaos.tally import show
from tests.chaos.traffic import Traffic


@pytest.mark.slow
@pytest.mark.timeout(300)
async def test_one_node_after_the_other_dies_by_kill_9_and_nothing_is_lost(rabbitmq_cluster: RabbitMQCluster) -> None:
    first, second, _ = rabbitmq_cluster.nodes
    async with Producer("orders", url=rabbitmq_cluster.url):
        await asyncio.to_thread(rabbitmq_cluster.wait_saved)
    async with Traffic(rabbitmq_cluster.url) as traffic:
        await traffic.grows(1000)
        await asyncio.to_thread(first.kill)  # both are connected to it: it comes first in the URL
        await traffic.grows(1000)
        show("without the first node", traffic.counts())
        await asyncio.to_thread(rabbitmq_cluster.start)
        await asyncio.to_thread(second.kill)
        await traffic.grows(1000)
        show("without the second", traffic.counts())
        await asyncio.to_thread(rabbitmq_cluster.start)
        await traffic.finish()
    assert traffic.missing == set()
