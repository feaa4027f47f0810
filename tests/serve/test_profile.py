from pathlib import Path

import pytest

from pcae_serve import profile
from pcae_serve.bundle import Bundle, Tier
from pcae_serve.engines.simulated import SimulatedEngine


class Clock:
    """Time that passes only where the engine sleeps."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.runs = 0

    def __call__(self) -> float:
        return self.now_s

    def sleep(self, seconds: float) -> None:
        self.now_s += seconds
        self.runs += 1


def seconds(tier: Tier, batch: int) -> float:
    return 0.001 + batch * tier.macs * 1e-6  # 1, 2, 4 ms an image


def test_what_is_measured_is_what_the_engine_takes(small_bundle: Bundle) -> None:
    clock = Clock()
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    measured = profile.measure(small_bundle, engine, limit_s=10.0, clock=clock)
    latency = measured.latency()
    for i, tier in enumerate(small_bundle.tiers):
        assert [point.batch for point in measured.points[tier.name]] == list(profile.BATCHES)
        for batch in (1, 3, 16):
            assert latency.expected(i, batch, 0.0) == pytest.approx(seconds(tier, batch))


@pytest.mark.parametrize("limit_s", [0.001, 0.1, 1.0])
def test_measuring_ends_in_time_and_has_every_tier(small_bundle: Bundle, limit_s: float) -> None:
    clock = Clock()
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    measured = profile.measure(small_bundle, engine, limit_s, clock=clock)
    once_s = sum(seconds(tier, 1) for tier in small_bundle.tiers)
    assert clock.now_s <= 2 * once_s + limit_s  # warm-up and a first batch of one always run
    assert all(points for points in measured.points.values())
    assert measured.latency().expected(0, 1, 0.0) == pytest.approx(0.002, rel=0.3)


def test_a_profile_is_read_from_the_cache(small_bundle: Bundle, tmp_path: Path) -> None:
    clock = Clock()
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    first = profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    runs = clock.runs
    assert profile.load(small_bundle, engine, tmp_path, limit_s=0.05) == first
    assert clock.runs == runs


@pytest.mark.parametrize("damage", ["", "{}", "not json"])
def test_a_damaged_cache_is_replaced(small_bundle: Bundle, tmp_path: Path, damage: str) -> None:
    engine = SimulatedEngine(small_bundle, seconds=seconds)
    first = profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    [path] = (tmp_path / "profiles").iterdir()
    path.write_text(damage)
    again = profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    assert again.key == first.key
    assert path.read_text() == again.model_dump_json(indent=1)


def test_another_device_has_another_profile(small_bundle: Bundle, tmp_path: Path) -> None:
    for device in ("cpu", "cuda:0"):
        engine = SimulatedEngine(small_bundle, device, seconds=seconds)
        profile.load(small_bundle, engine, tmp_path, limit_s=0.01)
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    small_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine = SimulatedEngine(small_bundle, seconds=seconds)
    assert profile.load(small_bundle, engine, tmp_path / "file", limit_s=0.01).points
    assert "cannot keep" in caplog.text
