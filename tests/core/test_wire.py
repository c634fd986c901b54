"""Metadata as text, and back."""

from __future__ import annotations

import json
from dataclasses import replace
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.message import ErrorDetails, Message
from streamtools.wire import decode_meta, encode_meta, from_rfc3339, read_key, to_rfc3339, write_key
from tests.core import strategies


def near(one: Message, two: Message) -> bool:
    """The same, with times to the microsecond."""

    def plain(value: Any) -> Any:
        if isinstance(value, float):
            return pytest.approx(value, abs=2e-6)
        return value

    for field in Message.__slots__:
        if field != "error" and plain(getattr(one, field)) != getattr(two, field):
            return False
    if one.error is None or two.error is None:
        return one.error is two.error
    return all(plain(getattr(one.error, f)) == getattr(two.error, f) for f in ErrorDetails.__slots__)


@given(strategies.messages, st.sampled_from(["", "ce-", "ce_", "streamtools-"]))
def test_what_is_written_is_read_back(message: Message, prefix: str) -> None:
    meta = encode_meta(message, prefix=prefix)
    assert all(isinstance(v, str) and n.startswith(prefix) for n, v in meta.items())
    back = Message(
        body=message.body, queue=message.queue, headers=message.headers, **decode_meta(meta, prefix=prefix)
    )
    assert near(message, back)


@given(strategies.messages)
def test_what_the_protocol_carries_itself_is_left_out(message: Message) -> None:
    skipped = frozenset({"id", "content_type", "time"})
    meta = encode_meta(message, skip=skipped)
    assert not {"id", "datacontenttype", "time"} & set(meta)


@given(st.dictionaries(st.sampled_from(list(encode_meta(Message(
    body=b"", queue="q", id="1", type="t", source="s", time=1, content_type="c", content_encoding="e",
    correlation_id="c", causation_id="c", reply_to="r", intent="i", key="k", attempt=2, deliver_at=1, expires_at=1,
    error=ErrorDetails(queue="q", handler="h", exception="e", reason="r", traceback="t"),
)))), st.text()))  # fmt: skip
def test_what_is_malformed_is_left_out_and_nothing_raises(meta: dict[str, str]) -> None:
    fields = decode_meta(meta)
    assert fields.get("attempt", 1) >= 1
    Message(**{"body": b"", "queue": "q", "id": "1", **fields})


@given(strategies.times)
def test_times_are_rfc_3339_in_utc(moment: float) -> None:
    text = to_rfc3339(moment)
    assert text.endswith("Z")
    assert from_rfc3339(text) == pytest.approx(moment, abs=2e-6)


@pytest.mark.parametrize(
    ("text", "expected"),
    [("1970-01-01T00:00:10Z", 10), ("1970-01-01T01:00:10+01:00", 10), ("1970-01-01T00:00:10", 10), ("10.5", 10.5)]
    + [("", None), ("soon", None), ("\u0661", 1.0)],
)
def test_foreign_times_are_read_where_they_are_times(text: str, expected: float | None) -> None:
    assert from_rfc3339(text) == expected


@pytest.mark.parametrize("text", ["-1", "0", "1_0", "1" * 5000, "\u0663", "x", ""])
def test_an_attempt_that_is_no_count_is_the_first(text: str) -> None:
    assert decode_meta({"attempt": text}).get("attempt", 1) == 1


def test_unset_fields_cost_nothing() -> None:
    message = Message(body=b"", queue="q", id="1")
    assert encode_meta(message) == {"id": "1"}
    assert set(encode_meta(replace(message, attempt=2))) == {"id", "attempt"}


#: Times as other programs write them, which RFC 3339 cannot name again.
NO_TIMES = ["nan", "inf", "-inf", "Infinity", "1e400", "1700000000000", "1700000000000000", "-62135596801", "1e18"]


@pytest.mark.parametrize("text", [*NO_TIMES, "9999-12-31T23:59:59.9999999Z", "0001-01-01T00:00:00+14:00", "9" * 400])
def test_a_time_that_could_not_be_written_again_is_left_out(text: str) -> None:
    assert from_rfc3339(text) is None
    assert not {"time", "expires_at", "deliver_at"} & set(
        decode_meta({"time": text, "expirytime": text, "deliverytime": text})
    )


@given(st.text() | st.floats().map(str) | st.integers().map(str) | st.datetimes().map(lambda d: d.isoformat() + "9Z"))
def test_whatever_is_read_can_be_written_again(text: str) -> None:
    meta = dict.fromkeys(("time", "deliverytime", "expirytime", "errorfirst", "errorlast", "attempt", "key"), text)
    fields = decode_meta({**meta, "errorqueue": "q", "partitionkeybytes": text, "partitionkey": text, "id": text})
    message = Message(**{"body": b"", "queue": "q", "id": "1", **fields})
    again = Message(**{"body": b"", "queue": "q", "id": "1", **decode_meta(encode_meta(message))})
    assert near(message, again)
    json.dumps(encode_meta(message), ensure_ascii=False).encode()


def test_an_error_without_a_queue_is_read_again() -> None:
    message = Message(body=b"", queue="q", id="1", error=ErrorDetails(queue="", reason="r"))
    assert decode_meta(encode_meta(message))["error"] == message.error


@given(st.binary())
def test_a_key_of_any_bytes_is_the_same_bytes_again(raw: bytes) -> None:
    key = read_key(raw)
    assert write_key(key) == raw
    assert isinstance(key, str) or not key.isascii() or any(byte < 32 or byte == 127 for byte in key)
    message = Message(body=b"", queue="q", id="1", key=key)
    assert decode_meta(encode_meta(message)).get("key") == key


def test_a_lone_surrogate_is_mended_on_reading() -> None:
    assert decode_meta({"source": "a\udcff"})["source"] == r"a\udcff"


def test_the_attempt_after_the_greatest_is_still_a_count() -> None:
    found = decode_meta({"attempt": "999999999"})["attempt"]
    message = Message(body=b"", queue="q", id="1", attempt=found + 1)
    assert decode_meta(encode_meta(message))["attempt"] == found
