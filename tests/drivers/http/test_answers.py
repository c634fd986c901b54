"""Every line of the table of answers, seen from a socket."""

from __future__ import annotations

import asyncio
import gzip
import json
import time
import zlib
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import pytest
from pydantic import BaseModel, Field

from streamtools.delivery import Delivery, Settlement
from streamtools.drivers.http import HTTPConsumer
from streamtools.errors import Drop, Reject, RetryLater
from streamtools.message import Message
from streamtools.retry import Retry
from streamtools.settings import HTTPSettings
from streamtools.verdicts import ACK
from tests.drivers.http.conftest import QUICK, producer_to, request, serving, talk


class Order(BaseModel):
    id: int
    items: list[str] = []


@dataclass
class Point:
    x: int


async def length(msg: bytes) -> int:
    return len(msg)


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


@dataclass
class Search:
    q: str
    tags: list[str]
    limit: int = 10
    exact: bool = False


class Alternatives(BaseModel):
    a: list[int] | None = None
    b: set[str] = set()
    c: tuple[str, ...] = ()
    d: Sequence[str] = ()
    e: list[int] | int | None = None
    f: frozenset[int] = Field(default=frozenset(), alias="of")
    g: str | list[str] | None = None


async def shown(msg: Search) -> Any:
    return [msg.q, msg.tags, msg.limit, msg.exact]


@pytest.mark.parametrize(
    ("query", "expected"),
    [
        ("q=a&tags=x", ["a", ["x"], 10, False]),
        ("q=a&tags=x&tags=y&limit=5&exact=true", ["a", ["x", "y"], 5, True]),
        ("q=%C3%BC&tags=&tags=%26&limit=+7", ["ü", ["", "&"], 7, False]),
        ("tags=1&q=1", ["1", ["1"], 10, False]),
    ],
)
async def test_a_query_and_a_form_are_read_as_the_handler_asks_for(query: str, expected: Any) -> None:
    async with serving(shown, method="GET") as get, serving(shown, "forms") as post:
        form = {"Content-Type": "application/x-www-form-urlencoded"}
        assert (await talk(get, request("GET", f"/orders?{query}"))).json() == expected
        assert (await talk(post, request("POST", "/forms", query.encode(), **form))).json() == expected


async def test_one_value_is_a_list_of_one_in_whatever_annotation_asks_for_one() -> None:
    async def dumped(msg: Alternatives) -> Any:
        return msg.model_dump(mode="json", exclude_unset=True)

    async with serving(dumped, method="GET") as consumer:
        reply = await talk(consumer, request("GET", "/orders?a=1&b=x&c=y&d=z&e=5&of=7&g=t"))
        assert reply.json() == {"a": [1], "b": ["x"], "c": ["y"], "d": ["z"], "e": 5, "f": [7], "g": "t"}
        assert (await talk(consumer, request("GET", "/orders?a=x"))).status == 422


async def test_what_does_not_fit_a_query_is_422_with_the_field() -> None:
    async with serving(shown, method="GET") as consumer:
        missing = await talk(consumer, request("GET", "/orders?tags=x"))
        twice = await talk(consumer, request("GET", "/orders?q=a&q=b&tags=x"))
    assert (missing.status, missing.json()["errors"][0]["loc"]) == (422, ["q"])
    assert (twice.status, twice.json()["errors"][0]["loc"]) == (422, ["q"])


@pytest.mark.parametrize("tags", [["x"], ["x", "y"], [], [""]])
async def test_a_list_from_our_own_producer_arrives_as_a_list(tags: list[str]) -> None:
    async with serving(shown, method="GET") as consumer, producer_to(consumer) as producer:
        assert (await producer.send({"q": "a", "tags": tags})).json() == ["a", tags, 10, False]


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        (b"a=1&b=2&b=3&c=&d=%C3%BC+x", {"a": "1", "b": ["2", "3"], "c": "", "d": "ü x"}),
        (b"name=John Smith&note=a=b", {"name": "John Smith", "note": "a=b"}),
        (b'{"a": 1}', {"a": 1}),
        (b"5", 5),
        (b"", {}),
    ],
)
async def test_a_form_is_a_mapping_and_json_that_is_called_one_is_json(body: bytes, expected: Any) -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(body=body, Content_Type="application/x-www-form-urlencoded"))
    assert (reply.status, reply.json()) == (200, expected)


@pytest.mark.parametrize("body", [b"plain text", b'<a href="x=1"/>', b"key: a=b\n", b"\xff=\xfe", b"a=%ff"])
async def test_a_body_that_is_called_a_form_and_is_none_stays_as_it_is(body: bytes) -> None:
    async with serving(echo) as consumer:
        reply = await talk(consumer, request(body=body, Content_Type="application/x-www-form-urlencoded"))
    assert (reply.status, reply.body) == (200, body)


async def test_a_multipart_body_is_for_bytes_and_for_others_an_error_that_says_so() -> None:
    async def size(msg: bytes) -> int:
        return len(msg)

    body = b'--b\r\nContent-Disposition: form-data; name="q"\r\n\r\na\r\n--b--\r\n'
    sent = request("POST", "/raw", body, Content_Type="multipart/form-data; boundary=b")
    async with serving(size, "raw") as raw:
        assert (await talk(raw, sent)).json() == len(body)
    async with serving(shown, "raw") as model:
        reply = await talk(model, sent)
    assert reply.status == 400
    assert "multipart/form-data, which is not parsed here" in reply.json()["error"]


