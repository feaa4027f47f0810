"""Parameters from query, header and form: obeyed, or refused."""

from urllib.parse import urlencode

import pytest
from starlette.requests import Request

from pcae_serve.api import parameters
from pcae_serve.api.parameters import ClassifyParameters, ImageParameters
from pcae_serve.errors import InvalidParameter

Pairs = list[tuple[str, str]]


def request(query: Pairs | None = None, *budgets: str) -> Request:
    headers = [(b"x-latency-budget-ms", budget.encode()) for budget in budgets]
    return Request(
        {
            "type": "http",
            "method": "POST",
            "query_string": urlencode(query or []).encode(),
            "headers": headers,
        }
    )


def test_defaults() -> None:
    read = parameters.read(ClassifyParameters, request())
    assert read == ClassifyParameters()
    assert (read.tier, read.budget_ms, read.top_k, read.explain) == ("auto", None, 5, False)


def test_each_place_counts() -> None:
    read = parameters.read(
        ClassifyParameters,
        request([("tier", "fast")], "50"),
        [("top_k", "1"), ("explain", "true"), ("min_tier", " mid ")],
    )
    assert read == ClassifyParameters(
        tier="fast", budget_ms=50, top_k=1, explain=True, min_tier="mid"
    )


@pytest.mark.parametrize(
    ("query", "budgets", "fields"),
    [
        ([("budget_ms", "50")], ["50.0"], [("budget_ms", "5e1")]),
        ([("tier", "fast"), ("tier", "fast")], [], [("tier", "fast")]),
        ([("explain", "1")], [], [("explain", "true")]),
    ],
)
def test_a_value_may_be_repeated(query: Pairs, budgets: list[str], fields: Pairs) -> None:
    parameters.read(ClassifyParameters, request(query, *budgets), fields)


@pytest.mark.parametrize(
    ("query", "budgets", "fields", "message"),
    [
        ([("budget_ms", "50")], ["60"], [], "budget_ms is '50' in the query and '60' in the head"),
        ([], ["50", "60"], [], "budget_ms is '50' in the header and '60' in the header"),
        ([("tier", "fast")], [], [("tier", "full")], "tier is 'fast' in the query and 'full' in"),
        ([("tier", "fast"), ("tier", "full")], [], [], "give it once"),
        # given, and equal to the default: a value as any other
        ([("tier", "auto")], [], [("tier", "full")], "tier is 'auto' in the query and 'full'"),
    ],
)
def test_values_that_disagree(
    query: Pairs, budgets: list[str], fields: Pairs, message: str
) -> None:
    with pytest.raises(InvalidParameter, match=message):
        parameters.read(ClassifyParameters, request(query, *budgets), fields)


@pytest.mark.parametrize(
    ("name", "hint"),
    [
        ("topk", "did you mean top_k?"),
        ("budget", "did you mean budget_ms?"),
        ("Tier", "did you mean tier?"),
        ("min-tier", "did you mean min_tier?"),
        ("api_key", "known are tier, budget_ms, min_tier, explain, top_k"),
        ("", "known are "),
    ],
)
def test_an_unknown_name(name: str, hint: str) -> None:
    for given in (request([(name, "1")]), []), (request(), [(name, "1")]):
        with pytest.raises(InvalidParameter, match="unknown parameter") as caught:
            parameters.read(ClassifyParameters, *given)
        assert hint in caught.value.detail


def test_features_have_no_top_k() -> None:
    with pytest.raises(InvalidParameter, match="unknown parameter 'top_k' in the query"):
        parameters.read(ImageParameters, request([("top_k", "1")]))


@pytest.mark.parametrize("value", ["0", "-1", "nan", "inf", "1e9", "soon", "", "0x10"])
def test_an_invalid_budget(value: str) -> None:
    with pytest.raises(InvalidParameter, match="budget_ms"):
        parameters.read(ClassifyParameters, request([("budget_ms", value)]))
    with pytest.raises(InvalidParameter, match="X-Latency-Budget-Ms"):
        parameters.read(ClassifyParameters, request([], value))


def test_the_document_has_every_parameter() -> None:
    document = {each["name"]: each for each in parameters.openapi(ClassifyParameters)}
    assert set(document) == {*ClassifyParameters.model_fields, parameters.BUDGET_HEADER}
    assert document["budget_ms"]["schema"] == {
        "type": "number",
        "exclusiveMinimum": 0,
        "maximum": parameters.MAX_BUDGET_MS,
    }
    assert document["top_k"]["schema"] == {"type": "integer", "default": 5, "minimum": 1}
    assert set(parameters.openapi_fields(ImageParameters)) == set(ImageParameters.model_fields)
