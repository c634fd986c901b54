"""Decides to which addresses replies may be sent, and which replies are left out because they cannot be sent.

The sender of a request chooses the address of the reply. It must be the name of a queue that the driver accepts for
replies (`validate_reply`). A reply that may not go to its address, or cannot be sent, is dropped with one log line:
it never makes the request fail, repeat or wait.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Iterable, Sequence
from fnmatch import fnmatchcase
from typing import Final

from streamtools.errors import ConfigurationError, SendError
from streamtools.message import Message

log: logging.Logger = logging.getLogger("streamtools")

#: Names of error queues, also of other services. A reply there would look to an operator like a failed message.
_ERROR_QUEUE: Final = re.compile(r"(.*[._/:-])?error", re.DOTALL)


def check_patterns(patterns: object) -> tuple[str, ...] | None:
    """Check the patterns that a user gives for reply addresses, and return them; None for any address.

    Raises:
        ConfigurationError: the patterns are not a list of strings.
    """
    if patterns is None:
        return None
    if isinstance(patterns, str) or not isinstance(patterns, Iterable):
        raise ConfigurationError(f"replies={patterns!r} is not a list of patterns: replies=['*.replies.*'].")
    found = tuple(patterns)
    if not all(isinstance(pattern, str) and pattern for pattern in found):
        raise ConfigurationError(
            f"replies={list(found)!r} has a pattern that is not a string: replies=['*.replies.*']."
        )
    return found


class ReplyRule:
    """Decides whether the address in a message may get a reply.

    Parameters:
        check: the driver's `validate_reply`.
        patterns: the address must match one of them (`*` stands for any characters, `?` for one); None for any
            address.
        never: queues that get no replies, such as the error queue.
    """

    def __init__(
        self, check: Callable[[str], None], patterns: Sequence[str] | None = None, never: Iterable[str] = ()
    ) -> None:
        self._check = check
        self._patterns = patterns
        self._never = frozenset(never)

    def allows(self, message: Message) -> bool:
        """Whether a reply to this message may be sent; if not, log why."""
        try:
            self.check(message.reply_to or "")
        except ConfigurationError as error:
            log.warning("Message %s of %r is not answered: %s", message.id, message.queue, error)
            return False
        return True

    def check(self, address: str) -> None:
        """Check that an address may get a reply.

        Raises:
            ConfigurationError: the address may not get a reply.
        """
        self._check(address)
        if address in self._never or _ERROR_QUEUE.fullmatch(address):
            raise ConfigurationError(f"The queue {address!r} takes no replies: it is for messages that failed.")
        if self._patterns is not None and not any(fnmatchcase(address, pattern) for pattern in self._patterns):
            raise ConfigurationError(f"The queue {address!r} fits none of replies={list(self._patterns)!r}.")


def lost_replies(outgoing: Iterable[Message], error: SendError) -> frozenset[str]:
    """Return the ids of the replies that are left out after this error.

    These are the refused replies; and if the error names only replies, also those that were not confirmed.
    """
    refused, unclear = {*error.refused, *error.unfit}, frozenset(error.unknown)
    named = error.among(outgoing, refused | unclear)
    if all(message.intent == "reply" for message in named):
        refused |= unclear
    return frozenset(message.id for message in named if message.intent == "reply" and message.id in refused)