ZIPPED = gzip.compress(b'{"a": ' + b"1" * 500 + b"}")


@pytest.mark.parametrize("encoding", ["gzip", "GZIP", "x-gzip", "deflate"])
@pytest.mark.parametrize("chunked", [False, True])
async def test_a_compressed_body_that_was_cut_short_is_400(encoding: str, chunked: bool) -> None:
    whole = zlib.compress(b'{"a": ' + b"1" * 500 + b"}") if encoding == "deflate" else ZIPPED
    async with serving(echo) as consumer:
        for end in (1, 4, 9, len(whole) // 2, len(whole)):
            body = whole[: len(whole) - end]
            sent = request(body=body, Content_Encoding=encoding)
            if chunked:
                pieces = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
                head = (
                    f"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: chunked\r\nContent-Encoding: {encoding}"
                )
                sent = head.encode() + b"\r\n\r\n" + pieces
            assert (await talk(consumer, sent)).status == 400, end
        assert (await talk(consumer, request(body=whole, Content_Encoding=encoding))).status == 200


async def test_a_compressed_body_is_undone_for_every_handler_up_to_the_limit() -> None:
    async def size(msg: bytes) -> int:
        return len(msg)

    async with serving(size, max_body=1000) as consumer:
        ok = await talk(consumer, request(body=gzip.compress(b"x" * 1000), Content_Encoding="gzip"))
        twice = gzip.compress(gzip.compress(b"x" * 1000))
        layers = await talk(consumer, request(body=twice, Content_Encoding="gzip, gzip"))
        large = await talk(consumer, request(body=gzip.compress(b"x" * 1001), Content_Encoding="gzip"))
        bomb = await talk(consumer, request(body=gzip.compress(b"x" * 500_000), Content_Encoding="gzip"))
        other = await talk(consumer, request(body=b"x" * 10, Content_Encoding="br"))
    assert [ok.json(), layers.json(), other.json()] == [1000, 1000, 10]
    assert [large.status, bomb.status] == [413, 413]


async def test_a_body_of_few_bytes_does_not_keep_the_event_loop() -> None:
    members = gzip.compress(gzip.compress(b"", mtime=0) * 50_000, mtime=0)
    async with serving(echo) as consumer:
        begun = time.thread_time()
        reply = await talk(consumer, request(body=members, Content_Encoding="gzip, gzip"))
        assert time.thread_time() - begun < 1.0
        trailing = await talk(consumer, request(body=ZIPPED + b"junk", Content_Encoding="gzip"))
    assert (len(members) < 5_000, reply.status, trailing.status) == (True, 413, 400)
    assert f"byte {len(ZIPPED)} of {len(ZIPPED) + 4}" in trailing.json()["error"]


@pytest.mark.parametrize(
    "coding",
    ["gzip, chunked", "GZIP,chunked", "identity, chunked", "x;a=b, chunked"],
)
async def test_a_transfer_encoding_that_is_not_undone_is_501(coding: str) -> None:
    body = gzip.compress(b"{}", mtime=0)
    head = f"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: {coding}\r\n\r\n"
    async with serving(length) as consumer:
        reply = await talk(consumer, head.encode() + b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body))
        plain = head.replace(coding, " Chunked").encode() + b"2\r\n{}\r\n0\r\n\r\n"
        assert (await talk(consumer, plain)).json() == 2
    assert (reply.status, "Content-Encoding" in reply.json()["error"]) == (501, True)


async def test_a_transfer_encoding_on_two_lines_is_refused() -> None:
    head = b"POST /orders HTTP/1.1\r\nHost: x\r\nTransfer-Encoding: gzip\r\nTransfer-Encoding: chunked\r\n\r\n"
    async with serving(length) as consumer:
        reply = await talk(consumer, head + b"2\r\n{}\r\n0\r\n\r\n")
    assert reply.status == 400  # aiohttp's parser refuses it


async def test_an_encoding_that_is_not_undone_is_named() -> None:
    async with serving(shown) as consumer:
        reply = await talk(consumer, request(body=b"x", Content_Encoding="br"))
    assert (reply.status, "'br'" in reply.json()["error"]) == (400, True)


async def test_cloudevents_in_structured_mode_are_unwrapped() -> None:
    async def seen(msg: Message) -> Any:
        return [msg.id, msg.type, msg.source, msg.headers.get("ce-region"), json.loads(msg.body or b"")]

    event = {"specversion": "1.0", "id": "7", "type": "a.b", "source": "/s", "region": "eu", "data": {"q": 1}}
    sent = request(body=json.dumps(event).encode(), Content_Type="application/cloudevents+json; charset=utf-8")
    async with serving(seen) as consumer:
        assert (await talk(consumer, sent)).json() == ["7", "a.b", "/s", "eu", {"q": 1}]
    async with serving(echo) as consumer:
        assert (await talk(consumer, sent)).json() == {"q": 1}
        bad = await talk(consumer, request(body=b'{"a": 1}', Content_Type="application/cloudevents+json"))
        assert (bad.status, "not a CloudEvent" in bad.json()["error"]) == (400, True)


async def test_cloudevents_in_a_batch_are_a_list_of_their_data() -> None:
    batch = [{"specversion": "1.0", "id": str(n), "type": "t", "source": "s", "data": n} for n in range(3)]
    async with serving(echo) as consumer:
        sent = request(body=json.dumps(batch).encode(), Content_Type="application/cloudevents-batch+json")
        assert (await talk(consumer, sent)).json() == [0, 1, 2]
