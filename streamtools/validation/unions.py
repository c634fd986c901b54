"""Estimates how long a body would occupy pydantic because of unions without a discriminator.

Take a union of models that share a field which holds the union again: `And` and `Or` both have `items: list[And |
Or]`. pydantic tries every member of the union, and within each member everything that is nested. So each level of a
body doubles the time: 225 bytes take 17 s. A discriminator tells the members apart at once.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from streamtools.validation.schemas import Schema, nodes, parts

#: Places in a body besides the names of fields: any item of a sequence, and any value of a mapping.
_ITEM: Final = "[]"
_ANY: Final = "*"
#: Keys that hold the schema of values under any name.
_OF_ANY_NAME: Final = frozenset({"values_schema", "extras_schema", "var_kwargs_schema"})
#: All bytes except JSON's brackets and commas.
_OTHERS: Final = bytes(byte for byte in range(256) if byte not in b"[]{},")
_COMMA: Final = ord(",")
#: To validate one list or object takes as long as to validate this number of numbers or texts.
SIMPLE: Final = 4
#: The most levels of a body; pydantic's parser of JSON has this limit.
DEEPEST: Final = 256


@dataclass(frozen=True, slots=True)
class Doubling:
    """Describes how the work of a union grows with the depth of a body.

    Attributes:
        members: how many members of the union are tried at each of its levels.
        levels: how many levels of JSON lie between two levels of the union.
        field: the field that the members share.
    """

    members: int
    levels: int
    field: str

    def exceeds(self, outline: bytes, most: int) -> bool:
        """Whether pydantic would try more than `most` values; a value that is tried twice counts twice.

        Parameters:
            outline: a JSON body without its texts.
        """
        weights = [self.members ** (level // self.levels) for level in range(DEEPEST + 1)]
        level = work = 0
        most *= SIMPLE
        for byte in outline.translate(None, _OTHERS):
            if byte == _COMMA:
                work += weights[max(level - 1, 0)]
            elif byte in b"[{":
                level = min(level + 1, DEEPEST)
                work += weights[level - 1] * SIMPLE
            elif level == 0:  # the body is not JSON
                return False
            else:
                level -= 1
            if work > most:
                return True
        return False


def doubling(schema: Any) -> Doubling | None:
    """Return how the work grows for the union of a schema that grows fastest; None if there is no such union.

    Parameters:
        schema: a core schema of pydantic.
    """
    graph = _Graph(schema)
    found = [each for union in graph.unions if (each := graph.doubling(union)) is not None]
    return max(found, key=lambda each: (each.members, -each.levels), default=None)


class _Graph:
    """A core schema as a graph: its nodes are schemas, its edges are places in a body."""

    def __init__(self, schema: Any) -> None:
        found = list(nodes(schema))
        self._definitions = {node["ref"]: node for node in found if "ref" in node}
        #: The unions without a discriminator.
        self.unions = [node for node in found if node.get("type") == "union"]
        #: Id of a node -> its children, each with its place in the body; None if the child is the same value.
        self._ways: dict[int, list[tuple[str | None, Any]]] = {id(node): list(self._children(node)) for node in found}
        #: Id of a node -> the ids of its parents, and whether the node is one level of the body below them.
        self._back: defaultdict[int, list[tuple[int, bool]]] = defaultdict(list)
        for start, ways in self._ways.items():
            for place, child in ways:
                self._back[id(child)].append((start, place is not None))

    def doubling(self, union: Any) -> Doubling | None:
        """Return how the work of this union grows; None if it does not grow."""
        distances = self._distances(union)
        names: Counter[str] = Counter()
        levels = DEEPEST
        for choice in union["choices"]:
            node = choice[0] if isinstance(choice, tuple) else choice
            places = {p: distances[id(c)] + 1 for p, c in self._entries(node) if id(c) in distances}
            names.update(places.keys())
            levels = min([levels, *places.values()])
        anything = names.pop(_ANY, 0)
        field, number = names.most_common(1)[0] if names else (_ANY, 0)
        members = number + (anything if field != _ITEM else 0)
        return Doubling(members, levels, field) if members > 1 else None

    def _distances(self, union: Any) -> dict[int, int]:
        """Return, for the id of each node that leads to the union, how many levels below it the union stands."""
        found, waiting = dict[int, int](), deque([(id(union), 0)])
        while waiting:
            node, levels = waiting.popleft()
            if node in found:
                continue
            found[node] = levels
            for start, lower in self._back[node]:
                if lower:
                    waiting.append((start, levels + 1))
                else:
                    waiting.appendleft((start, levels))
        return found

    def _entries(self, node: Any) -> Iterator[tuple[str, Any]]:
        """Yield the places in the value of a node, each with the schema of the value there."""
        seen, waiting = {id(node)}, [node]
        while waiting:
            for place, child in self._ways.get(id(waiting.pop()), ()):
                if place is not None:
                    yield place, child
                elif id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    def _children(self, node: Any) -> Iterator[tuple[str | None, Any]]:
        """Yield the children of a node, each with its place in the body; None if the child is the same value."""
        if node.get("type") == "definition-ref":
            yield from ((None, found) for found in [self._definitions.get(node["schema_ref"])] if found is not None)
        for key, name, part in parts(node):
            yield from ((place, part) for place in _places(node, key, name, part))


def _places(node: Schema, key: str, name: str | None, part: Schema) -> list[str | None]:
    """Return the places in a body where a part of a schema may stand; None if it is the schema's own value."""
    if key in ("fields", "arguments_schema") and node["type"] != "call":
        named = [name or part["name"], *_aliases(part.get("validation_alias", part.get("alias")))]
        return [*named, _ITEM] if node["type"] == "named-tuple" else [*named]
    if key in ("items_schema", "var_args_schema"):
        return [_ITEM]
    return [_ANY] if key in _OF_ANY_NAME else [None]


def _aliases(alias: Any) -> list[str]:
    """Return the names of fields with which an alias begins; an alias is a name, a path, or a list of paths."""
    if isinstance(alias, list):
        return [found for part in (alias if isinstance(alias[0], list) else alias[:1]) for found in _aliases(part)]
    return [alias] if isinstance(alias, str) else []
