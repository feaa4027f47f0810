"""Run the commands that docs/ shows, except those of the README, which test_readme.py runs.

Each line of a shell block runs here, or is marked as needing what not every machine has, or is
listed in ELSEWHERE with the reason. Names that stand for the reader's files are made; runs are
shortened by more flags.
"""

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from pcae_serve.bundle.reader import demo_path, load_bundle
from tests.support.server_process import server

ROOT = Path(__file__).parents[1]

#: Commands that do not run here: the page, how they begin, and why.
ELSEWHERE = {
    "api.md": {"curl ": "needs a model without a head: tests/serve/api/test_embed_routes.py"},
    "capacity.md": {"pcae-serve simulate": "tests/test_site.py"},
    "containers.md": {"docker ": "flags and settings in tests/test_containers.py; docker/try.sh"},
    "export.md": {
        "printf ": "makes a file for the next line",
        "pcae-export bundle ": "checkpoints of other projects: tests/export/test_foreign.py,"
        " tests/export/test_tier_search.py; flags in tests/test_site.py",
    },
    "operations.md": {
        "pip install": "installs; its use: tests/serve/observability/test_tracing.py",
        "OTEL_EXPORTER": "tests/serve/observability/test_tracing.py",
    },
    "ray.md": dict.fromkeys(
        ("pip install", "export RAY", "serve run", "curl "), "needs ray: tests/serve/integrations"
    ),
    "scheduling.md": {
        "pcae-serve replay": "measures: tests/serve/commands/test_replay.py",
        "pcae-serve &": "is stopped by hand",
        "taskset ": "needs a core of its own",
    },
    "training.md": dict.fromkeys(
        ("export TORCH", "torchrun "), "needs several machines: tests/training/test_world.py"
    ),
}
#: What a marked part of a block begins with, or a marked line ends with.
NEEDS = "# needs "
#: Flags that make a run short.
SHORTER = {
    "pcae-train pretrain": "--epochs 1 --image-size 32 --patch-size 4 --width 48 --depth 4"
    " --reduce-after 1,2,3 --batch-size 8",
    "pcae-train finetune": "--epochs 1 --batch-size 8",
    "pcae-serve simulate": "--requests 60 --seeds 2",
}


def shown(page: str) -> Iterator[str]:
    """Yield the commands of a page that no mark exempts, without comments."""
    text = (ROOT / "docs" / page).read_text()
    for block in re.findall(r"```sh\n(.*?)```", text, re.DOTALL):
        for part in block.split("\n\n"):
            if part.lstrip().startswith(NEEDS):
                continue
            for line in part.replace("\\\n", " ").splitlines():
                command = re.sub(r"(^| +)#.*", "", line).strip()
                if command and NEEDS not in line:
                    yield command


def here(page: str) -> list[str]:
    """Return the commands of a page that this file runs."""
    exempt = tuple(ELSEWHERE.get(page, ()))
    return [command for command in shown(page) if not command.startswith(exempt or "\n")]


def shell(command: str, folder: Path, cache: Path) -> str:
    """Run a command in a folder with the programs first on the PATH; return what it prints."""
    for start, flags in SHORTER.items():
        if command.startswith(start):
            command += f" {flags}"
    path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
    environment = os.environ | {"PATH": path, "PCAE_CACHE_DIR": str(cache)}
    done = subprocess.run(
        ["bash", "-c", command],
        cwd=folder,
        env=environment,
        capture_output=True,
        text=True,
        timeout=1800,
    )
    assert done.returncode == 0, f"{command}\n{done.stderr[-2000:]}"
    return done.stdout


