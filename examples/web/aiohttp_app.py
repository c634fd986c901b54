"""aiohttp's web server with a bus beside it, on one event loop: `python aiohttp_app.py`."""

import os
from collections.abc import AsyncIterator

from aiohttp import web
from contract import OrderPlaced, PlaceOrder
from pydantic import ValidationError

from streamtools import Bus, MessageContext

bus = Bus("aiohttp-shop")
placed: list[int] = []


@bus.handler
async def place(command: PlaceOrder, context: MessageContext) -> None:
    """Place an order. The event leaves when this handler has succeeded."""
    await context.publish(OrderPlaced(id=command.id, item=command.item))


@bus.handler
async def remember(event: OrderPlaced) -> None:
    """Note an order that this shop, or another one on the broker, has placed."""
    placed.append(event.id)


async def run_bus(app: web.Application) -> AsyncIterator[None]:
    """The bus runs as long as the app, which keeps its own signal handlers."""
    async with bus:
        yield


async def post_order(request: web.Request) -> web.Response:
    """Answers when the broker holds the command."""
    try:
        order = PlaceOrder.model_validate_json(await request.read())
    except ValidationError as error:
        return web.Response(status=422, text=error.json(), content_type="application/json")
    receipt = await bus.send(order, to="aiohttp-shop")
    return web.json_response({"id": receipt.id, "queue": receipt.queue}, status=202)


async def get_orders(request: web.Request) -> web.Response:
    """The numbers of the orders placed."""
    return web.json_response(placed)


app = web.Application()
app.cleanup_ctx.append(run_bus)
app.add_routes([web.post("/orders", post_order), web.get("/orders", get_orders)])

if __name__ == "__main__":
    web.run_app(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
