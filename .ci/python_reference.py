"""The public Python names as Markdown: their signatures and docstrings."""

import inspect
import re
import typing
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pcae_serve
from pcae_serve import client, errors

#: Arguments of the clients that tests replace.
OF_TESTS = {"transport", "clock", "sleep"}
#: A parameter at the start of a line of a docstring.
PARAMETER = re.compile(r"^([a-z_]+\d?): ")
CLASSES: tuple[tuple[type, tuple[str, ...]], ...] = (
    (pcae_serve.Model, ("classify", "embed", "tiers", "close")),
    (pcae_serve.Client, ("classify", "embed", "tiers", "ready", "close")),
    (pcae_serve.AsyncClient, ("classify", "embed", "tiers", "ready", "close")),
)
ERRORS = (
    *(client.ClientError, client.Refused, client.BudgetExceeded, client.NotReachable),
    *(errors.PcaeError, errors.BundleError, errors.StartError, errors.RequestError),
)


def python_reference() -> str:
    """Return one section per public name, and one on the errors."""
    lines = ["## pcae_serve.load", "", *_function("load", pcae_serve.load)]
    described: set[str] = set()
    for kind, names in CLASSES:
        lines += [f"## pcae_serve.{kind.__name__}", "", *_docstring(kind)]
        if kind is not pcae_serve.Model:  # a Model comes from `load`
            create = vars(kind)["__init__"]
            lines += ["```python", _signature(kind.__name__, create), "```", ""]
            lines += _docstring(create)
        for name in names:
            method = getattr(kind, name)
            lines += [f"### {kind.__name__}.{name}", "", *_function(name, method, described)]
    lines += ["## Errors", ""]
    for error in ERRORS:
        base = error.__mro__[1].__name__
        lines += [f"### {error.__module__}.{error.__name__}", "", f"A subclass of `{base}`.", ""]
        lines += _docstring(error)
        values = inspect.getmembers_static(error, lambda each: isinstance(each, property))
        lines += [f"- `{name}`: {inspect.getdoc(value)}" for name, value in values]
        lines += [""] if values else []
    return "\n".join(lines)


def _function(
    name: str, function: Callable[..., Any], described: set[str] | None = None
) -> Iterator[str]:
    """Yield a signature, and a docstring unless it was given before."""
    yield from ("```python", _signature(name, function), "```", "")
    text = inspect.getdoc(function) or ""
    if described is None or text not in described:
        yield from _docstring(function)
    else:
        yield from ("As above.", "")
    if described is not None:
        described.add(text)


def _signature(name: str, function: Callable[..., Any]) -> str:
    """Return a signature as it would be written, one parameter a line if it is long."""
    signature = inspect.signature(function)
    words: list[str] = []
    starred = False
    for parameter in signature.parameters.values():
        if parameter.name == "self" or parameter.name in OF_TESTS:
            continue
        if parameter.kind is parameter.KEYWORD_ONLY and not starred:
            words, starred = [*words, "*"], True
        shown = f"{parameter.name}: {_annotation(parameter.annotation)}"
        if parameter.default is not parameter.empty:
            shown += f" = {_default(parameter.default)}"
        words.append(shown)
    answers = [signature.return_annotation]
    if answers == [Any]:
        overloads = map(inspect.signature, typing.get_overloads(function))
        answers = [each.return_annotation for each in overloads]
    shown_answers = [_annotation(each) for each in answers if each is not Any]
    end = f") -> {' | '.join(shown_answers)}"
    word = "async def" if inspect.iscoroutinefunction(function) else "def"
    start = f"class {name}(" if function.__name__ == "__init__" else f"{word} {name}("
    end = ")" if function.__name__ == "__init__" else end
    one_line = f"{start}{', '.join(words)}{end}"
    if len(one_line) <= 90:
        return one_line
    return "\n".join([start, *(f"    {each}," for each in words), end])


def _annotation(annotation: Any) -> str:
    if isinstance(annotation, str):
        return annotation
    if annotation is None:
        return "None"
    shown = inspect.formatannotation(annotation)
    return re.sub(r"\b(?:typing|collections\.abc|PIL|pcae_serve\.schemas)\.", "", shown)


def _default(value: object) -> str:
    return "…" if isinstance(value, Path) else repr(value)  # the cache folder of who runs this


def _docstring(named: Any) -> Iterator[str]:
    """Yield a docstring as Markdown: parameters as a list, examples as code, files as links."""
    for paragraph in (inspect.getdoc(named) or "").split("\n\n"):
        text = inspect.cleandoc(paragraph)
        if text.startswith(">>>"):
            yield from ("```pycon", text, "```", "")
            continue
        text = re.sub(r"transport, clock, sleep: .*", "", text)
        text = re.sub(r"\bdocs/(\w+\.md)", r"[\1](\1)", text.replace("<", "&lt;"))
        listed = PARAMETER.match(text) is not None
        for line in text.splitlines():
            if not listed:
                yield line.rstrip()
            elif PARAMETER.match(line):
                yield PARAMETER.sub(r"- `\1`: ", line.rstrip(), count=1)
            else:
                yield f"  {line.strip()}"
        yield ""
