"""Functions as people write them: what comes out of one is awaited, and what cannot be one is refused."""

from __future__ import annotations

import asyncio
import functools
import itertools
import re
import threading
import types
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager, contextmanager
from contextvars import ContextVar
from typing import Any
from unittest.mock import AsyncMock, MagicMock

import pytest
from pydantic import BaseModel

from streamtools import Consumer, ConsumerFactory, ConsumerRunner, Message, Producer, Retry, register_codec
from streamtools.bus import Bus, Command
from streamtools.engine.functions.invoke import compile_handler
from streamtools.errors import ConfigurationError, HandlerError, Reject
from streamtools.jobs import receive_message, receive_message_sync, send_message
from streamtools.testing import Harness, eventually
from streamtools.types import Handler
from streamtools.verdicts import Verdict

tenant: ContextVar[str] = ContextVar("tenant", default="none")
pool = ThreadPoolExecutor(1)


class Order(BaseModel):
    id: int


class CountStock(Command):
    id: int


async def work(msg: Any) -> str:
    await asyncio.sleep(0)
    return f"did {msg}"


class Worker:
    async def work(self, msg: Any) -> str:
        return await work(msg)


@contextmanager
def context_manager(msg: Any) -> Iterator[Any]:
    yield msg


@asynccontextmanager
async def async_context_manager(msg: Any) -> AsyncIterator[Any]:
    yield msg


def forwards(function: Callable[..., Any]) -> Callable[..., Any]:
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


def names(function: Callable[..., Any]) -> Callable[..., Any]:
    @functools.wraps(function)
    def inner(*args: Any) -> Any:
        return function(*args)

    return inner


class AsyncCall:
    async def __call__(self, msg: Any) -> str:
        return await work(msg)


class PlainCall:
    def __call__(self, msg: Any) -> Any:
        return work(msg)


class WillBe:
    def __init__(self, msg: Any) -> None:
        self.msg = msg

    def __await__(self) -> Any:
        return work(self.msg).__await__()


async def forgets_to_await(msg: Any) -> Any:
    return work(msg)


async def starts_a_task(msg: Any) -> Any:
    return asyncio.create_task(work(msg))


async def starts_several(msg: Any) -> Any:
    return asyncio.gather(work(msg))


def with_default(msg: Any, spare: int = 1) -> Any:
    return work(msg)


@types.coroutine
def old_coroutine(msg: Any) -> Any:
    yield
    return f"did {msg}"


SHAPES: dict[str, Callable[..., Any]] = {
    "wrapper": forwards(work),
    "wrapper with the name": names(work),
    "two wrappers": forwards(names(work)),
    "lambda": lambda msg: work(msg),  # noqa: PLW0108
    "partial": functools.partial(with_default, spare=2),
    "partial of a wrapper": functools.partial(forwards(work)),
    "object": AsyncCall(),
    "partial of an object": functools.partial(AsyncCall()),
    "object whose call is plain": PlainCall(),
    "something awaitable": lambda msg: WillBe(msg),  # noqa: PLW0108
    "forgotten await": forgets_to_await,
    "task": starts_a_task,
    "gather": starts_several,
    "work in a pool": lambda msg: pool.submit(lambda: f"did {msg}"),
    "coroutine of old": old_coroutine,
}


@pytest.fixture(params=SHAPES)
def shape(request: pytest.FixtureRequest) -> Callable[..., Any]:
    return SHAPES[request.param]


async def test_whatever_a_handler_returns_is_awaited(shape: Callable[..., Any]) -> None:
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(shape)
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.settled()
        result = service.results("orders")
    assert result in (["did 5"], [["did 5"]])


@pytest.mark.parametrize("name", SHAPES)
async def test_whatever_a_bus_handler_returns_is_awaited(name: str) -> None:
    bus = Bus("stock", url="asyncio://")
    bus.register(CountStock, SHAPES[name])
    async with Harness(bus) as service:
        await service.send("stock", CountStock(id=1))
        await service.settled()
        [result] = service.results("stock")
    assert "did" in str(result)


async def _note(done: list[str], message: Any) -> None:
    await asyncio.sleep(0)
    done.append(message.title)


CALLBACKS: dict[str, Callable[[list[str]], Callable[..., Any]]] = {
    "lambda": lambda done: lambda message: _note(done, message),
    "wrapper": lambda done: forwards(functools.partial(_note, done)),
    "partial of a wrapper": lambda done: functools.partial(forwards(_note), done),
}


