"""Bodies as other programs send them: plain text, encodings, charsets, envelopes."""

from __future__ import annotations

import gzip
import json
import math
import time
import zlib
from dataclasses import dataclass
from decimal import Decimal
from typing import Annotated, Any
from uuid import UUID

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import BaseModel, Field, SecretBytes, SecretStr, StringConstraints, field_serializer

from streamtools import codec
from streamtools.errors import DecodeError
from streamtools.message import Message
from streamtools.validation import bodies


class Order(BaseModel):
    id: int
    note: str = ""


def message(body: bytes | None, content_type: str | None = None, content_encoding: str | None = None) -> Message:
    return Message(body=body, queue="orders", id="1", content_type=content_type, content_encoding=content_encoding)


def raw_deflate(body: bytes) -> bytes:
    stream = zlib.compressobj(wbits=-15)
    return stream.compress(body) + stream.flush()


# --- plain text -----------------------------------------------------------------------------------

SHORT = Annotated[str, StringConstraints(max_length=5)]


@pytest.mark.parametrize("annotation", [str, str | None, Annotated[str, Field(min_length=1)], SHORT, Order | str])
@pytest.mark.parametrize("content_type", [None, "", "application/octet-stream", "application/x-www-form-urlencoded"])
@pytest.mark.parametrize("text", ["hello", "5", "[1]", "{", "ü€", "true", "nan", "\ufeff"])
def test_str_takes_plain_text_that_does_not_say_what_it_is(annotation: Any, content_type: str, text: str) -> None:
    assert codec.decoder(annotation)(message(text.encode(), content_type)) == text


def test_str_takes_a_json_string_without_its_quotes() -> None:
    assert codec.decoder(str)(message(b'"hello"')) == "hello"
    assert codec.decoder(str | None)(message(b"null")) is None


@pytest.mark.parametrize("body", [b"\xff", b"\xc3("])
def test_str_refuses_what_is_no_text(body: bytes) -> None:
    with pytest.raises(DecodeError):
        codec.decoder(str)(message(body))


def test_a_constraint_holds_for_plain_text_too() -> None:
    with pytest.raises(DecodeError):
        codec.decoder(SHORT)(message(b"too long by far"))


def test_what_says_json_and_is_none_is_refused_for_str_as_well() -> None:
    with pytest.raises(DecodeError, match="Invalid JSON"):
        codec.decoder(str)(message(b"hello", codec.JSON))


@pytest.mark.parametrize(
    ("annotation", "body", "value"),
    [
        (Decimal, b"1.50", Decimal("1.50")), (UUID, b"12345678-1234-5678-1234-567812345678", UUID(int=0) and None),
        (int, b"5", 5), (float, b"nan", None),
    ],
)  # fmt: skip
def test_plain_text_is_read_as_what_can_be_made_of_it(annotation: Any, body: bytes, value: Any) -> None:
    got = codec.decoder(annotation)(message(body))
    assert isinstance(got, annotation) and (value is None or got == value)


FEW = Annotated[bytes, Field(max_length=9)]


@pytest.mark.parametrize("annotation", [bytes | None, FEW, FEW | None, Annotated[bytes | None, "words"]])
def test_bytes_in_a_union_or_annotated_get_the_body_untouched(annotation: Any) -> None:
    assert codec.decoder(annotation)(message(b"\xff[1]", codec.JSON)) == b"\xff[1]"


def test_a_json_body_may_begin_with_a_byte_order_mark_or_be_of_another_charset() -> None:
    decode = codec.decoder(Order)
    assert decode(message(b'\xef\xbb\xbf{"id": 1}', "application/json; charset=utf-8")) == Order(id=1)
    assert decode(message('{"id": 1, "note": "ü"}'.encode("utf-16"), "application/json; charset=utf-16")).note == "ü"


@pytest.mark.parametrize("content_type", [codec.JSON, None, "application/vnd.order+json", "application/octet-stream"])
def test_a_byte_order_mark_before_json_is_no_part_of_it(content_type: str | None) -> None:
    marked = message(b'\xef\xbb\xbf{"id": 1}', content_type)
    assert codec.decoder(Order)(marked) == Order(id=1)
    assert content_type == "application/octet-stream" or codec.decode(marked) == {"id": 1}


def test_a_body_with_a_byte_order_mark_that_is_wrong_says_what_is_wrong_with_it() -> None:
    with pytest.raises(DecodeError, match="id: Field required"):
        codec.decoder(Order)(message(b"\xef\xbb\xbf{}", codec.JSON))


@pytest.mark.parametrize(
    ("body", "content_type", "words"),
    [
        (b"<order/>", "application/xml", "Its content type is 'application/xml'.*register_codec"),
        (b"\x82\xa2id\x01", "application/msgpack", "Its content type is 'application/msgpack'"),
        ('{"id": 1}'.encode("utf-16"), codec.JSON, "looks like UTF-16"),
        ('{"id": 1}'.encode("utf-16-le"), None, "looks like UTF-16"),
        ('{"id": 1}'.encode("utf-32"), codec.JSON, "looks like UTF-16"),
    ],
)
def test_what_a_body_is_instead_of_json_is_said(body: bytes, content_type: str | None, words: str) -> None:
    with pytest.raises(DecodeError, match=words):
        codec.decoder(Order)(message(body, content_type))


