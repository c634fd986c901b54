"""Structured CloudEvents: the handler gets what is in the envelope, the error queue the envelope."""

from __future__ import annotations

import gzip
import json
from base64 import b64encode
from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from streamtools import Bus, Command, ConsumerFactory, ConsumerRunner, Producer, Retry
from streamtools.admin import ADMINS
from streamtools.delivery import Delivery
from streamtools.engine.dispatch import Dispatcher
from streamtools.engine.messages.envelope import unwrapped
from streamtools.errors import DecodeError
from streamtools.features import Features
from streamtools.message import Message
from streamtools.testing import eventually
from streamtools.verdicts import VerdictKind
from tests.core import strategies

KIND = "application/cloudevents+json"


def carrier(event: Any, content_type: str = KIND, **changes: Any) -> Message:
    body = event if isinstance(event, bytes) else json.dumps(event).encode()
    return Message(**{"body": body, "queue": "orders", "id": "place-7", "content_type": content_type, **changes})


def event(**attributes: Any) -> dict[str, Any]:
    return {"specversion": "1.0", "id": "e-1", "source": "/shop", "type": "orders.Placed", **attributes}


def test_the_attributes_become_the_messages_own_and_the_data_its_body() -> None:
    found = unwrapped(
        carrier(
            event(
                time="2026-01-02T03:04:05Z", data={"id": 1}, partitionkey="k", subject="s/1", traceparent="00-1", n=5,
                flag=True,
            ),
            f"{KIND}; charset=utf-8", headers={"own": "x"}, attempt=3,
        )
    )  # fmt: skip
    assert (found.id, found.type, found.source, found.time) == ("e-1", "orders.Placed", "/shop", 1767323045)
    assert (found.body, found.content_type, found.key) == (b'{"id":1}', "application/json", "k")
    extra = {"ce-subject": "s/1", "ce-traceparent": "00-1", "ce-n": "5", "ce-flag": "true"}
    assert dict(found.headers) == {"own": "x", **extra}
    assert (found.attempt, found.queue) == (3, "orders")


@pytest.mark.parametrize(
    ("data", "body", "content_type"),
    [
        ({"data": "text", "datacontenttype": "text/plain"}, b"text", "text/plain; charset=utf-8"),
        ({"data": "ü", "datacontenttype": "text/xml; charset=latin-1"}, "ü".encode(), "text/xml; charset=utf-8"),
        ({"data": "text"}, b'"text"', "application/json"),
        ({"data": "text", "datacontenttype": "application/json"}, b'"text"', "application/json"),
        ({"data": None}, b"null", "application/json"), ({}, None, None),
        ({"data": [1], "datacontenttype": "a/x+json"}, b"[1]", "a/x+json"),
        ({"data_base64": b64encode(b"\xff\x00").decode()}, b"\xff\x00", "application/octet-stream"),
        ({"data_base64": "", "datacontenttype": "image/png"}, b"", "image/png"),
        ({"data": 10**30}, b"1" + b"0" * 30, "application/json"),
    ],
)  # fmt: skip
def test_data_of_each_kind_is_the_body(data: dict[str, Any], body: bytes | None, content_type: str | None) -> None:
    found = unwrapped(carrier(event(**data)))
    assert (found.body, found.content_type, found.content_encoding) == (body, content_type, None)


def test_how_often_it_was_run_and_why_it_failed_is_not_the_senders_to_say() -> None:
    forged = {"attempt": 9, "errorqueue": "other", "errormessage": "x", "handler": "h"}
    found = unwrapped(carrier(event(**forged, deliverytime="9999-01-01T00:00:00Z")))
    assert (found.attempt, found.error, found.deliver_at, found.handler) == (1, None, None, None)


@pytest.mark.parametrize("body", [b"", b"x", b"[]", b"{}", b"5", b"[" * 9999, b'{"specversion": 1}', b"\xff"])
def test_what_is_no_event_is_refused(body: bytes) -> None:
    with pytest.raises(DecodeError):
        unwrapped(carrier(body))


def test_a_compressed_envelope_is_undone() -> None:
    found = unwrapped(carrier(gzip.compress(json.dumps(event(data=1)).encode()), content_encoding="gzip"))
    assert (found.body, found.content_encoding) == (b"1", None)


