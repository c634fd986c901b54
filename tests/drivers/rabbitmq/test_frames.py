"""The hot path's frames and properties, against an independent codec (pamqp) and against arbitrary cuts."""

from __future__ import annotations

import asyncio
from typing import Any

import pamqp.frame
import pytest
from hypothesis import given
from hypothesis import strategies as st
from pamqp import commands
from pamqp.body import ContentBody
from pamqp.header import ContentHeader

from streamtools.drivers.rabbitmq.amqp import frames, properties
from streamtools.drivers.rabbitmq.amqp.fast_channel import FastChannel
from streamtools.drivers.rabbitmq.amqp.frame_reader import FrameReader
from streamtools.drivers.rabbitmq.amqp.frames import Unsendable
from streamtools.message import ErrorDetails, Message

FRAME_MAX = 131_072
TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=300)
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=60).filter(
    lambda name: not name.lower().startswith("streamtools-")
)
MOMENTS = st.floats(0, 4e9).map(lambda seconds: round(seconds, 5))
MESSAGES = st.builds(
    Message,
    body=st.binary(max_size=50),
    queue=st.just("q"),
    id=TEXT.filter(bool),
    type=st.none() | TEXT.filter(bool),
    source=st.none() | TEXT.filter(bool),
    time=st.none() | MOMENTS,
    content_type=st.none() | TEXT.filter(bool),
    content_encoding=st.none() | TEXT.filter(bool),
    correlation_id=st.none() | TEXT.filter(bool),
    causation_id=st.none() | TEXT,
    reply_to=st.none() | TEXT.filter(bool),
    intent=st.none() | st.sampled_from(["command", "event"]),
    key=st.none() | TEXT,
    headers=st.dictionaries(NAMES, TEXT, max_size=5),
    attempt=st.integers(1, 10_000),
    deliver_at=st.none() | MOMENTS,
    expires_at=st.none() | MOMENTS,
    error=st.none() | st.builds(ErrorDetails, queue=TEXT.filter(bool), reason=TEXT, attempts=st.integers(0, 99)),
)


def _read(message: Message) -> Message:
    read, _ = properties.decode(properties.encode(message), message.body, "q", lambda: "new")
    return read