@pytest.mark.parametrize("name", CALLBACKS)
async def test_whatever_a_jobs_callback_returns_is_awaited(name: str, tmp_path: Any) -> None:
    url = f"sqlite:///{tmp_path}/jobs.db"
    done: list[str] = []
    callback = CALLBACKS[name](done)
    await send_message(title="one", message_type="t", send_from="a", send_to="jobs", url=url)
    await receive_message("jobs", 0.5, callback, url=url)
    await send_message(title="two", message_type="t", send_from="a", send_to="jobs", url=url)
    await asyncio.to_thread(receive_message_sync, "jobs", 0.5, callback, url=url)
    assert done == ["one", "two"]


async def test_the_failure_of_what_is_awaited_is_the_handlers() -> None:
    async def fails(msg: Any) -> None:
        raise Reject("no such order")

    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(lambda msg: fails(msg))  # noqa: PLW0108
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.settled()
        assert (service.handled(), [m.error and m.error.reason for m in service.rejected]) == ([], ["no such order"])


async def test_what_a_wrapper_sets_is_seen_by_the_coroutine_that_it_returns() -> None:
    async def handle(msg: Any) -> Any:
        return tenant.get(), threading.current_thread() is threading.main_thread()

    def for_tenant(msg: Any) -> Any:
        tenant.set("acme")
        return handle(msg)

    message = Message(body=b"1", queue="orders", id="1")
    assert await compile_handler(for_tenant)(message) == ("acme", True)
    assert tenant.get() == "none"


async def test_what_is_to_be_awaited_without_end_is_refused() -> None:
    class Again:
        def __await__(self) -> Any:
            return _again().__await__()

    async def _again() -> Again:
        return Again()

    with pytest.raises(Reject, match="another awaitable without end"):
        await compile_handler(lambda msg: Again())(Message(body=b"1", queue="orders", id="1"))


# --- what is no handler ---------------------------------------------------------------------------


def generator(msg: Any) -> Iterator[int]:
    yield 1


async def async_generator(msg: Any) -> AsyncIterator[int]:
    yield 1


class Generates:
    def __call__(self, msg: Any) -> Iterator[int]:
        yield 1

    async def method(self, msg: Any) -> AsyncIterator[int]:
        yield 1


@contextmanager
def manager(msg: Any) -> Iterator[None]:
    yield


@asynccontextmanager
async def async_manager(msg: Any) -> AsyncIterator[None]:
    yield


NO_HANDLERS: dict[str, tuple[Any, str]] = {
    "generator": (generator, "handler generator is a generator"),
    "async generator": (async_generator, "async_generator is an async generator"),
    "partial of a generator": (functools.partial(generator), "generator is a generator"),
    "object that generates": (Generates(), "Generates is a generator"),
    "method that generates": (Generates().method, r"Generates.method is an async generator"),
    "context manager": (manager, "manager is a context manager"),
    "async context manager": (async_manager, "async_manager is a context manager"),
    "model": (Order, "Order is a class"),
    "class": (Generates, "Generates is a class"),
    "builtin class": (list, "list is a class"),
    "partial of a class": (functools.partial(Order), "Order is a class"),
    "number": (5, "handler 5 cannot be called"),
    "nothing": (None, "handler None cannot be called"),
}


@pytest.mark.parametrize("name", NO_HANDLERS)
def test_what_is_no_handler_is_refused_as_it_is_decorated(name: str) -> None:
    function, why = NO_HANDLERS[name]
    factory, consumer = ConsumerFactory(url="asyncio://"), Consumer("orders", url="asyncio://")
    for decorate in (factory.route("orders"), consumer):
        if function is None and decorate is consumer:
            continue  # @consumer() with nothing to decorate yet
        with pytest.raises(ConfigurationError, match=rf"{why}.*write async def handle\(msg\)"):
            decorate(function)
    assert not factory.handlers


@pytest.mark.parametrize("name", [name for name in NO_HANDLERS if "class" not in name and name != "model"])
def test_what_is_no_handler_is_refused_by_the_bus(name: str) -> None:
    function, why = NO_HANDLERS[name]
    bus = Bus("stock", url="asyncio://")
    with pytest.raises(ConfigurationError, match=why):
        bus.register(CountStock, function)


def test_a_class_whose_handle_generates_is_refused() -> None:
    class Counts:
        async def handle(self, command: CountStock) -> AsyncIterator[int]:
            yield 1

    with pytest.raises(ConfigurationError, match=r"Counts.handle is an async generator"):
        Bus("stock", url="asyncio://").register(CountStock, Counts)


