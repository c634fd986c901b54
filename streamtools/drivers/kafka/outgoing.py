"""One record on its way, and why Kafka may not take it."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Final

from streamtools.drivers.kafka.errors import is_too_large, plain
from streamtools.drivers.kafka.records import Header, Placed, encode_headers, encode_key, timestamp
from streamtools.errors import SendError, StreamToolsError
from streamtools.exchange import Exchange
from streamtools.message import Message
from streamtools.settings import KafkaSettings

#: Bytes that a record takes beside key, value and headers, at most (KIP-98, message format).
OVERHEAD: Final = 96
#: Bytes by which a copy may be larger than its message: why that failed, where it was first, and for whom it waits.
COPY_ROOM: Final = 64 * 1024


@dataclass(slots=True)
class Outgoing:
    """One record on its way.

    Attributes:
        id: the message's.
        partition: where it must go; by its key, or anywhere, when None.
        offset: where it stands once it is confirmed.
        pending: who waits for it.
        size: bytes of the record, about.
        exchange: where it goes by its topic, to each queue that is bound there; None to the topic itself.
        mandatory: to reach nobody is an error; otherwise it is forgotten.
    """

    id: str
    topic: str
    key: bytes | None
    value: bytes
    headers: list[Header]
    timestamp: int
    partition: int | None = None
    offset: int | None = None
    pending: Any = None
    size: int = 0
    exchange: Exchange | None = None
    mandatory: bool = True

    def __post_init__(self) -> None:
        size = OVERHEAD + len(self.value) + 10 * len(self.headers)
        for name, value in self.headers:
            size += len(name) + len(value)
        self.size = size if self.key is None else size + len(self.key)


def outgoing(batch: Sequence[Message], *, headers: Sequence[Header] = ()) -> list[Outgoing]:
    """Messages as records on their way, each to the topic that is its queue.

    Parameters:
        headers: further ones, on each.
    """
    now = time.time()
    return [_outgoing(message, headers, now) for message in batch]


def _outgoing(message: Message, headers: Sequence[Header], now: float) -> Outgoing:
    partition = None
    stamp, apart = timestamp(message, now)
    if type(message) is Placed:
        partition = message.partition
        if message.timestamp is not None:
            stamp, apart = int(message.timestamp * 1000), False
    found = encode_headers(message, time_apart=apart)
    if headers:
        found += headers
    key = encode_key(message)
    return Outgoing(
        message.id, message.queue, key, message.body, found, stamp, partition,
        exchange=message.exchange, mandatory=message.mandatory,
    )  # fmt: skip


def refused(failed: Mapping[str, BaseException], settings: KafkaSettings) -> SendError:
    """The error for messages that Kafka does not take."""
    first = next(iter(failed.values()))
    why = str(first) if isinstance(first, StreamToolsError) else _why(first)
    count = f"{len(failed)} message{'s' if len(failed) > 1 else ''}"
    error = SendError(f"{count} refused by {settings.safe_url}: {why.rstrip('.')}.", refused=list(failed))
    error.__cause__ = first
    return error


def _why(error: BaseException) -> str:
    if is_too_large(error):
        return (
            "too large for the topic (MESSAGE_TOO_LARGE); put less into a message, or raise the topic's "
            "max.message.bytes"
        )
    return plain(error)
