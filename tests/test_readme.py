"""Run what the README shows: its commands in their order, against a server started for it."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.reader import demo_path, load_bundle
from tests.support.server_process import server

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = [
    line.split("  #")[0].strip()
    for block in re.findall(r"```sh\n(.*?)```", README, re.DOTALL)
    for line in block.splitlines()
]
CURL = [command for command in COMMANDS if command.startswith("curl ")]
CLASSIFY = [command for command in COMMANDS if command.startswith("pcae-serve classify ")]
INSTALL = [command for command in COMMANDS if command.startswith("pip install ")]
OWN_MODEL = [command for command in COMMANDS if command.startswith(("pcae-train", "pcae-export"))]
DRAW = re.findall(r"`(pcae-train visualize .*?)`", README)


@pytest.fixture(scope="module")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Yield the address of a server with the demo bundle, as `make serve` starts it."""
    with server("--budget-ms", "20000", cache=tmp_path_factory.mktemp("cache")) as (url, _):
        yield url


def with_larger_budgets(text: str) -> str:
    """Multiply every budget by 20, so that a busy machine answers in time."""
    budget = re.compile(r"(budget.ms[= :]+)(\d+)", re.IGNORECASE)
    return budget.sub(lambda match: f"{match[1]}{20 * int(match[2])}", text)


def curl(command: str, url: str) -> Any:
    """Run a line of the README with another address, and return its JSON."""
    assert shutil.which("curl"), "curl is missing: apt-get install curl"
    command = with_larger_budgets(command).replace("localhost:8000", url.removeprefix("http://"))
    done = subprocess.run(
        [*shlex.split(command), "-sS"], cwd=ROOT, capture_output=True, check=True, timeout=60
    )
    return json.loads(done.stdout)


def scripts() -> str:
    """Return a PATH on which the three programs come first."""
    return f"{Path(sys.executable).parent}:{os.environ['PATH']}"


def test_it_is_short_and_every_command_is_tried() -> None:
    assert len(README.splitlines()) <= 140
    known = ("make serve", "make test", "pcae-serve", *CURL, *INSTALL, *OWN_MODEL)
    assert [command for command in COMMANDS if not command.startswith(known)] == []
    assert (len(CURL), len(CLASSIFY), len(INSTALL), len(OWN_MODEL), len(DRAW)) == (5, 1, 2, 2, 1)


