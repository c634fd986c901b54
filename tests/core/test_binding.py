"""A user's function as a handler."""

from __future__ import annotations

import asyncio
import functools
import threading
from collections.abc import Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import pytest
from pydantic import BaseModel

from streamtools import Consumer, ConsumerFactory, ConsumerRunner, Delivery, Message, Producer
from streamtools.delivery import current
from streamtools.engine.functions.calling import name_of
from streamtools.engine.functions.invoke import compile_handler
from streamtools.engine.tasks.threads import Threads
from streamtools.errors import ConfigurationError, DecodeError
from streamtools.testing import eventually

if TYPE_CHECKING:
    from decimal import Decimal

context: ContextVar[str] = ContextVar("context", default="none")


class Order(BaseModel):
    id: int


def message(body: bytes = b'{"id": 1}') -> Message:
    return Message(body=body, queue="orders", id="1", content_type="application/json")


async def unannotated(msg):  # type: ignore[no-untyped-def]
    return msg


async def anything(msg: Any) -> Any:
    return msg


async def an_object(msg: object) -> object:
    return msg


async def model(msg: Order) -> Order:
    return msg


async def model_or_none(msg: Order | None) -> Order | None:
    return msg


async def raw(msg: bytes) -> bytes:
    return msg


async def envelope(msg: Message) -> Message:
    return msg


async def positional(msg: Order, /) -> Order:
    return msg


async def star(*args: Any) -> Any:
    return args[0]


async def with_message(msg: Order, message: Message) -> Any:
    return msg, message.id


async def with_keyword(msg: Order, *, message: Message, times: int = 3) -> Any:
    return msg, message.id, times


async def with_kwargs(msg: Order, *args: Any, **kwargs: Any) -> Any:
    return msg, args, kwargs


class Callable_:
    async def __call__(self, msg: Order) -> Order:
        return msg


class Methods:
    async def method(self, msg: Order) -> Order:
        return msg

    @classmethod
    async def of_class(cls, msg: Order) -> Order:
        return msg

    @staticmethod
    async def static(msg: Order) -> Order:
        return msg


@functools.wraps(model)
async def wrapped(*args: Any, **kwargs: Any) -> Any:
    return await model(*args, **kwargs)


ORDER = Order(id=1)
SIGNATURES: list[tuple[Callable[..., Any], Any]] = [
    (unannotated, {"id": 1}), (anything, {"id": 1}), (an_object, {"id": 1}), (model, ORDER), (model_or_none, ORDER),
    (raw, b'{"id": 1}'), (envelope, message()), (positional, ORDER), (star, {"id": 1}),
    (with_message, (ORDER, "1")), (with_keyword, (ORDER, "1", 3)), (with_kwargs, (ORDER, (), {})),
    (Callable_(), ORDER), (Methods().method, ORDER), (Methods.of_class, ORDER), (Methods.static, ORDER),
    (wrapped, ORDER), (functools.partial(with_kwargs, spare=1), (ORDER, (), {"spare": 1})),
]  # fmt: skip


@pytest.mark.parametrize(("function", "expected"), SIGNATURES, ids=[name_of(f) for f, _ in SIGNATURES])
async def test_a_function_of_any_shape_is_a_handler(function: Callable[..., Any], expected: Any) -> None:
    assert await compile_handler(function)(message()) == expected


async def nothing() -> None: ...


async def only_keywords(*, msg: Order) -> None: ...


async def unknown_further(msg: Order, database: dict[str, int]) -> None: ...


async def further_positional(msg: Order, message: Message, /) -> None: ...


async def hidden(msg: Decimal) -> None: ...


class NotValidated:
    pass


async def not_validated(msg: NotValidated) -> None: ...


class Unfinished(BaseModel):
    further: Missing  # type: ignore[name-defined]  # noqa: F821


@dataclass
class AlsoUnfinished:
    further: list[Missing]  # type: ignore[name-defined]  # noqa: F821


async def unfinished(msg: Unfinished) -> None: ...


async def many_unfinished(msg: list[Unfinished] | None) -> None: ...


async def also_unfinished(msg: AlsoUnfinished) -> None: ...


def of_a_class(cls: type, msg: Order) -> None: ...


@pytest.mark.parametrize("function", [unfinished, many_unfinished, also_unfinished])
def test_a_name_that_is_missing_in_a_model_is_an_error_at_start_up(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="cannot validate.*is not defined") as caught:
        compile_handler(function)
    assert name_of(function) in str(caught.value)


class Early(BaseModel):
    further: Later


class Later(BaseModel):
    id: int


