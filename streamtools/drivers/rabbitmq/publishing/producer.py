"""RabbitMQProducer: publishes to the default exchange, where a queue's name is its routing key."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from aiormq.exceptions import ChannelLockedResource

from streamtools.driver import Options
from streamtools.drivers.rabbitmq.connections import Place, Sending, receiving, sending
from streamtools.drivers.rabbitmq.features import FEATURES
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name, check_rabbitmq_reply
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.publisher import Publisher
from streamtools.drivers.rabbitmq.topology.declarations import (
    Declarations,
    ProducerOptions,
    error_queue,
    work_queue,
)
from streamtools.errors import Closed, ConnectError, ConnectionLost
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.receipt import Receipt
from streamtools.settings import RabbitMQSettings


class RabbitMQProducer(Producer, protocol="rabbitmq"):
    """Sends to RabbitMQ: persistent, mandatory, confirmed. Options: `ProducerOptions`."""

    features = FEATURES
    settings_class: ClassVar[type[RabbitMQSettings]] = RabbitMQSettings
    options_class: ClassVar[type[ProducerOptions]] = ProducerOptions
    settings: RabbitMQSettings
    options: ProducerOptions
    _place: Place[Sending] | None = None
    _publisher: Publisher | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        self._limits = Limits()

    async def _open(self) -> None:
        await self._close()
        self._place = place = await sending(self.settings, self.client_id)
        try:
            # The base gives up after send_timeout without knowing why; so be earlier and say it.
            patience = self.send_timeout * 0.9
            publisher = Publisher(place.shared, self._limits, patience=patience, declares=self.declares_exchanges)
            if place.connection.blocked:  # it answers no request, either, until it takes messages again
                await self._declare_elsewhere()
            else:
                await self._declare(Declarations(place.connection))
                await publisher.open()
            self._publisher = publisher
        except BaseException:
            await self._close()
            raise

    async def _declare_elsewhere(self) -> None:
        place = await receiving(self.settings, self.client_id)
        try:
            await self._declare(Declarations(place.connection))
        finally:
            await place.release()

    async def _declare(self, declarations: Declarations) -> None:
        if self.declare is False:
            return
        try:
            await self._make_or_check(declarations)
        except ConnectError as error:
            # It is there, for a consumer's connection alone, which may be our own; sending to it is free to all.
            if not isinstance(error.__cause__, ChannelLockedResource):
                raise

    async def _make_or_check(self, declarations: Declarations) -> None:
        name = self.options.error_queue_of(self.queue)
        queue = work_queue(self.queue, self.options, name)
        # What stands is taken as it is, but for what was asked for by name: its consumers say what it should be.
        if self.declare is True and not await declarations.exists(self.queue):
            await declarations.declare_error_queue(error_queue(name, self.options), self._error_declare)
        await declarations.declare(queue, self.declare)

    @property
    def _error_declare(self) -> Any:
        return True if self.options.error_declare is None else self.options.error_declare

    async def _send(self, batch: Sequence[Message], options: Options) -> Sequence[Receipt] | None:
        if self._publisher is None:
            if self._closed:
                raise Closed(f"{self!r} was closed; call open() to use it again.")
            raise ConnectionLost(f"{self!r} is not connected.")
        if (lost := self._publisher.error) is not None:
            raise ConnectionLost(str(lost))
        await self._publisher.publish(batch)
        return None

    def _why_unconfirmed(self) -> str:
        if self._place is not None and (why := self._place.connection.blocked):
            return f"the broker takes no messages now ({why}): rabbitmq-diagnostics alarms."
        return super()._why_unconfirmed()

    async def _close(self) -> None:
        publisher, self._publisher = self._publisher, None
        place, self._place = self._place, None
        if publisher is not None:
            publisher.close()
        if place is not None:
            await place.release()

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_rabbitmq_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_rabbitmq_reply(queue)
