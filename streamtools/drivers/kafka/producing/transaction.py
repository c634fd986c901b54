"""Transaction: what is sent inside `KafkaProducer.transaction()`."""

from __future__ import annotations

import asyncio
import time
from collections.abc import Sequence
from contextvars import ContextVar
from typing import Final

from streamtools.drivers.kafka.errors import was_undone
from streamtools.drivers.kafka.producing.record import Records, not_held, records_to_send
from streamtools.drivers.kafka.producing.transactions import TIMEOUT, TransactionalProducer
from streamtools.errors import ConnectError, SendError
from streamtools.message import Message
from streamtools.settings import KafkaSettings


class Transaction:
    """One transaction that a user has begun.

    Attributes:
        producer: makes it.
        settings: of its Kafka.
    """

    def __init__(self, producer: TransactionalProducer, settings: KafkaSettings) -> None:
        self.producer: TransactionalProducer = producer
        self.settings: KafkaSettings = settings
        self._lock = asyncio.Lock()  # many tasks may send in it
        self._sent: list[Message] = []
        self._failure: SendError | None = None
        self._begun = 0.0

    async def begin(self) -> None:
        """Begin."""
        await self.producer.begin()
        self._begun = time.monotonic()

    async def send(self, batch: Sequence[Message], given: Sequence[Message]) -> Sequence[Records]:
        """Send as part of it. A failure makes the whole fail, whether the caller goes on or not.

        Parameters:
            given: the same messages as the user knows them, for errors.
        """
        items = records_to_send(batch)
        async with self._lock:
            try:
                await self.producer.send(items)
            except SendError as error:
                error.messages = not_held(given, items)
                self._failure = self._failure or error
                raise
            except ConnectError as error:
                why = self._why(error)
                ids = [m.id for m in batch]
                self._failure = SendError(f"The transaction has failed: {why}", refused=ids, messages=given)
                raise self._failure from error
        self._sent += given
        return items

    async def commit(self) -> None:
        """Make it visible."""
        if self._failure is not None:
            raise self._failure
        try:
            await self.producer.commit()
        except ConnectError as error:
            if was_undone(error):
                raise SendError(
                    f"A transaction of {len(self._sent)} messages has failed: {self._why(error)}",
                    refused=[m.id for m in self._sent],
                    messages=self._sent,
                ) from error
            raise SendError(
                f"It is not known whether a transaction of {len(self._sent)} messages took place: {error}",
                unknown=[m.id for m in self._sent],
                messages=self._sent,
            ) from error

    def _why(self, error: ConnectError) -> str:
        took = time.monotonic() - self._begun
        if took < TIMEOUT or not was_undone(error):
            return str(error)
        return (
            f"it took {took:.0f} s, and Kafka undoes one that takes longer than {TIMEOUT:g} s. Nothing of it was "
            "sent: do what takes long before it begins."
        )

    async def abort(self) -> None:
        """Abort it."""
        if not self.producer.broken:
            await self.producer.abort()


#: The transaction that the running task is in.
current_transaction: Final[ContextVar[Transaction | None]] = ContextVar("streamtools_kafka_transaction", default=None)
