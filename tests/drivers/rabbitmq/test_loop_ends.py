"""The end of an event loop is an orderly one for its connections, however it ends and whatever was left open."""

from __future__ import annotations

import asyncio
import logging
import signal
from collections.abc import Callable, Coroutine, Iterator
from contextlib import suppress
from typing import Any

import pytest

from streamtools import Consumer, Producer
from streamtools.drivers.rabbitmq.amqp import connection
from streamtools.drivers.rabbitmq.consuming import subscription
from tests.core.test_event_loops import InThread
from tests.faults.amqp import RefusingBroker
from tests.faults.waiting import wait_until

Work = Coroutine[Any, Any, None]


def _by_runner(work: Work) -> None:
    with asyncio.Runner() as runner:
        runner.run(work)


def _by_uvloop(work: Work) -> None:
    pytest.importorskip("uvloop").run(work)


def _cancelled(work: Work) -> None:
    async def main() -> None:
        await work
        task = asyncio.current_task()
        assert task is not None
        task.cancel()
        await asyncio.sleep(0)

    with suppress(asyncio.CancelledError):
        asyncio.run(main())


def _interrupted(work: Work) -> None:
    async def main() -> None:
        await work
        signal.raise_signal(signal.SIGINT)
        await asyncio.Event().wait()

    # Whoever starts the tests in the background has SIGINT ignored.
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    try:
        with suppress(KeyboardInterrupt):
            asyncio.run(main())
    finally:
        signal.signal(signal.SIGINT, before)


@pytest.fixture
def broker() -> Iterator[RefusingBroker]:
    """Takes everything, in a thread of its own."""
    with InThread() as other:
        made = RefusingBroker("", 0, "", times=0)
        other.run(made.__aenter__())
        yield made
        other.run(made.__aexit__(None, None, None))


async def _leave_open(url: str) -> None:
    """One that receives by hand, one that runs, and one that sends."""
    await Consumer("orders", url=url).open()
    runs = Consumer("parcels", url=url)

    @runs()
    async def handle(message: bytes) -> None: ...

    running = asyncio.create_task(handle())
    await wait_until(lambda: runs.connected)
    await Producer("orders", url=url).send(b"x")
    del running


@pytest.mark.parametrize("host", [asyncio.run, _by_runner, _by_uvloop, _cancelled, _interrupted])
def test_what_was_left_open_says_goodbye_and_waits_for_the_answer(
    broker: RefusingBroker, host: Callable[[Work], None]
) -> None:
    host(_leave_open(broker.url))
    assert (broker.connections, broker.left_early) == (2, 0)
    # The answer to a cancel comes once the queue has the acknowledgements before it.
    assert broker.asked.count("Basic.Cancel") == 2
    last = {name: len(broker.asked) - broker.asked[::-1].index(name) for name in ("Basic.Cancel", "Connection.Close")}
    assert last["Basic.Cancel"] < last["Connection.Close"]


def test_a_close_that_the_end_of_the_loop_meets_is_orderly(broker: RefusingBroker) -> None:
    async def main() -> None:
        receiver = await Consumer("orders", url=broker.url).open()
        closing = asyncio.create_task(receiver.close())
        await wait_until(lambda: "Basic.Cancel" in broker.asked)
        del closing

    asyncio.run(main())
    assert broker.left_early == 0


@pytest.mark.parametrize("mute", [{"Connection.Close"}, {"Basic.Cancel", "Channel.Close", "Connection.Close"}])
def test_a_broker_that_has_fallen_silent_is_not_waited_for_long(
    broker: RefusingBroker, mute: set[str], monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for module in (connection, subscription):
        monkeypatch.setattr(module, "CLOSE_TIMEOUT", 0.1)
    monkeypatch.setattr(connection, "CALL_TIMEOUT", 600)  # longer than this test may take
    broker.mute = mute
    asyncio.run(_leave_open(broker.url))
    for words in ("were not closed", "was destroyed", "never retrieved"):
        assert words not in caplog.text
    assert not [record for record in caplog.records if record.name.startswith("aiormq")]
    assert caplog.text.count("did not answer our goodbye") == 2  # from each of the two connections


def test_a_request_that_the_end_of_the_loop_meets_is_no_line_of_the_library(
    broker: RefusingBroker, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(connection, "CLOSE_TIMEOUT", 0.1)
    broker.mute = {"Queue.Declare", "Channel.Close", "Connection.Close"}

    async def main() -> None:
        opening = asyncio.create_task(Consumer("orders", url=broker.url).open())
        await wait_until(lambda: "Queue.Declare" in broker.asked)
        del opening

    asyncio.run(main())
    assert [record.name for record in caplog.records if record.levelno >= logging.WARNING] == ["streamtools"]
