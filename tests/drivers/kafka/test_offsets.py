"""The bookkeeping of one partition: what may be committed, and what a successor repeats."""

from __future__ import annotations

import time

import pytest
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, precondition, rule

from streamtools.drivers.kafka.offsets import MARK, METADATA_LIMIT, Offsets, decode, encode


def test_only_what_is_finished_without_a_gap_can_be_committed() -> None:
    offsets = Offsets(10)
    assert all(offsets.take(n) for n in (10, 11, 12))
    assert offsets.commit() == (10, "", True)
    assert offsets.finish(11) and offsets.finish(12)
    position, metadata, _ = offsets.commit()
    assert (position, decode(position, metadata)) == (10, [(11, 13)])
    assert offsets.finish(10)
    assert offsets.commit() == (13, "", True)


def test_offsets_without_a_message_count_as_finished() -> None:
    offsets = Offsets(0)
    offsets.take(5)
    assert offsets.position == 5
    offsets.finish(5)
    offsets.take(9)
    assert offsets.position == 9


def test_what_is_passed_over_is_finished_and_what_is_taken_is_not() -> None:
    offsets = Offsets(10)
    assert not offsets.pass_over(10)
    offsets.take(10)
    assert offsets.pass_over(12)
    assert (offsets.position, offsets.next) == (10, 12)
    offsets.finish(10)
    assert offsets.commit() == (12, "", True)


def test_a_successor_repeats_only_what_is_not_finished() -> None:
    first = Offsets(0)
    for n in range(6):
        first.take(n)
    for n in (1, 2, 4):
        first.finish(n)
    position, metadata, _ = first.commit()
    second = Offsets(position, metadata)
    assert [n for n in range(8) if second.take(n)] == [0, 3, 5, 6, 7]


def test_what_a_predecessor_finished_ahead_is_carried_on() -> None:
    position, metadata, _ = _committed({3, 7, 8}, 10)
    second = Offsets(position, metadata)
    second.take(0)  # the rest of the partition is not read yet when this one commits
    again = Offsets(*second.commit()[:2])
    assert [n for n in range(10) if again.take(n)] == [0, 1, 2, 4, 5, 6, 9]


def test_a_second_verdict_changes_nothing() -> None:
    offsets = Offsets(0)
    offsets.take(0)
    assert offsets.finish(0) and not offsets.finish(0) and not offsets.finish(1)
    assert offsets.uncommitted == 1


def test_an_offset_that_comes_again_is_an_error() -> None:
    offsets = Offsets(5)
    offsets.take(5)
    for again in (5, 4):
        with pytest.raises(ValueError, match="taken already"):
            offsets.take(again)


def test_what_is_finished_while_a_commit_is_under_way_is_not_taken_for_committed() -> None:
    offsets = Offsets(0)
    offsets.take(0), offsets.take(1)
    offsets.finish(0)
    changes = offsets.changes
    offsets.finish(1)
    offsets.committed(changes)
    assert offsets.uncommitted == 1


@pytest.mark.parametrize("foreign", ["", "written by another client", MARK, f"{MARK}?", f"{MARK}gA==", f"{MARK}ä"])
def test_metadata_of_another_program_is_left_alone(foreign: str) -> None:
    assert decode(7, foreign) == []
    assert Offsets(7, foreign).take(7)


def test_metadata_that_finds_no_room_is_cut_and_never_wrong() -> None:
    offsets = Offsets(0)
    for n in range(20_000):
        offsets.take(n)
    for n in range(1, 20_000, 2):
        offsets.finish(n)
    position, metadata, whole = offsets.commit()
    assert not whole and len(metadata) <= METADATA_LIMIT
    told = decode(position, metadata)
    assert told and all(first % 2 == 1 and end == first + 1 for first, end in told)
    offsets.finish(0)
    assert offsets.commit()[0] == 2


