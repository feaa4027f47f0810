"""The routes of the server and their documents as Markdown, from its OpenAPI document."""

from collections.abc import Iterator
from http import HTTPStatus
from itertools import groupby
from typing import Any

from pcae_serve.api.app import create_app
from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.runtime.service import Service
from pcae_serve.settings import Settings


def rest_reference() -> str:
    """Return one section per group of routes, one on headers and one on documents."""
    service = Service(Settings(), load_bundle(demo_path()), engines=[])
    document = create_app(service, print).openapi()
    operations = [
        (f"{method.upper()} {path}", operation)
        for path, methods in document["paths"].items()
        for method, operation in methods.items()
    ]
    lines = []
    for tag, routes in groupby(operations, key=lambda each: each[1]["tags"][0]):
        lines += [f"## {tag}", "", *_tag(dict(routes))]
    lines += ["## Headers of answers", "", *_headers(dict(operations))]
    lines += ["## Documents", ""]
    for name, schema in sorted(document["components"]["schemas"].items()):
        lines += _document(name, schema)
    return "\n".join(lines)


def _tag(routes: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the lines on routes; one that does the same as an earlier one is named with it."""
    first: dict[tuple[str, str], list[str]] = {}
    for route, operation in routes.items():
        key = (route.partition(" ")[0], operation["description"])
        first.setdefault(key, []).append(route)
    for (_, description), names in first.items():
        operation = routes[names[-1]]  # has the parameters of the others, too
        yield from (f"### {names[0]}", "", description, "")
        if len(names) > 1:
            yield from (f"Also {', '.join(f'`{name}`' for name in names[1:])}.", "")
        if body := operation.get("requestBody"):
            yield from (f"Body: {', '.join(f'`{kind}`' for kind in body['content'])}.", "")
        if parameters := operation.get("parameters"):
            yield from ("| parameter | in | type | default | meaning |", "| --- " * 5 + "|")
            yield from map(_parameter, parameters)
            yield ""
        yield from ("| status | body | meaning |", "| --- " * 3 + "|")
        for status, response in sorted(operation["responses"].items()):
            yield _row(status, _bodies(response), _meaning(status, response["description"]))
        yield ""


def _parameter(parameter: dict[str, Any]) -> str:
    schema = parameter["schema"]
    default = f"`{_value(schema['default'])}`" if "default" in schema else "–"  # noqa: RUF001
    meaning = parameter.get("description", "")
    limits = {"minimum": "≥", "exclusiveMinimum": ">", "maximum": "≤"}
    bounds = [f"{sign} {schema[name]:,}" for name, sign in limits.items() if name in schema]
    if bounds:
        meaning += f" ({', '.join(bounds)})"
    return _row(f"`{parameter['name']}`", parameter["in"], _type(schema), default, meaning)


def _bodies(response: dict[str, Any]) -> str:
    """Return the types of an answer's body, or its document as a link."""
    kinds = []
    for kind, content in response.get("content", {}).items():
        schema = content.get("schema", {})
        kinds.append(_type(schema) if "$ref" in schema else f"`{kind}`")
    return " or ".join(dict.fromkeys(kinds))


def _meaning(status: str, description: str) -> str:
    generic = description == "Successful Response"
    return HTTPStatus(int(status)).phrase if generic else description


def _headers(operations: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield a table of the headers, with the statuses that may have them."""
    found: dict[str, tuple[str, set[str]]] = {}
    statuses = set()
    for operation in operations.values():
        for status, response in operation["responses"].items():
            statuses.add(status)
            for name, header in response.get("headers", {}).items():
                found.setdefault(name, (header["description"], set()))[1].add(status)
    yield from ("| header | with status | meaning |", "| --- " * 3 + "|")
    for name, (meaning, with_status) in sorted(found.items()):
        shown = "any" if with_status == statuses else ", ".join(sorted(with_status))
        yield _row(f"`{name}`", shown, meaning)
    yield ""


def _document(name: str, schema: dict[str, Any]) -> Iterator[str]:
    """Yield the lines on one document."""
    yield from (f"### {name}", "")
    if text := schema.get("description"):
        yield from (text, "")
    yield from ("| field | type | meaning |", "| --- " * 3 + "|")
    required = schema.get("required", [])
    for field, part in schema["properties"].items():
        meaning = part.get("description", "")
        if field not in required:
            meaning += "; may be absent" if meaning else "may be absent"
        yield _row(f"`{field}`", _type(part), meaning)
    yield ""


def _type(schema: dict[str, Any]) -> str:
    """Return a type as Markdown: a word, `[T]` for an array, or a link to a document."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(map(_type, schema["anyOf"]))
    if "enum" in schema or "const" in schema:
        values = schema.get("enum", [schema.get("const")])
        return ", ".join(f"`{value}`" for value in values)
    match schema.get("type"):
        case "array":
            [item] = {_type(each) for each in schema.get("prefixItems") or [schema["items"]]}
            return f"array of {item}"
        case "object" if isinstance(schema.get("additionalProperties"), dict):
            return f"object of {_type(schema['additionalProperties'])}"
        case None:
            return "any"
        case name:
            return str(name)


def _value(default: object) -> str:
    return str(default).lower() if isinstance(default, bool) else str(default)


def _row(*cells: str) -> str:
    shown = (" ".join(cell.split()).replace("|", "\\|").replace("*", "\\*") for cell in cells)
    return f"| {' | '.join(shown)} |"
