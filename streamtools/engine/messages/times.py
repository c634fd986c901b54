"""Checks the times in messages that a program has made itself, before a driver gets them."""

from __future__ import annotations

from collections.abc import Sequence

from streamtools.errors import SendError
from streamtools.message import Message
from streamtools.validation.checks import is_number
from streamtools.wire import FIRST, LAST


def wrong_time(message: Message) -> str | None:
    """Return what is wrong with the times of a message, `deliver_at` and `expires_at`; None if nothing is wrong."""
    for field, seconds in (("deliver_at", message.deliver_at), ("expires_at", message.expires_at)):
        if seconds is not None and not (is_number(seconds) and FIRST <= seconds <= LAST):
            return f"{field}={seconds!r} is no time of the years 1 to 9999, in seconds since the epoch"
    return None


def refusal(unfit: Sequence[Message], beside: SendError | None = None) -> SendError:
    """Return the error for messages with a wrong time.

    Parameters:
        beside: the error of other messages in the same batch.
    """
    ids = [message.id for message in unfit]
    of = f"Message {ids[0]}" if len(ids) == 1 else f"{len(ids)} messages"
    text = f"{of} to {unfit[0].queue!r} cannot be sent: {wrong_time(unfit[0])}."
    if beside is None:
        return SendError(text, refused=ids, unfit=ids, messages=unfit)
    return SendError(
        f"{text} The other messages: {beside}",
        refused=[*ids, *beside.refused],
        unknown=beside.unknown,
        unfit=[*ids, *beside.unfit],
        messages=[*unfit, *beside.messages],
    )
