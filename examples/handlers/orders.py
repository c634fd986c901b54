"""Orders: checks them, and sends a payment for each."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, Field

from streamtools import ConsumerFactory, Producer

consumers = ConsumerFactory()
payments = Producer("payments")


class Order(BaseModel):
    """An order from `async_service.py`. Anything else goes to the error queue, with the reason."""

    order_id: str
    sku: str
    quantity: Annotated[int, Field(gt=0)]
    unit_price: Decimal


class Payment(BaseModel):
    """An amount to be paid."""

    order_id: str
    amount: Decimal


@consumers.route("orders", concurrency=8)
async def order(msg: Order) -> None:
    """Send the payment for an order."""
    payment = Payment(order_id=msg.order_id, amount=msg.quantity * msg.unit_price)
    # The id of the order makes the id: if this order is handled twice, both payments have the same id.
    await payments.send(payment, id=f"payment-{msg.order_id}", type="shop.Payment")
