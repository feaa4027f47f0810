"""The whole OpenAPI document against a server on a socket: no 500, and no undocumented answer.

schemathesis makes the requests, valid and invalid ones, from the document itself.
"""

from collections.abc import Callable, Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from fastapi.testclient import TestClient
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_url
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)

from pcae_serve.api.app import create_app
from pcae_serve.api.auth import Keys
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.observability.logs import RequestId
from pcae_serve.runtime.service import Service
from pcae_serve.schemas import Classification, Problem
from pcae_serve.settings import Settings
from tests.support.apps import wait_until
from tests.support.faulty_server import ADMIN, serving
from tests.support.gate import Gate
from tests.support.images import image_bytes

#: What cannot hold here, or is tested elsewhere.
UNCHECKED = [
    not_a_server_error,  # refusals are 503 and 504, documented; 500 is looked for here
    positive_data_acceptance,  # bytes drawn at random are no image
    negative_data_rejection,  # the same, and every body is bytes
    ignored_auth,  # test_keys.py
]


@pytest.fixture(scope="module")
def document(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("openapi")
    keys = folder / "keys"
    keys.write_text(ADMIN)
    keys.chmod(0o600)
    with serving(folder, "--admin-keys-file", str(keys)) as running:
        yield from_url(f"{running.url}/openapi.json")


#: What HTTP itself needs: no promise of ours.
TRANSPORT = {"connection", "content-length", "content-type", "date", "server"}
TRANSPORT |= {"transfer-encoding"}


def ours(headers: Any) -> set[str]:
    return {name.lower() for name in headers} - TRANSPORT


def documented(response: dict[str, Any]) -> set[str]:
    return {name.lower() for name in response.get("headers", {})}


OPERATIONS = [
    (method, path)
    for path, methods in create_app(
        Service(Settings(), load_bundle(demo_path()), engines=[]), print
    )
    .openapi()["paths"]
    .items()
    for method in methods
]


@pytest.mark.parametrize("mode", list(GenerationMode))
@pytest.mark.parametrize(("method", "path"), OPERATIONS)
def test_every_answer_is_documented(
    document: Any, method: str, path: str, mode: GenerationMode
) -> None:
    operation = document[path][method]
    if mode is GenerationMode.NEGATIVE and not (operation.query or operation.headers):
        return  # nothing can be said wrongly

    @hypothesis.settings(
        max_examples=12,
        deadline=None,
        derandomize=True,
        database=None,
        suppress_health_check=list(hypothesis.HealthCheck),
    )
    @hypothesis.given(operation.as_strategy(generation_mode=mode))
    def answers(case: schemathesis.Case[Any]) -> None:
        response = case.call(timeout=30)
        assert response.status_code < 500 or response.status_code in (503, 504), response.text
        case.validate_response(response, excluded_checks=UNCHECKED)
        of_status = operation.definition.raw["responses"][str(response.status_code)]
        assert ours(response.headers) <= documented(of_status), response.headers

    answers()


def test_headers_of_refusals_and_answers_are_documented(
    small_bundle: Bundle, settings: Callable[..., Settings], gate: Gate
) -> None:
    service = Service(settings(queue_limit=1), small_bundle, [gate])
    app = create_app(service, print, Keys(frozenset((ADMIN,))))
    seen: dict[str, set[str]] = {}
    image, key = image_bytes(), {"X-API-Key": ADMIN}
    infer = "/v2/models/test/infer"
    requests: list[tuple[str, dict[str, Any]]] = [
        ("/classify", {"content": image}),
        ("/classify/batch", {"files": {"image": image}}),
        (infer, {"content": image, "headers": {"Inference-Header-Content-Length": "0"}}),
    ]

    def ask(client: TestClient, headers: dict[str, str]) -> None:
        for path, how in requests:
            more = headers | how.get("headers", {})
            response = client.post(path, **how | {"headers": more})
            route = path.replace("test", "{name}")
            operation = app.openapi()["paths"][route]["post"]
            allowed = documented(operation["responses"][str(response.status_code)])
            assert ours(response.headers) <= allowed, (path, response.status_code)
            seen.setdefault(f"{path} {response.status_code}", set()).update(ours(response.headers))

    gate.shut()  # it cannot get ready
    with TestClient(RequestId(app)) as client:
        ask(client, {})
        ask(client, key)
        gate.open.set()
        wait_until(lambda: service.ready)
        ask(client, key)
    for path, _ in requests:
        assert seen[f"{path} 401"] == {"x-request-id", "www-authenticate"}
        assert seen[f"{path} 503"] == {"x-request-id", "retry-after"}
        assert seen[f"{path} 200"] == {"x-request-id", "server-timing"}


def test_the_document_is_complete(document: Any) -> None:
    raw = document.raw_schema
    for path, methods in raw["paths"].items():
        for method, operation in methods.items():
            assert operation.get("description"), (method, path)
            codes = operation["responses"].keys()
            if "requestBody" in operation:
                assert {"200", "400", "413", "422", "500", "503", "504"} <= codes, (method, path)
            for status, answer in operation["responses"].items():
                assert answer["description"], (method, path, status)
    for model, name in ((Classification, "Classification"), (Problem, "Problem")):
        model.model_validate(raw["components"]["schemas"][name]["example"])