@pytest.mark.parametrize(
    "function",
    [lambda msg: generator(msg), lambda msg: async_generator(msg), lambda msg: map(work, [msg])]  # noqa: PLW0108
    + [lambda msg: (each for each in [msg])]
    + [lambda msg: itertools.starmap(work, [(msg,)]), lambda msg: map(Worker().work, [msg])]
    + [lambda msg: zip([work(msg)], strict=True), lambda msg: itertools.chain(generator(msg))]
    + [lambda msg: context_manager(msg), lambda msg: async_context_manager(msg)]
    + [lambda msg: [work(msg), work(msg)], lambda msg: {"first": work(msg)}, lambda msg: (msg, work(msg))]
    + [lambda msg: functools.partial(work, msg), lambda msg: work],
    ids=["generator", "async generator", "map", "expression", "starmap", "map of a method", "zip", "chain"]
    + ["context manager", "async context manager", "list", "dict", "tuple", "partial", "function"],
)
async def test_a_result_of_which_nothing_has_run_is_rejected_and_never_acknowledged(
    function: Callable[..., Any],
) -> None:
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(function)
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.settled()
        [rejected] = service.rejected
        assert service.handled() == []
    assert rejected.error is not None
    assert "of which nothing has run" in rejected.error.reason


async def test_a_method_that_dispatches_on_the_type_of_its_message_handles() -> None:
    class Service:
        def __init__(self) -> None:
            self.seen: list[Any] = []

        @functools.singledispatchmethod
        async def handle(self, msg: Any) -> None:
            self.seen.append(msg)

        @handle.register
        async def _(self, msg: int) -> None:
            self.seen.append(msg + 1)

        @functools.singledispatchmethod
        def blocks(self, msg: Any, message: Message) -> None:
            self.seen.append((msg, message.body))

        @functools.singledispatchmethod
        @classmethod
        async def of_class(cls, msg: int) -> Any:
            return cls, msg

        @functools.singledispatchmethod
        @staticmethod
        async def alone(msg: int) -> Any:
            return msg

    service = Service()
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(service.handle)
    async with Harness(factory) as harness:
        await harness.send("orders", 5)
        await harness.send("orders", "text")
        await harness.settled()
    assert sorted(service.seen, key=str) == [6, "text"]
    message = Message(body=b"5", queue="orders", id="1")
    await compile_handler(service.blocks)(message)
    assert service.seen[-1] == (5, b"5")
    for held in (service, Service):
        assert await compile_handler(held.of_class)(message) == (Service, 5)
        assert await compile_handler(held.alone)(message) == 5
    with pytest.raises(ConfigurationError, match=r"Service.handle is a method without its object"):
        compile_handler(Service.handle)


async def test_a_decorator_without_its_parentheses_is_told_and_loses_no_message() -> None:
    def repeated(times: int = 3) -> Any:
        def decorate(function: Any) -> Any:
            @functools.wraps(function)
            async def inner(*args: Any) -> Any:
                return [await function(*args) for _ in range(times)]

            return inner

        return decorate

    factory = ConsumerFactory(url="asyncio://", retry=Retry(retries=0))

    @factory.route("orders")
    @repeated
    async def handle(msg: int) -> None: ...

    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        [rejected] = service.rejected
    assert rejected.error is not None
    assert "write it with parentheses" in rejected.error.reason


@pytest.mark.parametrize("result", [[], [1, 2], {"a": 1}, (1,), {1}, object()])
async def test_results_in_which_nothing_waits_are_results(result: Any) -> None:
    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(lambda msg: result)
    async with Harness(factory) as service:
        await service.send("orders", 1)
        await service.settled()
        assert service.results("orders") == [result]


# --- decorators one over the other ----------------------------------------------------------------


async def test_a_function_with_two_routes_handles_both_queues() -> None:
    factory = ConsumerFactory(url="asyncio://stacked")
    seen: list[str] = []

    @factory.route("a")
    @factory.route("b")
    async def handle(msg: str) -> None:
        seen.append(msg)

    async with Harness(factory) as service:
        await service.send("a", "to a")
        await service.send("b", "to b")
        await service.settled()
    assert sorted(seen) == ["to a", "to b"]
    seen.clear()
    loop = asyncio.create_task(handle())
    async with Producer("a", url="asyncio://stacked") as one, Producer("b", url="asyncio://stacked") as other:
        await one.send("to a")
        await other.send("to b")
        await eventually(lambda: sorted(seen) == ["to a", "to b"])
    loop.cancel()
    await asyncio.wait({loop})
    assert [each.queue for each in ConsumerRunner(handle).consumers] == ["a", "b"]


