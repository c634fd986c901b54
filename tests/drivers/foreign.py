"""What other programs send on each protocol, and how they do it: without streamtools."""

from __future__ import annotations

import asyncio
import json
import sqlite3
import struct
from collections.abc import Collection, Sequence
from typing import Any, Final
from urllib.parse import quote, unquote, urlsplit

from aiokafka import AIOKafkaProducer
from hypothesis import strategies as st
from typer.testing import CliRunner

from streamtools import Message
from streamtools.cli import output
from streamtools.cli.app import app
from streamtools.testing.conformance.foreign import Letter

CONTENT_TYPES: Final = st.sampled_from(
    [
        "",
        "application/json",
        "text/plain",
        "text/plain; charset=punycode",
        "text/plain; charset=\xff",
        "application/json; x",
    ]
    + [
        "application/cloudevents+json",
        "application/cloudevents-batch+json",
        "image/png",
        ";",
        "a" * 300,
        "application/x",
    ]
)
ENCODINGS: Final = st.sampled_from(["gzip", "deflate", "br", "utf-8", "gzip, gzip, gzip, gzip", "\x00", ""])
#: Times of clocks that tell nonsense; none that would hold a message back, or let it expire.
TIMES: Final = st.sampled_from(
    [
        "9999-12-31T23:59:59.9999999Z",
        "nan",
        "inf",
        "-inf",
        "1700000000000",
        "1e308",
        "0001-01-01T00:00:00+14:00",
        "soon",
        "",
    ]
)
COUNTS: Final = st.sampled_from(["0", "-1", "1", "7", "9" * 9, "9" * 18, "9" * 400, "x", "\u0663"])
TEXTS: Final = st.text(max_size=30) | st.sampled_from(["x" * 300, "\x1b[31m\r\n", "\udcff", "ü" * 200, ""])
NAMES: Final = st.sampled_from(
    [
        "time",
        "deliverytime",
        "expirytime",
        "errorfirst",
        "errorlast",
        "attempt",
        "dataversion",
        "errorattempts",
        "errorqueue",
    ]
    + [
        "errormessage",
        "errortraceback",
        "erroromitted",
        "partitionkey",
        "partitionkeybytes",
        "handler",
        "intent",
        "replyto",
    ]
    + ["type", "source", "id", "correlationid", "specversion", "subject", "traceparent"]
)


def value_of(name: str) -> st.SearchStrategy[str]:
    """What may stand under one of our names."""
    if "time" in name or name.startswith(("errorfirst", "errorlast")):
        return TIMES
    if name in ("attempt", "dataversion", "errorattempts"):
        return COUNTS
    if name == "intent":
        return st.sampled_from(["command", "event", "x"])
    return TEXTS


ATTRIBUTES: Final = st.lists(NAMES.flatmap(lambda name: st.tuples(st.just(name), value_of(name))), max_size=6)


# --- RabbitMQ -------------------------------------------------------------------------------------


def sized(letter: bytes, data: bytes) -> bytes:
    """A value of this type with its length before it."""
    return letter + struct.pack(">I", len(data)) + data


def entry(name: bytes, value: bytes) -> bytes:
    """A named value of a field table."""
    return bytes((len(name[:255]),)) + name[:255] + value


SCALARS: Final = st.one_of(
    st.binary(min_size=1, max_size=1).map(lambda raw: b"t" + raw),
    *(
        st.binary(min_size=size, max_size=size).map(lambda raw, letter=letter: letter + raw)  # type: ignore[misc]
        for letter, size in {
            b"b": 1,
            b"B": 1,
            b"s": 2,
            b"u": 2,
            b"I": 4,
            b"i": 4,
            b"l": 8,
            b"f": 4,
            b"d": 8,
            b"T": 8,
            b"D": 5,
        }.items()
    ),
    st.binary(max_size=300).map(lambda raw: sized(b"S", raw)),
    st.binary(max_size=30).map(lambda raw: sized(b"x", raw)),
    st.just(b"V"),
)
FIELDS: Final = st.recursive(
    SCALARS,
    lambda inner: (
        st.lists(inner, max_size=3).map(lambda values: sized(b"A", b"".join(values)))
        | st.lists(st.tuples(st.binary(max_size=20), inner), max_size=3).map(
            lambda pairs: sized(b"F", b"".join(entry(name, value) for name, value in pairs))
        )
    ),
    max_leaves=6,
)
#: Headers that the broker or we read, written by a shovel or by hand.
MARKERS: Final = st.sampled_from(
    [entry(b"x-delivery-count", b"l" + struct.pack(">q", n)) for n in (-1, 7, 2**62)]
    + [entry(b"x-death", sized(b"A", sized(b"F", entry(b"queue", sized(b"S", b"\xff")) + entry(b"count", b"V"))))]
    + [
        entry(b"x-death", b"t\x01"),
        entry(b"large", sized(b"S", b"x" * 100_000)),
        entry(b"\xff" * 100, sized(b"S", b"x")),
    ]
    + [entry(b"streamtools-expirytime", b"l" + struct.pack(">q", 1_700_000_000_000)), entry(b"", b"V")]
)


