"""The verbs: which is for what, where they send, and what they say when it cannot be."""

import asyncio
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from typing import Any
from urllib.parse import urlsplit

import pytest

from streamtools import (
    ADMINS,
    Bus,
    Command,
    ConfigurationError,
    Exchange,
    FeatureError,
    Message,
    MessageContext,
    QueueError,
    RequestTimeout,
    SendError,
)
from streamtools.errors import OptionError
from streamtools.testing.waiting import eventually, reaches
from tests.brokers.address import RabbitMQAddress
from tests.bus.conftest import MakeBus
from tests.bus.contracts import Bill, OrderPlaced, OrderShipped, PlaceOrder, Quote
from tests.faults.proxy import Proxy

Verb = Callable[[Bus], Any]


class Uncertain(Command):
    """Goes nowhere by itself."""


class TestTheRightVerb:
    """A command is sent, an event is published; the error names the verb to use."""

    @pytest.mark.parametrize(
        ("verb", "text"),
        [
            (lambda bus: bus.publish(PlaceOrder(id=1)), r"PlaceOrder is a command.*await bus\.send"),
            (lambda bus: bus.subscribe(PlaceOrder), r"PlaceOrder is a command.*send\(\)"),
            (lambda bus: bus.unsubscribe(PlaceOrder), r"PlaceOrder is a command.*send\(\)"),
            (lambda bus: bus.send(OrderPlaced(id=1), "orders"), r"OrderPlaced is an event.*await bus\.publish"),
            (lambda bus: bus.request(OrderPlaced(id=1), "orders"), r"OrderPlaced is an event.*await bus\.publish"),
            (
                lambda bus: bus.defer(OrderPlaced(id=1), delay=1, to="orders"),
                r"OrderPlaced is an event.*await bus\.publish",
            ),
            (lambda bus: bus.reply("x"), r"reply\(\) answers the message being handled, and none is"),
            (lambda bus: bus.send({"id": 1}), r"Where is dict to go\? Give to='queue'"),
            (lambda bus: bus.send(Uncertain()), r"or class Uncertain\(Command, to='queue'\)"),
            (lambda bus: bus.publish({"id": 1}), r"Under which topic is a dict to be published\?"),
            (lambda bus: bus.defer(PlaceOrder(id=1)), r"one of delay= .* and at="),
            (lambda bus: bus.defer(PlaceOrder(id=1), delay=1, at=datetime.now(UTC)), r"one of delay= .* and at="),
            (lambda bus: bus.defer(PlaceOrder(id=1), at=datetime(2030, 1, 1)), "has no time zone"),  # noqa: DTZ001
            (lambda bus: bus.defer(PlaceOrder(id=1), delay=-1), "out of range"),
            (lambda bus: bus.send(PlaceOrder(id=1), "o" * 256), "over 255 bytes"),
            (lambda bus: bus.publish({}, "o" * 256), "over 255 bytes"),
            (lambda bus: bus.subscribe("o" * 256), "over 255 bytes"),
            (lambda bus: bus.subscribe(dict), "neither a topic nor an Event"),
            (lambda bus: bus.subscribe(["a", PlaceOrder]), r"PlaceOrder is a command.*send\(\)"),
            (lambda bus: bus.subscribe(), "No topic is given"),
            (lambda bus: bus.unsubscribe([], exchange=Exchange(type="direct")), "No topic is given"),
            (lambda bus: bus.request(PlaceOrder(id=1), timeout=-1), "timeout=-1 is out of range"),
            (lambda bus: bus.send(PlaceOrder(id=1), headers={"streamtools-id": "1"}), "is reserved"),
        ],
    )
    async def test_what_cannot_be_is_an_error_that_teaches(self, verb: Verb, text: str) -> None:
        async with Bus("orders", url="asyncio://") as bus:
            with pytest.raises(ConfigurationError, match=text):
                await verb(bus)

    @pytest.mark.parametrize("fields", [{"type": 5}, {"key": 5}, {"headers": {"a": 1}}])
    async def test_metadata_is_text(self, fields: dict[str, Any]) -> None:
        async with Bus("orders", url="asyncio://") as bus:
            with pytest.raises(TypeError, match="is not a str|is 1"):
                await bus.send(PlaceOrder(id=1), **fields)

    @pytest.mark.parametrize("what", [OrderPlaced, dict, "orders.PlaceOrder"])
    async def test_route_is_for_commands(self, what: Any) -> None:
        with pytest.raises(ConfigurationError, match="route\\(\\) is for commands"):
            Bus("orders", url="asyncio://").route(what, "orders")

    @pytest.mark.parametrize(("to", "text"), [("", "at least one character"), ("o" * 256, "over 255 bytes")])
    async def test_a_route_leads_to_a_name(self, to: str, text: str) -> None:
        with pytest.raises(ConfigurationError, match=text):
            Bus("orders", url="asyncio://").route(PlaceOrder, to)

    async def test_where_there_are_no_exchanges_that_is_said(self) -> None:
        bus = Bus("orders", url="http://127.0.0.1:1")
        for verb in (
            lambda: bus.publish({}, "a"),
            lambda: bus.subscribe("a"),
            lambda: bus.send({}, "a", exchange=Exchange()),
        ):
            with pytest.raises(FeatureError, match="'http' has no exchanges"):
                await verb()
        with pytest.raises(FeatureError, match="'http' has no exchanges"):
            bus.register(OrderPlaced, lambda event: None)
        with pytest.raises(FeatureError, match="'http' has no exchanges"):
            Bus("orders", url="http://127.0.0.1:1", subscriptions=["a"])
        with pytest.raises(FeatureError, match="'http' cannot delay messages"):
            await bus.defer({}, delay=1, to="a")