async def test_a_method_with_two_routes_handles_both_queues() -> None:
    factory = ConsumerFactory(url="asyncio://methods")

    class Service:
        def __init__(self) -> None:
            self.seen: list[str] = []

        @factory.route("a")
        @factory.route("b")
        async def handle(self, msg: str) -> None:
            self.seen.append(msg)

    service = Service()
    async with Harness(service.handle) as harness:  # type: ignore[arg-type]
        await harness.send("a", "to a")
        await harness.send("b", "to b")
        await harness.settled()
    assert sorted(service.seen) == ["to a", "to b"]


async def test_a_function_is_a_route_and_a_handler_of_the_bus() -> None:
    factory, bus = ConsumerFactory(url="asyncio://"), Bus("stock", url="asyncio://")
    seen: list[int] = []

    @bus.handler
    @factory.route("a")
    async def handle(msg: CountStock) -> None:
        seen.append(msg.id)

    async with Harness(factory, bus) as service:
        await service.send("a", {"id": 1})
        await service.send("stock", CountStock(id=2))
        await service.settled()
    assert sorted(seen) == [1, 2]


# --- middleware, error handlers, hooks ------------------------------------------------------------


async def returns_it(message: Message, call_next: Handler) -> Any:
    return call_next(message)


def is_plain(message: Message, call_next: Handler) -> Any:
    return call_next(message)


class Layer:
    async def __call__(self, message: Message, call_next: Handler) -> Any:
        return call_next(message)


@pytest.mark.parametrize("layer", [returns_it, is_plain, Layer(), functools.partial(returns_it)])
async def test_what_middleware_returns_is_awaited(layer: Any) -> None:
    factory = ConsumerFactory(url="asyncio://", middleware=[layer, layer])
    factory.route("orders")(work)
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.settled()
        assert service.results("orders") == ["did 5"]


@pytest.mark.parametrize("layer", [returns_it, is_plain, Layer()])
async def test_what_middleware_on_the_way_out_returns_is_awaited(layer: Any) -> None:
    bus = Bus("stock", url="asyncio://out", outgoing=[layer])
    async with bus:
        await bus.send({"id": 1}, "stock")
        [delivery] = await bus.receive(timeout=5)
        assert delivery.message.body == b'{"id":1}'
        await delivery.ack()


async def forgets_it(message: Message, call_next: Handler) -> None:
    call_next(message)


async def test_middleware_that_forgets_call_next_loses_no_message() -> None:
    factory = ConsumerFactory(url="asyncio://", middleware=[forgets_it])
    factory.route("orders")(work)
    async with Harness(factory) as service:
        await service.send("orders", 5)
        await service.settled()
        [rejected] = service.rejected
        assert service.handled() == []
    assert rejected.error is not None
    assert "forgets_it calls call_next(message) and does not wait for it" in rejected.error.reason
    async with Bus("stock", url="asyncio://forgets", outgoing=[forgets_it]) as bus:
        with pytest.raises(HandlerError, match=r"write return await call_next\(message\)"):
            await bus.send({"id": 1}, "stock")


async def of_one(message: Message) -> None: ...


async def layer_generates(message: Message, call_next: Handler) -> AsyncIterator[Any]:
    yield await call_next(message)


class NeedsNothing:
    pass


NO_MIDDLEWARE: dict[str, tuple[Any, str]] = {
    "no list": (returns_it, "=returns_it is not a list: write .*=[returns_it]"),
    "nothing": (None, "=None is not a list"),
    "class": ([Layer], "Layer is a class"),
    "one parameter": ([of_one], "of_one is to be called with a message and call_next"),
    "generator": ([layer_generates], "layer_generates is an async generator"),
    "number": ([5], "middleware 5 cannot be called"),
}


@pytest.mark.parametrize("name", NO_MIDDLEWARE)
def test_what_is_no_middleware_is_refused_at_once(name: str) -> None:
    given, why = NO_MIDDLEWARE[name]
    why = why.replace("[", r"\[")
    for make in (
        lambda: Consumer("orders", url="asyncio://", middleware=given),
        lambda: ConsumerFactory(url="asyncio://", middleware=given),
        lambda: ConsumerFactory(url="asyncio://").route("orders", middleware=given)(work),
        lambda: Consumer("orders", url="asyncio://")(middleware=given),
    ):
        with pytest.raises(ConfigurationError, match=why):
            make()


@pytest.mark.parametrize("name", NO_MIDDLEWARE)
@pytest.mark.parametrize("parameter", ["incoming", "outgoing"])
async def test_what_is_no_middleware_of_a_bus_is_refused_as_it_starts(name: str, parameter: str) -> None:
    given, why = NO_MIDDLEWARE[name]

    async def start() -> None:
        bus = Bus("stock", url="asyncio://", **{parameter: given})
        bus.register(CountStock, work)
        await bus.start()

    with pytest.raises(ConfigurationError, match=why.replace("[", r"\[")):
        await start()
    if parameter == "outgoing":
        with pytest.raises(ConfigurationError, match=why.replace("[", r"\[")):
            await Bus(url="asyncio://", outgoing=given).start()


