"""AsyncIOAdmin: administers the queues of this process."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, ClassVar

from streamtools.admin import QueueAdmin
from streamtools.driver import Reader
from streamtools.drivers.asyncio.broker import Broker
from streamtools.drivers.asyncio.consumer import AsyncIOReader
from streamtools.exchange import Binding
from streamtools.queues import QueueInfo
from streamtools.settings import AsyncIOSettings


class AsyncIOAdmin(QueueAdmin, protocol="asyncio"):
    """Administers the queues of this process."""

    settings_class: ClassVar[type[AsyncIOSettings]] = AsyncIOSettings
    settings: AsyncIOSettings

    async def _open(self) -> None:
        self._broker = Broker.of(self.settings)

    async def _list(self) -> Sequence[QueueInfo]:
        return [await self._stats(name) for name in list(self._broker.topics)]

    async def _create(self, queue: str, options: dict[str, Any]) -> None:
        self._broker.declare(queue, True)

    async def _delete(self, queue: str) -> None:
        self._broker.delete(queue)

    async def _purge(self, queue: str) -> int:
        return sum(group.purge() for group in self._broker.topic(queue).groups.values())

    async def _stats(self, queue: str) -> QueueInfo:
        groups = list(self._broker.topic(queue).groups.values())
        for group in groups:
            group.ripen()
        return QueueInfo(
            name=queue,
            ready=sum(len(group.ready) for group in groups),
            delayed=sum(len(group.later) for group in groups),
            in_hand=sum(group.in_hand for group in groups),
        )

    async def _bind(self, queue: str, binding: Binding) -> None:
        self._broker.bind(queue, binding)

    async def _unbind(self, queue: str, binding: Binding) -> None:
        self._broker.unbind(queue, binding)

    async def _cancel(self, queue: str, id: str) -> bool:  # noqa: A002
        found = [group.cancel(id) for group in self._broker.topic(queue).groups.values()]
        return any(found)

    def _reader(self, queue: str, prefetch: int) -> Reader:
        return AsyncIOReader(queue, url=self.settings, prefetch=max(1, prefetch), declare=False)
