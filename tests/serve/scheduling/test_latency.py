import pytest

from pcae_serve.scheduling.latency import HALF_LIFE_S, MAX_TAIL, Latency, Seconds


def latency(*tiers: dict[int, float], tail: float = 1.0, most: int = 32) -> Latency:
    """Return a model of tiers with median seconds by batch size; p99 is `tail` times the median."""
    return Latency([{b: Seconds(s, tail * s) for b, s in tier.items()} for tier in tiers], most)


def p50(model: Latency, tier: int, batch: int, now_s: float = 0.0) -> float:
    return model.forecast(now_s).p50(tier, batch)


def test_latencies_are_interpolated_and_extrapolated_linearly() -> None:
    model = latency({1: 0.012, 4: 0.018, 8: 0.026})  # 10 ms and 2 ms per image
    for batch in (1, 2, 3, 4, 6, 8, 16, 32):
        assert p50(model, 0, batch) == pytest.approx(0.010 + 0.002 * batch)


def test_steps_are_kept_as_measured() -> None:
    model = latency({1: 0.010, 8: 0.010, 9: 0.020, 16: 0.020}, most=16)
    steps = [p50(model, 0, batch) for batch in (1, 5, 8, 9, 12, 16)]
    assert steps == pytest.approx([0.010, 0.010, 0.010, 0.020, 0.020, 0.020])


@pytest.mark.parametrize(
    "points", [{1: 0.02}, {4: 0.02}, {1: 0.02, 4: 0.07}, {1: 0.01, 8: 0.09}, {1: 0.05, 8: 0.04}]
)
def test_latencies_are_positive_and_never_fall_with_the_batch_size(
    points: dict[int, float],
) -> None:
    model = latency(points)
    seconds = [p50(model, 0, batch) for batch in range(1, 33)]
    assert seconds == sorted(seconds)
    assert seconds[0] > 0


def test_points_beyond_the_largest_batch() -> None:
    model = latency({1: 0.012, 8: 0.026}, most=4)
    assert p50(model, 0, 4) == pytest.approx(0.018)


def test_a_device_that_slows_to_half_is_followed_within_20_batches() -> None:
    model = latency({1: 0.010, 8: 0.080}, {1: 0.020, 8: 0.160})
    for i in range(20):
        model.observe(tier=0, batch=4, seconds=0.080, now_s=0.1 * i)
    assert p50(model, 0, 1, now_s=2.0) == pytest.approx(0.020, rel=0.05)
    assert p50(model, 1, 1, now_s=2.0) == pytest.approx(0.040, rel=0.25)  # same machine


def test_a_wrongly_measured_tier_is_corrected_without_the_others() -> None:
    model = latency({1: 0.010}, {1: 0.020})
    for i in range(200):
        model.observe(0, 1, 0.010, 0.01 * i)
        model.observe(1, 1, 0.030, 0.01 * i)
    assert p50(model, 0, 1, now_s=2.0) == pytest.approx(0.010, rel=0.1)
    assert p50(model, 1, 1, now_s=2.0) == pytest.approx(0.030, rel=0.1)


def test_a_slowdown_decays_while_nothing_runs() -> None:
    model = latency({1: 0.010})
    for _ in range(50):
        model.observe(0, 1, seconds=0.030, now_s=0.0)
    assert p50(model, 0, 1, now_s=0.0) == pytest.approx(0.030, rel=0.01)
    assert 0.010 < p50(model, 0, 1, now_s=HALF_LIFE_S) < 0.025
    assert p50(model, 0, 1, now_s=1000.0) == pytest.approx(0.010, rel=0.01)


def test_a_speed_up_does_not_decay() -> None:
    model = latency({1: 0.030})
    for _ in range(50):
        model.observe(0, 1, seconds=0.010, now_s=0.0)
    assert p50(model, 0, 1, now_s=1000.0) == pytest.approx(0.010, rel=0.01)


def test_the_effect_of_one_outlier_is_limited() -> None:
    model = latency({1: 0.010})
    model.observe(0, 1, seconds=100.0, now_s=0.0)
    assert p50(model, 0, 1) < 0.045


def test_p99_has_the_measured_spread_up_to_a_limit() -> None:
    forecast = latency({1: 0.012, 8: 0.026}, tail=1.5).forecast(0.0)
    assert forecast.p99(0, 2) == pytest.approx(1.5 * forecast.p50(0, 2))
    assert latency({1: 0.012}, tail=9.0).idle(0) == pytest.approx(MAX_TAIL * 0.012)


def test_p99_follows_the_observed_spread() -> None:
    model = latency({1: 0.010}, tail=1.0)
    for i in range(4000):  # one batch in 20 takes twice as long
        model.observe(0, 1, 0.020 if i % 20 == 0 else 0.010, 0.01 * i)
    learnt = model.forecast(40.0)
    assert learnt.p99(0, 1) > 0.017
    for i in range(4000):  # now none does
        model.observe(0, 1, 0.010, 40 + 0.01 * i)
    assert model.forecast(80.0).p99(0, 1) == pytest.approx(0.010, rel=0.05)


def test_the_idle_latency_does_not_follow_observations() -> None:
    model = latency({1: 0.010}, tail=1.2)
    for _ in range(30):
        model.observe(0, 1, 0.100, 0.0)
    assert model.idle(0) == pytest.approx(0.012)


def test_largest_batch() -> None:
    forecast = latency({1: 0.012, 8: 0.026}, tail=1.5).forecast(0.0)
    for within_s in (0.001, 0.0181, 0.0211, 0.03, 0.1, 9.0):
        largest = forecast.largest_batch(0, within_s, 20)
        fits = [b for b in range(1, 21) if forecast.p99(0, b) <= within_s]
        assert largest == len(fits)


def test_a_batch_is_efficient_until_its_images_cost_more() -> None:
    """With a cache that 8 images fill, the cost per image rises by a fifth up to 32."""
    cached = latency({1: 0.010, 4: 0.038, 8: 0.076, 32: 0.365}).forecast(0.0)
    assert 8 < cached.efficient_batch(0) < 16
    assert cached.useful_batch(0) == 1
    falling = latency({1: 0.010, 32: 0.040}).forecast(0.0)
    assert falling.efficient_batch(0) == len(falling._median[0]) - 1


def test_useful_batch_depends_on_the_overhead_per_batch() -> None:
    assert latency({1: 0.010, 8: 0.080}).forecast(0.0).useful_batch(0) == 1  # a CPU
    gpu = latency({1: 0.0025, 8: 0.006}, most=200).forecast(0.0)  # 2 ms and 0.5 ms per image
    cost = [gpu.p50(0, b) / b for b in (gpu.useful_batch(0), 200)]
    assert cost[0] <= 1.1 * cost[1]
    assert gpu.p50(0, gpu.useful_batch(0) - 1) / (gpu.useful_batch(0) - 1) > 1.1 * cost[1]
