"""Payloads to bytes and back."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel
from typing_extensions import TypedDict

from streamtools import codec
from streamtools.errors import DecodeError
from streamtools.message import Message
from tests.core import strategies


class Order(BaseModel):
    id: int
    note: str = ""


@dataclass
class Payment:
    order: int


class Parcel(TypedDict):
    order: int


def message(body: bytes, content_type: str | None = None) -> Message:
    return Message(body=body, queue="orders", id="1", content_type=content_type)


def sent(payload: object) -> Message:
    return message(*codec.encode(payload))


@given(strategies.json | strategies.text | st.binary())
def test_what_is_sent_is_what_an_unannotated_handler_gets(payload: Any) -> None:
    assert codec.decode(sent(payload)) == payload


@given(st.binary())
def test_an_annotation_of_bytes_gets_the_body_untouched_whatever_its_content_type(body: bytes) -> None:
    for content_type in (None, codec.JSON, codec.TEXT, "x/y"):
        assert codec.decoder(bytes)(message(body, content_type)) == body


@given(
    st.binary(),
    st.none()
    | st.sampled_from(
        [codec.JSON, codec.TEXT, "text/plain; charset=nonsense", "text/a; charset=undefined", "a/b", ";"]
    ),
)
def test_whatever_arrives_is_decoded_or_is_a_decode_error(body: bytes, content_type: str | None) -> None:
    for annotation in (Any, Order, int, str, list[int], Payment, Parcel):
        try:
            codec.decoder(annotation)(message(body, content_type))
        except DecodeError as error:
            assert str(error)


@given(st.integers(), strategies.text)
def test_models_dataclasses_and_typed_dicts_come_back_as_themselves(number: int, note: str) -> None:
    assert codec.decoder(Order)(sent(Order(id=number, note=note))) == Order(id=number, note=note)
    assert codec.decoder(Payment)(sent(Payment(number))) == Payment(number)
    assert codec.decoder(Parcel)(sent({"order": number})) == {"order": number}


@pytest.mark.parametrize("value", [math.inf, -math.inf])
def test_infinity_comes_back_to_a_handler_that_wants_a_float(value: float) -> None:
    assert codec.decoder(float)(sent({"x": value}["x"])) == value


def test_not_a_number_comes_back_to_a_handler_that_wants_a_float() -> None:
    assert math.isnan(codec.decoder(float)(sent(math.nan)))


@pytest.mark.parametrize(
    ("payload", "content_type"),
    [("ü", codec.TEXT), (b"\xff", codec.BINARY), (bytearray(b"x"), codec.BINARY), (memoryview(b"x"), codec.BINARY)]
    + [(payload, codec.JSON) for payload in (None, 1, [1], {"a": 1}, Order(id=1), Payment(1), True)],
)
def test_the_content_type_tells_what_was_sent(payload: object, content_type: str) -> None:
    assert codec.encode(payload)[1] == content_type


@pytest.mark.parametrize(
    "payload", [object(), lambda: 1, {"a": object()}, [object()], {object(): 1}, "\ud800", ["\ud800"]]
)
def test_a_payload_without_a_form_is_an_error_that_names_its_type(payload: object) -> None:
    with pytest.raises((TypeError, UnicodeEncodeError)):
        codec.encode(payload)


@pytest.mark.parametrize(
    ("body", "content_type", "expected"),
    [
        (b"5", None, 5), (b"no json", None, b"no json"), (b"", None, b""), (b"\xff", None, b"\xff"),
        (b'{"a":1}', "application/ssi-agent-wire", {"a": 1}), (b"\x00", "application/ssi-agent-wire", b"\x00"),
        (b"[1]", "application/cloudevents+json; charset=utf-8", [1]), (b"[1]", "Application/JSON", [1]),
        (b"5", "text/plain", "5"), ("ü".encode("latin-1"), 'text/plain; charset="latin-1"', "ü"),
        (b"5", "application/octet-stream", b"5"), (b"5", "image/png", b"5"),
    ],
)  # fmt: skip
def test_a_foreign_body_is_read_by_its_content_type(body: bytes, content_type: str | None, expected: object) -> None:
    got = codec.decode(message(body, content_type))
    assert (got, type(got)) == (expected, type(expected))


def test_text_is_validated_as_text_first_and_as_json_then() -> None:
    assert codec.decoder(str)(message(b"5", codec.TEXT)) == "5"
    assert codec.decoder(int)(message(b"5", codec.TEXT)) == 5
    assert codec.decoder(Order)(message(b'{"id": 5}', codec.TEXT)) == Order(id=5)


@pytest.mark.parametrize("decode", [codec.decoder(Order), codec.decoder(int)])
def test_a_validation_error_names_what_is_wrong_and_not_the_value(decode: Callable[[Message], Any]) -> None:
    with pytest.raises(DecodeError) as caught:
        decode(message(b'{"id": "hunter2"}', codec.JSON))
    assert caught.value.errors and "hunter2" not in str(caught.value) and "hunter2" not in str(caught.value.errors)


def test_a_message_annotation_gets_the_envelope() -> None:
    envelope = message(b"x")
    assert codec.decoder(Message)(envelope) is envelope


# --- tombstones -----------------------------------------------------------------------------------

TOMBSTONE = Message(body=None, queue="orders", id="1", key="k")


@pytest.mark.parametrize("annotation", [Any, object, Order | None, dict[str, int] | None, None])
def test_a_tombstone_is_none_where_the_handler_allows_it(annotation: Any) -> None:
    assert codec.decoder(annotation)(TOMBSTONE) is None


@pytest.mark.parametrize("annotation", [bytes, str, Order, int, list[Order]])
def test_a_tombstone_is_named_where_the_handler_wants_a_body(annotation: Any) -> None:
    with pytest.raises(DecodeError, match=r"tombstone.* \| None"):
        codec.decoder(annotation)(TOMBSTONE)