class TestSend:
    async def test_where_a_command_goes(self, make: MakeBus, waiting: Any) -> None:
        sender = make(None)
        for queue in ("orders", "routed", "called"):
            await make(queue).start()
        await sender.send(PlaceOrder(id=1))
        sender.route(PlaceOrder, "routed")
        await sender.send(PlaceOrder(id=2))
        receipt = await sender.send(PlaceOrder(id=3), "called")
        assert receipt.queue == "called"
        for queue, id_ in (("orders", 1), ("routed", 2), ("called", 3)):
            [message] = await waiting(queue, 1)
            assert message.body == b'{"id":%d}' % id_
            assert (message.type, message.version, message.intent) == ("orders.PlaceOrder", 1, "command")
        assert message.id == receipt.id

    async def test_to_a_queue_that_is_missing_is_an_error(self, make: MakeBus) -> None:
        with pytest.raises(SendError, match="no (queue|topic) 'nowhere'"):
            await make().send(PlaceOrder(id=1), "nowhere")

    async def test_headers_type_key_and_expiry_travel(self, make: MakeBus, waiting: Any) -> None:
        bus = make(client_id="shop-1")
        await bus.start()
        await bus.send({"id": 1}, "orders", headers={"tenant": "ä"}, type="x.Y", key="k", ttl=60)
        [message] = await waiting("orders", 1)
        assert dict(message.headers) == {"tenant": "ä"}
        assert (message.type, message.key, message.source, message.reply_to) == ("x.Y", "k", "shop-1", "orders")
        assert message.expires_at is not None and message.time is not None
        assert 59 < message.expires_at - message.time < 61

    @pytest.mark.parametrize("how", ["register", "decorate"])
    async def test_by_a_direct_exchange_that_the_handler_is_registered_on(self, make: MakeBus, how: str) -> None:
        exchange, seen = Exchange("shop", type="direct"), list[Any]()
        bus, sender = make(), make(None)

        async def place(command: PlaceOrder) -> None:
            seen.append(command)

        if how == "register":
            bus.register(PlaceOrder, place, exchange=exchange)
        else:
            bus.handler(exchange=exchange)(place)
        await bus.start()
        await sender.send(PlaceOrder(id=1), "orders", exchange=exchange)
        sender.route(PlaceOrder, "orders", exchange=exchange)
        await sender.send(PlaceOrder(id=2))
        await reaches(seen, 2)
        with pytest.raises(SendError, match="No queue is bound"):
            await sender.send(PlaceOrder(id=1), "others", exchange=exchange)

    async def test_by_a_fanout_exchange_without_naming_a_queue(self, make: MakeBus, waiting: Any) -> None:
        exchange = Exchange("all", type="fanout")
        for queue in ("one", "two"):
            await make(queue).subscribe(exchange=exchange)
        await make(None).send(PlaceOrder(id=1), exchange=exchange)
        for queue in ("one", "two"):
            [message] = await waiting(queue, 1)
            assert message.type == "orders.PlaceOrder"


