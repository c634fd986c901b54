"""Sending jobs and asking for what failed, as the tests of this package do."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import asdict

from streamtools import Producer
from streamtools.admin import QueueAdmin
from streamtools.message import Message
from tests.chaos.service import Job
from tests.chaos.tally import Tally


async def send(url: str, tally: Tally, jobs: Iterable[Job], *, batch: int = 500, delay: float | None = None) -> None:
    """Send jobs to "orders"; the tally knows what was confirmed."""
    waiting = list(jobs)
    async with Producer("orders", url=url, send_timeout=120) as producer:
        for start in range(0, len(waiting), batch):
            part = waiting[start : start + batch]
            await producer.send_many(map(asdict, part), delay=delay)
            tally.confirmed.update(job.n for job in part)


async def dead_lettered(url: str) -> Sequence[Message]:
    """What waits in the error queue; it stays there."""
    async with QueueAdmin(url=url) as admin:
        return await admin.peek("error", 10_000)
