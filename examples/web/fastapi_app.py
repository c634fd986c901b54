"""FastAPI with a bus beside it, on one event loop: `python fastapi_app.py`, or `uvicorn fastapi_app:app`."""

import os
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

import uvicorn
from contract import OrderPlaced, PlaceOrder
from fastapi import FastAPI

from streamtools import Bus, MessageContext, Receipt

bus = Bus("fastapi-shop")
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
async def lifespan(app: FastAPI) -> AsyncIterator[None]:
    """The bus runs as long as the app; uvicorn keeps its own signal handlers."""
    async with bus:
        yield


app = FastAPI(lifespan=lifespan)


@app.post("/orders", status_code=202)
async def post_order(order: PlaceOrder) -> Receipt:
    """Answers when the broker holds the command; a contract is a pydantic model, so FastAPI validates it too."""
    return await bus.send(order, to="fastapi-shop")


@app.get("/orders")
async def get_orders() -> list[int]:
    """The numbers of the orders placed."""
    return placed


if __name__ == "__main__":
    uvicorn.run(app, host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
