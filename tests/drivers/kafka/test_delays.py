"""Which level a delay goes to, and when it goes on."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from streamtools.drivers.kafka.consuming.delays import DELAY_LEVELS, leaves_at, level_of


def test_each_delay_has_the_longest_level_that_does_not_exceed_it() -> None:
    delays = (-1, 0, 0.01, 0.25, 1.9, 2, 14.9, 15, 120, 86400 * 365)
    assert [level_of(s) for s in delays] == [0, 0, 1, 1, 1, 2, 2, 3, 4, 5]
    assert level_of(3600, levels=3) == 2  # a topic that somebody made with fewer


@given(st.floats(0, 10 * 366 * 86400))
def test_from_level_to_level_a_message_is_delivered_when_it_is_due_and_never_before(delay: float) -> None:
    start = now = 1_000_000.0
    due = start + delay
    hops = 0
    while now < due:
        partition = level_of(due - now)
        leaves = leaves_at(partition, now, due)
        assert leaves <= due and leaves > now
        now = leaves
        hops += 1
    assert now == due or hops == 0
    assert hops <= 40 + delay / DELAY_LEVELS[-1]


@given(st.lists(st.tuples(st.floats(0, 10), st.floats(0, 100)), min_size=2))
def test_in_one_level_the_first_to_come_is_the_first_to_go(pairs: list[tuple[float, float]]) -> None:
    """Of those that are due later than the level is long, which is why they are in it."""
    partition = 3
    entered = sorted(at for at, _ in pairs)
    leaves = [
        leaves_at(partition, at, at + DELAY_LEVELS[partition] + more)
        for at, (_, more) in zip(entered, pairs, strict=True)
    ]
    assert leaves == sorted(leaves)
