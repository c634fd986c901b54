"""Copies and other messages that leave before the delivery that they are of is acknowledged."""

from __future__ import annotations

from collections.abc import Sequence

from streamtools.delivery import Settlement, goes_last
from streamtools.drivers.rabbitmq.publishing.publisher import Publisher
from streamtools.errors import ConnectError, SendError
from streamtools.message import Message


async def send_before_settling(
    publisher: Publisher, settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    """Those of which the broker holds all that was to be sent, and what it says of the others."""
    first = [m for s in settlements for m in s.outgoing if not goes_last(m, s)]
    held, refused = await _publish(publisher, first, settlements)
    if last := [m for s in held for m in s.outgoing if goes_last(m, s)]:
        held, more = await _publish(publisher, last, held)
        refused = refused or more  # the others are tried again, and then say so themselves
    if refused is not None:
        kept = {id(s) for s in held}
        waiting = [m for s in settlements if id(s) not in kept for m in s.outgoing if goes_last(m, s)]
        refused.unknown = (*refused.unknown, *(m.id for m in waiting))
        refused.messages = (*refused.messages, *waiting)
    return held, refused


async def _publish(
    publisher: Publisher, messages: Sequence[Message], settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    """Those of which none was refused, and the refusal."""
    try:
        if messages:
            await publisher.publish(messages)
    except SendError as error:
        return held(settlements, error.messages), error
    except ConnectError as error:
        return unsent(settlements, messages, error)
    return list(settlements), None


def unsent(
    settlements: Sequence[Settlement], messages: Sequence[Message], error: ConnectError
) -> tuple[list[Settlement], SendError]:
    """The connection that sends has ended, or cannot be had."""
    refusal = SendError(str(error), unknown=[message.id for message in messages], messages=messages)
    refusal.__cause__ = error
    return held(settlements, messages), refusal


def held(settlements: Sequence[Settlement], refused: Sequence[object]) -> list[Settlement]:
    """Those of which the broker holds all that was to be sent."""
    named = frozenset(map(id, refused))
    return [s for s in settlements if not any(id(m) in named for m in s.outgoing)]
