"""Bodies that are made to take long or to fill the memory: within the default limits none does."""

from __future__ import annotations

import base64
import datetime
import gzip
import ipaddress
import json
import time
import tracemalloc
import uuid
from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from decimal import Decimal
from functools import cache
from typing import Annotated, Any, Literal

import pytest
from hypothesis import given
from hypothesis import strategies as st
from pydantic import AfterValidator, AnyUrl, BaseModel, ConfigDict, Field, TypeAdapter, ValidationError
from typing_extensions import TypedDict

from streamtools import ConfigurationError, Message, codec, set_body_limits
from streamtools.engine.messages.envelope import unwrapped
from streamtools.errors import DecodeError
from streamtools.validation import parsing
from streamtools.validation.bodies import LIMITS
from streamtools.validation.schemas import is_quick
from streamtools.validation.unions import doubling

MIB = 1024 * 1024
#: Seconds of processor time for one body: several times the 0.2 s that are promised, for a machine that does other
#: work meanwhile takes longer for the same instructions. What these bodies took before was beyond it.
LIMIT = 1.0
MODULUS = (1 << 61) - 1


class Item(BaseModel):
    id: int
    name: str
    when: datetime.datetime
    tags: list[str]


class Order(BaseModel):
    id: int
    items: list[Item] = []


class Cat(BaseModel):
    kind: Literal["cat"]
    a: int


class Dog(BaseModel):
    kind: Literal["dog"]
    b: int


class Tree(BaseModel):
    kids: list[Tree] = []


@dataclass
class Point:
    x: int
    y: str


class And(BaseModel):
    items: list[And | Or | int]


class Or(BaseModel):
    items: list[And | Or | int]
    child: Or | And | None = None


class Leaf(BaseModel):
    x: int


class Both(BaseModel):
    items: list[Both | Either | Leaf] = []
    rows: list[int] = []


class Either(BaseModel):
    kind: Literal["either"] = "either"
    items: list[Both | Either | Leaf] = []
    rows: list[int] = []


def decimals(number: int) -> list[str]:
    """Different ones with the same hash, of few digits."""
    inverse, mantissa, found = pow(10, -1, MODULUS), 12345, list[str]()
    for exponent in range(1, 10 * number):
        mantissa = mantissa * inverse % MODULUS
        if mantissa < 10**18:
            found.append(f"{mantissa}e{exponent}")
    return found[:number]


