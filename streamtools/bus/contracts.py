"""Contracts: what a command or an event is called, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, get_args, get_origin

from pydantic import BaseModel, ConfigDict

from streamtools.engine.functions.invoke import parts_of
from streamtools.errors import ConfigurationError, suggest
from streamtools.validation.checks import check_name, check_topic

#: What is given on the class, beside pydantic's own configuration.
TERMS: Final = ("name", "version", "to", "topic")


@dataclass(frozen=True, slots=True)
class Terms:
    """What a contract says beside its fields.

    Attributes:
        name: on the wire.
        version: which version of that name.
        to: a command's queue, where it has one of its own.
        topic: what an event is published under.
    """

    name: str
    version: int = 1
    to: str | None = None
    topic: str = ""


class Contract(BaseModel):
    """The base of commands and events: a pydantic model with a stable name on the wire.

    `class PlaceOrder(Command, name="orders.PlaceOrder", version=2): id: int`. Without `name` it is the
    class's own name alone, never its module's: one class imported from two packages is one contract. A
    subclass is a contract of its own.
    """

    #: Fields that a newer version added are left alone: a consumer of version 1 reads version 2.
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    # One name, which no field is likely to want.
    __terms__: ClassVar[Terms] = Terms("")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic hands these on to __pydantic_init_subclass__ too, where the class is complete.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic would read over what nobody knows, a misspelt version= among it.
        for word in kwargs:
            raise TypeError(
                f"class {cls.__name__}({word}=...) is nothing that a contract has. {suggest(word, TERMS)}"
            )

    @classmethod
    def _set(cls, terms: Terms) -> None:
        cls.__terms__ = terms


class Command(Contract):
    """A request to do something. It is sent to the queue of the one service that does it.

    Parameters:
        name: its name on the wire; the class's name when not given.
        version: the version of that name.
        to: the queue that it goes to, if neither the call nor `bus.route` says.

    Raises:
        ConfigurationError: an impossible name, version or queue.
    """

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, name: str | None = None, version: int = 1, to: str | None = None, **kwargs: Any
    ) -> None:
        if "topic" in kwargs:
            raise ConfigurationError(f"{cls.__name__} is a command: it has no topic=; name its queue with to=.")
        super().__pydantic_init_subclass__(**kwargs)
        if to is not None:
            check_name(to)
        cls._set(Terms(_name(cls, name), _version(cls, version), to=to))


class Event(Contract):
    """Something that has happened. It is published to all who have subscribed.

    Parameters:
        name: its name on the wire; the class's name when not given.
        version: the version of that name.
        topic: what it is published under; its name when not given.

    Raises:
        ConfigurationError: an impossible name, version or topic.
    """

    @classmethod
    def __pydantic_init_subclass__(
        cls, *, name: str | None = None, version: int = 1, topic: str | None = None, **kwargs: Any
    ) -> None:
        if "to" in kwargs:
            raise ConfigurationError(f"{cls.__name__} is an event: it has no to=; name its topic with topic=.")
        super().__pydantic_init_subclass__(**kwargs)
        name = _name(cls, name)
        topic = name if topic is None else check_topic(topic)
        cls._set(Terms(name, _version(cls, version), topic=topic))


def _name(contract: type, name: str | None) -> str:
    name = contract.__name__ if name is None else name
    check_name(name, "message type")
    return name


def _version(contract: type, version: int) -> int:
    if type(version) is not int or version < 1:
        raise ConfigurationError(f"{contract.__name__} has version={version!r}: versions are 1, 2, 3 ...")
    return version


def contracts_in(annotation: Any) -> tuple[type[Contract], ...]:
    """The contracts that a handler's first parameter names: one, those of a union, or none."""
    return tuple(part for part in parts_of(annotation) if isinstance(part, type) and issubclass(part, Contract))


def payload_for(contract: type[Contract], annotation: Any) -> Any:
    """The contract with what a handler's annotation adds to it, such as validators.

    A discriminator is left out: the name on the wire selects the member of a union.
    """
    beside: tuple[Any, ...] = ()
    while get_origin(annotation) is not None:
        if get_origin(annotation) is Annotated:
            beside = (*annotation.__metadata__, *beside)
            annotation = annotation.__origin__
            continue
        parts = [part for part in get_args(annotation) if contracts_in(part) and contract in contracts_in(part)]
        annotation = parts[0] if parts else None
    beside = tuple(each for each in beside if getattr(each, "discriminator", None) is None)
    return Annotated[(contract, *beside)] if beside else contract
