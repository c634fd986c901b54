"""Payments: asks the card company, and asks again if it does not answer."""

from __future__ import annotations

from decimal import Decimal

from pydantic import BaseModel

from streamtools import ConsumerFactory, Message, Reject, Retry

consumers = ConsumerFactory()


class Payment(BaseModel):
    """An amount to be paid."""

    order_id: str
    amount: Decimal


@consumers.route("payments", concurrency=8, retry=Retry(retries=5, delay=0.2))
async def payment(msg: Payment, message: Message) -> None:
    """Charge the card."""
    if msg.amount > 10_000:
        raise Reject("over the card's limit")  # no retry can help: to the error queue
    if msg.order_id == "A-2" and message.attempt == 1:
        raise TimeoutError("the card company did not answer")  # retried in about 0.2 s
    print(f"{msg.order_id} paid {msg.amount}", flush=True)
