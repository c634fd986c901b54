"""Contracts: names, versions, collisions, unknown types, catch-alls, unions."""

import json
from typing import Any

import pytest

from streamtools import Bus, Command, ConfigurationError, Event, Exchange, Message
from streamtools.testing.waiting import eventually, reaches
from tests.bus.conftest import MakeBus
from tests.bus.contracts import OrderPlaced, OrderShipped, PlaceOrder


def test_the_default_name_is_that_of_the_class_alone() -> None:
    class Ship(Command):
        id: int

    class Shipped(Event):
        id: int

    assert (Ship.__terms__.name, Ship.__terms__.version, Ship.__terms__.to) == ("Ship", 1, None)
    assert (Shipped.__terms__.name, Shipped.__terms__.topic) == ("Shipped", "Shipped")


def test_a_name_a_version_a_queue_and_a_topic_are_given_on_the_class() -> None:
    class Ship(Command, name="shop.Ship", version=3, to="shipping"):
        id: int

    assert (Ship.__terms__.name, Ship.__terms__.version, Ship.__terms__.to) == ("shop.Ship", 3, "shipping")
    assert OrderShipped.__terms__.topic == "shipping.eu.shipped"
    assert OrderPlaced.__terms__.topic == "orders.OrderPlaced"


def test_a_subclass_is_a_contract_of_its_own() -> None:
    class Express(PlaceOrder):
        by: str = "noon"

    assert (Express.__terms__.name, Express.__terms__.to) == ("Express", None)
    assert PlaceOrder.__terms__.name == "orders.PlaceOrder"


@pytest.mark.parametrize(
    ("base", "terms", "text"),
    [
        (Command, {"topic": "x"}, "it has no topic="),
        (Event, {"to": "x"}, "it has no to="),
        (Command, {"version": 0}, "versions are 1, 2, 3"),
        (Event, {"version": "2"}, "has version='2'"),
        (Event, {"name": ""}, "at least one character"),
        (Command, {"to": ""}, "at least one character"),
        (Command, {"to": "o" * 256}, "over 255 bytes"),
        (Event, {"topic": "o" * 256}, "over 255 bytes"),
        (Event, {"topic": 5}, "A topic is a text"),
    ],
)
def test_terms_that_cannot_be_are_refused_with_the_class(base: type, terms: dict[str, Any], text: str) -> None:
    with pytest.raises(ConfigurationError, match=text):
        type("Wrong", (base,), {}, **terms)


@pytest.mark.parametrize("base", [Command, Event])
def test_a_misspelt_term_is_refused_with_the_class(base: type) -> None:
    with pytest.raises(TypeError, match=r"class Wrong\(verison=\.\.\.\) is nothing .* Did you mean 'version'"):
        type("Wrong", (base,), {}, verison=2)
    assert type("Right", (base,), {}, extra="forbid").model_config["extra"] == "forbid"  # type: ignore[attr-defined]


def test_two_contracts_of_one_name_are_refused_at_once() -> None:
    class Placed(Event, name="orders.OrderPlaced"):
        number: str

    bus = Bus("orders", url="asyncio://")
    bus.register(OrderPlaced, lambda event: None)
    with pytest.raises(ConfigurationError, match="are both called 'orders.OrderPlaced' on the wire"):
        bus.register(Placed, lambda event: None)


def test_two_classes_of_one_name_with_other_fields_are_two_contracts() -> None:
    def load(**fields: Any) -> type[Command]:
        return type("Ship", (Command,), {"__annotations__": fields, "__module__": "shop"}, name="shop.Ship")

    bus = Bus("orders", url="asyncio://")
    bus.route(load(id=int), "shipping")
    bus.route(load(id=int), "shipping")
    with pytest.raises(ConfigurationError, match="both called 'shop.Ship'"):
        bus.route(load(id=str), "shipping")


def test_two_versions_of_one_name_are_refused_at_once() -> None:
    def contract(version: int) -> type[Command]:
        class Ship(Command, name="shop.Ship", version=version, to="shipping"):
            id: int

        return Ship

    bus = Bus("orders", url="asyncio://")
    bus.route(contract(1), "shipping")
    with pytest.raises(ConfigurationError, match="both called 'shop.Ship'"):
        bus.route(contract(2), "shipping")


