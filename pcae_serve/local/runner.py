"""Run images through a bundle in this process: decoded on threads, batched on the device's thread.

run            no budget: large batches on one tier, while the next images are decoded
run_in_time    a budget: the server's policy chooses tier and batch
batches        each batch on a tier that the caller chooses, with the pixels
"""

import os
import time
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import CancelledError, Future, ThreadPoolExecutor, wait
from functools import partial
from math import ceil, inf
from pathlib import Path
from threading import Lock
from typing import NamedTuple, Self

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import cpus
from pcae_serve.engines.base import Engine, SharedEngine
from pcae_serve.engines.loader import load_engine
from pcae_serve.errors import PcaeError, RequestError
from pcae_serve.local.batch_sizes import PARALLEL_SIZES, SIZES, BatchSizes
from pcae_serve.local.deadlines import Deadlines
from pcae_serve.local.decode_ahead import decode_ahead
from pcae_serve.local.device import Device
from pcae_serve.local.image_source import ImageLike, read_pixels
from pcae_serve.local.looks import Look
from pcae_serve.runtime import latency_profile, refusals
from pcae_serve.runtime.requests import InferenceResult
from pcae_serve.runtime.tiers import tier_table
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.settings import CACHE_DIR, MAX_BATCH

#: Seconds to measure latencies, as the server's --profile-s.
PROFILE_S = 6.0


class Decoded(NamedTuple):
    """An image's pixels uint8 [H, W, 3], and when decoding began and ended."""

    pixels: NDArray[np.uint8]
    start_s: float
    end_s: float


class Answered(NamedTuple):
    """The result of an image, and the pixels uint8 [H, W, 3] that it was computed from."""

    result: InferenceResult
    pixels: NDArray[np.uint8]


#: What became of an image. The errors are its own: others end the run.
Outcome = Answered | RequestError | OSError


