"""The parts of pages that are made from the code: docstrings in the reference, and tables of settings.

A page marks such a part by two comments, which a reader does not see, and this module writes what stands between:

    <!-- made from streamtools.Producer -->           the docstrings of a class, a function or a module
    <!-- made from the parameters of streamtools.Retry -->   a table of them, with their defaults
    <!-- made from the settings KafkaSettings -->     a table of its fields, and the variables for them
    <!-- made from the send options of kafka -->      a table; there are producer options and consumer options, too
    <!-- made from the file examples/run.py -->          its text
    <!-- end -->

python -m tests.pages.reference        writes all such parts anew, and the page of the command line
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from functools import cache
from typing import Any

import griffe
from pydantic import AliasChoices, SecretStr

import streamtools.settings
from streamtools import CONSUMER_LOOPS, PRODUCERS
from streamtools.settings import ProtocolSettings
from tests.pages.commands import REFERENCE, reference
from tests.pages.markdown import ROOT, pages

_PART = re.compile(r"^<!-- made from (?P<what>[^\n]+) -->\n.*?^<!-- end -->$", re.MULTILINE | re.DOTALL)
#: Members of a base class that a class shows as its own.
_INHERITED = ("open", "a_init", "close", "validate_queue")
#: Classes whose methods come from their bases, which are not public.
_WHOLE = ("Bus", "MessageContext")
#: Public in the code, and for other parts of the library alone.
_INTERNAL = (
    "make_dispatcher",
    "make_decider",
    "reply_rule",
    "resources",
    "bound",
    "prepare",
    "send_now",
    "report_to",
)
#: Classes whose methods with an underscore are for the authors of drivers.
_HOOKS = "Hooks"
#: The longest signature on one line.
_WIDTH = 100


def made(text: str) -> str:
    """A page with its made parts as they are to be."""
    return _PART.sub(
        lambda found: f"<!-- made from {found['what']} -->\n\n{_make(found['what'])}\n\n<!-- end -->", text
    )


def sources(text: str) -> list[str]:
    """What the made parts of a page are made from."""
    return [found["what"] for found in _PART.finditer(text)]


def _make(what: str) -> str:
    for words, make in _MAKERS.items():
        if what.startswith(words):
            return make(what.removeprefix(words))
    return "\n\n".join(_documented(_find(what), 2))


# --- docstrings -------------------------------------------------------------------------------


@cache
def _package() -> Any:
    options: Any = {"warn_unknown_params": False, "warn_missing_types": False}
    return griffe.load("streamtools", search_paths=[ROOT], docstring_parser="google", docstring_options=options)


def _find(path: str) -> Any:
    found = _package()
    for name in path.split(".")[1:]:
        found = found.all_members[name] if found.is_class else found.members[name]
        found = found.final_target if found.is_alias else found
    return found


def _documented(item: Any, level: int, owner: str = "") -> Iterator[str]:
    """An item's heading, signature and docstring, and those of its public members."""
    name = f"{owner}{item.name}"
    if not item.is_module:
        yield f"{'#' * level} {name}"
        yield f"```py\n{_signature(item)}\n```"
    yield from _docstring(item)
    for member in _members(item):
        inner = 2 if item.is_module else min(level + 1, 3)
        yield from _documented(member, inner, "" if item.is_module else f"{item.name}.")


def _members(item: Any) -> Iterator[Any]:
    if item.is_function or item.is_attribute:
        return
    inherited = item.inherited_members if item.is_class else {}
    wanted = {
        **item.members,
        **{n: m for n, m in inherited.items() if n in _INHERITED or item.name in _WHOLE},
    }
    for name, member in wanted.items():
        if (member.is_alias and name not in inherited) or (not member.is_alias and member.is_module):
            continue  # a module of its own, or imported
        target = member.final_target if member.is_alias else member
        if _is_shown(item, name) and target.has_docstring and target.path.startswith("streamtools."):
            yield target


def _is_shown(owner: Any, name: str) -> bool:
    if name.startswith("_"):
        return owner.name.endswith(_HOOKS) and not name.startswith("__")
    return name not in _INTERNAL


def _signature(item: Any) -> str:
    if item.is_attribute:
        value = f" = {item.value}" if item.value is not None and "property" not in item.labels else ""
        return f"{item.name}{f': {item.annotation}' if item.annotation else ''}{value}"
    parameters = [_parameter(p) for p in _with_marks(item.parameters) if getattr(p, "name", p) not in ("self", "cls")]
    if item.is_class:
        head, tail = f"class {item.name}", ""
        if not parameters:
            return head
    else:
        head = f"{'async ' if 'async' in item.labels else ''}def {item.name}"
        tail = f" -> {item.returns}" if item.returns is not None else ""
    line = f"{head}({', '.join(parameters)}){tail}"
    if len(line) <= _WIDTH:
        return line
    return f"{head}(\n" + "".join(f"    {parameter},\n" for parameter in parameters) + f"){tail}"


def _with_marks(parameters: Any) -> Iterator[Any]:
    """Its parameters, with `*` before those that are given by name alone."""
    starred = False
    for parameter in parameters:
        kind = parameter.kind.value
        if kind == "keyword-only" and not starred:
            starred = True
            yield "*"
        starred = starred or kind == "variadic positional"
        yield parameter


