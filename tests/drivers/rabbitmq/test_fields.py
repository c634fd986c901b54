"""Headers that other programs write: all AMQP field types, in any bytes, at any depth, each by itself."""

from __future__ import annotations

import json
import struct
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.amqp.fields import DEEPEST, TOO_DEEP
from streamtools.message import Message

HEADERS, MESSAGE_ID, TYPE = 1 << 13, 1 << 7, 1 << 5


def entry(name: bytes, value: bytes) -> bytes:
    return bytes((len(name),)) + name + value


def sized(letter: bytes, data: bytes) -> bytes:
    return letter + struct.pack(">I", len(data)) + data


def text(data: bytes | str) -> bytes:
    return sized(b"S", data if isinstance(data, bytes) else data.encode())


def header(*entries: bytes, id: bytes = b"7", type: bytes = b"shop.Order") -> bytes:  # noqa: A002
    """A content header as on the wire, with an id and a type beside the headers."""
    table = b"".join(entries)
    flags = struct.pack(">H", HEADERS | MESSAGE_ID | TYPE)
    short = [bytes((len(value),)) + value for value in (id, type)]
    return flags + struct.pack(">I", len(table)) + table + b"".join(short)


def read(data: bytes, *, redelivered: bool = False) -> tuple[Message, int]:
    return properties.decode(data, b"body", "q", lambda: "new", redelivered=redelivered)


def nested(depth: int, letter: bytes = b"A") -> bytes:
    value = text("deep")
    for _ in range(depth):
        value = sized(letter, value if letter == b"A" else entry(b"k", value))
    return value


SINGLE: dict[str, tuple[bytes, str]] = {
    "before 1970": (b"T" + struct.pack(">q", -86400), "1969-12-31T00:00:00+00:00"),
    "beyond the year 9999": (b"T" + struct.pack(">Q", 2**63 - 1), str(2**63 - 1)),
    "before the year 1": (b"T" + struct.pack(">q", -(2**62)), str(-(2**62))),
    "in milliseconds": (b"T" + struct.pack(">Q", 1_700_000_000_000), "1700000000000"),
    "true": (b"t\x01", "true"),
    "byte": (b"b\xff", "-1"),
    "unsigned byte": (b"B\xff", "255"),
    "short": (b"s\xff\xff", "-1"),
    "unsigned short": (b"u\xff\xff", "65535"),
    "int": (b"I\xff\xff\xff\xff", "-1"),
    "unsigned int": (b"i\xff\xff\xff\xff", "4294967295"),
    "long": (b"l" + b"\xff" * 8, "-1"),
    "float": (b"f" + struct.pack(">f", 1.5), "1.5"),
    "double": (b"d" + struct.pack(">d", -2.25), "-2.25"),
    "not a number": (b"d" + struct.pack(">d", float("nan")), "nan"),
    "infinity": (b"f" + struct.pack(">f", float("inf")), "inf"),
    "decimal": (b"D\x02" + struct.pack(">i", 12345), "123.45"),
    "decimal of the greatest scale": (b"D\xff" + struct.pack(">i", 1), "1E-255"),
    "void": (b"V", "null"),
    "bytes": (sized(b"x", b"\xff\x00a"), "\\xff\x00a"),
    "no UTF-8": (text(b"a\xff"), "a\\xff"),
    "a surrogate in UTF-8": (text(b"\xed\xa0\x80"), "\\xed\\xa0\\x80"),
    "array": (sized(b"A", b"V" + text("x") + b"t\x00"), '[null, "x", false]'),
    "table": (sized(b"F", entry(b"when", b"T" + struct.pack(">q", -1))), '{"when": "1969-12-31T23:59:59+00:00"}'),
    "table with a name of no UTF-8": (sized(b"F", entry(b"\xff", b"V")), '{"\\\\xff": null}'),
    "table that is cut off": (sized(b"F", entry(b"a", b"V") + b"\x01b"), '{"a": null}'),
    "array with an unknown type": (sized(b"A", b"V" + b"?" + b"V"), "[null]"),
}


@pytest.mark.parametrize("kind", SINGLE)
def test_a_value_of_any_type_is_text_and_costs_nothing_beside_it(kind: str) -> None:
    value, expected = SINGLE[kind]
    message, count = read(header(entry(b"before", text("1")), entry(b"it", value), entry(b"after", text("2"))))

    assert message.headers == {"before": "1", "it": expected, "after": "2"}
    assert (message.id, message.type, count) == ("7", "shop.Order", 0)


@pytest.mark.parametrize("letter", [b"A", b"F"])
def test_arrays_and_tables_nested_a_thousand_deep_are_read(letter: bytes) -> None:
    message, _ = read(header(entry(b"deep", nested(1000, letter)), entry(b"after", text("2"))))

    assert message.headers["after"] == "2"
    assert message.headers["deep"].count("[" if letter == b"A" else "{") == DEEPEST
    assert TOO_DEEP in message.headers["deep"]


def test_an_unknown_type_ends_the_headers_and_nothing_else() -> None:
    message, _ = read(header(entry(b"before", text("1")), entry(b"it", b"?123")))

    assert message.headers == {"before": "1"}
    assert (message.id, message.type) == ("7", "shop.Order")


