"""A service as a user writes it: what type checkers know of it, said by `assert_type`.

mypy and pyright read it by their strictest rules, and it runs.
"""

import asyncio
import logging
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Any, ClassVar, Unpack, assert_type

from pydantic import BaseModel, SecretStr

from streamtools import (
    ADMINS,
    CONSUMER_LOOPS,
    HTTP,
    KAFKA,
    PRODUCERS,
    RABBITMQ,
    Bus,
    Command,
    Consumer,
    ConsumerFactory,
    ConsumerRunner,
    Delivery,
    Event,
    Handler,
    HTTPSettings,
    KafkaSettings,
    Message,
    MessageContext,
    Producer,
    QueueInfo,
    RabbitMQSettings,
    Receipt,
    Reject,
    Retry,
    RetryLater,
    SendError,
    StreamToolsError,
    Verdict,
)
from streamtools.driver import Options
from streamtools.drivers.http import HTTPConsumer, HTTPProducer, HTTPReceipt
from streamtools.drivers.kafka import KafkaProducer
from streamtools.options import AnySendOptions
from streamtools.parameters import ProducerParameters, SendParameters
from streamtools.testing import Harness

log = logging.getLogger(__name__)


class Order(BaseModel):
    id: int
    amount: float = 1.0


class Paid(BaseModel):
    order: int


class PlaceOrder(Command):
    id: int


class OrderPlaced(Event):
    id: int


class Tickets:
    """What `provide` gives to handlers."""

    def __init__(self) -> None:
        self.last = 0

    def next(self) -> int:
        self.last += 1
        return self.last


# --- handlers of queues ---------------------------------------------------------------------------


async def timed(message: Message, call_next: Handler) -> object:
    begin = datetime.now(UTC)
    try:
        return await call_next(message)
    finally:
        log.info("%s: %s", message.queue, datetime.now(UTC) - begin)


consumers = ConsumerFactory(
    url="asyncio://typing", retry=Retry(retries=3, delay=60), middleware=[timed], durable=True, auto_ack=False
)
returns = ConsumerFactory(HTTP, port=9000, method="POST")
payments = Producer("payments", url="asyncio://typing", send_timeout=timedelta(seconds=5), partitions=3)


@consumers.route("orders", concurrency=8, ordered_by="key", queue_type="quorum", method="PUT", max_body=1024)
async def order(msg: Order, message: Message) -> Paid:
    if msg.amount <= 0:
        raise Reject("nothing to pay")
    receipt = await payments.send(
        {"order": msg.id}, id=f"payment-{msg.id}", key=message.key, ttl=60, partition=0, wait=True, endpoint=None
    )
    assert_type(receipt, Receipt)
    return Paid(order=msg.id)


@consumers.route("payments", ack="manual", topics=["paid"], start_time=datetime.now(UTC))
async def payment(msg: dict[str, int], delivery: Delivery) -> None:
    if msg["order"] == 2 and delivery.message.attempt == 1:
        await delivery.retry(timedelta(seconds=1))
    else:
        await delivery.ack()


@consumers.route("invoices")
def invoice(msg: Order) -> str:
    if msg.id < 0:
        raise RetryLater(delay=5)
    return f"invoice {msg.id}"


@consumers.route("both")
@consumers.route("either")
async def both(msg: str) -> int:
    return len(msg)


class Shop:
    @returns.route("returns")
    async def back(self, msg: Order) -> bool:
        return msg.amount > 0


single = Consumer("alone", url="asyncio://typing", offset="latest", exactly_once=False, arguments={"x-max-length": 5})


@single(retry=Retry(retries=1), auto_ack=False)
async def alone(msg: int) -> float:
    return msg / 2


async def handlers_are_functions() -> None:
    assert_type(await order(Order(id=1), Message(body=b"", queue="orders", id="1")), Paid)
    assert_type(invoice(Order(id=1)), str)
    assert_type(await both("abc"), int)
    assert_type(await Shop().back(Order(id=1)), bool)
    assert_type(await alone(3), float)


# --- a bus ----------------------------------------------------------------------------------------


async def trouble(message: Message, error: BaseException, attempt: int) -> Verdict | None:
    if isinstance(error, TimeoutError) and attempt < 3:
        return Verdict.retry(timedelta(seconds=1))
    return Verdict.reject(f"{message.id}: {error}") if isinstance(error, ValueError) else None


bus = Bus("shop", url="asyncio://typing", on_error=trouble, incoming=[timed], concurrency=4, consumer_group="shop")
bus.provide(Tickets())


@bus.handler
async def place(command: PlaceOrder, context: MessageContext, tickets: Tickets) -> Paid:
    assert_type(context.headers, Mapping[str, str])
    assert_type(context.correlation_id, str)
    await context.publish(OrderPlaced(id=command.id), headers={"ticket": str(tickets.next())})
    context.defer(PlaceOrder(id=0), delay=timedelta(days=1), to="archive")
    return Paid(order=command.id)


@bus.handler(retry=Retry(retries=2))
def placed(event: OrderPlaced) -> None:
    log.info("placed: %s", event.id)


async def ask() -> None:
    assert_type(await bus.send(PlaceOrder(id=1), to="shop", ttl=60), Receipt)
    assert_type(await bus.request(PlaceOrder(id=1), to="shop", returns=Paid), Paid)
    assert_type(await bus.request(PlaceOrder(id=1), to="shop", returns=dict[str, int], timeout=1), dict[str, int])
    async with bus.transaction() as transaction:
        assert_type(transaction, Bus)
        assert_type(await transaction.publish(OrderPlaced(id=1)), Receipt)


