"""Mistakes that type checkers report: one in each line that ends with a comment."""

from streamtools import (
    CONSUMER_LOOPS,
    HTTP,
    PRODUCERS,
    Bus,
    Command,
    Consumer,
    ConsumerFactory,
    Producer,
    RabbitMQSettings,
)
from streamtools.testing import Harness

consumers = ConsumerFactory(url="asyncio://", consumer_grup="billing")  # a name that no protocol has
producer = Producer("orders", url="asyncio://")
bus = Bus("shop", url="asyncio://", concurency=3)  # a name that no consumer has


class PlaceOrder(Command):
    id: int


@consumers.route("orders", concurency=8)  # a wrong name
async def order(msg: int) -> str:
    return str(msg)


@consumers.route("payments", max_body="1 MiB")  # a wrong type
async def payment(msg: int) -> None: ...


@consumers.route("others", ordered_by="size")  # a value that it does not have
async def other(msg: int) -> None: ...


async def sends() -> None:
    await producer.send(1, delays=5)  # a wrong name
    await producer.send(1, partion=5)  # a wrong name of an option
    await producer.send(1, partition="5")  # a wrong type of an option
    await producer.send_many([1], id="1")  # each has its own
    producer.send(1)  # nobody awaits it
    bus.send(PlaceOrder(id=1), to="shop")  # nobody awaits it
    await bus.send(PlaceOrder(id=1), queue="shop")  # it is `to`
    (await producer.send(1)).status  # only HTTP has one
    Producer("orders", urll="asyncio://")  # a wrong name
    Producer("orders", replication="3")  # a wrong type
    Consumer("orders", durabel=True)  # a wrong name
    Consumer("orders", offset="first")  # a value that it does not have


async def by_name() -> None:
    http = PRODUCERS[HTTP]("orders", partitions=3)  # an option of Kafka
    await http.send(1, partition=3)  # an option of Kafka
    (await http.send(1)).state  # it is `status`
    PRODUCERS["sqlite"]("orders", durable=True)  # an option of RabbitMQ
    PRODUCERS["kafka"]("orders", partitions="3")  # a wrong type
    CONSUMER_LOOPS["rabbitmq"]("orders", content_types=["text/*"])  # an option of HTTP
    CONSUMER_LOOPS["http"]("orders", concurrency="8")  # a wrong type


def settings() -> None:
    RabbitMQSettings(hst="rabbit")  # a wrong name
    RabbitMQSettings(password=5)  # a wrong type
    RabbitMQSettings().password.lower()  # it is a secret


async def calls() -> None:
    await order("1")  # a wrong type
    (await order(1)).nothing  # it is a str
    (await bus.request(PlaceOrder(id=1), returns=PlaceOrder)).name  # it has none
    async with Harness(consumers) as service:
        service.send("orders", 1)  # nobody awaits it
