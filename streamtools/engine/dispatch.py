"""Dispatch: turns each delivery into exactly one settlement, whatever happens to its handler.

middleware -> decode -> handler        (one compiled function)
-> policy                              (an error and an attempt become a verdict)
-> settlement                          (the verdict with the copies that it needs)
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextvars import copy_context
from dataclasses import replace
from functools import partial
from inspect import CORO_CREATED, getcoroutinestate
from types import FunctionType
from typing import Any, Final, NamedTuple, assert_never

from streamtools.codec import JSON
from streamtools.delivery import Delivery, Settlement, current
from streamtools.engine.functions.calling import (
    awaited,
    check_function,
    going_on,
    has_decimals,
    name_of,
    own_decimals,
)
from streamtools.engine.messages.envelope import unwrapped
from streamtools.engine.messages.failures import describe, error_copy, retry_copy
from streamtools.engine.messages.smaller import brief_copy, lesser_copies
from streamtools.engine.outbox import Outbox, outbox, send_all
from streamtools.engine.replies import lost_replies
from streamtools.engine.tasks.cancellation import clear_cancellation, scope_ended
from streamtools.engine.tasks.waiting import is_set_within
from streamtools.errors import ConfigurationError, DecodeError, Drop, HandlerError, SendError, Signal, safe_str
from streamtools.features import Features
from streamtools.message import ErrorDetails, Message
from streamtools.retry import Retry, validate_verdict
from streamtools.types import ErrorHandler, Handler, Middleware
from streamtools.verdicts import ACK, DROP, RELEASE, Copy, Verdict, VerdictKind

log: logging.Logger = logging.getLogger("streamtools")

#: The most characters of an error's text in the log.
SHOWN: Final = 500


def chain(handler: Handler, middleware: Sequence[Middleware]) -> Handler:
    """Return the handler inside its middleware; the first of the list is the outermost."""
    for layer in reversed(middleware):
        handler = partial(_call_layer, layer, handler)
    return handler


def check_middleware(given: Any, parameter: str = "middleware") -> list[Middleware]:
    """Check a list of middleware: each function must take a message and `call_next`.

    Parameters:
        parameter: the name of the user's parameter, for the error text.

    Raises:
        ConfigurationError: it is not a list, or a function does not take these arguments.
    """
    layers = as_list(given, parameter)
    for layer in layers:
        check_function(layer, "middleware", "async def limit(message, call_next): ...", "a message", "call_next")
    return layers


def as_list(given: Any, parameter: str) -> list[Middleware]:
    """Return a copy of a list of middleware.

    Raises:
        ConfigurationError: it is not a list.
    """
    if callable(given) or not isinstance(given, Iterable):
        name = given.__name__ if isinstance(given, type | FunctionType) else repr(given)
        raise ConfigurationError(f"{parameter}={name} is not a list: write {parameter}=[{name}].")
    return list(given)


def check_error_handler(handler: object) -> None:
    """Check that an error handler can be called, or is None.

    Raises:
        ConfigurationError: it does not take a message, an error and an attempt.
    """
    if handler is not None:
        check_function(
            handler,
            "on_error",
            "async def decide(message, error, attempt): ...",
            "a message",
            "an error",
            "an attempt",
        )


async def _call_layer(layer: Middleware, call_next: Handler, message: Message) -> object:
    called: list[Any] = []

    def go_on(message: Message) -> Any:
        called.append(work := call_next(message))
        return work

    result = await awaited(layer(message, go_on))
    for work in called:
        if getattr(work, "cr_frame", None) is not None and getcoroutinestate(work) == CORO_CREATED:
            work.close()
            raise HandlerError(
                f"The middleware {name_of(layer)} calls call_next(message) and does not wait for it, so what follows "
                "in the chain has not run: write return await call_next(message)."
            )
    return result


#: Puts the result of a handler into its outbox if that answers the message: (outbox, message, result).
Answer = Callable[[Outbox, Message, Any], None]


class RetryInPlace(NamedTuple):
    """A retry of the same delivery in this process, by which it keeps its place in the order.

    Attributes:
        message: the message for the next attempt.
        delay: the seconds until the next attempt.
    """

    message: Message
    delay: float


class Dispatcher:
    """Turns a delivery into a settlement, whatever happens. If the consumer cancels the handler, it releases it.

    Parameters:
        handler: the compiled handler inside its middleware.
        name: the handler's name, for logs and error copies.
        retry: the retry policy.
        error_queue: the queue that rejected messages go to.
        max_deliveries: a message that was delivered this often without a verdict is rejected without another run.
        in_place: if true, retries wait in this process and keep their place in the order; else they are sent as
            copies.
        features: what the protocol can do.
        on_error: decides about failures instead of the policy.
        place: the place of the consumer; messages that the handler sends from the same place are sent with the
            acknowledgement.
        together: if false, they are sent as soon as the handler has succeeded, because the message is acknowledged
            earlier or manually.
        atomic: if true, the broker performs a settlement as a whole or not at all; else it has taken every message
            that a refusal does not name.
        answer: puts the handler's result into the outbox if the message is a request.
    """

    def __init__(
        self,
        handler: Handler,
        name: str,
        *,
        retry: Retry,
        error_queue: str,
        max_deliveries: int,
        in_place: bool,
        features: Features,
        on_error: ErrorHandler | None = None,
        place: object = None,
        together: bool = True,
        atomic: bool = False,
        answer: Answer | None = None,
    ) -> None:
        self._handler = handler
        self.name = name
        self._retry = retry
        self._error_queue = error_queue
        self._max_deliveries = max_deliveries
        self._in_place = in_place
        self._copies = features.error_queue
        # If the protocol has no delays, the copy for a retry arrives at once, and waits here until it is due.
        self._holds = features.error_queue and not features.delay
        self._stopping = False
        self._waits: set[asyncio.Event] = set()
        self._on_error = on_error
        self._decimals = has_decimals()
        self._place = place if together else None
        self._atomic = atomic
        self._answer = answer

    def stop(self) -> None:
        """Release all retries that wait in this process."""
        self._stopping = True
        for wait in self._waits:
            wait.set()

    def start(self) -> None:
        """Let retries wait in this process again, after `stop()`."""
        self._stopping = False

    async def __call__(self, delivery: Delivery) -> Settlement:
        message = delivery.message
        if delivery.withdrawn:
            return Settlement(delivery, RELEASE)
        if delivery.redeliveries >= self._max_deliveries:
            return self._poison(delivery)
        due = message.deliver_at if self._holds else None
        if due is not None and await self._given_back_within(delivery, due - time.time()):
            return Settlement(delivery, RELEASE)
        if message.expires_at is not None and message.expired:
            return Settlement(delivery, DROP)
        while True:
            # Context variables that a handler sets, such as a tenant, must not reach the next message or attempt.
            context, work = copy_context(), self._attempt(delivery, message)
            try:
                waits_for = context.run(work.send, None)
            except StopIteration as end:  # most handlers never wait for anything: they need no generator
                found: Settlement | RetryInPlace = end.value
            else:
                found = await going_on(context, work, waits_for)
            if not isinstance(found, RetryInPlace):
                return found
            if await self._given_back_within(delivery, found.delay):
                return Settlement(delivery, RELEASE)
            message = found.message

    async def _attempt(self, delivery: Delivery, message: Message) -> Settlement | RetryInPlace:
        """Run the handler once; return a settlement, or a retry in this process."""
        current.set(delivery)
        if self._decimals:
            own_decimals()
        delivery.outgoing = ()  # messages of a failed attempt are not sent
        try:
            if delivery.decode_error is not None:
                raise delivery.decode_error
            inner = unwrapped(message) if message.content_type != JSON and message.enveloped else message
            if inner is not message and inner.expired:
                return Settlement(delivery, DROP)
            box = Outbox(inner, self.name)
            outbox.set(box)
            try:
                result = await self._handler(inner)
                if inner.reply_to is not None and self._answer is not None:
                    self._answer(box, inner, result)
            finally:
                box.open = False
            if box.gathered:
                delivery.outgoing += tuple(await send_all(box, None if delivery.settled else self._place))
        except BaseException as error:  # also SystemExit: a message must not end the process
            failure = error
        else:
            return Settlement(delivery, ACK, delivery.outgoing, result)
        ours = delivery.abandoned or scope_ended()
        await clear_cancellation()
        if ours:  # the consumer cancelled the handler, so the error says nothing about the message
            return Settlement(delivery, RELEASE)
        verdict = await self.decide(message, failure)
        if verdict.kind.copy is not Copy.RETRY or not self._in_place:
            return self.settlement(delivery, message, verdict, failure)
        self._log(message, failure, verdict)
        return RetryInPlace(retry_copy(message, self._details(message, failure), 0), verdict.delay)

    async def decide(self, message: Message, failure: BaseException) -> Verdict:
        """Return the verdict on a message that failed: that of `on_error`, or else that of the policy."""
        if self._on_error is None:
            return self._retry.decide(failure, message.attempt)
        try:
            verdict = await awaited(self._on_error(message, failure, message.attempt))
            if verdict is not None:
                return validate_verdict(verdict)
        except asyncio.CancelledError:
            if scope_ended():
                raise
            log.exception("The error handler was cancelled; the retry policy decides.")
        except BaseException:
            log.exception("The error handler failed; the retry policy decides.")
        return self._retry.decide(failure, message.attempt)

    async def refused(self, settlement: Settlement, error: SendError) -> Settlement:
        """Return the settlement to try after the broker has refused outgoing messages of this one.

        If a message that the handler sent was refused, the handler has failed with that error: its message is retried
        or rejected. A refused reply is left out. If the copy for a retry or for the error queue was refused, the
        settlement stays the same.
        """
        refused = error.among(settlement.outgoing, {*error.refused, *error.unfit})
        message = settlement.delivery.message
        if lost := lost_replies(settlement.outgoing, error):
            log.warning("The reply to message %s of %r is not sent: %s", message.id, message.queue, error)
            rest = self.without_held(settlement, error)
            return replace(rest, outgoing=tuple(m for m in rest.outgoing if m.id not in lost))
        if settlement.verdict.kind is not VerdictKind.ACK or not refused:
            return settlement
        return self.settlement(settlement.delivery, message, await self.decide(message, error), error)

    def without_held(self, settlement: Settlement, error: SendError) -> Settlement:
        """Return a partly refused settlement without the messages that the broker has taken already."""
        if self._atomic or not settlement.outgoing:
            return settlement
        outgoing = tuple(error.among(settlement.outgoing, {*error.refused, *error.unknown}))
        return settlement if len(outgoing) == len(settlement.outgoing) else replace(settlement, outgoing=outgoing)

    def fallbacks(self, settlement: Settlement, error: BaseException) -> Iterator[Settlement]:
        """Yield smaller and smaller forms of a settlement that cannot be performed; the last ones reject the message.

        Each form has the whole body, and `ErrorDetails.omitted` says what it lacks. A handler never gets a message
        that lacks something of its sender: such a copy goes to the error queue.

        Parameters:
            error: why the settlement cannot be performed.
        """
        delivery = settlement.delivery
        reason = f"it could not be settled: {type(error).__name__}: {safe_str(error)}"
        if not self._copies:
            yield Settlement(delivery, Verdict.reject(reason), error=settlement.error or error)
            return
        unfit = error.among(settlement.outgoing, error.unfit) if isinstance(error, SendError) else []
        own = [m for m in settlement.outgoing if m.id == delivery.message.id]
        others = tuple(m for m in settlement.outgoing if m.id != delivery.message.id and m not in unfit)
        if isinstance(error, SendError) and unfit and not any(m in unfit for m in own):
            yield self.without_held(replace(settlement, outgoing=(*own, *others)), error)
        if own:
            yield replace(settlement, outgoing=(*map(brief_copy, own), *others))
        rejection = Settlement(delivery, Verdict.reject(reason), error=settlement.error or error)
        if not own:
            own, others = [self._copy(delivery.message, Copy.ERROR, rejection.verdict, error)], ()
        small, least = zip(*(lesser_copies(self._rejected(copy, delivery.message)) for copy in own), strict=True)
        yield replace(rejection, outgoing=(*small, *others))
        yield replace(rejection, outgoing=(*least, *others))
        if others:
            yield replace(rejection, outgoing=least)

    def _rejected(self, copy: Message, message: Message) -> Message:
        """Change the copy for a retry to a copy for the error queue."""
        if copy.queue != message.queue:
            return copy
        return copy.replace(queue=self._error_queue, attempt=message.attempt, deliver_at=None, expires_at=None)

    def settlement(
        self, delivery: Delivery, message: Message, verdict: Verdict, error: BaseException | None
    ) -> Settlement:
        """Return a settlement: the verdict with the copies that it needs; log a failure."""
        if (copy := verdict.kind.copy) is not None:
            if error is not None and not isinstance(error, Drop):
                self._log(message, error, verdict)
            if self._copies:
                return Settlement(delivery, verdict, (self._copy(message, copy, verdict, error),), error=error)
        return Settlement(delivery, verdict, error=error)

    def _copy(self, message: Message, copy: Copy, verdict: Verdict, error: BaseException | None) -> Message:
        details = self._details(message, error, verdict.reason)
        match copy:
            case Copy.RETRY:
                return retry_copy(message, details, verdict.delay)
            case Copy.ERROR:
                return self._error_copy(message, details)
        assert_never(copy)

    def _error_copy(self, message: Message, details: ErrorDetails) -> Message:
        copy = error_copy(message, details, self._error_queue)
        if copy.queue == message.queue:  # the consumer of the error queue failed: do not deliver it again at once
            return copy.replace(deliver_at=time.time() + self._retry.max_delay)
        return copy

    def _details(self, message: Message, error: BaseException | None, reason: str = "") -> ErrorDetails:
        if message.error is not None and message.queue == self._error_queue:
            # The consumer of the error queue failed. The details say why the message first failed, and where a
            # redrive puts it: keep them.
            return message.error
        return describe(message, error, self.name, reason=reason)

    def _poison(self, delivery: Delivery) -> Settlement:
        error = HandlerError(
            f"delivered {delivery.redeliveries} times without a verdict (max_deliveries={self._max_deliveries}): "
            "it seems to end the process that handles it"
        )
        return self.settlement(delivery, delivery.message, Verdict.reject(str(error)), error)

    async def _given_back_within(self, delivery: Delivery, delay: float) -> bool:
        """Wait; return True if the delivery must be released: the consumer stops, or the broker takes it back."""
        if self._stopping or delivery.withdrawn:
            return True
        wake = delivery.wake = asyncio.Event()
        self._waits.add(wake)
        try:
            return await is_set_within(wake, delay)
        finally:
            delivery.wake = None
            self._waits.discard(wake)

    def _log(self, message: Message, error: BaseException, verdict: Verdict) -> None:
        # A verdict that the handler chose, or a body that cannot be decoded, needs no traceback.
        trace = None if isinstance(error, Signal | DecodeError) else error
        if verdict.kind.copy is Copy.RETRY:
            log.warning(
                "%s failed on message %s of %r, attempt %d: %s: %s; again in %.3g s.",
                self.name, message.id, message.queue, message.attempt,
                type(error).__name__, safe_str(error)[:SHOWN], verdict.delay,
            )  # fmt: skip
        else:
            log.error(
                "%s rejected message %s of %r after attempt %d: %s: %s",
                self.name, message.id, message.queue, message.attempt,
                type(error).__name__, safe_str(error)[:SHOWN], exc_info=trace,
            )  # fmt: skip
