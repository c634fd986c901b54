"""Binding: a user's function, compiled once into the shape async (message) -> result."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from concurrent.futures import Executor
from types import UnionType
from typing import Annotated, Any, Union, get_args, get_origin, get_type_hints

from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic.fields import FieldInfo

from streamtools import codec
from streamtools.calling import PLAIN, awaited, check_handler, in_thread, is_async, name_of, unbound, undecorated
from streamtools.delivery import Delivery, current
from streamtools.errors import ConfigurationError, Reject
from streamtools.message import Message
from streamtools.types import Handler

#: Finds the value of a handler's further parameter from the message.
Resolver = Callable[[Message], Any]


def _delivery(message: Message) -> Delivery | None:
    return current.get()


#: What a handler's further parameters may be annotated with.
RESOLVERS: Mapping[type, Resolver] = {Message: lambda message: message, Delivery: _delivery}


def compile_handler(
    function: Callable[..., Any],
    executor: Executor | None = None,
    resolvers: Mapping[type, Resolver] = RESOLVERS,
    payload: Any = None,
) -> Handler:
    """The function as a handler: its plan is made here, once, never per message.

    Parameters:
        function: `async def` or `def`, a function or a bound method. Its first parameter's
            annotation decides what the body is decoded to; the others are filled by type.
        executor: where a `def` runs; the loop's default when None.
        resolvers: type -> where a further parameter of that type comes from.
        payload: what the body is decoded to, instead of what the first parameter says.

    Raises:
        ConfigurationError: the signature cannot be filled.
    """
    function = undecorated(function)
    check_handler(function)
    decode, further = _plan(function, resolvers, payload)
    call = function if is_async(function) else in_thread(function, executor)
    if not further:

        async def handle(message: Message) -> Any:
            result = await call(decode(message))
            return result if type(result) in PLAIN else await awaited(result, Reject)

        return handle

    async def handle_with(message: Message) -> Any:
        result = await call(decode(message), **{name: resolve(message) for name, resolve in further})
        return result if type(result) in PLAIN else await awaited(result, Reject)

    return handle_with


def _plan(
    function: Callable[..., Any], resolvers: Mapping[type, Resolver], payload: Any
) -> tuple[codec.Decoder, list[tuple[str, Resolver]]]:
    name = name_of(function)
    parameters = _parameters(function)
    hints = hints_of(function)
    if not parameters or parameters[0].kind not in (
        inspect.Parameter.POSITIONAL_ONLY,
        inspect.Parameter.POSITIONAL_OR_KEYWORD,
        inspect.Parameter.VAR_POSITIONAL,
    ):
        raise ConfigurationError(f"The handler {name} takes no message: write async def {name}(msg): ...")
    first = parameters[0]
    if first.kind is inspect.Parameter.VAR_POSITIONAL:
        return codec.decode if payload is None else _decoder(payload, name), []
    if first.name == "self" and inspect.isfunction(function):
        method = name.rpartition(".")[2]
        raise ConfigurationError(
            f"The handler {name} is a method without its object: run the bound one, as in "
            f"ConsumerRunner(service.{method}) or await service.{method}()."
        )
    further = []
    for parameter in parameters[1:]:
        kinds = parts_of(hints.get(parameter.name, inspect.Parameter.empty))
        resolver = next((resolvers[kind] for kind in kinds if kind in resolvers), None)
        if resolver is not None and parameter.kind is not inspect.Parameter.POSITIONAL_ONLY:
            further.append((parameter.name, resolver))
        elif parameter.default is inspect.Parameter.empty and parameter.kind not in (
            inspect.Parameter.VAR_POSITIONAL,
            inspect.Parameter.VAR_KEYWORD,
        ):
            known = ", ".join(t.__name__ for t in resolvers)
            raise ConfigurationError(
                f"The handler {name} has a parameter {parameter.name!r} that nothing fills: annotate it with "
                f"one of {known}, or give it a default." + _elsewhere(kinds)
            )
    return _decoder(_annotation(first, hints) if payload is None else payload, name), further


def _elsewhere(kinds: tuple[Any, ...]) -> str:
    names = {getattr(kind, "__name__", "") for kind in kinds}
    if "MessageContext" not in names:
        return ""
    return (
        " A MessageContext is for handlers of a bus, @bus.handler. Here the message itself is a Message, and what "
        "await bus.publish(...) or Producer(..., outbox=True) sends leaves when the handler has succeeded."
    )


def payload_type(function: Callable[..., Any]) -> Any:
    """The annotation of a handler's first parameter; Any where there is none."""
    parameters = _parameters(function)
    return _annotation(parameters[0], hints_of(function)) if parameters else Any


def _annotation(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    """The annotation of a parameter with its constraints: `msg: int = Field(gt=10)` has both."""
    annotation = hints.get(parameter.name, Any)
    return Annotated[annotation, parameter.default] if isinstance(parameter.default, FieldInfo) else annotation


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    try:
        return list(inspect.signature(function).parameters.values())
    except ValueError:  # a builtin that does not tell, such as deque().append: it is given the message
        return [inspect.Parameter("message", inspect.Parameter.POSITIONAL_ONLY)]


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """The parts of a union, such as `Stock | None`, without what is annotated beside; else the annotation itself."""
    annotation = codec.bare(annotation)
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(part for each in get_args(annotation) for part in parts_of(each))


def asks_for(function: Callable[..., Any], kind: type) -> bool:
    """Whether a parameter of the handler is annotated so."""
    return any(kind in parts_of(hint) for hint in hints_of(function).values())


def _decoder(annotation: Any, name: str) -> codec.Decoder:
    try:
        return codec.decoder(annotation)
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"The handler {name} wants {annotation!r}, which pydantic cannot validate ({why}); annotate its first "
            "parameter with a pydantic model, a dataclass, a TypedDict, a builtin, bytes, Message, or nothing."
        ) from error


def hints_of(function: Callable[..., Any]) -> dict[str, Any]:
    """The annotations of a function.

    Raises:
        ConfigurationError: one cannot be found.
    """
    function = unbound(undecorated(function))
    target = function if inspect.isroutine(function) else type(function).__call__
    try:
        return get_type_hints(inspect.unwrap(target), include_extras=True)
    except NameError as error:
        raise ConfigurationError(
            f"The handler {name_of(function)} has an annotation that cannot be found: {error}. Import the name "
            "at module level, not under TYPE_CHECKING or inside a function."
        ) from error
