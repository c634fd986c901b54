"""Odd messages and odd handlers: each gets its verdict, and the consumer lives."""

from __future__ import annotations

import secrets
import socket
import sys
from collections.abc import AsyncIterator, Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

from streamtools import Message
from streamtools.testing import eventually
from streamtools.testing.conformance.payloads import HEADERS
from streamtools.testing.conformance.stage import NEVER, Stage
from tests.chaos.conftest import DURABLE, address
from tests.chaos.tally import show


class Unreadable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise RuntimeError("no text")


@dataclass(frozen=True)
class Odd:
    """One odd thing.

    Attributes:
        raised: what the handler ends by; None if it just returns.
        body: of the message.
        content_type: what its sender says that it is.
        rejected: its verdict; else it is handled.
    """

    raised: Callable[[], object] | None = None
    body: bytes = b'{"a":1}'
    content_type: str | None = "application/json"
    rejected: bool = True


def raise_(error: BaseException) -> Callable[[], object]:
    def act() -> object:
        raise error

    return act


CASES = {
    "200-KB-exception": Odd(raise_(RuntimeError("ä" * 100_000))),
    "unreadable-exception": Odd(raise_(Unreadable())),
    "sys.exit": Odd(lambda: sys.exit(3)),
    "SystemExit": Odd(raise_(SystemExit("the end"))),
    "KeyboardInterrupt": Odd(raise_(KeyboardInterrupt())),
    "GeneratorExit": Odd(raise_(GeneratorExit())),
    "StopIteration": Odd(raise_(StopIteration(1))),
    "undecodable-body": Odd(body=b'\xff\xfe{"a'),
    "cut-body": Odd(body=b'{"a":'),
    "0-bytes-of-json": Odd(body=b""),
    "0-bytes": Odd(body=b"", content_type="application/octet-stream", rejected=False),
    "random-bytes": Odd(body=secrets.token_bytes(5000), content_type="application/octet-stream", rejected=False),
    "odd-headers": Odd(rejected=False),
}


@pytest.fixture(params=["asyncio", *DURABLE, "http"])
async def stage(request: pytest.FixtureRequest, tmp_path: Path) -> AsyncIterator[Stage]:
    """A queue of its own on each protocol."""
    protocol = request.param
    if protocol == "http":
        with socket.create_server(("127.0.0.1", 0)) as free:
            url = f"http://127.0.0.1:{free.getsockname()[1]}"
    else:
        url = address(request, protocol, tmp_path)
    stage = Stage(protocol, url, "orders")
    yield stage
    await stage.close()


class Handler:
    """Does what the odd message is meant to make it do; keeps what it was given."""

    def __init__(self) -> None:
        self.seen: list[Message] = []

    def act(self, body: Any, message: Message) -> None:
        """As a `def` handler."""
        self.seen.append(message)
        if (case := CASES.get(message.type or "")) is not None and case.raised is not None:
            case.raised()

    async def act_async(self, body: Any, message: Message) -> None:
        """As an `async def` handler."""
        self.act(body, message)


@pytest.mark.slow
@pytest.mark.timeout(120)
@pytest.mark.parametrize("kind", ["async def", "def"])
async def test_each_odd_message_gets_its_verdict_and_the_consumer_lives(stage: Stage, kind: str) -> None:
    handler = Handler()
    handled = rejected = lived = 0
    async with stage.running(handler.act if kind == "def" else handler.act_async, retry=NEVER, concurrency=2):
        producer = await stage.producer()
        for name, case in CASES.items():
            handler.seen.clear()
            message = Message(
                body=case.body, queue="orders", id=name, type=name, content_type=case.content_type, headers=HEADERS
            )
            sent = await stage._begin(producer.send_messages([message]))
            if case.rejected:
                check_rejected(message, await stage.rejected(sent))
                rejected += 1
            else:
                await eventually(lambda: handler.seen, f"{name} is handled")
                await sent
                assert (handler.seen[0].body, handler.seen[0].headers) == (case.body, HEADERS)
                handled += 1
            await stage.send("still alive?", type="alive")
            await eventually(lambda: handler.seen and handler.seen[-1].type == "alive", f"it lives after {name}")
            lived += 1

    show(
        f"odd messages on {stage.protocol}, {kind}", sent=len(CASES), handled=handled, rejected=rejected,
        consumer_lived_after=lived,
    )  # fmt: skip
    assert (handled + rejected, lived) == (len(CASES), len(CASES))


def check_rejected(sent: Message, failed: Message | None) -> None:
    """The error queue, where there is one, has it whole, and why; and no more than travels everywhere."""
    if failed is None:
        return
    assert (failed.id, failed.body, failed.headers) == (sent.id, sent.body, HEADERS)
    assert failed.error is not None
    assert failed.error.exception
    assert len(failed.error.reason.encode()) <= 2048
    assert len(failed.error.traceback.encode()) <= 8192
