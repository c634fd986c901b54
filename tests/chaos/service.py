"""A service as a process of its own: `python -m tests.chaos.service URL RECORD OPTIONS`.

OPTIONS is JSON: `nap`, the seconds that a handler takes, and options of the consumer. RECORD gets a line for
each end of a handler, written at once: the kernel has it, whatever becomes of the process.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from dataclasses import dataclass
from typing import Any

from streamtools import ConsumerFactory, ConsumerRunner, Message, Retry

#: Runs of a job that always fails: one, and two retries.
RUNS = 3
#: Seconds before a failed job is run again.
RETRY_DELAY = 1.0


@dataclass
class Job:
    """One message.

    Attributes:
        n: its number.
        do: what its handler does: "work", "fail", "fail once", or "die", which ends the process.
    """

    n: int
    do: str = "work"


def service(url: str, record: str, *, nap: float = 0.001, **options: Any) -> ConsumerFactory:
    """The consumer of "orders", which does what each job says."""
    lines = os.open(record, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    retry = Retry(retries=RUNS - 1, delay=RETRY_DELAY, backoff=1, jitter=0)
    consumers = ConsumerFactory(url=url, retry=retry, **{"concurrency": 8, **options})

    @consumers.route("orders")
    async def work(job: Job, message: Message) -> None:
        await asyncio.sleep(nap)
        if job.do == "die":
            os._exit(9)
        if job.do == "fail" or (job.do == "fail once" and message.attempt == 1):
            os.write(lines, f"failed {job.n} {message.attempt}\n".encode())
            raise ValueError(f"no luck with {job.n}")
        os.write(lines, f"done {job.n}\n".encode())

    return consumers


if __name__ == "__main__":
    url, record, options = sys.argv[1:]
    ConsumerRunner(service(url, record, **json.loads(options))).run()
