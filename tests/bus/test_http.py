"""The bus over HTTP."""

import asyncio
import socket
from typing import Any

import pytest

from streamtools import (
    MessageContext,
    RemoteError,
    RequestTimeout,
    SendError,
)
from tests.bus.conftest import MakeBus
from tests.bus.contracts import PlaceOrder, Price


class TestHTTP:
    """A call: the answer of a request comes on it, and there is nothing to subscribe to."""

    @pytest.fixture
    def url(self) -> str:
        with socket.create_server(("127.0.0.1", 0)) as free:
            return f"http://127.0.0.1:{free.getsockname()[1]}"

    async def test_commands_and_requests(self, make: MakeBus) -> None:
        orders, asker = make("orders"), make(None, send_timeout=5)

        @orders.handler
        async def place(command: PlaceOrder, context: MessageContext) -> Any:
            if command.id == 13:
                raise ValueError("unlucky")
            return Price(amount=command.id) if command.id else None

        await orders.start()
        await asker.send(PlaceOrder(id=1))
        assert await asker.request(PlaceOrder(id=2), returns=Price) == Price(amount=2)
        assert await asker.request(PlaceOrder(id=0)) is None
        with pytest.raises(RemoteError, match="failed at 'orders'"):
            await asker.request(PlaceOrder(id=13))
        with pytest.raises(RemoteError, match="There is no handler for 'x'"):
            await asker.request({}, "orders", type="x")
        with pytest.raises(SendError):
            await asker.request(PlaceOrder(id=1), "nowhere")
        assert asker._transport.connections.here().requests._consumer is None

    async def test_one_that_is_not_answered_in_time(self, make: MakeBus) -> None:
        orders, asker, go = make("orders"), make(None), asyncio.Event()

        @orders.handler
        async def place(command: PlaceOrder) -> None:
            await go.wait()

        await orders.start()
        with pytest.raises(RequestTimeout, match="No reply from 'orders'"):
            await asker.request(PlaceOrder(id=1), timeout=0.2)
        go.set()
