"""Finds code that a function has returned instead of running it: a generator, a function, a coroutine in a list.

It finds only code that certainly has not run. Any other value is a result, and a result may be anything.
"""

from __future__ import annotations

import contextlib
import dataclasses
import gc
import inspect
import itertools
import logging
from collections import ChainMap, UserDict, UserList, deque
from collections.abc import Collection, Hashable, Iterable, Reversible
from dis import opmap
from functools import lru_cache, partial
from operator import length_hint
from types import (
    AsyncGeneratorType,
    CoroutineType,
    FunctionType,
    GeneratorType,
    MappingProxyType,
    MethodType,
    NoneType,
    SimpleNamespace,
)
from typing import Any, Final, cast

from pydantic import BaseModel

log: logging.Logger = logging.getLogger("streamtools")

#: Types of results that cannot be awaited and hold no other values; results of all other types are searched.
PLAIN: Final = frozenset({NoneType, bool, int, float, str, bytes})
#: The most values that are searched in one result; each container counts for CONTAINER values more.
MOST: Final = 250_000
CONTAINER: Final = 5


@contextlib.contextmanager
def _empty() -> Any:
    yield


@contextlib.asynccontextmanager
async def _empty_async() -> Any:
    yield


#: The code of every function that @contextmanager or @asynccontextmanager has made.
CONTEXT_MANAGERS: Final = frozenset({_empty.__code__, _empty_async.__code__})
#: The classes of the objects that such functions return.
_MADE: Final = (type(_empty()), type(_empty_async()))
#: Containers that can be iterated without running code of the user.
_PLAIN_CONTAINERS: Final[tuple[Any, ...]] = (list, tuple, set, frozenset, deque)
_COMMON: Final = frozenset({dict, *_PLAIN_CONTAINERS})
#: Iterators that call a function for each item.
_CALLERS: Final = (map, filter, itertools.starmap)
#: Types of objects that have not begun or have begun to run, and show which.
_WORK: Final = frozenset({CoroutineType, GeneratorType, AsyncGeneratorType, *_CALLERS})
_EMPTY: Final[tuple[Collection[Any], ...]] = (
    *([], (), set(), frozenset(), {}, deque(), range(0)),
    *({}.keys(), {}.values(), {}.items()),
)
_ITERATORS: Final[tuple[type, ...]] = (
    *(type(iter(each)) for each in _EMPTY),
    *(type(reversed(each)) for each in _EMPTY if isinstance(each, Reversible)),
)
#: Types that are searched, besides models and dataclasses; other objects are not.
_CONTAINERS: Final[tuple[type, ...]] = (
    *(type(each) for each in _EMPTY),
    *(MappingProxyType, UserDict, UserList, ChainMap, SimpleNamespace),
    *(*_CALLERS, *_ITERATORS, zip, enumerate, reversed, itertools.chain, itertools.islice),
)


def left_unrun(value: Any) -> list[Any]:
    """Return what has not run of a result: the result itself, or coroutines and generators inside it.

    It searches the containers of the standard library, dataclasses and pydantic models, up to 250,000 values (each
    container counts for five more). If a result holds more, one warning says so. It iterates nothing that would
    change by that, and runs no code of the user.
    """
    kind: Any = type(value)
    if kind in PLAIN or (kind in _COMMON and _holds_plain_values(value)):
        return []
    if isinstance(value, FunctionType) or _prepares_a_call(value):
        return [value]
    if kind in _MADE:
        return [value] if _not_begun(value.gen) else []
    if _is_object(kind) and _is_plain_object(value):
        return []
    return _search(value)


def _holds_plain_values(value: Any) -> bool:
    """Whether a container holds only plain values, as most results do; this takes a third of the time of a search."""
    if len(value) > MOST:
        return False
    return PLAIN.issuperset(map(type, value)) and (
        type(value) is not dict or PLAIN.issuperset(map(type, value.values()))
    )


def _is_plain_object(value: Any) -> bool:
    """Whether a model or a dataclass holds only plain values, or containers of plain values, as most do."""
    kind = type(value)
    for each in gc.get_referents(value):
        held = type(each)
        if held not in PLAIN and each is not kind and not (held in _COMMON and _holds_plain_values(each)):
            return False
    return True


def refuse_unrun(value: Any, left: list[Any], refusal: type[Exception]) -> None:
    """Raise an error for a result of which something has not run.

    Parameters:
        left: what `left_unrun` returned.
        refusal: the class of the error, which says what to write instead.
    """
    for each in left:
        if isinstance(each, CoroutineType | GeneratorType):
            each.close()
    within = "" if left[0] is value else f" with {_named(left[0])} in it"
    raise refusal(f"{_named(value, 'A')} was returned{within}, of which nothing has run: {_advice(left[0])}.")


