"""The client, sync and async alike: against servers on real sockets, and on a clock of its own."""

import asyncio
import io
import json
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from inspect import Signature, signature
from itertools import pairwise
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from PIL import Image

from pcae_serve.bundle.preprocess import decode_image
from pcae_serve.client import (
    GRACE_S,
    MAX_WAIT_S,
    MIN_LEFT_S,
    MIN_WAIT_S,
    AsyncClient,
    BudgetExceeded,
    Client,
    ClientError,
    NotReachable,
    Refused,
    image_file,
)
from pcae_serve.schemas import Classification
from tests.support.bundles import manifest, write_bundle
from tests.support.images import image_bytes
from tests.support.server_process import server
from tests.support.stand_in import ANSWER, SIMULATED, reserved_port, stand_in


class Blocking:
    """The async client, called as the sync one is."""

    def __init__(self, *arguments: Any, **options: Any) -> None:
        if sleep := options.pop("sleep", None):

            async def asleep(seconds: float) -> None:
                sleep(seconds)

            options["sleep"] = asleep
        self._client = AsyncClient(*arguments, **options)

    def __enter__(self) -> "Blocking":
        self._runner = asyncio.Runner()
        self._runner.run(self._client.__aenter__())
        return self

    def __exit__(self, *_: object) -> None:
        self._runner.run(self._client.__aexit__())
        self._runner.close()

    def __getattr__(self, name: str) -> Callable[..., Any]:
        method = getattr(self._client, name)
        return lambda *arguments, **options: self._runner.run(method(*arguments, **options))


KINDS: dict[str, Any] = {"sync": Client, "async": Blocking}


@pytest.fixture(params=KINDS)
def connect(request: pytest.FixtureRequest) -> Any:
    """Makes a client of either kind."""
    return KINDS[request.param]


