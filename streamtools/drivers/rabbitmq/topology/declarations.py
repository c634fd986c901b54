"""Queues: how they are declared, checked, and compared with what was asked for."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from contextlib import suppress
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Final, Literal

from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)
from pydantic import BeforeValidator, field_validator, model_validator

from streamtools.driver import Options
from streamtools.drivers.rabbitmq import errors
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name
from streamtools.drivers.rabbitmq.topology.delay_chain import SAFE, UNDELIVERABLE, declare_undeliverable
from streamtools.errors import ConnectError, QueueError, StreamToolsError
from streamtools.exchange import TYPES, Binding, Exchange, another_type
from streamtools.validation.checks import Declare, check_declare

log: logging.Logger = logging.getLogger("streamtools")

QueueType = Literal["quorum", "classic"]
ACTIVE: Final = "x-single-active-consumer"
TYPE: Final = "x-queue-type"
#: Why streams are refused.
STREAM: Final = (
    "a stream is not a queue: acknowledged messages stay in it, and the next reader gets them again. Write "
    'queue_type="quorum", or bind a queue of yours to the exchange that feeds the stream'
)
#: Arguments that a queue may differ in before we give up comparing it.
MOST_DIFFERENCES: Final = 20
#: What the broker compares that is no argument.
_ATTRIBUTES: Final = ("durable", "exclusive", "auto_delete")


def _declare(value: object) -> object:
    if value is not None:
        check_declare(value, "error_declare")
    return value


class QueueOptions(Options):
    """Options of RabbitMQ's producers and consumers.

    Parameters:
        queue_type: "quorum" (replicated; the default) or "classic".
        durable: the queue outlives a restart of the broker.
        exclusive: the queue belongs to this connection and ends with it.
        auto_delete: the queue ends with its last consumer.
        arguments: further arguments for the broker; they win over ours, and None takes one of ours away where the
            queue is made.
        error_arguments: the same for the error queue.
        error_declare: as `declare`, for the error queue; the same as `declare` when None.
    """

    queue_type: QueueType | None = None
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] | None = None
    error_arguments: Mapping[str, Any] | None = None
    error_declare: Annotated[Declare | None, BeforeValidator(_declare)] = None

    @model_validator(mode="after")
    def _fits(self) -> QueueOptions:
        if self.queue_type == "quorum" and (self.exclusive or self.auto_delete or not self.durable):
            raise ValueError(
                'a quorum queue is durable, not exclusive, and not deleted by itself; write queue_type="classic"'
            )
        for name, mapping in (("arguments", self.arguments), ("error_arguments", self.error_arguments)):
            if (mapping or {}).get("x-queue-type") == "stream":
                raise ValueError(f"{name}: {STREAM}")
            if "x-delivery-limit" in (mapping or {}):
                raise ValueError(
                    f"{name}: x-delivery-limit would let the broker drop or move messages by a count of its own "
                    "(-1 drops all on 3.10); write max_deliveries=... on the consumer"
                )
        return self


class ProducerOptions(QueueOptions):
    """Options for making a queue without consuming it.

    Parameters:
        error_queue: where the broker itself moves what it gives up on: what the queue's consumers have as theirs, a
            name in which `{queue}` stands for the queue's.
    """

    error_queue: str = "error"

    @field_validator("error_queue")
    @classmethod
    def _is_template(cls, value: str) -> str:
        if not value or "{" in value.replace("{queue}", ""):
            raise ValueError("a name, in which only {queue} is replaced")
        return value

    def error_queue_of(self, queue: str) -> str:
        """The name of this queue's error queue."""
        return self.error_queue.replace("{queue}", queue)


@dataclass(frozen=True, slots=True, kw_only=True)
class Queue:
    """One queue as it is wanted, or as it is.

    Attributes:
        explicit: what the user asked for by name; only there is a difference an error.
        arguments: all arguments, ours and the user's.
    """

    name: str
    durable: bool = True
    exclusive: bool = False
    auto_delete: bool = False
    arguments: Mapping[str, Any] = field(default_factory=dict)
    explicit: frozenset[str] = frozenset()

    @property
    def is_classic(self) -> bool:
        """It counts no deliveries."""
        return self.arguments.get(TYPE) in (None, "classic")

    @property
    def is_single_active(self) -> bool:
        """It delivers to one consumer at a time."""
        return self.arguments.get(ACTIVE) is True


