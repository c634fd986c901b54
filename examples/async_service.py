"""A service that sends: `await producer.send(...)` beside its own work.

    python examples/async_service.py

STREAMTOOLS_URL says where the messages go; without it, they go to the file streamtools.db in this folder.
"""

from __future__ import annotations

import asyncio
from dataclasses import dataclass
from decimal import Decimal

from streamtools import Producer


@dataclass
class Order:
    """An order as this service sends it."""

    order_id: str
    sku: str
    quantity: int
    unit_price: Decimal


class Shop:
    """Takes orders, and sends them to a queue."""

    def __init__(self, producer: Producer) -> None:
        self._producer = producer

    async def place(self, order: Order) -> str:
        """Take one order. Returns when the broker holds it."""
        receipt = await self._producer.send(order, key=order.sku, type="shop.Order", headers={"channel": "web"})
        return receipt.id


async def main() -> None:
    """Take three orders, two of them at the same time, and then a whole batch."""
    async with Producer("orders", client_id="shop") as producer:
        shop = Shop(producer)
        await shop.place(Order("A-1", "LMP-4410-BRS", 1, Decimal("89.90")))
        await asyncio.gather(
            shop.place(Order("A-2", "CUP-0815-STN", 4, Decimal("38.40"))),
            shop.place(Order("A-3", "RUG-3304-WOL", 1, Decimal("415.25"))),
        )
        batch = [Order(f"B-{number}", "CND-0303-BWX", number, Decimal("6.75")) for number in range(1, 6)]
        receipts = await producer.send_many(batch, type="shop.Order")
        print(f"{3 + len(receipts)} orders sent to {producer.queue!r}.")


if __name__ == "__main__":
    asyncio.run(main())
