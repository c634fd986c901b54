"""The messages that the three handlers of the demo receive."""

from __future__ import annotations

from datetime import datetime
from decimal import Decimal
from typing import Annotated, Literal, Self

from pydantic import BaseModel, Field, model_validator

Currency = Literal["EUR", "GBP", "JPY", "NOK", "PLN", "SEK"]


class Customer(BaseModel):
    """Who ordered."""

    id: str
    name: str
    email: str


class Line(BaseModel):
    """One article of an order."""

    sku: Annotated[str, Field(pattern=r"^[A-Z]{3}-\d{4}-[A-Z]{3}$")]
    title: str
    quantity: Annotated[int, Field(gt=0)]
    unit_price: Annotated[Decimal, Field(gt=0)]


class Address(BaseModel):
    """Where an order goes."""

    street: str
    postal_code: str
    city: str
    country: Annotated[str, Field(pattern=r"^[A-Z]{2}$")]


class Order(BaseModel):
    """One line of orders.jsonl."""

    order_id: str
    placed_at: datetime
    channel: Literal["web", "app", "phone", "shop"]
    customer: Customer
    warehouse: str
    currency: Currency
    lines: Annotated[list[Line], Field(min_length=1)]
    ship_to: Address
    total: Decimal

    @property
    def number(self) -> int:
        """The number at the end of the order's id."""
        return int(self.order_id.rpartition("-")[2])

    @model_validator(mode="after")
    def _adds_up(self) -> Self:
        total = sum((line.quantity * line.unit_price for line in self.lines), Decimal(0))
        if total != self.total:
            raise ValueError(f"the lines come to {total}, not to {self.total}")
        return self


class Payment(BaseModel):
    """An order that has to be paid."""

    order: Order


class Shipment(BaseModel):
    """A paid order that has to leave its warehouse."""

    order_id: str
    warehouse: str
    ship_to: Address
    parcels: Annotated[int, Field(gt=0)]
