"""Generated models, whose defaults look like schemas: a large body is made into what pydantic itself makes of it."""

from __future__ import annotations

import collections
import itertools
import json
from collections.abc import Callable
from dataclasses import make_dataclass
from typing import Any, Literal, NamedTuple, Optional, Union, get_args, get_origin

from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from pydantic import BaseModel, ConfigDict, Field, TypeAdapter, ValidationError, create_model
from typing_extensions import TypedDict

from streamtools import Message, codec
from streamtools.errors import DecodeError

#: Defaults.
LOOKS_LIKE_A_SCHEMA: list[Any] = [
    {"type": "list", "a": [1]},
    {"type": "union", "choices": [{"type": "int"}]},
    {"type": "definition-ref", "schema_ref": "x"},
    {"schema": {"type": "set"}},
    [{"type": "tuple"}],
    {"ref": "a", "type": "model"},
    collections.OrderedDict(type="set"),
]
PLAIN: list[Any] = [int, str, float, bool, Any, dict, list, Literal["list", "union"], set[int], frozenset[str]]
PLAIN += [tuple[int, str], tuple[int, ...], dict[int, str], collections.deque[int]]
NAMES = st.sampled_from(["type", "fields", "schema", "items", "choices", "ref"])
numbers = itertools.count()


class Pair(NamedTuple):
    type: int
    items: list[int] = [1]  # noqa: RUF012


@st.composite
def models(draw: st.DrawFn, types: st.SearchStrategy[Any]) -> Any:
    """A model, a dataclass or a `TypedDict` with fields of these types."""
    kinds = {name: draw(types) for name in draw(st.lists(NAMES, min_size=1, max_size=4, unique=True))}
    name = f"Made{next(numbers)}"
    if (kind := draw(st.sampled_from(["model", "model", "dataclass", "dict"]))) == "dataclass":
        return make_dataclass(name, kinds.items())
    if kind == "dict":
        return TypedDict(name, kinds)  # type: ignore[operator]
    extra: Literal["allow", "forbid", "ignore"] = draw(st.sampled_from(["allow", "forbid", "ignore"]))
    config = ConfigDict(strict=draw(st.booleans()), extra=extra)
    defaults = st.sampled_from(LOOKS_LIKE_A_SCHEMA).map(lambda d: Field(d, json_schema_extra={"type": "union"}))
    fields: dict[str, Any] = {f"{each}_": (of, draw(st.just(...) | defaults)) for each, of in kinds.items()}
    return create_model(name, __config__=config, **fields)


def wider(types: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    several = st.lists(types, min_size=2, max_size=3).map(lambda parts: Union[tuple(parts)])  # noqa: UP007
    made = [types.map(lambda t: list[t]), types.map(lambda t: dict[str, t]), types.map(lambda t: Optional[t])]  # noqa: UP045
    return st.one_of(*made, several, models(types))


VALUES = st.recursive(
    st.none() | st.booleans() | st.integers(-3, 3) | st.sampled_from(["a", "1", "list"]),
    lambda parts: st.lists(parts, max_size=3) | st.dictionaries(NAMES, parts, max_size=3),
    max_leaves=6,
)


def fitting(draw: Callable[[Any], Any], kind: Any) -> Any:
    """A value that is mostly valid."""
    origin, parts = get_origin(kind), get_args(kind)
    if draw(st.integers(0, 19)) == 0:
        return draw(VALUES)
    if isinstance(kind, type) and issubclass(kind, BaseModel):
        given = {
            name: field for name, field in kind.model_fields.items() if field.is_required() or draw(st.booleans())
        }
        return {name: fitting(draw, field.annotation) for name, field in given.items()}
    if isinstance(kind, type) and getattr(kind, "__annotations__", None):
        return {name: fitting(draw, of) for name, of in kind.__annotations__.items() if not isinstance(of, str)}
    if origin is Union:
        return fitting(draw, draw(st.sampled_from(parts)))
    if origin in (list, set, frozenset, collections.deque):
        return [fitting(draw, parts[0]) for _ in range(draw(st.integers(0, 3)))]
    if origin is tuple:
        return [fitting(draw, part) for part in (parts[:1] * 2 if parts[-1] is ... else parts)]
    if origin is dict:
        return {str(n): fitting(draw, parts[1]) for n in range(draw(st.integers(0, 2)))}
    plain = {int: st.integers(0, 9), str: st.text(max_size=3), float: st.floats(0, 1), bool: st.booleans()}
    return draw(plain.get(kind, VALUES))


TYPES = st.recursive(st.sampled_from([*PLAIN, Pair]), wider, max_leaves=8)


@settings(max_examples=60, deadline=None, suppress_health_check=[*HealthCheck])
@given(models(TYPES) | TYPES, st.data())
def test_a_large_body_is_made_into_what_pydantic_makes_of_it(kind: Any, data: st.DataObject) -> None:
    model = create_model("Large", found=(kind, ...), rows=(list[int], []))
    body = json.dumps({"found": fitting(data.draw, kind), "rows": [100] * 4000}).encode()
    try:
        expected = TypeAdapter(model).validate_json(body)
    except ValidationError:
        expected = None
    try:
        made = codec.decoder(model)(Message(body=body, queue="q", id="1", content_type=codec.JSON))
    except DecodeError:
        made = None
    assert made == expected
    assert shape(made) == shape(expected)


def shape(value: Any) -> Any:
    """The types of a value and of all within, which are equal where `==` takes one for another."""
    if isinstance(value, BaseModel):
        return type(value), {name: shape(part) for name, part in value}
    if isinstance(value, dict):
        return type(value), {name: shape(part) for name, part in value.items()}
    if isinstance(value, list | tuple | collections.deque):
        return type(value), [shape(part) for part in value]
    return type(value), shape(vars(value)) if hasattr(value, "__dict__") else None
