"""Chromium of Debian, and a server with the demo."""

import shutil
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from tests.support.server_process import server

#: What each page looked like at the end of its test.
SCREENSHOTS = Path("browser-screenshots")


@pytest.fixture(scope="session")
def chromium() -> Iterator[Any]:
    """The browser; the test is skipped where it is not installed."""
    playwright = pytest.importorskip("playwright.sync_api")
    found = shutil.which("chromium")
    if found is None:
        pytest.skip("needs chromium: apt-get install chromium")
    with playwright.sync_playwright() as started:
        browser = started.chromium.launch(executable_path=found, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="session")
def demo(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with the demo."""
    with server("--waiting-price", "0", cache=tmp_path_factory.mktemp("cache")) as (url, _):
        yield url


@pytest.fixture(scope="session")
def dense(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a server with a tiny backbone that returns the state of each patch."""
    from pcae_training import checkpoint  # imports torch
    from tests.export.conftest import make_tiny
    from tests.support.exporting import bundled

    root = tmp_path_factory.mktemp("dense")
    checkpoint.save(replace(make_tiny(classes=0, pooling="cls"), labels=[]), root / "checkpoint")
    flags = ("--dense", "--half", "none", "--tier", "low=0.5", "--tier", "full=1")
    made = bundled(root / "checkpoint", root / "bundle", *flags)
    with server("--bundle", str(made.root), cache=root / "cache") as (url, _):
        yield url


class Visit:
    """A page, and all that went wrong or elsewhere on it."""

    def __init__(self, page: Any, url: str) -> None:
        self.page, self.url = page, url
        self.errors: list[str] = []
        self.elsewhere: list[str] = []
        page.on("console", self._note)
        page.on("pageerror", lambda error: self.errors.append(str(error)))
        page.on("request", self._check)

    def _note(self, message: Any) -> None:
        # the browser itself reports each answer of 4xx or 5xx: those are shown on the page
        own = ("Failed to load resource", "Canvas2D: Multiple readback")  # these tests read pixels
        if message.type in ("error", "warning") and not message.text.startswith(own):
            self.errors.append(message.text)

    def _check(self, request: Any) -> None:
        if not request.url.startswith((self.url, "blob:", "data:")):
            self.elsewhere.append(request.url)


@pytest.fixture
def visit(chromium: Any, request: pytest.FixtureRequest) -> Iterator[Any]:
    """Open an address; at the end nothing may have gone wrong, or to another host."""
    contexts, visits = [], []

    def open_page(url: str, path: str = "/", **options: Any) -> Any:
        context = chromium.new_context(**{"viewport": {"width": 1000, "height": 900}} | options)
        contexts.append(context)
        visits.append(Visit(context.new_page(), url))
        visits[-1].page.goto(url + path)
        return visits[-1].page

    yield open_page
    SCREENSHOTS.mkdir(exist_ok=True)
    for number, seen in enumerate(visits):
        file = SCREENSHOTS / f"{request.node.name}-{number}.png"
        seen.page.screenshot(path=str(file), full_page=True)
    for context in contexts:
        context.close()
    assert [seen.errors for seen in visits] == [[] for _ in visits]
    assert [seen.elsewhere for seen in visits] == [[] for _ in visits]
