"""Contracts that the tests of the bus share."""

from __future__ import annotations

from streamtools import Command, Event


class PlaceOrder(Command, name="orders.PlaceOrder", to="orders"):
    id: int


class Bill(Command, name="billing.Bill", to="billing"):
    id: int


class Quote(Command, name="prices.Quote", to="prices"):
    id: int


class Price(Event, name="prices.Price"):
    amount: float


class OrderPlaced(Event, name="orders.OrderPlaced"):
    id: int


class OrderShipped(Event, name="orders.OrderShipped", topic="shipping.eu.shipped"):
    id: int
