"""RabbitMQProducer: publishes to the default exchange, where a queue's name is its routing key."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, ClassVar, Unpack

from aiormq.exceptions import ChannelLockedResource

from streamtools.driver import Options
from streamtools.drivers.rabbitmq.connections import ConnectionLease, receiving, sending
from streamtools.drivers.rabbitmq.features import FEATURES
from streamtools.drivers.rabbitmq.names import check_rabbitmq_name, check_rabbitmq_reply
from streamtools.drivers.rabbitmq.options import (
    ProducerOptions,
    RabbitMQProducerParameters,
    error_queue,
    work_queue,
)
from streamtools.drivers.rabbitmq.publishing.batch import Limits
from streamtools.drivers.rabbitmq.publishing.publisher import Publisher
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.errors import Closed, ConnectError, ConnectionLost
from streamtools.message import Message
from streamtools.parameters import SendManyParameters, SendParameters
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
    _lease: ConnectionLease | None = None
    _publisher: Publisher | None = None

    if TYPE_CHECKING:  # at run time options of other protocols are taken too, and ignored

        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[SendParameters]
        ) -> Receipt: ...
        async def send_many(  # type: ignore[override]
            self, payloads: Iterable[object], **options: Unpack[SendManyParameters]
        ) -> list[Receipt]: ...

    def __init__(self, queue: str, **options: Unpack[RabbitMQProducerParameters]) -> None:
        super().__init__(queue, **options)
        self._limits = Limits()

    async def _open(self) -> None:
        await self._close()
        self._lease = lease = await sending(self.settings, self.client_id)
        # The publisher gives up a little before the base class, because its error names the reason.
        patience = self.send_timeout * 0.9
        publisher = Publisher(lease.shared, self._limits, patience=patience, declares=self.declares_exchanges)
        if lease.connection.blocked:  # then it answers no requests either, until it accepts messages again
            await self._declare_elsewhere()
        else:
            await self._declare(Declarations(lease.connection))
            await publisher.open()
        self._publisher = publisher

    async def _declare_elsewhere(self) -> None:
        lease = await receiving(self.settings, self.client_id)
        try:
            await self._declare(Declarations(lease.connection))
        finally:
            await lease.release()

    async def _declare(self, declarations: Declarations) -> None:
        if self.declare is False:
            return
        name = self.options.error_queue_of(self.queue)
        try:
            # An existing queue is used unchanged, because its consumers decide what it has; only options that the
            # user gave are checked.
            if self.declare is True and not await declarations.exists(self.queue):
                await declarations.declare_error_queue(
                    error_queue(name, self.options), self.options.error_declare_or(True)
                )
            await declarations.declare(work_queue(self.queue, self.options, name), self.declare)
        except ConnectError as error:
            # The queue exists, and is exclusive to a consumer's connection; but everybody may send to it.
            if not isinstance(error.__cause__, ChannelLockedResource):
                raise

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
        if self._lease is not None and (why := self._lease.connection.blocked):
            return f"the broker takes no messages now ({why}): rabbitmq-diagnostics alarms."
        return super()._why_unconfirmed()

    async def _close(self) -> None:
        publisher, self._publisher = self._publisher, None
        lease, self._lease = self._lease, None
        if publisher is not None:
            publisher.close()
        if lease is not None:
            await lease.release()

    @classmethod
    def validate_queue(cls, queue: str) -> None:
        super().validate_queue(queue)
        check_rabbitmq_name(queue)

    @classmethod
    def validate_reply(cls, queue: str) -> None:
        check_rabbitmq_reply(queue)
