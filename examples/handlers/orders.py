"""Orders: checked, and passed on to be paid."""

from __future__ import annotations

from decimal import Decimal
from typing import Annotated

from pydantic import BaseModel, Field

from streamtools import ConsumerFactory, Producer

consumers = ConsumerFactory()
payments = Producer("payments")


class Order(BaseModel):
    """What `async_service.py` sends. An order that is not so goes to the error queue, with the reason."""

    order_id: str
    sku: str
    quantity: Annotated[int, Field(gt=0)]
    unit_price: Decimal


class Payment(BaseModel):
    """What is to be paid."""

    order_id: str
    amount: Decimal


@consumers.route("orders", concurrency=8)
async def order(msg: Order) -> None:
    """Ask for the money."""
    payment = Payment(order_id=msg.order_id, amount=msg.quantity * msg.unit_price)
    # An id made of the order's own: should this order be handled twice, its payment is the same one.
    await payments.send(payment, id=f"payment-{msg.order_id}", type="shop.Payment")
