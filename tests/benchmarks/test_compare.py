"""The logic of the comparison with other servers: search, log, figures, requests, pixels."""

import io
import json
from math import inf
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from benchmarks.compare.log import Log, OutOfTimeError
from benchmarks.compare.models import Setting
from benchmarks.compare.peers.handler import Model
from benchmarks.compare.report import spread
from benchmarks.compare.rows import ROWS
from benchmarks.compare.search import largest_passing, rate_of, step_near
from benchmarks.compare.servers import SERVERS
from benchmarks.compare.trials import summarise
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.loadtest.load_generator import Responses
from pcae_serve.loadtest.workload import Workload


def search(limit: float, start: int) -> tuple[int | None, list[int]]:
    """Return what the search finds if steps up to `limit` pass, and the steps that it asked."""
    steps, asked = largest_passing(start), list[int]()
    step = next(steps)
    while True:
        asked.append(step)
        try:
            step = steps.send(step <= limit)
        except StopIteration as end:
            return end.value, asked


@pytest.mark.parametrize("limit", [-9, -3, -1, 0, 1, 7])
@pytest.mark.parametrize("start", [-5, 0, 6])
def test_the_search_finds_the_last_step_that_passes(limit: int, start: int) -> None:
    found, asked = search(limit, start)
    assert found == limit
    assert len(asked) == len(set(asked)) <= 13


def test_a_good_guess_needs_two_trials() -> None:
    assert search(4, start=4) == (4, [4, 5])


def test_the_search_ends_if_nothing_or_everything_passes() -> None:
    assert search(-inf, start=0)[0] is None
    with pytest.raises(ValueError, match="passes"):
        search(inf, start=0)


def test_a_rate_belongs_to_its_step() -> None:
    assert [step_near(rate_of(step, 50.0), 50.0) for step in (-40, 0, 3)] == [-40, 0, 3]


def test_a_measurement_is_made_once_and_read_again_after_a_restart(tmp_path: Path) -> None:
    path, made = tmp_path / "raw.jsonl", []
    for _ in range(2):
        log = Log(path, inf)
        assert log.once("a/b", lambda: made.append(1) or {"x": 2}, 1)["x"] == 2  # type: ignore[func-returns-value]
    assert len(made) == len(path.read_text().splitlines()) == 1


def test_no_measurement_begins_that_would_end_too_late(tmp_path: Path) -> None:
    log = Log(tmp_path / "raw.jsonl", 0.0)
    with pytest.raises(OutOfTimeError):
        log.once("a", dict, 1)
    assert not (tmp_path / "raw.jsonl").exists()


def test_refused_late_and_lost_requests_are_misses() -> None:
    n = 5
    responses = Responses.empty(n)
    responses.sent_s[:] = 0.001
    responses.ended_s[:4] = [0.01, 0.09, 0.02, 0.2]
    responses.status[:] = [200, 200, 503, 200, 0]
    responses.bodies[:] = [b'{"index": 3, "tier": "full"}'] * 4 + [b""]
    load = Workload(np.zeros(n), np.full(n, 0.1))
    figures = summarise(responses, load, [0.05, 0.1], SERVERS["plain"].index)
    assert figures["within"] == {"50.00": 0.2, "100.00": 0.4}
    assert figures["in_time"].tolist() == [True, True, False, False, False]
    assert figures["statuses"] == {"200": 3, "503": 1, "0": 1}
    assert figures["indices"] == [3, 3, None, 3, None]
    assert figures["refused_ms"]["50"] == 20
    assert figures["lag_p99_ms"] == 1
    assert figures["tiers"] == {"full": 3}


def test_every_server_gets_the_whole_image() -> None:
    setting, image = Setting("demo", "full"), b"\xff\xd8 an image"
    for server in SERVERS.values():
        head, _, body = server.request(setting, 8000, image, 0.1).partition(b"\r\n\r\n")
        assert f"Content-Length: {len(body)}" in head.decode()
        assert image in body
    assert b"tier=full&top_k=1&budget_ms=100.000" in SERVERS["pcae-serve"].request(
        setting, 8000, image, 0.1
    )


def test_tritons_request_is_json_and_the_length_of_the_image() -> None:
    head, _, body = (
        SERVERS["triton"].request(Setting("demo", "full"), 1, b"abc", 1).partition(b"\r\n\r\n")
    )
    length = int(head.decode().split("Inference-Header-Content-Length: ")[1].split("\r\n")[0])
    assert json.loads(body[:length])["inputs"][0]["parameters"] == {"binary_data_size": 7}
    assert body[length:] == b"\3\0\0\0abc"


@pytest.mark.parametrize("size", [(28, 28), (500, 375), (333, 401), (30, 700)])
def test_peers_get_the_pixels_that_the_server_gets(size: tuple[int, int]) -> None:
    width, height = size
    values = np.random.default_rng(0).integers(0, 256, (height // 4 + 1, width // 4 + 1, 3))
    buffer = io.BytesIO()
    Image.fromarray(values.astype(np.uint8)).resize(size).save(buffer, "JPEG")
    for side, resize in ((28, 28), (224, 256)):
        model = Model.__new__(Model)
        model.image_size, model.resize = side, resize
        preprocess = Preprocess(image_size=side, resize=resize, mean=(0.5,) * 3, std=(0.5,) * 3)
        decoded = preprocess.crop(Image.open(buffer).convert("RGB"))
        assert np.array_equal(model.pixels(buffer.getvalue()), decoded)


def test_servers_take_turns_at_being_first() -> None:
    row = ROWS["overload"]
    setting, servers = next(iter(row.servers.items()))
    assert sorted(row.jobs("overload", setting, i)[0].server for i in range(5)) == sorted(servers)


def test_a_cell_has_median_and_range() -> None:
    assert spread([3.0, None, 1.0, 2.0], 1) == "2.0 (1.0 to 3.0)"
    assert spread([1.5], 1) == "1.5"
    assert spread([None], 1) == "none"
