"""What a fresh interpreter loads; import-linter checks the direction of imports."""

import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
ENVIRONMENT = {
    "PYTHONPATH": f"{ROOT}:{ROOT / 'export'}:{ROOT / 'training'}",
    "PATH": "/usr/bin:/bin",
}
HEAVY = {
    "torch", "onnx", "onnxscript", "onnxruntime", "tensorrt", "datasets", "safetensors",
    "huggingface_hub", "fsspec",
}  # fmt: skip
OTHERS = {"pcae_export", "pcae_training"}
SERVER = {"fastapi", "uvicorn", "prometheus_client"}


def modules_after(statement: str) -> set[str]:
    """Return the top-level modules of a fresh interpreter once it has run the statement."""
    code = f"{statement}\nimport sys; print(*{{name.partition('.')[0] for name in sys.modules}})"
    done = subprocess.run(
        [sys.executable, "-c", code], env=ENVIRONMENT, capture_output=True, text=True, timeout=120
    )
    assert done.returncode == 0, done.stderr
    return set(done.stdout.split())


def test_the_server_starts_without_engines_or_the_other_packages() -> None:
    loaded = modules_after("import pcae_serve.commands.serve")
    assert loaded >= SERVER
    assert not loaded & (HEAVY | OTHERS)


@pytest.mark.parametrize(
    ("statement", "absent"),
    [
        ("import pcae_serve; pcae_serve.__version__", SERVER | {"numpy", "pydantic", "httpx2"}),
        ("from pcae_serve import Client", SERVER | {"numpy"}),
        ("import pcae_serve.cli", SERVER | {"numpy"}),
        ("from pcae_serve import load", SERVER | {"httpx2"}),
    ],
)
def test_public_names_load_no_server(statement: str, absent: set[str]) -> None:
    assert not modules_after(statement) & (absent | HEAVY | OTHERS)
