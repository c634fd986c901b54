"""Compiles a user's function once into a handler, which has the shape async (message) -> result."""

from __future__ import annotations

import functools
import inspect
import re
from collections.abc import Callable, Hashable, Iterable, Mapping
from concurrent.futures import Executor
from types import NoneType, SimpleNamespace, UnionType
from typing import Annotated, Any, Final, Union, get_args, get_origin, get_type_hints

from pydantic.errors import PydanticUndefinedAnnotation, PydanticUserError
from pydantic.fields import FieldInfo

from streamtools import codec
from streamtools.delivery import Delivery, current
from streamtools.engine.functions.calling import (
    awaited,
    check_handler,
    in_thread,
    is_async,
    name_of,
    unbound,
    undecorated,
)
from streamtools.engine.functions.unrun import PLAIN
from streamtools.errors import ConfigurationError, Reject
from streamtools.message import Message
from streamtools.types import Handler

#: Returns the value of a handler's further parameter for a message.
Resolver = Callable[[Message], Any]


def _delivery(message: Message) -> Delivery | None:
    return current.get()


#: The types with which a handler's further parameters may be annotated -> the functions that return their values.
RESOLVERS: Mapping[type, Resolver] = {Message: lambda message: message, Delivery: _delivery}

#: The names of all such types, including those of a bus.
FILLED: Final = frozenset({"Message", "Delivery", "MessageContext"})


def compile_handler(
    function: Callable[..., Any],
    executor: Executor | None = None,
    resolvers: Mapping[type, Resolver] = RESOLVERS,
    payload: Any = None,
) -> Handler:
    """Make a handler of a function. Its signature is read here, once, and not for each message.

    Parameters:
        function: an `async def` or `def`, a function or a bound method. The annotation of its first parameter is the
            type that the body is decoded to; the other parameters get values by their types.
        executor: runs a `def` function; None for the default executor of the event loop.
        resolvers: type -> function that returns the value of a further parameter of that type.
        payload: the type that the body is decoded to, instead of the annotation of the first parameter.

    Raises:
        ConfigurationError: a parameter gets no value, or its annotation cannot be used.
    """
    function = undecorated(function)
    check_handler(function)
    if isinstance(function, classmethod):
        raise ConfigurationError(
            f"The handler {name_of(function.__func__)} is a class method without its class: decorate it in the body "
            "of its class, or give the bound one, as in ConsumerRunner(Service.handle)."
        )
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
    further = _further(function, parameters, hints, resolvers)
    if payload is not None:
        return _decoder(payload, name), further
    try:
        return _decoder(_annotation(first, hints), name), further
    except ConfigurationError as error:
        if hint := _decorator_hint(function, parameters, first.name):
            raise ConfigurationError(f"{error}{hint}") from error.__cause__
        raise


def _further(
    function: Callable[..., Any],
    parameters: list[inspect.Parameter],
    hints: Mapping[str, Any],
    resolvers: Mapping[type, Resolver],
) -> list[tuple[str, Resolver]]:
    """Return the names of the parameters after the message, each with its resolver."""
    further, name = [], name_of(function)
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
                f"one of {known}, or give it a default."
                + _elsewhere(kinds)
                + _decorator_hint(function, parameters, parameter.name)
            )
    _check_own_parameters(function, parameters, [name for name, _ in further])
    return further


def _check_own_parameters(function: Callable[..., Any], shown: list[inspect.Parameter], further: list[str]) -> None:
    """Check that the wrapper that a decorator made takes the arguments that the function inside shows."""
    if not _is_wrapper(function):
        return
    try:
        own = inspect.signature(function, follow_wrapped=False)
        own.bind(None, **dict.fromkeys(further))
    except TypeError:
        wanted = " and ".join([shown[0].name, *further])
        raise ConfigurationError(
            f"The handler {name_of(function)} is to be called with {wanted}, but its decorator made "
            f"{_called(function)}{own} of it, which does not take that: let it take and pass on (*args, **kwargs)."
            + (_decorator_hint(function, shown, further[0]) if further else "")
        ) from None
    except ValueError:  # a builtin without a signature
        return


