"""Makes copies of a failed message: for a retry, for the error queue, and for a redrive."""

from __future__ import annotations

import time
from typing import Final

from streamtools.engine.messages.origin import failed_in_queue
from streamtools.errors import ConfigurationError, safe_str
from streamtools.message import ErrorDetails, Message
from streamtools.text.tracebacks import format_error

#: A longer traceback is cut to this many bytes of UTF-8; its end is kept.
TRACEBACK_LIMIT: Final = 8 * 1024
#: A longer text of an exception is cut to this many bytes of UTF-8; its beginning is kept.
REASON_LIMIT: Final = 2 * 1024
#: A longer name (of a handler, a class, a queue) is cut to this many bytes of UTF-8.
NAME_LIMIT: Final = 512


def describe(message: Message, error: BaseException | None, handler: str = "", *, reason: str = "") -> ErrorDetails:
    """Describe why `message` failed, short enough for every protocol.

    Parameters:
        error: the exception, if there was one.
        reason: the reason of the verdict; if empty, the text of the exception.
    """
    now = time.time()
    before = message.error
    first = before.first_failed if before is not None and before.queue == message.queue else now
    raised = error is not None
    return ErrorDetails(
        queue=_head(message.queue, NAME_LIMIT),
        handler=_head(handler, NAME_LIMIT),
        exception=_head(_class_name(error), NAME_LIMIT) if raised else "",
        reason=_head(reason or (safe_str(error) if raised else ""), REASON_LIMIT),
        traceback=_tail(_format(error), TRACEBACK_LIMIT) if raised else "",
        attempts=message.attempt,
        first_failed=first,
        last_failed=now,
        omitted=before.omitted if before is not None else "",
    )


def retry_copy(message: Message, details: ErrorDetails, delay: float) -> Message:
    """Return the copy for a retry: one more attempt, due after `delay` seconds."""
    due = time.time() + delay if delay > 0 else None
    return message.replace(attempt=message.attempt + 1, deliver_at=due, error=details)


def error_copy(message: Message, details: ErrorDetails, error_queue: str) -> Message:
    """Return the copy for the error queue."""
    # It does not expire: a failed message has to wait for an operator.
    return message.replace(queue=error_queue, deliver_at=None, expires_at=None, error=details)


def error_queue_of(template: object, queue: str) -> str:
    """Return the name of the error queue for `queue`.

    Parameters:
        template: the name of the error queue, with `{queue}` in place of the queue's name.

    Raises:
        ConfigurationError: the template is not a text, or has other braces.
    """
    if not isinstance(template, str) or "{" in template.replace("{queue}", ""):
        raise ConfigurationError(f"error_queue={template!r} is not a name; only {{queue}} in it is replaced.")
    return template.replace("{queue}", queue)


def redrive_copy(message: Message, queue: str | None = None) -> Message:
    """Return the copy for a redrive, as attempt 1: to `queue`, or to the queue in which the message failed.

    If it goes to another queue than the one it failed in, it keeps the details of its failure, so that it can be
    redriven from there.

    Raises:
        ConfigurationError: no queue is given, and the message does not say where it failed.
    """
    home = failed_in_queue(message)
    if (target := queue or home) is None:
        raise ConfigurationError(
            f"message {message.id} does not say in which queue it failed: name one to move it to"
        )
    error = None if target == home else message.error
    return message.replace(queue=target, attempt=1, error=error, deliver_at=None, expires_at=None)


def _class_name(error: object) -> str:
    kind = type(error)
    return kind.__qualname__ if kind.__module__ == "builtins" else f"{kind.__module__}.{kind.__qualname__}"


def _format(error: object) -> str:
    if not isinstance(error, BaseException):
        return ""
    try:
        return format_error(error)
    except BaseException as broken:
        return f"(its traceback could not be read: {type(broken).__name__})"


def _head(text: str, limit: int) -> str:
    data = text[: limit + 1].encode("utf-8", "replace")
    return data.decode("utf-8") if len(data) <= limit else data[: limit - 3].decode("utf-8", "ignore") + "…"


def _tail(text: str, limit: int) -> str:
    data = text[-limit - 1 :].encode("utf-8", "replace")
    return data.decode("utf-8") if len(data) <= limit else "…" + data[3 - limit :].decode("utf-8", "ignore")
