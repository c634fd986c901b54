"""What passes and what is for good: each answer of a broker, on the way that it takes."""

from __future__ import annotations

import asyncio
from pathlib import Path
from typing import Any

import pytest
from aiokafka import errors as kafka
from aiokafka.client import AIOKafkaClient
from aiokafka.protocol.produce import ProduceRequest, ProduceResponse_v8

from streamtools import KafkaSettings, SendError
from streamtools.drivers.kafka.errors import FATES, Fate, client_error
from streamtools.errors import ConnectError, QueueError
from tests.brokers.kafka.address import KafkaAddress
from tests.drivers.kafka.conftest import MakeProducer, records

SETTINGS = KafkaSettings(host="127.0.0.1:1")


def of(*fates: Fate) -> list[str]:
    return [name for name, (_, fate, _) in FATES.items() if fate in fates]


class Answers:
    """In the place of the broker: the next requests to produce are answered so, and do nothing."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.codes: list[int] = []
        self.given = 0
        send = AIOKafkaClient.send

        async def answered(client: Any, node: Any, request: Any, **options: Any) -> Any:
            if type(request) is not ProduceRequest or not self.codes:
                return await send(client, node, request, **options)
            self.given += 1
            code = self.codes.pop(0)
            topics = [
                (topic, [(partition, code, -1, -1, -1, [], None) for partition, _ in partitions])
                for topic, partitions in request._topics
            ]
            return ProduceResponse_v8(topics=topics, throttle_time_ms=0)

        monkeypatch.setattr(AIOKafkaClient, "send", answered)


@pytest.fixture
def answers(monkeypatch: pytest.MonkeyPatch) -> Answers:
    return Answers(monkeypatch)


def code_of(name: str) -> int:
    return int(FATES[name][0].errno)  # type: ignore[attr-defined]


def test_each_name_is_the_code_that_the_library_knows_by_it() -> None:
    for name, (error, _, _) in FATES.items():
        assert kafka.for_code(code_of(name)) is error, name


@pytest.mark.real_kafka("what goes on after a refusal")
@pytest.mark.parametrize("name", [*of(Fate.AGAIN), "unknown: 999"])
async def test_what_passes_is_sent_again_and_held_once(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, answers: Answers, name: str
) -> None:
    sender = await producer(partitions=1)
    answers.codes = [999 if name.startswith("unknown") else code_of(name)] * 2
    await asyncio.gather(*(sender.send(n) for n in range(5)))
    assert answers.given == 2
    assert [record.value for record in await records(kafka, queue)] == [b"%d" % n for n in range(5)]


@pytest.mark.real_kafka("what goes on after a refusal")
@pytest.mark.parametrize("name", of(Fate.RECORD, Fate.TOPIC))
async def test_what_is_refused_for_good_is_named_at_once_and_the_next_is_taken(
    kafka: KafkaAddress, producer: MakeProducer, queue: str, answers: Answers, name: str
) -> None:
    sender = await producer(partitions=1)
    answers.codes = [code_of(name)]
    async with asyncio.timeout(10):
        with pytest.raises(SendError) as caught:
            await sender.send("refused", id="1")
        await sender.send("taken")
    assert caught.value.refused == ("1",)
    assert caught.value.unfit == (("1",) if name in of(Fate.RECORD) else ())
    assert [record.value for record in await records(kafka, queue)] == [b"taken"]


@pytest.mark.parametrize("name", FATES)
def test_while_connecting_what_is_for_good_ends_the_attempts_and_says_what_to_do(name: str) -> None:
    kind, fate, help_ = FATES[name]
    error = client_error(kind(), SETTINGS)
    if fate is Fate.FOR_GOOD and not isinstance(error, QueueError):
        assert isinstance(error, ConnectError) and error.permanent
        assert name in str(error) and help_ in str(error)
    elif isinstance(error, ConnectError):
        assert not error.permanent


def test_the_page_has_the_table() -> None:
    page = Path("docs/protocols/kafka.md").read_text()
    for name, (_, fate, help_) in FATES.items():
        assert f"| `{name}` | {fate.value} | {help_} |" in page, name
