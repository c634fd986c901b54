"""RabbitMQAdmin: queues by AMQP, and the list of them by the management API."""

from __future__ import annotations

import base64
from collections.abc import Sequence
from typing import Any, ClassVar, Final
from urllib.parse import quote, unquote, urlsplit

import aiohttp
from aiormq.exceptions import ChannelNotFoundEntity

from streamtools.admin import QueueAdmin, Reader
from streamtools.drivers.rabbitmq import errors
from streamtools.drivers.rabbitmq.connections import Place, Receiving, receiving
from streamtools.drivers.rabbitmq.link import Link
from streamtools.drivers.rabbitmq.reader import RabbitMQReader
from streamtools.drivers.rabbitmq.topology import MakingOptions, Topology, error_queue, missing, work_queue
from streamtools.errors import ConnectError, StreamToolsError
from streamtools.exchange import Binding
from streamtools.options import QUEUE_OPTIONS, read_options
from streamtools.queues import QueueInfo
from streamtools.settings import RabbitMQSettings

#: Seconds for one answer of the management API.
TIMEOUT: Final = 10.0
PORT: Final = 15672


class RabbitMQAdmin(QueueAdmin, protocol="rabbitmq"):
    """Looks at RabbitMQ's queues and changes them.

    `list` asks the management plugin (its numbers are up to 5 seconds old); everything else is AMQP.
    """

    settings_class: ClassVar[type[RabbitMQSettings]] = RabbitMQSettings
    settings: RabbitMQSettings
    _place: Place[Receiving] | None = None

    async def _open(self) -> None:
        await self._get_link()

    async def _close(self) -> None:
        place, self._place = self._place, None
        if place is not None:
            await place.release()

    async def _get_link(self) -> Link:
        if self._place is None or self._place.link.lost is not None:
            await self._close()
            self._place = await receiving(self.settings, self.client_id)
        return self._place.link

    async def _list(self) -> Sequence[QueueInfo]:
        path = f"queues/{quote(self.settings.vhost, safe='')}?disable_stats=false&enable_queue_totals=true"
        return [_info(row) for row in await self._manage(path)]

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        declare_options, _ = read_options(
            MakingOptions,
            options,
            known=QUEUE_OPTIONS,
            own=frozenset(),
            owner=f"{type(self).__name__}.create",
        )
        topology = Topology(await self._get_link())
        declare = True if declare_options.error_declare is None else declare_options.error_declare
        name = declare_options.error_queue_of(queue)
        await topology.declare_error_queue(error_queue(name, declare_options), declare)
        await topology.declare(work_queue(queue, declare_options, name), True)

    async def _delete(self, queue: str) -> None:
        await self._stats(queue)
        await self._request(queue, "queue_delete")

    async def _purge(self, queue: str) -> int:
        await self._stats(queue)
        answer = await self._request(queue, "queue_purge")
        return int(answer.message_count or 0)

    async def _stats(self, queue: str) -> QueueInfo:
        ready, consumers = await Topology(await self._get_link()).count(queue)
        return QueueInfo(name=queue, ready=ready, consumers=consumers)

    async def _bind(self, queue: str, binding: Binding) -> None:
        await Topology(await self._get_link()).bind(queue, binding)

    async def _unbind(self, queue: str, binding: Binding) -> None:
        await Topology(await self._get_link()).unbind(queue, binding)

    def _viewer(self, queue: str, most: int) -> Reader:
        return self._reader(queue, most)

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return RabbitMQReader(queue, self.settings, most=prefetch, client_id=self.client_id)

    async def _request(self, queue: str, method: str) -> Any:
        link = await self._get_link()
        try:
            async with link.declaring() as channel:
                return await link.call(getattr(channel, method)(queue))
        except StreamToolsError:
            raise
        except ChannelNotFoundEntity as error:
            raise missing(queue, link.where) from error
        except errors.CLIENT_ERRORS as error:
            raise errors.channel_error(error, link.where) from error

    async def _manage(self, path: str) -> Any:
        base, login = self._management()
        where = f"http API of RabbitMQ at {urlsplit(base).netloc.rpartition('@')[2]}"
        try:
            async with (
                aiohttp.ClientSession(timeout=aiohttp.ClientTimeout(total=TIMEOUT)) as session,
                session.get(f"{base}/api/{path}", headers={"Authorization": login}) as answer,
            ):
                if answer.status != 200:
                    raise ConnectError(_refusal(answer.status, where, self.settings.username), permanent=True)
                return await answer.json()
        except ConnectError:  # an OSError too
            raise
        except (aiohttp.ClientError, TimeoutError, OSError) as error:
            raise ConnectError(
                f"The {where} does not answer: {_words(error)}. Listing queues needs the management plugin "
                "(rabbitmq-plugins enable rabbitmq_management); name its address with management_url= or "
                "RMQ_MANAGEMENT_URL."
            ) from error

    def _management(self) -> tuple[str, str]:
        """The API's address without a user in it, and the Authorization header."""
        given = self.settings.management_url
        host = self.settings.addresses[0][0]
        parts = urlsplit(given.get_secret_value() if given is not None else f"http://{_bracketed(host)}:{PORT}")
        user = unquote(parts.username) if parts.username else self.settings.username
        password = unquote(parts.password) if parts.password else self.settings.password.get_secret_value()
        login = base64.b64encode(f"{user}:{password}".encode()).decode()
        netloc = parts.netloc.rpartition("@")[2]
        return f"{parts.scheme}://{netloc}{parts.path.rstrip('/')}", f"Basic {login}"


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host


def _refusal(status: int, where: str, user: str) -> str:
    if status == 401:
        return f"The {where} refuses the user {user!r}: it needs the tag management (rabbitmqctl set_user_tags)."
    return f"The {where} answered {status}."


def _words(error: Exception) -> str:
    # Of a connection that fails aiohttp shows all that it knows, in its own terms.
    if isinstance(error, TimeoutError):
        return f"within {TIMEOUT:g} s"
    return getattr(error, "strerror", None) or type(error).__name__


def _info(row: dict[str, Any]) -> QueueInfo:
    return QueueInfo(
        name=row["name"],
        ready=row.get("messages_ready") or 0,
        in_hand=row.get("messages_unacknowledged"),
        consumers=row.get("consumers"),
    )
