"""Contracts: what a command or an event is called, and where it goes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any, ClassVar, Final, get_args, get_origin

from pydantic import BaseModel, ConfigDict

from streamtools.engine.functions.invoke import parts_of
from streamtools.errors import ConfigurationError, suggest
from streamtools.validation.checks import check_name, check_topic

#: The parameters of a contract's class statement, beside those of pydantic.
TERMS: Final = ("name", "version", "to", "topic")


@dataclass(frozen=True, slots=True)
class Terms:
    """The name and the address of a contract.

    Attributes:
        name: the type on the wire.
        version: the version of that name.
        to: the queue that a command goes to, if its class says so.
        topic: the topic that an event is published to.
    """

    name: str
    version: int = 1
    to: str | None = None
    topic: str = ""


class Contract(BaseModel):
    """The base of commands and events: a pydantic model with a stable name on the wire.

    `class PlaceOrder(Command, name="orders.PlaceOrder", version=2): id: int`. Without `name=` it has the name of the
    class, without that of its module: one class that is imported from two packages is one contract. A subclass is a
    contract of its own.
    """

    #: Unknown fields are ignored, so that a consumer of version 1 reads messages of version 2.
    model_config: ClassVar[ConfigDict] = ConfigDict(frozen=True, extra="ignore")

    # One attribute, with a name that no field is likely to have.
    __terms__: ClassVar[Terms] = Terms("")

    def __init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic passes these to __pydantic_init_subclass__, where the class is complete.
        super().__init_subclass__()

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        # pydantic ignores what it does not know, such as a misspelt version=.
        for word in kwargs:
            raise TypeError(
                f"class {cls.__name__}({word}=...) is nothing that a contract has. {suggest(word, TERMS)}"
            )

    @classmethod
    def _set_terms(cls, terms: Terms) -> None:
        # Set here and in no subclass: there a type checker takes it for another attribute.
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
        cls._set_terms(Terms(_name(cls, name), _version(cls, version), to=to))


class Event(Contract):
    """Something that has happened. It is published to all services that have subscribed.

    Parameters:
        name: its name on the wire; the class's name when not given.
        version: the version of that name.
        topic: the topic that it is published to; its name when not given.

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
        cls._set_terms(Terms(name, _version(cls, version), topic=topic))


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

    A discriminator is left out: the type on the wire selects the member of a union.
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


class Contracts:
    """The contracts that a bus knows, by their names on the wire."""

    def __init__(self) -> None:
        self._by_name: dict[str, type[Contract]] = {}

    def find(self, name: str | None) -> type[Contract] | None:
        """The contract of this name; None if the bus does not know it."""
        return self._by_name.get(name or "")

    def add(self, contract: type[Contract]) -> None:
        """Remember a contract.

        Raises:
            ConfigurationError: another one has its name, or it is a base class of contracts.
        """
        check_contract(contract)
        other = self._by_name.setdefault(contract.__terms__.name, contract)
        if not same_contract(contract, other):
            raise ConfigurationError(
                f"{_where(contract)} and {_where(other)} are both called {contract.__terms__.name!r} on the wire: "
                f'give one of them another name, class {contract.__name__}(..., name="...").'
            )


def check_contract(contract: type[Contract]) -> None:
    """Check that a contract is a class of the user, and not `Command`, `Event` or `Contract` itself.

    Raises:
        ConfigurationError: it is one of these.
    """
    if not contract.__terms__.name:
        raise ConfigurationError(
            f"{contract.__name__} is the base of contracts and not one itself: name a class of yours. A handler of "
            "dict takes what has no other handler, and '#' is every topic."
        )


def same_contract(one: type[Contract], other: type[Contract]) -> bool:
    """Whether two classes are one contract: the same class, also if it is imported from two packages."""
    if one is other:
        return True
    if (one.__qualname__, one.__terms__) != (other.__qualname__, other.__terms__):
        return False
    return one.model_json_schema() == other.model_json_schema()


def _where(contract: type) -> str:
    return f"{contract.__module__}.{contract.__qualname__}"
