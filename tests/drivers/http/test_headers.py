"""Headers come back exactly as they were written, and can do no harm on the way."""

from __future__ import annotations

import asyncio
import string
from collections.abc import Mapping
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from streamtools.drivers.http.headers import PACKED, PLAIN_LIMIT, TRANSPORT, decode_headers, encode_headers
from streamtools.errors import ConfigurationError
from streamtools.message import ErrorDetails, Message
from streamtools.validation.checks import HEADERS_LIMIT, check_headers
from tests.drivers.http.conftest import producer_to, request, serving, talk

ANY_TEXT = st.text(st.characters(exclude_categories=["Cs"]))
ODD_NAMES = st.sampled_from(
    ["Host", "content-length", "CE-ID", "ce-subject", "Transfer-Encoding", "etag", "ETag", "COOKIE", "Connection"]
    + ["a b", "a:b", "ü", "\r\nX: y", "\x00", "Expect", "Content-Type", "Date", "Server", "x", "X"]
)
ODD_VALUES = st.sampled_from(
    ["", " ", " a", "a ", "\t", "a\r\nX-Evil: 1", "%41", '"quoted"', "a, b", "+", "é", "\x7f"]
)
TOKENS = st.text(string.ascii_letters + string.digits + "!#$%&'*+-.^_`|~", min_size=1)
NAMES = (ANY_TEXT.filter(bool) | TOKENS | ODD_NAMES).filter(lambda name: not name.lower().startswith("streamtools-"))
HEADERS = st.dictionaries(NAMES, ANY_TEXT | ODD_VALUES, max_size=8)
TEXT = st.none() | ANY_TEXT.filter(bool)


async def test_headers_of_any_text_come_back_exactly() -> None:
    async def handler(msg: Message) -> Any:
        return dict(msg.headers)

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        loop = asyncio.get_running_loop()

        def sent_and_received(headers: Mapping[str, str]) -> Any:
            return asyncio.run_coroutine_threadsafe(producer.send(b"", headers=headers), loop).result(20).json()

        @settings(max_examples=300)
        @given(HEADERS)
        def property_holds(headers: dict[str, str]) -> None:
            assert sent_and_received(headers) == headers

        await asyncio.to_thread(property_holds)


async def test_metadata_of_any_text_comes_back_exactly() -> None:
    received: list[Message] = []

    async def handler(msg: Message) -> None:
        received.append(msg)

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        loop = asyncio.get_running_loop()

        @settings(max_examples=150)
        @given(
            st.builds(
                Message,
                body=st.binary(),
                queue=st.just("orders"),
                id=ANY_TEXT.filter(bool),
                type=TEXT,
                source=TEXT,
                correlation_id=TEXT,
                causation_id=TEXT,
                reply_to=TEXT,
                intent=TEXT,
                key=TEXT,
                attempt=st.integers(1, 999),
                headers=HEADERS,
                content_type=st.sampled_from([None, "application/x; a=b"]),
                error=st.none()
                | st.builds(ErrorDetails, queue=ANY_TEXT.filter(bool), reason=ANY_TEXT, attempts=st.integers(0, 99)),
            )
        )
        def property_holds(message: Message) -> None:
            received.clear()
            asyncio.run_coroutine_threadsafe(producer.send_messages([message]), loop).result(20)
            assert received == [message]

        await asyncio.to_thread(property_holds)


def plain(headers: Mapping[str, str]) -> dict[str, str]:
    return encode_headers(Message(body=b"", queue="q", id="1", headers=headers))


def test_a_plain_header_is_a_header_of_its_own() -> None:
    encoded = plain({"X-GitHub-Event": "push", "authorization": "Bearer a.b"})
    assert (encoded["X-GitHub-Event"], encoded["authorization"]) == ("push", "Bearer a.b")
    assert PACKED not in encoded


@pytest.mark.parametrize("name", sorted(TRANSPORT))
def test_no_user_header_changes_the_request_itself(name: str) -> None:
    if name.startswith("streamtools-"):
        with pytest.raises(ConfigurationError, match="reserved"):
            check_headers({name: "x"})
        return
    assert set(plain({name.title(): "x"})) - set(plain({})) == {PACKED}


