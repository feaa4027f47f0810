"""A small bundle without graphs (the simulated engine needs none), and images to send."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.settings import Settings
from tests.support.bundles import write_bundle
from tests.support.gate import Gate


@pytest.fixture
def bundle_dir(tmp_path: Path) -> Path:
    return write_bundle(tmp_path / "bundle")


@pytest.fixture
def small_bundle(bundle_dir: Path) -> Bundle:
    return load_bundle(bundle_dir)


@pytest.fixture
def settings(tmp_path: Path) -> Callable[..., Settings]:
    """Settings that keep their cache in the test's own folder.

    Waiting costs nothing: on a busy machine, quick requests look like load, and a price would give
    them a cheaper tier than the test expects.
    """
    defaults: dict[str, Any] = {
        "cache_dir": tmp_path / "cache",
        "profile_s": 0.3,
        "waiting_price": 0.0,
    }
    return lambda **changes: Settings(**(defaults | changes))


@pytest.fixture
def gate() -> Iterator[Gate]:
    """An engine that is let go on at the end."""
    gate = Gate()
    yield gate
    gate.open.set()
