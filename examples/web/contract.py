"""What the web apps say to each other and to themselves."""

from streamtools import Command, Event


class PlaceOrder(Command, name="shop.PlaceOrder"):
    """To the shop: place this order."""

    id: int
    item: str


class OrderPlaced(Event, name="shop.OrderPlaced"):
    """From the shop, to whom it may concern."""

    id: int
    item: str
