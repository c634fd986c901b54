"""No message costs more instructions of the processor than its budget.

Where valgrind is not installed these skip; the budgets of calls hold everywhere.
"""

from __future__ import annotations

import sys

import pytest

from tests.budgets import instructions

#: What was recorded, by protocol and journey: multiples of what a message takes by hand, on CPython 3.11.
RECORDED = {
    "asyncio, send": 3.77,
    "asyncio, handle": 4.55,
    "asyncio, request": 35.64,
    "sqlite, send": 13.75,
    "sqlite, receive": 3.40,
    "sqlite, handle": 5.00,
    "http, send": 24.65,
    "http, handle": 21.95,
}
#: How much more is allowed.
SHARE = 0.05
#: Threads and sockets do not take the same turns each time: a journey keeps its budget if one of so many runs does.
RUNS = 2


@pytest.mark.slow
@pytest.mark.timeout(600)
@pytest.mark.skipif(sys.version_info[:2] != (3, 11), reason="the budgets are for CPython 3.11")
@pytest.mark.skipif(not instructions.is_there(), reason="valgrind is not installed. Type: apt-get install valgrind")
def test_no_message_takes_more_instructions_than_its_budget() -> None:
    over = dict.fromkeys(RECORDED, 0.0)
    for _ in range(RUNS):
        found = instructions.count()
        assert found.keys() == RECORDED.keys()
        over = {name: found[name] for name in over if found[name] > RECORDED[name] * (1 + SHARE)}
        if not over:
            return
    lines = [f"{name}: {number:.2f}, recorded {RECORDED[name]:.2f}" for name, number in over.items()]
    raise AssertionError(
        f"Instructions for each message, as multiples of one by hand, are over the budget by more than {SHARE:.0%}:\n"
        + "\n".join(lines)
        + "\nTo count again: .venv/bin/python -m tests.budgets.instructions. What calls more: python -m tests.budgets"
    )