def test_a_slow_message_before_a_million_others_needs_no_room() -> None:
    text, whole = encode(0, [(1, 1_000_001)])
    assert whole and len(text) < 12
    assert decode(0, text) == [(1, 1_000_001)]


@given(st.sets(st.integers(0, 300)), st.integers(0, 2**40))
def test_any_set_of_offsets_survives_the_metadata(finished: set[int], start: int) -> None:
    runs = [(start + n, start + n + 1) for n in sorted(finished)]
    text, whole = encode(start, runs)
    assert whole and text.isascii()
    assert {n for first, end in decode(start, text) for n in range(first, end)} == {start + n for n in finished}


@given(st.text())
def test_no_text_breaks_the_reader(text: str) -> None:
    decode(0, text)
    decode(0, MARK + text)


def _committed(finished: set[int], taken: int) -> tuple[int, str, bool]:
    offsets = Offsets(0)
    for n in range(taken):
        offsets.take(n)
    for n in finished:
        offsets.finish(n)
    return offsets.commit()


class OnePartition(RuleBasedStateMachine):
    """Readers come and go at any moment; each takes, finishes and commits. A log with holes, any order."""

    @initialize(holes=st.sets(st.integers(0, 80)))
    def begin(self, holes: set[int]) -> None:
        self.log = [n for n in range(80) if n not in holes]
        self.holes = holes
        self.finished: set[int] = set()  # by anyone, as the world knows it
        self.told: set[int] = set()  # finished, as this reader can know
        self.kept: tuple[int, str] = (0, "")  # what Kafka holds
        self.known: set[int] = set()  # finished when that was committed
        self.offsets = Offsets(0)

    @rule()
    def take(self) -> None:
        for n in self.log:
            if n >= self.offsets.next:
                if self.offsets.take(n):
                    assert n not in self.known, "a commit told that it was finished"
                else:
                    assert n in self.finished, "it was skipped without having been finished"
                return

    @precondition(lambda self: self.offsets.pending)
    @rule(data=st.data())
    def finish(self, data: st.DataObject) -> None:
        n = data.draw(st.sampled_from([n for n in self.log if n in self.offsets.pending]))
        assert self.offsets.finish(n)
        self.finished.add(n)
        self.told.add(n)

    @rule(data=st.data())
    def look_ahead(self, data: st.DataObject) -> None:
        """What a commit would say that finishes some more is what it says once they are finished."""
        pending = [n for n in self.log if n in self.offsets.pending]
        some = data.draw(st.sets(st.sampled_from(pending))) if pending else set()
        ahead = self.offsets.commit(also=some)
        for n in some:
            self.offsets.finish(n)
            self.finished.add(n)
            self.told.add(n)
        assert self.offsets.commit() == ahead

    @rule(limit=st.sampled_from([8, 20, METADATA_LIMIT]))
    def commit(self, limit: int) -> None:
        position, metadata, whole = self.offsets.commit(limit)
        assert len(metadata) <= limit
        assert position >= self.kept[0], "an offset is never committed backwards"
        self.kept = position, metadata
        told = {n for first, end in decode(position, metadata) for n in range(first, end)}
        self.known = {n for n in self.log if n < position or n in told}
        assert self.known <= self.finished, "committed past what is not finished"
        if whole:
            assert self.told <= self.known, "what is finished is told"
        self.offsets.committed(self.offsets.changes)

    @rule()
    def die(self) -> None:
        self.offsets = Offsets(*self.kept)
        self.told = set(self.known)

    @invariant()
    def counts_are_sane(self) -> None:
        if hasattr(self, "offsets"):
            assert self.offsets.uncommitted >= 0
            assert self.offsets.position <= self.offsets.next


TestOnePartition = OnePartition.TestCase


def test_a_number_without_end_does_not_take_long() -> None:
    begun = time.thread_time()
    assert decode(0, MARK + "____" * 2**18) == []
    assert time.thread_time() - begun < 1.0
