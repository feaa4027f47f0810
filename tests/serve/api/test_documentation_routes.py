"""/docs and /openapi.json, and who may read them."""

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
from fastapi.testclient import TestClient

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.reader import Bundle
from pcae_serve.runtime.service import Service
from tests.support.apps import MakeSettings, fail, problem
from tests.support.gate import Gate

KEY = "a-key-of-some-length"
PAGES = ("/docs", "/openapi.json")


@contextmanager
def documented(
    settings: MakeSettings, bundle: Bundle, gate: Gate, docs: str, *, keys: bool = True
) -> Iterator[TestClient]:
    service = Service(settings(docs=docs), bundle, [gate])
    app = create_app(service, fail, Keys(frozenset([KEY])) if keys else None)
    with TestClient(app, raise_server_exceptions=False) as client:
        yield client


@pytest.mark.parametrize("page", PAGES)
def test_they_are_open_by_default(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate, page: str
) -> None:
    assert settings().docs == "open"
    with documented(settings, small_bundle, gate, "open") as client:
        assert client.get(page).status_code == 200
        assert client.head(page).status_code == 200


@pytest.mark.parametrize("page", PAGES)
def test_they_may_need_a_key(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate, page: str
) -> None:
    with documented(settings, small_bundle, gate, "keys") as client:
        problem(client.get(page), 401)
        problem(client.get(page, headers={"X-API-Key": "another-key-of-some-length"}), 403)
        assert client.get(page, headers={"X-API-Key": KEY}).status_code == 200
    with documented(settings, small_bundle, gate, "keys", keys=False) as client:
        assert client.get(page).status_code == 200


@pytest.mark.parametrize("page", [*PAGES, "/redoc", "/docs/oauth2-redirect"])
def test_they_may_be_off(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate, page: str
) -> None:
    with documented(settings, small_bundle, gate, "off") as client:
        problem(client.get(page, headers={"X-API-Key": KEY}), 404)


def test_what_may_be_tried_again_says_when(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate
) -> None:
    with documented(settings, small_bundle, gate, "open") as client:
        responses = client.get("/openapi.json").json()["paths"]["/classify"]["post"]["responses"]
    timed = {status for status, each in responses.items() if "Retry-After" in each["headers"]}
    assert timed == {"429", "503"}


def test_the_document_does_not_list_itself(
    settings: MakeSettings, small_bundle: Bundle, gate: Gate
) -> None:
    with documented(settings, small_bundle, gate, "open") as client:
        document = client.get("/openapi.json").json()
        assert "/classify" in document["paths"]
        assert not {*PAGES} & document["paths"].keys()
        assert client.app.openapi() == document  # type: ignore[attr-defined]
