"""Calling users' functions: handlers, middleware, error handlers, hooks, callbacks.

This module refuses functions that cannot work before the first message, and awaits whatever they return.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextvars
import decimal
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator
from concurrent.futures import Executor
from functools import partial
from types import GeneratorType, coroutine
from typing import Any, Final, Protocol, TypeVar

from streamtools.engine.functions.unrun import CONTEXT_MANAGERS, PLAIN, left_unrun, refuse_unrun
from streamtools.errors import ConfigurationError, HandlerError

T = TypeVar("T")

#: For what is called without arguments.
NOTHING: Final = "nothing"
#: How often an awaitable may return another awaitable.
_DEPTH: Final = 16


class Decorated:
    """A decorated handler: further decorators, and the bus, use the function inside it."""

    #: The function that was decorated.
    function: Callable[..., Any]


def undecorated(function: Any) -> Any:
    """The user's own function, without the handlers that decorators have made of it."""
    while isinstance(function, Decorated):
        function = function.function
    return function


def unbound(function: Any) -> Any:
    """The function inside its partials."""
    while isinstance(function, partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """The name of a handler, for logs, errors and copies."""
    function = unbound(function)
    return str(getattr(function, "__qualname__", None) or type(function).__qualname__).removeprefix("<locals>.")


def is_async(function: Callable[..., Any]) -> bool:
    """Whether a call is known to return a coroutine; such a function runs in the event loop."""
    function = unbound(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


# --- what can be called ---------------------------------------------------------------------------


def check_function(function: object, what: str, write: str, *arguments: str) -> None:
    """Check that a function runs when it is called.

    Parameters:
        what: what it is to be, such as "handler".
        write: the line to type instead.
        arguments: what it is called with, in words; NOTHING for a call without any; omitted: not checked.

    Raises:
        ConfigurationError: it cannot be called, it is a class, or a call would run none of its code.
    """
    inner = unbound(function)
    if not callable(inner):
        raise ConfigurationError(f"The {what} {function!r} cannot be called: write {write}")
    name = name_of(inner)
    if isinstance(inner, type):
        raise ConfigurationError(
            f"The {what} {name} is a class, and calling it would only make an object: write {write}"
        )
    if why := _runs_nothing(inner):
        raise ConfigurationError(f"The {what} {name} {why}, so a call runs none of its code: write {write}")
    if arguments and not _takes(function, len(arguments) if arguments != (NOTHING,) else 0):
        raise ConfigurationError(
            f"The {what} {name} is to be called with {' and '.join(arguments)}, which it does not take: write {write}"
        )


def check_handler(function: object) -> None:
    """Check that a function can be a handler; its parameters are checked later, when it is compiled.

    Raises:
        ConfigurationError: it cannot be one.
    """
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__  # it is bound once its class exists
    check_function(
        function,
        "handler",
        "async def handle(msg): ..., without yield (a class with handle() is for bus.register(Command, TheClass))",
    )


def _runs_nothing(function: Any) -> str:
    """Why a call would run none of its code; empty if it runs."""
    if not inspect.isroutine(function):
        function = getattr(function, "__call__", function)  # noqa: B004
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code in CONTEXT_MANAGERS:
        return "is a context manager"
    if inspect.isasyncgenfunction(function):
        return "is an async generator, with a yield in it"
    if inspect.isgeneratorfunction(function) and not _is_coroutine_code(code):
        return "is a generator, with a yield in it"
    return ""


def _is_coroutine_code(code: Any) -> bool:
    return code is not None and bool(code.co_flags & inspect.CO_ITERABLE_COROUTINE)  # of @types.coroutine


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


# --- what comes out -------------------------------------------------------------------------------


async def awaited(value: Any, refusal: type[Exception] = HandlerError) -> Any:
    """The result of a function; if that can be awaited, the result of awaiting it.

    A wrapper, a lambda or a forgotten `await` returns a coroutine that has not run.

    Parameters:
        refusal: the error for a result that nobody runs, such as a generator.
    """
    for _ in range(_DEPTH):
        if type(value) in PLAIN:
            return value
        if issubclass(type(value), concurrent.futures.Future):
            value = asyncio.wrap_future(value)
        if not can_be_awaited(value):
            if left_unrun(value):
                await asyncio.sleep(0)  # a task that has just been made of a coroutine begins here
                if left := left_unrun(value):
                    refuse_unrun(value, left, refusal)
            return value
        outcome = await value
        if outcome is value:  # it awaits to itself: a receipt
            return value
        value = outcome
    raise refusal(f"The result is an awaitable that gives another awaitable without end: {value!r}.")


def can_be_awaited(value: Any) -> bool:
    """Whether a value can be awaited, by its type: a mock says that it is an instance of what it stands for."""
    kind = type(value)
    return hasattr(kind, "__await__") or (kind is GeneratorType and _is_coroutine_code(value.gi_code))


class Steps(Protocol):
    """What runs the steps of a coroutine: a `contextvars.Context`, for one."""

    def run(self, step: Callable[..., Any], /, *arguments: Any) -> Any: ...


def in_thread(function: Callable[..., Any], executor: Executor | None) -> Callable[..., Awaitable[Any]]:
    """The function as `async def`: it runs in a thread; if its result can be awaited, that runs in the event loop.

    Both see the caller's context variables, and the result also sees those that the thread has set.

    Parameters:
        executor: whose threads; the loop's default when None.
    """

    async def call(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        work = partial(context.run, partial(_outcome, function, args, kwargs))
        fine, value = await asyncio.get_running_loop().run_in_executor(executor, work)
        if not fine:
            raise value
        if can_be_awaited(value):
            return await within(context, _wait_for(value))
        return value

    return call


@coroutine
def within(context: Steps, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await a coroutine in this task, with context variables of its own.

    A separate task would do the same at ten times the cost.

    Parameters:
        context: runs each of its steps.
    """
    try:
        waits_for = context.run(work.send, None)
    except StopIteration as end:
        result: T = end.value
        return result
    return (yield from going_on(context, work, waits_for))


@coroutine
def going_on(context: Steps, work: Coroutine[Any, Any, T], waits_for: Any) -> Generator[Any, Any, T]:
    """Await a coroutine that has begun in a context of its own, as `within` does.

    Parameters:
        waits_for: what its first `context.run(work.send, None)` returned.
    """
    run = context.run
    try:
        while True:
            failure: BaseException | None = None
            try:
                value = yield waits_for
            except GeneratorExit:
                run(work.close)
                raise
            except BaseException as error:
                failure = error
            # Outside of the `except`: else this error would become the context of what the coroutine raises next.
            waits_for = run(work.send, value) if failure is None else run(work.throw, failure)
    except StopIteration as end:
        result: T = end.value
        return result


def has_decimals() -> bool:
    """Whether this context has a decimal context already; copies of it share the same one."""
    return any(isinstance(value, decimal.Context) for value in contextvars.copy_context().values())


def own_decimals() -> None:
    """Give this context a decimal context of its own: `decimal.getcontext().prec = 5` changes it in place."""
    decimal.setcontext(decimal.getcontext().copy())


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def _outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
    # An exception travels as a value: StopIteration set on a future never arrives, and the awaiting
    # task would hang for ever.
    try:
        return True, function(*args, **kwargs)
    except StopIteration as error:
        return False, RuntimeError(f"the handler raised {error!r}")
    except BaseException as error:
        return False, error
