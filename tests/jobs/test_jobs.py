"""Job messages, on every protocol that holds them."""

from __future__ import annotations

import asyncio
import json
import threading
import time
from collections import deque
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from streamtools import ConfigurationError, Consumer, Producer
from streamtools.drivers.sqlite import SQLiteConsumer
from streamtools.jobs import (
    JobMessage,
    QueueName,
    connect,
    receive_message,
    receive_message_sync,
    send_message,
    send_message_sync,
)


class Queues(QueueName):
    L7 = "l7"
    BIOCONNECT_ID_SERVICE = "bioconnect-id-service"


FIELDS = {
    "title": "Message Title",
    "message_type": "Message Type",
    "send_from": Queues.L7,
    "send_to": Queues.BIOCONNECT_ID_SERVICE,
}
HERE = Queues.BIOCONNECT_ID_SERVICE


@pytest.fixture(params=["sqlite", "asyncio", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return f"sqlite:///{tmp_path}/jobs.db" if request.param == "sqlite" else "asyncio://"


@pytest.fixture(params=["sqlite", pytest.param("rabbitmq", marks=pytest.mark.rabbitmq)])
def durable_url(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    if request.param == "rabbitmq":
        return str(request.getfixturevalue("rabbitmq_vhost").url)
    return f"sqlite:///{tmp_path}/jobs.db"


# --- the message ------------------------------------------------------------------------------------


def test_a_message_is_its_json_document_in_the_order_of_the_schema() -> None:
    before = time.time()
    message = JobMessage(**FIELDS, env="DEV", comments="comments", data={"sample_id": 111111})

    document = json.loads(str(message))
    assert list(document) == [
        "title", "message_type", "send_from", "send_to", "create_time", "env", "comments", "data", "original_message",
    ]  # fmt: skip
    assert (document["send_from"], document["send_to"]) == ("l7", "bioconnect-id-service")
    assert isinstance(document["create_time"], float) and before <= document["create_time"] <= time.time()
    assert document["original_message"] == "None"
    assert JobMessage.model_validate_json(str(message)) == message


@pytest.mark.parametrize("name", FIELDS)
def test_the_first_four_fields_are_required(name: str) -> None:
    with pytest.raises(ValidationError, match=name):
        JobMessage(**{n: v for n, v in FIELDS.items() if n != name})


@pytest.mark.parametrize("written", ["1654627550.958133", 1654627550.958133, "2022-06-07T18:45:50.958133Z"])
def test_the_time_is_read_as_a_number_or_as_text(written: object) -> None:
    assert JobMessage(**FIELDS, create_time=written).create_time == 1654627550.958133


@pytest.mark.parametrize("written", ["soon", "nan", "inf", None, {}])
def test_a_time_that_is_none_is_refused(written: object) -> None:
    with pytest.raises(ValidationError, match="create_time"):
        JobMessage(**FIELDS, create_time=written)


def test_nulls_of_a_foreign_sender_are_the_defaults() -> None:
    text = json.dumps({**FIELDS, "env": None, "comments": None, "data": None, "original_message": None, "new": 1})

    message = JobMessage.model_validate_json(text)
    assert (message.env, message.comments, message.data, message.original_message) == ("", "", {}, "None")


def test_the_original_message_may_be_given_as_it_is() -> None:
    first = JobMessage(**FIELDS)
    second = JobMessage(**FIELDS, original_message=first)
    assert JobMessage.model_validate_json(second.original_message) == first


# --- sending and receiving --------------------------------------------------------------------------


async def test_what_was_sent_is_received_in_order_once(url: str) -> None:
    sent = [await send_message(**{**FIELDS, "title": str(n)}, data={"n": n}, url=url) for n in range(5)]

    assert await receive_message(HERE, 30, url=url) == sent
    assert await receive_message(queue_name=HERE, max_wait_time=0.1, url=url) == []


async def test_one_call_returns_a_thousand_at_most(durable_url: str) -> None:
    async with Producer(HERE, url=durable_url) as producer:
        await producer.send_many([JobMessage(**FIELDS, data={"n": n}) for n in range(1100)])

    async with connect(durable_url) as q:
        lists = [await q.receive_message(HERE, 30), await q.receive_message(HERE, 30)]
    assert [len(each) for each in lists] == [1000, 100]
    assert [message.data["n"] for each in lists for message in each] == list(range(1100))


async def test_calls_one_after_the_other_keep_the_order(durable_url: str) -> None:
    total = 5100
    async with Producer(HERE, url=durable_url) as producer:
        for start in range(0, total, 500):
            numbers = range(start, min(start + 500, total))
            await producer.send_many([JobMessage(**FIELDS, data={"n": n}) for n in numbers])

    received: list[int] = []
    while len(received) < total:
        found = await receive_message(HERE, 30, url=durable_url)
        assert found, received
        received += [message.data["n"] for message in found]
    assert received == list(range(total))


async def test_a_list_is_returned_although_messages_never_cease(durable_url: str) -> None:
    async def send_for_ever() -> None:
        async with connect(durable_url) as q:
            while True:
                await q.send_message(**FIELDS)
                await asyncio.sleep(0.02)

    sending = asyncio.create_task(send_for_ever())
    try:
        found = await asyncio.wait_for(receive_message(HERE, 30, url=durable_url), 15)
        assert 0 < len(found) < 1000
    finally:
        sending.cancel()
        await asyncio.wait({sending})


async def test_zero_waits_for_the_first_message(url: str) -> None:
    waiting = asyncio.create_task(receive_message(HERE, 0, url=url))
    done, _ = await asyncio.wait({waiting}, timeout=0.5)
    assert not done

    sent = await send_message(**FIELDS, url=url)
    assert await asyncio.wait_for(waiting, 30) == [sent]


async def test_messages_wait_for_a_receiver_that_has_never_been_there(durable_url: str) -> None:
    async with connect(durable_url) as q:
        sent = [await q.send_message(**{**FIELDS, "send_to": name}) for name in ("a", "b", "a")]
        assert await q.receive_message("a", 30) == [sent[0], sent[2]]
        assert await q.receive_message("b", 30) == [sent[1]]


@pytest.mark.parametrize("kind", ["def", "async def"])
async def test_a_callback_has_each_message_and_ends_when_there_is_none(url: str, kind: str) -> None:
    sent = [await send_message(**{**FIELDS, "title": str(n)}, url=url) for n in range(3)]
    seen: list[JobMessage] = []

    async def wait_for_it(message: JobMessage) -> None:
        seen.append(message)

    callback: Callable[..., object] = seen.append if kind == "def" else wait_for_it
    assert await receive_message(HERE, call_back_function=callback, max_wait_time=0.5, url=url) == []
    assert seen == sent
    assert await receive_message(HERE, 0.1, url=url) == []


async def test_a_slow_callback_is_no_idle_time(url: str) -> None:
    for n in range(2):
        await send_message(**{**FIELDS, "title": str(n)}, url=url)
    seen = []

    async def slow(message: JobMessage) -> None:
        await asyncio.sleep(0.6)  # longer than the wait
        seen.append(message.title)

    await receive_message(HERE, 0.5, slow, url=url)
    assert seen == ["0", "1"]


async def test_a_callback_that_fails_has_its_message_again(url: str) -> None:
    sent = await send_message(**FIELDS, url=url)
    seen = []

    def fails_at_first(message: JobMessage) -> None:
        seen.append(message)
        if len(seen) == 1:
            raise RuntimeError("busy")

    await receive_message(HERE, 3, fails_at_first, url=url)
    assert seen == [sent, sent]
    assert await receive_message("error", 0.1, url=url) == []


@pytest.mark.parametrize("callback", [None, print], ids=["list", "callback"])
async def test_a_body_that_is_no_job_message_goes_to_the_error_queue(
    url: str, callback: Callable[..., object] | None, capsys: pytest.CaptureFixture[str]
) -> None:
    async with Producer(HERE, url=url) as producer:
        await producer.send({"title": "alone"})
    sent = await send_message(**FIELDS, url=url)

    received = await receive_message(HERE, 0.7, callback, url=url)
    assert received == ([sent] if callback is None else [])
    assert capsys.readouterr().out == ("" if callback is None else f"{sent}\n")
    async with Consumer("error", url=url) as consumer:
        [failed] = await consumer.receive(timeout=30)
        assert failed.message.body == b'{"title":"alone"}'
        assert failed.message.error is not None and "message_type" in failed.message.error.reason


@pytest.mark.parametrize(
    ("callback", "why"),
    [
        ("print", "'print' cannot be called"),
        (lambda: None, "is to be called with one message"),
        (lambda message, further: None, "is to be called with one message"),
    ],
    ids=["a text", "nothing", "two"],
)
async def test_a_callback_that_cannot_work_is_refused_before_a_message_comes(
    callback: Callable[..., object], why: str, tmp_path: Path
) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    sent = await send_message(**FIELDS, url=url)

    with pytest.raises(ConfigurationError, match=why):
        await receive_message(HERE, 0, callback, url=url)
    with pytest.raises(ConfigurationError, match=why):
        await asyncio.to_thread(receive_message_sync, HERE, 0, callback, url=url)
    assert await receive_message(HERE, 30, url=url) == [sent]


async def test_a_callback_may_be_a_builtin_that_does_not_tell_what_it_takes(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    seen: deque[JobMessage] = deque()
    sent = [await send_message(**FIELDS, url=url) for _ in range(2)]

    await receive_message(HERE, 0.3, seen.append, url=url)
    assert list(seen) == sent


async def test_a_cancelled_receiver_leaves_its_messages(durable_url: str) -> None:
    sent = await send_message(**FIELDS, url=durable_url)
    begun = asyncio.Event()

    async def hangs(message: JobMessage) -> None:
        begun.set()
        await asyncio.Event().wait()

    receiving = asyncio.create_task(receive_message(HERE, 0, hangs, url=durable_url))
    await asyncio.wait_for(begun.wait(), 30)
    receiving.cancel()
    await asyncio.wait({receiving})
    assert receiving.cancelled()

    assert await receive_message(HERE, 60, url=durable_url) == [sent]


@pytest.fixture
def acknowledging(monkeypatch: pytest.MonkeyPatch) -> tuple[asyncio.Event, asyncio.Event]:
    """Set when messages are being acknowledged, which goes on once the second is."""
    begun, go = asyncio.Event(), asyncio.Event()
    settle = SQLiteConsumer._settle

    async def slowly(self: SQLiteConsumer, settlements: Any) -> None:
        begun.set()
        await go.wait()
        await settle(self, settlements)

    monkeypatch.setattr(SQLiteConsumer, "_settle", slowly)
    return begun, go


async def test_a_cancellation_while_a_list_is_acknowledged_comes_when_the_caller_has_it(
    tmp_path: Path, acknowledging: tuple[asyncio.Event, asyncio.Event]
) -> None:
    """They were acknowledged, and the list was thrown away with the cancelled call: nobody had them any more."""
    url, (begun, go), have = f"sqlite:///{tmp_path}/jobs.db", acknowledging, list[JobMessage]()
    sent = await send_message(**FIELDS, url=url)

    async def work() -> None:
        have.extend(await receive_message(HERE, 0, url=url))
        await asyncio.Event().wait()

    working = asyncio.create_task(work())
    await begun.wait()
    working.cancel()
    await asyncio.sleep(0)
    go.set()
    await asyncio.wait({working}, timeout=30)
    assert working.cancelled(), "a cancellation is never lost either"
    assert have == [sent]


async def test_a_timeout_while_a_list_is_acknowledged_is_as_if_it_had_been_in_time(
    tmp_path: Path, acknowledging: tuple[asyncio.Event, asyncio.Event]
) -> None:
    url, (begun, go) = f"sqlite:///{tmp_path}/jobs.db", acknowledging
    sent = await send_message(**FIELDS, url=url)
    async with asyncio.timeout(None) as deadline:
        asyncio.create_task(_over_in_between(begun, go, deadline)).add_done_callback(lambda task: task.result())
        found = await receive_message(HERE, 0, url=url)
    assert found == [sent]
    for _ in range(3):
        await asyncio.sleep(0)  # and it does not come later


async def _over_in_between(begun: asyncio.Event, go: asyncio.Event, deadline: asyncio.Timeout) -> None:
    await begun.wait()
    deadline.reschedule(asyncio.get_running_loop().time())
    await asyncio.sleep(0.01)
    go.set()


async def test_who_cancels_twice_does_not_wait(
    tmp_path: Path, acknowledging: tuple[asyncio.Event, asyncio.Event]
) -> None:
    url, (begun, _) = f"sqlite:///{tmp_path}/jobs.db", acknowledging
    await send_message(**FIELDS, url=url)
    receiving = asyncio.create_task(receive_message(HERE, 0, url=url))
    await begun.wait()
    for _ in range(2):
        receiving.cancel()
        await asyncio.sleep(0)
    await asyncio.wait({receiving}, timeout=30)
    assert receiving.cancelled()


async def test_bad_names_and_times_are_refused(tmp_path: Path) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    with pytest.raises(ConfigurationError, match="at least one character"):
        await send_message(**{**FIELDS, "send_to": ""}, url=url)
    with pytest.raises(ConfigurationError, match="max_wait_time"):
        await receive_message(HERE, -1, url=url)


# --- without an event loop --------------------------------------------------------------------------


def test_the_same_without_an_event_loop(url: str) -> None:
    sent = [send_message_sync(**{**FIELDS, "title": str(n)}, url=url) for n in range(3)]

    assert receive_message_sync(HERE, 30, url=url) == sent
    assert receive_message_sync(HERE, 0.1, url=url) == []


def test_a_callback_is_called_in_the_calling_thread(url: str) -> None:
    sent = send_message_sync(**FIELDS, url=url)
    seen = []

    def callback(message: JobMessage) -> None:
        if not seen:
            seen.append(threading.current_thread())
            raise StopIteration("not now")
        seen.append(message)

    assert receive_message_sync(HERE, 3, callback, url=url) == []
    assert seen == [threading.current_thread(), sent]


def test_a_callback_stands_in_the_log_under_its_own_name(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    send_message_sync(**FIELDS, url=url)

    def register(message: JobMessage) -> None:
        raise ValueError("busy")

    receive_message_sync(HERE, 0.3, register, url=url)
    assert "register failed on message" in caplog.text and "hand_over" not in caplog.text


def test_an_async_callback_is_called_on_the_background_loop(url: str) -> None:
    sent = send_message_sync(**FIELDS, url=url)
    seen: list[object] = []

    async def callback(message: JobMessage) -> None:
        seen.extend([threading.current_thread().name, message])

    receive_message_sync(HERE, 0.5, callback, url=url)
    assert seen == ["streamtools-background", sent]


def test_threads_share_one_background_loop(durable_url: str) -> None:
    def send(number: int) -> str:
        return send_message_sync(**{**FIELDS, "title": str(number)}, url=durable_url).title

    with ThreadPoolExecutor(8) as pool:
        sent = set(pool.map(send, range(40)))
        halves = list(pool.map(lambda _: receive_message_sync(HERE, 1, url=durable_url), range(2)))

    received = [message.title for half in halves for message in half]
    assert sorted(received) == sorted(sent) and len(sent) == 40
    assert [t.name for t in threading.enumerate()].count("streamtools-background") == 1


def test_an_interrupted_callback_leaves_its_message(durable_url: str) -> None:
    sent = send_message_sync(**FIELDS, url=durable_url)

    def interrupted(message: JobMessage) -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        receive_message_sync(HERE, 0, interrupted, url=durable_url)
    assert receive_message_sync(HERE, 60, url=durable_url) == [sent]
