"""Handler classes, and what handlers and their constructors are given."""

import threading
from abc import ABC, abstractmethod
from typing import Any

import pytest

from streamtools import (
    Bus,
    ConfigurationError,
    Delivery,
    Message,
    MessageContext,
)
from streamtools.testing.waiting import reaches
from tests.bus.conftest import MakeBus
from tests.bus.contracts import PlaceOrder, Quote


class Book:
    """What a handler class is given."""

    def __init__(self) -> None:
        self.rows: list[Any] = []


class TestClasses:
    @pytest.mark.parametrize("how", ["register", "decorate"])
    @pytest.mark.parametrize("kind", ["async", "def"])
    async def test_a_fresh_instance_for_each_message_made_of_what_was_provided(
        self, make: MakeBus, how: str, kind: str
    ) -> None:
        instances: list[Any] = []

        class Place:
            def __init__(self, book: Book, limit: int = 5) -> None:
                self.book, self.limit = book, limit

            async def handle(self, command: PlaceOrder, context: MessageContext) -> None:
                instances.append(self)
                self.book.rows.append((command.id, context.attempt, self.limit, threading.current_thread().name))

        class PlaceInThread(Place):
            def handle(self, command: PlaceOrder, context: MessageContext) -> None:  # type: ignore[override]
                instances.append(self)
                self.book.rows.append((command.id, context.attempt, self.limit, threading.current_thread().name))

        bus, book, cls = make(), Book(), Place if kind == "async" else PlaceInThread
        if how == "register":
            bus.register(PlaceOrder, cls)
        else:
            assert bus.handler(cls) is cls
        bus.provide(book)
        await bus.start()
        for n in range(2):
            await bus.send(PlaceOrder(id=n))
        await reaches(book.rows, 2)
        assert [row[:3] for row in book.rows] == [(0, 1, 5), (1, 1, 5)]
        assert all((row[3] == "MainThread") is (kind == "async") for row in book.rows)
        assert instances[0] is not instances[1]

    async def test_what_may_be_missing_is_given_where_it_is_provided(self, make: MakeBus) -> None:
        seen: list[Any] = []

        class Place:
            def __init__(self, book: Book | None = None, limit: int | None = None) -> None:
                self.book, self.limit = book, limit

            async def handle(self, command: PlaceOrder, context: MessageContext | None = None) -> None:
                seen.append((self.book, self.limit, context and context.attempt))

        bus, book = make(), Book()
        bus.provide(book)
        bus.register(PlaceOrder, Place)
        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await reaches(seen, 1)
        assert seen == [(book, None, 1)]

    async def test_what_nothing_provides_is_said_at_start_up(self, make: MakeBus) -> None:
        class Place:
            def __init__(self, book: Book) -> None: ...
            async def handle(self, command: PlaceOrder) -> None: ...

        bus = make()
        bus.register(PlaceOrder, Place)
        with pytest.raises(ConfigurationError, match=r"Place wants book: Book, which nothing provides: bus.provide"):
            await bus.start()
        bus.provide(Book())
        await bus.start()

    async def test_a_class_without_handle_is_refused(self, make: MakeBus) -> None:
        class Abstract(ABC):
            @abstractmethod
            async def handle(self, command: PlaceOrder) -> None: ...

        for kind in (Book, Abstract):
            with pytest.raises(ConfigurationError, match="has no method to handle with"):
                make().register(PlaceOrder, kind)

    async def test_a_handler_that_wants_another_contract_than_it_is_registered_for_is_refused(
        self, make: MakeBus
    ) -> None:
        async def quote(command: Quote) -> None: ...
        async def order(command: PlaceOrder) -> None: ...

        class Express(PlaceOrder):
            by: str = "noon"

        bus = make()
        with pytest.raises(ConfigurationError, match="quote is registered for PlaceOrder and wants Quote"):
            bus.register(PlaceOrder, quote)
        for nothing in ("orders.PlaceOrder", dict):
            with pytest.raises(ConfigurationError, match="neither a Command nor an Event"):
                bus.register(nothing, order)  # type: ignore[arg-type]
        bus.register(Express, order)

    async def test_annotations_that_cannot_be_found_are_an_error_that_says_so(self, make: MakeBus) -> None:
        class Place:
            def __init__(self, book: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821
            async def handle(self, command: PlaceOrder) -> None: ...

        class PlaceToo:
            async def handle(self, command: "Nowhere") -> None: ...  # type: ignore[name-defined]  # noqa: F821

        bus = make()
        with pytest.raises(ConfigurationError, match="'Nowhere' is not defined"):
            bus.handler(PlaceToo)
        bus.register(PlaceOrder, Place)
        with pytest.raises(ConfigurationError, match="'Nowhere' is not defined"):
            await bus.start()

    async def test_a_value_may_be_provided_as_its_base_and_to_functions(self, make: MakeBus) -> None:
        class Ledger(Book): ...

        bus, ledger = make(), Ledger()
        bus.provide(ledger, type=Book)

        @bus.handler
        async def place(command: PlaceOrder, book: Book, on: Bus, message: Message, delivery: Delivery) -> None:
            book.rows.append((on, message.id, delivery.message.id))

        await bus.start()
        sent = await bus.send(PlaceOrder(id=1))
        await reaches(ledger.rows, 1)
        assert ledger.rows == [(bus, sent.id, sent.id)]
