"""Steps of staircases are found, lines get none, and suggested tiers lie at the steps' edges."""

from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest

from pcae_export import keep_ratios
from pcae_export.keep_ratios import Floats
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.errors import BundleError

MACS = np.linspace(5e9, 17.5e9, 36)


@pytest.fixture(scope="module")
def demo() -> Bundle:
    return load_bundle(demo_path())


def timed(curve: Floats, noise: float, rounds: int, seed: int, spikes: float = 0.0) -> Floats:
    """Rounds [rounds, points] of a curve: noise, whole rounds that are slow, single slow runs."""
    draw = np.random.default_rng(seed)
    shape = (rounds, len(curve))
    runs: Floats = curve * (1 + noise * draw.standard_normal(shape))
    runs *= 1 + 0.2 * draw.random((rounds, 1))
    runs[draw.random(shape) < spikes] *= 2
    return runs


def staircase(width: int) -> Floats:
    """Seconds that rise after every `width` points."""
    step = np.arange(len(MACS)) // width
    seconds: Floats = 0.004 + 0.02 * (1 + step) / (1 + step.max())
    return seconds


@pytest.mark.parametrize("spikes", [0.0, 0.05], ids=["quiet", "spikes"])
@pytest.mark.parametrize(
    ("width", "noise", "rounds"), [(3, 0.001, 7), (3, 0.01, 15), (5, 0.02, 15), (18, 0.02, 7)]
)
def test_the_edges_of_a_staircase_are_found(
    width: int, noise: float, rounds: int, spikes: float
) -> None:
    curve, exactly = staircase(width), 0
    true = tuple(np.flatnonzero(np.diff(curve)).tolist())
    for seed in range(20):
        fitted = keep_ratios.fit_latency(timed(curve, noise, rounds, seed, spikes))
        exactly += keep_ratios.find_steps(MACS, *fitted) == true
    assert exactly >= 18


@pytest.mark.parametrize("spikes", [0.0, 0.05], ids=["quiet", "spikes"])
@pytest.mark.parametrize("rounds", [7, 30])
@pytest.mark.parametrize("noise", [0.0001, 0.01, 0.05])
@pytest.mark.parametrize(
    "curve",
    [MACS * 1e-12, 0.01 + MACS * 1e-12, MACS * 1e-12 + MACS**2 * 1e-22, np.full(36, 0.01)],
    ids=["line", "overhead", "bent", "flat"],
)
def test_no_step_is_made_up(curve: Floats, noise: float, rounds: int, spikes: float) -> None:
    found = [
        keep_ratios.find_steps(
            MACS, *keep_ratios.fit_latency(timed(curve, noise, rounds, seed, spikes))
        )
        for seed in range(20)
    ]
    assert sum(map(bool, found)) <= 1


def test_few_rounds_claim_nothing() -> None:
    seconds, noise = keep_ratios.fit_latency(
        timed(staircase(6), 0.0, keep_ratios.MIN_ROUNDS - 1, seed=0)
    )
    assert noise == float("inf")
    assert keep_ratios.find_steps(MACS, seconds, noise) == ()


def test_a_curve_never_falls_and_slow_rounds_do_not_bend_it() -> None:
    curve = np.array([1.0, 2.0, 1.9, 3.0])
    seconds, noise = keep_ratios.fit_latency(
        np.array([[1.0], [1.0], [5.0], [1.0], [1.0], [1.0], [3.0]]) * curve
    )
    assert seconds == pytest.approx([1.0, 1.95, 1.95, 3.0])
    assert noise == pytest.approx(0.0)


def test_points_on_a_line_are_evenly_spaced_in_log_latency() -> None:
    line = MACS * 1e-12
    chosen = keep_ratios.choose_points(line, (), 5)
    assert (chosen[0], chosen[-1]) == (0, 35)
    ratios = [line[b] / line[a] for a, b in pairwise(chosen)]
    assert ratios == pytest.approx([(17.5 / 5) ** 0.25] * 4, rel=0.06)


