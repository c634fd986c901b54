"""Messages of other programs among honest ones, with the bus, exactly once and the command line in the mix.

`STREAMTOOLS_MIX=600` runs each test for so many seconds, `STREAMTOOLS_MIX_SEED=7` with other messages.
"""

from __future__ import annotations

import asyncio
import logging
import os
import socket
from collections import deque
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Final
from urllib.parse import urlsplit

import pytest

from streamtools import Producer
from streamtools.producer import PRODUCERS
from streamtools.testing.conformance.foreign import Letter, draw_letters
from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.chaos.mix import ANYWHERE, EVERYTHING, Mix, Place
from tests.chaos.tally import show
from tests.drivers import foreign

SECONDS: Final = float(os.environ.get("STREAMTOOLS_MIX", "6"))
SEED: Final = int(os.environ.get("STREAMTOOLS_MIX_SEED", "0"))

pytestmark = [pytest.mark.slow, pytest.mark.timeout(SECONDS + 240)]


#: Messages of other programs, from which each round takes some.
LETTERS: Final = int(min(5_000, 300 + 10 * SECONDS))


@contextmanager
def last_lines() -> Iterator[None]:
    """Keep only the last lines of the log: pytest keeps all of them, and grows by them."""
    lines: deque[str] = deque(maxlen=100)

    class Last(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            lines.append(self.format(record)[:1000])

    root, handler = logging.getLogger(), Last(logging.WARNING)
    before, root.handlers = root.handlers, [handler]
    try:
        yield
    finally:
        root.handlers = before
        print(*lines, sep="\n")


def mix(title: str, place: Place) -> None:
    """Run it, and print what has happened."""
    tombstones = PRODUCERS[PRODUCERS.protocol(place.url)].features.tombstones
    letters = draw_letters(place.foreign, LETTERS, tombstones=tombstones, seed=SEED)

    async def run() -> Mix:
        made = Mix(place, letters, SEED)
        await made.run(SECONDS)
        return made

    with last_lines():
        made = asyncio.run(run())
    assert made.commands or not place.commands
    show(title, made.counts())


def test_on_in_process_queues() -> None:
    async def publish(queue: str, letters: Sequence[Letter]) -> Collection[int]:
        async with Producer(queue, url="asyncio://") as producer:
            await producer.send_messages([foreign.message_of(queue, letter) for letter in letters])
        return ()

    mix("in-process", Place("asyncio://", "mix", foreign.ASYNCIO, publish))


def test_on_sqlite(tmp_path: Path) -> None:
    path = f"{tmp_path}/queues.db"

    async def publish(queue: str, letters: Sequence[Letter]) -> Collection[int]:
        return await asyncio.to_thread(foreign.insert_into_sqlite, path, queue, letters)

    mix("SQLite", Place(f"sqlite:///{path}", "mix", foreign.SQLITE, publish, commands=EVERYTHING))


def test_on_rabbitmq(rabbitmq_vhost: RabbitMQAddress) -> None:
    async def publish(queue: str, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.publish_to_rabbitmq(rabbitmq_vhost.url, queue, letters)

    url = f"{rabbitmq_vhost.url}?management_url={rabbitmq_vhost.management_url}"
    mix("RabbitMQ", Place(url, "mix", foreign.RABBITMQ, publish, commands=EVERYTHING))


@pytest.mark.real_kafka("transactions")
def test_on_kafka_exactly_once(kafka: KafkaAddress) -> None:
    bootstrap = urlsplit(kafka.url).netloc

    async def publish(queue: str, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.publish_to_kafka(bootstrap, queue, letters)

    queue = f"mix-{os.urandom(4).hex()}"
    place = Place(kafka.url, queue, foreign.KAFKA, publish, options={"exactly_once": True}, commands=EVERYTHING)
    mix("Kafka", place)


def test_on_http() -> None:
    with socket.create_server(("127.0.0.1", 0)) as free:
        url = f"http://127.0.0.1:{free.getsockname()[1]}"

    async def publish(queue: str, letters: Sequence[Letter]) -> Collection[int]:
        return await foreign.post_to_http(url, queue, letters)

    mix("HTTP", Place(url, "mix", foreign.HTTP, publish, commands=ANYWHERE))
