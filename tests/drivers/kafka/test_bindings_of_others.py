"""Whoever may write to the topic of bindings can write anything there: it is read past, and the rest holds."""

from __future__ import annotations

import json
import time
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from streamtools import Binding, ConfigurationError, Exchange
from streamtools.drivers.kafka.brokers.bindings import Bindings
from streamtools.settings import KafkaSettings

SHOP = Exchange("shop")
ours = (json.dumps(["orders", "shop", "a.*"]).encode(), b'"topic"')

anything = st.recursive(
    st.none()
    | st.booleans()
    | st.integers()
    | st.floats()
    | st.text()
    | st.sampled_from(["", "orders", "shop", "a.*"]),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(), inner, max_size=4),
    max_leaves=8,
).map(lambda value: json.dumps(value).encode())


def test_patterns_that_are_made_to_take_long_take_none() -> None:
    """Each is tried with the topic of each event that is published."""
    begun = time.thread_time()
    table = read(
        *((json.dumps(["orders", "shop", pattern]).encode(), b'"topic"') for pattern in (
            ".".join("#" * 128), ".".join(["#", "a"] * 64), ".".join("#" * 100_000), "#." * 100_000 + "a",
        )),
    )  # fmt: skip
    assert len(table.of("orders")) == 2  # the others are longer than any topic
    for exchange in (SHOP, Exchange("other")):
        table.queues(exchange, ".".join("a" * 128))
        table.queues(exchange, ".".join("ab" * 64))
    assert not SHOP.matches("#." * 5_000 + "b", ".".join("a" * 128))
    assert time.thread_time() - begun < 1.0


@pytest.mark.parametrize(
    ("pattern", "topic", "fits"),
    [
        ("#.#", "a", True),
        ("#.#.b", "a.b", True),
        ("a.#.#", "a", True),
        ("#.*.#", "", True),
        ("#.#.*.#.b", "b", False),
    ],
)
def test_several_signs_for_any_number_of_words_are_one(pattern: str, topic: str, fits: bool) -> None:
    assert SHOP.matches(pattern, topic) is fits


def read(*rows: tuple[bytes | None, bytes | None]) -> Bindings:
    table = Bindings(KafkaSettings())
    for key, value in rows:
        table._apply(key, value)
    return table


@pytest.mark.parametrize(
    ("key", "value"),
    [
        (["orders", "shop", {"topic": "a"}], "topic"),
        (["orders", ["shop"], "a"], "topic"),
        ([{"q": 1}, "shop", "a"], "topic"),
        (["orders", "shop", "a"], "no such type"),
        (["orders", "shop", "a"], {"type": "topic"}),
        (["no topic of Kafka's", "shop", "a.*"], "topic"),
        (["x" * 300, "shop", "a.*"], "topic"),
        (["orders", "", "a"], "fanout"),
        ({"a": 1, "b": 2, "c": 3}, "topic"),
        (5, "topic"),
    ],
)
def test_a_record_that_is_none_of_ours_is_passed_over(key: Any, value: Any) -> None:
    assert read((json.dumps(key).encode(), json.dumps(value).encode()), ours).queues(SHOP, "a.b") == ["orders"]


@given(
    st.lists(
        st.tuples(st.none() | st.binary() | anything, st.none() | st.binary() | anything | st.just(b"[" * 100_000))
    )
)
def test_no_record_stops_the_reading(rows: list[tuple[bytes | None, bytes | None]]) -> None:
    assert "orders" in read(*rows, ours).queues(SHOP, "a.b")


@pytest.mark.parametrize("topic", [None, 5, b"a", Binding("a")])
def test_a_binding_without_a_topic_is_refused(topic: Any) -> None:
    with pytest.raises(ConfigurationError, match="bound by a topic"):
        Binding(topic)
