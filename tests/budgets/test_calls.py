"""No message costs more calls of functions than its budget.

A time depends on the machine and on its other users; the number of calls does not. Whoever adds a call to the way of
each message finds out here, and decides whether it is worth it.
"""

from __future__ import annotations

from pathlib import Path

from tests.brokers.address import RabbitMQAddress
from tests.brokers.kafka.address import KafkaAddress
from tests.budgets.budget import Cost, excess, is_within, recorded
from tests.budgets.calls import Calls, count
from tests.budgets.journeys import JOURNEYS

#: How many messages a broker or a disk takes at once depends on time, and each batch has calls of its own: a journey
#: keeps its budget if one of so many runs does.
RUNS = 4


def keeps_its_budgets(protocol: str, url: str) -> None:
    """Count until every journey has kept its budget in one run.

    Raises:
        AssertionError: one never did; the text says what has grown.
    """
    budgets, over = recorded()[protocol], dict.fromkeys(JOURNEYS[protocol], Calls())
    for _ in range(RUNS):
        found = count(protocol, url, over)
        over = {name: calls for name, calls in found.items() if not is_within(Cost.of(calls), budgets[name])}
        if not over:
            return
    raise AssertionError("\n\n".join(excess(protocol, name, calls, budgets[name]) for name, calls in over.items()))


def test_in_process() -> None:
    keeps_its_budgets("asyncio", "asyncio://budgets?maxsize=10000")


def test_in_sqlite(tmp_path: Path) -> None:
    keeps_its_budgets("sqlite", f"sqlite:///{tmp_path}/queues.db")


def test_over_http() -> None:
    keeps_its_budgets("http", "")


def test_on_rabbitmq(rabbitmq_vhost: RabbitMQAddress) -> None:
    keeps_its_budgets("rabbitmq", rabbitmq_vhost.url)


def test_on_kafka(kafka: KafkaAddress) -> None:
    keeps_its_budgets("kafka", kafka.url)


# --- the budget itself --------------------------------------------------------------------------------

BUDGET = Cost(own=24, all=45, files={"engine/loop.py": 4, "producer.py": 20, "asyncio": 21})


def test_one_call_more_on_a_short_way_is_too_much() -> None:
    calls = {"engine/loop.py Loop._work": 4.0, "producer.py Producer.send": 20.0, "asyncio": 21.0}
    assert is_within(Cost.of(calls), BUDGET)
    assert not is_within(Cost.of(calls | {"engine/loop.py Loop._more": 1.0}), BUDGET)
    assert not is_within(Cost.of(calls | {"asyncio": 23.0}), BUDGET)


def test_what_has_grown_is_named_with_its_functions_and_the_command_that_shows_it() -> None:
    calls = {
        "engine/loop.py Loop._work": 4.0,
        "engine/loop.py Loop._more": 2.0,
        "producer.py send": 20.0,
        "asyncio": 20,
    }
    text = excess("sqlite", "handle", calls, BUDGET)
    assert "26 calls of the package's functions (budget 25.0, recorded 24) and 46 of all (budget 46.4" in text
    assert "\n  engine/loop.py: 6, was 4 (Loop._work 4, Loop._more 2)\n" in text
    assert "producer.py" not in text
    assert text.endswith("python -m tests.budgets sqlite 'handle' --record")


def test_a_function_that_is_called_for_each_message_is_counted_once_for_each() -> None:
    found = count("asyncio", "asyncio://budgets?maxsize=10000", ["send"])["send"]
    assert found["producer.py Producer.send"] >= 1
    assert all(number == int(number) for place, number in found.items() if place.startswith("producer.py"))


def test_every_journey_has_a_budget_and_every_budget_a_journey() -> None:
    assert {p: set(each) for p, each in recorded().items()} == {p: set(each) for p, each in JOURNEYS.items()}
