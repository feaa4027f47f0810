"""What the log lets through, and how requests are told apart in it."""

import asyncio
import json
import logging
import re
import sys
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import pytest
from fastapi import FastAPI, Request
from fastapi.testclient import TestClient
from starlette.types import Message, Scope

from pcae_serve.observability import logs, outcomes
from pcae_serve.observability.logs import (
    MAX_EXCEPTION,
    MAX_FIELD,
    MAX_MESSAGE,
    RequestId,
    clean,
    configure,
    join_counts,
)
from pcae_serve.observability.outcomes import Outcome

ID = re.compile(r"[0-9a-f]{32}")
LINE = re.compile(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\d\.\d{3}Z [A-Z]+ [\w.]+: ")
log = logging.getLogger("pcae_serve.test")


@pytest.fixture
def stderr(capsys: pytest.CaptureFixture[str]) -> Iterator[Callable[[], str]]:
    """What was logged since the last look; logging as it was, afterwards."""
    names = (None, "uvicorn", "uvicorn.error", "uvicorn.access", "httpx2")
    loggers = [logging.getLogger(name) for name in names]
    before = [(each, each.level, each.handlers[:], each.propagate) for each in loggers]
    loggers[-1].setLevel(logging.WARNING)  # the test client's own
    token = logs.request_id.set(None)
    yield lambda: capsys.readouterr().err
    logs.request_id.reset(token)
    for each, level, handlers, propagate in before:
        each.setLevel(level)
        each.handlers[:] = handlers
        each.propagate = propagate
    logging.captureWarnings(False)


def only(text: str) -> dict[str, Any]:
    """The one record of a log in JSON."""
    [line] = text.splitlines()
    document: dict[str, Any] = json.loads(line)
    return document


# --- records


def test_a_record_in_json(stderr: Callable[[], str]) -> None:
    configure("json")
    log.warning("%d images on %s", 3, "full", extra={"fields": {"tier": "full", "ms": 1.5}})
    document = only(stderr())
    assert LINE.match(f"{document.pop('time')} INFO x: ")
    assert document == {
        "level": "WARNING",
        "logger": "pcae_serve.test",
        "message": "3 images on full",
        "tier": "full",
        "ms": 1.5,
    }


def test_a_record_in_text(stderr: Callable[[], str]) -> None:
    configure("text")
    log.info("%(n)d images", {"n": 3})
    assert LINE.sub("", stderr()) == "3 images\n"
    logs.request_id.set("abc")
    log.info("more")
    assert LINE.sub("", stderr()) == "more [abc]\n"
    log.info("of several requests", extra={"request_id": None})
    assert LINE.sub("", stderr()) == "of several requests\n"


def test_the_level_and_the_last_call_count(stderr: Callable[[], str]) -> None:
    configure("json", "debug")
    configure("text", "warning")
    log.info("unheard")
    assert stderr() == ""
    log.warning("heard")
    assert stderr().count("heard") == 1


@pytest.mark.parametrize("name", ["uvicorn.error", "uvicorn.access"])
def test_the_http_servers_records_take_the_same_way(stderr: Callable[[], str], name: str) -> None:
    logger = logging.getLogger(name)
    logger.addHandler(logging.StreamHandler(sys.stderr))
    logger.propagate = False
    configure("json")
    logger.info('%s - "%s %s HTTP/%s" %d', "1.2.3.4:5", "GET", "/livez", "1.1", 200)
    assert only(stderr())["message"] == '1.2.3.4:5 - "GET /livez HTTP/1.1" 200'


def test_warnings_are_records_too(stderr: Callable[[], str]) -> None:
    configure("json")
    with warnings.catch_warnings():
        warnings.simplefilter("always")
        logging.captureWarnings(False)
        configure("json")
        warnings.warn("old", DeprecationWarning, stacklevel=1)
    assert only(stderr())["logger"] == "py.warnings"


def test_fields_that_json_has_no_form_for(stderr: Callable[[], str]) -> None:
    configure("json")
    odd = {"a": float("nan"), "b": None, "c": ["\n"], "d": True, "message": "mine", "e\n": 1}
    log.info("true", extra={"fields": odd})
    document = only(stderr())
    assert document["message"] == "true"
    assert [document[name] for name in "abcd"] == ["nan", None, "['\\n']", True]
    assert document["e\\x0a"] == 1


# --- what clients write

FORGED = "x\r\n2026-11-24T00:00:00.000Z INFO pcae_serve.cli: forged\x1b[2J\x9b1m\u2028\u202e\x00"
VISIBLE = re.compile(r"[\x20-\x7e…]*")


@pytest.mark.parametrize("format", ["text", "json"])
def test_no_argument_makes_a_second_record_or_speaks_to_a_terminal(
    stderr: Callable[[], str], format: logs.Format
) -> None:
    configure(format)
    log.info("asked for %s", FORGED)
    log.info("asked for %(what)s", {"what": FORGED})
    log.info("asked for %s", ValueError(FORGED))
    log.info(f"asked for {FORGED}")
    lines = stderr().splitlines()
    assert len(lines) == 4
    for line in lines:
        assert VISIBLE.fullmatch(line)
        message = json.loads(line)["message"] if format == "json" else LINE.sub("", line, count=1)
        assert VISIBLE.fullmatch(message)
        assert "\\x0d\\x0a2026" in message
        assert "\\x1b[2J\\x9b1m\\u2028\\u202e\\x00" in message


@pytest.mark.parametrize("format", ["text", "json"])
def test_no_exception_makes_a_second_record(stderr: Callable[[], str], format: logs.Format) -> None:
    configure(format)
    try:
        raise ValueError(FORGED)
    except ValueError:
        log.exception("failed")
    text = stderr()
    if format == "json":
        document = only(text)
        assert document["message"] == "failed"
        lines = document["exception"].splitlines()
    else:
        first, *lines = text.splitlines()
        assert LINE.match(first)
        assert all(line.startswith("    ") for line in lines)
    assert lines[0].strip().startswith("Traceback")
    assert all(VISIBLE.fullmatch(line) for line in lines)


@pytest.mark.parametrize("format", ["text", "json"])
def test_every_field_has_an_end(stderr: Callable[[], str], format: logs.Format) -> None:
    configure(format)
    log.info("%s|%s|end", "a" * 10_000_000, ValueError("e" * 10_000_000))
    text = stderr()
    assert text.count("|") == 2  # neither hides what follows it
    assert len(text) < 2 * MAX_FIELD + 300
    log.info("b" * 10_000_000, extra={"fields": {"path": "c" * 10_000_000}})
    assert len(stderr()) < MAX_MESSAGE + MAX_FIELD + 300
    try:
        raise ValueError("\n".join(["d" * 2000] * 5000) + "end")
    except ValueError:
        log.exception("failed")
    text = stderr()
    assert len(text) < 1.1 * MAX_EXCEPTION + 300
    assert text.count("d" * (MAX_FIELD + 1)) == 0


def test_half_a_character_is_written_somehow(stderr: Callable[[], str]) -> None:
    configure("text")
    own = logging.getLogger("pcae_serve.half")
    own.handlers, own.propagate = list(logging.getLogger().handlers[-1:]), False
    own.info("%s", "\ud800")  # not to pytest's own handlers: it cannot report what they hold
    assert stderr().endswith("\\ud800\n")


def test_what_can_be_seen_stays() -> None:
    assert clean("Grüße, 世界 \\ 100 %") == "Grüße, 世界 \\ 100 %"
    assert clean("a" * 501) == "a" * 499 + "…"
    assert clean("a" * 500) == "a" * 500


# --- requests


def application() -> FastAPI:
    app = FastAPI()

    @app.get("/tier")
    async def tier(request: Request) -> str | None:
        request.state.tier = "full"
        log.info("inside")
        await asyncio.create_task(ends())
        return await asyncio.create_task(current())

    async def ends() -> None:
        outcomes.record(Outcome.IN_TIME)

    async def current() -> str | None:
        return logs.request_id.get()

    @app.get("/livez")
    async def livez() -> None:
        pass

    @app.get("/broken")
    async def broken() -> None:
        raise RuntimeError("broken")

    return app


def ask(path: str, headers: dict[str, str] | None = None, *, access_log: bool = True) -> Any:
    app = RequestId(application(), access_log=access_log)
    with TestClient(app, raise_server_exceptions=False) as client:
        return client.get(path, headers=headers)


def test_a_request_has_one_id_everywhere(stderr: Callable[[], str]) -> None:
    configure("json")
    answer = ask("/tier?secret=s3cret", {"Authorization": "Bearer s3cret"})
    id_ = answer.headers["x-request-id"]
    assert ID.fullmatch(id_)
    assert answer.json() == id_  # also in a task of the request's
    text = stderr()
    assert "s3cret" not in text
    inside, end = map(json.loads, text.splitlines())
    assert inside["request_id"] == end["request_id"] == id_
    assert (inside["message"], end["logger"]) == ("inside", "pcae_serve.access")
    assert (end["method"], end["path"], end["status"], end["tier"]) == ("GET", "/tier", 200, "full")
    assert end["outcome"] == "in_time"
    assert end["ms"] > 0
    assert re.fullmatch(r"GET /tier 200 [\d.]+ ms tier=full outcome=in_time", end["message"])
    assert ask("/tier").headers["x-request-id"] != id_


def test_of_several_images_the_access_log_has_how_many_had_each_outcome() -> None:
    ended = outcomes.collect()
    for outcome in (Outcome.IN_TIME, Outcome.EXPIRED, Outcome.IN_TIME):
        outcomes.record(outcome)
    assert join_counts(ended) == join_counts(ended[::-1]) == "expired:1,in_time:2"
    assert join_counts(ended[:1]) == "in_time"


@pytest.mark.parametrize("id_", ["a", "Ab3._-", "x" * 128])
def test_a_clients_own_id_is_kept(id_: str) -> None:
    assert ask("/tier", {"X-Request-ID": id_}).headers["x-request-id"] == id_


@pytest.mark.parametrize("id_", ["", "x" * 129, "a b", "a;b", "a\x1b[2J", "a\n", "ü".encode()])
def test_what_is_no_id_is_replaced(id_: str | bytes) -> None:
    value = id_ if isinstance(id_, bytes) else id_.encode()
    [start, *_], _ = asgi("/tier", [(b"x-request-id", value)])
    [told] = [value for name, value in start["headers"] if name == b"x-request-id"]
    assert ID.fullmatch(told.decode())


def test_of_two_ids_neither_is_taken() -> None:
    [start, *_], _ = asgi("/tier", [(b"x-request-id", b"a"), (b"x-request-id", b"b")])
    assert [len(v) for name, v in start["headers"] if name == b"x-request-id"] == [32]


def test_a_failure_has_its_id_in_answer_and_log(stderr: Callable[[], str]) -> None:
    configure("json")
    answer = ask("/broken", {"X-Request-ID": "mine"})
    assert (answer.status_code, answer.headers["x-request-id"]) == (500, "mine")
    assert only(stderr())["status"] == 500


def test_what_the_http_server_says_of_a_failure_has_its_id(stderr: Callable[[], str]) -> None:
    async def fails(*_: Any) -> None:
        raise RuntimeError("broken")

    async def serve() -> None:
        scope = {"type": "http", "method": "GET", "path": "/", "headers": []}
        try:
            await RequestId(fails)(scope, none, none)
        except RuntimeError:
            logging.getLogger("uvicorn.error").exception("in the application")

    async def none(*_: Any) -> Any:
        pass

    configure("json")
    asyncio.run(serve())
    end, server = map(json.loads, stderr().splitlines())
    assert end["status"] == 500
    assert end["request_id"] == server["request_id"]


def test_a_request_that_is_cut_off_is_logged_without_a_status(stderr: Callable[[], str]) -> None:
    entered = asyncio.Event()

    async def waits(*_: Any) -> None:
        entered.set()
        await asyncio.Event().wait()

    async def receive() -> Message:
        raise AssertionError

    async def serve() -> None:
        scope: Scope = {"type": "http", "method": "GET", "path": "/\x1b", "headers": []}
        task = asyncio.create_task(RequestId(waits)(scope, receive, waits))
        await entered.wait()
        task.cancel()
        await asyncio.wait([task])

    configure("json")
    asyncio.run(serve())
    end = only(stderr())
    assert end["status"] is None
    assert end["path"] == "/\\x1b"
    assert end["message"].startswith("GET /\\x1b - ")


def test_probes_are_quiet_while_all_is_well(stderr: Callable[[], str]) -> None:
    configure("json")
    ask("/livez")
    assert stderr() == ""
    ask("/readyz")  # there is none: 404
    assert only(stderr())["status"] == 404
    configure("json", "debug")
    ask("/livez")
    assert "/livez 200" in stderr()


def test_the_access_log_can_be_turned_off(stderr: Callable[[], str]) -> None:
    configure("json")
    answer = ask("/tier", access_log=False)
    assert ID.fullmatch(answer.headers["x-request-id"])
    assert only(stderr())["message"] == "inside"


def test_a_client_that_leaves_can_be_noticed_behind_it() -> None:
    seen = asgi("/tier", [], app=disconnects)[1]
    assert seen == [{"type": "http.disconnect"}]


async def disconnects(_: Scope, receive: Callable[..., Any], __: Any, seen: list[Message]) -> None:
    seen.append(await receive())


def asgi(
    path: str, headers: list[tuple[bytes, bytes]], app: Any = None
) -> tuple[list[Message], list[Message]]:
    """What is sent for a GET with headers that a client library would not send, and `seen`."""
    sent: list[Message] = []
    seen: list[Message] = []

    async def receive() -> Message:
        return {"type": "http.disconnect"}

    async def send(message: Message) -> None:
        sent.append(message)

    async def inner(scope: Scope, receive: Any, send: Any) -> None:
        await app(scope, receive, send, seen)

    scope = {
        "type": "http", "method": "GET", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": headers, "http_version": "1.1", "scheme": "http",
        "server": ("test", 80), "client": ("test", 1), "asgi": {"version": "3.0"},
    }  # fmt: skip
    asyncio.run(RequestId(application() if app is None else inner)(scope, receive, send))
    return sent, seen


def test_what_is_no_request_passes() -> None:
    seen: list[str] = []

    async def app(scope: Scope, *_: Any) -> None:
        seen.append(scope["type"])

    scope: Scope = {"type": "lifespan"}
    asyncio.run(RequestId(app)(scope, app, app))  # type: ignore[arg-type]
    assert seen == ["lifespan"]
    assert scope == {"type": "lifespan"}
