"""Every line of the table of answers, seen from a socket."""

from __future__ import annotations

import asyncio
import gzip
import json
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.http import HTTPConsumer
from streamtools.errors import Drop, Reject, RetryLater
from streamtools.message import Message
from streamtools.policy import Retry
from streamtools.settings import HTTPSettings
from streamtools.verdicts import ACK
from tests.drivers.http.conftest import QUICK, request, serving, talk


class Order(BaseModel):
    id: int
    items: list[str] = []


@dataclass
class Point:
    x: int


async def echo(msg: Any) -> Any:
    return msg


@pytest.mark.parametrize(
    ("value", "content_type", "body"),
    [
        ({"a": [1]}, "application/json", b'{"a":[1]}'),
        ("text é", "text/plain; charset=utf-8", "text é".encode()),
        (b"\x00\xff", "application/octet-stream", b"\x00\xff"),
        (Order(id=1), "application/json", b'{"id":1,"items":[]}'),
        (Point(2), "application/json", b'{"x":2}'),
        (False, "application/json", b"false"),
        ("", "text/plain; charset=utf-8", b""),
    ],
)
async def test_200_carries_the_handlers_value(value: Any, content_type: str, body: bytes) -> None:
    async def handler(msg: Any) -> Any:
        return value

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{}"))
    assert (reply.status, reply.headers["content-type"], reply.body) == (200, content_type, body)


async def test_202_when_the_handler_returns_nothing() -> None:
    async def handler(msg: Any) -> None: ...

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{}"))
    assert (reply.status, reply.body) == (202, b"")


async def test_202_for_a_message_that_the_handler_drops() -> None:
    async def handler(msg: Any) -> None:
        raise Drop

    async with serving(handler) as consumer:
        assert (await talk(consumer, request(body=b"{}"))).status == 202


async def test_202_for_a_message_that_has_expired_and_no_handler_sees_it() -> None:
    seen = []
    async with serving(seen.append) as consumer:
        reply = await talk(consumer, request(body=b"{}", ce_expirytime="2020-01-01T00:00:00Z"))
    assert (reply.status, seen) == (202, [])


async def test_202_at_once_when_acknowledged_on_receive(gate: Any) -> None:
    async with serving(gate, ack="on_receive") as consumer:
        reply = await talk(consumer, request(body=b"{}"))
        gate.open.set()
    assert reply.status == 202


@pytest.mark.parametrize("annotation", [Any, Order])
async def test_400_for_a_body_that_does_not_decode(annotation: Any) -> None:
    async def handler(msg: Any) -> None: ...

    handler.__annotations__["msg"] = annotation
    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{oops", Content_Type="application/json"))
    assert reply.status == 400
    assert "JSON" in reply.json()["error"]


async def test_400_for_text_that_is_not_in_its_charset() -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(body=b"\xff", Content_Type="text/plain"))
    assert reply.status == 400


async def test_404_for_a_path_that_no_consumer_has() -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(path="/nobody?x=1"))
    assert reply.status == 404
    assert "/nobody" in reply.json()["error"]


@pytest.mark.parametrize("method", ["GET", "PUT", "DELETE", "PROPFIND"])
async def test_405_for_another_method_names_those_allowed(method: str) -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(method))
    assert (reply.status, reply.headers["allow"]) == (405, "OPTIONS, POST")


async def test_options_and_head_are_answered_without_a_handler() -> None:
    async with serving(echo) as consumer:
        options = await talk(consumer, request("OPTIONS"))
        reader_status = await _status(consumer.address, request("HEAD"))
    assert (options.status, options.headers["allow"]) == (204, "OPTIONS, POST")
    assert reader_status == 405


async def _status(address: tuple[str, int], data: bytes) -> int:
    reader, writer = await asyncio.open_connection(*address)
    writer.write(data)
    everything = await reader.read()
    writer.close()
    assert everything.endswith(b"\r\n\r\n")  # a HEAD has no body
    return int(everything.split()[1])


async def test_413_for_a_body_over_the_limit_of_1_mib() -> None:
    async with serving(echo) as consumer:
        fits = await talk(consumer, request(body=b"x" * 1024 * 1024, Content_Type="application/octet-stream"))
        over = await talk(consumer, request(body=b"x" * (1024 * 1024 + 1)))
    assert (fits.status, over.status) == (200, 413)


