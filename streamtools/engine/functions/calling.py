"""Calls the functions of users: handlers, middleware, error handlers, hooks, callbacks.

This module refuses functions that cannot work, before the first message, and awaits whatever a function returns.
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

#: Stands for a call without arguments.
NOTHING: Final = "nothing"
#: How often an awaitable may return another awaitable.
_DEPTH: Final = 16


class Decorated:
    """A decorated handler: further decorators, and the bus, use the function inside it."""

    #: The function that was decorated.
    function: Callable[..., Any]


def undecorated(function: Any) -> Any:
    """Return the user's own function, without the handlers that our decorators have made of it."""
    while isinstance(function, Decorated):
        function = function.function
    return function


def unbound(function: Any) -> Any:
    """Return the function inside its partials."""
    while isinstance(function, partial):
        function = function.func
    return function


def name_of(function: Callable[..., Any]) -> str:
    """Return the name of a handler, for logs, errors and copies."""
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
        what: what the function is for, such as "handler".
        write: the line that the error tells the user to write.
        arguments: a word for each argument of a call; NOTHING for a call without arguments; if there are none here,
            the parameters are not checked.

    Raises:
        ConfigurationError: it cannot be called, it is a class, it does not take the arguments, or a call would run
            none of its code.
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
        ConfigurationError: the function cannot be a handler.
    """
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__  # it is bound once its class exists
    check_function(
        function,
        "handler",
        "async def handle(msg): ..., without yield (a class with handle() is for bus.register(Command, TheClass))",
    )


def _runs_nothing(function: Any) -> str:
    """Return why a call would run none of the function's code; empty if a call runs it."""
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
    return code is not None and bool(code.co_flags & inspect.CO_ITERABLE_COROUTINE)  # made by @types.coroutine


def _takes(function: Any, arguments: int) -> bool:
    try:
        inspect.signature(function).bind(*[None] * arguments)
    except TypeError:
        return False
    except ValueError:  # a builtin without a signature
        return True
    return True


# --- results --------------------------------------------------------------------------------------


async def awaited(value: Any, refusal: type[Exception] = HandlerError) -> Any:
    """Return the result of a function; if it can be awaited, await it first.

    A wrapper, a lambda or a forgotten `await` returns a coroutine that has not run.

    Parameters:
        refusal: the class of the error for a result that nobody runs, such as a generator.
    """
    for _ in range(_DEPTH):
        if type(value) in PLAIN:
            return value
        if issubclass(type(value), concurrent.futures.Future):
            value = asyncio.wrap_future(value)
        if not can_be_awaited(value):
            if left_unrun(value):
                await asyncio.sleep(0)  # a coroutine in a new task begins now
                if left := left_unrun(value):
                    refuse_unrun(value, left, refusal)
            return value
        outcome = await value
        if outcome is value:  # a receipt, whose `await` returns the receipt itself
            return value
        value = outcome
    raise refusal(f"The result is an awaitable that gives another awaitable without end: {value!r}.")


def can_be_awaited(value: Any) -> bool:
    """Whether a value can be awaited. Checks its type, because isinstance is true for a mock of an awaitable."""
    kind = type(value)
    return hasattr(kind, "__await__") or (kind is GeneratorType and _is_coroutine_code(value.gi_code))


class Steps(Protocol):
    """An object that runs the steps of a coroutine, such as a `contextvars.Context`."""

    def run(self, step: Callable[..., Any], /, *arguments: Any) -> Any: ...


def in_thread(function: Callable[..., Any], executor: Executor | None) -> Callable[..., Awaitable[Any]]:
    """Return an `async def` function that runs this function in a thread, and awaits its result in the event loop.

    The function and the awaited result see the context variables of the caller; the result also sees the variables
    that the function has set.

    Parameters:
        executor: provides the threads; None for the default executor of the event loop.
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
    """Await the rest of a coroutine whose first step has run in its own context.

    Parameters:
        waits_for: what the first step, `context.run(work.send, None)`, returned.
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
            # Not in the `except` block: there, this error would become the __context__ of the coroutine's next error.
            waits_for = run(work.send, value) if failure is None else run(work.throw, failure)
    except StopIteration as end:
        result: T = end.value
        return result


def has_decimals() -> bool:
    """Whether the current context has a decimal context, which all copies of the context would share."""
    return any(isinstance(value, decimal.Context) for value in contextvars.copy_context().values())


def own_decimals() -> None:
    """Give the current context its own decimal context: `decimal.getcontext().prec = 5` changes it in place."""
    decimal.setcontext(decimal.getcontext().copy())


async def _wait_for(value: Awaitable[Any]) -> Any:
    return await value


def _outcome(function: Callable[..., Any], args: Any, kwargs: Any) -> tuple[bool, Any]:
    # An exception is returned as a value: a future does not accept StopIteration, and the awaiting task would hang
    # for ever.
    try:
        return True, function(*args, **kwargs)
    except StopIteration as error:
        return False, RuntimeError(f"the handler raised {error!r}")
    except BaseException as error:
        return False, error
