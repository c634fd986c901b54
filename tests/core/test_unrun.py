"""What a function returned: work that has not begun is refused, and every other value is a result."""

from __future__ import annotations

import asyncio
import collections
import csv
import functools
import itertools
import os
import sqlite3
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import Future
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple
from unittest.mock import AsyncMock, MagicMock, Mock, create_autospec

import pytest
from pydantic import BaseModel

from streamtools import ConsumerFactory, Message
from streamtools.engine.functions import unrun
from streamtools.engine.functions.invoke import compile_handler
from streamtools.errors import Reject
from streamtools.testing import Harness


async def work(msg: Any) -> str:
    await asyncio.sleep(0)
    return f"did {msg}"


def generator(msg: Any) -> Iterator[Any]:
    yield msg


async def async_generator(msg: Any) -> AsyncIterator[Any]:
    yield msg


@contextmanager
def context_manager(msg: Any) -> Iterator[Any]:
    yield msg


class Worker:
    async def work(self, msg: Any) -> str:
        return await work(msg)

    async def __call__(self, msg: Any) -> str:
        return await work(msg)


class Pair(NamedTuple):
    first: Any


@dataclass
class Found:
    items: Any


@dataclass(slots=True)
class Slotted:
    items: Any


class Listed(BaseModel):
    items: Any


class Strange(dict[Any, Any]):
    """A dict whose own methods show nothing."""

    def values(self) -> Any:
        return []

    def __iter__(self) -> Any:
        return iter([])


def nested(value: Any) -> Any:
    for _ in range(500):
        value = [value]
    return value


def holds_itself(value: Any) -> Any:
    items = [value]
    items.append(items)
    return items


#: What holds a value.
HOLDERS: dict[str, Callable[[Any], Any]] = {
    "list in a list": lambda held: [[held]],
    "tuple in a dict": lambda held: {"a": (held,)},
    "list of 500 lists": nested,
    "list with much before": lambda held: [*range(200_000), held],
    "list behind many lists": lambda held: [*([n] for n in range(20_000)), [held]],
    "list behind many objects": lambda held: [*map(complex, range(20_000)), held],
    "list that holds itself": holds_itself,
    "key": lambda held: {held: 1},
    "set": lambda held: {held},
    "frozenset": lambda held: frozenset([held]),
    "deque": lambda held: collections.deque([held]),
    "values": lambda held: {1: held}.values(),
    "items": lambda held: {1: held}.items(),
    "keys": lambda held: {held: 1}.keys(),
    "iterator": lambda held: iter([held]),
    "zip": lambda held: zip([1], [held], strict=True),
    "enumerate": lambda held: enumerate([held]),
    "reversed": lambda held: reversed([held]),
    "chain": lambda held: itertools.chain([held], [1]),
    "defaultdict": lambda held: collections.defaultdict(list, a=[held]),
    "ordered dict": lambda held: collections.OrderedDict(a=held),
    "chain map": lambda held: collections.ChainMap({"a": held}),
    "user list": lambda held: collections.UserList([held]),
    "user dict": lambda held: collections.UserDict(a=held),
    "mapping proxy": lambda held: types.MappingProxyType({"a": held}),
    "namespace": lambda held: types.SimpleNamespace(a=held),
    "named tuple": Pair,
    "dataclass": Found,
    "dataclass with slots": lambda held: Slotted([held]),
    "model": lambda held: Listed(items=[held]),
    "dict with methods of its own": lambda held: Strange(a=held),
}
FIVE = Message(body=b"5", queue="orders", id="1")
UNRUN: dict[str, Callable[[Any], Any]] = {
    "coroutine": lambda msg: work(msg),  # noqa: PLW0108
    "generator": lambda msg: generator(msg),  # noqa: PLW0108
    "async generator": lambda msg: async_generator(msg),  # noqa: PLW0108
}


@pytest.mark.parametrize("kind", UNRUN)
@pytest.mark.parametrize("name", HOLDERS)
async def test_what_has_not_run_is_found_in_whatever_holds_it(name: str, kind: str) -> None:
    async def handle(msg: Any) -> Any:
        return HOLDERS[name](UNRUN[kind](msg))

    with pytest.raises(
        Reject, match=f"was returned with an? {kind.replace(' ', '_')} in it, of which nothing has run"
    ):
        await compile_handler(handle)(FIVE)


@pytest.mark.parametrize("name", HOLDERS)
async def test_what_runs_elsewhere_or_has_run_may_be_held(name: str) -> None:
    async def handle(msg: Any) -> Any:
        coroutine = work(msg)
        tasks.append(asyncio.create_task(coroutine))
        finished = work(msg)
        await finished
        return HOLDERS[name]((coroutine, tasks[0], finished, work, print))

    tasks: list[asyncio.Task[str]] = []
    await compile_handler(handle)(FIVE)
    assert await tasks[0] == "did 5"


