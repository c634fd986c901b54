"""Pipelines, two visible lists; codecs by content type."""

import json
import struct
from collections.abc import Iterator
from typing import Any

import pytest

from streamtools import Bus, ConfigurationError, Message, Producer, codec, register_codec
from streamtools.testing.waiting import eventually, reaches
from streamtools.types import Middleware
from tests.bus.conftest import MakeBus
from tests.bus.contracts import OrderPlaced, PlaceOrder, Quote


def noting(name: str, notes: list[str]) -> Middleware:
    """A middleware that notes when it is passed, in and out."""

    async def pass_by(message: Message, call_next: Any) -> Any:
        notes.append(f"{name} in")
        result = await call_next(message)
        notes.append(f"{name} out")
        return result

    return pass_by


class TestIncoming:
    async def test_is_a_list_to_add_to_reorder_and_replace(self, make: MakeBus) -> None:
        notes: list[str] = []
        a, b, c = (noting(name, notes) for name in "abc")
        bus = make(incoming=[a, b])
        bus.incoming.append(c)
        bus.incoming.reverse()
        bus.incoming[1] = noting("new", notes)

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            notes.append("handler")

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        await reaches(notes, 7)
        assert notes == ["c in", "new in", "a in", "handler", "a out", "new out", "c out"]

    async def test_changes_a_message_before_it_is_decoded_and_what_it_sends_leaves_with_the_handler(
        self, make: MakeBus, waiting: Any
    ) -> None:
        bus, seen = make(), []
        await make("audit").declare()

        async def older(message: Message, call_next: Any) -> Any:
            await bus.send({"seen": message.id}, "audit")
            body = json.loads(message.body)
            return await call_next(message.replace(body=json.dumps({"id": body["number"]}).encode()))

        bus.incoming.append(older)
        bus.register(PlaceOrder, seen.append)
        await bus.start()
        sent = await bus.send({"number": 7}, "orders", type="orders.PlaceOrder")
        [audit] = await waiting("audit", 1)
        assert (seen, json.loads(audit.body)) == ([PlaceOrder(id=7)], {"seen": sent.id})
        assert audit.causation_id == sent.id

    async def test_one_that_raises_is_a_failure_like_the_handler_s(self, make: MakeBus, failed: Any) -> None:
        async def closed(message: Message, call_next: Any) -> Any:
            raise PermissionError("not you")

        bus = make(incoming=[closed])
        bus.register(PlaceOrder, lambda command: None)
        await bus.start()
        await bus.send(PlaceOrder(id=1))
        [message] = await failed(1)
        assert message.error.exception == "PermissionError"

    async def test_sees_what_has_no_handler_too(self, make: MakeBus, failed: Any) -> None:
        notes: list[str] = []
        bus = make(incoming=[noting("a", notes)])
        bus.register(PlaceOrder, lambda command: None)
        await bus.start()
        await bus.send({}, "orders", type="unknown")
        await failed(1)
        assert notes == ["a in"]


class TestOutgoing:
    async def test_has_all_that_leaves_in_its_order(self, make: MakeBus, waiting: Any) -> None:
        kinds: list[str | None] = []

        async def note(message: Message, call_next: Any) -> None:
            kinds.append(message.intent)
            await call_next(message.replace(headers={**message.headers, "signed": "yes"}))

        service, asker = make("service", outgoing=[note]), make("asker", outgoing=[note])
        await make("sink", subscriptions=["#"]).declare()

        @service.handler
        async def quote(command: Quote) -> int:
            await service.publish({}, "a")
            if command.id == 13:
                raise ValueError("unlucky")
            return 1

        await service.start()
        await asker.send(Quote(id=0), "sink")
        await asker.defer(Quote(id=0), delay=0.01, to="sink")
        async with asker.transaction():
            await asker.publish({}, "b")
        assert await asker.request(Quote(id=1), "service", timeout=20) == 1
        assert kinds == ["command", "command", "event", "request", "event", "reply"]
        assert all(message.headers["signed"] == "yes" for message in await waiting("sink", 4))
        with pytest.raises(Exception, match="ValueError"):
            await asker.request(Quote(id=13), "service", timeout=20)
        assert kinds[6:] == ["request", "reply"]

    async def test_may_keep_a_message_back(self, make: MakeBus, depth: Any) -> None:
        async def none(message: Message, call_next: Any) -> None:
            return

        bus = make(outgoing=[none])
        await bus.declare()
        await bus.send(PlaceOrder(id=1))
        async with bus.transaction():
            await bus.send(PlaceOrder(id=2))
        assert await depth("orders") == 0

    async def test_one_that_raises_lets_nothing_of_a_transaction_leave(self, make: MakeBus, depth: Any) -> None:
        async def third(message: Message, call_next: Any) -> None:
            if message.body == b'{"id":3}':
                raise PermissionError("not this")
            await call_next(message)

        bus = make(outgoing=[third])
        await bus.declare()
        with pytest.raises(PermissionError, match="not this"):
            async with bus.transaction():
                for n in range(5):
                    await bus.send(PlaceOrder(id=n))
        assert await depth("orders") == 0

    async def test_one_that_raises_in_a_handler_is_the_handler_s_failure(self, make: MakeBus, failed: Any) -> None:
        async def closed(message: Message, call_next: Any) -> None:
            if message.intent != "command":
                raise PermissionError("not this")
            await call_next(message)

        bus = make(outgoing=[closed])

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            await bus.publish(OrderPlaced(id=1), mandatory=False)

        await bus.start()
        await bus.send(PlaceOrder(id=1))
        [message] = await failed(1)
        assert message.error.exception == "PermissionError"


