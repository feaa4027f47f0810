"""What tests of more than one package stand on."""

from collections.abc import Iterator
from typing import Any

import pytest

#: Files that take longest, however few their tests: begun last, one process would wait for them.
FIRST = ("test_readme.py", "test_faults.py", "test_trainer.py", "test_app.py", "test_replay.py")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    rank = {name: i for i, name in enumerate(FIRST)}
    items.sort(key=lambda item: rank.get(item.path.name, len(FIRST)))


@pytest.fixture(scope="session")
def hugging_face() -> Iterator[Any]:
    """`transformers`, which says nothing while it works."""
    transformers = pytest.importorskip("transformers")
    transformers.logging.disable_progress_bar()
    transformers.logging.set_verbosity_error()
    yield transformers
    transformers.logging.enable_progress_bar()