def test_a_line_break_never_reaches_the_wire() -> None:
    for encoded in (plain({"X": "a\r\nX-Evil: 1"}), plain({"X\r\nX-Evil: 1": "a"})):
        assert not any("\r" in text or "\n" in text for item in encoded.items() for text in item)


async def test_as_many_headers_as_http_carries_arrive_and_more_are_a_clear_error() -> None:
    received: list[Message] = []

    async def handler(msg: Message) -> None:
        received.append(msg)

    headers = {f"x-{n}": str(n) for n in range(PLAIN_LIMIT)}
    async with serving(handler) as consumer, producer_to(consumer) as producer:
        await producer.send(b"", headers=headers)
        with pytest.raises(ConfigurationError, match="it can have 1000"):
            await producer.send(b"", headers={**headers, "one-more": ""})
    assert [dict(message.headers) for message in received] == [headers]


async def test_64_kib_of_the_worst_headers_pass() -> None:
    headers = {"ü" * 100: "\r" * (HEADERS_LIMIT - 200)}

    async def handler(msg: Message) -> Any:
        return dict(msg.headers) == headers

    async with serving(handler) as consumer, producer_to(consumer) as producer:
        assert (await producer.send(b"", headers=headers)).json() is True
        short = {f"name-{n}": "v" * 50 for n in range(PLAIN_LIMIT)}
        assert (await producer.send(b"", headers=short)).json() is False


async def test_more_than_64_kib_of_headers_are_refused() -> None:
    async with serving(print) as consumer:
        reply = await talk(consumer, request(body=b"", X_A="a" * 40_000, X_B="b" * 40_000))
    assert reply.status == 431


def test_metadata_stands_under_its_cloudevents_names() -> None:
    encoded = encode_headers(
        Message(body=b"", queue="q", id="é 1%", type="orders.Placed", source="shop", time=0.0, content_type="a/b")
    )
    assert encoded == {
        "ce-specversion": "1.0",
        "ce-id": "%C3%A9%201%25",
        "ce-type": "orders.Placed",
        "ce-source": "shop",
        "ce-time": "1970-01-01T00:00:00.000000Z",
        "Content-Type": "a/b",
    }


def test_an_event_has_a_type_and_a_source_on_the_wire_even_when_the_message_has_none() -> None:
    encoded = plain({})
    assert {"ce-type", "ce-source"} <= set(encoded)
    fields, _ = decode_headers([(n.encode(), v.encode()) for n, v in encoded.items()])
    assert fields == {"id": "1"}


@pytest.mark.parametrize(
    ("raw", "expected"),
    [
        (b'"a \\"b\\" c"', 'a "b" c'),
        (b"Euro%20%E2%82%AC%20%F0%9F%98%80", "Euro € 😀"),
        (b"%ff", "�"),
        (b"100%", "100%"),
    ],
)
def test_values_of_other_senders_are_read_as_the_binding_says(raw: bytes, expected: str) -> None:
    fields, _ = decode_headers([(b"Ce-Id", raw)])
    assert fields["id"] == expected


def test_a_repeated_header_is_joined() -> None:
    _, headers = decode_headers([(b"Forwarded", b"a"), (b"Forwarded", b"b")])
    assert headers == {"Forwarded": "a, b"}


def test_encodings_in_several_headers_are_one_list() -> None:
    fields, _ = decode_headers([(b"Content-Encoding", b"deflate"), (b"content-encoding", b"gzip")])
    assert fields["content_encoding"] == "deflate, gzip"


def test_bytes_that_are_no_text_become_text_that_every_wire_carries() -> None:
    _, headers = decode_headers([(b"X-Latin", b"\xe9")])
    headers["X-Latin"].encode()


@pytest.mark.parametrize("packed", [b"&&&", b"=", b"a", b"a=%ff", b"%"])
def test_a_malformed_pack_is_no_failure(packed: bytes) -> None:
    decode_headers([(PACKED.encode(), packed)])


def test_a_lone_surrogate_is_a_clear_error() -> None:
    with pytest.raises(ConfigurationError, match="ce-id holds a lone surrogate"):
        encode_headers(Message(body=b"", queue="q", id="\ud800"))
    with pytest.raises(ConfigurationError, match="content_type"):
        encode_headers(Message(body=b"", queue="q", id="1", content_type="a/b\r\nX: y"))