class Runner:
    """A bundle on one device. Threads may share it, but not processes."""

    def __init__(
        self,
        bundle: Bundle,
        engine: Engine,
        *,
        max_batch: int = MAX_BATCH,
        max_pixels: int = MAX_PIXELS,
        decode_threads: int = 0,
        cache_dir: Path = CACHE_DIR,
        profile_s: float = PROFILE_S,
        parallel: int = 1,
    ) -> None:
        """Create a runner. The engine is closed with it.

        parallel: batches that run at the same time, if the engine can share its graphs.
        """
        self.bundle, self.engine, self.max_batch = bundle, engine, max_batch
        engines = [engine]
        if isinstance(engine, SharedEngine):
            engines += [engine.share() for _ in range(1, parallel)]
        self._device, self._max_pixels = Device(engines), max_pixels
        self._decoders = ThreadPoolExecutor(decode_threads or cpus.count_usable(), "pcae-decode")
        self._cache_dir, self._profile_s = cache_dir, profile_s
        sizes = SIZES if engine.device == "cpu" else ()
        self._sizes = BatchSizes(max_batch, sizes)
        if self.parallel > 1:
            self._sizes = BatchSizes(min(max_batch, PARALLEL_SIZES[-1]), PARALLEL_SIZES)
        self._deadlines: Deadlines | None = None  # until latencies are measured
        self._measuring = Lock()
        self._process, self._closed = os.getpid(), False

    @property
    def parallel(self) -> int:
        """The number of batches that run at the same time."""
        return self._device.parallel

    def most_accurate(self, tiers: Sequence[int]) -> int:
        """Return the most accurate of these tiers; of equally accurate ones, the cheapest."""
        accuracy = tier_table(self.bundle.tiers).accuracy
        return max(tiers, key=lambda tier: (accuracy[tier], -tier))

    def run(
        self,
        images: Iterable[ImageLike],
        tiers: Sequence[int],
        pinned: bool,
        dense: bool = False,
        count: int | None = None,
    ) -> Iterator[Outcome]:
        """Yield what became of each image, in order, on the most accurate of the allowed tiers.

        pinned: the caller named the tier. dense: with patch grids. count: of the images, if known.
        """
        tier = self.most_accurate(tiers)
        reason = "the caller names this tier" if pinned else "no budget: the most accurate tier"
        for batch in self.batches(images, lambda _: (tier, reason), dense, count):
            yield from batch

    def batches(
        self,
        images: Iterable[ImageLike],
        choose: Callable[[int], tuple[int, str]],
        dense: bool = False,
        count: int | None = None,
    ) -> Iterator[list[Outcome]]:
        """Yield what became of images, in order and in batches of the fastest size.

        The next batch begins before one is yielded, so that the device does not wait for what the
        caller does with it. choose: takes the number of images that are done, and returns the index
        of the tier that the next batch runs on, and why. dense: with patch grids. count: of the
        images, if known; the last batches are then of a size that lets them end together.
        """
        self.require_usable()
        begun = done = 0
        most = self.parallel + (self.parallel > 1)  # one waits for the first idle core
        running = deque[Callable[[], list[Outcome]]]()

        def choose_size() -> int:
            size = self._sizes.choose()
            if count is None or self.parallel == 1:
                return size
            return min(size, max(1, ceil((count - begun) / self.parallel)))

        def finish() -> list[Outcome]:
            try:
                return running.popleft()()
            except Exception:  # those after it have no place in the order
                running.clear()
                raise

        try:
            ahead = self._sizes.largest * self.parallel
            for futures in decode_ahead(images, self._submit, choose_size, ahead):
                decoded = [_outcome(future) for future in futures]
                begun += len(decoded)
                finished = finish() if len(running) == most else None
                done += 0 if finished is None else len(finished)
                typical = len(running) >= self.parallel - 1  # all cores are in use
                running.append(self._begin(decoded, partial(choose, done), dense, typical))
                if finished is not None:
                    yield finished
        except Exception:  # of the caller's images: those before them are answered
            while running:
                yield finish()
            raise
        while running:
            yield finish()

    def _begin(
        self,
        decoded: Sequence[Decoded | RequestError | OSError],
        choose: Callable[[], tuple[int, str]],
        dense: bool,
        typical: bool,
    ) -> Callable[[], list[Outcome]]:
        """Begin a batch, and return a function that waits for what became of its images.

        typical: the batch's time says how fast its size is.
        """
        rows = [each for each in decoded if isinstance(each, Decoded)]
        if not rows:
            return lambda: [each for each in decoded if not isinstance(each, Decoded)]
        index, reason = choose()
        compute = partial(
            self._device.compute, self.bundle.tiers[index], [row.pixels for row in rows], dense
        )
        running = self._device.submit(compute)

        def finish() -> list[Outcome]:
            batch, row = running.result(), iter(range(len(rows)))
            took_s = batch.end_s - batch.start_s
            if typical:
                self._sizes.learn(index, len(rows), took_s)
            return [
                self._answered(each, Look(index, batch, next(row), reason, took_s, batch.end_s))
                if isinstance(each, Decoded)
                else each
                for each in decoded
            ]

        return finish

    def run_in_time(
        self,
        images: Sequence[ImageLike],
        tiers: Sequence[int],
        pinned: bool,
        budget_ms: float,
        dense: bool = False,
        max_looks: int = 2,
    ) -> list[Outcome]:
        """Return what became of each image; the budget covers all of them together.

        dense: with patch grids. max_looks: how often an image may run, if its tier is not pinned.
        Raises BudgetTooSmall.
        """
        deadlines, arrival_s = self.measure(), time.monotonic()
        deadline_s = arrival_s + budget_ms / 1e3
        deadlines.check_budget(arrival_s, deadline_s, tiers)
        decoded, outcomes = dict[int, Decoded](), dict[int, Outcome]()
        futures = [self._submit(image) for image in images]
        for i, future in enumerate(futures):
            try:
                each = _outcome(future, max(0.0, deadline_s - time.monotonic()))
            except TimeoutError:
                future.cancel()
                each = refusals.expired_before_decoded(budget_ms).error
            if isinstance(each, Decoded):
                decoded[i] = each
            else:
                outcomes[i] = each
        pixels = {i: each.pixels for i, each in decoded.items()}
        for answers in deadlines.run(
            self._device, pixels, arrival_s, deadline_s, tiers, pinned, dense, max_looks
        ):
            if isinstance(answers, tuple):
                ids, error = answers
                outcomes |= dict.fromkeys(ids, error)
                continue
            for i, look in answers.items():
                outcomes[i] = self._answered(decoded[i], look, arrival_s, deadline_s)
        return [outcomes[i] for i in range(len(images))]

    def measure(self) -> Deadlines:
        """Return the tier choice under budgets; the first time, measure or read latencies."""
        self.require_usable()
        with self._measuring:
            if self._deadlines is None:
                measure = partial(
                    latency_profile.load,
                    self.bundle,
                    self.engine,
                    self._cache_dir,
                    self._profile_s,
                )
                profile = self._device.call(measure)
                self._deadlines = Deadlines(self.bundle, profile, self.max_batch)
        return self._deadlines

    def forecast(self) -> Forecast | None:
        """Return the latencies that are expected now, or None before they are measured."""
        return None if self._deadlines is None else self._deadlines.forecast()

    def require_usable(self) -> None:
        """Raise PcaeError after a fork, or if the runner is closed."""
        if os.getpid() != self._process:
            raise PcaeError(
                "the model was loaded before this process was forked, and its threads do not exist"
                " here; call pcae_serve.load() in the new process"
            )
        if self._closed:
            raise PcaeError("the model is closed")

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Wait for what is running, and release the engine. In a forked process, do nothing."""
        if os.getpid() == self._process and not self._closed:
            self._closed = True
            self._decoders.shutdown(cancel_futures=True)
            self._device.close()

    def _submit(self, image: ImageLike) -> Future[Decoded]:
        """Have an image decoded on a thread."""
        self.require_usable()
        try:
            return self._decoders.submit(self._decode, image)
        except RuntimeError:  # closed by another thread just now
            raise PcaeError("the model is closed") from None

    def _decode(self, image: ImageLike) -> Decoded:
        start_s = time.monotonic()
        pixels = read_pixels(image, self.bundle.preprocess, self._max_pixels)
        return Decoded(pixels, start_s, time.monotonic())

    def _answered(
        self,
        decoded: Decoded,
        look: Look,
        arrival_s: float | None = None,
        deadline_s: float = inf,
    ) -> Answered:
        """Return the answer to an image. arrival_s: None if it has no budget."""
        start_s = decoded.start_s if arrival_s is None else arrival_s
        output, row = look.batch.output, look.row
        result = InferenceResult(
            vector=output.vectors[row],
            kept=tuple(kept[row] for kept in output.kept),
            met_budget=look.end_s <= deadline_s,
            bundle=self.bundle,
            tier=self.bundle.tiers[look.tier],
            reason=look.reason,
            looks=look.looks,
            decode_s=decoded.end_s - decoded.start_s,
            queue_s=look.end_s - decoded.end_s - look.compute_s,
            compute_s=look.compute_s,
            total_s=look.end_s - start_s,
            patches=None if output.patches is None else output.patches[row],
        )
        return Answered(result, decoded.pixels)


def open_runner(
    bundle: Bundle,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int = 0,
    decode_threads: int = 0,
    max_batch: int = MAX_BATCH,
    max_pixels: int = MAX_PIXELS,
    cache_dir: Path = CACHE_DIR,
    parallel: bool = False,
) -> Runner:
    """Load an engine for a bundle. Raises StartError.

    parallel: on a CPU, each thread runs a batch of its own, instead of all of them one batch. This
    computes more images per second, and each batch takes longer.
    """
    at_once = (threads or cpus.count_usable()) if parallel else 1
    each = 1 if at_once > 1 else threads
    return Runner(
        bundle,
        load_engine(backend, bundle, device, each, max_batch, cache_dir),
        parallel=at_once,
        max_batch=max_batch,
        max_pixels=max_pixels,
        decode_threads=decode_threads,
        cache_dir=cache_dir,
    )


def _outcome(
    future: Future[Decoded], timeout_s: float | None = None
) -> Decoded | RequestError | OSError:
    """Return what decoding an image gave. Raises TimeoutError, and errors of the caller's code."""
    done = wait([future], timeout_s).done
    if not done:
        raise TimeoutError
    try:
        return future.result()
    except (RequestError, OSError) as error:
        return error
    except CancelledError:
        raise PcaeError("the model is closed") from None