def check_decorators(function: Callable[..., Any]) -> None:
    """Check a routed handler that was wrapped by decorators with `functools.wraps`, as soon as it is decorated.

    Raises:
        ConfigurationError: a parameter gets no value.
    """
    if isinstance(function, classmethod | staticmethod) or not _is_wrapper(function):
        return
    parameters = _parameters(function)
    if not parameters or (parameters[0].name == "self" and inspect.isfunction(function)):
        return  # a method is checked when it is bound to its object
    try:
        hints = hints_of(function)
    except ConfigurationError:
        return  # a name may be defined later; it is looked for when the consumer starts
    _further(function, parameters, hints, RESOLVERS)


def _is_wrapper(function: Callable[..., Any]) -> bool:
    # hasattr() would be true for a proxy, which has every attribute.
    return inspect.getattr_static(unbound(function), "__wrapped__", None) is not None


def _called(function: Callable[..., Any]) -> str:
    """Return the name of a wrapper itself; `functools.wraps` shows the name of the function inside."""
    function = unbound(function)
    code = getattr(function, "__code__", None)
    return str(code.co_qualname) if code is not None else type(function).__qualname__


def _decorator_hint(function: Callable[..., Any], shown: list[inspect.Parameter], filled: str) -> str:
    """Return what to write if a decorator fills a parameter; empty if the function has no decorator.

    Parameters:
        shown: the parameters of the function inside the decorator.
        filled: the parameter that has no value.
    """
    if not _is_wrapper(function):
        return ""
    names = [parameter.name for parameter in shown]
    own = next(iter(inspect.signature(function, follow_wrapped=False).parameters), "")
    message = own if own in names else names[0]
    if filled == message:  # the parameter that the decorator fills stands before the message
        filled = next(name for name in [*names, "another one"] if name != message)
    called = _called(function)
    decorator, _, inner = called.rpartition(".<locals>.")
    return (
        f" It has a decorator with functools.wraps, which shows the parameters of {name_of(function)} instead of "
        f"those of {called}. If the decorator fills {filled!r}, write in {decorator or called}, before it returns: "
        f"{inner if decorator else 'self'}.__signature__ = inspect.signature(lambda {message}: None)"
    )


def _elsewhere(kinds: tuple[Any, ...]) -> str:
    names = {getattr(kind, "__name__", "") for kind in kinds}
    if "MessageContext" not in names:
        return ""
    return (
        " A MessageContext is for handlers of a bus, @bus.handler. Here the message itself is a Message, and what "
        "await bus.publish(...) or Producer(..., outbox=True) sends leaves when the handler has succeeded."
    )


def payload_type(function: Callable[..., Any]) -> Any:
    """Return the annotation of a handler's first parameter; Any if it has none."""
    parameters = _parameters(function)
    return _annotation(parameters[0], hints_of(function)) if parameters else Any


def _annotation(parameter: inspect.Parameter, hints: Mapping[str, Any]) -> Any:
    """Return the annotation of a parameter with the constraints of its default, as in `msg: int = Field(gt=10)`."""
    annotation = hints.get(parameter.name, Any)
    return Annotated[annotation, parameter.default] if isinstance(parameter.default, FieldInfo) else annotation


class _Dispatching:
    @functools.singledispatchmethod
    def method(self, message: Any) -> None: ...


#: The code of the function that every @singledispatchmethod returns for its attribute.
_DISPATCHES: Final[Any] = getattr(_Dispatching().method, "__code__", None)


def _tell_parameters(function: Any) -> None:
    """Correct the signature of a method of @singledispatchmethod, which shows `self` although it is bound."""
    function = unbound(function)
    code: Any = getattr(function, "__code__", None)
    if code is not None and code is _DISPATCHES:
        held = dict(zip(code.co_freevars, (cell.cell_contents for cell in function.__closure__), strict=True))
        method = function.__wrapped__.__get__(held["obj"], held["cls"])
        function.__signature__ = inspect.signature(method)  # each use of the attribute makes a new function


