"""The webshop: reserves what was ordered and waits for the answers. Run it: python webshop.py"""

from __future__ import annotations

import asyncio

from contract import CONFIRMATIONS, RESERVATIONS, Confirmation, Reservation

from streamtools import ConsumerFactory, ConsumerRunner, Producer

ORDERS = [
    Reservation(order_id="W-1", sku="LMP-4410-BRS", quantity=2),
    Reservation(order_id="W-2", sku="RUG-3304-WOL", quantity=1),
    Reservation(order_id="W-3", sku="LMP-4410-BRS", quantity=2),
]


async def main() -> None:
    """Send all reservations, and end when each has an answer."""
    answered: dict[str, Confirmation] = {}
    complete = asyncio.Event()
    consumers = ConsumerFactory(client_id="webshop")

    @consumers.route(CONFIRMATIONS)
    async def confirmed(msg: Confirmation) -> None:
        answered[msg.order_id] = msg
        print(f"{msg.order_id}: {msg.status}, {msg.left} left")
        if len(answered) == len(ORDERS):
            complete.set()

    reservations = Producer(RESERVATIONS, client_id="webshop")
    async with ConsumerRunner(consumers, reservations):
        await reservations.send_many(ORDERS, type="warehouse.Reservation")
        await complete.wait()


if __name__ == "__main__":
    asyncio.run(main())