async def test_a_name_that_is_defined_by_the_start_is_none() -> None:
    async def handle(msg: Early) -> Early:
        return msg

    assert await compile_handler(handle)(message(b'{"further": {"id": 1}}')) == Early(further=Later(id=1))


async def test_a_message_or_none_is_a_message() -> None:
    async def handle(msg: Message | None) -> Message | None:
        return msg

    assert await compile_handler(handle)(message()) == message()


def test_a_class_method_without_its_class_is_an_error_at_start_up() -> None:
    with pytest.raises(ConfigurationError, match="of_a_class is a class method without its class"):
        compile_handler(classmethod(of_a_class))


class Proxy:
    """Has whatever it is asked for, as the clients of remote services do."""

    def __getattr__(self, name: str) -> Any:
        return Proxy()

    def __call__(self, msg: Any) -> Any:
        return msg


@pytest.mark.parametrize("function", [Proxy(), dict.items])
async def test_a_callable_that_does_not_tell_its_parameters_is_given_the_message(function: Any) -> None:
    consumers = ConsumerFactory(url="asyncio://")
    consumers.route("orders")(function)
    assert dict(await compile_handler(function)(message())) == {"id": 1}


@pytest.mark.parametrize(
    ("function", "why"),
    [(nothing, "takes no message"), (only_keywords, "takes no message"), (unknown_further, "'database'")]
    + [(further_positional, "'message'"), (hidden, "cannot be found"), (not_validated, "cannot validate")],
)
def test_a_signature_that_cannot_be_filled_is_a_clear_error_at_start_up(
    function: Callable[..., Any], why: str
) -> None:
    with pytest.raises(ConfigurationError, match=why) as caught:
        compile_handler(function)
    assert name_of(function) in str(caught.value)


async def hidden_result(msg: int) -> Decimal | int:
    return msg + 1


async def hidden_default(msg: int, db: Decimal | None = None, *args: Decimal, message: Message | None = None) -> int:
    return msg + (message is not None)


class HiddenMethod:
    async def __call__(self: Any, msg: int, **more: Decimal) -> int:
        return msg + 1


@pytest.mark.parametrize("function", [hidden_result, hidden_default, HiddenMethod(), HiddenMethod().__call__])
async def test_annotations_that_nothing_needs_may_be_hidden(function: Callable[..., Any]) -> None:
    assert await compile_handler(function)(message(b"1")) == 2


async def hidden_message(msg: int, message: Message | Decimal | None = None) -> None: ...
async def hidden_further(msg: int, database: Decimal) -> None: ...
async def hidden_first(msg: Decimal | None = None) -> None: ...


@pytest.mark.parametrize("function", [hidden_message, hidden_further, hidden_first])
def test_annotations_that_may_say_what_is_filled_are_looked_for(function: Callable[..., Any]) -> None:
    with pytest.raises(ConfigurationError, match="cannot be found: name 'Decimal'"):
        compile_handler(function)


@pytest.mark.parametrize(
    "annotation", [Message | Order, list[Message], dict[str, Message | None], Order | None | Message]
)
def test_the_message_stands_alone_or_with_none(annotation: Any) -> None:
    async def handle(msg: Any) -> None: ...

    handle.__annotations__["msg"] = annotation
    with pytest.raises(ConfigurationError, match=r"handle wants .*Message stands alone or with None"):
        compile_handler(handle)


async def test_the_runner_says_so_before_the_first_message() -> None:
    consumer = Consumer("orders", url="asyncio://")
    with pytest.raises(ConfigurationError, match="takes no message"):
        await consumer()(nothing)()


async def test_decoding_fails_as_a_decode_error_not_as_the_handlers_own() -> None:
    with pytest.raises(DecodeError):
        await compile_handler(model)(message(b"{"))


async def test_the_delivery_is_the_one_in_hand() -> None:
    async def handler(msg: Order, delivery: Delivery) -> Delivery:
        return delivery

    delivery = Delivery(message())
    token = current.set(delivery)
    assert await compile_handler(handler)(delivery.message) is delivery
    current.reset(token)


async def test_a_def_handler_runs_in_its_thread_with_the_callers_context() -> None:
    def handler(msg: Order) -> Any:
        return threading.current_thread().name, context.get(), msg

    threads = Threads(1, "test")
    context.set("mine")
    name, seen, msg = await compile_handler(handler, threads)(message())
    threads.shutdown()
    assert (name, seen, msg) == ("test-0", "mine", ORDER)