def _parameter(parameter: Any) -> str:
    if isinstance(parameter, str):
        return parameter
    star = {"variadic positional": "*", "variadic keyword": "**"}.get(parameter.kind.value, "")
    text = f"{star}{parameter.name}" + (f": {parameter.annotation}" if parameter.annotation is not None else "")
    if parameter.default is None or star:
        return text
    return text + (" = " if parameter.annotation is not None else "=") + str(parameter.default)


def _docstring(item: Any) -> Iterator[str]:
    if not item.has_docstring:
        return
    for section in item.docstring.parsed:
        kind = section.kind.value
        if kind == "text":
            yield re.sub(r"^```python$", "```py", section.value, flags=re.MULTILINE)
        elif kind in ("parameters", "other parameters", "attributes"):
            rows = [f"- `{row.name}`: {_flat(row.description)}" for row in section.value]
            yield f"{_TITLES[kind]}\n\n" + "\n".join(rows)
        elif kind == "raises":
            rows = [f"- `{row.annotation}`: {_flat(row.description)}" for row in section.value]
            yield "Raises:\n\n" + "\n".join(rows)
        elif kind in ("returns", "yields"):
            yield f"{kind.title()}: " + " ".join(_flat(row.description) for row in section.value)
        else:
            raise ValueError(f"{item.path}: say how a section of the kind {kind!r} is written")


_TITLES = {"parameters": "Parameters:", "other parameters": "Parameters:", "attributes": "Attributes:"}


def _flat(text: str) -> str:
    return " ".join(text.split())


# --- tables -----------------------------------------------------------------------------------


def _described(item: Any) -> dict[str, str]:
    """What a docstring says of each parameter."""
    return {
        row.name: _flat(row.description)
        for section in item.docstring.parsed
        if section.kind.value in ("parameters", "attributes")
        for row in section.value
    }


def _fields(cls: Any) -> str:
    """A row for each field of a pydantic model; settings have variables besides."""
    is_settings = issubclass(cls, ProtocolSettings)
    told = {name: text for base in reversed(cls.__mro__) for name, text in _described_fields(base).items()}
    rows = [f"| {'setting | variable' if is_settings else 'option'} | default | meaning |"]
    rows.append("|---|---|---|---|" if is_settings else "|---|---|---|")
    for field, info in cls.model_fields.items():
        variables = ", ".join(f"`{variable}`" for variable in _variables(cls, field, info)) if is_settings else ""
        cells = [f"`{field}`", *([variables] if is_settings else []), _value(info.default), _cell(told[field])]
        rows.append(f"| {' | '.join(cells)} |")
    return "\n".join(rows)


def _described_fields(cls: type) -> dict[str, str]:
    inside = cls.__module__.startswith("streamtools.")
    return _described(_find(f"{cls.__module__}.{cls.__qualname__}")) if inside and cls.__doc__ else {}


def _variables(cls: Any, field: str, info: Any) -> list[str]:
    alias = info.validation_alias
    if isinstance(alias, AliasChoices):
        return [str(choice) for choice in alias.choices if choice != field]
    return [f"{cls.model_config['env_prefix']}{field.upper()}"]


def _value(value: object) -> str:
    if isinstance(value, SecretStr):
        value = value.get_secret_value()
    if value is None or value == "" or value == ():
        return "unset"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int) and value >= 1024 and value % 1024 == 0:
        return f"{value} ({value // 1024 // 1024} MiB)" if value % (1024 * 1024) == 0 else str(value)
    return f"`{value}`" if isinstance(value, str) else f"{value:g}" if isinstance(value, float) else str(value)


def _parameters(path: str) -> str:
    item = _find(path)
    told = _described(item)
    rows = ["| parameter | default | meaning |", "|---|---|---|"]
    for parameter in item.parameters:
        if parameter.name in told:
            default = (
                "" if parameter.default is None or parameter.kind.value.startswith("variadic") else parameter.default
            )
            rows.append(
                f"| `{parameter.name}` | {f'`{default}`' if default else ''} | {_cell(told[parameter.name])} |"
            )
    return "\n".join(rows)


def _cell(text: str) -> str:
    return text.replace("|", "\\|")


_MAKERS: dict[str, Callable[[str], str]] = {
    "the settings ": lambda name: _fields(getattr(streamtools.settings, name)),
    "the producer options of ": lambda name: _fields(PRODUCERS[name].options_class),
    "the consumer options of ": lambda name: _fields(CONSUMER_LOOPS[name].options_class),
    "the send options of ": lambda name: _fields(PRODUCERS[name].send_options_class),
    "the parameters of ": _parameters,
    "the file ": lambda path: f"`{path}`:\n\n```py\n{(ROOT / path).read_text('utf-8').rstrip()}\n```",
}

if __name__ == "__main__":
    REFERENCE.write_text(reference(), "utf-8")
    for page in pages():
        if made(page.text) != page.text:
            (ROOT / page.path).write_text(made(page.text), "utf-8")
