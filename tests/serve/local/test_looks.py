"""Second looks without a server: the server's answers, and a first answer is never lost."""

import logging
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from pcae_serve import Model
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.errors import InvalidParameter
from pcae_serve.local.runner import Runner
from pcae_serve.runtime.service import Service
from pcae_serve.schemas import Classification
from pcae_serve.settings import Settings
from tests.support.apps import serving
from tests.support.bundles import write_bundle
from tests.support.images import image_bytes
from tests.support.unsure import CALIBRATION, FIRST, SECOND, Unsure

#: Long enough for every look, on the busiest machine.
BUDGET_MS = 60_000


@pytest.fixture
def calibrated(tmp_path: Path) -> Bundle:
    changes = {"schema_version": 3, "calibration": CALIBRATION}
    return load_bundle(write_bundle(tmp_path / "calibrated", **changes))


@pytest.fixture
def engine() -> Iterator[Unsure]:
    engine = Unsure()
    yield engine
    engine.open.set()


@pytest.fixture
def model(calibrated: Bundle, engine: Unsure, tmp_path: Path) -> Iterator[Model]:
    runner = Runner(calibrated, engine, max_batch=4, cache_dir=tmp_path, profile_s=0.05)
    model = Model(runner)
    model.classify(image_bytes(), budget_ms=BUDGET_MS)  # measures latencies
    yield model
    engine.open.set()
    model.close()


def is_first(answer: Classification) -> bool:
    found = (answer.tier, answer.looks, answer.predictions[0].index)
    return found == ("fast", 1, FIRST)


def is_second(answer: Classification) -> bool:
    found = (answer.tier, answer.looks, answer.predictions[0].index)
    return found == ("full", 2, SECOND)


def test_the_second_looks_of_a_server(
    model: Model, calibrated: Bundle, engine: Unsure, tmp_path: Path
) -> None:
    ours = model.classify(image_bytes(), budget_ms=BUDGET_MS)
    service = Service(Settings(cache_dir=tmp_path, profile_s=0.05), calibrated, [engine])
    with serving(service) as client:
        path = f"/classify?budget_ms={BUDGET_MS}"
        served = Classification(**client.post(path, content=image_bytes()).json())
    assert is_second(ours)
    same = ("predictions", "tier", "looks", "confidence", "reason", "met_budget")
    assert [getattr(ours, n) for n in same] == [getattr(served, n) for n in same]
    times = ours.timings_ms
    parts = times.decode + times.queue + times.compute
    assert times.total == pytest.approx(parts, abs=50)


def test_each_image_of_a_call_has_its_own_looks(model: Model) -> None:
    answers = model.classify([image_bytes(level) for level in (0, 99, 255) * 3], budget_ms=60_000)
    assert len(answers) == 9
    assert all(map(is_second, answers))
    lazy = model.classify(iter([image_bytes()] * 2), budget_ms=BUDGET_MS)
    assert all(map(is_second, lazy))


@pytest.mark.parametrize(
    ("options", "tier"),
    [
        ({"budget_ms": BUDGET_MS, "tier": "fast"}, "fast"),
        ({"budget_ms": BUDGET_MS, "min_tier": "full"}, "full"),
        ({}, "full"),  # no budget: the most accurate tier, once
    ],
)
def test_what_runs_once(model: Model, options: dict[str, Any], tier: str) -> None:
    answer = model.classify(image_bytes(), **options)
    assert (answer.tier, answer.looks) == (tier, 1)


def test_max_looks_forbids_a_second_look(model: Model) -> None:
    answers = model.classify([image_bytes()] * 3, budget_ms=BUDGET_MS, max_looks=1)
    assert {answer.looks for answer in answers} == {1}
    for wrong in (0, 3):
        with pytest.raises(InvalidParameter, match="max_looks is 1 or 2"):
            model.classify(image_bytes(), budget_ms=BUDGET_MS, max_looks=wrong)


def test_a_second_look_that_does_not_end_in_time_costs_no_answer(
    model: Model, engine: Unsure
) -> None:
    engine.shut()
    answer = model.classify(image_bytes(), budget_ms=2000)
    assert engine.entered.is_set()
    assert is_first(answer)
    assert answer.met_budget
    assert 1500 < answer.timings_ms.total < 2000


@pytest.mark.parametrize("fault", ["raises", "not finite", "no memory"])
def test_a_second_look_that_fails_costs_no_answer(
    model: Model, engine: Unsure, caplog: pytest.LogCaptureFixture, fault: str
) -> None:
    engine.fails = {"raises": RuntimeError("broken"), "no memory": MemoryError()}.get(fault)
    engine.finite = fault != "not finite"
    with caplog.at_level(logging.WARNING):
        answers = model.classify([image_bytes()] * 2, budget_ms=BUDGET_MS)
    assert all(map(is_first, answers))
    assert "the first answer counts" in caplog.text
