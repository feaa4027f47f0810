"""Platforms of simulations: built in, from files and from measured profiles."""

import json
from pathlib import Path

import numpy as np
import pytest

from pcae_serve.bundle.reader import load_bundle
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import StartError
from pcae_serve.loadtest import platforms
from pcae_serve.runtime import latency_profile
from tests.support.odd_files import JSON


@pytest.mark.parametrize("name", platforms.NAMES)
def test_the_built_in_platforms_span_five_points_of_accuracy(name: str) -> None:
    platform = platforms.read(name)
    accuracy = platform.tier_table.accuracy
    assert list(accuracy) == sorted(accuracy)
    assert accuracy[-1] - accuracy[0] >= 0.05
    ones = [tier[1].p50 for tier in platform.seconds(4)]
    assert ones == sorted(ones)
    assert platform.capacity_per_s["mixed"] > 0
    assert platform.source


def test_latencies_beyond_the_largest_batch_are_extrapolated() -> None:
    points = ({"batch": 1, "p50_s": 1.0, "p99_s": 1.1}, {"batch": 2, "p50_s": 1.5, "p99_s": 1.65})
    tier = {"name": "one", "accuracy": 0.5, "points": points}
    platform = platforms.Platform.model_validate({"source": "toy", "tiers": [tier]})
    [seconds] = platform.seconds(4)
    assert [seconds[batch].p50 for batch in (1, 2, 4)] == pytest.approx([1, 1.5, 2.5])
    assert seconds[4].p99 == pytest.approx(2.75)


def test_a_measured_profile_takes_its_accuracies_from_the_bundle(
    bundle_dir: Path, tmp_path: Path
) -> None:
    bundle = load_bundle(bundle_dir)
    rounds = {1: np.full((3, 3), 0.01), 2: np.full((3, 3), 0.015)}
    measured = latency_profile.summarise(bundle, SimulatedEngine(bundle), rounds)
    file = tmp_path / "profile.json"
    file.write_text(json.dumps({"profile": measured.model_dump(mode="json"), "rows": []}))
    platform = platforms.read(str(file), bundle_dir)
    assert platform.tier_table.accuracy == (0.80, 0.85, 0.90)
    assert platform.full_s == pytest.approx(0.01)
    with pytest.raises(StartError, match="--bundle"):
        platforms.read(str(file))  # the demo has other tiers


def test_a_file_that_is_not_a_profile(tmp_path: Path) -> None:
    (tmp_path / "x.json").write_text('{"tiers": []}')
    with pytest.raises(StartError, match="is not a profile"):
        platforms.read(str(tmp_path / "x.json"))


@pytest.mark.parametrize("case", JSON)
def test_json_beyond_the_bounds_is_refused(tmp_path: Path, case: str) -> None:
    content, word = JSON[case]
    (tmp_path / "x.json").write_bytes(content)
    with pytest.raises(StartError, match=word):
        platforms.read(str(tmp_path / "x.json"))


@pytest.mark.parametrize("changes", [{"batch": 10**9}, {"p50_s": 1e300}, {"p99_s": 0.0}])
def test_impossible_latencies_are_refused(tmp_path: Path, changes: dict[str, float]) -> None:
    point = {"batch": 1, "p50_s": 1.0, "p99_s": 1.1} | changes
    tier = {"name": "one", "accuracy": 0.5, "points": [point]}
    (tmp_path / "x.json").write_text(json.dumps({"source": "toy", "tiers": [tier]}))
    with pytest.raises(StartError, match=r"tiers\.0\.points\.0"):
        platforms.read(str(tmp_path / "x.json"))
