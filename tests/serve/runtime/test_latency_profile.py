import logging
from pathlib import Path

import numpy as np
import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import nvidia
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.runtime import latency_profile
from pcae_serve.runtime.latency_profile import Profile
from pcae_serve.runtime.measured_profile import P99_FROM_P95


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


class Drifting(SimulatedEngine):
    """Slower with every run, as a machine that heats up; notes what it ran."""

    def __init__(self, bundle: Bundle, clock: Clock) -> None:
        super().__init__(bundle, seconds=self.drifting, sleep=clock.sleep)
        self.clock = clock
        self.ran: list[tuple[str, int]] = []

    def drifting(self, tier: Tier, batch: int) -> float:
        return seconds(tier, batch) * (1 + 0.01 * self.clock.runs)

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        self.ran.append((tier.name, len(pixels)))
        return super().run(tier, pixels)


def seconds(tier: Tier, batch: int) -> float:
    return 0.001 + batch * tier.macs * 1e-6  # 1, 2, 4 ms an image


def measure(bundle: Bundle, clock: Clock, limit_s: float) -> Profile:
    """A short profile, as the server takes it."""
    engine = SimulatedEngine(bundle, seconds=seconds, sleep=clock.sleep)
    turns = latency_profile.take_turns(
        engine, bundle.tiers, latency_profile.BATCHES, bundle.image_size, limit_s, clock=clock
    )
    return latency_profile.summarise(bundle, engine, turns)


def test_what_is_measured_is_what_the_engine_takes(small_bundle: Bundle) -> None:
    measured = measure(small_bundle, Clock(), limit_s=10.0)
    forecast = measured.latency(16).forecast(0.0)
    for i, tier in enumerate(small_bundle.tiers):
        assert [point.batch for point in measured.points[tier.name]] == list(
            latency_profile.BATCHES
        )
        for batch in (1, 3, 16):
            assert forecast.p50(i, batch) == pytest.approx(seconds(tier, batch))


@pytest.mark.parametrize("limit_s", [0.001, 0.1, 1.0])
def test_measuring_ends_in_time_and_has_every_tier(small_bundle: Bundle, limit_s: float) -> None:
    clock = Clock()
    measured = measure(small_bundle, clock, limit_s)
    once_s = sum(seconds(tier, 1) for tier in small_bundle.tiers)
    assert clock.now_s <= 2 * once_s + limit_s  # warm-up and a first batch of one always run
    assert all(points for points in measured.points.values())
    assert measured.latency().forecast(0.0).p50(0, 1) == pytest.approx(0.002, rel=0.3)


def test_tiers_take_turns_in_an_order_that_changes(small_bundle: Bundle) -> None:
    engine = Drifting(small_bundle, clock := Clock())
    turns = latency_profile.take_turns(
        engine, small_bundle.tiers, (2, 1), 8, 100.0, max_rounds=10, clock=clock
    )
    rounds = [engine.ran[i : i + 3] for i in range(0, len(engine.ran), 3)]
    assert len(rounds) == 2 * 11  # the first at either batch size warms up
    for number, each in enumerate(rounds):
        batch = 1 + number % 2
        assert sorted(each) == sorted((tier.name, batch) for tier in small_bundle.tiers)
    assert len({tuple(each) for each in rounds[::2]}) > 1
    assert {batch: s.shape for batch, s in turns.items()} == {1: (10, 3), 2: (10, 3)}
    fast, full = turns[2][:, 0], turns[2][:, 2]  # columns are tiers, whatever their order was
    assert np.median(full / fast) == pytest.approx(9 / 3, rel=0.05)  # the drift falls on both


def test_the_first_round_warms_up(small_bundle: Bundle) -> None:
    clock = Clock()

    def cold_first(tier: Tier, batch: int) -> float:
        return 5.0 if clock.runs < len(small_bundle.tiers) else 0.01

    engine = SimulatedEngine(small_bundle, seconds=cold_first, sleep=clock.sleep)
    turns = latency_profile.take_turns(engine, small_bundle.tiers, (1,), 8, 20.0, clock=clock)
    assert turns[1].max() == pytest.approx(0.01)