def _attribute(pair: tuple[str, str]) -> bytes:
    name, value = pair
    return entry(f"streamtools-{name}".encode(), sized(b"S", value.encode("utf-8", "surrogatepass")))


HEADERS: Final = st.lists(
    st.tuples(st.binary(max_size=255), FIELDS).map(lambda pair: entry(*pair)) | MARKERS, max_size=5
).flatmap(lambda own: ATTRIBUTES.map(lambda ours: b"".join([*own, *map(_attribute, ours)])))
SHORTS: Final = st.none() | st.binary(max_size=255)
#: Flag and values: content type, encoding, correlation id, reply to, message id, time, type, app id.
RABBITMQ: Final = st.tuples(
    st.none() | CONTENT_TYPES.map(lambda text: text.encode()[:255]), st.none() | ENCODINGS.map(str.encode), HEADERS,
    SHORTS, SHORTS, SHORTS, st.none() | st.binary(min_size=8, max_size=8), SHORTS, SHORTS,
)  # fmt: skip


def content_header(beside: tuple[Any, ...]) -> bytes:
    """The flags and values of an AMQP content header."""
    kind, encoding, headers, correlation, reply_to, id_, time, type_, app = beside
    flags, parts = 0, []
    for flag, raw, make in (
        (1 << 15, kind, _short), (1 << 14, encoding, _short), (1 << 13, headers, _long), (1 << 12, b"\x02", bytes),
        (1 << 10, correlation, _short), (1 << 9, reply_to, _short), (1 << 7, id_, _short),
        (1 << 6, time, bytes), (1 << 5, type_, _short), (1 << 3, app, _short),
    ):  # fmt: skip
        if raw is not None:
            flags |= flag
            parts.append(make(raw))  # type: ignore[operator]
    return struct.pack(">H", flags) + b"".join(parts)


def _short(raw: bytes) -> bytes:
    return bytes((len(raw),)) + raw


def _long(raw: bytes) -> bytes:
    return struct.pack(">I", len(raw)) + raw


async def publish_to_rabbitmq(url: str, queue: str, letters: Sequence[Letter]) -> Collection[int]:
    """Publish by frames of our own; the broker closes a channel for what it does not take."""
    refused = []
    publisher = AMQP(url)
    await publisher.open()
    for letter in letters:
        if not await publisher.publish(queue, letter.body or b"", content_header(letter.beside)):
            refused.append(letter.number)
            await publisher.close()
            await publisher.open()
    await publisher.close()
    return refused


class AMQP:
    """A publisher of bytes: AMQP 0-9-1 as far as one confirmed publication needs it."""

    def __init__(self, url: str) -> None:
        self._url = urlsplit(url)

    async def open(self) -> None:
        host, port = self._url.hostname or "localhost", self._url.port or 5672
        self._reader, self._writer = await asyncio.open_connection(host, port)
        self._writer.write(b"AMQP\x00\x00\x09\x01")
        await self._method()  # start
        user, password = unquote(self._url.username or "guest"), unquote(self._url.password or "guest")
        plain = f"\0{user}\0{password}".encode()
        self._send(
            0, 10, 11, struct.pack(">I", 0) + _short(b"PLAIN") + struct.pack(">I", len(plain)) + plain + _short(b"en")
        )
        await self._method()  # tune
        self._send(0, 10, 31, struct.pack(">HIH", 10, 131072, 0))
        self._send(0, 10, 40, _short(unquote(self._url.path[1:] or "/").encode()) + b"\0\0")
        await self._method()
        self._send(1, 20, 10, b"\0")
        await self._method()
        self._send(1, 85, 10, b"\0")
        await self._method()

    async def publish(self, queue: str, body: bytes, header: bytes) -> bool:
        """Whether the broker has taken it."""
        self._send(1, 60, 40, b"\0\0" + _short(b"") + _short(queue.encode()) + b"\0")
        self._frame(2, 1, struct.pack(">HHQ", 60, 0, len(body)) + header)
        if body:
            self._frame(3, 1, body)
        return await self._method() == (60, 80)

    async def close(self) -> None:
        self._writer.close()

    async def _method(self) -> tuple[int, int]:
        try:
            while True:
                kind, _, size = struct.unpack(">BHI", await self._reader.readexactly(7))
                payload = (await self._reader.readexactly(size + 1))[:-1]
                if kind == 1:
                    found = struct.unpack(">HH", payload[:4])
                    return found[0], found[1]
        except (asyncio.IncompleteReadError, ConnectionError):
            return 0, 0

    def _send(self, channel: int, kind: int, method: int, arguments: bytes) -> None:
        self._frame(1, channel, struct.pack(">HH", kind, method) + arguments)

    def _frame(self, kind: int, channel: int, payload: bytes) -> None:
        self._writer.write(struct.pack(">BHI", kind, channel, len(payload)) + payload + b"\xce")