@pytest.fixture
def codecs() -> Iterator[None]:
    """What a test registers is forgotten after it."""
    before = dict(codec.codecs.CODECS)
    yield
    codec.codecs.CODECS.clear()
    codec.codecs.CODECS.update(before)


def pack(data: dict[str, Any]) -> bytes:
    """A format of the test's own: {"id": n} as four bytes."""
    return struct.pack(">I", data["id"])


def unpack(body: bytes) -> dict[str, int]:
    """Read it."""
    return {"id": struct.unpack(">I", body)[0]}


@pytest.mark.usefixtures("codecs")
class TestCodecs:
    async def test_a_typed_handler_has_its_model_from_a_registered_content_type(
        self, make: MakeBus, url: str, failed: Any
    ) -> None:
        register_codec("application/x-packed", unpack)
        bus, seen = make(), []

        @bus.handler
        async def place(command: PlaceOrder) -> None:
            seen.append(command)

        @bus.handler
        async def rest(data: dict[str, Any]) -> None:
            seen.append(data)

        await bus.start()
        async with Producer("orders", url=url) as producer:
            for id_, type_, body in (
                ("1", "orders.PlaceOrder", pack({"id": 7})), ("2", None, pack({"id": 8})), ("3", None, b"short"),
            ):  # fmt: skip
                await producer.send_messages(
                    [Message(body=body, queue="orders", id=id_, type=type_, content_type="application/x-packed; v=1")]
                )
        [message] = await failed(1)
        assert seen == [PlaceOrder(id=7), {"id": 8}]
        assert (message.id, message.error.attempts) == ("3", 1)
        assert "cannot be decoded" in message.error.reason

    async def test_a_bus_sends_what_it_is_told_to(self, make: MakeBus, waiting: Any) -> None:
        register_codec("application/x-packed", unpack, pack)
        bus, seen = make(content_type="application/x-packed"), []
        bus.register(PlaceOrder, seen.append)
        await make("sink").declare()
        await bus.start()
        await bus.send(PlaceOrder(id=7))
        await bus.send(PlaceOrder(id=8), "sink")
        await bus.send("text", "sink")
        [packed, text] = await waiting("sink", 2)
        assert (packed.body, packed.content_type) == (b"\0\0\0\x08", "application/x-packed")
        assert text.body == b"text"
        await eventually(lambda: seen == [PlaceOrder(id=7)])

    def test_what_nothing_encodes_is_an_error_when_the_bus_is_made(self) -> None:
        register_codec("application/x-read-only", unpack)
        for content_type in ("application/x-read-only", "application/x-none"):
            with pytest.raises(ConfigurationError, match=f"Nothing encodes '{content_type}'.*register_codec"):
                Bus("orders", url="asyncio://", content_type=content_type)
        assert Bus("orders", url="asyncio://", content_type="application/json")

    @pytest.mark.parametrize("content_type", ["yaml", "application/yaml; charset=utf-8", "application/json", ""])
    def test_only_a_media_type_is_registered(self, content_type: str) -> None:
        with pytest.raises(ConfigurationError, match="cannot be registered"):
            register_codec(content_type, unpack)

    async def test_an_unannotated_handler_of_a_plain_consumer_has_it_too(self) -> None:
        register_codec("application/x-packed", unpack)
        message = Message(body=pack({"id": 3}), queue="q", id="1", content_type="Application/X-Packed")
        assert codec.decode(message) == {"id": 3}
        assert codec.decoder(PlaceOrder)(message) == PlaceOrder(id=3)
