"""What tests of more than one package stand on."""

from collections.abc import Iterator
from typing import Any

import pytest


@pytest.fixture(scope="session")
def hugging_face() -> Iterator[Any]:
    """`transformers`, which says nothing while it works."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.enable_progress_bar()