def test_one_class_that_is_imported_from_two_packages_is_one_contract() -> None:
    def load() -> type[Event]:
        class Placed(Event, name="shop.Placed"):
            id: int

        return Placed

    one, other = load(), load()
    assert one is not other
    bus = Bus("orders", url="asyncio://")
    bus.register(one, lambda event: None)

    @bus.handler
    def second(event: other) -> None:  # type: ignore[valid-type]
        """The same contract by another import."""


async def test_a_route_holds_for_the_class_by_whichever_package(make: MakeBus) -> None:
    def load() -> type[Command]:
        class Ship(Command, name="shop.Ship"):
            id: int

        return Ship

    bus = make()
    bus.route(load(), "orders")
    await bus.start()
    assert (await bus.send(load()(id=1))).queue == "orders"


def test_a_command_has_one_handler() -> None:
    bus = Bus("orders", url="asyncio://")

    @bus.handler
    async def place(command: PlaceOrder) -> None: ...

    with pytest.raises(ConfigurationError, match=r"has the handler .*place already, and a command has one"):

        @bus.handler
        async def place_again(command: PlaceOrder) -> None: ...

    with pytest.raises(ConfigurationError, match="a command has one"):

        @bus.handler(type="orders.PlaceOrder")
        async def place_too(data: dict[str, int]) -> None: ...


def test_two_handlers_of_an_event_have_two_names() -> None:
    bus = Bus("orders", url="asyncio://")
    for _ in range(2):

        def seen(event: OrderPlaced) -> None: ...

        if not bus._handlers:
            bus.handler(seen)
    with pytest.raises(ConfigurationError, match="a retry is addressed by that name"):
        bus.handler(seen)


def test_a_handler_of_neither_is_refused() -> None:
    bus = Bus("orders", url="asyncio://")
    with pytest.raises(ConfigurationError, match="neither a Command nor an Event"):

        @bus.handler
        def count(number: int) -> None: ...


@pytest.mark.parametrize("type_", [None, "x"])
def test_an_exchange_is_for_a_handler_whose_contract_says_what_comes_by_it(type_: str | None) -> None:
    with pytest.raises(ConfigurationError, match=r"bus\.subscribe\(\) to it"):
        Bus("orders", url="asyncio://").handler(type=type_, exchange=Exchange("x"))(lambda data: None)


@pytest.mark.parametrize(
    "use",
    [
        lambda bus: bus.register(Event, lambda event: None),
        lambda bus: bus.route(Command, "orders"),
        lambda bus: Bus("orders", url="asyncio://", subscriptions=[Event]),
    ],
)
def test_the_base_of_all_is_no_contract(use: Any) -> None:
    with pytest.raises(ConfigurationError, match="is the base of contracts"):
        use(Bus("orders", url="asyncio://"))


def test_a_bus_that_only_sends_has_no_handlers() -> None:
    with pytest.raises(ConfigurationError, match="no queue of its own"):
        Bus(None, url="asyncio://").handler(lambda command: None)
    with pytest.raises(ConfigurationError, match="no queue of its own"):
        Bus(None, url="asyncio://", subscriptions=[OrderPlaced])


def test_what_cannot_work_is_an_error_when_the_bus_is_made() -> None:
    with pytest.raises(TypeError, match="Did you mean 'concurrency'"):
        Bus("orders", url="asyncio://", concurency=3)
    with pytest.raises(ConfigurationError, match="out of range"):
        Bus("orders", url="asyncio://", concurrency=0)
    with pytest.raises(ConfigurationError):
        Bus("", url="asyncio://")
    with pytest.raises(ConfigurationError, match="retry=5 is not a policy"):
        Bus("orders", url="asyncio://").handler(retry=5)(lambda message: None)  # type: ignore[arg-type]


@pytest.mark.parametrize("wrong", [{"incoming": ["log"]}, {"outgoing": [5]}, {"on_error": "log"}])
async def test_what_cannot_be_called_is_an_error_at_start_up(make: MakeBus, wrong: dict[str, Any]) -> None:
    bus = make(**wrong)
    bus.register(PlaceOrder, lambda command: None)
    with pytest.raises(ConfigurationError, match="cannot be called"):
        await bus.start()


def test_one_subscription_may_stand_alone() -> None:
    for subscriptions in ("orders.#", OrderPlaced, ["orders.#"]):
        bus = Bus("orders", url="asyncio://", subscriptions=subscriptions)
        assert len([*bus._subscriptions]) == 1


