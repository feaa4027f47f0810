"""Fixtures for the tests of several packages."""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest

import pcae_serve as pcae_serve  # switches usage reports off before a test imports onnxruntime

# no time limits: on a busy machine they would measure the machine
hypothesis.settings.register_profile(
    "busy", deadline=None, suppress_health_check=[hypothesis.HealthCheck.too_slow]
)
hypothesis.settings.load_profile("busy")


@pytest.fixture(scope="session")
def hugging_face() -> Iterator[Any]:
    """Yield `transformers` with its progress bars and messages off."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.enable_progress_bar()
