"""The brokers of benchmarks."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from tests.brokers.rabbitmq import RabbitMQNode


@contextmanager
def rabbitmq_url() -> Iterator[str]:
    """The address in STREAMTOOLS_TEST_RABBITMQ_URL, or else that of a node that lives as long as the block."""
    if url := os.environ.get("STREAMTOOLS_TEST_RABBITMQ_URL"):
        yield url
        return
    with RabbitMQNode() as node:
        yield node.url
