"""The programs in benchmarks/ that train, started as on a machine with a GPU, but on the CPU."""

import json
import os
import subprocess
import sys
from pathlib import Path

import datasets  # type: ignore[import-untyped]
import numpy as np
import pytest

from pcae_training import checkpoint as checkpoints

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ["demo", "throughput", "engines", "questions"]


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a data folder like Fashion-MNIST's: ten classes, 28 pixels, parquet."""
    folder = tmp_path_factory.mktemp("data")
    rng = np.random.default_rng(0)
    kinds = datasets.Features(
        {"image": datasets.Image(), "label": datasets.ClassLabel(names=list("abcdefghij"))}
    )
    for split, n in (("train", 96), ("test", 40)):
        images = [rng.integers(0, 256, (28, 28), dtype=np.uint8) for _ in range(n)]
        labels = [i % 10 for i in range(n)]
        rows = datasets.Dataset.from_dict({"image": images, "label": labels}, features=kinds)
        rows.to_parquet(folder / f"{split}-00000-of-00001.parquet")
    return folder


def start(data: Path, out: Path, minutes: float, work: Path) -> subprocess.CompletedProcess[str]:
    settings = {"DEVICE": "cpu", "SCALE": "tiny", "PYTHON": sys.executable, "WORK": str(work)}
    settings |= {"OMP_NUM_THREADS": "1", "JOBS": "2", "SEEDS": "0", "HF_HOME": str(work / "cache")}
    return subprocess.run(
        [SCRIPT, data, out, str(minutes)],
        env=os.environ | settings,
        capture_output=True,
        text=True,
        timeout=900,
    )


def test_without_time_it_does_nothing(data: Path, tmp_path: Path) -> None:
    done = start(data, tmp_path / "out", 0, tmp_path / "work")
    assert done.returncode == 0, done.stderr
    lines = [line for line in done.stdout.splitlines() if "no time left" in line]
    assert [line.split(":")[0] for line in lines] == STAGES
    assert list((tmp_path / "out").iterdir()) == []


def test_it_says_how_it_is_used() -> None:
    done = subprocess.run([SCRIPT], capture_output=True, text=True)
    assert done.returncode == 2
    assert "benchmarks/gpu.sh DATA OUT MINUTES" in done.stderr


@pytest.mark.slow
def test_the_gpu_script_from_end_to_end(data: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    done = start(data, out, 14, tmp_path / "work")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "stopped" not in done.stdout

    subprocess.run(f"cat {out}/demo.tar.part-* | tar -x -C {tmp_path}", shell=True, check=True)
    model = checkpoints.load(tmp_path / "demo").model  # as it comes back from the GPU's machine
    assert (model.config.grid**2, model.config.classes) == (196, 10)
    demo = json.loads((out / "demo.json").read_text())
    assert [budget["keep_ratio"] for budget in demo["budgets"]][::8] == [1.0, 0.25]
    assert demo["n"] == 40

    cases = {row["case"]: row for row in json.loads((out / "throughput.json").read_text())["rows"]}
    assert cases["mae"]["ratio"] == 1
    assert cases["pcae, mask 0.75"]["img_per_s"] > 0

    rows = json.loads((out / "engines.json").read_text())["rows"]
    assert {row["engine"] for row in rows} >= {"torch"}
    assert {(row["tier"], row["batch"]) for row in rows} >= {("1.0", 1), ("0.6", 2)}

    questions = json.loads((out / "questions.json").read_text())
    assert questions["finished"]
    assert len(questions["compared"]) == 16
    assert all(len(row["by_seed"]) == 1 for row in questions["compared"])
    sizes = [file.stat().st_size for file in out.iterdir()]
    assert max(sizes) < 16 * 2**20

    again = start(data, out, 1, tmp_path / "work")
    assert again.stdout.splitlines() == [f"{stage}: has its record" for stage in STAGES]
