"""The playground, and the files of pages: which are served, to whom, and what they may load."""

import hashlib
import json
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.runtime.service import Service
from pcae_serve.web import pages
from tests.support.apps import MakeSettings, fail, problem
from tests.support.gate import Gate

FOLDER = Path(str(pages.FOLDER))
OWN = [path for path in FOLDER.rglob("*") if path.suffix in (".html", ".js", ".css", ".svg")]
DOCUMENTS = Path(__file__).parents[3] / "docs"


@contextmanager
def served(
    settings: MakeSettings, loaded: Bundle, gate: Gate, prefix: str = "", **changes: object
) -> Iterator[TestClient]:
    service = Service(settings(**changes), loaded, [gate])
    app = create_app(service, fail, Keys(frozenset(["a-key-of-some-length"])))
    with TestClient(app, raise_server_exceptions=False, root_path=prefix) as client:
        yield client


def test_the_page_needs_no_key_and_may_load_nothing_else(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate
) -> None:
    with served(settings, small_bundle, gate) as client:
        page = client.get("/")
        assert page.status_code == client.head("/").status_code == 200
        assert page.headers["Content-Security-Policy"] == (
            "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self' blob: data:;"
            " connect-src 'self'; base-uri 'none'; form-action 'self'; frame-ancestors 'none'"
        )
        for name in re.findall(r'(?:src|href)="/assets/([^"]+)"', page.text):
            found = client.get(f"/assets/{name}")
            assert found.status_code == 200
            again = client.get(f"/assets/{name}", headers={"If-None-Match": found.headers["ETag"]})
            assert again.status_code == 304
        problem(client.get("/tiers"), 401)
        for name in ("none.js", "../pages.py", "%2e%2e/settings.py", "", "vendor"):
            problem(client.get(f"/assets/{name}"), 404)


def test_it_can_be_turned_off(settings: MakeSettings, small_bundle: Bundle, gate: Gate) -> None:
    with served(settings, small_bundle, gate, playground=False, docs="off") as client:
        problem(client.get("/"), 404)
        problem(client.get("/assets/playground.css"), 404)
    with served(settings, small_bundle, gate, playground=False) as client:
        problem(client.get("/"), 404)
        assert client.get("/assets/vendor/swagger-ui.css").status_code == 200


def test_a_prefix_stands_in_front_of_all_paths(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate
) -> None:
    with served(settings, small_bundle, gate, prefix="/vision") as client:
        for path in ("/", "/docs"):
            text = client.get(path).text
            assert 'data-prefix="/vision"' in text
            assert 'src="/assets' not in text
            assert 'src="/vision/assets/' in text
        assert client.get("/vision/assets/playground.css").status_code == 200


def test_samples_are_offered_with_the_demo_alone(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate
) -> None:
    with served(settings, load_bundle(demo_path()), gate) as client:
        assert 'data-samples="ankle-boot,' in client.get("/").text
        assert client.get("/assets/samples/bag.png").status_code == 200
    with served(settings, small_bundle, gate) as client:
        assert 'data-samples=""' in client.get("/").text
    for name in pages.SAMPLES:
        sample = (FOLDER / "samples" / f"{name}.png").read_bytes()
        assert sample == (DOCUMENTS / "samples" / f"{name}.png").read_bytes()


def test_a_prefix_is_escaped() -> None:
    assert '"><script' not in pages.playground('/"><script>', samples=False)


@pytest.mark.parametrize("path", OWN, ids=lambda path: str(path.relative_to(FOLDER)))
def test_no_page_names_another_host(path: Path) -> None:
    """In files of others, only namespaces and licences do; the browser tests see what is loaded."""
    if path.parent.name != "vendor":
        text = path.read_text().replace("http://www.w3.org/2000/svg", "")
        assert not re.search(r"https?:|//[a-z]+\.[a-z]", text)
        assert not re.search(r"\son[a-z]+=\"|style=|<script>|eval\(", text)


def test_files_of_others_are_unchanged_and_licensed() -> None:
    vendor = FOLDER / "vendor"
    known = json.loads((vendor / "vendor.json").read_text())
    assert {path.name for path in vendor.iterdir() if path.suffix in (".js", ".css")} == set(known)
    for name, entry in known.items():
        assert hashlib.sha256((vendor / name).read_bytes()).hexdigest() == entry["sha256"]
        assert (vendor / f"{name.partition('.')[0].removesuffix('-bundle')}.LICENSE").exists()
