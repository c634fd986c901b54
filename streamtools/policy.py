"""What becomes of a message whose handler failed: decisions and copies, without any I/O."""

from __future__ import annotations

import logging
import random
import time
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Final, Never

from streamtools.checks import Seconds, check_seconds, is_number, is_whole
from streamtools.errors import (
    LONGEST,
    ConfigurationError,
    DecodeError,
    Drop,
    OptionError,
    Reject,
    RetryLater,
    leaves,
    near,
    text_of,
)
from streamtools.message import ErrorDetails, Message
from streamtools.origin import home_of
from streamtools.tracebacks import format_error
from streamtools.verdicts import DROP, Kind, Verdict

log: logging.Logger = logging.getLogger("streamtools")

#: Seconds before the second attempt to reach a broker; doubled each time, up to MAX_BACKOFF.
BACKOFF: Final = 0.1
MAX_BACKOFF: Final = 5.0
#: Seconds before a deadline within which nothing is tried again.
LAST: Final = 0.2
#: The most of a traceback that travels with a message, in bytes of UTF-8; its end is kept.
TRACEBACK_LIMIT: Final = 8 * 1024
#: The most of an exception's text, in bytes of UTF-8; its beginning is kept.
REASON_LIMIT: Final = 2 * 1024
#: The most of a name (of a handler, a class, a queue), in bytes of UTF-8.
NAME_LIMIT: Final = 512


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """How often and how soon a failed message is run again.

    Of several errors in one `ExceptionGroup`, as a `TaskGroup` raises it, the gravest decides: one that rejects, else
    one that retries (with the longest of the delays), else `Drop`. The first 10,000 errors of a group are looked at.

    Parameters:
        retries: runs after the first one; 0 goes straight to the error queue, None never gives up.
        delay: before the first retry, in seconds or as a timedelta; 0 for none.
        backoff: each further delay is this many times the one before.
        max_delay: no delay is longer, in seconds or as a timedelta.
        jitter: each delay varies by up to this part of itself, so that retries spread out.
        errors: other policies for some errors, by their class: `{TimeoutError: Retry(retries=None, delay=5)}`. The
            nearest class of an error's own line of bases wins.

    Raises:
        ConfigurationError: a value is out of its range.
        OptionError: an unknown parameter.
    """

    retries: int | None
    delay: float
    backoff: float
    max_delay: float
    jitter: float
    errors: Mapping[type[BaseException], Retry] = field(hash=False)

    def __init__(
        self,
        retries: int | None = 5,
        delay: Seconds = 1.0,
        backoff: float = 2.0,
        max_delay: Seconds = 300.0,
        jitter: float = 0.1,
        errors: Mapping[type[BaseException], Retry] | None = None,
        **unknown: Never,
    ) -> None:
        values = {
            "retries": retries,
            "delay": _in_seconds(delay),
            "backoff": backoff,
            "max_delay": _in_seconds(max_delay),
            "jitter": jitter,
            "errors": {} if errors is None else errors,
        }
        for name in unknown:
            raise OptionError(f"Retry takes no {name!r}. {near(name, values)}")
        for name, value in values.items():
            object.__setattr__(self, name, value)
        self._check()

    def _check(self) -> None:
        checks = {
            "retries": self.retries is None or (is_whole(self.retries) and self.retries >= 0),
            "delay": is_number(self.delay) and 0 <= self.delay < float("inf"),
            "backoff": is_number(self.backoff) and 1 <= self.backoff < float("inf"),
            "max_delay": is_number(self.max_delay) and 0 <= self.max_delay < LONGEST,
            "jitter": is_number(self.jitter) and 0 <= self.jitter <= 1,
        }
        if wrong := [name for name, fine in checks.items() if not fine]:
            raise ConfigurationError(
                f"Retry({', '.join(f'{n}={getattr(self, n)!r}' for n in wrong)}) is out of range: retries a whole "
                "number >= 0 or None, delay >= 0, backoff >= 1, max_delay from 0 to ten years, jitter from 0 to 1."
            )
        for kind, policy in self.errors.items():
            if not _is_policy(kind, policy):
                raise ConfigurationError(
                    f"Retry(errors=...) has {kind!r}: {policy!r}; write {{TimeoutError: Retry(retries=...)}}."
                )

    def of(self, error: BaseException) -> Retry:
        """The policy for this error: the one for the nearest of its classes, else this one itself."""
        if self.errors:
            for kind in type(error).__mro__:
                if (found := self.errors.get(kind)) is not None:
                    return found
        return self

    def after(self, attempt: int) -> float:
        """The seconds to wait after the failed run number `attempt` (1 is the first)."""
        try:
            # As a float: the power of a whole number would be computed to its last digit, for any attempt that a
            # message claims to be.
            delay = min(self.delay * float(self.backoff) ** (attempt - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay if self.delay else 0.0
        return delay * (1 + random.uniform(-self.jitter, self.jitter)) if self.jitter else delay  # nosec B311: a pause

    def decide(self, error: BaseException, attempt: int) -> Verdict:
        """The verdict on run number `attempt` that ended with `error`."""
        if not isinstance(error, BaseExceptionGroup):
            return self._decide(error, attempt)
        verdicts = [self._decide(each, attempt) for each in leaves(error, self._names)]
        return max(verdicts, key=_gravity) if verdicts else self._decide(error, attempt)

    def _decide(self, error: BaseException, attempt: int) -> Verdict:
        if isinstance(error, Drop):
            return DROP
        if isinstance(error, Reject | DecodeError):
            return Verdict.reject(text_of(error))
        if (policy := self.of(error)) is not self:
            return policy._decide(error, attempt)
        if self.retries is not None and attempt > self.retries:
            return Verdict.reject()
        chosen = _chosen_delay(error) if isinstance(error, RetryLater) else None
        return Verdict.retry(self.after(attempt) if chosen is None else chosen)

    def _names(self, group: BaseException) -> bool:
        """Whether there is a policy for groups like this one as a whole."""
        return any(issubclass(kind, BaseExceptionGroup) and isinstance(group, kind) for kind in self.errors)


def _gravity(verdict: Verdict) -> tuple[int, float, bool]:
    return _GRAVITY.index(verdict.kind), verdict.delay, bool(verdict.reason)


#: Verdicts on the errors of one group, the gravest last.
_GRAVITY: Final = (Kind.DROP, Kind.RETRY, Kind.REJECT)


def _chosen_delay(error: RetryLater) -> float | None:
    """What it asks for; None for the policy's own. A subclass may not have called its base, or set anything."""
    delay = getattr(error, "delay", None)
    try:
        return None if delay is None else check_seconds("delay", delay)
    except ConfigurationError as wrong:
        log.warning("%s has a delay that is none: %s", type(error).__qualname__, wrong)
        return None


def _in_seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


def checked(verdict: object) -> Verdict:
    """What an error handler has returned.

    Raises:
        TypeError: it is no verdict.
        ConfigurationError: its delay is out of range.
    """
    if not isinstance(verdict, Verdict):
        raise TypeError(
            f"An error handler returns a Verdict, such as Verdict.retry(5), not {type(verdict).__name__}."
        )
    delay = check_seconds("delay", verdict.delay)
    return verdict if delay == verdict.delay else replace(verdict, delay=delay)


def _is_policy(kind: object, policy: object) -> bool:
    return isinstance(kind, type) and issubclass(kind, BaseException) and isinstance(policy, Retry)


def backoff(attempt: int) -> float:
    """Seconds to wait after failed attempt number `attempt` (1 is the first), spread by a quarter."""
    return float(min(BACKOFF * 2 ** min(attempt - 1, 16), MAX_BACKOFF) * random.uniform(0.75, 1.25))  # nosec B311: a pause


def backoff_within(attempt: int, left: float) -> float | None:
    """The same within the `left` seconds, so that the last tries come close to their end; None when it has come."""
    delay = backoff(attempt)
    if delay < left:
        return delay
    return left / 2 if left > LAST else None


def describe(message: Message, error: BaseException | None, handler: str = "", *, reason: str = "") -> ErrorDetails:
    """Why `message` failed, shortened to what travels everywhere.

    Parameters:
        error: the exception, where there was one.
        reason: what the verdict says; the exception's own text when empty.
    """
    now = time.time()
    before = message.error
    first = before.first_failed if before is not None and before.queue == message.queue else now
    raised = error is not None
    return ErrorDetails(
        queue=_head(message.queue, NAME_LIMIT),
        handler=_head(handler, NAME_LIMIT),
        exception=_head(_class_name(error), NAME_LIMIT) if raised else "",
        reason=_head(reason or (text_of(error) if raised else ""), REASON_LIMIT),
        traceback=_tail(_format(error), TRACEBACK_LIMIT) if raised else "",
        attempts=message.attempt,
        first_failed=first,
        last_failed=now,
        omitted=before.omitted if before is not None else "",
    )


def retry_copy(message: Message, details: ErrorDetails, delay: float) -> Message:
    """The copy that is sent for a retry: one more attempt, due after `delay` seconds."""
    due = time.time() + delay if delay > 0 else None
    return message.replace(attempt=message.attempt + 1, deliver_at=due, error=details)


def error_copy(message: Message, details: ErrorDetails, error_queue: str) -> Message:
    """The copy that is sent to the error queue (a template: `{queue}` is the source queue)."""
    target = error_queue.replace("{queue}", message.queue)
    # Without its expiry: a failed message is evidence, and must wait for its operator.
    return message.replace(queue=target, deliver_at=None, expires_at=None, error=details)


def error_queue_of(template: object, queue: str) -> str:
    """The error queue of a consumer of `queue`, whatever further queues it reads.

    Raises:
        ConfigurationError: the template is none.
    """
    if not isinstance(template, str) or "{" in template.replace("{queue}", ""):
        raise ConfigurationError(f"error_queue={template!r} is not a name, in which only {{queue}} is replaced.")
    return template.replace("{queue}", queue)


def check_retry(retry: object) -> None:
    """A retry policy.

    Raises:
        ConfigurationError: it is none.
    """
    if not isinstance(retry, Retry):
        raise ConfigurationError(f"retry={retry!r} is not a policy: write retry=Retry(retries=...).")


def redrive_copy(message: Message, queue: str | None = None) -> Message:
    """The copy that goes back to work: to `queue`, or to the queue it failed in, as attempt 1.

    In another queue than its own it keeps its failure and its origin, so that it can be redriven from there.

    Raises:
        ConfigurationError: no queue is given and the message does not say where it failed.
    """
    home = home_of(message)
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
