"""Bytes are reserved within the limit, and released once."""

import hypothesis.strategies as st
import pytest
from hypothesis import given
from hypothesis.stateful import RuleBasedStateMachine, invariant, rule

from pcae_serve.runtime.memory_budget import (
    AnswerReservation,
    MemoryBudget,
    ParallelWork,
    Reservation,
)


def test_what_does_not_fit_is_refused_and_changes_nothing() -> None:
    budget = MemoryBudget(100)
    one, two = budget.reserve(), budget.reserve()
    assert one.try_resize(60)
    assert not two.try_resize(41)
    assert (one.held_bytes, two.held_bytes, budget.free_bytes) == (60, 0, 40)
    assert two.try_resize(40)
    assert one.try_resize(20)  # less always fits
    assert two.try_resize(80)


def test_a_reservation_ends_with_its_context_whatever_happens() -> None:
    budget = MemoryBudget(100)
    reservation = budget.reserve()
    assert reservation.try_resize(100)
    with pytest.raises(KeyError), reservation:
        raise KeyError
    assert budget.used_bytes == 0


def test_after_its_release_a_reservation_holds_nothing_and_takes_nothing() -> None:
    budget = MemoryBudget(100)
    early, other = budget.reserve(), budget.reserve()
    assert early.try_resize(30)
    assert other.try_resize(50)
    for _ in range(3):
        early.release()
        assert (early.held_bytes, budget.used_bytes) == (0, 50)
        assert not early.try_resize(10)


def test_an_answer_that_is_forgotten_holds_nothing() -> None:
    budget = MemoryBudget(100)
    answer = AnswerReservation(budget)
    assert answer.try_resize(30)
    del answer
    assert budget.used_bytes == 0


def test_what_is_missing_may_be_reclaimed() -> None:
    budget, missing = MemoryBudget(100), list[int]()
    old = budget.reserve()
    assert old.try_resize(70)

    def reclaim(count: int) -> None:
        missing.append(count)
        old.release()

    budget.reclaim = reclaim
    assert budget.reserve().try_resize(50)
    assert missing == [20]
    assert budget.used_bytes == 50


@given(st.lists(st.tuples(st.booleans(), st.integers(0, 60))), st.integers(1, 3))
def test_pieces_of_parallel_work_take_what_the_largest_ones_take(
    steps: list[tuple[bool, int]], parallel: int
) -> None:
    budget = MemoryBudget(100)
    work, pieces = ParallelWork(budget, parallel), list[int]()
    for add, count in steps:
        if add:
            fits = sum(sorted([*pieces, count])[-parallel:]) <= 100
            assert work.try_add(count) is fits
            pieces += [count] * fits
        elif pieces:
            work.remove(pieces.pop(count % len(pieces)))
        assert budget.used_bytes == sum(sorted(pieces)[-parallel:])


class Requests(RuleBasedStateMachine):
    """Any number of requests that grow, shrink, hand over and end in any order."""

    def __init__(self) -> None:
        super().__init__()
        self.budget = MemoryBudget(1000)
        self.held: dict[Reservation, int] = {}
        self.released = list[Reservation]()

    @rule()
    def begin(self) -> None:
        self.held[self.budget.reserve()] = 0

    @rule(index=st.integers(0), count=st.integers(0, 1200))
    def resize(self, index: int, count: int) -> None:
        if self.held:
            reservation = list(self.held)[index % len(self.held)]
            others = sum(self.held.values()) - self.held[reservation]
            fits = others + count <= 1000 or count <= self.held[reservation]
            assert reservation.try_resize(count) is fits
            if fits:
                self.held[reservation] = count

    @rule(index=st.integers(0))
    def end(self, index: int) -> None:
        if self.held:
            reservation = list(self.held)[index % len(self.held)]
            del self.held[reservation]
            reservation.release()
            self.released.append(reservation)

    @rule(index=st.integers(0), count=st.integers(0, 1200))
    def use_after_its_end(self, index: int, count: int) -> None:
        if self.released:
            reservation = self.released[index % len(self.released)]
            reservation.release()
            assert not reservation.try_resize(count)

    @invariant()
    def the_sum_is_held_and_never_over_the_limit(self) -> None:
        assert self.budget.used_bytes == sum(self.held.values()) <= 1000
        assert all(reservation.held_bytes == count for reservation, count in self.held.items())


TestRequests = Requests.TestCase