def test_a_name_that_is_too_long_as_text_can_be_written_again() -> None:
    names = [b"\xff" * 100, b"\xff" * 99 + b"\xfe", "ü".encode() * 127, b""]
    message, _ = read(header(*(entry(name, text("x")) for name in names)))

    again, _ = read(properties.encode(message))

    assert len(message.headers) == 4
    assert again.headers == message.headers


def test_a_count_that_was_copied_along_is_not_believed() -> None:
    copied = header(entry(b"x-delivery-count", b"I\x00\x00\x00\x07"))

    assert read(copied)[1] == 0
    assert read(copied, redelivered=True)[1] == 7


@pytest.mark.parametrize("value", [b"t\x01", text("7"), b"V", b"I\xff\xff\xff\xff", nested(3)])
def test_a_count_of_another_kind_is_none(value: bytes) -> None:
    assert read(header(entry(b"x-delivery-count", value)), redelivered=True)[1] == 0


@pytest.mark.parametrize("priority", [0, 1, 9, 255])
def test_a_copy_keeps_the_priority_that_others_gave(priority: int) -> None:
    flags = properties.MESSAGE_ID | properties.PRIORITY | properties.DELIVERY_MODE | properties.CORRELATION_ID
    data = struct.pack(">H", flags) + b"\x01" + bytes((priority,)) + b"\x01c" + b"\x017"
    message, _ = read(data)
    assert (message.id, message.correlation_id) == ("7", "c")

    copy = message.replace(attempt=2, queue="other", type="t")
    again, _ = read(properties.encode(copy))

    assert getattr(again, "priority", 0) == priority
    assert (again.id, again.correlation_id, again.attempt, again.type) == ("7", "c", 2, "t")
    assert type(again) is Message or priority


def test_a_time_that_cannot_be_written_again_is_left_out() -> None:
    meta = [(b"streamtools-expirytime", b"1700000000000"), (b"streamtools-time", b"nan"), (b"after", b"x")]
    message, _ = read(header(*(entry(name, text(value)) for name, value in meta)))

    assert (message.expires_at, message.time) == (None, None)
    assert message.headers == {"after": "x"}
    properties.encode(message)


NUMBERS: dict[bytes, int] = {
    b"t": 1, b"b": 1, b"B": 1, b"s": 2, b"u": 2, b"U": 2, b"I": 4, b"i": 4, b"l": 8, b"L": 8, b"f": 4, b"d": 8,
    b"T": 8, b"D": 5, b"V": 0,
}  # fmt: skip
number = st.sampled_from(sorted(NUMBERS)).flatmap(
    lambda letter: st.binary(min_size=NUMBERS[letter], max_size=NUMBERS[letter]).map(lambda data: letter + data)
)
string = st.tuples(st.sampled_from([b"S", b"x"]), st.binary(max_size=40)).map(lambda pair: sized(*pair))
name = st.binary(max_size=255)


def _larger(inner: st.SearchStrategy[bytes]) -> st.SearchStrategy[bytes]:
    arrays = st.lists(inner, max_size=4).map(lambda values: sized(b"A", b"".join(values)))
    pairs = st.lists(st.tuples(name, inner), max_size=4)
    return arrays | pairs.map(lambda items: sized(b"F", b"".join(entry(*item) for item in items)))


values = st.recursive(number | string, _larger, max_leaves=12)
known = st.sampled_from(
    [b"x-death", b"x-delivery-count", b"CC", b"streamtools-time", b"streamtools-attempt", b"streamtools-header-CC",
     b"streamtools-errorqueue", b"streamtools-partitionkeybytes", b"streamtools-expirytime", b"x-first-death-reason"]
)  # fmt: skip


@given(st.lists(st.tuples(name | known, values), max_size=6), st.booleans())
def test_whatever_is_read_can_be_written_and_is_read_the_same(items: list[tuple[bytes, bytes]], again: bool) -> None:
    message, count = read(header(*(entry(*item) for item in items)), redelivered=again)

    second, _ = read(properties.encode(message))

    assert (message.id, message.type) == ("7", "shop.Order") or any(
        item[0].startswith(b"streamtools-") for item in items
    )
    assert count >= 0
    assert second.headers == message.headers
    assert (second.key, second.attempt) == (message.key, message.attempt)
    assert second.expires_at == pytest.approx(message.expires_at, abs=1e-6)  # times travel with microseconds
    assert (second.error is None) == (message.error is None)


@given(st.binary(max_size=120), st.integers(0, 2**16 - 1))
def test_no_bytes_make_reading_fail(data: bytes, flags: int) -> None:
    message, _ = read(struct.pack(">H", flags) + data)

    properties.encode(message)


def test_every_type_is_nested_as_json() -> None:
    inner = b"".join(value for kind, (value, _) in SINGLE.items() if kind != "array with an unknown type")
    message, _ = read(header(entry(b"all", sized(b"A", inner))))

    items: list[Any] = json.loads(message.headers["all"])
    assert len(items) == len(SINGLE) - 1


def test_headers_that_are_cut_off_are_published_again_as_far_as_they_can_be_read() -> None:
    entry = b"\x01aS\x00\x00\x00\x01b"
    table = entry + b"\x01cS\x00\x00\xff\xffd"
    data = struct.pack(">HI", 0x2000, len(table)) + table
    again = properties.without_counts(data)
    assert again == struct.pack(">HI", 0x2000, len(entry)) + entry
