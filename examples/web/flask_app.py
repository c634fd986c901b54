"""Flask with a bus on a background event loop, which all threads can use: `python flask_app.py`.

Under a server that forks, such as gunicorn, each worker has a loop of its own: start the bus in the worker.
"""

import os
import signal
import sys

from contract import OrderPlaced, PlaceOrder
from flask import Flask, request
from pydantic import ValidationError

from streamtools import Bus, background

bus = Bus("flask-shop")
placed: list[int] = []
app = Flask(__name__)


@bus.handler
async def remember(event: OrderPlaced) -> None:
    """Note an order that this shop, or another one on the broker, has placed."""
    placed.append(event.id)


@app.post("/orders")
def post_order() -> tuple[dict[str, str], int]:
    """Answers when the broker holds the event."""
    order = PlaceOrder.model_validate_json(request.get_data())
    receipt = background.run(bus.publish(OrderPlaced(id=order.id, item=order.item)))
    return {"id": receipt.id}, 202


@app.errorhandler(ValidationError)
def refuse(error: ValidationError) -> tuple[str, int, dict[str, str]]:
    """The body is not an order."""
    return error.json(), 422, {"Content-Type": "application/json"}


@app.get("/orders")
def get_orders() -> list[int]:
    """The numbers of the orders placed."""
    return placed


if __name__ == "__main__":
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(0))
    background.run(bus.start())
    try:
        app.run(host="127.0.0.1", port=int(os.environ.get("PORT", "8000")))
    finally:
        background.run(bus.stop())
