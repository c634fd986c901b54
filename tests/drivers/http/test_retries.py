"""A sender keeps its message until it is answered, and knows when to stop."""

from __future__ import annotations

import asyncio
import socket
import time
from datetime import UTC, datetime, timedelta
from email.utils import format_datetime
from typing import Any

import pytest
from aiohttp import web

from streamtools.drivers.http import HTTPProducer
from streamtools.drivers.http.troubles import PASSING
from streamtools.errors import Closed, ResponseError, SendError, StreamToolsError
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.settings import HTTPSettings
from tests.drivers.http.conftest import QUICK, Gate, producer_to, serving
from tests.drivers.http.peer import hang_up, peer
from tests.faults.waiting import wait_until


def free_port() -> int:
    with socket.create_server(("127.0.0.1", 0)) as free:
        return int(free.getsockname()[1])


class Failing:
    """Fails a number of times, and remembers which attempts it saw."""

    def __init__(self, times: int) -> None:
        self.times = times
        self.attempts: list[int] = []
        self.ids: set[str] = set()

    async def __call__(self, msg: Message) -> str:
        self.attempts.append(msg.attempt)
        self.ids.add(msg.id)
        if len(self.attempts) <= self.times:
            raise RuntimeError("not yet")
        return "done"


async def test_a_handler_that_fails_is_run_again_by_the_senders_retries() -> None:
    handler = Failing(2)
    async with serving(handler, retry=QUICK) as consumer, producer_to(consumer) as producer:
        receipt = await producer.send(1)
    assert (receipt.body, handler.attempts, len(handler.ids)) == (b"done", [1, 2, 3], 1)


async def test_the_consumers_policy_ends_the_attempts() -> None:
    handler = Failing(99)
    async with serving(handler, retry=QUICK) as consumer, producer_to(consumer) as producer:
        with pytest.raises(ResponseError) as caught:
            await producer.send(1)
    assert (caught.value.status, handler.attempts) == (500, [1, 2, 3])


async def test_no_retries_means_500_at_once() -> None:
    handler = Failing(99)
    async with serving(handler, retry=Retry(retries=0)) as consumer, producer_to(consumer) as producer:
        with pytest.raises(ResponseError):
            await producer.send(1)
    assert handler.attempts == [1]


@pytest.mark.parametrize("status", sorted(PASSING))
async def test_a_status_that_passes_is_tried_again_with_the_same_id(status: int) -> None:
    async with peer(lambda n: web.Response(status=status if n < 3 else 200)) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            await producer.send(1)
    assert len(it.ids) == 1
    assert it.attempts == (["1", "2", "3"] if status == 503 else ["1", "1", "1"])


