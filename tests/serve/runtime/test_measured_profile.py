import json
import os
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.runtime.measured_profile import read_profile
from tests.support.odd_files import JSON

ORIGIN: dict[str, Any] = {
    "date": "2026-11-26T00:00:00Z", "processor": "x", "gpu": None, "cores": 2, "memory_gb": 8.0,
    "threads": 2, "versions": {},
}  # fmt: skip


def write(path: Path, *points: dict[str, Any], **changes: Any) -> Path:
    content = {"key": {}, "origin": ORIGIN, "spread": 1.1, "points": {"fast": points}}
    path.write_text(json.dumps(content | changes))
    return path


def point(batch: int, p50_s: float, **changes: Any) -> dict[str, Any]:
    return {"batch": batch, "runs": 100, "p50_s": p50_s, "p95_s": None, "p99_s": None, **changes}


def test_a_measured_profile_is_read(tmp_path: Path) -> None:
    noisy = point(1, 0.02), point(4, 0.01, p95_s=0.02, p99_s=0.03)
    assert read_profile(write(tmp_path / "p.json", *noisy)).points["fast"][1].p99_s == 0.03


@pytest.mark.parametrize(
    "points",
    [
        (),
        (point(0, 0.01),),
        (point(-1, 0.01),),
        (point(10**9, 0.01),),
        (point(1, 0.0),),
        (point(1, -0.01),),
        (point(1, 1e9),),
        (point(1, 0.01, p99_s=1e308),),
        (point(1, 0.01, runs=0),),
        (point(1, 0.02, p95_s=0.01),),
        (point(1, 0.02, p95_s=0.04, p99_s=0.03),),
        (point(4, 0.02), point(1, 0.01)),
        (point(1, 0.01), point(1, 0.01)),
        (point(1, 1.0), point(8, 0.01)),
    ],
)
def test_what_no_machine_can_have_measured_is_refused(
    tmp_path: Path, points: tuple[dict[str, Any], ...]
) -> None:
    file = write(tmp_path / "p.json", *points)
    with pytest.raises(ValueError, match=str(file)) as caught:
        read_profile(file)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("spread", [0, -1, 1e9, "x", None])
def test_an_impossible_spread_is_refused(tmp_path: Path, spread: object) -> None:
    with pytest.raises(ValueError, match="spread"):
        read_profile(write(tmp_path / "p.json", point(1, 0.01), spread=spread))


@pytest.mark.parametrize("case", JSON)
def test_json_beyond_the_bounds_is_refused(tmp_path: Path, case: str) -> None:
    content, word = JSON[case]
    (tmp_path / "p.json").write_bytes(content)
    with pytest.raises((ValueError, OSError), match=word):
        read_profile(tmp_path / "p.json")


def test_a_fifo_in_the_cache_is_refused_at_once(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "p.json")
    with pytest.raises(OSError, match="a FIFO"):
        read_profile(tmp_path / "p.json")
