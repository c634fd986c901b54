"""The options of RabbitMQ's producers and consumers, and the queues that they describe.

To add an option for an argument of the queue, write one line here: a field with `_Declared` and the broker's name of
the argument, and the default None, or else each queue gets the argument. The declaration, the check of existing
queues and the error for a difference use that line. Write a second line in `streamtools/options.py`: it makes the
option known to type checkers, and to the other protocols, which ignore it.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Annotated, Any, Final, Literal

from pydantic import BeforeValidator, field_validator, model_validator

from streamtools.driver import Options
from streamtools.drivers.rabbitmq.topology.queues import (
    AT_LEAST_ONCE,
    SINGLE_ACTIVE,
    STREAM,
    TYPE,
    UNDELIVERABLE,
    Queue,
)
from streamtools.options import RabbitMQConsumerOptions, RabbitMQProducerOptions
from streamtools.parameters import ConsumerParameters, ProducerParameters
from streamtools.validation.checks import Declare, check_declare

QueueType = Literal["quorum", "classic"]


@dataclass(frozen=True, slots=True)
class _Declared:
    """Marks an option that the broker compares when a queue is declared.

    Attributes:
        name: the broker's name for it.
    """

    name: str


def _check_error_declare(value: object) -> object:
    if value is not None:
        check_declare(value, "error_declare")
    return value


class QueueOptions(Options):
    """Options of RabbitMQ's consumers.

    Parameters:
        queue_type: "quorum" (replicated; the default) or "classic".
        durable: whether the queue outlives a restart of the broker.
        exclusive: whether the queue belongs to this connection and is deleted with it.
        auto_delete: whether the queue is deleted with its last consumer.
        arguments: further arguments of the queue, such as {"x-max-length": 1000}. They replace the defaults; a value
            of None removes a default when the queue is created.
        error_arguments: the same for the error queue.
        error_declare: the value of `declare` for the error queue; None for the same as `declare`.
    """

    queue_type: Annotated[QueueType | None, _Declared(TYPE)] = None
    durable: Annotated[bool, _Declared("durable")] = True
    exclusive: Annotated[bool, _Declared("exclusive")] = False
    auto_delete: Annotated[bool, _Declared("auto_delete")] = False
    arguments: Mapping[str, Any] | None = None
    error_arguments: Mapping[str, Any] | None = None
    error_declare: Annotated[Declare | None, BeforeValidator(_check_error_declare)] = None

    @model_validator(mode="after")
    def _fits(self) -> QueueOptions:
        if self.queue_type == "quorum" and (self.exclusive or self.auto_delete or not self.durable):
            raise ValueError(
                'a quorum queue is durable, not exclusive, and not deleted by itself; write queue_type="classic"'
            )
        for name, mapping in (("arguments", self.arguments), ("error_arguments", self.error_arguments)):
            if (mapping or {}).get(TYPE) == "stream":
                raise ValueError(f"{name}: {STREAM}")
            if "x-delivery-limit" in (mapping or {}):
                raise ValueError(
                    f"{name}: x-delivery-limit would let the broker drop or move messages by a count of its own "
                    "(-1 drops all on 3.10); write max_deliveries=... on the consumer"
                )
        return self

    def error_declare_or(self, declare: Declare) -> Declare:
        """Return how to declare the error queue if the queue itself is declared in this way."""
        return declare if self.error_declare is None else self.error_declare


class ProducerOptions(QueueOptions):
    """Options of RabbitMQ's producers, and of `queues create`.

    Parameters:
        error_queue: the queue to which the broker itself moves messages that it gives up on. Name the error queue of
            the queue's consumers. `{queue}` stands for the queue's name.
    """

    error_queue: str = "error"

    @field_validator("error_queue")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if not value or "{" in value.replace("{queue}", ""):
            raise ValueError("it must be a name; only {queue} in it is replaced")
        return value

    def error_queue_of(self, queue: str) -> str:
        """Return the name of this queue's error queue."""
        return self.error_queue.replace("{queue}", queue)


class RabbitMQProducerParameters(ProducerParameters, RabbitMQProducerOptions, total=False):
    """The keyword parameters of a producer's constructor."""


class RabbitMQConsumerParameters(ConsumerParameters, RabbitMQConsumerOptions, total=False):
    """The keyword parameters of a consumer's constructor."""


#: For the options that the broker compares: option -> the broker's name for it.
_DECLARED: Final[dict[str, str]] = {
    option: mark.name
    for option, info in QueueOptions.model_fields.items()
    for mark in info.metadata
    if isinstance(mark, _Declared)
}


def work_queue(name: str, options: QueueOptions, error_queue: str, *, single_active: bool = False) -> Queue:
    """Return the queue that these options describe; the broker moves messages that it gives up on to the error queue.

    Without such a dead-letter target, RabbitMQ 4 would drop a message after 20 redeliveries.
    """
    declared = {_DECLARED[option]: getattr(options, option) for option in _DECLARED}
    chosen = {broker: value for broker, value in declared.items() if value is not None}
    flags = {broker: chosen.pop(broker) for broker in ("durable", "exclusive", "auto_delete")}
    kind = _queue_type(options)
    arguments = {
        TYPE: kind,
        **_dead_letters_to(kind, UNDELIVERABLE if name == error_queue else error_queue),
        **chosen,
    }
    if single_active:
        arguments[SINGLE_ACTIVE] = True
    return Queue(name=name, arguments=_merged(arguments, options.arguments), explicit=_explicit(options), **flags)


def error_queue(name: str, options: QueueOptions) -> Queue:
    """Return the error queue.

    If its messages are read too often, RabbitMQ 4 moves them to `streamtools.undeliverable`.
    """
    arguments = {TYPE: "quorum", **_dead_letters_to("quorum", UNDELIVERABLE)}
    explicit = _given(options.error_arguments)
    return Queue(name=name, arguments=_merged(arguments, options.error_arguments), explicit=explicit)


def _queue_type(options: QueueOptions) -> str:
    if isinstance(given := (options.arguments or {}).get(TYPE), str):
        return given
    if options.queue_type is not None:
        return options.queue_type
    return "classic" if options.exclusive or options.auto_delete or not options.durable else "quorum"


def _dead_letters_to(kind: str, queue: str) -> dict[str, Any]:
    target = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
    return {**AT_LEAST_ONCE, **target} if kind == "quorum" else target


def _merged(ours: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in {**ours, **(given or {})}.items() if value is not None}


def _explicit(options: QueueOptions) -> dict[str, str]:
    """Return what the user asked for: the broker's name -> the option."""
    chosen = [name for name in options.model_fields_set if getattr(options, name) is not None]
    return {_DECLARED[name]: name for name in chosen if name in _DECLARED} | _given(options.arguments)


def _given(arguments: Mapping[str, Any] | None) -> dict[str, str]:
    """Return the arguments that an existing queue must have; one that is given as None may be there or not."""
    return {name: "arguments" for name, value in (arguments or {}).items() if value is not None}