async def test_413_follows_max_body_for_chunked_bodies_too() -> None:
    head = b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\n\r\n"
    chunked = head + b"6\r\n123456\r\n6\r\n123456\r\n0\r\n\r\n"
    async with serving(echo, max_body=10) as consumer:
        assert (await talk(consumer, request(body=b"x" * 11))).status == 413
        assert (await talk(consumer, chunked)).status == 413


async def test_413_for_a_small_body_that_is_large_when_decompressed() -> None:
    body = gzip.compress(b"x" * 100_000)
    async with serving(echo, max_body=10_000) as consumer:
        reply = await talk(consumer, request(body=body, Content_Encoding="gzip"))
    assert reply.status == 413


async def test_422_lists_what_does_not_validate() -> None:
    async def handler(msg: Order) -> None: ...

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b'{"id": "x", "items": 5}'))
    assert reply.status == 422
    assert [tuple(problem["loc"]) for problem in reply.json()["errors"]] == [("id",), ("items",)]
    assert all(problem["msg"] for problem in reply.json()["errors"])


async def test_422_carries_the_reason_of_a_reject() -> None:
    async def handler(msg: Any) -> None:
        raise Reject("no such customer")

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{}", ce_id="7"))
    assert (reply.status, reply.json()) == (422, {"error": "no such customer", "id": "7"})


async def test_503_while_attempts_are_left_says_when_to_come_again_and_as_which_attempt() -> None:
    async def handler(msg: Any) -> None:
        raise RuntimeError("the password is hunter2")

    async with serving(handler, retry=Retry(retries=5, delay=2.2, jitter=0)) as consumer:
        reply = await talk(consumer, request(body=b"{}", ce_attempt="2"))
    assert (reply.status, reply.headers["retry-after"], reply.headers["ce-attempt"]) == (503, "5", "3")
    assert b"hunter2" not in reply.body
    assert b"Traceback" not in reply.body


async def test_503_waits_as_long_as_the_handler_asks() -> None:
    async def handler(msg: Any) -> None:
        raise RetryLater(61)

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{}"))
    assert (reply.status, reply.headers["retry-after"]) == (503, "61")


async def test_500_when_the_attempts_are_used_up_and_nothing_of_the_error_leaks() -> None:
    async def handler(msg: Any) -> None:
        raise RuntimeError("the password is hunter2")

    async with serving(handler, retry=QUICK) as consumer:
        reply = await talk(consumer, request(body=b"{}", ce_attempt="3"))
    assert (reply.status, reply.json()["attempts"]) == (500, 3)
    assert b"hunter2" not in reply.body
    assert b"Traceback" not in reply.body


async def test_500_for_a_value_that_has_no_form() -> None:
    async def handler(msg: Any) -> Any:
        return object()

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=b"{}"))
    assert (reply.status, reply.json()["error"]) == (500, "The message was handled, but its answer cannot be sent.")


async def test_verdicts_given_by_hand_answer_too() -> None:
    verdicts = iter(["ack", "reject", "retry", "drop", "release"])

    async def handler(msg: Any, delivery: Delivery) -> None:
        await getattr(delivery, next(verdicts))()

    async with serving(handler, ack="manual") as consumer:
        statuses = [(await talk(consumer, request(body=b"{}"))).status for _ in range(5)]
    assert statuses == [202, 422, 503, 202, 503]


async def test_pulled_deliveries_are_answered_when_settled() -> None:
    async with HTTPConsumer("orders", port=0) as consumer:
        asking = asyncio.create_task(talk(consumer, request(body=b"{}")))
        (delivery,) = await consumer.receive(timeout=5)
        await delivery.ack()
        await delivery.reject("too late")
        assert (await asking).status == 202