class TestProperties:
    @given(MESSAGES)
    def test_what_is_written_is_read_back(self, message: Message) -> None:
        read = _read(message)

        for name in ("deliver_at", "expires_at", "time"):
            if (moment := getattr(message, name)) is not None:
                assert getattr(read, name) == pytest.approx(moment, abs=2e-6)
                message = message.replace(**{name: getattr(read, name)})
        assert read == message

    @given(MESSAGES)
    def test_another_codec_reads_the_same(self, message: Message) -> None:
        data = frames.header_frame(1, properties.encode(message), len(message.body), FRAME_MAX)

        _, channel, header = pamqp.frame.unmarshal(data)

        assert channel == 1
        assert isinstance(header, ContentHeader)
        assert header.body_size == len(message.body)
        assert header.properties.delivery_mode == 2
        if len(message.id.encode()) <= 255:
            assert header.properties.message_id == message.id
        for name, value in message.headers.items():
            if name.lower() not in properties.BROKER_HEADERS:
                assert (header.properties.headers or {})[name] == value

    @pytest.mark.parametrize("name", ["CC", "bcc", "x-death", "x-delivery-count", "x-first-death-queue"])
    def test_a_user_header_that_the_broker_would_act_on_goes_under_another_name(self, name: str) -> None:
        message = Message(body=b"", queue="q", id="1", headers={name: "mine"})

        _, _, header = pamqp.frame.unmarshal(frames.header_frame(1, properties.encode(message), 0, FRAME_MAX))

        assert name not in header.properties.headers
        assert _read(message).headers == {name: "mine"}

    def test_a_foreign_message_with_every_kind_of_header_is_read(self) -> None:
        headers: dict[str, Any] = {
            "n": 5, "big": 2**40, "f": 1.5, "t": True, "none": None, "list": [1, {"a": "b"}],
            "table": {"x": [1, 2]}, "bytes": bytearray(b"\xff\x00"),
        }  # fmt: skip
        data = ContentHeader(properties=commands.Basic.Properties(headers=headers, priority=3)).marshal()

        message, count = properties.decode(data[12:], b"body", "q", lambda: "new")

        assert count == 0
        assert message.id == "new"
        assert message.headers["n"] == "5"
        assert message.headers["big"] == str(2**40)
        assert message.headers["t"] == "true"
        assert message.headers["none"] == "null"
        assert message.headers["list"] == '[1, {"a": "b"}]'
        assert message.headers["table"] == '{"x": [1, 2]}'

    @pytest.mark.parametrize(
        ("queues", "reason"),
        [
            (["streamtools.delay.01", "streamtools.delay.00"], None),
            (["streamtools.delay.01", "orders"], "the broker moved it here from 'orders': its time to live was over"),
            (["orders"], "the broker moved it here from 'orders': its time to live was over"),
            ([], None),
        ],
    )
    def test_to_have_been_deferred_is_no_failure_and_to_have_expired_is(
        self, queues: list[str], reason: str | None
    ) -> None:
        deaths = [{"queue": queue, "reason": "expired", "count": 1} for queue in queues]
        headers: dict[str, Any] = {"x-death": deaths, "after": "it"}
        data = ContentHeader(properties=commands.Basic.Properties(headers=headers)).marshal()

        message, _ = properties.decode(data[12:], b"body", "q", lambda: "new")

        assert message.headers == {"after": "it"}
        assert (message.error and message.error.reason.removesuffix(" (expired)")) == reason

    @pytest.mark.parametrize("deaths", ["text", 7, True, None, {"a": 1}])
    def test_deaths_of_another_kind_are_read_over(self, deaths: Any) -> None:
        headers: dict[str, Any] = {"x-death": deaths, "after": "it"}
        data = ContentHeader(properties=commands.Basic.Properties(headers=headers)).marshal()

        message, _ = properties.decode(data[12:], b"body", "q", lambda: "new")

        assert message.headers == {"after": "it"}
        assert message.error is None

    @given(st.binary(max_size=80))
    def test_nothing_that_arrives_makes_reading_fail(self, data: bytes) -> None:
        message, _ = properties.decode(data, b"body", "q", lambda: "new")

        assert message.body == b"body"

    def test_a_header_name_over_255_bytes_is_refused_by_name(self) -> None:
        with pytest.raises(Unsendable, match="255"):
            properties.encode(Message(body=b"", queue="q", id="1", headers={"ü" * 200: "x"}))

    def test_headers_over_the_frame_are_refused(self) -> None:
        with pytest.raises(Unsendable, match="frame_max"):
            frames.header_frame(1, b"x" * FRAME_MAX, 0, FRAME_MAX)


class TestFrames:
    def test_a_publish_frame_is_what_the_other_codec_writes(self) -> None:
        expected = pamqp.frame.marshal(commands.Basic.Publish(exchange="ex", routing_key="rk", mandatory=True), 7)

        assert frames.publish_frame(7, "ex", "rk") == expected

    def test_settling_frames_are_what_the_other_codec_writes(self) -> None:
        ack = pamqp.frame.marshal(commands.Basic.Ack(delivery_tag=9, multiple=True), 3)
        nack = pamqp.frame.marshal(commands.Basic.Nack(delivery_tag=9, multiple=False, requeue=True), 3)

        assert frames.ack_frame(3, 9, multiple=True) == ack
        assert frames.release_frame(3, 9) == nack

    @pytest.mark.parametrize("size", [0, 1, 92, 93, 184, 185, 1000])
    def test_a_body_is_split_at_the_largest_frame(self, size: int) -> None:
        data = frames.body_frames(1, bytes(size), 100)

        read = b""
        while data:
            used, _, frame = pamqp.frame.unmarshal(data)
            assert isinstance(frame, ContentBody)
            assert used <= 100
            read += frame.value
            data = data[used:]
        assert read == bytes(size)