def begun(msg: Any) -> Any:
    items = (each for each in [msg, msg])
    next(items)
    return items


def finished(msg: Any) -> Any:
    items = map(str, [msg])
    list(items)
    return items


def exhausted(msg: Any) -> Any:
    items = map(name_of_item, [msg])
    list(items)
    return items


def name_of_item(item: Any) -> str:
    return str(item)


def inserts(msg: Any) -> Any:
    database = sqlite3.connect(":memory:", check_same_thread=False)
    databases.append(database)
    database.execute("create table orders (id)")
    return database.execute("insert into orders values (?)", [msg])


def writes(msg: Any) -> Any:
    return closing_later(open(os.devnull, "w"))  # noqa: SIM115


def closing_later(file: Any) -> Any:
    databases.append(file)
    return file


async def begun_async(msg: Any) -> Any:
    items = async_generator(msg)
    await anext(items)
    return items


async def ended_async(msg: Any) -> Any:
    items: Any = async_generator(msg)
    await anext(items)
    await items.aclose()
    return items


def left_context(msg: Any) -> Any:
    manager = context_manager(msg)
    with manager:
        return manager


databases: list[Any] = []
#: Functions that have done their work, and what they return may be gone through, entered, called, or is a mock.
DONE: dict[str, Callable[..., Any]] = {
    "cursor": inserts,
    "file": writes,
    "zip": lambda msg: zip([msg], strict=True),
    "list iterator": lambda msg: iter([msg]),
    "chain": lambda msg: itertools.chain([msg]),
    "count": lambda msg: itertools.count(),
    "map of a builtin": lambda msg: map(str, [msg]),
    "map that has ended": exhausted,
    "map of a builtin that has ended": finished,
    "csv reader": lambda msg: csv.reader(["a,b"]),
    "begun generator": begun,
    "begun async generator": begun_async,
    "ended async generator": ended_async,
    "context manager that was left": left_context,
    "exit stack": lambda msg: ExitStack(),
    "bound method": lambda msg: Worker().work,
    "builtin method": lambda msg: "".join,
    "builtin": lambda msg: print,
    "object to be called": lambda msg: Worker(),
    "class": lambda msg: Worker,
    "function in a dict": lambda msg: {"then": work},
    "mock of a future": lambda msg: MagicMock(spec=Future),
    "mock of a task": lambda msg: MagicMock(spec=asyncio.Task),
    "mock of a list": lambda msg: MagicMock(spec=[]),
    "MagicMock()": MagicMock(),
    "Mock()": Mock(),
    "AsyncMock()": AsyncMock(),
    "create_autospec(function)": create_autospec(work),
}


@pytest.mark.parametrize("name", DONE)
async def test_a_value_of_a_function_that_has_done_its_work_is_a_result(name: str) -> None:
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(DONE[name])
    try:
        async with Harness(factory) as service:
            await service.send("orders", 5)
            await service.settled()
            assert service.rejected == []
            assert len(service.results("orders")) == 1
    finally:
        while databases:
            databases.pop().close()


@pytest.mark.parametrize("mock", [AsyncMock(), create_autospec(work), create_autospec(Worker(), instance=True).work])
async def test_an_async_mock_is_called_once_and_awaited_in_the_event_loop(mock: Any) -> None:
    threads = []
    mock.side_effect = lambda msg: threads.append(threading.current_thread())
    await compile_handler(mock)(FIVE)
    mock.assert_awaited_once_with(5)
    assert threads == [threading.main_thread()]


async def test_a_cached_handler_that_returns_a_coroutine_of_another_message_has_failed() -> None:
    handle = functools.cache(work)
    assert await compile_handler(handle)(FIVE) == "did 5"
    with pytest.raises(RuntimeError, match="already awaited coroutine"):
        await compile_handler(handle)(FIVE)


async def test_a_result_with_more_than_is_looked_at_says_so_once(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setattr(unrun, "MOST", 100)
    unrun._say_that_more_is_held.cache_clear()

    async def handle(msg: Any) -> Any:
        return [[n] for n in range(1000)]

    handler = compile_handler(handle)
    assert [await handler(FIVE), await handler(FIVE)] == [[[n] for n in range(1000)]] * 2
    [record] = caplog.records
    assert "a list with about 100 values or more. The rest is not searched" in record.getMessage()


async def test_what_runs_is_found_before_the_limit_whatever_stands_around_it(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(unrun, "MOST", 100)

    async def handle(msg: Any) -> Any:
        return [*([n] for n in range(90)), work(msg)]

    with pytest.raises(Reject, match="with a coroutine in it"):
        await compile_handler(handle)(FIVE)
