"""Check that every field of another project's configuration file is understood.

A configuration is read by name: each field that can change an answer is either understood, with a
condition on its value, or the file is refused. `docs/export.md` lists the fields from these tables.
"""

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from math import isfinite
from typing import Any

from pcae_serve.errors import MAX_SHOWN


def as_json(value: object) -> str:
    """Return a value of a JSON document as text, escaped and at most MAX_SHOWN long."""
    text = json.dumps(value, default=str)
    return text if len(text) <= MAX_SHOWN else f"{text[:MAX_SHOWN]}..."


@dataclass(frozen=True)
class Field:
    """A field that is understood: the values that are supported, in words and as a condition."""

    supported: str
    accepts: Callable[[Any], bool]

    @classmethod
    def only(cls, *values: object) -> "Field":
        """Return a field that must have one of the given values."""
        return cls(
            " or ".join(map(as_json, values)),
            lambda found: any(type(found) is type(value) and found == value for value in values),
        )


def is_count(value: object) -> bool:
    """Return whether a value of a JSON document is a positive whole number."""
    return isinstance(value, int) and not isinstance(value, bool) and value > 0


def is_number(value: object) -> bool:
    """Return whether a value of a JSON document is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and isfinite(value)


BOOLEAN = Field("true or false", lambda value: isinstance(value, bool))
COUNT = Field("a positive whole number", is_count)
POSITIVE = Field("a positive number", lambda value: is_number(value) and value > 0)
WHOLE = Field("a whole number", lambda value: type(value) is int and value >= 0)
SQUARE = Field(
    "a number or [n, n]",
    lambda value: (
        is_count(value)
        or (type(value) is list and len(value) == 2 and value[0] == value[1] and is_count(value[0]))
    ),
)


@dataclass(frozen=True)
class FieldTable:
    """The fields of one configuration format."""

    understood: Mapping[str, Field]
    ignorable: frozenset[str]  # they change no answer

    def check(self, file: str, content: Mapping[str, Any]) -> dict[str, Any]:
        """Return the understood fields that have a value.

        null counts as absent. Raise ValueError, with the file, the field and its value, for a value
        that is not supported or a field that is not known.
        """
        found = {}
        for name, value in content.items():
            if value is None or name in self.ignorable:
                continue
            field = self.understood.get(name)
            if field is None:
                raise ValueError(
                    f"{file}: field {as_json(name)} ({as_json(value)}) is not known; remove it if"
                    " it changes no answer of the model (docs/export.md lists what is understood)"
                )
            if not field.accepts(value):
                raise ValueError(
                    f"{file}: {name} is {as_json(value)}; supported: {field.supported}"
                )
            found[name] = value
        return found