@pytest.mark.parametrize(("width", "count", "tiers"), [(3, 5, 5), (6, 4, 4), (12, 5, 3)])
def test_points_on_a_staircase_lie_at_its_edges(width: int, count: int, tiers: int) -> None:
    curve = staircase(width)
    edges = np.flatnonzero(np.diff(curve)).tolist()
    chosen = keep_ratios.choose_points(curve, edges, count)
    assert set(chosen) <= {*edges, 35}
    assert len(chosen) == tiers
    assert chosen[-1] == 35


def test_a_point_does_not_climb_a_slope_to_reach_an_edge() -> None:
    slope = np.concatenate([np.linspace(0.01, 0.03, 30), np.full(6, 0.04)])
    chosen = keep_ratios.choose_points(slope, (29,), 5)
    assert chosen[0] == 0  # the edge costs three times as much
    assert {29, 35} <= set(chosen)


def test_where_all_budgets_take_the_same_time_only_the_full_one_is_suggested() -> None:
    assert keep_ratios.choose_points(np.full(36, 0.01), (), 5) == (35,)
    assert keep_ratios.choose_points(MACS, (), 1) == (35,)


def test_a_sweep_spans_the_budgets(demo: Bundle) -> None:
    tiers = keep_ratios.sweep_tiers(demo, demo.tiers[-1], 0.3)
    assert (tiers[0].name, tiers[0].keep_ratio) == ("k30", 0.3)
    assert (tiers[-1].name, tiers[-1].keep_ratio) == ("full", 1.0)
    for tier in demo.tiers:  # what the exporter counted
        same = [swept for swept in tiers if swept.keep_ratio == tier.keep_ratio]
        assert [(s.token_counts, s.macs) for s in same] in ([], [(tier.token_counts, tier.macs)])
    assert all(a.macs < b.macs for a, b in pairwise(tiers))
    assert len({tier.token_counts for tier in tiers}) == len(tiers) == 36
    assert (
        keep_ratios.sweep_tiers(demo, demo.tiers[-1], 0.01)[0].token_counts[-1] >= 1
    )  # down to where patches are left
    assert [tier.name for tier in keep_ratios.sweep_tiers(demo, demo.tiers[-1], 1)] == ["full"]


def test_a_sweep_needs_the_models_sizes(demo: Bundle, tmp_path: Path) -> None:
    lost = Bundle(tmp_path, demo.manifest, demo.digest)
    with pytest.raises(BundleError, match=r"config\.json does not contain the model's sizes"):
        keep_ratios.sweep_tiers(lost, lost.tiers[-1], 0.3)


def test_suggestions_are_flags_of_the_exporter(demo: Bundle) -> None:
    tiers = keep_ratios.sweep_tiers(demo, demo.tiers[-1], 0.3)
    line = 1e-9 * np.array([tier.macs for tier in tiers], float)
    five = keep_ratios.suggest_tiers(tiers, timed(line, 0.001, 9, seed=0), 5)
    assert five.steps == ()
    assert five.tiers[0].flag == "--tier fast=0.3"
    assert five.tiers[-1].flag == "--tier full=1"
    assert [tier.name for tier in five.tiers] == ["fast", "brisk", "balanced", "careful", "full"]
    three = keep_ratios.suggest_tiers(tiers, timed(line, 0.001, 9, seed=0), 3)
    assert [tier.name for tier in three.tiers][0::2] == ["k30", "full"]

    stairs = 0.01 + 0.01 * (np.arange(len(tiers)) // 9).astype(float)
    found = keep_ratios.suggest_tiers(tiers, timed(stairs, 0.001, 9, seed=0), 3)
    assert found.steps == (8, 17, 26)
    assert [tier.below_step for tier in found.tiers] == [True, True, False]
    assert found.tiers[0].keep_ratio == tiers[8].keep_ratio
    assert found.tiers[0].seconds == pytest.approx(0.01, rel=0.15)
