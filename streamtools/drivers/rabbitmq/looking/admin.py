"""RabbitMQAdmin: lists queues by the management API, and does everything else by AMQP."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from typing import Any, ClassVar
from urllib.parse import quote

from aiormq.exceptions import ChannelNotFoundEntity

from streamtools.admin import QueueAdmin
from streamtools.driver import Reader
from streamtools.drivers.rabbitmq.amqp.connection import Connection
from streamtools.drivers.rabbitmq.connections import ConnectionLease, receiving
from streamtools.drivers.rabbitmq.looking.management import Management
from streamtools.drivers.rabbitmq.looking.reader import RabbitMQReader
from streamtools.drivers.rabbitmq.options import ProducerOptions, error_queue, work_queue
from streamtools.drivers.rabbitmq.topology.declarations import Declarations
from streamtools.drivers.rabbitmq.topology.queues import missing
from streamtools.engine.options import read_options
from streamtools.errors import ConnectionLost
from streamtools.exchange import Binding
from streamtools.protocols import QUEUE_OPTIONS
from streamtools.queues import QueueInfo
from streamtools.settings import RabbitMQSettings


class RabbitMQAdmin(QueueAdmin, protocol="rabbitmq"):
    """Administers the queues of RabbitMQ.

    `list` asks the management plugin, whose numbers are up to 5 seconds old. Everything else uses AMQP.
    """

    settings_class: ClassVar[type[RabbitMQSettings]] = RabbitMQSettings
    settings: RabbitMQSettings
    _lease: ConnectionLease | None = None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        #: Queues of which we know that they are not streams.
        self._no_streams: set[str] = set()

    async def _open(self) -> None:
        await self._get_connection()

    async def _close(self) -> None:
        lease, self._lease = self._lease, None
        if lease is not None:
            await lease.release()

    async def _get_connection(self) -> Connection:
        if self._lease is None or self._lease.connection.lost is not None:
            await self._close()
            self._lease = await receiving(self.settings, self.client_id)
        return self._lease.connection

    async def _list(self) -> Sequence[QueueInfo]:
        path = f"queues/{quote(self.settings.vhost, safe='')}?disable_stats=false&enable_queue_totals=true"
        return [_info(row) for row in await Management(self.settings).get(path)]

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        declare_options, _ = read_options(
            ProducerOptions,
            options,
            known=QUEUE_OPTIONS,
            own=frozenset(),
            owner=f"{type(self).__name__}.create",
        )
        declarations = Declarations(await self._get_connection())
        name = declare_options.error_queue_of(queue)
        await declarations.declare_error_queue(
            error_queue(name, declare_options), declare_options.error_declare_or(True)
        )
        await declarations.declare(work_queue(queue, declare_options, name), True)

    async def _delete(self, queue: str) -> None:
        await Declarations(await self._get_connection()).count(queue)
        await self._request(queue, "queue_delete")

    async def _purge(self, queue: str) -> int:
        await self._refuse_stream(queue, "purged")  # the broker would close the connection, which others use too
        answer = await self._request(queue, "queue_purge")
        return int(answer.message_count or 0)

    async def _stats(self, queue: str) -> QueueInfo:
        await self._refuse_stream(queue, "counted")
        ready, consumers = await Declarations(await self._get_connection()).count(queue)
        return QueueInfo(name=queue, ready=ready, consumers=consumers)

    async def _refuse_stream(self, queue: str, use: str) -> None:
        """Raise QueueError for a stream: no message waits in it, and the broker's count for it may be out of date."""
        if queue not in self._no_streams:
            probably = work_queue(queue, ProducerOptions(), "error")
            with suppress(ConnectionLost):  # RabbitMQ 4 may end the connection instead; see rare.unworded_difference
                await Declarations(await self._get_connection()).as_it_is(probably, "passive", use)
            self._no_streams.add(queue)

    async def _bind(self, queue: str, binding: Binding) -> None:
        await Declarations(await self._get_connection()).bind(queue, binding)

    async def _unbind(self, queue: str, binding: Binding) -> None:
        await Declarations(await self._get_connection()).unbind(queue, binding)

    def _viewer(self, queue: str, most: int) -> Reader:
        return self._reader(queue, most)

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return RabbitMQReader(queue, self.settings, most=prefetch, client_id=self.client_id)

    async def _request(self, queue: str, method: str) -> Any:
        connection = await self._get_connection()
        try:
            return await connection.request(
                lambda channel: getattr(channel, method)(queue), expects=(ChannelNotFoundEntity,)
            )
        except ChannelNotFoundEntity as error:
            raise missing(queue, connection.where) from error


def _info(row: dict[str, Any]) -> QueueInfo:
    return QueueInfo(
        name=row["name"],
        ready=row.get("messages_ready") or 0,
        in_hand=row.get("messages_unacknowledged"),
        consumers=row.get("consumers"),
    )
