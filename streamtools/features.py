"""Features: what a protocol can do, as data."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Features:
    """What a protocol can do. Asking for more fails at start-up, with what to use instead.

    Attributes:
        durable: messages survive the end of every process.
        processes: several processes can share one queue.
        ordered: one producer's messages reach one consumer of concurrency 1 in the order sent.
        partitioned: a queue is split into partitions, each of which one consumer of a group has at a time, with all
            that waits in it; order holds within a partition, and messages of one key are in one.
        groups: several groups can each have every message of one queue (`group=`).
        delay: `send(delay=...)` and retries with a delay are held by the broker. Without it `delay=` is refused, and
            a retry waits in the consumer's process, in the place of a handler; over HTTP at the sender.
        expiry: `send(ttl=...)` is honoured.
        error_queue: a rejected message can be moved to an error queue; without it the sender keeps it.
        delivery_count: the broker counts deliveries, so a message that kills its process is found out.
        redelivery: what was delivered and not settled comes back after the consumer has died.
        atomic: what a handler sends and the settlement of its message are one transaction, always. On Kafka they are
            with `exactly_once=True`, and this is False.
        reply: the handler's value travels back to the sender on the same call.
        listens: the consumer opens a port itself (`host=`, `port=`).
        admin: the protocol has a QueueAdmin.
        in_hand: the broker tells messages in hand from those that wait; without it both count as `QueueInfo.ready`.
        replay: messages stay when they are done, in partitions, for a time: `QueueAdmin.seek`, `groups`, `alter`.
        topics: queues can be bound to exchanges by topic (`bindings=`, `Message.exchange`).
        cancel: a delayed message can be taken back by its id.
        tombstones: a message can be without a body: `send(None, key=..., tombstone=True)`, `Message.body` of None.
        missing_queue: sending to a queue that does not exist, with `declare=False`, raises.
    """

    durable: bool = False
    processes: bool = False
    ordered: bool = True
    partitioned: bool = False
    groups: bool = False
    delay: bool = True
    expiry: bool = True
    error_queue: bool = True
    delivery_count: bool = False
    redelivery: bool = True
    atomic: bool = False
    reply: bool = False
    listens: bool = False
    admin: bool = True
    in_hand: bool = True
    replay: bool = False
    topics: bool = False
    cancel: bool = False
    tombstones: bool = False
    missing_queue: bool = True
