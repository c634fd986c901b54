"""Unions whose members cannot be told apart: what validating them costs, before it is done.

A union of models that share a field in which the union stands again, such as `And` and `Or` that both have
`items: list[And | Or]`, is validated by trying every member, and in each of them all that is nested. That takes twice
as long for each level: 17 s for 225 bytes. A discriminator tells them apart at once.
"""

from __future__ import annotations

from collections import Counter, defaultdict, deque
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, Final

from streamtools.validation.schemas import Schema, nodes, parts

#: The place of an item in a sequence, and of any value in a mapping, beside the names of fields.
_ITEM: Final = "[]"
_ANY: Final = "*"
#: Keys of schemas of values whose names may be any.
_OF_ANY_NAME: Final = frozenset({"values_schema", "extras_schema", "var_kwargs_schema"})
#: Deletes all bytes of a JSON body but its brackets and commas.
_OTHERS: Final = bytes(byte for byte in range(256) if byte not in b"[]{},")
_COMMA: Final = ord(",")
#: So many numbers or texts take as long as one list or object.
SIMPLE: Final = 4
#: Levels of JSON at most, as its parser has it.
DEEPEST: Final = 256


@dataclass(frozen=True, slots=True)
class Doubling:
    """How the work grows with the levels of a body.

    Attributes:
        members: that are tried at each level.
        levels: of JSON that one level of the union takes.
        field: that they share.
    """

    members: int
    levels: int
    field: str

    def exceeds(self, outline: bytes, most: int) -> bool:
        """Whether more values than `most` are tried, each as often as it is.

        Parameters:
            outline: a body of JSON without its texts.
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
            elif level == 0:  # it is no JSON
                return False
            else:
                level -= 1
            if work > most:
                return True
        return False


def doubling(schema: Any) -> Doubling | None:
    """Of a core schema's unions the one whose work grows fastest; None where it does not grow.

    Parameters:
        schema: of pydantic's core.
    """
    graph = _Graph(schema)
    found = [each for union in graph.unions if (each := graph.doubling(union)) is not None]
    return max(found, key=lambda each: (each.members, -each.levels), default=None)


class _Graph:
    """A core schema as nodes, and the places in a body by which one leads to another."""

    def __init__(self, schema: Any) -> None:
        found = list(nodes(schema))
        self._definitions = {node["ref"]: node for node in found if "ref" in node}
        #: Its unions without a discriminator.
        self.unions = [node for node in found if node.get("type") == "union"]
        #: By the id of a node: what it leads to, and by which place; by None where that is the same value.
        self._ways: dict[int, list[tuple[str | None, Any]]] = {id(node): list(self._children(node)) for node in found}
        #: By the id of a node: the ids of those that lead to it, and whether that is a level of the body.
        self._back: defaultdict[int, list[tuple[int, bool]]] = defaultdict(list)
        for start, ways in self._ways.items():
            for place, child in ways:
                self._back[id(child)].append((start, place is not None))

    def doubling(self, union: Any) -> Doubling | None:
        """How the work of this union grows."""
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
        """By the ids of all nodes that lead to the union: how many levels lower it stands."""
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
        """The places in the value of a node, and what stands there."""
        seen, waiting = {id(node)}, [node]
        while waiting:
            for place, child in self._ways.get(id(waiting.pop()), ()):
                if place is not None:
                    yield place, child
                elif id(child) not in seen:
                    seen.add(id(child))
                    waiting.append(child)

    def _children(self, node: Any) -> Iterator[tuple[str | None, Any]]:
        """What a node leads to, and by which place; by None where that is the same value."""
        if node.get("type") == "definition-ref":
            yield from ((None, found) for found in [self._definitions.get(node["schema_ref"])] if found is not None)
        for key, name, part in parts(node):
            yield from ((place, part) for place in _places(node, key, name, part))


def _places(node: Schema, key: str, name: str | None, part: Schema) -> list[str | None]:
    """The places in a body at which a part of a schema may stand; None is where the schema stands itself."""
    if key in ("fields", "arguments_schema") and node["type"] != "call":
        named = [name or part["name"], *_aliases(part.get("validation_alias", part.get("alias")))]
        return [*named, _ITEM] if node["type"] == "named-tuple" else [*named]
    if key in ("items_schema", "var_args_schema"):
        return [_ITEM]
    return [_ANY] if key in _OF_ANY_NAME else [None]


def _aliases(alias: Any) -> list[str]:
    """The names of a body's fields that an alias begins with: it is a name, or a path, or a list of paths."""
    if isinstance(alias, list):
        return [found for part in (alias if isinstance(alias[0], list) else alias[:1]) for found in _aliases(part)]
    return [alias] if isinstance(alias, str) else []
