"""Batches that run at the same time: order, failures, sizes."""

import random
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle, demo_path, load_bundle
from pcae_serve.engines.base import Engine, Output, Pixels
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_serve.engines.simulated import SimulatedEngine
from pcae_serve.errors import EngineFailed
from pcae_serve.local.runner import Answered, Outcome, Runner, open_runner
from tests.support.images import image_bytes

PARALLEL = 3


class Shared(SimulatedEngine):
    """Counts the batches that run, waits a while in each, and fails at images of one level."""

    fails_at = -1

    def __init__(self, bundle: Bundle) -> None:
        super().__init__(bundle, seconds=lambda tier, batch: 0)
        self.now = self.most = self.closed = 0
        self.sizes: list[int] = []
        self._lock, self._random = threading.Lock(), random.Random(0)

    def share(self) -> Engine:
        return self

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        with self._lock:
            self.now += 1
            self.most = max(self.most, self.now)
            self.sizes.append(len(pixels))
            wait_s = self._random.uniform(0, 0.004)
        time.sleep(wait_s)
        with self._lock:
            self.now -= 1
        if (pixels[:, 0, 0, 0] == self.fails_at).any():
            raise RuntimeError("the engine fails")
        return super().run(tier, pixels)

    def close(self) -> None:
        self.closed += 1


@pytest.fixture
def engine(small_bundle: Bundle) -> Shared:
    return Shared(small_bundle)


@pytest.fixture
def runner(small_bundle: Bundle, engine: Shared, tmp_path: Path) -> Iterator[Runner]:
    with Runner(small_bundle, engine, cache_dir=tmp_path, parallel=PARALLEL) as runner:
        yield runner


def images(count: int) -> list[np.ndarray]:
    """Return images of 8 x 8 pixels; the level of one is its index modulo 251."""
    return [np.full((8, 8, 3), i % 251, np.uint8) for i in range(count)]


def levels(outcomes: list[Outcome]) -> list[int]:
    return [int(each.pixels[0, 0, 0]) for each in outcomes if isinstance(each, Answered)]


def collect(found: list[Outcome], outcomes: Iterator[Outcome]) -> None:
    """Append outcomes until one is an error."""
    for each in outcomes:
        found.append(each)


@pytest.mark.parametrize("count", [1, 2, 17, 300])
def test_answers_keep_the_order_of_the_images(runner: Runner, engine: Shared, count: int) -> None:
    found = list(runner.run(images(count), [0], pinned=True, count=count))
    assert levels(found) == [i % 251 for i in range(count)]
    assert sum(engine.sizes) == count
    assert engine.most <= PARALLEL
    assert engine.most == PARALLEL or count < 300


def test_the_last_batches_end_together(runner: Runner, engine: Shared) -> None:
    list(runner.run(images(100), [0], pinned=True, count=100))
    assert max(engine.sizes) > 1
    assert engine.sizes[-1] == 1  # a large one would leave the other cores without work


def test_a_batch_that_fails_ends_the_answers_there(runner: Runner, engine: Shared) -> None:
    """Answers of later batches, which run already, would be taken for those of other images."""
    engine.fails_at, found = 120, list[Outcome]()
    with pytest.raises(EngineFailed, match="the engine fails"):
        collect(found, runner.run(images(250), [0], pinned=True, count=250))
    assert levels(found) == list(range(len(found)))
    assert 120 - 16 < len(found) <= 120


def test_images_before_one_that_cannot_be_given_are_answered(runner: Runner) -> None:
    def given() -> Iterator[np.ndarray]:
        yield from images(60)
        raise RuntimeError("of the caller")

    found = list[Outcome]()
    with pytest.raises(RuntimeError, match="of the caller"):
        collect(found, runner.run(given(), [0], pinned=True))
    assert found
    assert levels(found) == list(range(len(found)))


def test_an_image_that_cannot_be_read_keeps_its_place(runner: Runner) -> None:
    given: list[np.ndarray | bytes] = [*images(40)]
    given[20] = b"no image"
    found = list(runner.run(given, [0], pinned=True, count=40))
    assert [i for i, each in enumerate(found) if not isinstance(each, Answered)] == [20]


def test_the_engine_is_closed_once_no_batch_runs(runner: Runner, engine: Shared) -> None:
    next(runner.run(images(100), [0], pinned=True))
    runner.close()
    assert engine.closed == PARALLEL  # it is its own share
    assert engine.now == 0


def test_engines_that_share_sessions_answer_as_one() -> None:
    """On real graphs; at most the last digits of a float differ with the number of threads."""
    demo = load_bundle(demo_path())
    bodies = [image_bytes(level, size=(28, 28)) for level in range(0, 240, 6)]
    answers = []
    for parallel in (False, True):
        with open_runner(demo, device="cpu", threads=2, parallel=parallel) as runner:
            assert runner.parallel == (2 if parallel else 1)
            assert isinstance(runner.engine, OnnxRuntimeEngine)
            assert runner.engine.threads == (1 if parallel else 2)
            found = runner.run(bodies, [0], pinned=True, count=len(bodies))
            answers.append([each.result.vector for each in found if isinstance(each, Answered)])
    np.testing.assert_allclose(answers[1], answers[0], rtol=1e-3, atol=1e-3)
    assert len(answers[1]) == len(bodies)


def test_an_engine_that_cannot_be_shared_runs_alone(small_bundle: Bundle, tmp_path: Path) -> None:
    engine = SimulatedEngine(small_bundle)
    with Runner(small_bundle, engine, cache_dir=tmp_path, parallel=PARALLEL) as runner:
        assert runner.parallel == 1
