"""Nothing leaves the machine unasked, and only documented files are written."""

import ast
import os
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import httpx2
import numpy as np
import pytest
from PIL import Image

from pcae_serve import usage_reports
from tests.support import no_network
from tests.support.images import image_bytes
from tests.support.server_process import log_of, ready

ROOT = Path(__file__).parents[2]

needs_a_filter = pytest.mark.skipif(
    not no_network.AVAILABLE, reason="the kernel's filter needs Linux on x86_64 or aarch64"
)


def test_importing_the_package_switches_reports_off(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in usage_reports.SWITCHES:
        monkeypatch.delenv(name, raising=False)
    code = "import {}; import os; print(*(os.environ.get(n) for n in {!r}))"
    for package in ("pcae_serve", "pcae_export", "pcae_training"):
        program = code.format(package, list(usage_reports.SWITCHES))
        done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True)
        assert done.stdout.split() == list(usage_reports.SWITCHES.values()), done.stderr


def test_a_variable_that_is_set_keeps_its_value(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ORT_DISABLE_TELEMETRY", "0")
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "")  # as compose passes an unset variable on
    usage_reports.switch_off()
    assert os.environ["ORT_DISABLE_TELEMETRY"] == "0"
    assert os.environ["RAY_USAGE_STATS_ENABLED"] == "0"


def test_images_and_documents_name_every_switch() -> None:
    image, page = (ROOT / name for name in ("docker/Dockerfile", "SECURITY.md"))
    for name, value in usage_reports.SWITCHES.items():
        assert f"{name}={value}" in image.read_text()
        assert f"`{name}={value}`" in page.read_text()


#: Programs that measure, without the servers of others that they start: those have environments of
#: their own, and inherit the variables.
PROGRAMS = [p for p in sorted((ROOT / "benchmarks").rglob("*.py")) if "peers" not in p.parts]


@pytest.mark.parametrize("program", PROGRAMS, ids=str)
def test_a_program_imports_the_package_before_onnxruntime(program: Path) -> None:
    names = [
        name
        for node in ast.parse(program.read_text()).body
        if isinstance(node, ast.Import | ast.ImportFrom)
        for name in ([node.module or ""] if isinstance(node, ast.ImportFrom) else _names(node))
    ]
    reporting = [i for i, name in enumerate(names) if re.match(r"onnxruntime|datasets|ray\b", name)]
    ours = [i for i, name in enumerate(names) if name.startswith("pcae_")]
    assert not reporting or (ours and ours[0] < reporting[0])


def _names(node: ast.Import) -> list[str]:
    return [alias.name for alias in node.names]


def own_home(folder: Path, **more: str) -> dict[str, str]:
    """Return the environment of somebody who has just got an account, all of it in `folder`."""
    for name in ("home", "tmp", "work"):
        (folder / name).mkdir()
    packages = f"{ROOT}:{ROOT / 'export'}:{ROOT / 'training'}"
    return {
        "PATH": os.environ["PATH"], "PYTHONPATH": packages, "PYTHONDONTWRITEBYTECODE": "1",
        "HOME": str(folder / "home"), "TMPDIR": str(folder / "tmp"), **more,
    }  # fmt: skip


def installed(command: str) -> str:
    """Return the path of a console script."""
    beside = Path(sys.executable).with_name(command)
    found = str(beside) if beside.exists() else shutil.which(command)
    assert found is not None, "the package is not installed: make test does that"
    return found


def written(folder: Path) -> list[str]:
    """Return all files under a folder, by relative path, with hashes as `#`."""
    files = (path for path in folder.rglob("*") if not path.is_dir())
    return sorted(re.sub(r"[0-9a-f]{16,}", "#", str(path.relative_to(folder))) for path in files)