@pytest.fixture(scope="module")
def url(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """Address of a real server whose simulated tier "full" takes about 500 ms."""
    root = tmp_path_factory.mktemp("served")
    fast, balanced, full = manifest({})["tiers"]
    tiers = [fast, balanced, full | {"macs": 17_500 * 10**9}]
    bundle = write_bundle(root / "bundle", tiers=tiers)
    # waiting is free: the tests send so quickly that "full" would not be worth its time
    flags = ("--bundle", str(bundle), *SIMULATED, "--budget-ms", "20000", "--waiting-price", "0")
    with server(*flags, cache=root) as (url, _):
        yield url


# what it says, against the server itself


def test_paths_bytes_and_images_are_classified_alike(
    connect: Any, url: str, tmp_path: Path
) -> None:
    file = tmp_path / "bright.png"
    file.write_bytes(image_bytes(250))
    with connect(url) as client, Image.open(file) as image:
        for given_ in (file, str(file), file.read_bytes(), image):
            answer = client.classify(given_, tier="fast", budget_ms=9000, top_k=2, explain=True)
            assert [p.label for p in answer.predictions] == ["bright", "dark"]
            assert answer.tier == "fast"
            assert 0 < answer.budget_ms <= 9000
            assert [len(stage) for stage in answer.kept or []] == [9, 5, 3]


def test_omitted_parameters_take_the_servers_defaults(connect: Any, url: str) -> None:
    with connect(url) as client:
        answer = client.classify(image_bytes())
        assert (answer.tier, answer.budget_ms, answer.kept) == ("full", 20_000, None)
        assert len(answer.predictions) == 4


def test_a_tier_is_chosen_from_the_allowed_ones(connect: Any, url: str) -> None:
    with connect(url) as client:
        answer = client.classify(image_bytes(), tier="balanced", min_tier="fast")
        assert answer.tier == "balanced"


def test_tiers_and_ready(connect: Any, url: str) -> None:
    with connect(f"{url}/") as client:
        assert client.ready()
        offered = client.tiers()
        assert [tier.name for tier in offered.tiers] == ["fast", "balanced", "full"]
        assert offered.tiers[0].accuracy is not None
        assert offered.backend == "simulated"


def test_a_refusal_carries_the_problem_document(connect: Any, url: str) -> None:
    with connect(url) as client:
        with pytest.raises(Refused, match="'full', the fastest allowed") as small:
            client.classify(image_bytes(), min_tier="full", budget_ms=400)
        assert (small.value.status, small.value.title) == (422, "Budget too small")
        assert small.value.type == "urn:pcae-serve:budget-too-small"
        assert small.value.code == "budget-too-small"
        assert small.value.needed_ms is not None
        assert small.value.needed_ms > 400
        with pytest.raises(Refused, match="choose one of fast, balanced, full"):
            client.classify(image_bytes(), tier="turbo")
        with pytest.raises(Refused, match="empty"):
            client.classify(b"")
        with pytest.raises(Refused, match="POST to /classify") as other:
            client.embed(image_bytes())
        assert other.value.status == 404


def test_a_body_that_the_server_does_not_read_still_gets_its_answer(connect: Any, url: str) -> None:
    with connect(url) as client:
        with pytest.raises(Refused, match="choose one of fast, balanced, full"):
            client.classify(bytes(15_000_000), tier="turbo")
        with pytest.raises(Refused, match="20,000,000") as large:
            client.classify(bytes(21_000_000))
        assert large.value.status == 413
        assert client.classify(image_bytes(), tier="fast").predictions


def test_features_of_a_model_without_a_head(tmp_path: Path) -> None:
    models = {"vit": manifest({})["models"]["vit"] | {"answers": "features"}}
    headless = write_bundle(tmp_path / "headless", labels=[], models=models)
    with server("--bundle", str(headless), *SIMULATED, cache=tmp_path) as (url, _):
        for connect in KINDS.values():
            with connect(url) as client:
                answer = client.embed(image_bytes(255), tier="fast", budget_ms=9000)
                assert answer.features == [0, 0, 0, 0, 0, 0, 0, 5]
                assert answer.tier == "fast"
                unit = client.embed(image_bytes(255), normalize=True, dtype="float16")
                assert unit.features == [0, 0, 0, 0, 0, 0, 0, 1]
                with pytest.raises(Refused, match="/embed"):
                    client.classify(image_bytes())


def test_calls_of_the_async_client_run_at_the_same_time(url: str) -> None:
    async def all_of(levels: list[int]) -> list[str]:
        async with AsyncClient(url) as client:
            calls = (client.classify(image_bytes(level), budget_ms=9000) for level in levels)
            return [answer.predictions[0].label for answer in await asyncio.gather(*calls)]

    labels = asyncio.run(all_of([0, 100, 150, 250] * 4))
    assert labels == ["dark", "dim", "light", "bright"] * 4


# images


@pytest.mark.parametrize(
    "mode", ["1", "L", "LA", "P", "RGB", "RGBA", "I;16", "CMYK", "YCbCr", "HSV", "I", "F"]
)
def test_an_image_arrives_with_the_same_pixels(mode: str) -> None:
    pixels = np.random.default_rng(0).integers(0, 256, (9, 7, 3), np.uint8)
    if mode == "I;16":
        image = Image.fromarray(pixels[..., 0].astype(np.uint16) * 257)
        expected = np.repeat(pixels[..., :1], 3, axis=2)
    else:
        image = Image.fromarray(pixels).convert(mode)
        expected = np.asarray(image.convert("RGB"))
    assert image.mode == mode
    np.testing.assert_array_equal(np.asarray(decode_image(image_file(image))), expected)


def test_a_pillow_image_is_rotated_like_its_file() -> None:
    exif = Image.Exif()
    exif[0x0112] = 6  # lies on its side
    file = io.BytesIO()
    pixels = np.random.default_rng(0).integers(0, 256, (8, 16, 3), np.uint8)
    Image.fromarray(pixels).save(file, "JPEG", exif=exif)
    sent = decode_image(image_file(Image.open(file)))
    assert sent.size == (8, 16)
    np.testing.assert_array_equal(np.asarray(sent), np.asarray(decode_image(file.getvalue())))


def test_a_missing_file_is_an_os_error(connect: Any, tmp_path: Path) -> None:
    with connect() as client, pytest.raises(FileNotFoundError, match="nowhere"):
        client.classify(tmp_path / "nowhere.png")


# retries, on a clock that only waiting and the server move


@dataclass(frozen=True)
class Step:
    """What the server does next, and how long it takes."""

    status: int
    took_s: float = 0.0
    members: dict[str, Any] = field(default_factory=dict)
    headers: dict[str, str] = field(default_factory=dict)
    error: type[httpx2.TransportError] | None = None

    def response(self) -> httpx2.Response:
        if self.error is not None:
            raise self.error("it went wrong")
        problem = {"type": "urn:x:y", "title": "Hm", "status": self.status, "detail": "too much"}
        body = json.dumps(ANSWER if self.status == 200 else problem | self.members)
        return httpx2.Response(self.status, text=body, headers=self.headers)


def busy(retry_after_s: float | None = None, took_s: float = 0.0, **members: Any) -> Step:
    retry = {} if retry_after_s is None else {"retry_after_s": retry_after_s}
    return Step(503, took_s, retry | members)


class World:
    """A server that follows a script, a clock, and what was sent when."""

    def __init__(self, *script: Step) -> None:
        self.now_s = 100.0
        self.sent = list[tuple[float, Any]]()  # (when, budget_ms or None)
        self.requests = list[httpx2.Request]()
        self._script = list(script)

    def handle(self, request: httpx2.Request) -> httpx2.Response:
        budget_ms = request.url.params.get("budget_ms")
        self.sent.append((self.now_s, None if budget_ms is None else float(budget_ms)))
        self.requests.append(request)
        step = self._script.pop(0)
        self.now_s += step.took_s
        return step.response()

    def sleep(self, seconds: float) -> None:
        assert seconds > 0
        self.now_s += seconds

    def client(self, connect: Any, **options: Any) -> Any:
        transport = httpx2.MockTransport(self.handle)
        clock = lambda: self.now_s  # noqa: E731
        return connect(transport=transport, clock=clock, sleep=self.sleep, **options)

    def classify(self, connect: Any, budget_ms: float | None) -> Any:
        """The answer, or the error."""
        with self.client(connect) as client:
            try:
                return client.classify(b"image", budget_ms=budget_ms)
            except ClientError as error:
                return error


def test_a_retry_waits_as_told_and_sends_the_remaining_budget(connect: Any) -> None:
    world = World(busy(0.2, took_s=0.01), busy(0.1, took_s=0.02), Step(200, 0.05))
    answer = world.classify(connect, budget_ms=500)
    assert answer.predictions[0].label == "dim"
    assert [when_s for when_s, _ in world.sent] == pytest.approx([100.0, 100.21, 100.33])
    assert [left_ms for _, left_ms in world.sent] == pytest.approx([500, 290, 170])


def test_no_retry_past_the_budget(connect: Any) -> None:
    world = World(busy(0.3), busy(0.3))
    error = world.classify(connect, budget_ms=500)
    assert isinstance(error, Refused)
    assert (error.status, str(error), error.retry_after_s) == (503, "too much", 0.3)
    assert len(world.sent) == 2
    assert world.now_s == pytest.approx(100.3)  # raised at once, not after the wait


@pytest.mark.parametrize(
    ("step", "wait_s"),
    [
        (busy(0.2), 0.2),
        (Step(503, headers={"Retry-After": "1"}), 1.0),
        (Step(429, headers={"Retry-After": "1"}), 1.0),
        (Step(503, members={"retry_after_s": 0.2}, headers={"Retry-After": "1"}), 0.2),
        (Step(503, members={"retry_after_s": "soon"}, headers={"Retry-After": "1"}), 1.0),
        (Step(503, headers={"Retry-After": "Wed, 21 Oct 2015 07:28:00 GMT"}), MIN_WAIT_S),
        (busy(0.0), MIN_WAIT_S),
        (busy(-1.0), None),
        (busy(float("inf")), None),
        (Step(503, headers={"Retry-After": "tomorrow"}), None),
        (busy(), None),
        (busy(0.2, needed_ms=1790), 0.2),
        (busy(0.2, needed_ms=1810), None),
        (busy(1.9985), 1.9985),
        (busy(1.9995), None),
    ],
)
def test_the_wait_before_a_retry(connect: Any, step: Step, wait_s: float | None) -> None:
    world = World(step, Step(200))
    result = world.classify(connect, budget_ms=2000)
    if wait_s is None:
        assert isinstance(result, Refused)
        assert len(world.sent) == 1
    else:
        assert result.tier == "fast"
        assert world.sent[1][0] - world.sent[0][0] == pytest.approx(wait_s)


@pytest.mark.parametrize("status", [400, 401, 404, 413, 415, 422, 500, 502, 504])
def test_other_statuses_are_not_retried(connect: Any, status: int) -> None:
    world = World(Step(status, members={"retry_after_s": 0.01}, headers={"Retry-After": "0"}))
    error = world.classify(connect, budget_ms=60_000)
    assert isinstance(error, BudgetExceeded if status == 504 else Refused)
    assert str(error) == "too much"


def test_without_a_budget_nothing_is_retried(connect: Any) -> None:
    for step in (busy(0.01), Step(0, error=httpx2.ConnectError)):
        world = World(step)
        assert isinstance(world.classify(connect, budget_ms=None), ClientError)
        assert world.sent == [(100.0, None)]


def test_a_budget_that_became_too_small_by_waiting_is_exceeded(connect: Any) -> None:
    script = (busy(0.49), Step(422, members={"needed_ms": 20.0, "detail": "needs 20 ms"}))
    error = World(*script).classify(connect, budget_ms=500)
    assert isinstance(error, BudgetExceeded)
    assert str(error) == (
        "the budget of 500 ms passed without an answer (2 requests); last refusal: too much"
    )
    first = World(script[1]).classify(connect, budget_ms=10)
    assert isinstance(first, Refused)
    assert first.needed_ms == 20


def test_failed_connections_are_retried_with_backoff(connect: Any) -> None:
    deaf = Step(0, error=httpx2.ConnectError)
    world = World(*[deaf] * 100)
    error = world.classify(connect, budget_ms=3000)
    assert isinstance(error, NotReachable)
    waits_s = np.diff([when for when, _ in world.sent])
    assert waits_s[0] == pytest.approx(MIN_WAIT_S)
    assert waits_s.max() == pytest.approx(MAX_WAIT_S)
    assert (np.diff(waits_s) >= -1e-9).all()
    assert world.now_s <= 103
    assert World(deaf, deaf, Step(200)).classify(connect, budget_ms=3000).tier == "fast"


@pytest.mark.parametrize("error", [httpx2.ReadError, httpx2.WriteError, httpx2.RemoteProtocolError])
def test_a_request_that_may_have_arrived_is_not_sent_again(
    connect: Any, error: type[httpx2.TransportError]
) -> None:
    found = World(Step(0, error=error)).classify(connect, budget_ms=3000)
    assert isinstance(found, NotReachable)
    assert "was lost" in str(found)


def test_reading_the_image_counts_against_the_budget(
    connect: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    file, world = tmp_path / "a.png", World(Step(200), Step(200))
    file.write_bytes(b"image")
    read = Path.read_bytes

    def slowly(path: Path) -> bytes:
        world.now_s += 0.3
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", slowly)
    with world.client(connect) as client:
        client.classify(file, budget_ms=500)
        assert world.sent[0] == pytest.approx((100.3, 200))
        with pytest.raises(BudgetExceeded, match="200 ms passed without an answer \\(0 requests"):
            client.classify(file, budget_ms=200)
    assert len(world.sent) == 1


seconds = st.floats(0, 1)
refusals = st.lists(
    st.builds(
        busy,
        st.none() | seconds,
        seconds.map(lambda s: s / 4),
        needed_ms=st.none() | st.floats(0, 500),
    ),
    max_size=30,
)


@given(script=refusals, budget_ms=st.floats(0.5, 4000))
def test_it_never_asks_past_the_budget_nor_gives_up_before(
    script: list[Step], budget_ms: float
) -> None:
    outcomes, sents, last = [], [], Step(200, 0.001)
    for connect in KINDS.values():
        world = World(*script, last)
        result = world.classify(connect, budget_ms)
        end_s = 100.0 + budget_ms / 1e3
        for (when_s, left_ms), step in zip(world.sent, [*script, last], strict=False):
            assert when_s < end_s
            assert left_ms == pytest.approx(max(MIN_LEFT_S, end_s - when_s) * 1e3, abs=2e-3)
            back_s = when_s + step.took_s
        for ((sent_s, _), (again_s, _)), step in zip(pairwise(world.sent), script, strict=False):
            assert again_s - sent_s >= step.took_s + step.members["retry_after_s"] - 1e-9
        assert world.now_s <= max(end_s, back_s) + 1e-9  # waits end before the budget does
        assert all(before > after for (_, before), (_, after) in pairwise(world.sent))
        if isinstance(result, Refused):  # because no wait was given, or there was no time
            members = script[len(world.sent) - 1].members
            after = members.get("retry_after_s")
            if after is not None:
                least_s = max(MIN_LEFT_S, (members["needed_ms"] or 0) / 1e3)
                assert back_s + max(after, MIN_WAIT_S) + least_s > end_s - 1e-9
        else:
            assert result.tier == "fast"
        outcomes.append((type(result), str(result)))
        sents.append(world.sent)
    assert outcomes[0] == outcomes[1]
    assert sents[0] == sents[1]


# what goes wrong on the way


def answer(handler: BaseHTTPRequestHandler) -> None:
    handler.rfile.read(int(handler.headers["Content-Length"]))
    body = json.dumps(ANSWER).encode()
    handler.send_response(200)
    handler.send_header("Content-Length", str(len(body)))
    handler.end_headers()
    handler.wfile.write(body)


def test_connections_are_kept(connect: Any) -> None:
    with stand_in(answer) as (url, connections), connect(url) as client:
        for _ in range(5):
            client.classify(b"image", budget_ms=20_000)
        assert len(connections) == 1


@pytest.mark.parametrize("size", [5, 20_000_000], ids=["answer", "upload"])
def test_a_server_that_hangs_is_not_waited_for(connect: Any, size: int) -> None:
    """Neither reading the answer nor sending a body that no socket buffer holds takes longer."""
    over = threading.Event()

    def hang(_: BaseHTTPRequestHandler) -> None:
        over.wait(60)

    with stand_in(hang) as (url, _), connect(url) as client:
        start_s = time.monotonic()
        with pytest.raises(BudgetExceeded, match="400 ms passed without an answer \\(1 request\\)"):
            client.classify(bytes(size), budget_ms=400)
        took_s = time.monotonic() - start_s
        over.set()
        assert 0.4 + GRACE_S - 0.01 <= took_s < 20


def test_each_stage_of_a_request_gets_what_is_left(connect: Any) -> None:
    left_s = []

    def handle(request: httpx2.Request) -> httpx2.Response:
        for stage in ("connect", "write", "read"):
            left_s.append(request.extensions["timeout"].get(stage))
            world.now_s += 0.15
        return Step(200).response()

    world = World()
    world.handle = handle  # type: ignore[method-assign]
    world.classify(connect, budget_ms=300)
    assert left_s == pytest.approx([0.3 + GRACE_S, 0.15 + GRACE_S, GRACE_S])


def test_a_connection_that_is_lost(connect: Any) -> None:
    def leave(handler: BaseHTTPRequestHandler) -> None:
        handler.connection.shutdown(socket.SHUT_RDWR)

    with stand_in(leave) as (url, connections), connect(url) as client:
        with pytest.raises(NotReachable, match=f"the connection to {url} was lost"):
            client.classify(b"image", budget_ms=20_000)
        assert len(connections) == 1


def test_a_server_that_comes_up_within_the_budget(connect: Any) -> None:
    with reserved_port() as (bound, port), ExitStack() as stack:
        waits_s = list[float]()

        def sleep(seconds: float) -> None:
            waits_s.append(seconds)
            if len(waits_s) == 3:
                stack.enter_context(stand_in(answer, bound))

        with connect(f"http://127.0.0.1:{port}", sleep=sleep) as client:
            assert not client.ready()
            assert client.classify(b"image", budget_ms=20_000).tier == "fast"
    assert waits_s == pytest.approx([0.02, 0.04, 0.08])


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost"])
def test_no_server_listens(connect: Any, host: str) -> None:
    world = World()
    with reserved_port() as (_, port):
        where = f"http://{host}:{port}"
        with connect(where, clock=lambda: world.now_s, sleep=world.sleep) as client:
            expected = f"cannot connect to {where}: Connection refused"
            with pytest.raises(NotReachable, match=expected):
                client.classify(b"image", budget_ms=60)
            with pytest.raises(NotReachable):
                client.tiers()
            assert not client.ready()


def test_an_unknown_host_is_reported_at_once(connect: Any) -> None:
    start_s = time.monotonic()
    expected = pytest.raises(NotReachable, match=r"cannot connect to http://no-such-host\.invalid")
    with connect("http://no-such-host.invalid") as client, expected:
        client.classify(b"image", budget_ms=60_000)
    assert time.monotonic() - start_s < 30


@pytest.mark.parametrize("url", ["ftp://here", "http://", "http://here:99999", "http://[::1", ""])
def test_an_invalid_address(connect: Any, url: str) -> None:
    with pytest.raises(ClientError, match="not an address such as http://127"):
        connect(url)


@pytest.mark.parametrize(
    ("status", "content", "headers"),
    [
        (200, b"<html>", {}),
        (200, b'{"predictions": []}', {}),
        (302, b"", {"Location": "http://elsewhere"}),
    ],
    ids=["page", "other document", "redirect"],
)
def test_another_kind_of_server(
    connect: Any, status: int, content: bytes, headers: dict[str, str]
) -> None:
    response = httpx2.Response(status, content=content, headers=headers)
    with connect(transport=httpx2.MockTransport(lambda _: response)) as client:
        with pytest.raises(NotReachable, match="not pcae-serve") as found:
            client.classify(b"image", budget_ms=500)
        assert str(status) in str(found.value)


@pytest.mark.parametrize("body", ["<html>", "[1]", '{"detail": "two\\nlines"}'])
def test_a_refusal_without_a_problem_document_is_one_line_too(connect: Any, body: str) -> None:
    response = httpx2.Response(502, text=body)
    transport = httpx2.MockTransport(lambda _: response)
    with connect(transport=transport) as client, pytest.raises(Refused) as found:
        client.classify(b"image")
    assert str(found.value) == ("two lines" if "two" in body else "502 Bad Gateway")


@pytest.mark.parametrize("budget_ms", [0, -5, float("nan"), float("inf")])
def test_an_invalid_budget(connect: Any, budget_ms: float) -> None:
    with connect() as client, pytest.raises(ValueError, match="budget_ms must be a number above 0"):
        client.classify(b"image", budget_ms=budget_ms)


def test_the_key_is_sent_with_every_request_and_never_shown(connect: Any) -> None:
    world = World(Step(200), Step(401, members={"detail": "no such key"}))
    with world.client(connect, api_key="s3cret") as client:
        client.classify(b"image", budget_ms=500)
        with pytest.raises(Refused, match="no such key") as refused:
            client.classify(b"image", budget_ms=500)
    assert [request.headers["x-api-key"] for request in world.requests] == ["s3cret"] * 2
    assert "s3cret" not in f"{refused.value!r} {refused.value}"
    plain = World(Step(200))
    plain.classify(connect, 500)
    assert "x-api-key" not in plain.requests[0].headers
    with pytest.raises(ClientError, match="an HTTP header cannot contain") as wrong:
        connect(api_key="s3cret\n")
    assert "s3cret" not in str(wrong.value)


def test_both_clients_have_the_same_calls() -> None:
    def calls(client: type) -> dict[str, Signature]:
        public = (name for name in vars(client) if not name.startswith("_"))
        return {name: signature(getattr(client, name)) for name in public}

    assert calls(Client) == calls(AsyncClient)
    for client in (Client, AsyncClient):
        assert list(signature(client.classify).parameters)[:3] == ["self", "image", "tier"]
        assert signature(client.classify).return_annotation is Classification
        assert "budget_ms: milliseconds" in (client.classify.__doc__ or "")


# what it needs


def in_a_process(code: str) -> str:
    done = subprocess.run((sys.executable, "-c", code), capture_output=True, text=True, timeout=60)
    return done.stdout + done.stderr


def test_it_loads_neither_engines_nor_the_server() -> None:
    loaded = in_a_process("import pcae_serve.client, sys; print(*sys.modules)").split()
    assert "pcae_serve.client" in loaded
    heavy = {"numpy", "onnxruntime", "fastapi", "uvicorn", "pydantic_settings"}
    assert not heavy & set(loaded)
    ours = {name.split(".")[1] for name in loaded if name.startswith("pcae_serve.")}
    assert ours == {
        "bundle",
        "client",
        "errors",
        "frozen_model",
        "schemas",
        "usage_reports",
        "version",
    }
    assert not {"pcae_serve.bundle.reader", "pcae_serve.bundle.preprocess"} & set(loaded)


def test_the_first_call_imports_nothing() -> None:
    code = """
import asyncio, sys
from pcae_serve.client import AsyncClient, ClientError

async def main():
    async with AsyncClient("http://127.0.0.1:1") as client:
        before = set(sys.modules)
        try:
            await client.classify(b"image", budget_ms=10)
        except ClientError:
            print("asked", *set(sys.modules) - before)

asyncio.run(main())
"""
    assert in_a_process(code).split() == ["asked"]


def test_without_httpx2_the_error_says_what_to_install() -> None:
    output = in_a_process("import sys; sys.modules['httpx2'] = None; import pcae_serve.client")
    assert output.splitlines()[-1].endswith("pip install '.[client]'")