@pytest.mark.parametrize("name", ["X-A", "x-a", "X-a"])
def test_names_that_differ_by_case_are_one_header_and_are_looked_up_in_any_case(name: str) -> None:
    _, headers = decode_headers([(b"X-A", b"1"), (b"x-a", b"2"), (b"x-B", b"3")])
    assert headers == {"X-A": "1, 2", "x-B": "3"}
    assert (headers[name], headers.get(name), name in headers) == ("1, 2", "1, 2", True)
    assert (headers.get("X-C"), headers.get("X-C", "d"), "X-C" in headers) == (None, "d", False)


PROXY = b"X-Forwarded-User"


@pytest.mark.parametrize(
    "packed",
    [b"X-Forwarded-User=root", b"x-forwarded-user=root", b"X-Forwarded-User=root%20", b"X-Forwarded-User=r%C3%B6ot"]
    + [b"X-Forwarded-User=root&x-forwarded-user=root", b"X-%46orwarded-User=root", b"ce-authsubject=root"]
    + ["X-Forwarded-\u017fer=root".encode(), b"Authorization=root", "X-Api-\u212aey=root".encode()],
)
@pytest.mark.parametrize("plain", [b"ann", b"", b"streamtools-headers, ann", None])
def test_what_is_packed_never_counts_for_a_header_that_a_proxy_sets_or_removes(
    packed: bytes, plain: bytes | None
) -> None:
    raw = [(PACKED.encode(), packed + b"&a%20b=1")]
    raw += [(PROXY, plain), (b"Authorization", plain), (b"ce-authsubject", plain)] if plain is not None else []
    for order in (raw, raw[::-1]):
        _, headers = decode_headers(order)
        for name in ("X-Forwarded-User", "Authorization", "ce-authsubject"):
            assert headers.get(name) == (None if plain is None else plain.decode())
        assert (headers.get("X-Api-Key"), headers["a b"]) == (None, "1")


@pytest.mark.parametrize("value", ["r\xf6ot", " root", "root ", "a\r\nb", "streamtools-headers", ""])
@pytest.mark.parametrize("by", [{"x-user": b"ann"}, {}])
def test_a_proxy_that_removes_or_replaces_a_header_has_the_last_word(value: str, by: dict[str, bytes]) -> None:
    sent = encode_headers(Message(body=b"", queue="q", id="1", headers={"X-User": value, "a b": "c"}))
    _, whole = decode_headers([(name.encode(), text.encode()) for name, text in sent.items()])
    assert whole == {"X-User": value, "a b": "c"}
    kept = [(name.encode(), text.encode()) for name, text in sent.items() if name.lower() != "x-user"]
    _, headers = decode_headers([*kept, *((name.encode(), text) for name, text in by.items())])
    assert headers == {"a b": "c", **{name: text.decode() for name, text in by.items()}}


def test_the_version_of_a_contract_is_no_header_of_the_users() -> None:
    sent = encode_headers(Message(body=b"", queue="q", id="1", version=3))
    fields, headers = decode_headers([(name.encode(), text.encode()) for name, text in sent.items()])
    assert (fields["version"], dict(headers)) == (3, {})


def test_names_of_ours_that_differ_by_case_arrive_both() -> None:
    encoded = encode_headers(Message(body=b"", queue="q", id="1", headers={"X": "1", "x": "2", "y": "3"}))
    _, headers = decode_headers([(n.encode(), v.encode()) for n, v in encoded.items()])
    assert headers == {"X": "1", "x": "2", "y": "3"}
    assert (headers["X"], headers["x"], headers["Y"]) == ("1", "2", "3")


def test_attributes_that_are_not_ours_are_percent_decoded_too() -> None:
    _, headers = decode_headers(
        [(b"ce-subject", b"Euro%20%E2%82%AC"), (b"CE-Region", b'"a \\"b\\""'), (b"X", b"%41")]
    )
    assert headers == {"ce-subject": "Euro €", "CE-Region": 'a "b"', "X": "%41"}


@pytest.mark.parametrize("name", ["Content-Type", "Content-Encoding", "X-A", "ce-id", "ce-subject", "X-\xff"])
def test_whatever_bytes_come_in_a_header_can_be_written_again(name: str) -> None:
    fields, headers = decode_headers([(name.encode("latin-1"), b"\xff\xed\xb3\xbf")])
    for text in (*fields.values(), *headers, *headers.values()):
        text.encode()