class TestPublish:
    async def test_reaches_each_subscriber_once(self, make: MakeBus) -> None:
        seen: list[str] = []
        for queue in ("billing", "shipping"):
            bus = make(queue)

            @bus.handler
            async def note(event: OrderPlaced, context: MessageContext) -> None:
                seen.append(context.message.queue)

            await bus.start()
        receipt = await make(None).publish(OrderPlaced(id=1))
        assert receipt.queue == "orders.OrderPlaced"
        await eventually(lambda: sorted(seen) == ["billing", "shipping"])

    async def test_the_topic_is_the_call_s_the_class_s_or_the_name(self, make: MakeBus, waiting: Any) -> None:
        bus = make("all", subscriptions=["#"])
        await bus.start()
        assert (await bus.publish(OrderPlaced(id=1))).queue == "orders.OrderPlaced"
        assert (await bus.publish(OrderShipped(id=1))).queue == "shipping.eu.shipped"
        assert (await bus.publish(OrderShipped(id=1), "elsewhere")).queue == "elsewhere"
        assert {m.intent for m in await waiting("all", 3)} == {"event"}

    async def test_without_a_subscriber_it_is_an_error_unless_it_may_be(self, make: MakeBus) -> None:
        bus, careless = make(None), make(None, mandatory=False)
        with pytest.raises(SendError, match=r"No queue is bound.*mandatory=False"):
            await bus.publish(OrderPlaced(id=1))
        await bus.publish(OrderPlaced(id=1), mandatory=False)
        await careless.publish(OrderPlaced(id=1))
        with pytest.raises(SendError, match="No queue is bound"):
            await careless.publish(OrderPlaced(id=1), mandatory=True)

    @pytest.mark.parametrize(
        ("exchange", "bound", "topic", "other"),
        [
            (Exchange("d", type="direct"), "orders.placed", "orders.placed", "orders.*"),
            (Exchange("t", type="topic"), "orders.*.placed", "orders.eu.placed", "orders.placed"),
            (Exchange("t2", type="topic"), "orders.#", "orders", "order"),
            (Exchange("f", type="fanout"), "", "whatever", None),
        ],
    )
    async def test_by_each_type_of_exchange(
        self, make: MakeBus, waiting: Any, exchange: Exchange, bound: str, topic: str, other: str | None
    ) -> None:
        bus = make()
        await bus.subscribe(bound, exchange=exchange)
        await bus.publish({"id": 1}, topic, exchange=exchange)
        if other is not None:
            with pytest.raises(SendError, match="No queue is bound"):
                await bus.publish({"id": 1}, other, exchange=exchange)
        [message] = await waiting("orders", 1)
        assert message.intent == "event"

    @pytest.mark.parametrize("mandatory", [True, False])
    async def test_an_exchange_that_is_of_another_type_is_an_error_that_says_which(
        self, make: MakeBus, nothing_waits: Any, mandatory: bool
    ) -> None:
        bus, shop = make(), {kind: Exchange("shop", type=kind) for kind in ("direct", "topic", "fanout")}
        await bus.subscribe("a", exchange=shop["direct"])
        for verb in (
            lambda: bus.publish({}, "a", exchange=shop["topic"], mandatory=mandatory),
            lambda: bus.send({}, "a", exchange=shop["fanout"]),
        ):
            with pytest.raises(SendError, match=r"'shop'.*'direct'"):
                await verb()
        with pytest.raises(QueueError, match=r"'shop'.*'direct'"):
            await bus.subscribe("a", exchange=shop["topic"])
        await nothing_waits("orders")

    async def test_handlers_have_the_events_of_the_exchange_that_they_name(self, make: MakeBus) -> None:
        exchange, seen = Exchange("shop-events", type="fanout"), []
        bus = make()
        bus.register(OrderPlaced, seen.append, exchange=exchange)
        await bus.start()
        await bus.publish(OrderPlaced(id=1), exchange=exchange)
        with pytest.raises(SendError, match="No queue is bound"):
            await bus.publish(OrderPlaced(id=2))
        await reaches(seen, 1)