def test_progress_is_told_as_time_passes(small_bundle: Bundle) -> None:
    told: list[float] = []
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=(clock := Clock()).sleep)
    latency_profile.take_turns(
        engine, small_bundle.tiers, (1,), 8, 0.1, clock=clock, progress=told.append
    )
    assert told == sorted(told)
    assert len(told) == clock.runs
    assert told[-1] == clock.now_s


@pytest.mark.parametrize(
    ("runs", "p95", "p99"),
    [(1, None, None), (19, None, None), (20, 19.05, None), (99, 94.1, None), (101, 96.0, 100.0)],
)
def test_a_quantile_needs_runs_beyond_it(runs: int, p95: float | None, p99: float | None) -> None:
    point = latency_profile.point(4, np.arange(1.0, runs + 1))
    assert (point.batch, point.runs, point.p50_s) == (4, runs, (runs + 1) / 2)
    assert point.p95_s == (None if p95 is None else pytest.approx(p95))
    assert point.p99_s == (None if p99 is None else pytest.approx(p99))


def test_the_spread_is_that_of_all_runs_together(small_bundle: Bundle) -> None:
    runs = np.ones((10, 3))
    runs[0] = 1.5  # one round in ten is slower: 5 % of runs lie beyond
    engine = SimulatedEngine(small_bundle)
    assert latency_profile.summarise(small_bundle, engine, {1: runs, 8: 8 * runs}).spread == 1.5
    calm = latency_profile.summarise(small_bundle, engine, {1: np.ones((1, 3))})
    [point] = calm.seconds()[0].values()
    assert point.p50 == 1.0
    assert point.p99 == pytest.approx(1.05**P99_FROM_P95)  # the lower bound


def test_a_profile_says_where_it_was_taken(small_bundle: Bundle) -> None:
    origin = measure(small_bundle, Clock(), 0.1).origin
    assert origin.cores >= 1
    assert origin.memory_gb > 0
    assert {"pcae-serve", "python", "simulated"} == set(origin.versions)
    assert origin.date.tzinfo is not None


def test_a_profile_is_read_from_the_cache(
    small_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO)
    clock = Clock()
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    first = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05, clock=clock)
    runs = clock.runs
    assert latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05, clock=clock) == first
    assert clock.runs == runs + 2 * len(small_bundle.tiers)  # checked, not measured again
    assert [record.getMessage() for record in caplog.records] == [
        f"measuring latencies of 3 tiers on cpu, up to 0.05 s; cached afterwards in {tmp_path}"
    ]


@pytest.mark.parametrize(("times", "anew"), [(1.4, False), (0.7, False), (1.6, True), (0.6, True)])
def test_a_profile_that_no_longer_holds_is_replaced(
    small_bundle: Bundle,
    tmp_path: Path,
    caplog: pytest.LogCaptureFixture,
    times: float,
    anew: bool,
) -> None:
    clock = Clock()
    before = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    after = SimulatedEngine(
        small_bundle, seconds=lambda tier, batch: times * seconds(tier, batch), sleep=clock.sleep
    )
    old = latency_profile.load(small_bundle, before, tmp_path, limit_s=0.1, clock=clock)
    new = latency_profile.load(small_bundle, after, tmp_path, limit_s=0.1, clock=clock)
    assert (new != old) == anew
    warnings = [record.getMessage().partition(" is out of ")[2] for record in caplog.records]
    assert warnings == anew * [f"date (batches take {times:.2f} times as long)"]
    if anew:
        assert new.points["fast"][0].p50_s == pytest.approx(times * 0.002)
    assert latency_profile.read(small_bundle, after, tmp_path) == new


def test_a_slow_moment_is_no_reason_to_doubt_a_profile(
    small_bundle: Bundle, tmp_path: Path
) -> None:
    clock = Clock()
    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=clock.sleep)
    first = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.1, clock=clock)
    runs = clock.runs

    def cold_or_crowded(tier: Tier, batch: int) -> float:
        """All are slow in their first run, and one tier stays so."""
        slow = clock.runs < runs + 3 or tier.name == "full"
        return seconds(tier, batch) * (10 if slow else 1)

    engine = SimulatedEngine(small_bundle, seconds=cold_or_crowded, sleep=clock.sleep)
    assert latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.1, clock=clock) == first


