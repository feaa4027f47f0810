"""Imports point at the server; it imports neither of the others, and no torch."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}:{ROOT / 'training'}",
    "PATH": "/usr/bin:/bin",
}
HEAVY = {"torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "datasets", "safetensors"}
OURS = {"pcae_export", "pcae_training"}


def modules_after(statement: str) -> set[str]:
    """Top-level modules in a fresh interpreter once it has run the statement."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def imports(file: Path) -> set[str]:
    """Top-level names that a file imports anywhere, also inside functions."""
    names = set()
    for node in ast.walk(ast.parse(file.read_text(), str(file))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
            names.add(node.module)
    return {name.partition(".")[0] for name in names}


def files(folder: str) -> list[Path]:
    found = sorted((ROOT / folder).rglob("*.py"))
    assert found, f"nothing under {folder}"
    return found


@pytest.mark.parametrize("module", ["pcae_serve.api.app", "pcae_serve.commands.serve"])
def test_the_server_starts_light(module: str) -> None:
    loaded = modules_after(f"import {module}")
    assert "pcae_serve" in loaded
    assert not loaded & (HEAVY | OURS)


@pytest.mark.parametrize("file", files("pcae_serve"), ids=lambda file: str(file.relative_to(ROOT)))
def test_the_server_names_neither_exporter_nor_trainer(file: Path) -> None:
    allowed = {
        "onnx_cpu.py": {"onnxruntime"},
        "onnx_cuda.py": {"onnxruntime"},
        "tensorrt.py": {"tensorrt"},
    }
    assert not imports(file) & (HEAVY | OURS) - allowed.get(file.name, set())


def test_training_knows_no_exporter() -> None:
    for file in files("training/pcae_training"):
        assert not imports(file) & {"pcae_export", "onnx", "onnxscript", "onnxruntime"}, file


def test_a_scan_sees_imports_inside_functions(tmp_path: Path) -> None:
    file = tmp_path / "sly.py"
    file.write_text("def f():\n    from torch.nn import Linear\n    import onnx.helper\n")
    assert imports(file) == {"torch", "onnx"}
