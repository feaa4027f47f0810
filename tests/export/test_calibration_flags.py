"""Which images calibrate, and the bundle that comes of it."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pcae_export.calibration_flags import CalibrationFlags
from pcae_export.images import shuffle_rows
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from tests.support.exporting import bundled, fails


@pytest.mark.parametrize(
    ("flags", "available", "count"),
    [
        ({}, 599, 0),  # a third would be too few
        ({}, 600, 200),
        ({}, 10_000, 3333),
        ({}, 50_000, 5000),
        ({"calibration_images": 0}, 10_000, 0),
        ({"calibration_images": 200}, 201, 200),
        ({"calibration_images": 9000}, 10_000, 9000),
        ({"calibration_data": "others"}, 10_000, 0),
    ],
)
def test_how_many_images_of_eval_data_calibrate(
    flags: dict[str, Any], available: int, count: int
) -> None:
    assert CalibrationFlags(**flags).calibration_count(available) == count


@pytest.mark.parametrize(
    ("images", "message"),
    [(199, "too few to say how sure an answer is; give at least 200"), (300, "leaves none of 300")],
)
def test_numbers_that_cannot_be(images: int, message: str) -> None:
    with pytest.raises(PcaeError, match=message):
        CalibrationFlags(calibration_images=images).calibration_count(300)


@pytest.mark.parametrize("limit", [600, 601, 1000, 30_000])
def test_a_limit_is_on_the_images_that_report_accuracy(limit: int) -> None:
    flags = CalibrationFlags()
    available = flags.limit_with_calibration(limit)
    assert available - flags.calibration_count(available) >= limit


class Held:
    """What a training run held out: every third image."""

    def find(self, images: Any) -> list[int]:
        return list(range(0, len(images), 3))


@pytest.mark.parametrize(
    ("count", "held", "used"), [(900, None, 900), (900, Held(), 300), (6000, None, 5000)]
)
def test_of_the_trained_images_only_those_held_out_calibrate(
    count: int, held: Any, used: int, capsys: pytest.CaptureFixture[str]
) -> None:
    class Images(list[int]):
        name = "photos"

    rows = CalibrationFlags().calibration_rows(Images(range(count)), held)  # type: ignore[arg-type]
    assert len(rows) == used
    assert ("held out" in capsys.readouterr().err) == (held is not None)
    assert set(rows) <= set(range(0, count, 3) if held else range(count))
    assert rows == [row for row in shuffle_rows(count) if row in set(rows)]
    with pytest.raises(PcaeError, match="photos has only 100 images to calibrate on"):
        CalibrationFlags().calibration_rows(Images(range(100)), None)  # type: ignore[arg-type]


TIERS = ("--tier", "low=0.5", "--tier", "full=1.0", "--half", "none")


@pytest.mark.slow
def test_a_bundle_with_calibration(
    tiny: Callable[..., Any],
    write_images: Callable[..., Path],
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The images that calibrate are not those that report accuracy."""
    model = tiny(depth=2, reduction_points=(0,))
    checkpoints.save(model, tmp_path / "m")
    data = write_images(tmp_path / "data", list(model.labels), each=-(-240 // len(model.labels)))
    bundle = bundled(
        tmp_path / "m", tmp_path / "out", *TIERS, "--eval-data", data, "--calibration-images", 200
    )
    calibration, top1 = bundle.manifest.calibration, bundle.tiers[0].accuracy
    assert calibration is not None
    assert top1 is not None
    assert (calibration.n, calibration.right) == (200, "label")
    total = sum(1 for path in data.rglob("*") if path.is_file())
    assert top1.n == total - 200
    assert [(each.first, each.second) for each in calibration.second_looks] == [("low", "full")]
    assert bundle.manifest.schema_version == 3
    capsys.readouterr()
    argv = ("bundle", tmp_path / "m", tmp_path / "two", *TIERS, "--eval-data", data)
    line = fails(capsys, 1, *argv, "--calibration-images", 150)
    assert "--calibration-images 150 is too few" in line
