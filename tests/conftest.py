"""Fixtures for the tests of several packages."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def hugging_face() -> Iterator[Any]:
    """Yield `transformers` with its progress bars and messages off."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.enable_progress_bar()
