"""Retry, the policy that decides what happens to a message whose handler failed; it does no I/O."""

from __future__ import annotations

import logging
import random
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from datetime import timedelta
from typing import Any, Never

from streamtools.errors import (
    LONGEST,
    ConfigurationError,
    DecodeError,
    Drop,
    OptionError,
    Reject,
    RetryLater,
    leaves,
    safe_str,
    suggest,
)
from streamtools.validation.checks import Seconds, check_seconds, is_number, is_whole
from streamtools.verdicts import DROP, Verdict

log: logging.Logger = logging.getLogger("streamtools")


@dataclass(frozen=True, slots=True, init=False)
class Retry:
    """The retry policy: how often, and how soon, a failed message is handled again.

    If an `ExceptionGroup` holds several errors, as a `TaskGroup` raises it, the most severe one decides: first one
    that rejects, then one that retries (with the longest of the delays), then `Drop`. Only the first 10,000 errors of
    a group count.

    Parameters:
        retries: how many attempts follow the first one; 0 moves the message to the error queue at once, None never
            gives up.
        delay: the delay before the first retry, in seconds or as a timedelta; 0 for none.
        backoff: each further delay is the one before, multiplied by this.
        max_delay: the longest delay, in seconds or as a timedelta.
        jitter: each delay varies at random by up to this part of itself, so that retries do not come all at once.
        errors: other policies for some errors, by their class: `{TimeoutError: Retry(retries=None, delay=5)}`. For a
            subclass, the policy of its nearest base class counts.

    Raises:
        ConfigurationError: a value is outside of its range.
        OptionError: a parameter is unknown.
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
            raise OptionError(f"Retry takes no {name!r}. {suggest(name, values)}")
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
        """Return the policy for this error: that of its nearest class in `errors`, or else this policy."""
        if self.errors:
            for kind in type(error).__mro__:
                if (found := self.errors.get(kind)) is not None:
                    return found
        return self

    def after(self, attempt: int) -> float:
        """Return the seconds to wait after attempt number `attempt` has failed (1 is the first)."""
        try:
            # backoff must be a float: Python computes the power of a whole number to its last digit, which takes long
            # for the great number of attempts that a forged message can claim.
            delay = min(self.delay * float(self.backoff) ** (attempt - 1), self.max_delay)
        except OverflowError:
            delay = self.max_delay if self.delay else 0.0
        return delay * (1 + random.uniform(-self.jitter, self.jitter)) if self.jitter else delay  # nosec B311: a pause

    def decide(self, error: BaseException, attempt: int) -> Verdict:
        """Return the verdict on attempt number `attempt`, which failed with `error`."""
        if not isinstance(error, BaseExceptionGroup):
            return self._decide(error, attempt)
        verdicts = [self._decide(each, attempt) for each in leaves(error, self._names)]
        return max(verdicts, key=_gravity) if verdicts else self._decide(error, attempt)

    def _decide(self, error: BaseException, attempt: int) -> Verdict:
        if isinstance(error, Drop):
            return DROP
        if isinstance(error, Reject | DecodeError):
            return Verdict.reject(safe_str(error))
        if (policy := self.of(error)) is not self:
            return policy._decide(error, attempt)
        if self.retries is not None and attempt > self.retries:
            return Verdict.reject()
        chosen = _chosen_delay(error) if isinstance(error, RetryLater) else None
        return Verdict.retry(self.after(attempt) if chosen is None else chosen)

    def _names(self, group: BaseException) -> bool:
        """Whether `errors` has a policy for this group as a whole."""
        return any(issubclass(kind, BaseExceptionGroup) and isinstance(group, kind) for kind in self.errors)


def _gravity(verdict: Verdict) -> tuple[int, float, bool]:
    return verdict.kind.gravity, verdict.delay, bool(verdict.reason)


def _chosen_delay(error: RetryLater) -> float | None:
    """Return the delay that the error asks for; None for the delay of the policy.

    A subclass of RetryLater may not have called `super().__init__`, or may have set any value.
    """
    delay = getattr(error, "delay", None)
    try:
        return None if delay is None else check_seconds("delay", delay)
    except ConfigurationError as wrong:
        log.warning("%s has a delay that cannot be used: %s", type(error).__qualname__, wrong)
        return None


def _in_seconds(value: Any) -> Any:
    return value.total_seconds() if isinstance(value, timedelta) else value


def validate_verdict(verdict: object) -> Verdict:
    """Check what an error handler returned.

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


def check_retry(retry: object) -> None:
    """Check that a value is a retry policy.

    Raises:
        ConfigurationError: the value is not a `Retry`.
    """
    if not isinstance(retry, Retry):
        raise ConfigurationError(f"retry={retry!r} is not a policy: write retry=Retry(retries=...).")
