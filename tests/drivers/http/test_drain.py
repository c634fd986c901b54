"""Stopping: intake ends at once, what is at work is answered, and nothing hangs."""

from __future__ import annotations

import asyncio
import time
from typing import Any

import pytest

from streamtools.drivers.http import HTTPConsumer
from streamtools.errors import Closed
from tests.drivers.http.conftest import Gate, producer_to, read_reply, request, serving, talk
from tests.faults.waiting import wait_until


async def echo(msg: Any) -> Any:
    return msg


async def test_while_draining_those_at_work_are_answered_and_all_others_told_to_come_again(gate: Gate) -> None:
    # Given one request at work, one received, one that waits, and an idle connection
    async with serving(gate, prefetch=2) as consumer:
        asked = [asyncio.create_task(talk(consumer, request(body=b"{}")))]
        await wait_until(lambda: gate.entered == 1)
        asked += [asyncio.create_task(talk(consumer, request(body=b"{}"))) for _ in range(2)]
        idle_reader, idle_writer = await asyncio.open_connection(*consumer.address)
        mailbox = consumer._requests
        assert mailbox is not None
        await wait_until(lambda: len(mailbox._unanswered) == 3)
        # When the consumer stops
        consumer.stop(10)
        await wait_until(lambda: mailbox.stopped)
        # Then who was not handed to a handler is sent away, on old connections too, and no new ones are taken
        idle_writer.write(request(path="/orders", body=b"{}", Connection="keep-alive"))
        late = await read_reply(idle_reader)
        idle_writer.close()
        with pytest.raises(ConnectionRefusedError):
            await asyncio.open_connection(*consumer.address)
        # And who was, is answered
        gate.open.set()
        replies = await asyncio.gather(*asked)
    assert sorted(reply.status for reply in replies) == [200, 503, 503]
    assert all(reply.headers["connection"] == "close" for reply in [*replies, late])
    assert all(reply.headers["retry-after"] == "1" for reply in [*replies, late] if reply.status == 503)
    assert late.status == 503


async def test_a_handler_that_does_not_finish_in_time_leaves_its_request_to_come_again(gate: Gate) -> None:
    async with serving(gate, grace=0.1) as consumer:
        asked = asyncio.create_task(talk(consumer, request(body=b"{}")))
        await wait_until(lambda: gate.entered == 1)
    assert (await asked).status == 503


async def test_a_body_that_is_still_arriving_does_not_hold_up_the_drain() -> None:
    async with serving(echo) as consumer:
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
        await wait_until(lambda: bool(consumer._requests._reading))  # type: ignore[union-attr]
    assert (await read_reply(reader)).status == 503
    writer.close()


async def test_stop_and_close_in_one_breath_answer_a_body_that_is_still_arriving() -> None:
    consumer = await HTTPConsumer("orders", port=0).open()
    reader, writer = await asyncio.open_connection(*consumer.address)
    writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\nContent-Length: 5\r\n\r\nabc")
    mailbox = consumer._requests
    assert mailbox is not None
    await wait_until(lambda: bool(mailbox._reading))
    await consumer._stop()
    await wait_until(lambda: all(limit.expired() for limit in mailbox._reading), poll=0)
    await consumer.close()
    assert (await read_reply(reader)).status == 503
    writer.close()


async def test_close_does_not_wait_for_idle_connections() -> None:
    async with serving(echo) as consumer:
        connections = [await asyncio.open_connection(*consumer.address) for _ in range(5)]
        for reader, writer in connections[:3]:
            writer.write(request(body=b"{}", Connection="keep-alive"))
            await read_reply(reader)
        connections[4][1].write(b"POST /orders HTTP/1.1\r\nHo")
        start = time.monotonic()
    assert time.monotonic() - start < 10
    for reader, writer in connections:
        assert await reader.read() == b""
        writer.close()


async def test_close_answers_what_no_one_has_settled() -> None:
    consumer = await HTTPConsumer("orders", port=0).open()
    asked = [asyncio.create_task(talk(consumer, request(body=b"{}"))) for _ in range(2)]
    (delivery,) = await consumer.receive(timeout=5)
    await wait_until(lambda: len(consumer._requests._unanswered) == 2)  # type: ignore[union-attr]
    await consumer.close()
    assert [(await reply).status for reply in asked] == [503, 503]
    await delivery.ack()  # too late, and harmless
    await consumer.close()


async def test_close_wakes_who_waits_for_a_request() -> None:
    consumer = await HTTPConsumer("orders", port=0).open()
    waiting = asyncio.create_task(consumer.receive())
    await wait_until(lambda: consumer._puller.is_busy)
    await consumer.close()
    with pytest.raises(Closed):
        await waiting


async def test_a_consumer_opens_again_after_close() -> None:
    consumer = await HTTPConsumer("orders", port=0).open()
    port = consumer.address[1]
    await consumer.close()
    consumer.port = port
    async with consumer:
        assert consumer.address[1] == port
        assert (await talk(consumer, request("GET"))).status == 405


async def test_nothing_is_lost_or_done_twice_when_a_consumer_stops_under_load_and_another_takes_over() -> None:
    # Given senders at work
    seen: list[int] = []

    async def handler(msg: int) -> int:
        await asyncio.sleep(0)
        seen.append(msg)
        return msg

    async with serving(handler, concurrency=4) as first:
        port = first.address[1]
        async with producer_to(first) as producer:
            sending = asyncio.gather(*(_send(producer, range(n, 400, 8)) for n in range(8)))
            await wait_until(lambda: len(seen) > 50)
            # When the consumer stops and another comes on the same port
            first.stop(5)
            await wait_until(lambda: first._requests is None)
            async with serving(handler, port=port, concurrency=4):
                answers = await asyncio.wait_for(sending, 30)
    # Then each was handled, once, and answered with its own value
    assert sorted(seen) == list(range(400))
    assert all(answer for row in answers for answer in row)


async def _send(producer: Any, numbers: range) -> list[bool]:
    return [(await producer.send(number)).json() == number for number in numbers]
