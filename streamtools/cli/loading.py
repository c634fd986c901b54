"""Finds the object that `module:name` names, for `streamtools run` and `streamtools schema`."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Iterable
from pathlib import Path
from types import ModuleType
from typing import Any, Final

from streamtools.bus import Bus, Command, Event
from streamtools.bus.contracts import Contract
from streamtools.compat.handlers import HandlerFactory
from streamtools.consumer import BoundHandler, Consumer
from streamtools.errors import ConfigurationError, FeatureError, suggest
from streamtools.routing import ConsumerFactory
from streamtools.runner import ConsumerRunner

#: The types of objects that can be run, as a runner or inside one.
RUNNABLE: Final = (ConsumerRunner, ConsumerFactory, HandlerFactory, Bus, Consumer, BoundHandler)


def load(target: str) -> ConsumerRunner:
    """Return the runner that `module:name` names; any other object that can run is put into a runner.

    Raises:
        ConfigurationError: there is no such module, the module has no such name, or the object cannot run.
        Exception: the module raised it when it was imported.
    """
    return _runner(find(target, "run", RUNNABLE), target)


def load_contract(target: str) -> type[Contract]:
    """Return the command or event that `module:Name` names.

    Raises:
        ConfigurationError: there is no such module, the module has no such name, or it is no command or event.
        Exception: the module raised it when it was imported.
    """
    found = find(target, "describe", (Contract,))
    if isinstance(found, type) and issubclass(found, Contract):
        return found
    raise ConfigurationError(f"{target!r} is neither a Command nor an Event, and only these have a schema.")


def find(target: str, do: str, kinds: tuple[type, ...]) -> Any:
    """Return the object that `module:name` names. The working directory is searched first, as `python -m` does.

    Parameters:
        do: a verb that says what the command does with the object, for error texts.
        kinds: the object should be an instance or a subclass of one of these, for error texts.

    Raises:
        ConfigurationError: there is no such module, or the module has no such name.
        Exception: the module raised it when it was imported.
    """
    name, _, path = target.partition(":")
    if not name or name.endswith(".py") or "/" in name:
        raise ConfigurationError(f"{target!r} does not name a module: write {_suggest(name)}:app, with dots.")
    if "" not in sys.path and str(Path.cwd()) not in sys.path:
        sys.path.insert(0, str(Path.cwd()))
    module = _import(name)
    if not path:
        raise ConfigurationError(
            f"{target!r} does not say what to {do}: write {name}:NAME. {_candidates(module, do, kinds)}"
        )
    return _attribute(module, path, _candidates(module, do, kinds))


def check_shared(runner: ConsumerRunner) -> None:
    """Check that several processes can run this runner together.

    Raises:
        FeatureError: the protocol of a consumer does not let several processes share a queue.
    """
    for consumer in runner.consumers:
        if not consumer.features.processes:
            raise FeatureError(
                f"{consumer.protocol!r} consumers in several processes cannot share {consumer.queue!r}: leave "
                "--workers out and raise concurrency=, or use sqlite or rabbitmq."
            )


def _suggest(name: str) -> str:
    return name.removesuffix(".py").strip("./").replace("/", ".") or "module"


def _import(name: str) -> ModuleType:
    try:
        return importlib.import_module(name)
    except ModuleNotFoundError as error:
        # If the module itself exists, but imports one that does not, the user sees the whole traceback.
        if error.name is None or not (name == error.name or name.startswith(error.name + ".")):
            raise
        raise ConfigurationError(
            f"There is no module {error.name!r}, looked for from {Path.cwd()}. {suggest(error.name, _modules())}"
        ) from None


def _modules() -> list[str]:
    here = Path.cwd()
    files = [*here.glob("*.py"), *here.glob("*/*.py"), *here.glob("*/*/*.py")]
    names = {".".join(file.relative_to(here).with_suffix("").parts) for file in files}
    names = {name.removesuffix(".__init__") for name in names if name.replace(".", "").isidentifier()}
    return sorted(names)[:200]


def _attribute(module: ModuleType, path: str, candidates: str) -> Any:
    found: Any = module
    for part in path.split("."):
        try:
            found = getattr(found, part)
        except AttributeError:
            known = [name for name in vars(module) if not name.startswith("_")]
            raise ConfigurationError(
                f"{module.__name__!r} has no {path!r}. {candidates or suggest(path, known)}"
            ) from None
    return found


def _candidates(module: ModuleType, do: str, kinds: tuple[type, ...]) -> str:
    names = [name for name, value in vars(module).items() if _is_one(value, kinds)]
    return f"It can {do}: {', '.join(f'{module.__name__}:{name}' for name in names)}." if names else ""


def _is_one(value: object, kinds: tuple[type, ...]) -> bool:
    if isinstance(value, type):
        return issubclass(value, kinds) and value not in (*kinds, Command, Event)
    return isinstance(value, kinds)


def _runner(found: Any, target: str) -> ConsumerRunner:
    if isinstance(found, ConsumerRunner):
        return found
    if isinstance(found, ConsumerFactory | HandlerFactory | Bus | Consumer | BoundHandler):
        return ConsumerRunner(found)
    if isinstance(found, Iterable) and not isinstance(found, str | bytes) and (parts := list(found)):
        return ConsumerRunner(*parts)
    raise ConfigurationError(
        f"{target!r} is {type(found).__name__}, which cannot run: name a ConsumerRunner, ConsumerFactory, "
        "HandlerFactory, Bus, Consumer or decorated handler."
    )
