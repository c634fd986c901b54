"""Random inputs where others' bytes come in: nothing leaves, nothing stands still, nothing grows."""

from __future__ import annotations

import datetime
import random
import struct
import sys
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from types import SimpleNamespace
from typing import Annotated, Any, Literal

import pytest
from aiokafka import TopicPartition
from pydantic import BaseModel, Field
from typer.testing import CliRunner

from streamtools import Message, Retry, codec
from streamtools.cli import output
from streamtools.cli.app import app
from streamtools.compat.pikabus import PikaBus
from streamtools.drivers.kafka.producing.record import records_of
from streamtools.drivers.kafka.records import decode_origin, read_record
from streamtools.drivers.rabbitmq.amqp import properties
from streamtools.drivers.rabbitmq.names import check_rabbitmq_reply
from streamtools.drivers.sqlite import rows
from streamtools.engine.messages.envelope import event_type, unwrapped
from streamtools.engine.messages.failures import describe, error_copy, redrive_copy, retry_copy
from streamtools.engine.messages.origin import failed_in_queue
from streamtools.engine.messages.smaller import lesser_copies
from streamtools.engine.replies import ReplyRule
from streamtools.errors import ConfigurationError, DecodeError, SendError
from streamtools.message import ErrorDetails
from streamtools.text.escaping import escaped
from streamtools.wire import decode_meta, encode_meta
from tests.fuzz.fuzzing import SECONDS, fuzz

pytestmark = [
    pytest.mark.skipif(sys.platform != "linux", reason="it reads its memory in /proc"),
    pytest.mark.timeout(SECONDS + 120),
]


RULE = ReplyRule(check_rabbitmq_reply, ["*.replies.*"], ["error"])


def judged(message: Message) -> list[Message]:
    """What may become of a message: a retry, the error queue, ever smaller copies, back to work."""
    error = ValueError(message.id)
    details = describe(message, error, "handler")
    verdict = Retry().decide(error, message.attempt)
    failed = error_copy(message, details, f"{message.queue}.error")
    copies = [retry_copy(message, details, verdict.delay), failed, *lesser_copies(failed), redrive_copy(failed)]
    assert failed_in_queue(failed) == message.queue
    failed_in_queue(message)
    assert 1 <= message.attempt <= 10**9
    assert escaped(repr(message)).isprintable()
    with suppress(ConfigurationError):
        RULE.check(message.reply_to or "")
    return copies


def test_amqp_properties() -> None:
    def check(data: bytes, chance: random.Random) -> None:
        for header in (data, struct.pack(">HI", 0x2000, len(data)) + data):  # all of it, or the headers alone
            message, count = properties.decode(
                header, data[:20], "orders", lambda: "new", redelivered=chance.random() < 0.5
            )
            assert count >= 0
            if len(header) >= 2:
                properties.without_counts(header)
            for copy in judged(message):
                try:
                    written = properties.encode(copy)
                except SendError:
                    continue
                again, _ = properties.decode(written, b"", "orders", lambda: "new")
                assert again.attempt == copy.attempt or again.id

    fuzz("amqp", check)


def record(data: bytes) -> Any:
    """A record of Kafka: the headers' names and values, the key and the value stand in lines."""
    parts = data.split(b"\n")
    headers = [
        (parts[n].decode("utf-8", "backslashreplace"), parts[n + 1] or None) for n in range(2, len(parts) - 1, 2)
    ]
    return SimpleNamespace(
        topic="orders", partition=0, offset=5, key=parts[0] or None, value=parts[1] if len(parts) > 1 else None,
        headers=headers, timestamp=int.from_bytes(data[:8], "big", signed=True), timestamp_type=0,
    )  # fmt: skip


def test_kafka_records() -> None:
    place = TopicPartition("orders", 0)

    def check(data: bytes, chance: random.Random) -> None:
        found = record(data)
        message, trouble = read_record(found, place)
        assert trouble is None or isinstance(trouble, DecodeError)
        decode_origin(found, place)
        for copy in judged(message):
            try:
                records_of([copy], read=found.headers)
            except SendError:
                continue

    fuzz("kafka", check)


