"""The warehouse: handles reservations. Run it: streamtools run warehouse:runner"""

from __future__ import annotations

from contract import CONFIRMATIONS, RESERVATIONS, Confirmation, Reservation

from streamtools import ConsumerFactory, ConsumerRunner, Producer

consumers = ConsumerFactory(client_id="warehouse")
confirmations = Producer(CONFIRMATIONS, client_id="warehouse")
stock = {"LMP-4410-BRS": 3, "RUG-3304-WOL": 1}


@consumers.route(RESERVATIONS)
async def reserve(msg: Reservation) -> None:
    """Reserve the items if they are there, and answer."""
    left = stock.get(msg.sku, 0)
    enough = left >= msg.quantity
    if enough:
        stock[msg.sku] = left = left - msg.quantity
    answer = Confirmation(order_id=msg.order_id, status="reserved" if enough else "sold out", left=left)
    await confirmations.send(answer, id=f"confirmation-{msg.order_id}")


runner = ConsumerRunner(consumers, confirmations)
