import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pcae_serve.scheduling.request_queue import Queue, Request, due

ALL = (0, 1, 2)


def test_requests_stand_by_deadline_not_by_arrival_and_ties_by_age() -> None:
    queue = Queue()
    for id_, deadline_s in ((1, 9.0), (2, 3.0), (4, 5.0), (3, 5.0)):
        queue.add(Request(id_, 0.0, deadline_s, ALL))
    assert [request.id for request in queue] == [2, 3, 4, 1]
    assert [request.id for request in queue.by_deadline] == [2, 3, 4, 1]
    assert len(queue) == 4
    assert 3 in queue
    assert 7 not in queue


def test_views_tell_who_allows_a_tier_and_whose_cheapest_it_is() -> None:
    queue = Queue()
    for id_, tiers in ((1, ALL), (2, (0,)), (3, (1, 2)), (4, (2,))):
        queue.add(Request(id_, 0.0, 9.0 - id_, tiers))
    assert queue.tiers == [0, 1, 2]
    assert [r.id for r in queue.allowing(0)] == [2, 1]
    assert [r.id for r in queue.allowing(2)] == [4, 3, 1]
    assert {t: [r.id for r in rs] for t, rs in queue.by_cheapest.items()} == {
        0: [2, 1],
        1: [3],
        2: [4],
    }
    queue.remove(2)
    queue.remove(1)
    assert queue.tiers == [1, 2]
    assert not queue.allowing(0)
    assert not queue.allowing(7)


def test_taking_out_gives_the_request_once() -> None:
    queue = Queue()
    queue.add(request := Request(1, 0.0, 1.0, ALL))
    assert queue.remove(1) is request
    assert queue.remove(1) is None
    assert not queue


@pytest.mark.parametrize(("by_s", "count"), [(0.5, 0), (1.0, 2), (1.5, 2), (9.0, 3)])
def test_due_counts_deadlines_at_a_time_or_before(by_s: float, count: int) -> None:
    assert due([Request(i, 0.0, s, ALL) for i, s in enumerate((1.0, 1.0, 2.0))], by_s) == count


tiers = st.sampled_from([ALL, (0,), (1,), (1, 2), (0, 2)])
steps = st.lists(st.tuples(st.booleans(), st.integers(0, 9), st.integers(0, 3), tiers), max_size=60)


@settings(max_examples=60, deadline=None, derandomize=True, database=None)
@given(steps)
def test_every_view_is_what_sorting_would_give(
    steps: list[tuple[bool, int, int, tuple[int, ...]]],
) -> None:
    queue, model = Queue(), dict[int, Request]()
    for adds, id_, deadline_s, allowed in steps:
        if adds and id_ not in model:
            model[id_] = Request(id_, 0.0, float(deadline_s), allowed)
            queue.add(model[id_])
        elif not adds:
            assert queue.remove(id_) == model.pop(id_, None)
    wanted = sorted(model.values(), key=lambda r: (r.deadline_s, r.id))
    assert list(queue) == wanted
    for tier in ALL:
        assert list(queue.allowing(tier)) == [r for r in wanted if tier in r.tiers]
        assert queue.by_cheapest.get(tier, []) == [r for r in wanted if r.tiers[0] == tier]