def work_queue(name: str, options: QueueOptions, error_queue: str, *, single_active: bool = False) -> Queue:
    """A queue for work: what the broker itself gives up on goes to the error queue.

    RabbitMQ 4 drops a message after 20 redeliveries unless its queue has a dead-letter target.
    """
    kind = _kind(options)
    arguments = {"x-queue-type": kind, **_target(kind, UNDELIVERABLE if name == error_queue else error_queue)}
    if single_active:
        arguments[ACTIVE] = True
    return Queue(
        name=name,
        durable=options.durable,
        exclusive=options.exclusive,
        auto_delete=options.auto_delete,
        arguments=_merged(arguments, options.arguments),
        explicit=_explicit(options),
    )


def error_queue(name: str, options: QueueOptions) -> Queue:
    """The queue of rejected messages; one that is looked at too often ends in `streamtools.undeliverable`."""
    arguments = {"x-queue-type": "quorum", **_target("quorum", UNDELIVERABLE)}
    explicit = frozenset(_wanted(options.error_arguments))
    return Queue(name=name, arguments=_merged(arguments, options.error_arguments), explicit=explicit)


def _kind(options: QueueOptions) -> str:
    if isinstance(given := (options.arguments or {}).get("x-queue-type"), str):
        return given
    if options.queue_type is not None:
        return options.queue_type
    return "classic" if options.exclusive or options.auto_delete or not options.durable else "quorum"


def _target(kind: str, queue: str) -> dict[str, Any]:
    target = {"x-dead-letter-exchange": "", "x-dead-letter-routing-key": queue}
    return {**SAFE, **target} if kind == "quorum" else target


def _merged(ours: dict[str, Any], given: Mapping[str, Any] | None) -> dict[str, Any]:
    return {name: value for name, value in {**ours, **(given or {})}.items() if value is not None}


def _explicit(options: QueueOptions) -> frozenset[str]:
    names: set[str] = {name for name in _ATTRIBUTES if name in options.model_fields_set}
    if options.queue_type is not None:
        names.add("x-queue-type")
    return frozenset(names | _wanted(options.arguments))


def _wanted(arguments: Mapping[str, Any] | None) -> set[str]:
    """Those that a queue must have; one of ours that is taken away, an existing queue may have all the same."""
    return {name for name, value in (arguments or {}).items() if value is not None}