class TestSubscribe:
    async def test_comes_and_goes_at_run_time(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()

        @bus.handler
        async def rest(data: dict[str, int]) -> None:
            seen.append(data)

        await bus.start()
        for _ in range(2):
            await bus.subscribe("a.*", [OrderShipped, "b"])
        await bus.unsubscribe(["b"])
        await bus.publish({"n": 1}, "a.b")
        await bus.publish(OrderShipped(id=2))
        await reaches(seen, 2)
        for _ in range(2):
            await bus.unsubscribe("a.*", OrderShipped)
        for topic in ("a.b", "shipping.eu.shipped"):
            with pytest.raises(SendError, match="No queue is bound"):
                await bus.publish({"n": 3}, topic)
        assert len(seen) == 2

    async def test_another_queue_is_subscribed_by_name(self, make: MakeBus, waiting: Any) -> None:
        bus = make()
        await make("audit").declare()
        await bus.subscribe("a", queue="audit")
        await bus.publish({"n": 1}, "a")
        assert len(await waiting("audit", 1)) == 1
        with pytest.raises(QueueError, match="nowhere"):
            await bus.subscribe("a", queue="nowhere")

    async def test_it_lasts_over_a_restart_and_what_was_given_up_does_not_come_back(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(OrderPlaced, seen.append)
        await bus.start()
        await bus.unsubscribe(OrderPlaced)
        await bus.stop()
        await bus.start()
        with pytest.raises(SendError, match="No queue is bound"):
            await bus.publish(OrderPlaced(id=1))
        await bus.subscribe(OrderPlaced)
        await bus.publish(OrderPlaced(id=2))
        await reaches(seen, 1)

    async def test_it_is_the_same_after_a_lost_connection(self, rabbitmq_vhost: RabbitMQAddress) -> None:
        parts, seen = urlsplit(rabbitmq_vhost.url), list[Any]()
        async with Proxy(parts.hostname or "", parts.port or 0) as proxy:
            bus = Bus("orders", url=rabbitmq_vhost.url.replace(f":{parts.port}", f":{proxy.port}"))
            bus.handler(seen.append)
            bus.register(OrderPlaced, seen.append)
            async with (
                bus,
                Bus(None, url=rabbitmq_vhost.url) as sender,
                ADMINS["rabbitmq"](url=parts.geturl()) as admin,
            ):
                await bus.subscribe("a")
                await bus.unsubscribe(OrderPlaced)
                await admin.unbind("orders", "a")  # so that it is seen to be made again
                await proxy.cut()
                await eventually(lambda: not bus.consumer.connected)
                await eventually(lambda: bus.consumer.connected)
                with pytest.raises(SendError, match="No queue is bound"):
                    await sender.publish(OrderPlaced(id=1))
                await sender.publish({"id": 2}, "a")
                await reaches(seen, 1)

    async def test_without_a_queue_there_is_nothing_to_subscribe(self, make: MakeBus) -> None:
        with pytest.raises(ConfigurationError, match="no queue of its own"):
            await make(None).subscribe("a")

    async def test_declare_makes_the_queue_and_its_subscriptions_without_receiving(
        self, make: MakeBus, depth: Any
    ) -> None:
        bus = make(subscriptions=["a.#"])
        bus.register(OrderPlaced, lambda event: None)
        for _ in range(2):
            await bus.declare()
        sender = make(None)
        await sender.publish(OrderPlaced(id=1))
        await sender.publish({}, "a.b")
        await sender.send(PlaceOrder(id=1))

        async def three_wait() -> bool:
            return await depth("orders") == 3

        await eventually(three_wait)


class TestDefer:
    @pytest.mark.parametrize("when", ["seconds", "timedelta", "datetime"])
    async def test_is_not_handled_before_its_time(self, make: MakeBus, when: str) -> None:
        seen: list[tuple[int, datetime]] = []
        bus = make()

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            seen.append((command.id, datetime.now(UTC)))

        await bus.start()
        due = datetime.now(UTC) + timedelta(seconds=0.4)
        times: dict[str, Any] = {
            "seconds": {"delay": 0.4}, "timedelta": {"delay": timedelta(seconds=0.4)}, "datetime": {"at": due},
        }  # fmt: skip
        await bus.defer(PlaceOrder(id=2), **times[when])
        await bus.send(PlaceOrder(id=1))
        await reaches(seen, 2)
        handled = dict(seen)
        assert sorted(handled) == [1, 2]
        assert handled[2] >= due - timedelta(milliseconds=1)

    async def test_what_is_due_already_is_handled_at_once(self, make: MakeBus) -> None:
        seen: list[Any] = []
        bus = make()
        bus.register(PlaceOrder, seen.append)
        await bus.start()
        await bus.defer(PlaceOrder(id=1), delay=0)
        await bus.defer(PlaceOrder(id=2), at=datetime.now(UTC) - timedelta(days=1))
        await reaches(seen, 2)

    @pytest.mark.parametrize("kind", ["direct", "topic", "fanout"])
    async def test_goes_by_an_exchange_when_its_time_has_come(self, make: MakeBus, kind: Any) -> None:
        seen: list[tuple[str, int, float]] = []
        exchange = Exchange(f"later-{kind}", type=kind)
        for queue in ("one", "two"):
            bus = make(queue)

            @bus.handler
            async def place(command: PlaceOrder, context: MessageContext, bus: Bus) -> None:
                early = (context.message.deliver_at or 0) - datetime.now(UTC).timestamp()
                seen.append((context.message.queue, command.id, early))

            await bus.start()
            await bus.subscribe("shop.*" if kind == "topic" else "shop.place", exchange=exchange)
        sender = make(None)
        await sender.defer(PlaceOrder(id=1), delay=0.3, to="shop.place", exchange=exchange)
        sender.route(PlaceOrder, "shop.place", exchange=exchange)
        async with sender.transaction():
            await sender.defer(PlaceOrder(id=2), delay=0.1, headers={"a": "b"})
        await reaches(seen, 4)
        assert sorted(s[:2] for s in seen) == [("one", 1), ("one", 2), ("two", 1), ("two", 2)]
        assert max(s[2] for s in seen) <= 0.001

    async def test_can_be_taken_back_where_the_protocol_can(self, make: MakeBus, waiting: Any) -> None:
        bus = make()
        await bus.declare()
        receipts = [await bus.defer(PlaceOrder(id=n), delay=0.5) for n in range(2)]
        if not bus.consumer.features.cancel:
            with pytest.raises(FeatureError, match="taken back"):
                await bus.cancel(receipts[0])
            return
        assert await bus.cancel(receipts[0])
        assert not await bus.cancel(receipts[0])
        [message] = await waiting("orders", 1)
        assert message.id == receipts[1].id
        assert not await bus.cancel(receipts[1])

    async def test_none_of_a_thousand_comes_early(self, make: MakeBus) -> None:
        late: list[float] = []
        bus = make(concurrency=50)

        @bus.handler(type="due")
        async def measure(data: float) -> None:
            late.append(datetime.now(UTC).timestamp() - data)

        await bus.declare()
        async with bus.transaction():
            for n in range(1000):
                at = datetime.now(UTC) + timedelta(milliseconds=500 + n)
                await bus.defer(at.timestamp(), at=at, to="orders", type="due")
        await bus.start()
        await reaches(late, 1000)
        assert min(late) > -0.001


class TestReceive:
    async def test_pulls_from_its_own_queue_and_from_another(self, make: MakeBus) -> None:
        bus = make()
        await bus.start()
        await make("other").declare()
        await bus.send(PlaceOrder(id=1))
        await bus.send(PlaceOrder(id=2), "other")
        [own] = await bus.receive(timeout=20)
        [other] = await bus.receive("other", 10, timeout=20)
        assert (own.message.body, other.message.body) == (b'{"id":1}', b'{"id":2}')
        await own.ack()
        await other.ack()
        assert await bus.receive(timeout=0.05) == []

    async def test_subscribes_the_queue_and_needs_one(self, make: MakeBus) -> None:
        bus = make("mine", subscriptions=["a"])
        assert await bus.receive(timeout=0.05) == []
        await bus.publish({}, "a")
        [delivery] = await bus.receive(timeout=20)
        await delivery.ack()
        with pytest.raises(ConfigurationError, match="no queue of its own"):
            await make(None).receive()
        with pytest.raises(QueueError, match="nowhere"):
            await make(None).receive("nowhere", timeout=5)


async def test_a_sender_needs_no_start(make: MakeBus, waiting: Any) -> None:
    await make("orders").declare()
    await make(None).send(PlaceOrder(id=1))
    assert len(await waiting("orders", 1)) == 1


async def test_what_does_not_arrive_is_named_by_where_it_was_to_go() -> None:
    nobody = "amqp://guest:guest@127.0.0.1:1/"
    bus = Bus("webshop", url=nobody, send_timeout=0.2)

    with pytest.raises(SendError, match="1 message to 'orders' not confirmed"):
        await bus.send(PlaceOrder(id=1))
    with pytest.raises(SendError, match="3 messages to 'orders', 'billing' not confirmed"):
        async with bus.transaction():
            for command in (PlaceOrder(id=1), Bill(id=1), PlaceOrder(id=2)):
                await bus.send(command)


async def test_a_request_that_never_left_does_not_blame_the_handler() -> None:
    bus = Bus(None, url="amqp://guest:guest@127.0.0.1:1/")
    with pytest.raises(RequestTimeout, match="'prices' was not sent: .* Does the broker answer"):
        await bus.request(Quote(id=1), timeout=0.3)
    await bus.stop()


async def test_many_tasks_send_at_once(make: MakeBus) -> None:
    seen: list[Message] = []
    bus = make("billing", concurrency=5)

    @bus.handler
    async def bill(command: Bill, message: Message) -> None:
        seen.append(message)

    await bus.start()
    await asyncio.gather(*(bus.send(Bill(id=n)) for n in range(300)))
    await reaches(seen, 300)
    assert len({message.id for message in seen}) == 300


async def test_a_parameter_that_a_verb_does_not_have_names_what_does() -> None:
    bus, heard = Bus("orders", url="asyncio://"), []

    @bus.handler
    def place(command: PlaceOrder, context: MessageContext) -> None:
        for call in (
            lambda: context.send(command, delay=5),  # type: ignore[arg-type]
            lambda: context.publish(OrderPlaced(id=1), delay=5),  # type: ignore[arg-type]
        ):
            with pytest.raises(TypeError, match=r"await defer\(command, delay=...\)"):
                call()
        with pytest.raises(TypeError, match=r"await bus\.send\(\.\.\., immediately=True\)"):
            context.send(command, immediately=True)  # type: ignore[arg-type]
        heard.append(command.id)

    for call, why in (
        (lambda: bus.send(PlaceOrder(id=1), delay=5), r"send\(\) takes no delay=.*defer"),  # type: ignore[arg-type]
        (lambda: bus.publish(OrderPlaced(id=1), at=5), r"publish\(\) takes no at=.*defer"),  # type: ignore[arg-type]
        (lambda: bus.send(PlaceOrder(id=1), correlation_id="x"), "the bus sets it"),  # type: ignore[arg-type]
        (lambda: bus.send(PlaceOrder(id=1), header={}), "Did you mean 'headers'"),  # type: ignore[arg-type]
    ):
        with pytest.raises(OptionError, match=why):
            await call()
    async with bus:
        await bus.send(PlaceOrder(id=1))
        await eventually(lambda: heard == [1])
