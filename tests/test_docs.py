"""Pages of docs/ agree with the code: routes, settings, folders."""

import importlib
import re
from pathlib import Path

import pytest

from pcae_serve.api.app import create_app
from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings

ROOT = Path(__file__).parents[1]
PAGES = [*ROOT.glob("*.md"), *(ROOT / "docs").glob("*.md")]
API, ARCHITECTURE = ((ROOT / "docs" / name).read_text() for name in ("api.md", "architecture.md"))


def test_every_route_and_parameter_is_documented() -> None:
    served = load_bundle(demo_path())
    openapi = create_app(Service(Settings(), served, engines=[]), print).openapi()
    for parameter in openapi["paths"]["/classify"]["post"]["parameters"]:
        assert f"`{parameter['name']}`".lower() in API.lower(), parameter["name"]
    for path, operations in openapi["paths"].items():
        assert path in API
        for status in {status for each in operations.values() for status in each["responses"]}:
            assert status == "200" or status in API.split("## Errors")[1], (path, status)


def test_generated_parts_are_up_to_date(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """In this process, which has imported the three packages; `make format` starts another."""
    monkeypatch.syspath_prepend(ROOT / ".ci")
    found = importlib.import_module("documents").main(check=True)
    assert found == 0, capsys.readouterr().err


def test_every_folder_is_explained() -> None:
    named = set(re.findall(r"^\| `([\w/]+/?)` \|", ARCHITECTURE, re.MULTILINE))
    packages = {
        str(file.parent.relative_to(ROOT))
        for package in ("pcae_serve", "export/pcae_export", "training/pcae_training")
        for file in (ROOT / package).rglob("__init__.py")
    }
    assert packages <= {name.rstrip("/") for name in named}
    assert all((ROOT / name).is_dir() for name in named)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_file_has_a_target(page: Path) -> None:
    for link in re.findall(r"\]\(([^)#]+)[^)]*\)", page.read_text()):
        assert re.match(r"https?://", link) or (page.parent / link).exists(), link


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_every_link_to_a_section_has_a_target(page: Path) -> None:
    for name, anchor in re.findall(r"\]\(([\w./-]*)#([^)]+)\)", page.read_text()):
        target = page.parent / name if name else page
        if target.suffix == ".md":
            headings = re.findall(r"^#+ (.+)$", target.read_text(), re.MULTILINE)
            anchors = {re.sub(r"[^\w -]", "", each.lower()).replace(" ", "-") for each in headings}
            assert anchor in anchors, f"{name}#{anchor}"