def _named(value: Any, article: str = "a") -> str:
    return _name_of(type(value), article)


def _name_of(kind: type, article: str = "a") -> str:
    name = str(kind.__name__).removeprefix("_")
    return f"{article}{'n' if name[:1].lower() in set('aeio') else ''} {name}"


def _advice(value: Any) -> str:
    if isinstance(value, CoroutineType):
        return "await it before you return, as in return await asyncio.gather(*coroutines)"
    if isinstance(value, _MADE):
        return "enter it, by with or async with"
    if isinstance(value, FunctionType | partial):
        return "call it before you return. If a decorator takes arguments, write it with parentheses"
    return "collect its items before you return, as in return [x async for x in values] or return list(values)"


def _search(value: Any) -> list[Any]:
    found: list[Any] = []
    seen, waiting, room = {id(value)}, deque[Any](), MOST
    _sort([value], found, waiting)
    while waiting and room > 0:
        held = tuple(itertools.islice(_inside(waiting.popleft()), room))
        room -= len(held) + CONTAINER
        if not PLAIN.issuperset(map(type, held)) and (kinds := _worth_a_look(held)):
            fresh = {id(item): item for item in held if type(item) in kinds and id(item) not in seen}
            seen.update(fresh)
            _sort(fresh.values(), found, waiting)
    if room <= 0 and not found:
        _say_that_more_is_held(cast(Hashable, type(value)))
    return found


def _worth_a_look(held: Iterable[Any]) -> set[Any]:
    """Return the types of values that may not have run, or that may hold other values; most types are neither."""
    kinds: set[Any] = set(map(type, held))
    return {kind for kind in kinds if kind in _WORK or _is_container(kind)}


def _sort(items: Iterable[Any], found: list[Any], waiting: deque[Any]) -> None:
    """Add items that have not begun to `found`, and containers to `waiting`."""
    for item in items:
        kind: Any = type(item)
        if kind in _WORK and _not_begun(item):
            found.append(item)
        elif _is_container(kind):
            waiting.append(item)


@lru_cache(maxsize=256)
def _say_that_more_is_held(kind: Any) -> None:
    log.warning(
        "A function has returned %s with about %d values or more. The rest is not searched: a coroutine among it "
        "would not run. Await coroutines before you return.", _name_of(kind), MOST,
    )  # fmt: skip


@lru_cache(maxsize=256)
def _is_container(kind: Any) -> bool:
    # Checks the type, because isinstance is true for a mock of a container.
    return issubclass(kind, _CONTAINERS) or _is_object(kind)


@lru_cache(maxsize=256)
def _is_object(kind: Any) -> bool:
    return issubclass(kind, BaseModel) or dataclasses.is_dataclass(kind)


def _inside(container: Any) -> Iterable[Any]:
    """Return the values in a container, without calling a method that a subclass may have changed."""
    kind = type(container)
    if issubclass(kind, dict):
        return itertools.chain(dict.values(container), dict.keys(container))
    for plain in _PLAIN_CONTAINERS:
        if issubclass(kind, plain):
            items: Iterable[Any] = plain.__iter__(container)
            return items
    return gc.get_referents(container)  # this also finds the items of an iterator, without advancing it


def _not_begun(value: Any) -> bool:
    kind = type(value)
    if kind is CoroutineType:
        return inspect.getcoroutinestate(value) == inspect.CORO_CREATED
    if kind is GeneratorType:
        return inspect.getgeneratorstate(value) == inspect.GEN_CREATED
    if kind is AsyncGeneratorType:
        return _async_generator_not_begun(value)
    return kind in _CALLERS and _has_calls_to_make(value)


def _async_generator_not_begun(value: Any) -> bool:
    frame = value.ag_frame
    if frame is None or value.ag_running:
        return False
    if (waits := getattr(value, "ag_suspended", None)) is not None:  # from Python 3.12 on
        return not waits
    return bool(value.ag_code.co_code[frame.f_lasti] == opmap["RETURN_GENERATOR"])  # it stands where the call ended


def _has_calls_to_make(iterator: Any) -> bool:
    """Whether `map`, `filter` or `starmap` has items left for a function of the user."""
    parts = gc.get_referents(iterator)
    if not any(isinstance(each, FunctionType | MethodType) or _prepares_a_call(each) for each in parts):
        return False
    sources = [source for each in parts for source in (each if type(each) is tuple else (each,))]
    lengths = [length_hint(source) for source in sources if type(source) in _ITERATORS]
    return bool(lengths) and min(lengths) > 0


def _prepares_a_call(value: Any) -> bool:
    return type(value) is partial and isinstance(value.func, FunctionType | MethodType)