# --- Kafka ----------------------------------------------------------------------------------------


def _encoded(pairs: list[tuple[str, str]]) -> list[tuple[str, bytes | None]]:
    return [(f"ce_{name}", value.encode("utf-8", "surrogatepass")) for name, value in pairs]


RECORD_HEADERS: Final = st.lists(
    st.tuples(
        st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
        | st.sampled_from(["content-type", "streamtools-group", "streamtools-queue", "streamtools-retries", "ce_id"])
        | st.sampled_from(["streamtools-origin-topic", "streamtools-origin-partition", "streamtools-origin-offset"]),
        st.none() | st.binary(max_size=60) | CONTENT_TYPES.map(str.encode) | COUNTS.map(str.encode),
    ),
    max_size=6,
)
#: Key, headers, timestamp in milliseconds.
KAFKA: Final = st.tuples(
    st.none() | st.binary(max_size=30) | st.integers(0, 999).map(lambda n: struct.pack(">i", n)),
    RECORD_HEADERS.flatmap(lambda own: ATTRIBUTES.map(lambda ours: own + _encoded(ours))),
    st.none() | st.sampled_from([0, 1, 1_700_000_000_000]),
)


async def publish_to_kafka(bootstrap: str, queue: str, letters: Sequence[Letter]) -> Collection[int]:
    """Publish by the client library alone."""
    async with AIOKafkaProducer(bootstrap_servers=bootstrap, linger_ms=5) as producer:
        waiting = []
        for letter in letters:
            key, headers, timestamp = letter.beside
            key = b"k" if letter.body is None and key is None else key  # the client sends nothing without both
            waiting.append(
                await producer.send(
                    queue, letter.body, key=key, headers=headers, timestamp_ms=timestamp,
                )
            )  # fmt: skip
        done = await asyncio.gather(*waiting, return_exceptions=True)
    return [letter.number for letter, result in zip(letters, done, strict=True) if isinstance(result, Exception)]


# --- SQLite ---------------------------------------------------------------------------------------

JSON: Final = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=10), inner, max_size=3),
    max_leaves=5,
)
COLUMNS: Final = st.sampled_from(
    [
        "id",
        "type",
        "source",
        "time",
        "content_type",
        "content_encoding",
        "correlation_id",
        "reply_to",
        "intent",
        "key",
    ]
    + ["key_bytes", "handler", "version", "attempt", "headers", "error", "origin", "other", "body", "queue"]
)
WORDS: Final = st.text(st.characters(exclude_categories=["Cs"]), max_size=9)
ROWS: Final = st.dictionaries(COLUMNS, JSON | WORDS | COUNTS | TIMES, max_size=5)
META: Final = (
    ROWS.map(json.dumps)
    | ROWS.map(lambda row: json.dumps(row, ensure_ascii=False))
    | ROWS.map(json.dumps)
    | JSON.map(json.dumps)
    | st.text(st.characters(exclude_categories=["Cs"]), max_size=20)
    | st.binary(max_size=20)
    | st.sampled_from(["", "{}", "{},{}", "]", "[" * 3000, '{"a": NaN}', '{"time": 1e400}'])
)
#: Metadata, key, how the body is stored.
SQLITE: Final = st.tuples(
    META,
    st.none() | WORDS | st.binary(max_size=9) | st.integers(0, 9),
    st.sampled_from([bytes, bytes, bytes.decode]),
)  # fmt: skip


def insert_into_sqlite(path: str, queue: str, letters: Sequence[Letter]) -> Collection[int]:
    """Write rows as they come, as somebody with the file would."""
    with sqlite3.connect(path, timeout=30) as database:
        [lane] = database.execute(
            "SELECT l.id FROM lanes l JOIN queues q ON q.id = l.queue WHERE q.name = ?", (queue,)
        ).fetchone()
        for letter in letters:
            meta, key, make = letter.beside
            body: Any = letter.body or b""
            try:
                body = make(body)
            except UnicodeDecodeError:
                pass
            [number] = database.execute("UPDATE sequence SET last = last + 1 RETURNING last").fetchone()
            database.execute("INSERT INTO messages VALUES (?, ?, ?, NULL, ?, ?)", (number, lane, key, meta, body))
            database.execute("INSERT INTO ready VALUES (?, ?, 0, ?)", (lane, number, key))
    database.close()
    return ()


