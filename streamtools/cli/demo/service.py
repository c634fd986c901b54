"""The demo's service: orders -> payments -> shipments. Nothing in it knows which protocol it runs on."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Final

from streamtools.cli.demo.models import Order, Payment, Shipment
from streamtools.errors import Reject
from streamtools.message import Message
from streamtools.producer import Producer
from streamtools.retry import Retry
from streamtools.routing import ConsumerFactory
from streamtools.runner import ConsumerRunner
from streamtools.types import Middleware

#: Handlers of one queue that run at the same time: while one waits for a confirmation, the others go on.
CONCURRENCY: Final = 50
#: After a fraction of a second the card company is asked again.
RETRY: Final = Retry(retries=5, delay=0.2)


class CardCompanyBusy(Exception):
    """The card company did not answer in time; it will answer if it is asked again."""


class WarehouseClosed(Reject):
    """Nobody is in the warehouse; an operator has to redrive the shipment when it is open."""


class Warehouses:
    """Knows which warehouses are closed."""

    def __init__(self, *closed: str) -> None:
        self._closed = set(closed)

    def open(self, name: str) -> None:
        """Open a warehouse."""
        self._closed.discard(name)

    def check(self, name: str) -> None:
        """Check that a warehouse is open.

        Raises:
            WarehouseClosed: the warehouse is closed.
        """
        if name in self._closed:
            raise WarehouseClosed(f"The warehouse {name} is closed.")


class Queues:
    """The names of the demo's queues; each run has its own prefix, so that runs do not disturb each other."""

    def __init__(self, prefix: str) -> None:
        self.orders: str = f"{prefix}.orders"
        self.payments: str = f"{prefix}.payments"
        self.shipments: str = f"{prefix}.shipments"
        self.error: str = f"{prefix}.error"

    def __iter__(self) -> Iterator[str]:
        return iter((self.orders, self.payments, self.shipments))


def build(url: str, queues: Queues, warehouses: Warehouses, watch: Middleware) -> ConsumerRunner:
    """Return the service, ready to run.

    Parameters:
        watch: counts what happens, for the demo's table.
    """
    consumers = ConsumerFactory(
        url=url, concurrency=CONCURRENCY, retry=RETRY, error_queue=queues.error, middleware=[watch]
    )
    payments = Producer(queues.payments, url=url)
    shipments = Producer(queues.shipments, url=url)

    @consumers.route(queues.orders)
    async def order(msg: Order) -> None:
        # The id of the payment is made from the id of the order, so that an order that is handled twice is paid once.
        await payments.send(Payment(order=msg), id=f"payment-{msg.order_id}", type="demo.Payment")

    @consumers.route(queues.payments)
    async def payment(msg: Payment, message: Message) -> None:
        charge(msg.order, message.attempt)
        parcels = sum(line.quantity for line in msg.order.lines)
        shipment = Shipment(parcels=parcels, **msg.order.model_dump(include={"order_id", "warehouse", "ship_to"}))
        await shipments.send(shipment, id=f"shipment-{msg.order.order_id}", type="demo.Shipment")

    @consumers.route(queues.shipments)
    async def shipment(msg: Shipment) -> None:
        warehouses.check(msg.warehouse)

    return ConsumerRunner(consumers, payments, shipments)


def charge(order: Order, attempt: int) -> None:
    """Charge the customer's card: one in ten needs a second attempt, one in a hundred a third.

    Raises:
        CardCompanyBusy: the card company has to be asked again.
    """
    needed = 3 if order.number % 100 == 7 else 2 if order.number % 10 == 7 else 1
    if attempt < needed:
        raise CardCompanyBusy(f"No answer for {order.order_id} within a second.")