class Recorder(FastChannel):
    """Keeps what arrives."""

    def __init__(self, number: int) -> None:
        super().__init__(number)
        self.seen: list[tuple[Any, ...]] = []

    def deliver(self, tag: int, redelivered: bool, properties: bytes, body: bytes) -> None:
        self.seen.append(("deliver", tag, redelivered, body))

    def returned(self, routing_key: str, properties: bytes, body: bytes) -> None:
        self.seen.append(("return", routing_key, body))

    def confirm(self, tag: int, *, multiple: bool, held: bool) -> None:
        self.seen.append(("confirm", tag, multiple, held))

    def fail(self, why: str) -> None:
        self.seen.append(("fail", why))


def _content(channel: int, body: bytes, most: int) -> bytes:
    header = pamqp.frame.marshal(ContentHeader(body_size=len(body), properties=commands.Basic.Properties()), channel)
    return header + frames.body_frames(channel, body, most)


def _stream() -> tuple[bytes, list[tuple[Any, ...]], bytes]:
    """Bytes as a broker sends them, what an attached channel 1 is to see of them, and what the library is."""
    deliver = commands.Basic.Deliver(consumer_tag="c", delivery_tag=5, redelivered=True, exchange="", routing_key="q")
    back = commands.Basic.Return(reply_code=312, reply_text="NO_ROUTE", exchange="e", routing_key="gone")
    heartbeat = frames.HEARTBEAT_FRAME
    qos = pamqp.frame.marshal(commands.Basic.QosOk(), 1)
    other = pamqp.frame.marshal(deliver, 2) + _content(2, b"other", 4096)
    cancel = pamqp.frame.marshal(commands.Basic.Cancel(consumer_tag="c", nowait=True), 1)
    stream = [
        heartbeat,
        pamqp.frame.marshal(deliver, 1), _content(1, b"x" * 300, 100),
        qos,
        pamqp.frame.marshal(deliver, 1), _content(1, b"", 100),
        other,
        pamqp.frame.marshal(commands.Basic.Ack(delivery_tag=4, multiple=True), 1),
        pamqp.frame.marshal(commands.Basic.Nack(delivery_tag=5), 1),
        pamqp.frame.marshal(back, 1), _content(1, b"returned", 4096),
        cancel,
    ]  # fmt: skip
    seen = [
        ("deliver", 5, True, b"x" * 300),
        ("deliver", 5, True, b""),
        ("confirm", 4, True, True),
        ("confirm", 5, False, False),
        ("return", "gone", b"returned"),
    ]
    return b"".join(stream), seen, heartbeat + qos + other + cancel


class TestReader:
    @given(st.lists(st.integers(1, 120), min_size=1))
    def test_however_the_stream_is_cut_each_frame_goes_where_it_belongs(self, cuts: list[int]) -> None:
        stream, seen, passed = _stream()

        async def feed() -> tuple[Recorder, bytes]:
            loop = asyncio.get_running_loop()
            reader = asyncio.StreamReader(loop=loop)
            protocol = FrameReader(reader, lambda why: None, loop)
            channel = Recorder(1)
            protocol.attach(channel)
            protocol.opened.add(2)
            rest, sizes = stream, cuts * (len(stream) // sum(cuts) + 1)
            for size in sizes:
                protocol.data_received(rest[:size])
                rest = rest[size:]
            protocol.data_received(rest) if rest else None
            reader.feed_eof()
            return channel, await reader.read()

        channel, library = asyncio.run(feed())

        assert channel.seen[:-1] == seen
        assert channel.seen[-1][0] == "fail"
        assert library == passed

    async def test_what_is_not_amqp_ends_the_connection_with_a_reason(self) -> None:
        loop = asyncio.get_running_loop()
        reasons: list[str] = []
        reader = asyncio.StreamReader(loop=loop)
        protocol = FrameReader(reader, reasons.append, loop)

        protocol.data_received(b"\x01\x00\x00\x00\x00\x00\x01xy")

        assert "not AMQP" in reasons[0]

    async def test_a_greeting_in_another_version_is_left_to_the_library(self) -> None:
        loop = asyncio.get_running_loop()
        reader = asyncio.StreamReader(loop=loop)
        protocol = FrameReader(reader, lambda why: None, loop)

        protocol.data_received(b"AMQP\x00\x00\x09\x01")

        assert await reader.readexactly(8) == b"AMQP\x00\x00\x09\x01"
