"""What settlements send, and when: the base class's `_settle`, over the four hooks of a driver."""

from __future__ import annotations

import asyncio
from collections.abc import Collection, Sequence

import pytest

from streamtools.delivery import Delivery, Settlement
from streamtools.driver import ConnectionLost, ConsumerHooks, SendError
from streamtools.message import Message
from streamtools.verdicts import ACK, RELEASE


class Driver(ConsumerHooks):
    """Notes what it is asked for.

    Parameters:
        refuses: ids that it does not take.
        stale: deliveries, by id, that came over a connection that has ended.
    """

    def __init__(self, refuses: Collection[str] = (), stale: Collection[str] = ()) -> None:
        self.done: list[tuple[str, list[str]]] = []
        self.refuses = refuses
        self.stale = stale

    def _holds(self, delivery: Delivery) -> bool:
        return delivery.message.id not in self.stale

    async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
        for message, settlement in zip(messages, settlements, strict=True):
            assert any(message is each for each in settlement.outgoing)
        self.done.append(("publish", [message.id for message in messages]))
        if refused := [message for message in messages if message.id in self.refuses]:
            raise SendError("no", refused=[m.id for m in refused], messages=refused)

    async def _acknowledge(self, deliveries: Sequence[Delivery]) -> None:
        self.done.append(("acknowledge", [delivery.message.id for delivery in deliveries]))
        if any(not self._holds(delivery) for delivery in deliveries):
            raise ConnectionLost("of before")

    async def _release(self, deliveries: Sequence[Delivery]) -> None:
        self.done.append(("release", [delivery.message.id for delivery in deliveries]))


def settlement(id: str, *outgoing: Message, verdict: object = ACK) -> Settlement:  # noqa: A002
    return Settlement(Delivery(Message(body=b"", queue="orders", id=id)), verdict, outgoing)  # type: ignore[arg-type]


def message(id: str, intent: str | None = None) -> Message:  # noqa: A002
    return Message(body=b"", queue="others", id=id, intent=intent)


async def test_nothing_is_published_for_settlements_that_send_nothing() -> None:
    driver = Driver()

    await driver._settle([settlement("1"), settlement("2", verdict=RELEASE), settlement("3")])

    assert driver.done == [("release", ["2"]), ("acknowledge", ["1", "3"])]


async def test_replies_go_last_and_then_deliveries_are_acknowledged() -> None:
    driver = Driver()

    await driver._settle([settlement("1", message("r", "reply"), message("a")), settlement("2", message("b"))])

    assert driver.done == [("publish", ["a", "b"]), ("publish", ["r"]), ("acknowledge", ["1", "2"])]


async def test_a_reply_alone_needs_no_call_of_its_own() -> None:
    driver = Driver()

    await driver._settle([settlement("1", message("r", "reply")), settlement("2", message("b"))])

    assert driver.done == [("publish", ["r", "b"]), ("acknowledge", ["1", "2"])]


async def test_a_refusal_keeps_its_delivery_and_its_reply_and_settles_the_others() -> None:
    driver = Driver(refuses=["a"])
    kept = settlement("1", message("a"), message("r", "reply"))

    with pytest.raises(SendError) as caught:
        await driver._settle([kept, settlement("2", message("b"), message("s", "reply"))])

    assert driver.done == [("publish", ["a", "b"]), ("publish", ["s"]), ("acknowledge", ["2"])]
    assert (caught.value.refused, caught.value.unknown) == (("a",), ("r",))
    assert list(caught.value.messages) == list(kept.outgoing)


async def test_a_reply_that_is_refused_keeps_its_delivery() -> None:
    driver = Driver(refuses=["r"])

    with pytest.raises(SendError) as caught:
        await driver._settle([settlement("1", message("a"), message("r", "reply")), settlement("2", message("b"))])

    assert driver.done[-1] == ("acknowledge", ["2"])
    assert caught.value.refused == ("r",)


@pytest.mark.parametrize(("named", "settled"), [((), ["3"]), (("a",), ["3", "2"])])
async def test_a_refusal_without_messages_is_about_the_ids_that_it_names_or_else_about_all(
    named: tuple[str, ...], settled: list[str]
) -> None:
    class NamesIds(Driver):
        async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
            raise SendError("no", refused=named)

    driver = NamesIds()

    with pytest.raises(SendError):
        await driver._settle([settlement("1", message("a")), settlement("2", message("b")), settlement("3")])

    assert driver.done == [("acknowledge", settled)]


async def test_messages_of_one_id_are_told_apart() -> None:
    class OnlyTheFirst(Driver):
        async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
            raise SendError("no", refused=[messages[0].id], messages=[messages[0]])

    driver = OnlyTheFirst()

    with pytest.raises(SendError):
        await driver._settle([settlement("1", message("same")), settlement("2", message("same"))])

    assert driver.done == [("acknowledge", ["2"])]


async def test_nothing_is_sent_for_a_delivery_of_an_earlier_connection() -> None:
    driver = Driver(refuses=["b"], stale=["1"])

    with pytest.raises(ConnectionLost):  # the loss says more than the refusal
        await driver._settle([settlement("1", message("a")), settlement("2", message("b")), settlement("3")])

    assert driver.done == [("publish", ["b"]), ("acknowledge", ["1", "3"])]


async def test_a_connection_that_ends_while_messages_are_sent_settles_nothing() -> None:
    class Lost(Driver):
        async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
            raise ConnectionLost("gone")

    driver = Lost()

    with pytest.raises(ConnectionLost, match="gone"):
        await driver._settle([settlement("1", message("a")), settlement("2")])

    assert driver.done == []


@pytest.mark.parametrize("call", [1, 2])
async def test_nothing_is_acknowledged_when_it_is_cancelled_while_messages_are_sent(call: int) -> None:
    class Silent(Driver):
        async def _publish(self, messages: Sequence[Message], settlements: Sequence[Settlement]) -> None:
            await super()._publish(messages, settlements)
            if len(self.done) == call:
                blocked.set()
                await asyncio.Event().wait()

    driver, blocked = Silent(), asyncio.Event()
    task = asyncio.create_task(driver._settle([settlement("1", message("a"), message("r", "reply"))]))
    await blocked.wait()
    task.cancel()
    with pytest.raises(asyncio.CancelledError):
        await task

    assert [what for what, _ in driver.done] == ["publish"] * call