async def test_get_gives_the_query_or_the_body_if_there_is_one() -> None:
    async with serving(echo, method="get") as consumer:
        query = await talk(consumer, request("GET", "/orders?a=1&b=2&b=3&c=&d=%C3%BC+x"))
        nothing = await talk(consumer, request("GET"))
        body = await talk(consumer, request("GET", "/orders?a=1", b'{"from": "body"}'))
        wrong = await talk(consumer, request("GET", "/orders?a=%ff"))
    assert query.json() == {"a": "1", "b": ["2", "3"], "c": "", "d": "ü x"}
    assert nothing.json() == {}
    assert body.json() == {"from": "body"}
    assert wrong.status == 400


async def test_a_query_validates_into_a_model() -> None:
    async def handler(msg: Order) -> Any:
        return msg

    async with serving(handler, method="GET") as consumer:
        reply = await talk(consumer, request("GET", "/orders?id=5&items=a&items=b"))
    assert reply.json() == {"id": 5, "items": ["a", "b"]}


async def test_a_webhook_sees_its_own_headers_and_only_those() -> None:
    async def handler(msg: Message) -> Any:
        return {"headers": dict(msg.headers), "type": msg.content_type, "id": bool(msg.id), "queue": msg.queue}

    async with serving(handler, "git/hub") as consumer:
        reply = await talk(
            consumer,
            request(
                path="/git/hub", body=b"{}", X_GitHub_Event="push", Authorization="Bearer t", User_Agent="GitHub",
                Accept="*/*", ce_subject="unknown to us", Content_Type="application/json",
            ),
        )  # fmt: skip
    headers = {"X-GitHub-Event": "push", "Authorization": "Bearer t", "ce-subject": "unknown to us"}
    assert reply.json() == {"headers": headers, "type": "application/json", "id": True, "queue": "git/hub"}


@pytest.mark.parametrize(
    ("content_type", "body", "expected"),
    [
        (None, b'{"a": 1}', {"a": 1}),
        ("application/x-www-form-urlencoded", b'{"a": 1}', {"a": 1}),
        ("application/ssi-agent-wire", b'{"a": 1}', {"a": 1}),
        ("application/ssi-agent-wire", b"\x01\x02", b"\x01\x02"),
        ("text/plain", b"5", "5"),
        (None, b"plain", b"plain"),
        (None, b"", b""),
    ],
)
async def test_a_plain_post_of_any_client_works(content_type: str | None, body: bytes, expected: Any) -> None:
    seen = []

    async def handler(msg: Any) -> None:
        seen.append(msg)

    headers = {} if content_type is None else {"Content_Type": content_type}
    async with serving(handler) as consumer:
        assert (await talk(consumer, request(body=body, **headers))).status == 202
    assert seen == [expected]


async def test_a_compressed_body_arrives_decompressed() -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(body=gzip.compress(b'{"a": 1}'), Content_Encoding="gzip"))
    assert json.loads(reply.body) == {"a": 1}


async def test_what_a_settlement_sends_is_handled_before_the_settled_request_is_answered() -> None:
    async with HTTPConsumer("first", port=0) as first, HTTPConsumer("second", port=0) as second:
        first.settings = HTTPSettings(port=first.address[1])
        asking = asyncio.create_task(talk(first, request(path="/first", body=b"{}")))
        (delivery,) = await first.receive(timeout=5)
        onward = Message(body=b"1", queue="second", id="onward")
        settling = asyncio.create_task(first._settle([Settlement(delivery, ACK, (onward,))]))
        (copy,) = await second.receive(timeout=5)
        assert not asking.done()
        await copy.ack()
        await settling
        assert ((await asking).status, copy.message.id) == (202, "onward")


async def test_head_is_answered_as_get_is_without_the_body() -> None:
    async with serving(echo, method="GET") as consumer:
        got = await talk(consumer, request("GET", "/orders?a=1"))
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(request("HEAD", "/orders?a=1"))
        head, rest = (await reader.read()).split(b"\r\n\r\n")
        writer.close()
    assert head.startswith(b"HTTP/1.1 200") and rest == b""
    assert b"Content-Length: %d\r\n" % len(got.body) in head + b"\r\n"


async def test_head_is_a_wrong_method_where_get_is() -> None:
    async with serving(echo) as consumer:
        reader, writer = await asyncio.open_connection(*consumer.address)
        writer.write(request("HEAD"))
        assert (await reader.read()).startswith(b"HTTP/1.1 405")
        writer.close()