class Declarations:
    """Declares queues over one connection.

    Every refusal ends the channel it came on (specification 0-9-1, section 1.2), so each try has a
    fresh one where the last was refused.
    """

    def __init__(self, connection: Connection) -> None:
        self._connection = connection
        #: The broker's host and port, for errors.
        self.where: str = connection.where

    async def count(self, name: str) -> tuple[int, int]:
        """Messages that wait in a queue, and its consumers.

        Raises:
            QueueError: there is no such queue.
        """
        found = await self._passive(name)
        if found is None:
            raise missing(name, self._connection.where)
        return found

    async def exists(self, name: str) -> bool:
        """There is a queue of this name."""
        return await self._passive(name) is not None

    async def declare(self, queue: Queue, declare: Declare) -> Queue:
        """Declare or check a queue; the queue as it is now.

        Raises:
            QueueError: it is missing, or differs in what was asked for by name.
        """
        if declare is False:
            return queue
        found = await self._passive(queue.name)
        if found is None:
            if declare == "passive":
                raise missing(queue.name, self._connection.where)
            return await self._make(queue)
        return await self._make(queue) if queue.explicit else replace(queue, arguments={})

    async def delete_unused(self, name: str) -> None:
        """Delete a queue unless somebody consumes it."""
        with suppress(StreamToolsError, *errors.CLIENT_ERRORS):
            async with self._connection.declaring() as channel:
                await self._connection.call(channel.queue_delete(name, if_unused=True))

    async def declare_error_queue(self, queue: Queue, declare: Declare) -> None:
        """Declare or check an error queue, and what stands behind it."""
        if declare is True and await self._passive(queue.name) is None:
            await self._mapped(declare_undeliverable(self._connection))
        await self.declare(queue, declare)

    async def declare_exchange(self, exchange: Exchange, declare: Declare = True) -> None:
        """Make a durable exchange if it is missing; one that is there is used as it is.

        Raises:
            QueueError: it is there with another type, or it is missing and not to be made.
        """
        if await self._has_exchange(exchange.name):
            if declare is True:
                await self._compare_type(exchange)
        elif declare is True:
            await self._make_exchange(exchange)
        else:
            raise QueueError(
                f"There is no exchange {exchange.name!r} at {self._connection.where}. Make it, or use declare=True "
                "to have it made."
            )

    async def _has_exchange(self, name: str) -> bool:
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(channel.exchange_declare(name, passive=True))
        except ChannelNotFoundEntity:
            return False
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            raise errors.channel_error(error, self._connection.where) from error
        return True

    async def _make_exchange(self, exchange: Exchange) -> None:
        async with self._connection.declaring() as channel:
            await self._mapped(self._connection.call(_exchange_declaration(channel, exchange)))

    async def _compare_type(self, exchange: Exchange) -> None:
        """Of an exchange that is there: it is durable or not, has arguments or none, as its owner likes."""
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(_exchange_declaration(channel, exchange))
        except ChannelAccessRefused:
            return  # we may not make any, so we cannot compare
        except ChannelPreconditionFailed as error:
            name, _, current = errors.difference(error) or ("", "", "")
            if name == "type" and (found := errors.value(current)) in TYPES:
                raise another_type(exchange, str(found)) from error
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            raise errors.channel_error(error, self._connection.where) from error

    async def bind(self, queue: str, binding: Binding, declare: Declare = True) -> None:
        """Give a queue the messages of a topic; safe to repeat. Nothing is done with declare=False.

        Raises:
            QueueError: there is no such queue, or the exchange has another type.
        """
        if declare is False:
            return
        await self.declare_exchange(binding.exchange, declare)
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(channel.queue_bind(queue, binding.exchange.name, binding.topic))
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            if isinstance(error, ChannelNotFoundEntity) and errors.is_missing(error):
                raise missing(queue, self._connection.where) from error
            raise errors.channel_error(error, self._connection.where) from error

    async def unbind(self, queue: str, binding: Binding) -> None:
        """Take a binding away; safe to repeat, and where there is neither queue nor exchange."""
        async with self._connection.declaring() as channel:
            await self._mapped(
                self._connection.call(channel.queue_unbind(queue, binding.exchange.name, binding.topic))
            )

    async def as_it_is(self, queue: Queue, declare: Declare, use: str = "consumed") -> Queue | None:
        """An existing queue with the arguments that it has; None where we may not look, or are not told enough.

        Parameters:
            queue: what it probably is, which saves questions.
            declare: with anything but True, a queue that is gone meanwhile is not made: it is asked for with a type
                that does not exist. The broker compares the type last.
            use: what is to be done with it, for the error.

        Raises:
            QueueError: there is no such queue, or it is a stream.
        """
        asked = {**queue.arguments, **({} if declare is True else {TYPE: "none"})}
        queue = replace(queue, arguments=asked, explicit=frozenset())
        for _ in range(MOST_DIFFERENCES):
            try:
                refusal = await self._declare_as(queue)
            except (QueueError, ConnectError) as error:
                if isinstance(error.__cause__, ChannelAccessRefused | ChannelLockedResource):
                    return None
                raise
            if refusal is None:
                break
            found = errors.difference(refusal)
            if found is None:
                raise missing(queue.name, self._connection.where) from refusal
            if (adapted := _adapted(queue, refusal, self._connection.where)) is None:
                return None
            queue = adapted
            if found[0] == TYPE:
                break
        if queue.arguments.get(TYPE) == "stream":
            raise QueueError(f"The queue {queue.name!r} cannot be {use}: {STREAM}.")
        return queue

    async def _passive(self, name: str) -> tuple[int, int] | None:
        check_rabbitmq_name(name)
        try:
            async with self._connection.declaring() as channel:
                answer = await self._connection.call(channel.queue_declare(name, passive=True))
        except ChannelLockedResource as error:
            raise ConnectError(
                f"The queue {name!r} is exclusive to another connection. If that is one of ours which has ended, "
                "RabbitMQ notes it after two heartbeats at the latest; else choose another name, or make it without "
                "exclusive=True."
            ) from error
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            if isinstance(error, ChannelNotFoundEntity) and errors.is_missing(error):
                return None
            raise errors.channel_error(error, self._connection.where) from error
        return answer.message_count or 0, answer.consumer_count or 0

    async def _make(self, queue: Queue) -> Queue:
        """Declare; where the queue stands with other arguments, take those that were not asked for by name."""
        for _ in range(MOST_DIFFERENCES):
            if (refusal := await self._declare_as(queue)) is None:
                return queue
            if (adapted := _adapted(queue, refusal, self._connection.where)) is None:
                return replace(queue, arguments={})
            queue = adapted
        raise QueueError(
            f"The queue {queue.name!r} differs in more than {MOST_DIFFERENCES} arguments from what is asked."
        )

    async def _declare_as(self, queue: Queue) -> ChannelPreconditionFailed | None:
        """Declare a queue; what the broker says where it stands with other arguments."""
        try:
            async with self._connection.declaring() as channel:
                await self._connection.call(_declaration(channel, queue))
        except ChannelPreconditionFailed as error:
            return error
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            raise errors.channel_error(error, self._connection.where) from error
        return None

    async def _mapped(self, work: Any) -> None:
        try:
            await work
        except StreamToolsError:
            raise
        except errors.CLIENT_ERRORS as error:
            raise errors.channel_error(error, self._connection.where) from error


