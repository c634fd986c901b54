"""What handlers and middleware may do to a message: well, badly, and outrageously."""

from __future__ import annotations

import asyncio
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from streamtools import Delivery, Message, Reject, RetryLater
from streamtools.errors import Drop
from streamtools.types import Handler


class Stop(BaseException):
    """No Exception, and nobody's standard one."""


class Unreadable(Exception):
    """Its text cannot be had."""

    def __str__(self) -> str:
        raise KeyboardInterrupt


class UnreadableReject(Reject):
    """A verdict whose text cannot be had."""

    def __str__(self) -> str:
        raise AttributeError("reason")


class BareRetryLater(RetryLater):
    """It has forgotten its base's attributes."""

    def __init__(self) -> None:
        pass


RAISES: dict[str, Callable[[], BaseException]] = {
    "an error": lambda: ValueError("wrong"),
    "a base exception": lambda: Stop("stop"),
    "sys.exit": lambda: SystemExit(3),
    "keyboard interrupt": KeyboardInterrupt,
    "a cancellation": asyncio.CancelledError,
    "stop iteration": lambda: StopIteration("leaked"),
    "stop async iteration": StopAsyncIteration,
    "generator exit": GeneratorExit,
    "a group": lambda: ExceptionGroup("several", [ValueError("a"), Reject("b")]),
    "a base group": lambda: BaseExceptionGroup("several", [KeyboardInterrupt(), ValueError("b")]),
    "unreadable": Unreadable,
    "recursion": RecursionError,
    "memory": MemoryError,
    "timeout": TimeoutError,
    "reject": lambda: Reject("no"),
    "an unreadable reject": UnreadableReject,
    "retry now": lambda: RetryLater(0),
    "retry when it suits": RetryLater,
    "a bare retry": BareRetryLater,
    "drop": Drop,
}
#: Only `async def` can do these: wait for ever, and then do something with the cancellation that comes.
HANGS = ("hang", "hang, then return", "hang, then raise", "hang twice")
CANCELS = ("cancel itself", "cancel itself and return", "cancel itself and catch it")
HANDLERS = ("return", *RAISES)
BY_HAND = ("ack", "retry", "reject", "drop", "release", "ack, then raise", "ack twice")
MIDDLEWARE = ("pass", "raise before", "raise after", "cancel before", "swallow", "swallow all", "twice", "never")
#: Those that hide no failure from whoever is to settle.
LOUD = ("pass", "raise before", "raise after", "cancel before", "twice")


@dataclass(frozen=True)
class Behaviours:
    """What is done in one run of a message, from the outside in.

    Attributes:
        layers: what each middleware does.
        handler: what the handler does.
    """

    layers: tuple[str, ...] = ()
    handler: str = "return"


FINE = Behaviours()


async def do(deed: str, delivery: Delivery) -> object:
    """Do as an `async def` handler what `deed` says."""
    match deed:
        case "cancel itself" | "cancel itself and return" | "cancel itself and catch it":
            return await _cancel(deed)
        case "hang" | "hang, then return" | "hang, then raise" | "hang twice":
            return await _hang(deed)
        case "ack" | "retry" | "reject" | "drop" | "release":
            return await getattr(delivery, deed)()
        case "ack, then raise":
            await delivery.ack()
            raise ValueError("too late")
        case "ack twice":
            await asyncio.gather(delivery.ack(), delivery.ack())
            return None
    return do_at_once(deed)


def do_at_once(deed: str) -> object:
    """Do as a `def` handler what `deed` says."""
    if deed == "return":
        return {"done": True}
    raise RAISES[deed]()


async def _cancel(deed: str) -> object:
    task = asyncio.current_task()
    assert task is not None
    task.cancel()
    if deed == "cancel itself and return":
        return None
    try:
        await asyncio.sleep(0)
    except asyncio.CancelledError:
        if deed == "cancel itself":
            raise
    return None


async def _hang(deed: str) -> object:
    try:
        await asyncio.Event().wait()
    except asyncio.CancelledError:
        if deed == "hang":
            raise
        if deed == "hang, then raise":
            raise ValueError("woken") from None
        if deed == "hang twice":
            await asyncio.Event().wait()
    return None


async def surround(deed: str, message: Message, call_next: Handler) -> Any:
    """Do as a middleware what `deed` says."""
    match deed:
        case "raise before":
            raise ValueError("before")
        case "cancel before":
            raise asyncio.CancelledError
        case "never":
            return None
        case "swallow":
            try:
                return await call_next(message)
            except Exception:
                return None
        case "swallow all":
            try:
                return await call_next(message)
            except BaseException:
                return None
        case "twice":
            await call_next(message)
    result = await call_next(message)
    if deed == "raise after":
        raise ValueError("after")
    return result
