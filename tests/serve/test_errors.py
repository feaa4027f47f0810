"""The errors' codes are a contract: clients and docs/errors.md rely on them."""

import re
from pathlib import Path

import pytest

from pcae_serve import errors
from pcae_serve.errors import Draining, MissingKey, Overloaded, RequestError, one_line, shown

CONTRACT = {
    "budget-too-small": (422, "Budget too small"),
    "cross-site-request": (403, "Cross-site request"),
    "deadline-exceeded": (504, "Deadline exceeded"),
    "draining": (503, "Server is shutting down"),
    "dropped": (503, "Request dropped"),
    "engine-failed": (500, "Inference failed"),
    "forbidden": (403, "Forbidden"),
    "headers-too-large": (431, "Request headers too large"),
    "rate-limited": (429, "Rate limit exceeded"),
    "internal-error": (500, "Internal error"),
    "invalid-parameter": (422, "Invalid parameter"),
    "malformed-http": (400, "Malformed HTTP"),
    "malformed-request": (400, "Malformed request"),
    "method-not-allowed": (405, "Method not allowed"),
    "missing-key": (401, "API key required"),
    "out-of-memory": (503, "Out of memory"),
    "out-of-service": (503, "Out of service"),
    "overloaded": (503, "Server overloaded"),
    "over-share": (503, "Share used up"),
    "reload-failed": (422, "Reload failed"),
    "reload-in-progress": (409, "Reload already in progress"),
    "starting": (503, "Server is starting"),
    "target-too-long": (414, "Request target too long"),
    "task-not-supported": (404, "Task not supported by this bundle"),
    "too-large": (413, "Request too large"),
    "too-many-connections": (503, "Too many connections"),
    "too-much-framing": (413, "Too much framing"),
    "unknown-host": (403, "Unknown host"),
    "unknown-model": (404, "Unknown model"),
    "unknown-route": (404, "Unknown route"),
    "unreadable-image": (400, "Unreadable image"),
    "unsupported-type": (415, "Unsupported type"),
    "upload-timeout": (408, "Upload timed out"),
}
CLASSES = RequestError.__subclasses__()


def test_codes_statuses_and_titles() -> None:
    assert {each.code: (each.status, each.title) for each in CLASSES} == CONTRACT
    assert len(CLASSES) == len(CONTRACT)  # no code twice
    assert all(not each.__subclasses__() for each in CLASSES)


def test_every_error_is_documented() -> None:
    text = (Path(__file__).parents[2] / "docs" / "errors.md").read_text()
    rows = re.findall(r"^\| `([a-z-]+)` \| (\d+) \| (.+?) \| (.+?) \| (.+?) \|$", text, re.M)
    assert {code: (int(status), title) for code, status, title, *_ in rows} == CONTRACT
    assert len(rows) == len(CONTRACT)


def test_the_tree_in_the_docstring_is_complete() -> None:
    drawn = re.findall(r"├── (\w+) +(\d{3})|└── (\w+) +(\d{3})", errors.__doc__ or "")
    assert {(a or c, int(b or d)) for a, b, c, d in drawn} == {
        (each.__name__, each.status) for each in CLASSES
    }


def test_the_type_is_built_from_the_code() -> None:
    assert Overloaded("busy").type == "urn:pcae-serve:overloaded"


@pytest.mark.parametrize(
    ("error", "headers"),
    [
        (Overloaded("busy"), {}),
        (Overloaded("busy", retry_after_s=0.2), {"Retry-After": "1"}),
        (Draining(retry_after_s=1.5), {"Retry-After": "2"}),
        (MissingKey("send one"), {"WWW-Authenticate": "Bearer"}),
    ],
)
def test_headers(error: RequestError, headers: dict[str, str]) -> None:
    assert error.headers == headers


def test_a_callers_text_is_escaped_and_short() -> None:
    assert shown("\x1b[31m") == r"'\x1b[31m'"
    assert len(shown("x" * 1000)) < 100
    assert one_line(ValueError("first\nsecond")) == "first"
    assert one_line(ValueError()) == "ValueError"