# --- content encodings ----------------------------------------------------------------------------

ENCODERS = {
    "gzip": gzip.compress, "x-gzip": gzip.compress, "GZIP": gzip.compress, "deflate": zlib.compress,
    " deflate ": raw_deflate, "identity": bytes, "utf-8": bytes, "binary": bytes, "": bytes,
    "deflate, gzip": lambda body: gzip.compress(zlib.compress(body)),
    "identity,gzip": lambda body: gzip.compress(body[:3]) + gzip.compress(body[3:]),
}  # fmt: skip


@pytest.mark.parametrize("encoding", ENCODERS)
@pytest.mark.parametrize("content_type", [None, codec.JSON, "application/vnd.order+json"])
def test_a_compressed_body_is_undone(encoding: str, content_type: str | None) -> None:
    found = message(ENCODERS[encoding](b'{"id": 5}'), content_type, encoding)
    assert codec.decoder(Order)(found) == Order(id=5)
    assert codec.decode(found) == {"id": 5}
    assert codec.decoder(str)(message(ENCODERS[encoding](b"text"), "text/plain", encoding)) == "text"
    assert codec.decoder(bytes)(found) == found.body


@pytest.mark.parametrize("encoding", ["br", "zstd", "snappy", "aes128", "\x1b[31m", "punycode", "gzip, br"])
@pytest.mark.parametrize("annotation", [Order, str, Any, int, dict[str, int]])
def test_an_encoding_that_is_not_undone_is_named(encoding: str, annotation: Any) -> None:
    with pytest.raises(DecodeError, match="content_encoding") as caught:
        codec.decoder(annotation)(message(b'{"id": 5}', codec.JSON, encoding))
    assert repr(encoding.rpartition(" ")[2]) in str(caught.value)


@pytest.mark.parametrize("encoding", ["gzip", "deflate"])
@pytest.mark.parametrize(
    "body", [b"", b"no such", gzip.compress(b"x" * 99, mtime=0)[:-9], zlib.compress(b"x" * 99)[:-5]]
)
def test_a_body_that_is_not_compressed_as_it_says_or_cut_short_is_refused(encoding: str, body: bytes) -> None:
    with pytest.raises(DecodeError, match=r"content encoding is|cut short"):
        codec.decode(message(body, codec.TEXT, encoding))


def test_a_body_of_a_few_bytes_that_would_fill_the_memory_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(bodies.LIMITS, "inflated", 2**20)
    bomb = gzip.compress(b"\0" * (2**20 + 1))
    with pytest.raises(DecodeError, match="over 1,048,576 bytes"):
        codec.decode(message(bomb, codec.BINARY, "gzip"))
    half = gzip.compress(b"\0" * (2**19 + 1))
    with pytest.raises(DecodeError, match="over 1,048,576 bytes"):
        codec.decode(message(half + half, codec.BINARY, "gzip"))
    assert len(codec.decode(message(gzip.compress(b"\0" * 2**20), codec.BINARY, "gzip"))) == 2**20


def test_a_body_that_is_encoded_many_times_over_is_refused() -> None:
    with pytest.raises(DecodeError, match="4 content encodings"):
        codec.decode(message(b"x", codec.TEXT, "gzip,gzip,gzip,gzip"))


# --- charsets -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "charset",
    [
        "utf-8",
        "UTF8",
        "us-ascii",
        "latin-1",
        "ISO-8859-15",
        "iso8859-1",
        "windows-1252",
        "cp1250",
        "utf-16",
        "utf_16_le",
    ]
    + ["utf-32", "utf-8-sig", "shift_jis", "gb18030", "koi8-r"],
)
def test_known_charsets_are_read(charset: str) -> None:
    assert codec.decoder(str)(message("plain".encode(charset), f'text/plain; charset="{charset}"')) == "plain"


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "undefined", "rot13", "zip", "unicode_escape", "utf-7", "\0", "x"]
)
def test_other_charsets_are_named_at_once(charset: str) -> None:
    begun = time.thread_time()
    with pytest.raises(DecodeError, match="charset"):
        codec.decoder(str)(message(b"-a" * 2**19, f"text/plain; charset={charset}"))
    assert time.thread_time() - begun < 1  # punycode takes 24 s for this


def test_an_encoding_that_is_a_charset_counts_where_the_content_type_names_none() -> None:
    assert codec.decode(message("ü".encode("latin-1"), "text/plain", "iso-8859-1")) == "ü"


# --- many problems --------------------------------------------------------------------------------


@pytest.mark.parametrize("count", [30, 100_000])
def test_of_very_many_problems_the_first_are_told(count: int) -> None:
    with pytest.raises(DecodeError) as caught:
        codec.decoder(list[Order])(message(b"[" + b",".join([b"{}"] * count) + b"]", codec.JSON))
    assert 1 <= len(caught.value.errors) <= codec.PROBLEMS and caught.value.errors[0]["loc"] == (0, "id")
    assert "0.id: Field required" in str(caught.value) and "more problems" in str(caught.value)