def test_sqlite_rows() -> None:
    def check(data: bytes, chance: random.Random) -> None:
        metas, _, body = data.partition(b"\n\n")
        found = metas.split(b"\n")[:10]
        count, between = len(found), rows.BETWEEN.encode()
        claimed = rows.Claimed(
            1, 1, list(range(count)), [0] * count, [len(body)] * count, between.join(found), body * count
        )
        for message, trouble, _ in claimed.messages("orders"):
            assert trouble is None or isinstance(trouble, DecodeError)
            for copy in judged(message):
                try:
                    rows.encode(copy)
                except ValueError:  # told as a refusal
                    continue

    fuzz("sqlite", check)


class Order(BaseModel):
    id: int
    when: datetime.datetime | None = None
    items: list[Order] = []
    by: dict[str, float] = {}


class Cat(BaseModel):
    kind: Literal["cat"]
    age: Annotated[int, Field(gt=0)]


ANNOTATIONS: list[Any] = [
    Order, list[Order], dict[str, Any], Any, str, bytes, int, float, set[int], dict[int, int], list[Cat | Order],
    Order | None, str | int, datetime.timedelta, Annotated[Cat | Order, Field(union_mode="left_to_right")], Message,
]  # fmt: skip
CONTENT_TYPES = [None, codec.JSON, codec.TEXT, "application/x-www-form-urlencoded", codec.BATCH, codec.BINARY]
CONTENT_TYPES += ["application/cloudevents+json", "text/plain; charset=utf-16", "text/plain; charset=punycode", "x"]
ENCODINGS = [None, None, None, "gzip", "deflate", "gzip, gzip", "br", "utf-8", "\0"]
DECODERS = [codec.decoder(annotation) for annotation in ANNOTATIONS]


def test_bodies() -> None:
    def check(data: bytes, chance: random.Random) -> None:
        message = Message(
            body=data, queue="orders", id="1", content_type=chance.choice(CONTENT_TYPES),
            content_encoding=chance.choice(ENCODINGS), error=ErrorDetails(queue="orders"),
        )  # fmt: skip
        event_type(message)
        try:
            inner = unwrapped(message) if message.enveloped else message
            chance.choice(DECODERS)(inner)
        except DecodeError as error:
            assert len(str(error)) < 20_000
        else:
            judged(inner)

    fuzz("bodies", check)


async def _no_binding(queue: str) -> None: ...


def test_headers_of_the_bus() -> None:
    style = PikaBus("PikaBus", _no_binding)

    def check(data: bytes, chance: random.Random) -> None:
        words = [
            part.decode("utf-8", "surrogateescape" if chance.random() < 0.2 else "replace")
            for part in data.split(b"\n")
        ]
        meta = dict(zip(words[::2], words[1::2], strict=False))
        fields = {"id": "1", **decode_meta(meta)}
        message = Message(body=b"{}", queue="orders", headers=meta, **fields)
        for read in (message, style.read(message)):
            for copy in judged(read):
                encode_meta(copy)
                style.read(style.write(copy))

    fuzz("headers", check)


@pytest.fixture
def cli(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[CliRunner]:
    monkeypatch.setenv("STREAMTOOLS_URL", f"sqlite:///{tmp_path}/fuzz.db")
    monkeypatch.chdir(tmp_path)
    output.out.cache_clear()
    output.err.cache_clear()
    yield CliRunner()
    output.out.cache_clear()
    output.err.cache_clear()


#: Options that would keep a command waiting, or write beside the test's directory.
NOT_TRIED = {"--follow", "-f", "--workers", "--reload", "--watch", "--parent", "--timeout", "--url", "run", "demo"}


def test_the_command_line(cli: CliRunner, tmp_path: Path) -> None:
    def check(data: bytes, chance: random.Random) -> None:
        line, _, content = data.partition(b"\n\n")
        (tmp_path / "input").write_bytes(content)
        words = [word.decode("utf-8", "surrogateescape").replace("\0", "") for word in line.split(b"\n")]
        words = [word[:5000] for word in words if not any(word.startswith(bad) for bad in NOT_TRIED)]
        result = cli.invoke(
            app, [*words, "--yes"] if "redrive" in words and chance.random() < 0.5 else words, input=content
        )
        if result.exception is not None and not isinstance(result.exception, SystemExit):
            raise result.exception
        assert result.exit_code in (0, 1, 2)
        for text in (result.stdout, result.stderr):
            assert all(c.isprintable() or c in "\n\t" for c in text), text[:500]

    fuzz("cli", check, still=2.0)  # each command starts a loop and opens a file
