"""Walks the core schemas that pydantic makes of annotations: it knows which of their keys hold schemas.

All other keys hold values of the user: defaults, literals, metadata, functions. They may look like schemas, so they
are neither read nor copied.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, Final

#: A core schema of pydantic.
Schema = Any

_SEQUENCE: Final = ("items_schema",)
_MAPPING: Final = ("keys_schema", "values_schema")
_WITHIN: Final = ("schema",)
#: The schema of a parameter in "arguments" has no type of its own; we call it this.
_PARAMETER: Final = "parameter"
#: Type of a schema -> its keys that hold a schema, a list of schemas, or a mapping of names to schemas.
_KEYS: Final[dict[str, tuple[str, ...]]] = {
    **dict.fromkeys(("list", "deque", "set", "frozenset", "tuple", "generator"), _SEQUENCE),
    **dict.fromkeys(("dict", "frozendict", "ordered-dict", "counter"), _MAPPING),
    **dict.fromkeys(("function-before", "function-after", "function-wrap", "default", "nullable"), _WITHIN),
    **dict.fromkeys(("model", "dataclass", "custom-error", "json", "missing-sentinel", _PARAMETER), _WITHIN),
    **dict.fromkeys(("model-field", "typed-dict-field", "dataclass-field", "named-tuple-field"), _WITHIN),
    **dict.fromkeys(("union", "tagged-union"), ("choices",)),
    **dict.fromkeys(("dataclass-args", "named-tuple"), ("fields",)),
    "chain": ("steps",),
    "lax-or-strict": ("lax_schema", "strict_schema"),
    "json-or-python": ("json_schema", "python_schema"),
    "typed-dict": ("fields", "extras_schema"),
    "model-fields": ("fields", "extras_schema", "extras_keys_schema"),
    "arguments": ("arguments_schema", "var_args_schema", "var_kwargs_schema"),
    "arguments-v3": ("arguments_schema",),
    "call": ("arguments_schema",),
    "definitions": ("schema", "definitions"),
}
#: Types that are validated in less than 1 µs for each value of a body, not counting the defaults of models.
_QUICK: Final = frozenset(
    "any none bool int float str bytes date time datetime timedelta literal enum uuid decimal list deque set "
    "frozenset tuple dict default nullable tagged-union definitions definition-ref model model-fields model-field "
    "typed-dict typed-dict-field dataclass dataclass-args dataclass-field".split()
)
#: The most fields with a default that a model may have and still be quick.
_MISSING: Final = 10
#: pydantic copies defaults of these types, for each model.
_COPIED: Final = (list, dict, set)
#: If these keys hold a dict, it is a mapping of names to schemas.
_NAMED: Final = frozenset({"fields", "choices"})


def parts(schema: Schema) -> Iterator[tuple[str, str | None, Schema]]:
    """Yield the schemas directly inside a schema: the key, the name if the key holds a mapping, and the schema."""
    for key in _keys(schema):
        for name, part in _held(key, schema.get(key)):
            yield key, name, part


def nodes(schema: Schema) -> Iterator[Schema]:
    """Yield a schema and all schemas inside it, at any depth."""
    waiting = [schema]
    while waiting:
        yield (node := waiting.pop())
        waiting += [part for _, _, part in parts(node)]


def with_parts(schema: Schema, change: Callable[[Schema], Schema]) -> Schema:
    """Return a copy of a schema in which each schema directly inside is replaced by `change(it)`."""
    return {**schema, **{key: _changed(key, schema[key], change) for key in _keys(schema) if key in schema}}


def is_quick(schema: Schema) -> bool:
    """Whether all types of a schema are quick: no unions, addresses or functions, no models with many defaults."""
    return all(node.get("type") in _QUICK and _has_few_defaults(node) for node in nodes(schema))


def _has_few_defaults(schema: Schema) -> bool:
    defaults = [part["schema"] for key, _, part in parts(schema) if key == "fields"]
    defaults = [each for each in defaults if each["type"] == "default"]
    required = len([*parts(schema)]) - len(defaults)
    made = [each for each in defaults if "default_factory" in each or isinstance(each.get("default"), _COPIED)]
    return len(defaults) <= _MISSING and (not made or len(made) < required)


def _keys(schema: Schema) -> tuple[str, ...]:
    return _KEYS.get(schema.get("type", _PARAMETER), ())


def _held(key: str, value: Any) -> Iterator[tuple[str | None, Schema]]:
    if isinstance(value, dict) and key in _NAMED:
        yield from ((name, part) for name, part in value.items() if isinstance(part, dict))
    elif isinstance(value, dict):
        yield None, value
    elif isinstance(value, list):  # a choice may be a tuple: the schema and its label
        parts = (part[0] if isinstance(part, tuple) else part for part in value)
        yield from ((None, part) for part in parts if isinstance(part, dict))


def _changed(key: str, value: Any, change: Callable[[Schema], Schema]) -> Any:
    if isinstance(value, dict) and key in _NAMED:
        return {name: _changed("", part, change) for name, part in value.items()}
    if isinstance(value, dict):
        return change(value)
    if isinstance(value, list):
        return [_changed("", part, change) for part in value]
    if isinstance(value, tuple):
        return (_changed("", value[0], change), *value[1:])
    return value