def _exchange_declaration(channel: Any, exchange: Exchange) -> Any:
    return channel.exchange_declare(exchange.name, exchange_type=exchange.type, durable=True)


def _declaration(channel: Any, queue: Queue) -> Any:
    return channel.queue_declare(
        queue.name,
        durable=queue.durable,
        exclusive=queue.exclusive,
        auto_delete=queue.auto_delete,
        arguments=dict(queue.arguments),
    )


def _adapted(queue: Queue, error: ChannelPreconditionFailed, where: str) -> Queue | None:
    """The queue with the value that the broker tells of one argument; None if its words do not come to that."""
    found = errors.difference(error)
    if found is None:
        raise QueueError(
            f"RabbitMQ at {where} does not make the queue {queue.name!r}: {errors.plain(error)}"
        ) from error
    name, asked, current = found
    if name in queue.explicit:
        raise QueueError(
            f"The queue {queue.name!r} exists with another {_option(name)}: {name} is {current or 'another'}, and "
            f"{asked or queue.arguments.get(name)} is asked for. Three ways out: leave {_option(name)} away and use "
            "it as it is; choose another queue name; or move its messages elsewhere and delete it (streamtools "
            f"queues delete {queue.name}). If a producer of yours makes it first, write Producer({queue.name!r}, "
            "declare=False), or give it the same options."
        ) from error
    if not current:
        return _guessed(queue, name)
    value = errors.value(current, queue.arguments.get(name))
    if name in _ATTRIBUTES:
        changes: dict[str, Any] = {name: value is True}
        return replace(queue, **changes)
    arguments = {n: v for n, v in queue.arguments.items() if n != name}
    return replace(queue, arguments=arguments if value is None else {**arguments, name: value})


def _guessed(queue: Queue, name: str) -> Queue | None:
    """The queue with another value of this argument, where only one can be meant, or it may have none at all."""
    if name in _ATTRIBUTES:
        changes: dict[str, Any] = {name: not getattr(queue, name)}
        return replace(queue, **changes)
    others = {n: v for n, v in queue.arguments.items() if n != name}
    if name == ACTIVE:
        return replace(queue, arguments=others if queue.is_single_active else {**others, ACTIVE: True})
    return replace(queue, arguments=others) if name in queue.arguments and name != TYPE else None


def _option(name: str) -> str:
    if name in _ATTRIBUTES:
        return f"{name}="
    return "queue_type=" if name == "x-queue-type" else "arguments="


def sees_to_order(name: str, queue: Queue | None, declare: Declare) -> bool:
    """The queue sees to it that one consumer at a time receives, or its consumer cannot.

    Parameters:
        queue: the queue as it is; None where we may not look.
        declare: of the consumer.
    """
    if queue is None:
        log.info(
            "This user may not check whether the queue %r has %s. It should: else each process that consumes it "
            "has an order of its own.", name, ACTIVE,
        )  # fmt: skip
        return True
    if not queue.is_single_active and declare is False:  # nor the lock, which is a queue, too
        log.warning(
            "The queue %r has no %s, and with declare=False no lock queue is declared either: run only one consumer "
            "of it, or give it that argument.", name, ACTIVE,
        )  # fmt: skip
        return True
    return queue.is_single_active


class MissingQueue(QueueError):
    """There is no such queue.

    Attributes:
        queue: its name.
    """

    def __init__(self, message: str, queue: str) -> None:
        super().__init__(message)
        self.queue = queue


def missing(name: str, where: str) -> MissingQueue:
    """A queue that is not there, and what to do about it."""
    return MissingQueue(
        f"There is no queue {name!r} at {where}. Check the name and the virtual host, or make it: "
        f"streamtools queues create {name}. Or use declare=True to have it made.",
        name,
    )
