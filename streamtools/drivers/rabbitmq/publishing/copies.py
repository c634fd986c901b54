"""Copies and other messages that are sent before the delivery that they belong to is acknowledged."""

from __future__ import annotations

from collections.abc import Sequence

from streamtools.delivery import Settlement, goes_last
from streamtools.drivers.rabbitmq.publishing.sender import Sender
from streamtools.errors import ConnectError, SendError
from streamtools.message import Message


async def send_before_settling(
    sender: Sender, settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    """Send the messages of these settlements.

    Returns:
        the settlements of which the broker holds all messages, and the error that names the messages of the others.
    """
    first = [m for s in settlements for m in s.outgoing if not goes_last(m, s)]
    held, refused = await _send(sender, first, settlements)
    if last := [m for s in held for m in s.outgoing if goes_last(m, s)]:
        held, more = await _send(sender, last, held)
        refused = refused or more  # an error of the others comes up when they are tried again
    if refused is not None:
        kept = {id(s) for s in held}
        waiting = [m for s in settlements if id(s) not in kept for m in s.outgoing if goes_last(m, s)]
        refused.unknown = (*refused.unknown, *(m.id for m in waiting))
        refused.messages = (*refused.messages, *waiting)
    return held, refused


async def _send(
    sender: Sender, messages: Sequence[Message], settlements: Sequence[Settlement]
) -> tuple[list[Settlement], SendError | None]:
    try:
        if messages:
            await sender.publish(messages)
    except SendError as error:
        return without(settlements, error.messages), error
    except ConnectError as error:
        # The connection that receives is not affected: this is tried again.
        refusal = SendError(str(error), unknown=[message.id for message in messages], messages=messages)
        refusal.__cause__ = error
        return without(settlements, messages), refusal
    return list(settlements), None


def without(settlements: Sequence[Settlement], refused: Sequence[object]) -> list[Settlement]:
    """The settlements that send none of these messages."""
    named = frozenset(map(id, refused))
    return [s for s in settlements if not any(id(m) in named for m in s.outgoing)]