@pytest.mark.parametrize(
    ("parameters", "written"),
    [
        ("", lambda text: b"\xef\xbb\xbf" + text.encode()),
        ("; charset=utf-16", lambda text: text.encode("utf-16")),
        ("; charset=iso-8859-1", lambda text: text.encode("latin-1")),
        ("; charset=UTF-8", str.encode),
    ],
)
def test_an_envelope_may_begin_with_a_byte_order_mark_or_be_of_another_charset(
    parameters: str, written: Callable[[str], bytes]
) -> None:
    text = json.dumps(event(data="ä", subject="ü"), ensure_ascii=False)
    found = unwrapped(carrier(written(text), KIND + parameters))
    assert (found.id, found.body, found.headers["ce-subject"]) == ("e-1", '"ä"'.encode(), "ü")


@pytest.mark.parametrize("data", [5, True, [], {}, "A!!", "A", "AAE\n", "\u00e4"])
def test_data_that_is_called_base64_and_is_none_is_refused(data: Any) -> None:
    with pytest.raises(DecodeError, match="data_base64 is not base64"):
        unwrapped(carrier(event(data_base64=data)))


@example({"id": ""})
@given(st.dictionaries(st.sampled_from(["id", "time", "source", "data", "data_base64", "datacontenttype", "key"])
                       | strategies.text, strategies.json))  # fmt: skip
def test_any_envelope_is_read_or_refused(attributes: dict[str, Any]) -> None:
    try:
        found = unwrapped(carrier({"specversion": "1.0", **attributes}))
    except DecodeError:
        return
    assert found.id and isinstance(found.id, str)


# --- on its way -----------------------------------------------------------------------------------


async def test_a_handler_gets_the_event_and_the_error_queue_the_envelope() -> None:
    seen: list[Message] = []

    async def handler(message: Message) -> None:
        seen.append(message)
        raise ValueError("never")

    dispatcher = Dispatcher(
        handler, "handler", retry=Retry(retries=0), error_queue="error", max_deliveries=5, in_place=False,
        features=Features(),
    )  # fmt: skip
    message = carrier(event(data=1))
    settlement = await dispatcher(Delivery(message))
    assert (seen[0].id, seen[0].body) == ("e-1", b"1")
    [copy] = settlement.outgoing
    assert (copy.body, copy.content_type, copy.id) == (message.body, KIND, "place-7")


async def test_an_event_that_has_expired_is_dropped_and_one_that_is_none_is_rejected() -> None:
    async def handler(message: Message) -> None:
        raise AssertionError("it is not to be run")

    dispatcher = Dispatcher(
        handler, "handler", retry=Retry(retries=0), error_queue="error", max_deliveries=5, in_place=False,
        features=Features(),
    )  # fmt: skip
    stale = await dispatcher(Delivery(carrier(event(data=1, expirytime="2001-01-01T00:00:00Z"))))
    assert stale.verdict.kind is VerdictKind.DROP
    broken = await dispatcher(Delivery(carrier(b"{")))
    assert broken.verdict.kind is VerdictKind.REJECT and broken.outgoing[0].body == b"{"


class Placed(Command, name="orders.Placed"):
    id: int


async def test_a_bus_finds_the_handler_by_the_type_in_the_envelope() -> None:
    url, seen = "asyncio://structured-events", list[object]()
    bus = Bus("orders", url=url, retry=Retry(retries=0))

    @bus.handler
    async def place(command: Placed) -> None:
        seen.append(command)

    async with ConsumerRunner(bus), Producer("orders", url=url) as producer:
        await producer.send_messages([carrier(event(data={"id": 7})), carrier(event(type="other", data=1), id="2")])
        await eventually(lambda: seen == [Placed(id=7)])
        async with ADMINS["asyncio"](url=url) as admin:
            [rejected] = await eventually_failed(admin, "error")
    assert rejected.id == "2" and rejected.error is not None and "no handler for 'other'" in rejected.error.reason


async def eventually_failed(admin: Any, queue: str) -> Any:
    async def there() -> bool:
        return bool(await admin.peek(queue))

    await eventually(there)
    return await admin.peek(queue)


async def test_a_route_gets_a_model_of_the_data() -> None:
    url, seen = "asyncio://structured-events-in-routes", list[object]()
    consumers = ConsumerFactory(url=url)

    @consumers.route("orders")
    async def place(msg: Placed, message: Message) -> None:
        seen.append((msg, message.id))

    async with ConsumerRunner(consumers), Producer("orders", url=url) as producer:
        await producer.send_messages([carrier(event(data={"id": 7}), content_type="Application/CloudEvents+JSON")])
        await eventually(lambda: seen == [(Placed(id=7), "e-1")])