def many(item: bytes, size: int = MIB) -> bytes:
    return b"[" + b",".join([item] * (size // (len(item) + 1))) + b"]"


BODIES = {
    "objects": many(b"{}"),
    "lists": many(b"[]"),
    "numbers": many(b"1"),
    "texts": many(b'""'),
    "nulls": many(b"null"),
    "objects within": b'{"id":1,"items":' + many(b"{}") + b"}",
    "kinds": many(b'{"kind":"cow"}'),
    "cats": many(b'{"kind":"cat"}'),
    "a huge number": b"9" * MIB,
    "huge numbers": many(b"9" * 4000),
    "a huge number in a text": b'"' + b"9" * MIB + b'"',
    "huge floats": many(b"1" + b"0" * 300 + b".5"),
    "great exponents": many(b"1e999999"),
    "great exponents in texts": many(b'"1e999999"'),
    "nested lists": b"[" * MIB,
    "nested objects": b'{"a":' * (MIB // 5),
    "trees": many(b'{"kids":[' * 90 + b"]}" * 90),
    "many keys": b"{" + b",".join(b'"k%d":1' % n for n in range(90_000)) + b"}",
    "one key many times": b"{" + b",".join([b'"k":1'] * 170_000) + b"}",
    "a huge key": b'{"' + b"k" * MIB + b'":1}',
    "dates": many(b'{"id":1,"name":"","when":"2024-13-01","tags":[]}'),
    "escapes": b'"' + b"\\u0041" * (MIB // 6) + b'"',
    "surrogates": many(b'"\\ud800"'),
    "no UTF-8": b'"' + b"\xff" * MIB + b'"',
    "blanks": b" " * MIB,
    "quotes": b'["' + b'\\"' * (MIB // 2) + b'"]',
    "numbers of one hash": b"[" + b",".join(b"%d" % (n * MODULUS) for n in range(40_000)) + b"]",
    "keys of one hash": b"{" + b",".join(b'"%d":1' % (n * MODULUS) for n in range(40_000)) + b"}",
    "ids of one hash": json.dumps([str(uuid.UUID(int=n * MODULUS)) for n in range(1, 26_000)]).encode(),
    "base64": json.dumps(base64.b64encode(b"x" * 700_000).decode()).encode(),
}
ANNOTATIONS: dict[str, Any] = {
    "list[Order]": list[Order],
    "Order": Order,
    "Any": Any,
    "int": int,
    "str": str,
    "list[int]": list[int],
    "list[Cat | Dog]": list[Cat | Dog],
    "discriminated": list[Annotated[Cat | Dog, Field(discriminator="kind")]],
    "Tree": Tree,
    "list[Tree]": list[Tree],
    "list[Point]": list[Point],
    "dict[int, int]": dict[int, int],
    "set[int]": set[int],
    "set[UUID]": set[uuid.UUID],
    "list[Decimal]": list[Decimal],
    "dict[str, Order]": dict[str, Order],
    "a wide union": list[int | float | datetime.datetime | Order | Item | bool],
    "list[list[Order]]": list[list[Order]],
}


@pytest.mark.parametrize("annotation", ANNOTATIONS)
@pytest.mark.parametrize("encoding", [None, "gzip"])
def test_no_body_of_a_mebibyte_takes_long_or_fills_the_memory(annotation: str, encoding: str | None) -> None:
    decode = codec.decoder(ANNOTATIONS[annotation])
    with_problems(decode, message(b'{"id":[]}' * 4_000, encoding))  # what is made once is made
    for name, body in BODIES.items():
        sent = message(body, encoding)
        took = timed(decode, sent)
        if took >= LIMIT:  # it may have met a collection of garbage
            took = min(timed(decode, sent) for _ in range(2))
        assert took < LIMIT, f"{name} took {took:.2f} s"


@pytest.mark.parametrize(
    "body",
    [b"[" + b'"",' * 5_000_000 + b"1]", b'["' + b"x" * MIB + b'",' + b'"",' * 5_000_000 + b"1]"]
    + [b'["' + b'\\"' * 8 * MIB + b'"]', b'["' + b"\\\\" * 8 * MIB + b'"]', b'["' + b"-" * 16 * MIB + b'"]'],
    ids=["texts", "texts behind a long one", "quotes", "backslashes", "dashes"],
)
def test_no_body_that_is_large_once_decompressed_takes_long(body: bytes) -> None:
    sent = message(body[: LIMITS.inflated], "gzip")
    assert len(sent.body or b"") < 40_000
    for annotation in (set[uuid.UUID], dict[int, str]):
        assert timed(codec.decoder(annotation), sent) < LIMIT


@given(
    st.lists(st.sampled_from([b'"', b"\\", b'\\"', b",", b"[", b"{", b"a", b"\\\\"]), max_size=40), st.integers(1, 9)
)
def test_values_are_counted_alike_in_pieces_of_any_size(parts: list[bytes], portion: int) -> None:
    body = b"".join(parts)
    number = parsing._count(parsing._without_strings(body))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(parsing, "PORTION", portion)
        assert [parsing._has_more_values(body, limit) for limit in range(41)] == [number > n for n in range(41)]


#: Bodies that are made for one annotation.
MADE: dict[str, bytes] = {
    "addresses of one hash": json.dumps([str(ipaddress.IPv6Address(n * MODULUS)) for n in range(1, 24_000)]).encode(),
    "keys of one hash that are addresses": json.dumps(
        {str(ipaddress.IPv6Address(n * MODULUS)): 1 for n in range(1, 24_000)}
    ).encode(),
    "decimals of one hash": json.dumps(decimals(24_000)).encode(),
    "ids of one hash, escaped": b"[%b]"
    % b",".join(b'"\\u0030%b"' % str(uuid.UUID(int=n * MODULUS)).encode()[1:] for n in range(1, 23_000)),
    "types that cannot be told apart": b'{"items":[' * 60 + b'"x"' + b"]}" * 60,
    "such types, many times": b'{"items":[%b]}' % b",".join([b'{"items":[' * 9 + b'"x"' + b"]}" * 9] * 7_000),
}


@pytest.mark.parametrize(
    ("annotation", "name"),
    [
        (set[ipaddress.IPv6Address], "addresses of one hash"),
        (dict[ipaddress.IPv6Address, int], "keys of one hash that are addresses"),
        (frozenset[Decimal], "decimals of one hash"),
        (set[uuid.UUID], "ids of one hash, escaped"),
        (And | Or, "types that cannot be told apart"),
        (And | Or, "such types, many times"),
    ],
)
def test_no_body_that_is_made_for_its_annotation_takes_long(annotation: Any, name: str) -> None:
    decode = codec.decoder(annotation)
    begun = time.thread_time()
    with pytest.raises(DecodeError, match=r"the same hash|would be tried|more than are parsed"):
        decode(message(MADE[name]))
    assert time.thread_time() - begun < LIMIT


TREE = {"items": [{"items": [1, {"items": [2, 3], "child": {"items": []}}]}, 4]}


def test_types_that_cannot_be_told_apart_are_tried_a_limited_number_of_times() -> None:
    decode = codec.decoder(And | Or)
    assert decode(message(json.dumps(TREE).encode())) == TypeAdapter(And | Or).validate_python(TREE)
    brackets = json.dumps({"items": ["[{" * 1000]})  # in a text they are none
    with pytest.raises(DecodeError, match="valid int"):
        decode(message(brackets.encode()))
    deep = message(b'{"items":[' * 20 + b"1" + b"]}" * 20)
    with pytest.raises(DecodeError, match=r"2 types of a union have the field 'items'.*discriminator"):
        decode(deep)
    set_body_limits(values=None)
    try:
        decode(message(b'{"items":[' * 12 + b"1" + b"]}" * 12))
    finally:
        set_body_limits()


def test_flat_bodies_of_types_that_cannot_be_told_apart_are_taken() -> None:
    body = json.dumps({"items": [{"x": 1}, {"kind": "either", "items": [{"x": 3}] * 20}] * 300})
    assert len(codec.decoder(Both)(message(body.encode())).items) == 600


@pytest.mark.parametrize(
    ("level", "levels", "inner"),
    [('{"x":"]}]}","items":[', 20, '{"x":1}'), ('{"items":[', 9, '{"rows":[' + "1," * 2_000 + "1]}")],
    ids=["levels closed in texts", "many numbers"],
)
def test_nothing_hides_how_often_types_are_tried(level: str, levels: int, inner: str) -> None:
    body = level * levels + inner + "]}" * levels
    with pytest.raises(DecodeError, match="would be tried"):
        codec.decoder(Both | Either)(message(body.encode()))


@pytest.mark.parametrize(
    "annotation",
    [
        Tree,
        list[Cat | Dog],
        dict[str, Any],
        Annotated[Cat | Dog, Field(discriminator="kind")] | None,
        "Json",
        "Named",
    ],
)
def test_types_that_are_told_apart_have_no_such_limit(annotation: Any) -> None:
    class Not(BaseModel):
        inner: Not | All

    class All(BaseModel):
        every: list[Not | All]

    if annotation == "Json":
        annotation = list["list[Any] | dict[str, Any] | str"]
    assert doubling(TypeAdapter(All if annotation == "Named" else annotation).core_schema) is None


class Typed(TypedDict):
    inner: Typed | Named | None


class Named(TypedDict):
    inner: Typed | Named | None


@dataclass
class Left:
    sub: Left | Right | None = None


@dataclass
class Right:
    sub: Left | Right | None = None


@pytest.mark.parametrize(
    ("annotation", "field"),
    [
        (Left | Right, "sub"),
        (Typed | Named, "inner"),
        (list[Left | Right | Point], "sub"),
        (Point | Item, None),
    ]
    + [
        (dict[str, Point | Order] | tuple[int, ...], None),
        (Callable[[int], str] | int, None),
        (Sequence[Tree], None),
    ],
)
def test_schemas_of_every_kind_are_looked_at(annotation: Any, field: str | None) -> None:
    codec.decoder(annotation)
    found = doubling(TypeAdapter(annotation).core_schema)
    assert (found and found.field) == field


def test_a_set_of_a_large_body_is_as_one_of_a_small_one() -> None:
    class Sets(BaseModel):
        numbers: set[int] = set()
        names: frozenset[str] = frozenset()
        few: Annotated[set[int], Field(max_length=3)] = set()

    decode = codec.decoder(Sets)
    given = {
        "numbers": [*range(-9000, 9000), *[7] * 9000, *[-1, -2] * 9000],
        "names": ["a"] * 9000,
        "few": [1] * 9000,
    }
    found = decode(message(json.dumps(given).encode()))
    assert found == Sets(numbers=set(range(-9000, 9000)), names=frozenset("a"), few={1})
    for wrong in ({"few": list(range(9000))}, {"numbers": ["x"] * 9000}, {"numbers": "x" * 20_000}):
        with pytest.raises(DecodeError) as caught:
            decode(message(json.dumps(wrong).encode()))
        assert caught.value.errors[0]["loc"][0] in wrong
        assert len(caught.value.errors) == 1


LOOKS_LIKE_A_SCHEMA: list[Any] = [
    {"type": "list", "fields": ["id"]},
    {"type": "set", "items_schema": 3},
    {"type": "union"},
    {"type": "definition-ref"},
    {"type": "dict", "ref": "x"},
    {"a": {"type": "dataclass-args"}},
    OrderedDict(a=1),
    [{"type": "tagged-union", "choices": {"a": 1}}],
]
CONTAINS_ITSELF: dict[str, Any] = {"type": "union"}
CONTAINS_ITSELF["choices"] = [CONTAINS_ITSELF]


@pytest.mark.parametrize("default", [*LOOKS_LIKE_A_SCHEMA, CONTAINS_ITSELF], ids=range(9))
def test_a_default_that_looks_like_a_schema_is_left_as_it_is(default: Any) -> None:
    class Report(BaseModel):
        shared: Any = Field(default_factory=lambda: default)
        filter: Any = Field(default, json_schema_extra=LOOKS_LIKE_A_SCHEMA[2])
        kind: Literal["list", "union"] = "list"
        rows: list[int] = []

    schema: Any = TypeAdapter(Report).core_schema
    assert parsing.failing_fast(schema)["schema"]["fields"]["filter"]["schema"]["default"] is default
    if default is not CONTAINS_ITSELF:  # which pydantic cannot copy either
        found = codec.decoder(Report)(message(LARGE_ROWS))
        assert (found.filter, type(found.filter)) == (default, type(default))
        assert found.shared is default
        assert len(found.rows) == 10_000
    else:
        assert doubling(schema) is None


LARGE_ROWS = json.dumps({"rows": [*range(10_000)]}).encode()


def test_strict_sets_of_a_large_body_are_as_those_of_a_small_one() -> None:
    class Strict(BaseModel):
        model_config = ConfigDict(strict=True, validate_default=True)

        tags: set[str]
        either: set[int] | list[int] = [1]
        names: frozenset[str] = frozenset("a")
        rows: list[int]

    for tags in (["a", "b", "a"], [1], "a", [["a"]]):
        body = json.dumps({"tags": tags, "either": [1, 2], "rows": [*range(10_000)]}).encode()
        assert outcome(codec.decoder(Strict), message(body)) == outcome(
            lambda m: Strict.model_validate_json(m.body or b""), message(body)
        )


def outcome(decode: codec.Decoder, sent: Message) -> Any:
    """What is made of it; None where it is refused."""
    try:
        return decode(sent)
    except (DecodeError, ValidationError):
        return None


def timed(decode: codec.Decoder, sent: Message) -> float:
    begun = time.thread_time()
    with_problems(decode, sent)
    return time.thread_time() - begun


def with_problems(decode: codec.Decoder, sent: Message) -> None:
    """Decode it, or have it refused with a short text."""
    try:
        decode(sent)
    except DecodeError as error:
        assert len(str(error)) < 2_000
        assert len(error.errors) <= codec.PROBLEMS


compressed = cache(gzip.compress)


def message(body: bytes, encoding: str | None = None, content_type: str = codec.JSON) -> Message:
    body = compressed(body) if encoding else body
    return Message(body=body, queue="q", id="1", content_type=content_type, content_encoding=encoding)


@pytest.mark.parametrize("name", ["objects", "objects within", "cats", "lists"])
def test_problems_are_cut_before_they_are_built(name: str) -> None:
    decode = codec.decoder(list[Order] if name != "objects within" else Order)
    sent = message(BODIES[name])
    tracemalloc.start()
    try:
        with pytest.raises(DecodeError):
            decode(sent)
        assert tracemalloc.get_traced_memory()[1] < 32 * MIB
    finally:
        tracemalloc.stop()


@pytest.mark.parametrize(
    "charset", ["punycode", "idna", "utf-7", "unicode_escape", "rot13", "hex", "zlib", "bz2", "\0"]
)
def test_only_charsets_that_are_read_in_one_go_are_read(charset: str) -> None:
    begun = time.thread_time()
    for annotation in (str, Any, Order):
        with pytest.raises(DecodeError):
            codec.decoder(annotation)(message(b"a" * MIB, content_type=f"text/plain; charset={charset}"))
    assert time.thread_time() - begun < LIMIT


def test_a_bomb_of_gzip_is_refused_at_once() -> None:
    bomb = gzip.compress(gzip.compress(gzip.compress(b"[" + b"{}," * 30_000_000 + b"{}]")))
    sent = Message(body=bomb, queue="q", id="1", content_type=codec.JSON, content_encoding="gzip, gzip, gzip")
    begun = time.thread_time()
    with pytest.raises(DecodeError, match="decompressed"):
        codec.decoder(list[Order])(sent)
    assert time.thread_time() - begun < LIMIT


@pytest.mark.parametrize("name", [*BODIES])
def test_an_event_in_an_envelope_is_bounded_as_well(name: str) -> None:
    body = b'{"specversion":"1.0","id":"1","source":"s","type":"t","data":%b}' % BODIES[name]
    sent = message(body, content_type="application/cloudevents+json")
    begun = time.thread_time()
    with_problems(lambda m: codec.decoder(Order)(unwrapped(m)), sent)
    assert time.thread_time() - begun < 2 * LIMIT


def test_more_values_are_parsed_where_all_types_are_quick() -> None:
    class Quick(BaseModel):
        id: int
        name: str
        price: float | None = None

    class Addressed(Quick):
        address: AnyUrl | None = None

    rows = json.dumps([{"id": n, "name": "x" * 99, "price": 1.5} for n in range(30_000)]).encode()
    assert len(codec.decoder(list[Quick])(message(rows))) == 30_000
    for annotation in (list[Addressed], list[And], list[Order | Quick], list[Annotated[Quick, AfterValidator(repr)]]):
        with pytest.raises(DecodeError, match=r"over 100,000 values|not a valid"):
            codec.decoder(annotation)(message(rows))
        assert not is_quick(TypeAdapter(annotation).core_schema)
    with pytest.raises(DecodeError, match="over 150,000 values"):
        codec.decoder(list[Quick])(message(b"[%b]" % b",".join([rows[1:-1]] * 2)))


def test_the_limits_are_settings() -> None:
    body = b"[" + b"1," * 100_000 + b"1]"
    decode = codec.decoder(list[int | str])
    before = LIMITS.values, LIMITS.inflated
    try:
        with pytest.raises(DecodeError, match=r"over 100,000 values.*set_body_limits"):
            decode(message(body))
        set_body_limits(values=200_000)
        assert len(decode(message(body))) == 100_001
        set_body_limits(values=None, inflated=1000)
        assert len(decode(message(body))) == 100_001
        with pytest.raises(DecodeError, match="over 1,000 bytes"):
            decode(message(body, "gzip"))
        for wrong in ({"values": 0}, {"values": True}, {"inflated": "1"}, {"inflated": -1}):
            with pytest.raises(ConfigurationError, match="out of range"):
                set_body_limits(**wrong)  # type: ignore[arg-type]
    finally:
        LIMITS.values, LIMITS.inflated = before


def test_commas_in_texts_are_no_values() -> None:
    text = 'a,b,[{"\\' * 100_000
    assert codec.decoder(list[str])(message(json.dumps([text]).encode())) == [text]
    assert codec.decoder(dict[str, Any])(message(json.dumps({"csv": text}).encode())) == {"csv": text}
