"""What pip would install: the wheel holds the three packages, and nothing else."""

import subprocess
import sys
import tomllib
from collections.abc import Iterator
from configparser import ConfigParser
from email import message_from_string
from pathlib import Path
from zipfile import ZipFile

import pytest

ROOT = Path(__file__).parents[1]
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Iterator[ZipFile]:
    folder = tmp_path_factory.mktemp("wheel")
    build = "import sys; from hatchling.build import build_wheel; print(build_wheel(sys.argv[1]))"
    done = subprocess.run(
        [sys.executable, "-c", build, folder], cwd=ROOT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    with ZipFile(folder / done.stdout.split()[-1]) as opened:
        yield opened


def read(wheel: ZipFile, name: str) -> str:
    [path] = [path for path in wheel.namelist() if path.endswith(f".dist-info/{name}")]
    return wheel.read(path).decode()


def test_top_levels_are_the_three_packages(wheel: ZipFile) -> None:
    tops = {name.partition("/")[0] for name in wheel.namelist()}
    packages = {top for top in tops if not top.endswith(".dist-info")}
    assert packages == {"pcae_serve", "pcae_export", "pcae_training"}
    assert len(tops - packages) == 1


def test_every_source_file_travels_once(wheel: ZipFile) -> None:
    for folder in ("pcae_serve", "export/pcae_export", "training/pcae_training"):
        parent = (ROOT / folder).parent
        here = {str(file.relative_to(parent)) for file in (ROOT / folder).rglob("*.py")}
        package = folder.rpartition("/")[2]
        there = [name for name in wheel.namelist() if name.startswith(f"{package}/")]
        assert here == {name for name in there if name.endswith(".py")}
        assert f"{package}/py.typed" in there or not (ROOT / folder / "py.typed").exists()


def test_the_demo_bundle_travels_whole(wheel: ZipFile) -> None:
    demo = ROOT / "pcae_serve" / "demo"
    assert (demo / "bundle.json").is_file()
    for file in filter(Path.is_file, demo.rglob("*")):
        if "__pycache__" not in file.parts:
            assert wheel.read(f"pcae_serve/demo/{file.relative_to(demo)}") == file.read_bytes()


def test_no_tests_and_no_leftovers(wheel: ZipFile) -> None:
    for name in wheel.namelist():
        parts = set(Path(name).parts)
        assert not parts & {"tests", "__pycache__", "conftest.py"}, name
        assert not Path(name).name.startswith("test_"), name


def test_commands(wheel: ZipFile) -> None:
    entry_points = ConfigParser()
    entry_points.read_string(read(wheel, "entry_points.txt"))
    assert dict(entry_points["console_scripts"]) == PROJECT["scripts"]
    for target in PROJECT["scripts"].values():
        module = target.partition(":")[0].replace(".", "/")
        assert f"{module}.py" in wheel.namelist()


def test_licence_and_python(wheel: ZipFile) -> None:
    metadata = message_from_string(read(wheel, "METADATA"))
    assert metadata["License-Expression"] == "Apache-2.0"
    assert metadata["Requires-Python"] == ">=3.11"
    assert read(wheel, "licenses/LICENSE") == (ROOT / "LICENSE").read_text()


def test_serving_needs_no_torch(wheel: ZipFile) -> None:
    requirements = message_from_string(read(wheel, "METADATA")).get_all("Requires-Dist", [])
    serving = [line for line in requirements if "extra ==" not in line or "'cpu'" in line]
    assert any("onnxruntime" in line for line in serving)
    assert not [line for line in serving if line.startswith(("torch", "onnx>", "onnxscript"))]