def test_a_short_profile_never_replaces_one_that_was_made_meanwhile(
    small_bundle: Bundle, tmp_path: Path
) -> None:
    thorough = measure(small_bundle, Clock(), 100.0)
    saved: list[Path] = []

    def sleep(duration_s: float) -> None:  # another process ends while this one measures
        if not saved:
            saved.append(latency_profile.write(thorough, tmp_path))

    engine = SimulatedEngine(small_bundle, seconds=seconds, sleep=sleep)
    assert latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05) == thorough
    assert latency_profile.read(small_bundle, engine, tmp_path) == thorough
    assert list((tmp_path / "profiles").iterdir()) == saved  # and no draft is left


@pytest.mark.parametrize("damage", ["", "{}", "not json"])
def test_a_damaged_cache_is_replaced(small_bundle: Bundle, tmp_path: Path, damage: str) -> None:
    engine = SimulatedEngine(small_bundle, seconds=seconds)
    first = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    [path] = (tmp_path / "profiles").iterdir()
    path.write_text(damage)
    again = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    assert again.key == first.key
    assert path.read_text() == again.model_dump_json(indent=1)


@pytest.mark.parametrize(
    ("old", "new", "words"),
    [
        ('"p50_s": ', '"p50_s": -', "cannot take"),
        ('"p50_s": ', '"p50_s": 1e300, "was": ', "Extra inputs"),
        ('"spread": ', '"spread": -', "spread"),
        ('"batch": 1', '"batch": 100000', "cannot take"),
        ('"cores": ', '"cores": NaN, "was": ', "NaN"),
        ('"runs": ', '"runs": -', "cannot take"),
        ('"bundle": "', '"bundle": "0', "another bundle"),
    ],
)
def test_impossible_numbers_are_measured_again_with_one_line(
    small_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture,
    old: str, new: str, words: str,
) -> None:  # fmt: skip
    engine = SimulatedEngine(small_bundle, seconds=seconds)
    first = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    [path] = (tmp_path / "profiles").iterdir()
    text = path.read_text()
    assert old in text
    path.write_text(text.replace(old, new))
    caplog.clear()
    again = latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.05)
    assert set(again.points) == set(first.points)
    assert latency_profile.read(small_bundle, engine, tmp_path) == again
    [line] = [record.message for record in caplog.records if record.levelname == "WARNING"]
    assert words in line
    assert str(path) in line


def test_another_device_has_another_profile(small_bundle: Bundle, tmp_path: Path) -> None:
    for device in ("cpu", "cuda:0"):
        engine = SimulatedEngine(small_bundle, device, seconds=seconds)
        latency_profile.load(small_bundle, engine, tmp_path, limit_s=0.01)
    assert len(list((tmp_path / "profiles").iterdir())) == 2


def test_another_gpu_has_another_profile(
    small_bundle: Bundle, monkeypatch: pytest.MonkeyPatch
) -> None:
    keys = []
    for gpus in (["NVIDIA L4"], ["NVIDIA H200"], []):
        monkeypatch.setattr(nvidia, "list_gpus", lambda gpus=gpus: gpus)
        keys.append(latency_profile.key(small_bundle, SimulatedEngine(small_bundle, "cuda:0")))
    assert [key["device"] for key in keys] == ["cuda:0 NVIDIA L4", "cuda:0 NVIDIA H200", "cuda:0"]
    assert latency_profile.key(small_bundle, SimulatedEngine(small_bundle))["device"] == "cpu"
    monkeypatch.setattr(nvidia, "list_gpus", lambda: ["NVIDIA L4", "NVIDIA H200"])
    engine = SimulatedEngine(small_bundle, "cuda:1 (NVIDIA H200)")  # as engines on GPUs say it
    assert latency_profile.key(small_bundle, engine)["device"] == "cuda:1 NVIDIA H200"


def test_a_cache_that_cannot_be_written_is_no_obstacle(
    small_bundle: Bundle, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    (tmp_path / "file").write_text("")
    engine = SimulatedEngine(small_bundle, seconds=seconds)
    assert latency_profile.load(small_bundle, engine, tmp_path / "file", limit_s=0.01).points
    assert "cannot cache" in caplog.text
