"""Declarations: declares and checks queues, exchanges and bindings."""

from __future__ import annotations

import logging
from contextlib import suppress
from dataclasses import replace
from typing import Any, Final

from aiormq.abc import AbstractChannel
from aiormq.exceptions import (
    ChannelAccessRefused,
    ChannelLockedResource,
    ChannelNotFoundEntity,
    ChannelPreconditionFailed,
)

from streamtools.drivers.rabbitmq import errors
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name
from streamtools.drivers.rabbitmq.topology.queues import (
    SINGLE_ACTIVE,
    STREAM,
    TYPE,
    UNDELIVERABLE,
    MissingQueue,
    Queue,
    adapted,
    missing,
)
from streamtools.errors import ConnectError, QueueError, StreamToolsError
from streamtools.exchange import TYPES, Binding, Exchange, another_type
from streamtools.validation.checks import Declare

log: logging.Logger = logging.getLogger("streamtools")

#: If a queue differs in more arguments than this, we give up comparing.
MOST_DIFFERENCES: Final = 20


class Declarations:
    """Declares over one connection."""

    def __init__(self, connection: Connection) -> None:
        self._connection = connection

    @property
    def where(self) -> str:
        """The broker's host and port, for errors."""
        return self._connection.where

    # --- queues -------------------------------------------------------------------------------------

    async def count(self, name: str) -> tuple[int, int]:
        """Return the number of messages that wait in a queue, and the number of its consumers.

        Raises:
            MissingQueue: there is no such queue.
            ConnectError: the queue is exclusive to another connection.
        """
        check_rabbitmq_name(name)
        try:
            answer = await self._connection.request(
                lambda channel: channel.queue_declare(name, passive=True),
                expects=(ChannelLockedResource, ChannelNotFoundEntity),
            )
        except ChannelLockedResource as error:
            raise ConnectError(
                f"The queue {name!r} is exclusive to another connection. If that is one of ours which has ended, "
                "RabbitMQ notices it after two heartbeats at the latest. If not, choose another name, or create the "
                "queue without exclusive=True."
            ) from error
        except ChannelNotFoundEntity as error:
            raise self._not_found(name, error) from error
        return answer.message_count or 0, answer.consumer_count or 0

    async def exists(self, name: str) -> bool:
        """Return whether there is a queue of this name."""
        try:
            await self.count(name)
        except MissingQueue:
            return False
        return True

    async def declare(self, queue: Queue, declare: Declare) -> Queue:
        """Declare or check a queue, and return the real queue; without arguments if they are not known.

        Raises:
            QueueError: the queue is missing, or differs in an option that the user gave.
        """
        if declare is False:
            return queue
        if not await self.exists(queue.name):
            if declare == "passive":
                raise missing(queue.name, self.where)
        elif not queue.explicit:
            return replace(queue, arguments={})
        return await self._agree(queue) or replace(queue, arguments={})

    async def declare_error_queue(self, queue: Queue, declare: Declare) -> None:
        """Declare or check an error queue, and the queue for its undeliverable messages."""
        if declare is True and not await self.exists(queue.name):
            await self.declare_undeliverable()
        await self.declare(queue, declare)

    async def declare_undeliverable(self) -> None:
        """Create the queue for undeliverable messages; if it exists, use it unchanged.

        From RabbitMQ 4 on, a quorum queue drops messages that were delivered more than 20 times, unless an argument
        removes that limit. RabbitMQ 3 has no limit by default, and with that argument it would drop all messages.
        """
        if await self.exists(UNDELIVERABLE):
            return
        version = self._connection.client.server_version.partition(".")[0]
        limit = {} if version in ("", "3") else {"x-delivery-limit": -1}
        await self._connection.request(
            lambda channel: channel.queue_declare(UNDELIVERABLE, durable=True, arguments={TYPE: "quorum", **limit})
        )

    async def delete_unused(self, name: str) -> None:
        """Delete a queue unless somebody consumes it."""
        with suppress(StreamToolsError):
            await self._connection.request(lambda channel: channel.queue_delete(name, if_unused=True))

    async def as_it_is(self, queue: Queue, declare: Declare, use: str = "consumed") -> Queue | None:
        """Return an existing queue with its real arguments; None if we may not ask, or the broker does not tell.

        To find out the arguments we declare the queue, and the broker answers which argument differs.

        Parameters:
            queue: the queue as it probably is; a good guess saves questions.
            declare: if this is not True, we declare a type that does not exist, so that a queue that is deleted
                meanwhile is not created again. The broker compares the type last.
            use: what the caller wants to do with the queue, for the error text.

        Raises:
            QueueError: there is no such queue, or it is a stream.
        """
        asked = {**queue.arguments, **({} if declare is True else {TYPE: "none"})}
        try:
            found = await self._agree(replace(queue, arguments=asked, explicit={}), ends_with_type=True)
        except (QueueError, ConnectError) as error:
            if isinstance(error.__cause__, ChannelAccessRefused | ChannelLockedResource):
                return None
            if isinstance(error.__cause__, ChannelPreconditionFailed):  # because that type does not exist
                raise missing(queue.name, self.where) from error.__cause__
            raise
        if found is not None and found.arguments.get(TYPE) == "stream":
            raise QueueError(f"The queue {queue.name!r} cannot be {use}: {STREAM}.")
        return found

    async def _agree(self, queue: Queue, *, ends_with_type: bool = False) -> Queue | None:
        """Declare a queue, each time with the value that the broker says is different, until it agrees.

        Return the queue; None if the broker does not tell a value.

        Parameters:
            ends_with_type: whether to stop when the type is known, which the broker compares last.
        """
        for _ in range(MOST_DIFFERENCES):
            if (refusal := await self._refusal_of(queue)) is None:
                return queue
            if (other := adapted(queue, refusal, self.where)) is None:
                return None
            is_last = ends_with_type and other.arguments.get(TYPE) != queue.arguments.get(TYPE)
            queue = other
            if is_last:
                return queue
        raise QueueError(
            f"The queue {queue.name!r} differs in more than {MOST_DIFFERENCES} arguments from what is asked."
        )

    async def _refusal_of(self, queue: Queue) -> ChannelPreconditionFailed | None:
        """Declare a queue; return the broker's error if it exists with other arguments, else None."""

        def ask(channel: AbstractChannel) -> Any:
            return channel.queue_declare(
                queue.name,
                durable=queue.durable,
                exclusive=queue.exclusive,
                auto_delete=queue.auto_delete,
                arguments=dict(queue.arguments),
            )

        try:
            await self._connection.request(ask, expects=(ChannelPreconditionFailed,))
        except ChannelPreconditionFailed as error:
            return error
        return None

    def _not_found(self, queue: str, error: ChannelNotFoundEntity) -> StreamToolsError:
        return missing(queue, self.where) if errors.is_missing(error) else errors.channel_error(error, self.where)

    # --- exchanges and bindings ---------------------------------------------------------------------

    async def declare_exchange(self, exchange: Exchange, declare: Declare = True) -> None:
        """Create a durable exchange if it is missing; if it exists, use it unchanged.

        Raises:
            QueueError: the exchange exists with another type, or is missing and `declare` is not True.
        """
        if declare is True:
            await self._make_exchange(exchange)
        elif not await self.has_exchange(exchange.name):
            raise QueueError(
                f"There is no exchange {exchange.name!r} at {self.where}. Create it, or use declare=True, which "
                "creates it."
            )

    async def _make_exchange(self, exchange: Exchange) -> None:
        name, kind = exchange.name, exchange.type
        try:
            await self._connection.request(
                lambda channel: channel.exchange_declare(name, exchange_type=kind, durable=True),
                expects=(ChannelAccessRefused, ChannelPreconditionFailed),
            )
        except ChannelAccessRefused as error:
            if not await self.has_exchange(name):  # an existing exchange can be used, but its type is not checked
                raise errors.channel_error(error, self.where) from error
        except ChannelPreconditionFailed as error:
            differs, _, current = errors.difference(error) or ("", "", "")
            # Only the type matters: its owner decides whether it is durable, and which arguments it has.
            if differs == "type" and (found := errors.value(current)) in TYPES:
                raise another_type(exchange, str(found)) from error

    async def has_exchange(self, name: str) -> bool:
        """Return whether there is an exchange of this name."""
        try:
            await self._connection.request(
                lambda channel: channel.exchange_declare(name, passive=True), expects=(ChannelNotFoundEntity,)
            )
        except ChannelNotFoundEntity:
            return False
        return True

    async def bind(self, queue: str, binding: Binding, declare: Declare = True) -> None:
        """Bind a queue to a topic of an exchange. Safe to repeat. With declare=False this does nothing.

        Raises:
            QueueError: there is no such queue, or the exchange has another type.
        """
        if declare is False:
            return
        await self.declare_exchange(binding.exchange, declare)
        try:
            await self._connection.request(
                lambda channel: channel.queue_bind(queue, binding.exchange.name, binding.topic),
                expects=(ChannelNotFoundEntity,),
            )
        except ChannelNotFoundEntity as error:
            raise self._not_found(queue, error) from error

    async def unbind(self, queue: str, binding: Binding) -> None:
        """Remove a binding. Safe to repeat, and if the queue or the exchange does not exist."""
        await self._connection.request(
            lambda channel: channel.queue_unbind(queue, binding.exchange.name, binding.topic)
        )


def needs_no_lock(name: str, queue: Queue | None, declare: Declare) -> bool:
    """Whether a consumer of an ordered queue receives without a lock; False if it must take one first.

    Parameters:
        queue: the real queue; None if we may not ask for it.
        declare: the consumer's `declare`.
    """
    if queue is None:
        log.info(
            "This user may not check whether the queue %r has %s. If the queue does not have it, several processes "
            "that consume it do not keep one order.", name, SINGLE_ACTIVE,
        )  # fmt: skip
        return True
    if not queue.is_single_active and declare is False:  # the lock is a queue, which we may not declare then
        log.warning(
            "The queue %r has no %s, and with declare=False no lock queue is declared either: run only one consumer "
            "of it, or give it that argument.", name, SINGLE_ACTIVE,
        )  # fmt: skip
        return True
    return queue.is_single_active