async def test_an_error_handler_may_be_plain_or_a_lambda() -> None:
    async def decide(error: BaseException) -> Verdict:
        return Verdict.reject(f"decided: {error}")

    for on_error in (
        lambda message, error, attempt: decide(error),
        lambda message, error, attempt: Verdict.reject(f"decided: {error}"),
    ):
        bus = Bus("stock", url="asyncio://", on_error=on_error)

        @bus.handler
        async def count(command: CountStock) -> None:
            raise RuntimeError("no stock")

        async with Harness(bus) as service:
            await service.send("stock", CountStock(id=1))
            await service.settled()
            assert [m.error and m.error.reason for m in service.rejected] == ["decided: no stock"]


@pytest.mark.parametrize(
    ("on_error", "why"),
    [(generator, "generator is a generator"), (lambda error: None, "an error and an attempt"), (Order, "is a class")],
)
async def test_what_is_no_error_handler_is_refused_at_the_start(on_error: Any, why: str) -> None:
    bus = Bus("stock", url="asyncio://", on_error=on_error)
    bus.register(CountStock, work)
    with pytest.raises(ConfigurationError, match=why):
        await bus.start()
    await bus.stop()


async def test_whatever_a_hook_returns_is_awaited_and_what_is_none_is_refused() -> None:
    calls: list[str] = []

    async def prepare() -> None:
        calls.append("prepared")

    async def lifespan() -> AsyncIterator[None]:
        yield

    factory = ConsumerFactory(url="asyncio://")
    factory.route("orders")(work)
    async with ConsumerRunner(factory, on_startup=[lambda: prepare(), lambda: calls.append("plain")]):  # noqa: PLW0108
        assert calls == ["prepared", "plain"]
    for hook, why in ((lifespan, "lifespan is an async generator"), (lambda app: None, "called with nothing")):
        with pytest.raises(ConfigurationError, match=re.escape(why)):
            async with ConsumerRunner(factory, on_startup=[prepare, hook]):  # type: ignore[list-item]
                raise AssertionError("it must not come this far")


async def test_methods_of_the_class_are_handlers() -> None:
    factory = ConsumerFactory(url="asyncio://")

    class Service:
        @factory.route("a")
        @factory.route("b")
        @classmethod
        async def of_class(cls, msg: int) -> str:
            return f"{cls.__name__} {msg}"

        @factory.route("c")
        @staticmethod
        async def static(msg: int) -> int:
            return msg

    async with Harness(factory) as service:
        for queue in "abc":
            await service.send(queue, 1)
        await service.settled()
        assert [service.results(queue) for queue in "abc"] == [["Service 1"], ["Service 1"], [1]]
    assert await Service.of_class(5) == "Service 5"
    assert await Service().static(6) == 6


def test_a_class_method_that_generates_is_refused() -> None:
    with pytest.raises(ConfigurationError, match="is an async generator"):

        class _Service:
            @ConsumerFactory(url="asyncio://").route("a")
            @classmethod
            async def of_class(cls, msg: int) -> AsyncIterator[int]:
                yield msg


async def test_a_mock_is_a_handler() -> None:
    for mock, result in ((MagicMock(return_value=5), 5), (AsyncMock(return_value=6), 6)):
        factory = ConsumerFactory(url="asyncio://")
        factory.route("orders")(mock)
        async with Harness(factory) as service:
            await service.send("orders", 1)
            await service.settled()
            assert service.results("orders") == [result]
        mock.assert_called_once_with(1)


async def test_an_async_handler_that_returns_a_generator_is_rejected() -> None:
    async def handle(msg: int) -> Any:
        return async_generator(msg)

    async def layer(message: Message, call_next: Handler) -> Any:
        return (each for each in [await call_next(message)])

    for middleware, function in (([], handle), ([layer], work)):
        factory = ConsumerFactory(url="asyncio://", middleware=middleware, retry=Retry(retries=0))
        factory.route("orders")(function)
        async with Harness(factory) as service:
            await service.send("orders", 1)
            await service.settled()
            assert (service.handled(), len(service.rejected)) == ([], 1)


async def test_a_codec_that_would_have_to_be_awaited_is_refused() -> None:
    async def decode(body: bytes) -> Any:
        return body

    with pytest.raises(ConfigurationError, match="decode of 'application/x-async' must return the value itself"):
        register_codec("application/x-async", decode)
