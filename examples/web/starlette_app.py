"""Starlette with a bus beside it, on one event loop: `python starlette_app.py`, or `uvicorn starlette_app:app`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from contract import OrderPlaced, PlaceOrder
from pydantic import ValidationError
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from streamtools import Bus, MessageContext

bus = Bus("starlette-shop")
placed: list[int] = []


@bus.handler
async def place(command: PlaceOrder, context: MessageContext) -> None:
    """Place an order. The event leaves when this handler has succeeded."""
    await context.publish(OrderPlaced(id=command.id, item=command.item))


@bus.handler
async def remember(event: OrderPlaced) -> None:
    """Note an order that this shop, or another one on the broker, has placed."""
    placed.append(event.id)


@asynccontextmanager
async def lifespan(app: Starlette) -> AsyncIterator[None]:
    """The bus runs as long as the app; uvicorn keeps its own signal handlers."""
    async with bus:
        yield


async def post_order(request: Request) -> Response:
    """Answers when the broker holds the command."""
    try:
        order = PlaceOrder.model_validate_json(await request.body())
    except ValidationError as error:
        return Response(error.json(), status_code=422, media_type="application/json")
    receipt = await bus.send(order, to="starlette-shop")
    return JSONResponse({"id": receipt.id, "queue": receipt.queue}, status_code=202)


async def get_orders(request: Request) -> Response:
    """The numbers of the orders placed."""
    return JSONResponse(placed)


routes = [Route("/orders", post_order, methods=["POST"]), Route("/orders", get_orders)]
app = Starlette(lifespan=lifespan, routes=routes)

if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
