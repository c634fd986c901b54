"""The one shape of everything that handles a message: async (message) -> result."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from streamtools.message import Message
    from streamtools.verdicts import Verdict

#: A compiled handler: takes the message, answers with the reply or the response body (or None).
Handler = Callable[["Message"], Awaitable[Any]]

#: Decides what is to become of a message that failed: async (message, error, attempt) -> verdict, or None, which
#: leaves it to the retry policy.
ErrorHandler = Callable[["Message", BaseException, int], Awaitable["Verdict | None"]]

#: A middleware: as a handler, and it calls `call_next(message)` for what lies further in.
Middleware = Callable[["Message", Handler], Awaitable[Any]]
