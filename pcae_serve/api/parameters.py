"""Parameters of image requests, from the query, the header and the fields of a form.

A name may be given in several places if its values are equal. Unknown names and values that
disagree are refused: a misspelt budget must not be ignored.
"""

from collections.abc import Iterable, Iterator
from typing import Annotated, Any, NamedTuple, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError
from starlette.requests import Request

from pcae_serve.bundle.features import DType
from pcae_serve.errors import InvalidParameter, shown
from pcae_serve.flags import did_you_mean

#: Header with the same meaning as the parameter budget_ms.
BUDGET_HEADER = "X-Latency-Budget-Ms"
#: Maximum latency budget: one hour.
MAX_BUDGET_MS = 3_600_000


class ImageParameters(BaseModel):
    """Parameters that every image request may have."""

    model_config = ConfigDict(frozen=True)

    tier: str = Field(
        "auto", description="name of a tier, or auto: the most accurate one that meets the budget"
    )
    budget_ms: Annotated[float, Field(gt=0, le=MAX_BUDGET_MS, allow_inf_nan=False)] | None = Field(
        None,
        description="milliseconds from the arrival of the headers until the answer is due;"
        " default: the server's budget_ms (see /tiers)",
    )
    min_tier: str | None = Field(
        None,
        description="cheapest tier that auto may use; if it cannot meet the budget, the request"
        " is refused",
    )
    explain: bool = Field(
        False, description="also return the indices of the patches kept after each stage"
    )


class ClassifyParameters(ImageParameters):
    """Parameters of a request for classes."""

    top_k: int = Field(5, ge=1, description="number of classes to return, most probable first")
    max_looks: Annotated[int, Field(ge=1, le=2)] | None = Field(
        None,
        description="how often the image may run at most: 1 forbids a second look on a better tier;"
        " default: the server's max_looks",
    )


class EmbedParameters(ImageParameters):
    """Parameters of a request for features."""

    normalize: bool = Field(
        False, description="divide the features by their Euclidean length, so that it is 1"
    )
    dtype: DType = Field("float32", description="number format of the features")
    patches: bool = Field(
        False,
        description="also return the state of every patch, from a bundle that was exported with"
        " --dense",
    )


P = TypeVar("P", bound=ImageParameters)


class _Given(NamedTuple):
    where: str  # "query", "header" or "form"
    name: str
    value: str


def require_no_query(request: Request) -> None:
    """Raise InvalidParameter if a request has a query that its route does not read."""
    if (name := next(iter(request.query_params), None)) is not None:
        raise InvalidParameter(
            f"unknown query parameter {shown(name)}: this route takes its parameters in the body"
        )


def read(kind: type[P], request: Request, fields: Iterable[tuple[str, str]] = ()) -> P:
    """Return the parameters of a request. `fields`: those of its form, once it has been received.

    Raises InvalidParameter if a name is unknown, a value is invalid, or two values disagree.
    """
    first = dict[str, _Given]()
    values = dict[str, Any]()
    for given in _given(request, fields):
        value = _validated(kind, given)
        if given.name in values and values[given.name] != value:
            other = first[given.name]
            raise InvalidParameter(
                f"{given.name} is {shown(other.value)} in the {other.where} and"
                f" {shown(given.value)} in the {given.where}; give it once"
            )
        first.setdefault(given.name, given)
        values[given.name] = value
    return kind(**values)


def _given(request: Request, fields: Iterable[tuple[str, str]]) -> Iterator[_Given]:
    for name, value in request.query_params.multi_items():
        yield _Given("query", name, value)
    for value in request.headers.getlist(BUDGET_HEADER):
        yield _Given("header", "budget_ms", value)
    for name, value in fields:
        yield _Given("form", name, value.strip())


def _validated(kind: type[ImageParameters], given: _Given) -> Any:
    """Return the value of one parameter. Raises InvalidParameter."""
    if given.name not in kind.model_fields:
        what = f"parameter {shown(given.name)} in the {given.where}"
        raise unknown(what, given.name, kind.model_fields)
    try:
        return getattr(kind(**{given.name: given.value}), given.name)
    except ValidationError as error:
        message = str(error.errors()[0]["msg"])
        name = BUDGET_HEADER if given.where == "header" else given.name
        raise InvalidParameter(
            f"{name} {shown(given.value)}: {message[:1].lower()}{message[1:]}"
        ) from None


def unknown(what: str, name: str, known: Iterable[str]) -> InvalidParameter:
    """Return the error for an unknown name, with the nearest known one, or all of them."""
    hint = did_you_mean(name, known) or f"; known are {', '.join(known)}"
    return InvalidParameter(f"unknown {what}{hint}")


def openapi(kind: type[ImageParameters]) -> list[dict[str, Any]]:
    """Return the parameters of an OpenAPI operation: those of the query, and the header."""
    schemas = kind.model_json_schema()["properties"]
    query = [
        {
            "name": name,
            "in": "query",
            "required": False,
            "description": schema["description"],
            "schema": _plain(schema),
        }
        for name, schema in schemas.items()
    ]
    header = {
        "name": BUDGET_HEADER,
        "in": "header",
        "required": False,
        "description": "same as the query parameter budget_ms",
        "schema": _plain(schemas["budget_ms"]),
    }
    return [*query, header]


def openapi_fields(kind: type[ImageParameters]) -> dict[str, Any]:
    """Return the schemas of the parameters as fields of a form, by name."""
    return {
        name: {**_plain(schema), "description": schema["description"]}
        for name, schema in kind.model_json_schema()["properties"].items()
    }


def _plain(schema: dict[str, Any]) -> dict[str, Any]:
    """Return a field's schema without title and description; optional fields are just absent."""
    kept = {key: value for key, value in schema.items() if key not in ("title", "description")}
    if "anyOf" in kept:  # X or null
        kept |= next(each for each in kept.pop("anyOf") if each.get("type") != "null")
    if kept.get("default", 0) is None:
        del kept["default"]
    return kept