# --- HTTP ------------------------------------------------------------------------------------------

#: Values that HTTP lets through: no line ends, no NUL.
HTTP_VALUES: Final = (
    CONTENT_TYPES.map(lambda value: value.encode("latin-1", "replace"))
    | TIMES.map(lambda value: value.encode("latin-1", "replace").translate(None, b"\0\r\n"))
    | st.sampled_from([b"\xff\xfe", b"%ff", b"%", b"a%20b", b"request", b"http://127.0.0.1:1/x", b"1", b"0", b"-5"])
    | st.binary(max_size=12).map(lambda value: bytes(byte for byte in value if byte >= 32 and byte != 127))
)
HTTP_NAMES: Final = st.sampled_from(
    [b"ce-id", b"ce-type", b"ce-source", b"ce-time", b"ce-subject", b"CE-Region", b"ce-correlationid", b"ce-replyto"]
    + [b"ce-intent", b"ce-partitionkey", b"ce-partitionkeybytes", b"ce-attempt", b"ce-dataversion", b"ce-errorqueue"]
    + [b"ce-errorfirst", b"ce-errormessage", b"ce-handler", b"ce-specversion", b"ce-datacontenttype", b"Content-Type"]
    + [b"X-A", b"x-a", b"X-Forwarded-For", b"Cookie", b"Accept", b"streamtools-headers", b"traceparent", b"Expect"]
)
#: Names that may stand in a request once.
_ONCE: Final = frozenset({b"content-type"})
HTTP: Final = st.tuples(st.lists(st.tuples(HTTP_NAMES, HTTP_VALUES), max_size=8), st.booleans())


async def post_to_http(url: str, queue: str, letters: Sequence[Letter]) -> Collection[int]:
    """Send requests byte by byte, some in chunks; those that were not answered 2xx were not taken."""
    address = urlsplit(url)
    slots = asyncio.Semaphore(20)

    async def post(letter: Letter) -> bool:
        async with slots:
            reader, writer = await asyncio.open_connection(address.hostname, address.port)
            writer.write(_request(queue, letter))
            async with asyncio.timeout(30):
                status = (await reader.readline()).split()[1]
            writer.close()
            return status.startswith(b"2")

    taken = await asyncio.gather(*(post(letter) for letter in letters))
    return [letter.number for letter, was_taken in zip(letters, taken, strict=True) if not was_taken]


def _request(queue: str, letter: Letter) -> bytes:
    headers, chunked = letter.beside
    body = letter.body or b""
    lines = [b"POST /%b HTTP/1.1" % quote(queue).encode(), b"Host: x", b"Connection: close"]
    seen: set[bytes] = set()
    for name, value in headers:
        if name.lower() not in _ONCE or name.lower() not in seen:
            lines.append(name + b": " + value)
        seen.add(name.lower())
    if chunked:
        lines.append(b"Transfer-Encoding: chunked")
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body)
    else:
        lines.append(b"Content-Length: %d" % len(body))
    return b"\r\n".join(lines) + b"\r\n\r\n" + body


# --- in-process -----------------------------------------------------------------------------------

ODD_TIMES: Final = st.none() | st.sampled_from([float("nan"), float("inf"), -1e18, 1.7e12, 0.0])
ASYNCIO: Final = st.fixed_dictionaries(
    {},
    optional={
        "type": TEXTS, "source": TEXTS, "content_type": CONTENT_TYPES, "content_encoding": ENCODINGS,
        "time": ODD_TIMES,
        "key": TEXTS | st.binary(max_size=9), "headers": st.dictionaries(TEXTS, TEXTS, max_size=4), "handler": TEXTS,
        "attempt": st.sampled_from([1, 2, 10**18]), "correlation_id": TEXTS, "version": st.integers(),
    },
)  # fmt: skip


def message_of(queue: str, letter: Letter) -> Message:
    """A message that some code of the same process has made."""
    return Message(**{"body": letter.body, "queue": queue, "id": f"letter-{letter.number}", **letter.beside})


# --- looking --------------------------------------------------------------------------------------


async def type_commands(url: str, queue: str) -> None:
    """Look at a queue as an operator does, in text and as JSON."""
    for command in (["errors", "list"], ["errors", "show", "--limit", "100000"]):
        for form in ([], ["--json"]):
            await asyncio.to_thread(_type, [*command, "--queue", queue, "--url", url, *form])
    for form in ([], ["--json"]):
        await asyncio.to_thread(_type, ["receive", queue, "--url", url, "--max", "1000", *form])


def _type(arguments: list[str]) -> None:
    output.out.cache_clear()
    output.err.cache_clear()
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, (arguments, result.output[-2000:], result.exception)
