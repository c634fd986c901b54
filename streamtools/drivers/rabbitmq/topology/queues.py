"""Queue: describes a queue, as we want it or as the broker says that it is."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Final

from aiormq.exceptions import ChannelPreconditionFailed

from streamtools.drivers.rabbitmq import errors
from streamtools.errors import QueueError

TYPE: Final = "x-queue-type"
SINGLE_ACTIVE: Final = "x-single-active-consumer"
#: The queue for messages that cannot be delivered to any other queue.
UNDELIVERABLE: Final = "streamtools.undeliverable"
#: The arguments of a queue that loses no message when it dead-letters.
AT_LEAST_ONCE: Final[dict[str, Any]] = {
    TYPE: "quorum",
    "x-dead-letter-strategy": "at-least-once",
    "x-overflow": "reject-publish",
}
#: Why streams are refused.
STREAM: Final = (
    "a stream is not a queue: acknowledged messages stay in it, and the next reader gets them again. Write "
    'queue_type="quorum", or bind a queue of yours to the exchange that feeds the stream'
)
#: The properties that the broker compares in addition to the arguments.
_FLAGS: Final = ("durable", "exclusive", "auto_delete")


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """One queue, as we want it or as it really is.

    Attributes:
        arguments: all arguments, ours and the user's.
        explicit: the broker's name of each argument that the user gave -> the option for it. Only in these arguments
            is a difference an error.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    explicit: Mapping[str, str] = field(default_factory=dict)

    @property
    def is_classic(self) -> bool:
        """Whether it is a classic queue, which does not count deliveries."""
        return self.arguments.get(TYPE) in (None, "classic")

    @property
    def is_single_active(self) -> bool:
        """Whether it delivers to one consumer at a time."""
        return self.arguments.get(SINGLE_ACTIVE) is True


class MissingQueue(QueueError):
    """There is no such queue.

    Attributes:
        queue: the name of the queue.
    """

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


def missing(name: str, where: str) -> MissingQueue:
    """Return the error for a queue that does not exist; it says what to do."""
    return MissingQueue(
        f"There is no queue {name!r} at {where}. Check the name and the virtual host, or create the queue: "
        f"streamtools queues create {name}. Or use declare=True, which creates it.",
        name,
    )


def nowhere_to_send(name: str, where: str) -> str:
    """Return what a sender is told about a queue that does not exist."""
    return f"There is no queue {name!r} at {where}. Open a consumer of it first, or a producer with declare=True."


def adapted(queue: Queue, error: ChannelPreconditionFailed, where: str) -> Queue | None:
    """Return the queue with the value that the broker says is different; None if its text does not tell the value.

    Raises:
        QueueError: the user gave the other value, or the broker refuses the queue for another reason.
    """
    found = errors.difference(error)
    if found is None:
        raise QueueError(
            f"RabbitMQ at {where} does not create the queue {queue.name!r}: {errors.plain(error)}"
        ) from error
    name, asked, current = found
    if (option := queue.explicit.get(name)) is not None:
        raise QueueError(
            f"The queue {queue.name!r} exists with another {option}=: {name} is {current or 'another'}, and "
            f"{asked or queue.arguments.get(name)} is asked for. Three ways out: leave {option}= out and use the "
            "queue unchanged; choose another queue name; or move its messages elsewhere and delete it (streamtools "
            f"queues delete {queue.name}). If a producer of yours creates it first, write Producer({queue.name!r}, "
            "declare=False), or give it the same options."
        ) from error
    if not current:
        return _with_other_value(queue, name)
    value = errors.value(current, queue.arguments.get(name))
    if name in _FLAGS:
        return _with_flag(queue, name, value is True)
    return _with_argument(queue, name, value)


def _with_other_value(queue: Queue, name: str) -> Queue | None:
    """Return the queue with the only other possible value, or without the argument; None if several are possible."""
    if name in _FLAGS:
        return _with_flag(queue, name, not getattr(queue, name))
    if name == SINGLE_ACTIVE:
        return _with_argument(queue, name, None if queue.is_single_active else True)
    return _with_argument(queue, name, None) if name in queue.arguments and name != TYPE else None


def _with_flag(queue: Queue, name: str, value: bool) -> Queue:
    changes: dict[str, Any] = {name: value}
    return replace(queue, **changes)


def _with_argument(queue: Queue, name: str, value: object) -> Queue:
    arguments = {n: v for n, v in queue.arguments.items() if n != name}
    return replace(queue, arguments=arguments if value is None else {**arguments, name: value})