@pytest.mark.parametrize("status", [429, 500, 501, 507, 599])
async def test_another_status_passes_where_it_says_when(status: int) -> None:
    async with peer(lambda n: web.Response(status=status if n < 2 else 200, headers={"Retry-After": "0"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            await producer.send(1)
    assert (len(it.asked), len(it.ids)) == (2, 1)


@pytest.mark.parametrize(
    "status", [301, 400, 401, 403, 404, 405, 409, 410, 413, 415, 422, 429, 431, 451, 500, 501, 505]
)
async def test_a_status_that_is_for_good_is_an_error_at_once(status: int) -> None:
    async with peer(lambda n: web.Response(status=status)) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            with pytest.raises(ResponseError) as caught:
                await producer.send(1)
    assert (caught.value.status, len(it.asked)) == (status, 1)


async def test_a_4xx_is_for_good_even_where_it_says_when() -> None:
    async with peer(lambda n: web.Response(status=404, headers={"Retry-After": "0"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            with pytest.raises(ResponseError):
                await producer.send(1)
    assert len(it.asked) == 1


async def test_a_port_that_refuses_is_waited_for() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    async with HTTPProducer("orders", port=port, send_timeout=20) as producer:
        sending = asyncio.create_task(producer.send(1))
        await wait_until(lambda: not producer._connected)
        async with peer(lambda n: web.Response(), port):
            await sending


async def test_a_name_that_is_not_found_is_an_error_once_the_time_is_over() -> None:
    async with HTTPProducer("orders", url="http://nowhere.invalid:1", send_timeout=0.5) as producer:
        # A name server that takes its time is one more reason.
        with pytest.raises(SendError, match="http://nowhere.invalid:1/orders(: cannot connect| was not answered)"):
            await producer.send(1)


async def test_a_side_that_speaks_no_tls_is_an_error_at_once() -> None:
    async with peer(lambda n: web.Response()) as it:
        async with HTTPProducer("orders", url=f"https://127.0.0.1:{it.port}", send_timeout=20) as producer:
            with pytest.raises(StreamToolsError, match="TLS failed"):
                await asyncio.wait_for(producer.send(1), 10)


async def test_an_answer_that_says_no_handler_saw_it_costs_no_attempt() -> None:
    async with peer(lambda n: web.Response(status=503 if n < 3 else 200, headers={"ce-attempt": "1"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            await producer.send(1)
    assert it.attempts == ["1", "1", "1"]


def in_one_second() -> str:
    return format_datetime(datetime.now(UTC) + timedelta(seconds=2), usegmt=True)


@pytest.mark.parametrize("value", ["1", in_one_second])
async def test_retry_after_is_waited_for(value: Any) -> None:
    def answer(number: int) -> web.Response:
        after = value if isinstance(value, str) else value()
        return web.Response(status=503 if number == 1 else 200, headers={"Retry-After": after})

    async with peer(answer) as it, HTTPProducer("orders", port=it.port) as producer:
        await producer.send(1)
    assert it.asked[1].at - it.asked[0].at >= 0.9


@pytest.mark.parametrize("value", ["soon", "-1", "1e9", "٣", "9" * 400, "Wed, 99 Foo 2020 99:99:99 GMT", ""])
async def test_a_retry_after_that_is_none_is_ignored(value: str) -> None:
    async with peer(lambda n: web.Response(status=503 if n == 1 else 200, headers={"Retry-After": value})) as it:
        async with HTTPProducer("orders", port=it.port, send_timeout=5) as producer:
            await producer.send(1)
    assert len(it.asked) == 2


async def test_a_retry_after_beyond_send_timeout_is_not_waited_for() -> None:
    async with peer(lambda n: web.Response(status=503, headers={"Retry-After": "60"})) as it:
        async with HTTPProducer("orders", port=it.port, send_timeout=50) as producer:
            start = time.monotonic()
            with pytest.raises(ResponseError) as caught:
                await producer.send_many([1, 2], headers={})
    assert time.monotonic() - start < 30
    assert (caught.value.status, len(it.asked), len(caught.value.refused)) == (503, 1, 2)


async def test_a_connection_that_ends_before_the_answer_is_tried_again_with_the_same_id() -> None:
    async with peer(lambda n: hang_up() if n == 1 else web.Response()) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            await producer.send(1)
    assert (len(it.asked), len(it.ids)) == (2, 1)


async def test_of_a_batch_what_was_answered_is_not_sent_again_after_a_lost_connection() -> None:
    async with peer(lambda n: hang_up() if n == 3 else web.Response()) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            receipts = await producer.send_many(range(4))
    assert [asked.body for asked in it.asked] == [b"0", b"1", b"2", b"2", b"3"]
    assert len(receipts) == 4


async def test_attempts_counted_before_a_lost_connection_stay_counted() -> None:
    def answer(number: int) -> web.StreamResponse:
        return web.Response(status=503) if number == 1 else hang_up() if number == 2 else web.Response()

    async with peer(answer) as it, HTTPProducer("orders", port=it.port) as producer:
        await producer.send(1)
    assert it.attempts == ["1", "2", "2"]


async def test_a_server_that_comes_up_within_send_timeout_gets_the_message() -> None:
    handler = Failing(0)
    port = free_port()
    async with HTTPProducer("orders", port=port, send_timeout=10) as producer:
        sending = asyncio.create_task(producer.send(1))
        await wait_until(lambda: not producer._connected)  # refused once, at least
        assert not sending.done()
        async with serving(handler, port=port):
            assert (await sending).body == b"done"  # type: ignore[attr-defined]
    assert handler.attempts == [1]


async def test_a_server_that_goes_and_comes_back_gets_every_message_once() -> None:
    handler = Failing(0)
    async with serving(handler) as first:
        port = first.address[1]
        producer = await producer_to(first).open()
        await producer.send(1)
    sending = asyncio.create_task(producer.send(2))
    await wait_until(lambda: not producer._connected)
    async with serving(handler, port=port):
        await sending
        await producer.close()
    assert len(handler.ids) == 2


async def test_a_server_that_never_comes_up_ends_in_a_clear_error() -> None:
    port = free_port()
    async with HTTPProducer("orders", port=port, send_timeout=0.5) as producer:
        with pytest.raises(
            SendError, match=rf"not confirmed within 0.5 s: .*:{port}/orders: cannot connect"
        ) as caught:
            await producer.send(1, id="7")
    assert caught.value.unknown == ("7",)


@pytest.mark.parametrize("send_timeout", [0.5, 0.0001])
async def test_a_host_that_is_not_one_ends_in_a_clear_error(send_timeout: float) -> None:
    async with HTTPProducer("orders", host="no.such.host.invalid", send_timeout=send_timeout) as producer:
        with pytest.raises(SendError, match="no.such.host.invalid"):
            await producer.send(1)


@pytest.mark.parametrize("options", [{"send_timeout": 0.3}, {"url": {"timeout": 0.3}}])
async def test_an_answer_that_does_not_come_in_time_leaves_the_message_unknown(options: Any, gate: Gate) -> None:
    async with serving(gate) as consumer:
        settings = HTTPSettings(port=consumer.address[1], **options.pop("url", {}))
        async with HTTPProducer("orders", url=settings, **options) as producer:
            with pytest.raises(SendError, match="was not answered in time") as caught:
                await producer.send_many([1, 2])
        gate.open.set()
    assert (len(caught.value.unknown), len(caught.value.refused), gate.entered) == (1, 1, 1)


async def test_where_the_time_for_all_ends_with_that_for_one_answer_the_others_are_not_in_doubt(gate: Gate) -> None:
    async with (
        serving(gate) as consumer,
        HTTPProducer("orders", url=HTTPSettings(port=consumer.address[1]), send_timeout=0.3) as producer,
    ):
        sending = asyncio.create_task(producer.send_many([1, 2]))
        await wait_until(lambda: gate.entered == 1)
        time.sleep(0.4)  # noqa: ASYNC251 - both are over when the loop goes on
        with pytest.raises(SendError, match="/orders was not answered in time") as caught:
            await sending
        gate.open.set()
    assert (len(caught.value.unknown), len(caught.value.refused)) == (1, 1)


async def test_a_peer_that_does_not_speak_http_is_a_clear_error() -> None:
    async def babble(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        await reader.readuntil(b"\r\n\r\n")
        writer.write(b"SSH-2.0-OpenSSH_9.2\r\n\r\n")
        await writer.drain()
        writer.close()

    async with await asyncio.start_server(babble, "127.0.0.1", 0) as listener:
        async with HTTPProducer("orders", port=listener.sockets[0].getsockname()[1]) as producer:
            with pytest.raises(SendError, match="the answer is not HTTP") as caught:
                await producer.send(1)
            assert str(caught.value).isprintable()


async def test_close_ends_a_send_that_waits_for_its_answer(gate: Gate) -> None:
    async with serving(gate) as consumer:
        producer = await producer_to(consumer).open()
        sending = asyncio.create_task(producer.send(1))
        await wait_until(lambda: gate.entered == 1)
        await producer.close()
        with pytest.raises(Closed):
            await sending
        gate.open.set()


async def test_close_ends_a_send_that_waits_to_try_again() -> None:
    async with peer(lambda n: web.Response(status=503, headers={"Retry-After": "20"})) as it:
        producer = await HTTPProducer("orders", port=it.port).open()
        sending = asyncio.create_task(producer.send(1))
        await wait_until(lambda: len(it.asked) == 1)
        await producer.close()
        with pytest.raises(Closed):
            await asyncio.wait_for(sending, 5)
        await producer.close()


async def test_a_producer_opens_again_after_close_and_by_the_first_send() -> None:
    async with peer(lambda n: web.Response()) as it:
        producer = HTTPProducer("orders", port=it.port)
        await producer.send(1)
        await producer.close()
        with pytest.raises(Closed):
            await producer.send(2)
        await producer.open()
        await producer.send(3)
        await producer.close()
    assert [asked.body for asked in it.asked] == [b"1", b"3"]


async def test_a_cancelled_send_leaves_the_producer_usable(gate: Gate) -> None:
    async with serving(gate, concurrency=2) as consumer, producer_to(consumer) as producer:
        sending = asyncio.create_task(producer.send(1))
        await wait_until(lambda: gate.entered == 1)
        sending.cancel()
        await asyncio.gather(sending, return_exceptions=True)
        gate.open.set()
        assert (await producer.send(2)).body == b"through"


async def test_too_many_at_once_all_get_through_in_the_end() -> None:
    async def handler(msg: int) -> int:
        return msg

    async with serving(handler, prefetch=5) as consumer, producer_to(consumer) as producer:
        receipts = await asyncio.gather(*(producer.send(n) for n in range(20)))
    assert [receipt.json() for receipt in receipts] == list(range(20))