@needs_a_filter
@pytest.mark.parametrize("cache", ["home", "xdg"])
def test_the_server_writes_its_latency_profile_and_connects_to_nothing(
    tmp_path: Path, cache: str
) -> None:
    xdg = {"XDG_CACHE_HOME": str(tmp_path / "xdg")} if cache == "xdg" else {}
    environment = own_home(tmp_path, **xdg)
    log = log_of(tmp_path)
    with log.open("w") as stderr:
        process = subprocess.Popen(
            [installed("pcae-serve"), "--port", "0", "--profile-s", "0.3"],
            stderr=stderr, text=True, env=environment, cwd=tmp_path / "work",
            preexec_fn=no_network.deny_connections,
        )  # fmt: skip
    with ready(process, log) as url:
        answer = httpx2.post(f"{url}/classify?budget_ms=60000", content=image_bytes(1), timeout=90)
        assert answer.status_code == 200, answer.text
        process.send_signal(signal.SIGTERM)
        assert process.wait(timeout=90) == 0, log.read_text()
    folder = "xdg" if cache == "xdg" else "home/.cache"
    assert written(tmp_path) == [f"{folder}/pcae-serve/profiles/#.json"]


@needs_a_filter
def test_the_filters_kill() -> None:
    def ended(code: str, preexec: Callable[[], None]) -> int:
        program = f"import socket; s = socket.socket(socket.AF_INET, socket.SOCK_DGRAM); {code}"
        return subprocess.run([sys.executable, "-c", program], preexec_fn=preexec).returncode

    assert ended("", no_network.deny_connections) == 0
    for code in ("s.connect(('127.0.0.1', 9))", "s.sendto(b'', ('127.0.0.1', 9))"):
        assert ended(code, no_network.deny_connections) == no_network.KILLED
    assert ended("", no_network.deny_sockets) == no_network.KILLED


#: Files outside the named output folders that training and export may write; in SECURITY.md.
CACHES = re.compile(r"home/\.cache/(huggingface/datasets/|matplotlib/fontlist-)")


@needs_a_filter
@pytest.mark.slow
def test_training_and_export_write_caches_and_open_no_connection(tmp_path: Path) -> None:
    environment = own_home(tmp_path)
    rng = np.random.default_rng(0)
    for split, per_class in (("train", 12), ("test", 8)):
        for name, level in (("bright", 170), ("dark", 50)):
            folder = tmp_path / "work" / "images" / split / name
            folder.mkdir(parents=True)
            for i in range(per_class):
                noise = rng.integers(level - 40, level + 40, (8, 8, 3), dtype=np.uint8)
                Image.fromarray(noise).save(folder / f"{i}.png")
    sizes = "--image-size 8 --patch-size 2 --width 8 --heads 2 --depth 11"
    steps = "--epochs 1 --batch-size 10 --holdout 10 --threads 1 --crop 0 --randaugment 0"
    for line in (
        f"pcae-train finetune --data images --out out {sizes} {steps} --budgets 1.0,.5",
        "pcae-train evaluate out --data images",
        "pcae-train visualize out --data images --out kept",
        "pcae-export bundle out bundle --eval-data images --parity-images 16",
        "pcae-export verify bundle --data images --images 16",
        "pcae-serve simulate --trace poisson --load 0.5 --policy pace --requests 50 --seeds 1"
        " --profile cpu --capacity 100 --jobs 1 --png simulated.png",
    ):
        command, *words = line.split()
        done = subprocess.run(
            [installed(command), *words],
            env=environment, cwd=tmp_path / "work", capture_output=True, text=True,
            preexec_fn=no_network.deny_sockets,
        )  # fmt: skip
        assert done.returncode == 0, f"{line}: {done.stderr}"
    outside = [name for name in written(tmp_path) if not name.startswith("work/")]
    assert outside
    assert all(map(CACHES.match, outside)), outside
    outputs = {path.name for path in (tmp_path / "work").iterdir()}
    assert outputs == {"images", "out", "kept", "bundle", "simulated.png"}
