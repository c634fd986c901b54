"""What goes out, what comes back, and what cannot be asked for."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import pytest
from aiohttp import web
from pydantic import BaseModel

from streamtools import PRODUCERS
from streamtools.drivers.http import HTTPProducer, HTTPReceipt
from streamtools.errors import ConfigurationError, DecodeError, FeatureError, ResponseError, SendError
from streamtools.message import Message
from tests.drivers.http.conftest import producer_to, serving
from tests.drivers.http.peer import Peer, peer


def fine(number: int) -> web.Response:
    return web.Response(text=f'{{"n": {number}}}', content_type="application/json", headers={"X-Peer": "yes"})


class Order(BaseModel):
    id: int
    name: str = "x"


async def echo(msg: Any) -> Any:
    return msg


async def sent(payload: Any, queue: str = "orders", /, *, url: str | None = None, **options: Any) -> Peer:
    """What one send asks of the peer."""
    async with peer(fine) as it, HTTPProducer(queue, url=url, port=it.port) as producer:
        await producer.send(payload, **options)
    return it


async def test_the_receipt_is_the_answer() -> None:
    async with peer(fine) as it, HTTPProducer("orders", port=it.port) as producer:
        receipt = await producer.send({"a": 1}, id="7")
    assert isinstance(receipt, HTTPReceipt)
    assert (receipt.id, receipt.queue, receipt.status, receipt.json()) == ("7", "orders", 200, {"n": 1})
    assert (receipt.headers["x-peer"], receipt.body) == ("yes", b'{"n": 1}')


async def test_an_answer_without_a_value_has_no_json() -> None:
    async with serving(lambda msg: None) as consumer, producer_to(consumer) as producer:
        receipt = await producer.send(1)
        assert (receipt.status, receipt.body) == (202, b"")
        with pytest.raises(DecodeError, match="202 is not JSON"):
            receipt.json()


async def test_the_body_is_the_payload_alone_by_post_to_the_queues_path() -> None:
    it = await sent({"a": 1}, "a b/ü?", url="http://127.0.0.1:1/v1/", headers={"X-A": "b"}, type="t")
    (asked,) = it.asked
    assert (asked.method, asked.path, asked.body) == ("POST", "/v1/a%20b/%C3%BC%3F", b'{"a":1}')
    assert (asked.headers["Content-Type"], asked.headers["X-A"], asked.headers["ce-type"]) == (
        "application/json", "b", "t",
    )  # fmt: skip


@pytest.mark.parametrize("queue", ["a", "a b", "ü", "a/b", "a//b", "/", "a/", "a?b#c", "%2F", "a%20b", "+", "..."])
async def test_every_name_reaches_its_consumer(queue: str) -> None:
    async with serving(echo, queue) as consumer, producer_to(consumer) as producer:
        assert (await producer.send("x")).body == b"x"


@pytest.mark.parametrize("payload", [b"", b"\x00\xff" * 1000, "", "text é", {"a": [1, None]}, 1.5, None, [1, 2]])
async def test_what_is_sent_is_what_the_handler_gets(payload: Any) -> None:
    seen = []

    async def handler(msg: Any) -> None:
        seen.append(msg)

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        await producer.send(payload)
    assert seen == [payload]


@pytest.mark.parametrize(
    ("payload", "query"),
    [
        ({"a": 1, "b": "x y&z=ü", "c": True, "d": 1.5}, "a=1&b=x+y%26z%3D%C3%BC&c=true&d=1.5"),
        ({"a": [1, 2], "b": "3"}, "a=1&a=2&b=3"),
        (Order(id=1), "id=1&name=x"),
        ({}, ""),
    ],
)
async def test_a_flat_mapping_by_get_becomes_the_query(payload: Any, query: str) -> None:
    (asked,) = (await sent(payload, method="get")).asked
    assert (asked.method, asked.path, asked.body) == ("GET", "/orders" + (f"?{query}" if query else ""), b"")
    assert "Content-Type" not in asked.headers


@pytest.mark.parametrize("payload", [{"a": {"b": 1}}, {"a": None}, {"a": []}, [1], "text", b"\x00", 5, {"a": [[1]]}])
async def test_anything_else_by_get_is_the_body(payload: Any) -> None:
    (asked,) = (await sent(payload, method="GET")).asked
    assert (asked.method, asked.path) == ("GET", "/orders")
    assert asked.body


@pytest.mark.parametrize("payload", [{"a": "1", "b": ["2", "3"]}, {"a": {"b": [1]}}, {"a": ""}, {}, "text"])
async def test_by_get_the_handler_gets_what_was_sent(payload: Any) -> None:
    async with serving(echo, method="GET") as consumer, producer_to(consumer) as producer:
        receipt = await producer.send(payload)
    assert (receipt.body.decode() if isinstance(payload, str) else receipt.json()) == payload


async def test_the_method_may_be_said_once_for_all_sends() -> None:
    async with peer(fine) as it, HTTPProducer("orders", port=it.port, method="put") as producer:
        await producer.send(1)
        await producer.send(1, method="Patch")
    assert [asked.method for asked in it.asked] == ["PUT", "PATCH"]


async def test_an_endpoint_is_for_one_send() -> None:
    async with peer(fine) as it, HTTPProducer("orders", port=1) as producer:
        await producer.send({"b": 2}, endpoint=f"http://127.0.0.1:{it.port}/test?a=1", method="GET")
    assert it.asked[0].path == "/test?a=1&b=2"


async def test_the_queue_may_be_an_absolute_url_and_its_query_is_never_shown() -> None:
    async with peer(fine) as it:
        async with HTTPProducer(f"http://127.0.0.1:{it.port}/hook?token=hunter2") as producer:
            receipt = await producer.send("x")
            assert "hunter2" not in repr(producer) + repr(receipt)
    assert it.asked[0].path == "/hook?token=hunter2"


@pytest.mark.parametrize("option", ["headers_tag", "header_tag"])
@pytest.mark.parametrize(("tag", "media"), [("JSON", "application/json"), ("ssi", "application/ssi-agent-wire")])
async def test_a_tag_names_the_content_type(option: str, tag: str, media: str) -> None:
    (asked,) = (await sent('{"a": 1}', **{option: tag})).asked
    assert (asked.headers["Content-Type"], asked.body) == (media, b'{"a": 1}')


async def test_ssi_content_is_json_where_it_is_json_and_bytes_where_not() -> None:
    seen = []

    async def handler(msg: Any) -> None:
        seen.append(msg)

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        await producer.send({"a": 1}, header_tag="SSI")
        await producer.send(b"\x01\x02", header_tag="SSI")
    assert seen == [{"a": 1}, b"\x01\x02"]


@pytest.mark.parametrize(
    ("options", "text"),
    [
        ({"headers_tag": "XML"}, r"'XML' is not one of 'JSON' \(application/json\), 'SSI' \(application/ssi-agent"),
        ({"method": "FETCH"}, "'FETCH' is not one of GET, POST"),
        ({"method": 5}, "5 is not one of GET, POST"),
        ({"endpoint": "/relative"}, "not absolute"),
        ({"endpoint": "http://u:hunter2@h/"}, "has a user or a password"),
        ({"endpoint": "http://h:99999999/"}, "its port is not valid"),
        ({"endpoint": "http://h/a b"}, "a space"),
    ],
)
async def test_a_wrong_option_is_a_clear_error(options: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text) as caught:
        await HTTPProducer("orders", port=1).send(1, **options)
    assert "hunter2" not in str(caught.value)


async def test_an_option_that_no_protocol_knows_is_a_type_error() -> None:
    with pytest.raises(TypeError, match="takes no 'metod'"):
        await HTTPProducer("orders").send(1, metod="GET")


@pytest.mark.parametrize("queue", ["..", "a/../b", "http://", "http://u:p@h/x", "https://h:x/", "", "a\r\nb"])
def test_a_name_that_cannot_be_sent_to_is_a_clear_error(queue: str) -> None:
    with pytest.raises(ConfigurationError):
        HTTPProducer(queue)


async def test_delay_is_refused_and_says_what_to_do() -> None:
    with pytest.raises(FeatureError, match="cannot delay messages"):
        await HTTPProducer("orders").send(1, delay=5)


async def test_a_message_that_is_already_due_is_sent() -> None:
    async with peer(fine) as it, HTTPProducer("orders", port=it.port) as producer:
        await producer.send_messages([Message(body=b"1", queue="other", id="1", deliver_at=1.0)])
        with pytest.raises(ConfigurationError, match="cannot delay messages"):
            await producer.send_messages([Message(body=b"1", queue="other", id="1", deliver_at=2.0**36)])
    assert [asked.path for asked in it.asked] == ["/other"]


@pytest.mark.parametrize("status", [400, 401, 404, 405, 409, 413, 422, 429, 500, 501])
async def test_other_errors_raise_at_once_with_status_headers_and_body(status: int) -> None:
    async with peer(lambda n: web.Response(status=status, text="because", headers={"X-A": "1"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            with pytest.raises(
                ResponseError, match=f"POST http://.*/orders was answered {status}: because"
            ) as caught:
                await producer.send(1, id="7")
    error = caught.value
    assert (error.status, error.body, error.headers["x-a"], error.refused) == (status, b"because", "1", ("7",))
    assert len(it.asked) == 1


async def test_a_redirect_is_not_followed_but_named() -> None:
    async with peer(lambda n: web.Response(status=307, headers={"Location": "http://there/"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            with pytest.raises(
                ResponseError, match="answered 307: redirects are not followed; send to http://there/"
            ):
                await producer.send(1)


async def test_a_cookie_that_the_peer_sets_is_not_sent_back() -> None:
    async with peer(lambda n: web.Response(headers={"Set-Cookie": "a=b"})) as it:
        async with HTTPProducer("orders", port=it.port) as producer:
            await producer.send(1)
            await producer.send(1)
    assert "Cookie" not in it.asked[1].headers


async def test_what_our_own_consumer_answers_arrives() -> None:
    async def handler(msg: Order) -> Any:
        return {"id": msg.id}

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        assert (await producer.send(Order(id=3))).json() == {"id": 3}
        with pytest.raises(ResponseError) as caught:
            await producer.send({"id": "x"})
    assert caught.value.status == 422
    assert json.loads(caught.value.body)["errors"][0]["loc"] == ["id"]


async def test_a_batch_goes_in_order_and_names_those_refused() -> None:
    def answer(number: int) -> web.Response:
        return web.Response(status=422 if number in (2, 4) else 200)

    async with peer(answer) as it, HTTPProducer("orders", port=it.port) as producer:
        with pytest.raises(SendError) as caught:
            await producer.send_many(range(5))
    assert [asked.body for asked in it.asked] == [b"0", b"1", b"2", b"3", b"4"]
    ids = [asked.headers["ce-id"] for asked in it.asked]
    assert caught.value.refused == (ids[1], ids[3])


async def test_a_batch_returns_its_receipts_in_order() -> None:
    async with serving(echo) as consumer, producer_to(consumer) as producer:
        receipts = await producer.send_many(range(20))
    assert [receipt.json() for receipt in receipts] == list(range(20))


async def test_many_tasks_share_one_producer() -> None:
    async with serving(echo, concurrency=10, prefetch=200) as consumer, producer_to(consumer) as producer:
        receipts = await asyncio.gather(*(producer.send(n) for n in range(200)))
    assert [receipt.json() for receipt in receipts] == list(range(200))


async def test_the_seeds_sample_send_works() -> None:
    async with serving(echo, "test", method="GET") as consumer:
        producer = PRODUCERS["HTTPHandler"]("elsewhere")
        await producer.a_init()
        url = f"http://127.0.0.1:{consumer.address[1]}/test"
        receipt = await producer.send({"a": "1"}, method="GET", endpoint=url, header_tag="SSI")
        await producer.close()
    assert receipt.json() == {"a": "1"}  # type: ignore[attr-defined]