@pytest.fixture(scope="module")
def reader(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the files that the pages call photos, bird.jpg, bundles/mine and my-bundle."""
    root, draw = tmp_path_factory.mktemp("reader"), np.random.default_rng(0)
    for split, count in (("train", 8), ("test", 4)):
        for label in ("one", "two"):
            folder = root / "photos" / split / label
            folder.mkdir(parents=True)
            for i in range(count):
                pixels = draw.integers(0, 255, (40, 40, 3), np.uint8)
                Image.fromarray(pixels).save(folder / f"{i}.jpg")
    shutil.copy(root / "photos/test/one/0.jpg", root / "bird.jpg")
    shutil.copytree(ROOT / "docs" / "samples", root / "docs" / "samples")
    for name in ("bundles/mine", "my-bundle"):
        shutil.copytree(demo_path(), root / name)
    return root


def test_every_command_runs_or_says_why_not() -> None:
    pages = {file.name for file in (ROOT / "docs").glob("*.md") if here(file.name)}
    assert pages == {"classes.md", "client.md", "local.md", "scheduling.md", "training.md"}
    for page, exempt in ELSEWHERE.items():
        for start, reason in exempt.items():
            assert all((ROOT / file).exists() for file in re.findall(r"[\w/]+\.py", reason)), reason
            assert any(each.startswith(start) for each in shown(page)), f"{page}: {start}"


@pytest.mark.slow
def test_the_shell_of_the_client(reader: Path, tmp_path: Path) -> None:
    alone, asks = here("client.md")
    assert shell(alone, reader, tmp_path).count("\n") == 5
    with server("--budget-ms", "20000", cache=tmp_path) as (url, _):
        answer = json.loads(shell(asks.replace("http://127.0.0.1:8000", url), reader, tmp_path))
    assert answer["predictions"][0]["label"] == "Bag"


@pytest.mark.slow
def test_a_bundle_of_photographs_is_served(reader: Path, tmp_path: Path) -> None:
    """With another bundle of that name: tests/export/test_photo_classes.py makes one."""
    serves, asks = here("classes.md")
    command, flag, bundle = serves.split()
    assert (command, flag) == ("pcae-serve", "--bundle")
    with server(flag, str(reader / bundle), cache=tmp_path) as (url, _):
        asks = asks.replace("localhost:8000", url.removeprefix("http://"))
        answer = json.loads(
            shell(asks.replace("budget_ms=1000", "budget_ms=20000"), reader, tmp_path)
        )
    assert answer["predictions"][0]["label"] in load_bundle(reader / bundle).labels


@pytest.mark.slow
def test_folders(reader: Path, tmp_path: Path) -> None:
    for command in here("local.md"):
        shell(command, reader, tmp_path)
    assert len((reader / "results.csv").read_text().splitlines()) == 1 + 24
    assert (reader / "results.parquet").stat().st_size > 100


@pytest.mark.slow
def test_simulations(reader: Path, tmp_path: Path) -> None:
    *builtin, measured = here("scheduling.md")
    for command in builtin:
        assert "attainment" in shell(command, reader, tmp_path)
    assert (reader / "front.png").read_bytes().startswith(b"\x89PNG")
    shell("pcae-export profile my-bundle --seconds 3 --suggest 0 --batches 1", reader, tmp_path)
    assert "attainment" in shell(measured, reader, tmp_path)


@pytest.mark.slow
def test_from_images_to_budgets(reader: Path, tmp_path: Path) -> None:
    for command in here("training.md"):
        shell(command, reader, tmp_path)
    assert json.loads((reader / "elastic.json").read_text())
    assert (reader / "kept.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.slow
def test_the_client_of_triton(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("tritonclient")
    page = (ROOT / "docs" / "open-inference-protocol.md").read_text()
    [code] = re.findall(r"```python\n(.*?)```", page, re.DOTALL)
    monkeypatch.chdir(ROOT)
    with server("--budget-ms", "20000", cache=tmp_path) as (url, _):
        code = code.replace("localhost:8000", url.removeprefix("http://"))
        exec(code.replace('"budget_ms": 500', '"budget_ms": 20000'), {})
    assert "Bag" in capsys.readouterr().out