def _parameters(function: Callable[..., Any]) -> list[inspect.Parameter]:
    _tell_parameters(function)
    try:
        return list(inspect.signature(function).parameters.values())
    except (ValueError, TypeError):  # a builtin or a proxy without a signature: it gets only the message
        return [inspect.Parameter("message", inspect.Parameter.POSITIONAL_ONLY)]


def parts_of(annotation: Any) -> tuple[Any, ...]:
    """Return the types of a union such as `Stock | None`, without metadata; for other annotations only itself."""
    annotation = codec.bare(annotation)
    if get_origin(annotation) not in (Union, UnionType):
        return (annotation,)
    return tuple(part for each in get_args(annotation) for part in parts_of(each))


def asks_for(function: Callable[..., Any], kind: type) -> bool:
    """Whether a parameter of the handler is annotated with this type."""
    return any(kind in parts_of(hint) for hint in hints_of(function).values())


def _decoder(annotation: Any, name: str) -> codec.Decoder:
    if Message in _all_parts(annotation) and {*parts_of(annotation)} - {None, NoneType} != {Message}:
        raise ConfigurationError(
            f"The handler {name} wants {annotation!r}. Message stands alone or with None: annotate the first "
            "parameter with what the body is to be, and add a further one, message: Message, for the message itself."
        )
    try:
        return codec.decoder(annotation)
    except (PydanticUserError, PydanticUndefinedAnnotation) as error:
        why = str(error).partition("\n")[0].rstrip(".")
        raise ConfigurationError(
            f"The handler {name} wants {annotation!r}, which pydantic cannot validate ({why}); annotate its first "
            "parameter with a pydantic model, a dataclass, a TypedDict, a builtin, bytes, Message, or nothing."
        ) from error


def _all_parts(annotation: Any) -> set[Any]:
    """Return the types that an annotation is made of, at any depth."""
    parts = get_args(codec.bare(annotation))
    return {found for part in parts for found in _all_parts(part)} if parts else _hashable(codec.bare(annotation))


def _hashable(part: Any) -> set[Any]:
    return {part} if isinstance(part, Hashable) else set()


def _innermost(function: Any) -> Any:
    try:
        return inspect.unwrap(function)
    except ValueError:  # a proxy that wraps another one for ever
        return function


def hints_of(function: Callable[..., Any], filled: Iterable[Any] = ()) -> dict[str, Any]:
    """Return the annotations of a function, except those that cannot be resolved and are not needed.

    Parameters:
        filled: types of parameters that get a value, besides `Message`, `Delivery` and `MessageContext`.

    Raises:
        ConfigurationError: an annotation that is needed for the value of a parameter cannot be resolved.
    """
    function = unbound(undecorated(function))
    inner = _innermost(function)
    target = _innermost(inner if inspect.isroutine(inner) else type(inner).__call__)
    try:
        return get_type_hints(target, include_extras=True)
    except NameError:
        return _needed_hints(function, target, {*FILLED, *(getattr(kind, "__name__", "") for kind in filled)})


def _needed_hints(function: Callable[..., Any], target: Any, filled: set[str]) -> dict[str, Any]:
    hints, needed = dict[str, Any](), _needed(function)
    for name, written in target.__annotations__.items():
        alone = SimpleNamespace(__annotations__={name: written}, __globals__=getattr(target, "__globals__", {}))
        try:
            hints |= get_type_hints(alone, include_extras=True)
        except NameError as error:
            if name in needed or (name != "return" and not filled.isdisjoint(re.findall(r"\w+", str(written)))):
                raise ConfigurationError(
                    f"The handler {name_of(function)} has an annotation that cannot be found: {error}. Import the "
                    "name at module level, not under TYPE_CHECKING or inside a function."
                ) from error
    return hints


def _needed(function: Callable[..., Any]) -> set[str]:
    """Return the names of the parameters that need a value."""
    variable = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    named = [each for each in _parameters(function) if each.kind not in variable]
    return {each.name for each in named if each is named[0] or each.default is each.empty}
