"""The benchmarks: every program starts, and gpu.sh runs from end to end on the CPU."""

import ast
import json
import os
import re
import subprocess
import sys
from argparse import Namespace
from importlib import import_module
from importlib.util import find_spec, module_from_spec, spec_from_file_location
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_training import checkpoint as checkpoints

ROOT = Path(__file__).parent.parent
SCRIPT = ROOT / "benchmarks" / "gpu.sh"
STAGES = ["demo", "throughput", "engines", "questions"]
PROGRAMS = sorted((ROOT / "benchmarks").rglob("*.py"))
FILES = [*PROGRAMS, *sorted((ROOT / "benchmarks").glob("*.sh"))]


@pytest.mark.parametrize("program", PROGRAMS, ids=lambda file: file.name)
def test_a_program_imports_only_names_that_exist(program: Path) -> None:
    for node in ast.walk(ast.parse(program.read_text())):
        if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("pcae_"):
            module = import_module(node.module or "")
            for name in node.names:
                assert hasattr(module, name.name) or find_spec(f"{node.module}.{name.name}"), (
                    f"{node.module}.{name.name}"
                )


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.name)
def test_a_command_names_only_modules_and_files_that_exist(file: Path) -> None:
    text = file.read_text()
    modules = re.findall(r'-m(?: |", ")(pcae_[\w.]+)', text)
    modules += re.findall(r'"(pcae_[\w.]+):\w+"', text)
    assert all(find_spec(module) for module in modules), modules
    paths = re.findall(r"\b(?:benchmarks|training)/[\w/]+\.(?:py|sh)\b", text)
    assert all((ROOT / path).exists() for path in paths), paths


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder like Fashion-MNIST's: ten classes, 28 pixels, parquet."""
    datasets = pytest.importorskip("datasets")
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


def test_wrong_arguments_print_the_usage() -> None:
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
    model = checkpoints.load(tmp_path / "demo").model  # as joined from the parts
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
    assert again.stdout.splitlines() == [f"{stage}: already recorded" for stage in STAGES]


@pytest.fixture
def recipes(monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return the program recipes.py, at a size that takes seconds."""
    spec = spec_from_file_location("recipes", ROOT / "benchmarks" / "recipes.py")
    assert spec is not None
    assert spec.loader is not None
    module = module_from_spec(spec)
    monkeypatch.setitem(sys.modules, "recipes", module)  # for its dataclasses
    spec.loader.exec_module(module)
    monkeypatch.setattr(module, "MODEL", module.MODEL | {"width": 32, "depth": 9, "heads": 1})
    sizes = {"GALLERY": 50, "CHOSEN_ON": 20, "JUDGED_ON": 40, "SPREAD_ON": 20}
    for name, count in sizes.items():
        monkeypatch.setattr(module, name, range(count))
    monkeypatch.setattr(module, "MORE", range(50, 90))
    return module


@pytest.mark.slow
def test_a_search_for_recipes_repeats_no_run(data: Path, tmp_path: Path, recipes: Any) -> None:
    everything = recipes.Variant(
        centre="position", scale=True, layers=3, pixels=1.0, pixels_of="hidden", ema_end=0.9
    )
    runs = [
        recipes.Run("lead", 2, recipes.LEAD),
        recipes.Run("mae", 2, recipes.LEAD | {"method": "mae"}),
        recipes.Run("still", 3, recipes.LEAD, recipes.Variant(still=0.4)),
        recipes.Run("everything", 2, recipes.LEAD, everything, seed=1, judged=True),
    ]
    results = tmp_path / "runs.jsonl"
    args = Namespace(data=str(data), work=tmp_path, results=results, threads=1)
    recipes.search(runs, args)
    lines = [json.loads(line) for line in results.read_text().splitlines()]
    names = ["pixels", "untrained-0", "lead-2-0", "mae-2-0", "still-3-0"]
    assert [line["name"] for line in lines] == [*names, "untrained-1-judged", "everything-2-1"]
    assert all(0 <= share <= 1 for line in lines for share in line["chosen_on"].values())
    assert len(lines[-1]["few_labels"]) == 5
    recipes.describe_targets(args)
    assert [*recipes.read(results)][-1] == "targets-234-4"
    parts = [lines[2]["targets"][part] for part in ("constant", "position", "image")]
    assert sum(parts) == pytest.approx(1, abs=1e-4)
    assert lines[2]["targets"]["loss_position"] < lines[2]["targets"]["loss_constant"]
    assert lines[-1]["momentum"] == recipes.LEAD["ema"]
    recipes.search(runs, args)
    assert len(results.read_text().splitlines()) == len(lines) + recipes.SEEDS