@pytest.mark.slow
@pytest.mark.parametrize("install", INSTALL)
def test_the_install_lines_give_the_commands(install: str, tmp_path: Path) -> None:
    """Needs a package index."""
    copy = tmp_path / "checkout"
    shutil.copytree(ROOT, copy, ignore=shutil.ignore_patterns(".git", ".*cache", ".venv*"))
    lines = ["python3 -m venv own", ". own/bin/activate", install, "pcae-serve --help"]
    if "train" in install:
        lines += ["pcae-train finetune --help", "pcae-export bundle --help"]
    done = subprocess.run(
        ["bash", "-c", " && ".join(lines)], cwd=copy, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_picture_is_what_its_command_draws(tmp_path: Path) -> None:
    command, _, shown = DRAW[0].rpartition(" --out ")
    drawn = tmp_path / "kept.png"
    environment = os.environ | {"PATH": scripts()}
    line = f"{command} --out {shlex.quote(str(drawn))}"
    subprocess.run(["bash", "-c", line], cwd=ROOT, env=environment, check=True)
    with Image.open(drawn) as ours, Image.open(ROOT / shown) as theirs:
        assert ours.size == theirs.size
        assert np.abs(np.asarray(ours, int) - np.asarray(theirs, int)).mean() < 2  # fonts differ


@pytest.mark.parametrize("command", CURL)
def test_curl_lines_are_answered(command: str, demo: str) -> None:
    answer = curl(command, demo)
    if "/classify" in command:
        samples = re.findall(r"samples/([a-z-]+)\.png", command)
        alone = "/batch" not in command
        answers = [answer] if alone else [result["answer"] for result in answer["results"]]
        given = [each["predictions"][0]["label"].lower().replace(" ", "-") for each in answers]
        assert given == samples != []


@pytest.mark.parametrize("command", CLASSIFY)
def test_the_shell_classifies_every_sample(command: str, demo: str) -> None:
    done = subprocess.run(
        ["bash", "-c", f"{with_larger_budgets(command)} --url {demo}"],
        cwd=ROOT,
        env=os.environ | {"PATH": scripts()},
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    samples = sorted((ROOT / "docs" / "samples").glob("*.png"))
    for line, sample in zip(done.stdout.splitlines(), samples, strict=True):
        file, label, _ = re.split(r"  | 0\.", line, maxsplit=2)
        assert Path(file).name == sample.name
        assert label.lower().replace(" ", "-") == sample.stem


@pytest.mark.parametrize("page", ["README.md", "docs/client.md"])
def test_the_python_shown_runs(
    page: str, demo: str, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    [code] = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.DOTALL)
    assert "http://localhost:8000" in code
    exec(with_larger_budgets(code).replace("http://localhost:8000", demo), {})
    assert capsys.readouterr().out.startswith("Bag ")


def test_the_answer_shown_is_the_answer_given(demo: str) -> None:
    [shown] = re.findall(r"```json\n(.*?)```", README, re.DOTALL)
    expected = json.loads(shown)
    given = curl(CURL[0].replace("budget_ms=", f"tier={expected['tier']}&budget_ms="), demo)
    assert given.keys() == expected.keys()
    assert given["timings_ms"].keys() == expected["timings_ms"].keys()
    for key in ("tier", "keep_ratio", "tokens", "met_budget", "kept"):
        assert given[key] == expected[key]
    for ours, theirs in zip(given["predictions"], expected["predictions"], strict=True):
        assert ours["label"] == theirs["label"]
        assert ours["probability"] == pytest.approx(theirs["probability"], abs=0.002)


def test_every_tier_recognises_every_sample(demo: str) -> None:
    for sample in sorted((ROOT / "docs" / "samples").glob("*.png")):
        for tier in load_bundle(demo_path()).tiers:
            line = f"curl --data-binary @{sample} 'localhost:8000/classify?tier={tier.name}'"
            answer = curl(line, demo)
            assert answer["tier"] == tier.name
            assert answer["predictions"][0]["label"].lower().replace(" ", "-") == sample.stem


def test_the_table_states_what_the_bundle_states() -> None:
    rows = {
        cells[0].strip("`"): cells
        for cells in (
            [cell.strip() for cell in line.strip("|").split("|")]
            for line in README.splitlines()
            if line.startswith("| `")
        )
    }
    for tier in load_bundle(demo_path()).tiers:
        assert tier.accuracy is not None
        row = rows[tier.name]
        assert float(row[1]) == tier.keep_ratio
        assert row[2] == ", ".join(map(str, tier.token_counts))
        assert row[3].split()[0] == f"{100 * tier.accuracy.top1:.2f}"
        assert tier.accuracy.n == 10_000


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder in which `photos` holds 96 images in 8 classes; each is bright in other places."""
    root, draw = tmp_path_factory.mktemp("own"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in range(8):
            folder = root / "photos" / split / f"class {label}"
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 80, (40, 50, 3), np.uint8)
                for bit, part in enumerate((pixels[:20], pixels[:, :25], pixels[..., 0])):
                    part += np.uint8(50 * (label >> bit & 1))
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    return root


@pytest.mark.slow
def test_the_way_to_your_own_model_runs_to_its_end(photos: Path) -> None:
    environment = os.environ | {"PATH": scripts(), "HOME": str(photos)}
    for command in OWN_MODEL:
        done = subprocess.run(
            shlex.split(command),
            cwd=photos,
            env=environment,
            capture_output=True,
            text=True,
            timeout=1800,
        )
        assert done.returncode == 0, done.stderr
    [serve] = [c for c in COMMANDS if c.startswith("pcae-serve --bundle ")]
    flags = shlex.split(serve)[1:]
    flags[-1] = str(photos / flags[-1])
    with server(*flags, cache=photos / "cache") as (url, _):
        image = photos / "photos" / "test" / "class 3" / "0.jpg"
        answer = curl(f"curl --data-binary '@{image}' 'localhost:8000/classify'", url)
        assert answer["predictions"][0]["label"] in [f"class {label}" for label in range(8)]
        assert answer["tier"] in ("fast", "full")
