"""The connections of job messages: how many, and what becomes of a message when one breaks."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from urllib.parse import urlsplit

import pytest

from streamtools import SendError
from streamtools.jobs import JobMessage, connect, receive_message, send_message
from streamtools.testing import eventually
from tests.brokers.address import RabbitMQAddress
from tests.faults.proxy import Proxy

FIELDS = {"title": "t", "message_type": "m", "send_from": "a"}
PATIENCE = 60

pytestmark = pytest.mark.rabbitmq


@pytest.fixture
async def proxy(rabbitmq_vhost: RabbitMQAddress) -> AsyncIterator[Proxy]:
    parts = urlsplit(rabbitmq_vhost.url)
    async with Proxy(parts.hostname or "", parts.port or 0) as proxy:
        yield proxy


@pytest.fixture
def url(rabbitmq_vhost: RabbitMQAddress, proxy: Proxy) -> str:
    """The broker behind the proxy."""
    parts = urlsplit(rabbitmq_vhost.url)
    return parts._replace(netloc=f"{parts.username}:{parts.password}@127.0.0.1:{proxy.port}").geturl()


async def test_each_call_opens_and_closes_its_own_connection(proxy: Proxy, url: str) -> None:
    for calls in range(1, 4):
        await send_message(**FIELDS, send_to="b", url=url)
        await eventually(lambda: proxy.connections == 0)
        assert proxy.accepted == calls

    assert len(await receive_message("b", PATIENCE, url=url)) == 3
    await eventually(lambda: proxy.connections == 0)
    assert proxy.accepted == 4


async def test_connect_keeps_one_connection_for_all_queues(proxy: Proxy, url: str) -> None:
    names = [f"b{number}" for number in range(5)]
    async with connect(url) as q:
        for name in names:
            await q.send_message(**FIELDS, send_to=name)
        await eventually(lambda: proxy.connections == 1)  # a queue is made over one of its own, once
        made = proxy.accepted

        await asyncio.gather(*(q.send_message(**FIELDS, send_to=name) for name in names * 10))
        assert (proxy.connections, proxy.accepted) == (1, made)
    await eventually(lambda: proxy.connections == 0)
    assert [len(await receive_message(name, PATIENCE, url=url)) for name in names] == [11] * 5


async def test_a_deleted_queue_is_made_again(proxy: Proxy, url: str, rabbitmq_vhost: RabbitMQAddress) -> None:
    vhost = urlsplit(url).path[1:]
    async with connect(url) as q:
        for name in ("first", "second"):
            await q.send_message(**FIELDS, send_to=name)
        for name in ("first", "second"):
            await asyncio.to_thread(rabbitmq_vhost.manage, "DELETE", f"queues/{vhost}/{name}")
            with pytest.raises(SendError, match=name):
                await q.send_message(**FIELDS, send_to=name)
            await q.send_message(**FIELDS, send_to=name)
            assert len(await receive_message(name, PATIENCE, url=url)) == 1


async def test_a_call_waits_for_a_broker_that_comes_back(proxy: Proxy, url: str) -> None:
    await proxy.down()
    sending = asyncio.create_task(send_message(**FIELDS, send_to="b", url=url))
    receiving = asyncio.create_task(receive_message("b", PATIENCE, url=url))
    done, _ = await asyncio.wait({sending, receiving}, timeout=1)
    assert not done

    await proxy.restore()
    sent = await asyncio.wait_for(sending, PATIENCE)
    assert await asyncio.wait_for(receiving, PATIENCE) == [sent]


@pytest.mark.parametrize("kind", ["list", "callback"])
async def test_a_receiver_goes_on_after_its_connection_broke(proxy: Proxy, url: str, kind: str) -> None:
    seen: list[JobMessage] = []
    waiting = asyncio.create_task(receive_message("b", 0, seen.append if kind == "callback" else None, url=url))
    await eventually(lambda: proxy.connections == 1)
    for break_off in (proxy.reset, proxy.cut):
        accepted = proxy.accepted
        await break_off()
        await eventually(lambda before=accepted: proxy.accepted > before and proxy.connections >= 1)

    sent = await send_message(**FIELDS, send_to="b", url=url)
    if kind == "list":
        assert await asyncio.wait_for(waiting, PATIENCE) == [sent]
    else:
        await eventually(lambda: seen == [sent])
        waiting.cancel()
        await asyncio.wait({waiting})
    assert await receive_message("b", 0.5, url=url) == []