def test_a_name_of_a_field_is_shortened_in_a_problem() -> None:
    body = json.dumps({"x" * 10_000: {}}).encode()
    with pytest.raises(DecodeError) as caught:
        codec.decoder(dict[str, Order])(message(body, codec.JSON))
    assert len(str(caught.value)) < 500 and len(str(caught.value.errors)) < 1000


@given(st.sampled_from([b"[", b'{"a":']), st.integers(1000, 100_000))
def test_a_body_that_is_nested_deeply_is_refused(part: bytes, depth: int) -> None:
    for annotation in (Any, str, Order, list[Any]):
        with pytest.raises(DecodeError):
            codec.decoder(annotation)(message(part * depth, codec.JSON))


# --- what is sent ---------------------------------------------------------------------------------


class Reading(BaseModel):
    value: float
    other: float | None = None
    inner: list[Any] = []


@pytest.mark.parametrize("value", [math.nan, math.inf, -math.inf])
def test_no_number_is_lost_in_a_model(value: float) -> None:
    for payload in (Reading(value=value), Reading(value=1, inner=[{"a": [Reading(value=value)]}])):
        back = codec.decoder(Reading)(message(*codec.encode(payload)))
        assert repr(back.value) == repr(payload.value)
        assert "null" not in codec.encode([payload])[0].decode().replace('"other":null', "")


class Login(BaseModel):
    user: str
    password: SecretStr


@dataclass(slots=True)
class Held:
    secret: SecretBytes


class Open(BaseModel):
    password: SecretStr

    @field_serializer("password")
    def shown(self, value: SecretStr) -> str:
        return value.get_secret_value()


@pytest.mark.parametrize(
    "payload",
    [Login(user="a", password=SecretStr("x")), [Login(user="a", password=SecretStr("x"))], SecretStr("x")]
    + [{"a": [Held(SecretBytes(b"x"))]}, {"a": (SecretStr("y"),)}],
)
def test_a_secret_is_never_sent_as_asterisks(payload: Any) -> None:
    with pytest.raises(TypeError, match="get_secret_value"):
        codec.encode(payload)


def test_a_secret_that_the_model_itself_writes_and_a_text_of_asterisks_are_sent() -> None:
    assert codec.encode(Open(password=SecretStr("pw")))[0] == b'{"password":"pw"}'
    assert codec.encode({"a": "*" * 12})[0] == b'{"a":"************"}'


# --- batches of CloudEvents -----------------------------------------------------------------------

EVENT = {"specversion": "1.0", "id": "e", "source": "/s", "type": "t"}


def test_a_batch_is_a_list_of_its_events_data() -> None:
    body = json.dumps([{**EVENT, "data": {"id": 1}}, {**EVENT, "data": {"id": 2}}]).encode()
    found = message(body, codec.BATCH)
    assert codec.decoder(list[Order])(found) == [Order(id=1), Order(id=2)]
    assert codec.decode(found) == [{"id": 1}, {"id": 2}]
    assert codec.decoder(bytes)(found) == body


@pytest.mark.parametrize("annotation", [Order, int, dict[str, int]])
def test_a_batch_for_a_handler_of_one_is_refused_with_the_reason(annotation: Any) -> None:
    body = json.dumps([{**EVENT, "data": {"id": 1}}]).encode()
    with pytest.raises(DecodeError, match=r"batch of CloudEvents: annotate list"):
        codec.decoder(annotation)(message(body, f"{codec.BATCH}; charset=utf-8"))


@pytest.mark.parametrize("body", [b"{}", b"[1]", b"x", b"", json.dumps([{**EVENT, "data_base64": "eA=="}]).encode()])
def test_a_batch_that_is_none_or_holds_bytes_is_refused(body: bytes) -> None:
    for annotation in (list[Order], Any):
        with pytest.raises(DecodeError):
            codec.decoder(annotation)(message(body, codec.BATCH))


@pytest.mark.parametrize("count", [1, 20_000])
def test_what_is_wrong_with_the_data_of_a_batch_is_said_and_no_list_advised_to_who_has_one(count: int) -> None:
    body = b"[%b]" % b",".join([json.dumps({**EVENT, "data": {}}).encode()] * count)
    with pytest.raises(DecodeError, match="0.id: Field required") as failure:
        codec.decoder(list[Order])(message(body, codec.BATCH))
    assert "annotate list" not in str(failure.value)


def test_json_in_a_text_of_another_charset_is_read_into_a_model() -> None:
    assert codec.decoder(Order)(message('{"id": 1}'.encode("utf-16"), "text/plain; charset=utf-16")) == Order(id=1)


def test_the_first_of_very_many_problems_are_told_of_a_compressed_body_too() -> None:
    body = gzip.compress(b"[" + b"{}," * 20_000 + b"{}]")
    with pytest.raises(DecodeError, match="0.id: Field required"):
        codec.decoder(list[Order])(message(body, codec.JSON, content_encoding="gzip"))
