"""Options of one protocol, so that code written for it runs unchanged on another.

An option that the chosen protocol does not know but another built-in one does is ignored, with
one log line; an option that no protocol knows is an error.
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
    """The names that a function takes by keyword."""
    fixed = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.POSITIONAL_ONLY)
    found = inspect.signature(function).parameters.values()
    return frozenset(p.name for p in found if p.kind not in fixed and p.name != "self")


O = TypeVar("O", bound=Options)  # noqa: E741


def check_known(names: Iterable[str], known: frozenset[str], *, owner: str, own: Collection[str] = ()) -> None:
    """Every name is an option of some protocol; parameters as for `read_options`.

    Raises:
        OptionError: one is not.
    """
    for name in names:
        if name in own and name not in known:
            raise OptionError(f"{owner} takes {name!r} only where it is made: write {name}=... there.")
        if name not in known:
            raise OptionError(f"{owner} takes no {name!r}. {suggest(name, {*own, *known})}")


def read_options(
    model: type[O], given: Mapping[str, Any], *, known: frozenset[str], own: frozenset[str], owner: str
) -> tuple[O, list[str]]:
    """The options for one protocol, and the names that belong to others and are ignored.

    Parameters:
        model: the driver's options.
        given: what the user wrote.
        known: names that some built-in protocol knows.
        own: parameter names of the callable itself, to suggest from.
        owner: who takes the options, for the error text.

    Raises:
        OptionError: a name that no protocol knows.
        ConfigurationError: a value that does not fit.
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
    text = str(problem["msg"]).removeprefix("Value error, ").removesuffix(".")  # pydantic's prefix for errors of ours
    return f"{where}: {text}" if where else text
