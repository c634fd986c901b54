"""Calling users' functions: handlers, middleware, error handlers, hooks, callbacks.

One place says what cannot be one, before the first message, and one place awaits what comes out of it.
"""

from __future__ import annotations

import asyncio
import concurrent.futures
import contextlib
import contextvars
import decimal
import inspect
from collections.abc import Awaitable, Callable, Coroutine, Generator, Iterator
from concurrent.futures import Executor
from functools import partial
from types import AsyncGeneratorType, CoroutineType, FunctionType, GeneratorType, MethodType, NoneType, coroutine
from typing import Any, Final, TypeVar

from streamtools.errors import ConfigurationError, HandlerError

T = TypeVar("T")

#: For what is called without arguments.
NOTHING: Final = "nothing"
#: Types of results that are surely no awaitables; asking all others costs some time.
PLAIN: Final = frozenset({NoneType, bool, int, float, str, bytes})
#: What can be awaited may come to something that can be awaited, so often.
_DEPTH: Final = 16


@contextlib.contextmanager
def _empty() -> Any:
    yield


@contextlib.asynccontextmanager
async def _empty_async() -> Any:
    yield


#: The classes of what such functions return.
_MADE: Final = (type(_empty()), type(_empty_async()))
#: Results of which nothing has run yet when they are returned: whatever is to be gone through, entered, or called.
_LAZY: Final = (Iterator, AsyncGeneratorType, *_MADE, FunctionType, MethodType, partial)
#: Results in which coroutines may be left, of which nothing has run either.
_GROUPS: Final = frozenset({list, tuple, set, dict})
#: The code of every function that @contextmanager or @asynccontextmanager has made.
_CONTEXT_MANAGERS: Final = frozenset({_empty.__code__, _empty_async.__code__})


class Decorated:
    """A decorated handler: further decorators, and the bus, take the function that it is for."""

    #: The function that was decorated.
    function: Callable[..., Any]


def undecorated(function: Any) -> Any:
    """The user's own function, where a decorated handler is decorated again."""
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
    """Whether calling it gives a coroutine, as far as can be seen; it runs in the event loop then."""
    function = unbound(function)
    return inspect.iscoroutinefunction(function) or inspect.iscoroutinefunction(getattr(function, "__call__", None))  # noqa: B004


# --- what can be called ---------------------------------------------------------------------------


def check_function(function: object, what: str, write: str, *arguments: str) -> None:
    """Something that runs when it is called.

    Parameters:
        what: what it is to be, such as "handler".
        write: the line to type instead.
        arguments: what it is called with, in words; NOTHING for a call without any; none leaves that to others.

    Raises:
        ConfigurationError: it cannot be called, it is a class, or calling it would run nothing of it.
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
        raise ConfigurationError(f"The {what} {name} {why}, so calling it runs nothing of it: write {write}")
    if arguments and not _takes(function, len(arguments) if arguments != (NOTHING,) else 0):
        raise ConfigurationError(
            f"The {what} {name} is to be called with {' and '.join(arguments)}, which it does not take: write {write}"
        )


def check_handler(function: object) -> None:
    """A function that can be a handler; its parameters are looked at when it is compiled.

    Raises:
        ConfigurationError: it cannot be one.
    """
    if isinstance(function, classmethod | staticmethod):
        function = function.__func__  # it is bound when its class is there
    check_function(
        function,
        "handler",
        "async def handle(msg): ..., without yield (a class with handle() is for bus.register(Command, TheClass))",
    )


def _runs_nothing(function: Any) -> str:
    """Why calling it would run nothing of it; empty where it runs."""
    if not inspect.isroutine(function):
        function = getattr(function, "__call__", function)  # noqa: B004
    code = getattr(getattr(function, "__func__", function), "__code__", None)
    if code in _CONTEXT_MANAGERS:
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
    except ValueError:  # a builtin that does not tell what it takes
        return True
    return True


# --- what comes out -------------------------------------------------------------------------------


async def awaited(value: Any, refusal: type[Exception] = HandlerError) -> Any:
    """What a function has returned; where that can be awaited, what it comes to.

    A wrapper, a lambda or a forgotten `await` returns a coroutine of which nothing has run.

    Parameters:
        refusal: what is raised about a result that nobody runs, such as a generator.
    """
    for _ in range(_DEPTH):
        if type(value) in PLAIN:
            return value
        if isinstance(value, concurrent.futures.Future):
            value = asyncio.wrap_future(value)
        if not inspect.isawaitable(value):
            _check_result(value, refusal)
            return value
        outcome = await value
        if outcome is value:  # a receipt, which is there already
            return value
        value = outcome
    raise refusal(f"What was returned is to be awaited again and again: {value!r}.")


def _check_result(value: Any, refusal: type[Exception]) -> None:
    if type(value) in _GROUPS:
        _check_group(value, refusal)
    elif isinstance(value, _LAZY):
        if isinstance(value, GeneratorType):
            value.close()
        kind: type = type(value)
        raise refusal(
            f"A {kind.__name__.removeprefix('_')} was returned, of which nothing has run: {_advice(value)}."
        )


def _advice(value: Any) -> str:
    if isinstance(value, Iterator | AsyncGeneratorType):
        return "go through it before you return, as in return [x async for x in values] or return list(values)"
    if isinstance(value, _MADE):
        return "enter it, by with or async with"
    return "call it before you return. Where a decorator takes arguments, it is to be written with parentheses"


def _check_group(value: Any, refusal: type[Exception]) -> None:
    left = [each for each in (value.values() if type(value) is dict else value) if type(each) is CoroutineType]
    for each in left:
        each.close()
    if left:
        raise refusal(
            f"A {type(value).__name__} was returned with a coroutine in it, of which nothing has run: await it "
            "before you return, as in return await asyncio.gather(*coroutines)."
        )


def in_thread(function: Callable[..., Any], executor: Executor | None) -> Callable[..., Awaitable[Any]]:
    """The function as `async def`: it runs in a thread, and what can be awaited of it in the event loop.

    Both see the caller's context variables, and the latter those that the thread has set.

    Parameters:
        executor: whose threads; the loop's default when None.
    """

    async def call(*args: Any, **kwargs: Any) -> Any:
        context = contextvars.copy_context()
        work = partial(context.run, partial(_outcome, function, args, kwargs))
        fine, value = await asyncio.get_running_loop().run_in_executor(executor, work)
        if not fine:
            raise value
        if inspect.isawaitable(value):
            return await within(context, _wait_for(value))
        return value

    return call


@coroutine
def within(context: contextvars.Context, work: Coroutine[Any, Any, T]) -> Generator[Any, Any, T]:
    """Await a coroutine in this task, with context variables of its own.

    A task of its own would do the same, and cost ten times as much.
    """
    run = context.run
    try:
        waits_for = run(work.send, None)
        while True:
            failure: BaseException | None = None
            try:
                value = yield waits_for
            except GeneratorExit:
                run(work.close)
                raise
            except BaseException as error:
                failure = error
            # Outside of the `except`: what the coroutine raises next is not to be taken for a consequence of this.
            waits_for = run(work.send, value) if failure is None else run(work.throw, failure)
    except StopIteration as end:
        result: T = end.value
        return result


def has_decimals() -> bool:
    """Whether this context has a context of decimals already; what comes of it shares the same one."""
    return any(isinstance(value, decimal.Context) for value in contextvars.copy_context().values())


def own_decimals() -> None:
    """Have a context of decimals for this context alone: `decimal.getcontext().prec = 5` changes it where it is."""
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
