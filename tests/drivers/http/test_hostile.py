"""Whatever bytes come in, each request costs itself alone: the next good one is answered."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import Iterator
from contextlib import suppress
from typing import Any, Literal

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, field_validator

from streamtools.drivers.http import HTTPConsumer, request_queue, responses
from streamtools.errors import Reject
from streamtools.message import Message
from streamtools.retry import Retry
from tests.drivers.http.conftest import QUICK, request, serving, talk
from tests.faults.waiting import wait_until

#: What HTTP itself lets through, and what it does not.
ODD = [b"\xff", b" ", b"\t", b":", b"%ff", b"%", b"%zz", b"\xc3\xbc", b"\xed\xb3\xbf", b"[", b"]", b"://", b"?", b"#"]
ODD += [b"*", b"/", b"..", b"\x80", b"&", b"=", b";", b",", b"a", b"orders", b"1", b'"', b"{", b"\\"]
WORSE = [b"\x00", b"\r", b"\n", b"\r\n", b"\x7f", b"\x01"]
PIECES = st.lists(st.sampled_from(ODD), max_size=6).map(b"".join)
ANYTHING = st.lists(st.sampled_from(ODD + WORSE) | st.binary(max_size=6), max_size=6).map(b"".join)
METHODS = st.sampled_from(
    [b"POST"] * 6 + [b"GET", b"GET", b"HEAD", b"PUT", b"DELETE", b"OPTIONS", b"CONNECT", b"TRACE"]
)
TARGETS = (
    st.sampled_from(
        [b"/orders"] * 8
        + [
            b"/orders?a=%ff",
            b"/orders?\xff=1",
            b"http://[/orders",
            b"http://x/orders",
            b"*",
            b"x:1",
            b"//",
            b"/orders#a",
        ]
        + [
            b"/search?tags=x",
            b"/search?\xc3\xbc=\xff",
            b"http://[::1]:99999/orders",
            b"http://a@b:c/",
            b"/search?a=1",
        ]
    )
    | PIECES.map(lambda piece: b"/search?" + piece.replace(b" ", b""))
    | PIECES.map(lambda piece: b"/" + piece)
)
NAMES = st.sampled_from(
    [b"Content-Type", b"Content-Type", b"Content-Encoding", b"Content-Encoding", b"Expect", b"Connection", b"Upgrade"]
    + [b"ce-id", b"ce-time", b"ce-attempt", b"ce-replyto", b"ce-expirytime", b"ce-deliverytime", b"ce-intent"]
    + [b"ce-errorqueue", b"ce-subject", b"streamtools-headers", b"X-A", b"x-a", b"Trailer", b"Cookie", b"Accept"]
    + [b"ce-partitionkey", b"ce-partitionkeybytes", b"ce-dataversion", b"ce-datacontenttype", b"ce-errorfirst"]
)
VALUES = (
    st.sampled_from(
        [b"text/plain; charset=\xff", b"application/json", b"text/plain", b"gzip", b"deflate", b"br", b"gzip, gzip"]
        + [
            b"100-continue",
            b"5",
            b"0",
            b"-1",
            b"99999999999999999999",
            b"close",
            b"keep-alive",
            b"upgrade",
            b"websocket",
        ]
        + [b"9999-12-31T23:59:59.9999999Z", b"nan", b"inf", b"1e400", b"text/plain; charset=punycode", b"\xff=\xfe&a"]
        + [
            b"application/cloudevents+json",
            b"application/cloudevents-batch+json",
            b"application/x-www-form-urlencoded",
        ]
        + [b"multipart/form-data; boundary=\xff", b"request", b"reply", b"http://127.0.0.1:1/a"]
    )
    | PIECES
)
BODIES = st.sampled_from(
    [b"{}", b'"text"', b"[" * 5000, b"\x1f\x8b\x08\x00", b'{"specversion":"1.0"}', b"[]", b'[{"specversion":"1.0"}]']
    + [b"a=1&a=2", b"\xff", b"1e999", b'"\\ud800"', b'{"fail":"\\u0000"}', b"", b"a=%ff&\xff", b"NaN", b"-" * 100]
) | st.binary(max_size=40)


@st.composite
def requests(draw: Any) -> bytes:
    """What may come in on a connection: nearly HTTP."""
    line = [draw(METHODS), draw(TARGETS), draw(st.sampled_from([b"HTTP/1.1"] * 6 + [b"HTTP/1.0", b"HTTP/2.0"]))]
    headers = [[name, draw(VALUES)] for name in draw(st.lists(NAMES, max_size=6))] + [[b"Host", b"x"]]
    body = draw(BODIES)
    if draw(st.integers(0, 3)) == 0:
        headers.append([b"Transfer-Encoding", b"chunked"])
        body = b"%x\r\n%b\r\n0\r\n\r\n" % (len(body), body) if body else b"0\r\n\r\n"
    else:
        headers.append([b"Content-Length", b"%d" % len(body)])
    if draw(st.integers(0, 3)) == 0:  # something that is not HTTP any more
        part = draw(st.sampled_from([line, *headers]))
        part[draw(st.integers(0, len(part) - 1))] = draw(ANYTHING)
    return b" ".join(line) + b"\r\n" + b"".join(b": ".join(each) + b"\r\n" for each in headers) + b"\r\n" + body


async def or_fail(msg: Any) -> Any:
    """Half of all messages fail, by their length."""
    if len(str(msg)) % 2 and msg != ["good"]:
        raise Reject(f"no: {msg!r} \udcff")
    return msg


async def knock(consumer: HTTPConsumer, data: bytes) -> None:
    """Send bytes, see what is answered at once, if anything is, and leave."""
    reader, writer = await asyncio.open_connection(*consumer.address)
    with suppress(TimeoutError, OSError):
        writer.write(data)
        async with asyncio.timeout(0.03):
            await reader.read(65536)
    writer.close()


@pytest.fixture
def tracebacks() -> Iterator[list[str]]:
    """What was logged with a traceback so far, from the loop or from us; handlers here raise nothing that has one."""
    found: list[str] = []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            if record.exc_info:
                found.append(f"{record.getMessage()}: {record.exc_info[1]!r}")

    handler = Keep()
    loggers = [logging.getLogger(name) for name in ("streamtools", "asyncio")]
    for logger in loggers:
        logger.addHandler(handler)
        logger.propagate = False  # thousands of expected lines
    yield found
    for logger in loggers:
        logger.removeHandler(handler)
        logger.propagate = True


async def test_no_bytes_on_a_connection_harm_the_next_request(tracebacks: list[str]) -> None:
    async with serving(or_fail, retry=QUICK, concurrency=4) as consumer, serving(or_fail, "search", method="GET"):
        loop = asyncio.get_running_loop()

        async def check(batch: list[bytes]) -> None:
            await asyncio.gather(*(knock(consumer, data) for data in batch))
            assert (await talk(consumer, request(body=b'["good"]'))).json() == ["good"]
            assert (await talk(consumer, request("GET", "/search?ab=1"))).status in (200, 422)

        @settings(max_examples=200, suppress_health_check=[HealthCheck.too_slow])
        @given(st.lists(requests() | st.binary(max_size=200), min_size=1, max_size=6))
        def property_holds(batch: list[bytes]) -> None:
            asyncio.run_coroutine_threadsafe(check(batch), loop).result(60)

        await asyncio.to_thread(property_holds)
    assert not tracebacks, tracebacks


@pytest.mark.parametrize(
    "header",
    [b"Content-Type: text/plain; charset=\xff", b"Content-Type: \xff", b"Content-Encoding: \xff", b"X-\xc3: \xff"]
    + [b"ce-id: \xff", b"ce-subject: %ff", b"ce-type: \xed\xb3\xbf", b"ce-attempt: \xff", b"ce-expirytime: \xff"]
    + [b"streamtools-headers: \xff=%ff", b"ce-replyto: \xff", b"Expect: \xff", b"Connection: \xff"],
)
@pytest.mark.parametrize("handler", [str, Message])
async def test_bytes_that_are_no_text_in_a_header_cost_one_request_at_most(header: bytes, handler: Any) -> None:
    async def reject(msg: Any) -> None:
        raise Reject(str(msg) + str(msg.headers) + str(msg.content_type) if isinstance(msg, Message) else msg)

    reject.__annotations__["msg"] = handler
    data = b"POST /orders HTTP/1.1\r\nHost: x\r\n" + header + b'\r\nContent-Length: 3\r\n\r\n"a"'
    async with serving(reject) as consumer:
        loop = consumer._loop
        for _ in range(6):
            assert (await talk(consumer, data)).status in (400, 422)
        assert (await talk(consumer, request(body=b'"good"'))).status == 422
        assert consumer._loop is loop, "it is the same loop: none was begun anew"


@pytest.mark.parametrize("error", [Reject("no \udcff"), Reject("\ud800" * 10), ValueError("\udcff"), Reject("\x00")])
async def test_what_a_handler_raises_is_answered_whatever_its_text_holds(error: Exception) -> None:
    async def fail(msg: Any) -> None:
        raise error

    async with serving(fail, retry=Retry(retries=0)) as consumer:
        for _ in range(7):
            reply = await talk(consumer, request(body=b"{}"))
            assert reply.status == (422 if isinstance(error, Reject) else 500)
            assert reply.json()["error"]


async def test_a_value_whose_text_is_no_text_is_answered_500() -> None:
    async def echo(msg: Any) -> str:
        return "\udcff"

    async with serving(echo) as consumer:
        assert [(await talk(consumer, request(body=b"{}"))).status for _ in range(7)] == [500] * 7


async def test_an_answer_that_cannot_be_made_is_500_for_that_request_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = responses._result_response

    def value(result: Any, message: Message) -> Any:
        if message.body == b"99":
            raise RuntimeError("the answer to this one cannot be made")
        return real(result, message)

    monkeypatch.setattr(responses, "_result_response", value)
    async with serving(or_fail, concurrency=8) as consumer:
        bodies = [b"10", b"99", b"20"] * 4
        replies = await asyncio.gather(*(talk(consumer, request(body=body)) for body in bodies))
    assert [reply.status for reply in replies] == [200, 500, 200] * 4


async def test_a_request_that_cannot_become_a_message_is_500_alone(monkeypatch: pytest.MonkeyPatch) -> None:
    real = request_queue.decode_headers

    def decode(raw: Any) -> Any:
        if any(name == b"X-Bad" for name, _ in raw):
            raise RuntimeError("not foreseen")
        return real(raw)

    monkeypatch.setattr(request_queue, "decode_headers", decode)
    async with serving(or_fail) as consumer:
        assert (await talk(consumer, request(body=b"10", X_Bad="1"))).status == 500
        assert (await talk(consumer, request(body=b"10"))).status == 200


@pytest.mark.parametrize("reset", [False, True])
@pytest.mark.parametrize("head", [b"Content-Length: 100\r\n\r\nabc", b"Transfer-Encoding: chunked\r\n\r\n4\r\nabc"])
async def test_a_client_that_leaves_while_its_body_arrives_is_one_line_at_debug(
    head: bytes, reset: bool, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.DEBUG, logger="streamtools")
    async with serving(or_fail) as consumer:
        for _ in range(20):
            _, writer = await asyncio.open_connection(*consumer.address)
            writer.write(b"POST /orders HTTP/1.1\r\nHost: x\r\n" + head)
            await wait_until(lambda: bool(consumer._requests._reading))  # type: ignore[union-attr]
            writer.transport.abort() if reset else writer.close()
            await wait_until(lambda: not consumer._requests._reading)  # type: ignore[union-attr]
        assert (await talk(consumer, request(body=b"10"))).status == 200
    lines = [record for record in caplog.records if "left while the body" in record.getMessage()]
    assert [(r.levelno, r.exc_info) for r in lines] == [(logging.DEBUG, None)] * 20
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


async def test_a_client_that_leaves_while_its_refused_body_arrives_is_no_error(
    caplog: pytest.LogCaptureFixture,
) -> None:
    async with serving(or_fail) as consumer:
        for path in (b"/nowhere", b"/orders"):
            _, writer = await asyncio.open_connection(*consumer.address)
            writer.write(b"PUT " + path + b" HTTP/1.1\r\nHost: x\r\nContent-Length: 100\r\n\r\nabc")
            writer.close()
        assert (await talk(consumer, request(body=b"10"))).status == 200
    assert not [r for r in caplog.records if r.levelno > logging.INFO]


@pytest.mark.parametrize("target", ["http://[/orders", "x:1", "*", "http://[::1]:x/orders", "//", "%ff", "/%ff"])
@pytest.mark.parametrize("method", ["POST", "CONNECT", "OPTIONS"])
async def test_a_target_that_is_none_is_refused_and_its_connection_does_not_stay_open(
    target: str, method: str, tracebacks: list[str]
) -> None:
    async with serving(or_fail) as consumer:
        reply = await talk(consumer, request(method, target, b"10"))
        assert reply.status in (400, 404, 405)
        assert (await talk(consumer, request(body=b"10"))).status == 200
    assert not tracebacks


class Thing(BaseModel):
    kind: Literal["a", "b"]
    sizes: list[int]

    @field_validator("kind", mode="before")
    @classmethod
    def quote(cls, value: object) -> object:
        if isinstance(value, str) and len(value) > 1:
            raise ValueError(f"{value} is no kind")
        return value


@pytest.mark.parametrize(
    "body",
    [
        b"[" + b"{}," * 300_000 + b"{}]",
        b'[{"sizes":[' + b'"x",' * 200_000 + b'"x"]}]',
        b'[{"kind":"' + b"x" * 900_000 + b'"}]',
        b'[{"sizes":{"' + b"k" * 900_000 + b'":1}}]',
        b'["' + b"\xc3\xbc" * 400_000 + b'"]',
        b"[" * 900_000,
        b'{"a":' * 150_000,
    ],
)
async def test_a_body_that_is_wrong_in_many_places_is_answered_in_a_few_kilobytes(body: bytes) -> None:
    async def handler(msg: list[Thing]) -> None:
        pass

    async with serving(handler) as consumer:
        reply = await talk(consumer, request(body=body, Content_Type="application/json"))
    assert (reply.status in (400, 422), len(reply.body) < 20_000) == (True, True)
    assert len(reply.json().get("errors", ())) <= responses.PROBLEMS


async def test_what_a_handler_says_of_a_message_it_rejects_is_cut_in_the_answer() -> None:
    async def reject(msg: str) -> None:
        raise Reject(f"no: {msg}")

    async with serving(reject) as consumer:
        reply = await talk(consumer, request(body=b"\xc3\xbc" * 500_000, Content_Type="text/plain"))
    assert (reply.status, len(reply.body) < 20_000) == (422, True)


@pytest.mark.parametrize("rest", [b"\n", b"\r\n", b"\r\nContent-Length: 4\r\n"])
async def test_a_request_without_a_target_is_refused(rest: bytes, tracebacks: list[str]) -> None:
    async with serving(or_fail) as consumer:
        assert (await talk(consumer, b"CONNECT " + rest + b"Host: x\r\n\r\n" + b'"x",')).status in (400, 404)
        assert (await talk(consumer, request(body=b"10"))).status == 200
    assert not tracebacks
