"""What is annotated beside a handler's first parameter counts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Annotated, Any, Literal

import pytest
from pydantic import AfterValidator, BaseModel, BeforeValidator, Discriminator, Field, Tag

from streamtools import ConsumerFactory, Delivery, Message
from streamtools.bus import Bus, Command, MessageContext
from streamtools.engine.functions.invoke import compile_handler
from streamtools.errors import ConfigurationError, DecodeError
from streamtools.testing import Harness


def message(body: bytes, content_type: str | None = "application/json") -> Message:
    return Message(body=body, queue="orders", id="1", content_type=content_type)


class Cat(BaseModel):
    kind: Literal["cat"]


class Dog(BaseModel):
    kind: Literal["dog"]


class PlaceOrder(Command):
    id: int


class CancelOrder(Command):
    id: int


def not_thirteen(value: Any) -> Any:
    if getattr(value, "id", value) in (13, b"13"):
        raise ValueError("thirteen is not taken")
    return value


def has_key(value: Message) -> Message:
    assert value.key == "k", "a key is wanted"
    return value


NotThirteen = Annotated[int, AfterValidator(not_thirteen)]


async def greater(msg: Annotated[int, Field(gt=10)]) -> Any:
    return msg


async def default(msg: int = Field(gt=10)) -> Any:
    return msg


async def validated(msg: NotThirteen) -> Any:
    return msg


async def twice(msg: Annotated[NotThirteen, Field(gt=10)]) -> Any:
    return msg


async def maybe(msg: Annotated[int, Field(gt=10)] | None) -> Any:
    return msg


async def raw(msg: Annotated[bytes, AfterValidator(not_thirteen), Field(max_length=3)]) -> Any:
    return msg


async def anything(msg: Annotated[Any, AfterValidator(not_thirteen)]) -> Any:
    return msg


async def before(msg: Annotated[int, BeforeValidator(lambda value: int(value) + 1)]) -> Any:
    return msg


async def listed(msg: Annotated[list[Annotated[int, Field(gt=10)]], Field(min_length=1)]) -> Any:
    return msg


async def pet(msg: Annotated[Cat | Dog, Field(discriminator="kind")]) -> Any:
    return type(msg).__name__


async def called(
    msg: Annotated[
        Annotated[Cat, Tag("cat")] | Annotated[Dog, Tag("dog")], Discriminator(lambda value: value.get("kind"))
    ],
) -> Any:
    return type(msg).__name__


async def documented(msg: Annotated[Message, "the envelope"], further: Annotated[Message, "too"]) -> Any:
    return msg.body, further.id


async def envelope(msg: Annotated[Message, AfterValidator(has_key)]) -> Any:
    return msg.key


GOOD: list[tuple[Callable[..., Any], bytes, Any]] = [
    (greater, b"11", 11), (default, b"11", 11), (validated, b"12", 12), (twice, b"12", 12), (maybe, b"null", None),
    (raw, b"abc", b"abc"), (anything, b'{"a": 1}', {"a": 1}), (before, b"1", 2), (listed, b"[11]", [11]),
    (pet, b'{"kind": "dog"}', "Dog"), (called, b'{"kind": "cat"}', "Cat"), (documented, b"1", (b"1", "1")),
]  # fmt: skip
BAD: list[tuple[Callable[..., Any], bytes, str]] = [
    (greater, b"10", "greater than 10"), (default, b"10", "greater than 10"), (validated, b"13", "thirteen"),
    (twice, b"13", "thirteen"), (twice, b"9", "greater than 10"), (maybe, b"3", "greater than 10"),
    (raw, b"13", "thirteen"), (raw, b"abcd", "at most 3"), (anything, b"13", "thirteen"),
    (listed, b"[]", "at least 1 item"), (listed, b"[1]", "greater than 10"),
    (pet, b'{"kind": "cow"}', "does not match any of the expected tags"), (envelope, b"1", "a key is wanted"),
]  # fmt: skip


@pytest.mark.parametrize(("function", "body", "expected"), GOOD)
async def test_what_fits_is_handled(function: Callable[..., Any], body: bytes, expected: Any) -> None:
    assert await compile_handler(function)(message(body)) == expected


@pytest.mark.parametrize(("function", "body", "why"), BAD)
async def test_what_does_not_fit_is_a_decode_error(function: Callable[..., Any], body: bytes, why: str) -> None:
    with pytest.raises(DecodeError, match=why):
        await compile_handler(function)(message(body))


async def test_a_bus_handler_keeps_what_is_annotated_beside_its_contract() -> None:
    bus, seen = Bus("orders", url="asyncio://"), []

    @bus.handler
    async def place(
        command: Annotated[PlaceOrder, AfterValidator(not_thirteen)], context: Annotated[MessageContext, "of it"]
    ) -> None:
        seen.append((command.id, context.attempt))

    @bus.handler
    async def others(message: Annotated[dict[str, Any], Field(min_length=1)]) -> None:
        seen.append((message["id"], 0))

    async with Harness(bus) as service:
        await service.send("orders", PlaceOrder(id=1))
        await service.send("orders", PlaceOrder(id=13))
        await service.send("orders", {"id": 5})
        await service.send("orders", {})
        await service.settled()
        reasons = [m.error.reason for m in service.rejected if m.error is not None]
    assert seen == [(1, 1), (5, 0)]
    assert ["thirteen" in reasons[0], "at least 1 item" in reasons[1]] == [True, True]


async def test_a_union_of_contracts_keeps_what_is_annotated_beside_each() -> None:
    bus, seen = Bus("orders", url="asyncio://"), []

    @bus.handler
    async def take(
        command: Annotated[
            Annotated[PlaceOrder, AfterValidator(not_thirteen)] | CancelOrder, Field(description="either")
        ],
    ) -> None:
        seen.append(command)

    async with Harness(bus) as service:
        for command in (PlaceOrder(id=13), CancelOrder(id=13), PlaceOrder(id=2)):
            await service.send("orders", command)
        await service.settled()
        assert len(service.rejected) == 1
    assert seen == [CancelOrder(id=13), PlaceOrder(id=2)]


def test_a_context_in_a_route_is_told_what_to_use() -> None:
    async def handle(msg: int, context: MessageContext) -> None: ...

    async def by_hand(msg: int, delivery: Annotated[Delivery, "it"]) -> None: ...

    with pytest.raises(ConfigurationError, match=r"for handlers of a bus, @bus.handler.*outbox=True"):
        compile_handler(handle)
    compile_handler(by_hand)


async def test_a_route_has_what_does_not_fit_rejected_with_the_reason() -> None:
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(greater)
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.send("orders", 11)
        await service.settled()
        assert service.handled("orders") == [11]
        [rejected] = service.rejected
    assert rejected.error is not None
    assert "greater than 10" in rejected.error.reason
