"""A message is a frozen dataclass, made by an `__init__` of its own."""

from __future__ import annotations

import copy
import inspect
import pickle
from concurrent.futures import ThreadPoolExecutor
from dataclasses import FrozenInstanceError, fields, replace
from typing import Any

import pytest

from streamtools import Message, Receipt
from streamtools.message import NO_HEADERS, id_generator


def test_every_field_is_what_was_given_or_its_default() -> None:
    given = {field.name: object() for field in fields(Message)}
    made = Message(**given)
    assert {name: getattr(made, name) for name in given} == given
    plain = Message(body=b"", queue="orders", id="1")
    for field in fields(Message):
        if field.name == "headers":
            assert plain.headers is NO_HEADERS
        elif field.name not in ("body", "queue", "id"):
            assert getattr(plain, field.name) == field.default


@pytest.mark.parametrize("wrong", [{"body": b"", "queue": "orders"}, {"body": b"", "queue": "o", "id": "1", "x": 1}])
def test_a_field_too_few_or_too_many_is_an_error_that_names_it(wrong: dict[str, Any]) -> None:
    with pytest.raises(TypeError, match=r"Message\.__init__\(\).*'(id|x)'"):
        Message(**wrong)


def test_it_is_frozen_compared_by_value_and_copied_whole() -> None:
    message = Message(body=b"1", queue="orders", id="1", headers={"a": "b"}, attempt=2)
    with pytest.raises(FrozenInstanceError):
        message.attempt = 3  # type: ignore[misc]
    assert copy.copy(message) == message == replace(message) == pickle.loads(pickle.dumps(message))  # noqa: S301
    assert replace(message, key="k").key == "k" and replace(message, key="k").headers == {"a": "b"}


def test_its_signature_names_every_field() -> None:
    assert list(inspect.signature(Message).parameters) == [field.name for field in fields(Message)]


def test_an_object_of_a_subclass_keeps_its_class_and_has_every_field() -> None:
    class Order(Message):
        """A message with a field more."""

        __slots__ = ("number",)

    order = Order(body=b"1", queue="orders", id="1", attempt=2)
    object.__setattr__(order, "number", 7)
    assert type(order) is Order and order.number == 7
    assert (order.body, order.queue, order.id, order.attempt, order.headers) == (b"1", "orders", "1", 2, NO_HEADERS)
    with pytest.raises(FrozenInstanceError):
        order.attempt = 3  # type: ignore[misc]


def test_a_receipt_is_made_by_place_or_by_name_and_is_frozen() -> None:
    receipt = Receipt("1", "orders")
    assert receipt == Receipt(id="1", queue="orders") and type(receipt) is Receipt
    with pytest.raises(FrozenInstanceError):
        receipt.id = "2"  # type: ignore[misc]


def test_ids_are_unique_one_by_one_and_many_at_once_in_several_threads() -> None:
    one, other = id_generator(), id_generator()

    def take(number: int) -> list[str]:
        return [one(), *one.take(number), one(), *other.take(number)]

    with ThreadPoolExecutor(8) as threads:
        found = [id_ for ids in threads.map(take, [0, 1, 255, 256, 257, 5000] * 8) for id_ in ids]
    assert len(found) == len(set(found)) == 8 * (12 + 2 * (1 + 255 + 256 + 257 + 5000))
    assert all(len(id_) == 32 and int(id_, 16) for id_ in found)
    assert len({id_[:16] for id_ in found}) == 2