# --- a driver of another package --------------------------------------------------------------------


class BoxesOptions(Options):
    size: int = 1


class BoxesSendOptions(Options):
    fragile: bool = False


class BoxesParameters(ProducerParameters, total=False):
    size: int


class BoxesSendParameters(SendParameters, total=False):
    fragile: bool


class BoxesProducer(Producer):
    options_class: ClassVar[type[Options]] = BoxesOptions
    send_options_class: ClassVar[type[Options]] = BoxesSendOptions

    if TYPE_CHECKING:

        def __init__(self, queue: str, **options: Unpack[BoxesParameters]) -> None: ...
        async def send(  # type: ignore[override]
            self, payload: object, **options: Unpack[BoxesSendParameters]
        ) -> Receipt: ...


# --- protocols by name ----------------------------------------------------------------------------


async def by_name(name: str) -> None:
    http = PRODUCERS["http"]("orders", url="http://localhost", method="PUT")
    assert_type(http, HTTPProducer)
    receipt = await http.send({"id": 1}, endpoint="http://localhost/other", headers_tag="JSON", key="k")
    assert_type(receipt, HTTPReceipt)
    assert_type(receipt.status, int)
    assert_type(receipt.headers, Mapping[str, str])
    assert_type(await http.send_many([1, 2], method="PATCH"), list[HTTPReceipt])
    assert_type(PRODUCERS[HTTP]("orders"), HTTPProducer)
    async with PRODUCERS[KAFKA]("orders", replication=3, outbox=True) as kafka:
        assert_type(kafka, KafkaProducer)
        assert_type(await kafka.send(None, key="k", tombstone=True, partition=1, timestamp=0.0, wait=False), Receipt)
        async with kafka.transaction():
            await kafka.send_many([1, 2], partition=2)
    settings = RabbitMQSettings(host="rabbit", password="p@ss", management_url="https://rabbit:15671")
    assert_type(settings.password, SecretStr)
    assert_type(settings.management_url, SecretStr | None)
    PRODUCERS[RABBITMQ]("orders", url=settings, queue_type="classic", error_queue="{queue}.bad")
    assert_type(KafkaSettings(password=SecretStr("p@ss"), sasl="PLAIN").password, SecretStr)
    web = HTTPSettings(tokens=["a" * 16], hosts="shop.example", origins=["https://shop.example"])
    assert_type(web.tokens, tuple[SecretStr, ...])
    assert_type(web.origins, tuple[str, ...])
    loop = CONSUMER_LOOPS["http"]("orders", content_types=["application/json", "text/*"], max_body=1024, port=0)
    assert_type(loop, HTTPConsumer)
    assert_type(loop.address, tuple[str, int])
    CONSUMER_LOOPS["kafka"]("orders", group="billing", start_offset=5, exactly_once=True, revoke_timeout=5)
    assert_type(PRODUCERS[name], type[Producer])
    assert_type(CONSUMER_LOOPS[name], type[Consumer])


async def options_that_are_read_from_a_file(options: dict[str, Any]) -> None:
    async with Producer("orders", **options) as producer:
        assert_type(producer, Producer)
        await producer.send("x", **options)


async def send_order(producer: Producer, order: Order, **options: Unpack[AnySendOptions]) -> str:
    receipt = await producer.send(order, key=str(order.id), **options)
    return receipt.id


async def another_protocol() -> None:
    boxes = BoxesProducer("orders", url="boxes://", size=3, client_id="shop")
    assert_type(await boxes.send("x", fragile=True, key="k"), Receipt)


# --- by hand, and by an operator --------------------------------------------------------------------


async def by_hand() -> None:
    async with Consumer("alone", url="asyncio://typing") as consumer:
        batch = await consumer.receive(10, timeout=0)
        assert_type(batch, list[Delivery])
        await consumer.ack_many(batch)
        async for delivery in consumer:
            assert_type(delivery.message.headers, Mapping[str, str])
            await delivery.reject("no")


async def operate() -> None:
    async with ADMINS["asyncio"](url="asyncio://typing") as admin:
        await admin.create("orders", queue_type="quorum", partitions=3)
        assert_type(await admin.stats("orders"), QueueInfo)
        assert_type(await admin.move("error", "orders"), int)
        await admin.delete("orders")
    try:
        await payments.send(1)
    except SendError as error:
        log.warning("%s", error.refused)
    except StreamToolsError:
        log.exception("not sent")


# --- a test of it, and how it runs ----------------------------------------------------------------


async def check() -> None:
    """What a test of this service looks like."""
    async with Harness(consumers, bus) as service:
        assert_type(await service.send("orders", {"id": 1}), Receipt)
        await service.send("shop", PlaceOrder(id=7))
        await service.settled()
        assert service.handled("orders") == [{"id": 1}]
        assert_type(service.published(OrderPlaced), list[OrderPlaced])
        assert [event.id for event in service.published(OrderPlaced)] == [7]
        assert_type(service.rejected, list[Message])


def main() -> None:
    sources = (consumers, alone, Shop().back, bus, payments)
    ConsumerRunner(*sources, on_startup=[ask], shutdown_timeout=timedelta(seconds=5)).run()


if __name__ == "__main__":
    asyncio.run(check())