@pytest.mark.parametrize("error", [StopIteration(5), KeyboardInterrupt(), SystemExit(1), ValueError("x")])
async def test_what_a_def_handler_raises_arrives_and_hangs_nobody(error: BaseException) -> None:
    def handler(msg: Any) -> None:
        raise error

    threads = Threads(1, "test")
    expected = RuntimeError if isinstance(error, StopIteration) else type(error)
    with pytest.raises(expected):
        async with asyncio.timeout(10):
            await compile_handler(handler, threads)(message())
    threads.shutdown()


async def test_no_more_threads_than_there_is_concurrency() -> None:
    names: set[str] = set()
    barrier = threading.Barrier(3)

    def handler(msg: Any) -> None:
        names.add(threading.current_thread().name)
        barrier.wait(10)

    threads = Threads(3, "test")
    handle = compile_handler(handler, threads)
    for _ in range(4):
        await asyncio.gather(*(handle(message()) for _ in range(3)))
    threads.shutdown()
    assert len(names) == 3


# --- decorated names ----------------------------------------------------------------------------


@pytest.mark.parametrize("made_by", ["consumer", "factory"])
async def test_a_decorated_function_is_itself_with_a_message_and_the_loop_without(made_by: str) -> None:
    seen: list[int] = []
    decorate = (
        Consumer("orders", url="asyncio://")()
        if made_by == "consumer"
        else ConsumerFactory(url="asyncio://").route("orders")
    )

    @decorate
    async def handle(msg: int) -> int:
        """Handles."""
        seen.append(msg)
        return msg

    assert await handle(5) == await handle(msg=5) == 5
    assert (handle.__name__, handle.__doc__) == ("handle", "Handles.")
    loop = asyncio.create_task(handle())
    async with Producer("orders", url="asyncio://") as producer:
        await producer.send(6)
    await eventually(lambda: seen == [5, 5, 6])
    loop.cancel()
    with pytest.raises(asyncio.CancelledError):
        await loop


@pytest.mark.parametrize("made_by", ["consumer", "factory"])
async def test_a_decorated_method_runs_the_loop_of_its_object(made_by: str) -> None:
    consumer, factory = Consumer("orders", url="asyncio://"), ConsumerFactory(url="asyncio://")
    decorate = consumer() if made_by == "consumer" else factory.route("orders")

    @dataclass(eq=False)
    class Service:
        seen: list[int]

        @decorate
        async def handle(self, msg: int) -> int:
            self.seen.append(msg)
            return msg

    service = Service([])
    assert await service.handle(5) == 5
    loop = asyncio.create_task(service.handle())
    async with Producer("orders", url="asyncio://") as producer:
        await producer.send(6)
    await eventually(lambda: service.seen == [5, 6])
    loop.cancel()
    await asyncio.wait({loop})


async def test_a_method_without_its_object_is_told_how_to_be_run() -> None:
    factory = ConsumerFactory(url="asyncio://")

    class Service:
        @factory.route("orders")
        async def handle(self, msg: int) -> None: ...

    with pytest.raises(ConfigurationError, match=r"Service.handle is a method .*ConsumerRunner\(service.handle\)"):
        async with ConsumerRunner(factory):
            raise AssertionError("it must not come this far")


async def test_a_consumer_runs_one_loop_at_a_time() -> None:
    consumer = Consumer("orders", url="asyncio://")

    @consumer()
    async def handle(msg: int) -> None: ...

    loop = asyncio.create_task(handle())
    await eventually(lambda: consumer.connected)
    with pytest.raises(ConfigurationError, match="runs a loop already"):
        await handle()
    assert not loop.done()
    loop.cancel()
    await asyncio.wait({loop})
    again = asyncio.create_task(handle())
    await eventually(lambda: consumer.connected)
    again.cancel()
    await asyncio.wait({again})


def test_a_consumer_has_one_handler_and_a_queue_one_route() -> None:
    consumer, factory = Consumer("orders", url="asyncio://"), ConsumerFactory(url="asyncio://")
    consumer()(model)
    factory.route("orders")(model)
    with pytest.raises(ConfigurationError, match="has the handler model already"):
        consumer()(raw)
    with pytest.raises(ConfigurationError, match="has the handler model already"):
        factory.route("orders")(raw)
    factory.route("orders", group="billing")(raw)


def test_two_handlers_of_one_name_are_two_routes() -> None:
    factory = ConsumerFactory(url="asyncio://")
    for queue in ("queue_1", "queue_2"):

        @factory.route(queue)
        async def id_result_handler(msg: Any) -> None: ...

    assert [handler.queue for handler in factory.handlers] == ["queue_1", "queue_2"]
    assert [consumer.queue for consumer in factory.instances] == ["queue_1", "queue_2"]
    assert factory.instances == [handler.consumer for handler in factory.handlers]
