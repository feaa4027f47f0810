"""Parse JSON from untrusted files, within bounds.

Python's parser accepts more than JSON: NaN, numbers beyond every range, duplicate names, half
characters. Each of these, and nesting beyond any use, raises ValueError with one line.
"""

import json
import math
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any, NoReturn

from pcae_serve.bounded_file import read_regular

#: Levels of arrays and objects.
MAX_DEPTH = 32

#: Digits of an integer: as many as 64 bits need.
MAX_DIGITS = 20

#: Enough for the labels of ImageNet-21k in both directions, as config.json has them.
CONFIG_BYTES = 8_000_000


def read_json(path: Path, max_bytes: int = CONFIG_BYTES) -> Any:
    """Return the content of a JSON file.

    Raise OSError if it is not a regular file, cannot be read or is larger, and ValueError if it is
    not valid.
    """
    return parse_json(read_regular(path, max_bytes))


def parse_json(raw: bytes) -> Any:
    """Parse a JSON document in UTF-8. Raise ValueError with one line if it is not valid."""
    try:
        text = raw.decode("utf-8-sig")
    except UnicodeDecodeError:
        raise ValueError("it is not UTF-8 text") from None
    try:
        content = json.loads(
            text,
            parse_int=_parse_int,
            parse_float=_parse_float,
            parse_constant=_refuse_constant,
            object_pairs_hook=_refuse_duplicates,
        )
    except RecursionError:
        raise ValueError(_TOO_DEEP) from None
    if text.count("[") + text.count("{") > MAX_DEPTH:
        _check_depth(content)
    if "\\ud" in text.lower():
        _check_characters(content)
    return content


_TOO_DEEP = f"it is nested more than {MAX_DEPTH} levels deep"


def _parse_int(text: str) -> int:
    if len(text.lstrip("-")) > MAX_DIGITS:
        raise ValueError(f"a number has more than {MAX_DIGITS} digits")
    return int(text)


def _parse_float(text: str) -> float:
    number = float(text)
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:20]} is too large")
    return number


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _refuse_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    content = dict(pairs)
    if len(content) < len(pairs):
        twice, _ = Counter(name for name, _ in pairs).most_common(1)[0]
        raise ValueError(f"the name {twice[:40]!a} appears twice in one object")
    return content


def _check_depth(content: Any) -> None:
    level = [content]
    for _ in range(MAX_DEPTH + 1):
        level = [child for value in level for child in _children(value)]
        if not level:
            return
    raise ValueError(_TOO_DEEP)


def _check_characters(content: Any) -> None:
    """Raise ValueError if a string holds half a surrogate pair: it could never be sent."""
    level = [content]
    while level:
        names = [name for value in level if isinstance(value, dict) for name in value]
        for text in (*names, *(value for value in level if isinstance(value, str))):
            if any("\ud800" <= character <= "\udfff" for character in text):
                raise ValueError("a string holds half of a surrogate pair")
        level = [child for value in level for child in _children(value)]


def _children(value: Any) -> Iterator[Any]:
    if isinstance(value, dict):
        yield from value.values()
    elif isinstance(value, list):
        yield from value
