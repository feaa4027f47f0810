import pytest

from pcae_serve.latency import CORRECTION_HALF_LIFE_S, Latency, Line


def test_a_line_goes_through_exact_points() -> None:
    line = Line.through({1: 0.012, 4: 0.018, 8: 0.026})  # 10 ms + 2 ms an image
    assert line.overhead_s == pytest.approx(0.010)
    assert line.image_s == pytest.approx(0.002)
    assert line.at(32) == pytest.approx(0.074)


@pytest.mark.parametrize(
    "points", [{1: 0.02}, {1: 0.02, 4: 0.07, 8: 0.10}, {1: 0.01, 8: 0.09}, {1: 0.05, 8: 0.04}]
)
def test_neither_part_of_a_line_is_negative(points: dict[int, float]) -> None:
    line = Line.through(points)
    assert line.overhead_s >= 0
    assert line.image_s > 0


def test_a_batch_that_costs_the_same_at_any_size_is_all_overhead() -> None:
    line = Line.through({1: 0.02, 4: 0.02, 8: 0.019})
    assert line.at(1) == pytest.approx(0.02, rel=0.05)
    assert line.at(8) == pytest.approx(0.02, rel=0.05)


def test_a_machine_that_slows_to_half_is_followed_within_20_batches() -> None:
    latency = Latency([Line(0.0, 0.010), Line(0.0, 0.020)], spread=1.0)
    for i in range(20):
        latency.observe(tier=0, batch=4, seconds=0.080, now_s=0.1 * i)
    assert latency.expected(0, 1, now_s=2.0) == pytest.approx(0.020, rel=0.05)
    assert latency.expected(1, 1, now_s=2.0) == pytest.approx(0.040, rel=0.05)  # one machine


def test_the_correction_fades_when_nothing_runs() -> None:
    latency = Latency([Line(0.0, 0.010)])
    for _ in range(50):
        latency.observe(0, 1, seconds=0.030, now_s=0.0)
    assert latency.expected(0, 1, now_s=0.0) == pytest.approx(0.030, rel=0.01)
    assert latency.expected(0, 1, now_s=CORRECTION_HALF_LIFE_S) == pytest.approx(0.020, rel=0.01)
    assert latency.expected(0, 1, now_s=1000.0) == pytest.approx(0.010, rel=0.01)


def test_a_machine_faster_than_its_profile_stays_believed() -> None:
    latency = Latency([Line(0.0, 0.030)])
    for _ in range(50):
        latency.observe(0, 1, seconds=0.010, now_s=0.0)
    assert latency.expected(0, 1, now_s=1000.0) == pytest.approx(0.010, rel=0.01)


def test_one_absurd_batch_does_not_derail_the_prediction() -> None:
    latency = Latency([Line(0.0, 0.010)])
    latency.observe(0, 1, seconds=100.0, now_s=0.0)
    assert latency.expected(0, 1, now_s=0.0) < 0.030


def test_a_promise_leaves_room_for_the_spread() -> None:
    latency = Latency([Line(0.002, 0.010)], spread=1.5)
    assert latency.promised(0, 2, 0.0) == pytest.approx(1.5 * latency.expected(0, 2, 0.0))


def test_a_batch_is_worth_filling_only_where_there_is_overhead_to_share() -> None:
    assert Latency([Line(0.0, 0.010)]).useful_batch(0) == 1  # a CPU: each image costs the same
    assert Latency([Line(0.002, 0.0005)]).useful_batch(0) == 40  # a GPU
