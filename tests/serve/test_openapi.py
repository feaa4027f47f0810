"""The whole OpenAPI document against a server on a socket: no 500, and no undocumented answer.

schemathesis makes the requests, valid and invalid ones, from the document itself.
"""

from collections.abc import Iterator
from typing import Any

import hypothesis
import pytest
import schemathesis
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error
from schemathesis.openapi import from_url
from schemathesis.specs.openapi.checks import (
    ignored_auth,
    negative_data_rejection,
    positive_data_acceptance,
)

from pcae_serve import bundle
from pcae_serve.app import create_app
from pcae_serve.schemas import Classification, Problem
from pcae_serve.service import Service
from pcae_serve.settings import Settings
from tests.serve.test_faults import ADMIN, serving

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


OPERATIONS = [
    (method, path)
    for path, methods in create_app(
        Service(Settings(), bundle.load(bundle.demo()), engines=[]), print
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
    def answers(case: schemathesis.Case) -> None:
        response = case.call(timeout=30)
        assert response.status_code < 500 or response.status_code in (503, 504), response.text
        case.validate_response(response, excluded_checks=UNCHECKED)

    answers()


def test_the_document_is_whole(document: Any) -> None:
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
