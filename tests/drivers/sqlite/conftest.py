"""A file for each test, and what is asked of it again and again."""

from __future__ import annotations

import sqlite3
from pathlib import Path

import pytest

from streamtools.delivery import Delivery
from streamtools.drivers.sqlite import SQLiteConsumer
from streamtools.settings import SQLiteSettings


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A file that does not exist yet."""
    return tmp_path / "queues.db"


@pytest.fixture
def url(path: Path) -> str:
    """Its URL."""
    return f"sqlite:///{path}"


@pytest.fixture
def brief(path: Path) -> SQLiteSettings:
    """The same file with a lease of half a second."""
    return SQLiteSettings(path=str(path), lease=0.5)


def look(path: Path, statement: str) -> list[tuple[object, ...]]:
    """Read the file as an operator would, beside whoever uses it."""
    with sqlite3.connect(path, timeout=10) as connection:
        rows = connection.execute(statement).fetchall()
    connection.close()
    return rows


async def drain(consumer: SQLiteConsumer, limit: int = 1000) -> list[bytes]:
    """Receive and acknowledge what is there; the bodies."""
    bodies = []
    while batch := await consumer.receive(limit, timeout=0):
        bodies += await take(batch)
    return bodies


async def take(batch: list[Delivery]) -> list[bytes]:
    """Acknowledge deliveries; their bodies."""
    for delivery in batch:
        await delivery.ack()
    return [delivery.message.body for delivery in batch]
