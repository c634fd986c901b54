"""The messages of the web apps."""

from streamtools import Command, Event


class PlaceOrder(Command, name="shop.PlaceOrder"):
    """To the shop: place this order."""

    id: int
    item: str


class OrderPlaced(Event, name="shop.OrderPlaced"):
    """From the shop, to everyone who has subscribed: this order was placed."""

    id: int
    item: str
