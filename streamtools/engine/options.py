"""Reads the options of a protocol, so that code written for one protocol runs unchanged on another.

If the chosen protocol does not know an option, but another built-in protocol does, the option is ignored, with one
log line. An option that no protocol knows is an error.
"""

from __future__ import annotations

import inspect
import logging
from collections.abc import Callable, Collection, Iterable, Mapping
from typing import Any, TypeVar

from pydantic import ValidationError

from streamtools.driver import Options
from streamtools.errors import ConfigurationError, OptionError, suggest

log: logging.Logger = logging.getLogger("streamtools")


def parameters(function: Callable[..., Any]) -> frozenset[str]:
    """Return the names of the parameters that a function takes by keyword."""
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    found = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in found if p.kind not in fixed and p.name != "self")


O = TypeVar("O", bound=Options)  # noqa: E741


def check_known(names: Iterable[str], known: frozenset[str], *, owner: str, own: Collection[str] = ()) -> None:
    """Check that every name is an option of some protocol. The parameters are those of `read_options`.

    Raises:
        OptionError: a name is not an option of any protocol.
    """
    for name in names:
        if name in own and name not in known:
            raise OptionError(f"{owner} takes {name!r} only where it is made: write {name}=... there.")
        if name not in known:
            raise OptionError(f"{owner} takes no {name!r}. {suggest(name, {*own, *known})}")


def read_options(
    model: type[O], given: Mapping[str, Any], *, known: frozenset[str], own: frozenset[str], owner: str
) -> tuple[O, list[str]]:
    """Return the options of one protocol, and the names of ignored options of other protocols.

    Parameters:
        model: the class of the driver's options.
        given: the options that the user wrote.
        known: the names that some built-in protocol knows.
        own: the parameters of the called function itself, for suggestions.
        owner: what takes the options, for the error text.

    Raises:
        OptionError: no protocol knows an option.
        ConfigurationError: the value of an option is not valid.
    """
    foreign = [name for name in given if name not in model.model_fields]
    check_known(foreign, known, owner=owner, own={*own, *model.model_fields})
    try:
        return model(**{n: v for n, v in given.items() if n in model.model_fields}), foreign
    except ValidationError as error:
        rows = "; ".join(map(_row, error.errors(include_input=False)))
        raise ConfigurationError(f"{owner}: {rows}.") from error


def _row(problem: Mapping[str, Any]) -> str:
    where = ".".join(map(str, problem["loc"]))
    text = str(problem["msg"]).removeprefix("Value error, ").removesuffix(".")  # pydantic adds this prefix
    return f"{where}: {text}" if where else text
