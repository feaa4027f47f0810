"""Fixtures for the tests of several packages."""

import os

# Matrices are tiny: more threads of a library only wait for each other, up to 20 times as long.
# Before numpy is imported, and for the processes that tests start.
os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"

import gc
import importlib
from collections.abc import Generator, Iterator
from pathlib import Path
from typing import Any

import hypothesis
import pytest

import pcae_serve as pcae_serve  # switches usage reports off before a test imports onnxruntime
from tests.support.hub import Hub, hub_double

# no time limits: on a busy machine they would measure the machine
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


@pytest.hookimpl(wrapper=True)
def pytest_collection() -> Generator[None, object, object]:
    """Exclude what is imported from garbage collection: millions of objects that stay."""
    gc.disable()
    try:
        return (yield)
    finally:
        gc.collect()
        gc.freeze()
        gc.enable()


@pytest.fixture(scope="session")
def hugging_face() -> Iterator[Any]:
    """Yield `transformers` with its progress bars and messages off."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.enable_progress_bar()


@pytest.fixture
def hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Hub]:
    """Yield a double of the Hugging Face hub, which the library asks in this test.

    Its cache is empty, and no token is set.
    """
    constants = pytest.importorskip("huggingface_hub.constants")
    monkeypatch.delenv("HF_TOKEN", raising=False)
    with hub_double() as double:
        address = f"{double.url}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        for name, value in {
            "ENDPOINT": double.url,
            "HUGGINGFACE_CO_URL_TEMPLATE": address,
            "HF_HUB_OFFLINE": False,
            "HF_HUB_CACHE": str(tmp_path / "hub-cache"),
            "HF_TOKEN_PATH": str(tmp_path / "no-token"),
        }.items():
            monkeypatch.setattr(constants, name, value)
        yield double
        importlib.import_module("huggingface_hub").close_session()
