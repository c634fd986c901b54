"""What an operator is told about queues and groups: plain data."""

from __future__ import annotations

from dataclasses import dataclass
from datetime import datetime
from typing import Literal

#: Where to move a group: an offset, or the first message at or after a time.
Place = Literal["beginning", "end"] | int | datetime


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueInfo:
    """The numbers of one queue; None for what the protocol does not know.

    Attributes:
        name: the queue.
        ready: messages that wait and are due.
        delayed: messages that wait for their time.
        in_hand: messages delivered and not settled.
        consumers: consumers connected.
        oldest: the age of the oldest waiting message, in seconds.
    """

    name: str
    ready: int
    delayed: int | None = None
    in_hand: int | None = None
    consumers: int | None = None
    oldest: float | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class QueueSettings:
    """The settings of a queue whose messages stay after they were read (`Features.replay`).

    Attributes:
        partitions: into how many parts the queue is divided; each has one consumer of a group at a time.
        replication: copies of each partition.
        retention: how long a message is kept, in seconds; `math.inf` without a limit.
        retention_bytes: how much of each partition is kept; `math.inf` without a limit.
    """

    partitions: int
    replication: int
    retention: float
    retention_bytes: float


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionInfo:
    """How far a group has come in one partition.

    Attributes:
        partition: its number.
        begin: the first offset that is kept.
        end: the offset after the last message.
        committed: where the group continues to read; None if it has never committed.
        lag: how far it is behind, in offsets.
        ahead: how many of these are already done, behind one that is not.
        member: the client id of the consumer that reads it; None if no consumer does.
    """

    partition: int
    begin: int
    end: int
    committed: int | None
    lag: int
    ahead: int = 0
    member: str | None = None


@dataclass(frozen=True, slots=True, kw_only=True)
class GroupInfo:
    """How far a group has come in a queue.

    Attributes:
        name: the group.
        queue: what it reads.
        state: as the broker names it.
        members: consumers in it.
        lag: how far it is behind in all partitions, in offsets.
        partitions: each partition.
    """

    name: str
    queue: str
    state: str
    members: int
    lag: int
    partitions: tuple[PartitionInfo, ...]
