"""The messages between webshop and warehouse. Both import this package; it imports neither."""

from __future__ import annotations

from typing import Annotated, Final, Literal

from pydantic import BaseModel, Field

#: Read by the warehouse.
RESERVATIONS: Final = "warehouse.reservations"
#: Read by the webshop.
CONFIRMATIONS: Final = "webshop.confirmations"


class Reservation(BaseModel):
    """Asks the warehouse to reserve some items."""

    order_id: str
    sku: str
    quantity: Annotated[int, Field(gt=0)]


class Confirmation(BaseModel):
    """Says whether the items are reserved."""

    order_id: str
    status: Literal["reserved", "sold out"]
    left: Annotated[int, Field(ge=0)]