async def test_a_consumer_of_version_1_receives_version_2_while_it_validates(make: MakeBus, failed: Any) -> None:
    class ShipV2(Command, name="shop.Ship", version=2, to="orders"):
        id: int
        gift: bool = True

    class ShipV3(Command, name="shop.Ship", version=3, to="orders"):
        number: str

    class Ship(Command, name="shop.Ship"):
        id: int

    seen: list[tuple[Ship, int | None]] = []
    bus = make()

    @bus.handler
    async def ship(command: Ship, message: Message) -> None:
        seen.append((command, message.version))

    await bus.start()
    await bus.send(ShipV2(id=7))
    await bus.send(ShipV3(number="7"))
    [rejected] = await failed(1)
    assert seen == [(Ship(id=7), 2)]
    assert (rejected.type, rejected.version) == ("shop.Ship", 3)
    assert "not a valid Ship" in rejected.error.reason


async def test_an_unknown_type_goes_to_the_error_queue_with_the_list_of_known_ones(
    make: MakeBus, failed: Any
) -> None:
    bus = make(retry=None)

    @bus.handler
    async def place(command: PlaceOrder) -> None: ...

    @bus.handler(type="orders.Import")
    async def read(row: dict[str, Any]) -> None: ...

    await bus.start()
    await bus.send({"id": 1}, "orders", type="orders.PlaceOrders")
    await bus.send({"id": 2}, "orders")
    found = {message.type: message.error for message in await failed(2)}
    assert "no handler for 'orders.PlaceOrders'" in found["orders.PlaceOrders"].reason
    assert "Did you mean 'orders.PlaceOrder'" in found["orders.PlaceOrders"].reason
    assert "Known: orders.Import, orders.PlaceOrder." in found["orders.PlaceOrders"].reason
    assert "a message without a type" in found[None].reason
    assert found[None].attempts == 1


@pytest.mark.parametrize("kind", [dict, dict[str, Any], bytes, Message, Any, None])
async def test_a_catch_all_has_what_has_no_handler_untyped_ones_too(make: MakeBus, kind: Any) -> None:
    seen: list[Any] = []
    bus = make()

    @bus.handler
    async def place(command: PlaceOrder) -> None:
        seen.append(command)

    async def rest(message: Any) -> None:
        seen.append(message)

    rest.__annotations__ = {} if kind is None else {"message": kind}
    bus.handler(rest)
    await bus.start()
    for type_ in ("orders.Unknown", None):
        await bus.send({"id": 1}, "orders", type=type_)
    await bus.send(PlaceOrder(id=2))
    await reaches(seen, 3)
    assert seen[2] == PlaceOrder(id=2)
    for found in seen[:2]:
        body = found.body if isinstance(found, Message) else found
        assert (json.loads(body) if isinstance(body, bytes) else body) == {"id": 1}


async def test_a_union_takes_each_of_its_contracts(make: MakeBus) -> None:
    seen: list[Any] = []
    bus = make()

    @bus.handler
    async def any_of_them(message: PlaceOrder | OrderPlaced | OrderShipped) -> None:
        seen.append(message)

    await bus.start()
    sent = [PlaceOrder(id=1), OrderPlaced(id=2), OrderShipped(id=3)]
    await bus.send(sent[0])
    for event in sent[1:]:
        await bus.publish(event)
    await reaches(seen, 3)
    assert sorted(seen, key=lambda m: m.id) == sent


async def test_plain_dicts_work_with_a_queue_or_a_topic_and_a_type(make: MakeBus) -> None:
    seen: list[Any] = []
    bus = make(subscriptions=["imports.#"])

    @bus.handler(type="imports.Row")
    async def row(data: dict[str, int]) -> None:
        seen.append(("row", data))

    @bus.handler
    async def rest(data: dict[str, int], message: Message) -> None:
        seen.append((message.type, data))

    await bus.start()
    await bus.send({"id": 1}, "orders", type="imports.Row")
    await bus.publish({"id": 2}, "imports.eu.rows", type="imports.Row")
    await bus.publish({"id": 3}, "imports")
    await eventually(lambda: len(seen) == 3)
    assert sorted(seen, key=lambda s: s[1]["id"]) == [("row", {"id": 1}), ("row", {"id": 2}), (None, {"id": 3})]
