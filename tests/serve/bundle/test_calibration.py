"""Calibration in a manifest: what it must be, and what a server makes of it."""

from copy import deepcopy
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.calibration import Calibration
from pcae_serve.bundle.reader import load_bundle
from pcae_serve.errors import BundleError
from pcae_serve.runtime.tiers import tier_table
from tests.support.bundles import write_bundle

KNOWN: dict[str, Any] = {
    "n": 1000,
    "data_set": "toy",
    "right": "label",
    "tiers": {
        name: {"temperature": 0.8, "margins": [0.2, 0.6, 1.0], "shares": [0.2, 0.3, 0.5]}
        for name in ("fast", "balanced", "full")
    },
    "second_looks": [
        {
            "first": "fast",
            "second": "full",
            "gains": [0.3, 0.1, -0.02],
            "lows": [0.2, 0.0, -0.1],
            "highs": [0.4, 0.2, 0.1],
        }
    ],
}


def changed(path: tuple[Any, ...], value: Any) -> dict[str, Any]:
    known = deepcopy(KNOWN)
    part = known
    for key in path[:-1]:
        part = part[key]
    part[path[-1]] = value
    return known


@pytest.mark.parametrize(
    ("known", "message"),
    [
        (changed(("tiers", "fast", "margins"), [0.6, 0.2, 1.0]), "ascending order"),
        (changed(("tiers", "fast", "shares"), [0.5]), "same length"),
        (changed(("tiers", "fast", "temperature"), 0), "greater than 0"),
        (changed(("second_looks", 0, "gains"), [0.1, 0.3, 0]), "must not rise"),
        (changed(("second_looks", 0, "gains"), [0.3]), "same length"),
        (changed(("second_looks", 0, "second"), "best"), "no such tier"),
        (changed(("second_looks", 0, "first"), "full"), "must cost more"),
        (changed(("tiers",), {"full": KNOWN["tiers"]["full"]}), "no such tier"),
        (changed(("second_looks",), []) | {"tiers": {}}, "every tier"),
    ],
)
def test_a_calibration_that_contradicts_itself_is_refused(
    tmp_path: Path, known: dict[str, Any], message: str
) -> None:
    root = write_bundle(tmp_path / "b", schema_version=3, calibration=known)
    with pytest.raises(BundleError, match=message):
        load_bundle(root)


def test_a_tiers_temperature_is_known_and_1_without_calibration(tmp_path: Path) -> None:
    plain = load_bundle(write_bundle(tmp_path / "plain"))
    calibrated = load_bundle(write_bundle(tmp_path / "b", schema_version=3, calibration=KNOWN))
    assert plain.temperature(plain.tiers[0]) == 1.0
    assert calibrated.temperature(calibrated.tiers[0]) == 0.8


@pytest.mark.parametrize(
    ("first", "factor"), [(0.3, 1.0), (0.5, 0.1 / 0.12), (2.0, 0.5)], ids=["as is", "less", "half"]
)
def test_gains_add_up_to_no_more_than_the_tiers_differ_by(
    tmp_path: Path, first: float, factor: float
) -> None:
    """With 0.3, all images gain 0.2 * 0.3 + 0.3 * 0.1 - 0.5 * 0.02 = 0.08; tiers differ by 0.1."""
    known = changed(("second_looks", 0, "gains"), [min(first, 1.0), 0.1, -0.02])
    bundle = load_bundle(write_bundle(tmp_path / "b", schema_version=3, calibration=known))
    [looks] = tier_table(bundle.tiers, bundle.manifest.calibration).escalations
    assert (looks.first, looks.second) == (0, 2)
    assert [(step.margin, step.share) for step in looks.steps] == [(0.2, 0.2), (0.6, 0.3)]
    assert [step.gain for step in looks.steps] == pytest.approx(
        [factor * min(first, 1.0), factor * 0.1]
    )
    assert tier_table(bundle.tiers).escalations == ()


def test_temperatures_by_tier() -> None:
    known = Calibration.model_validate(KNOWN)
    assert known.temperatures == {"fast": 0.8, "balanced": 0.8, "full": 0.8}
