"""Engines run one batch on one device. One small interface; each body lives in its own module.

    tensorrt      NVIDIA GPU, plans built on it      cuda        NVIDIA GPU, ONNX Runtime
    onnxruntime   CPU                                simulated   no graph at all

An engine knows graphs and arrays; it knows nothing of requests, budgets or queues.
"""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np
from numpy.typing import NDArray

from pcae_serve.bundle.reader import Bundle, Tier
from pcae_serve.engines import nvidia
from pcae_serve.errors import PcaeError, StartError, one_line
from pcae_serve.settings import CACHE_DIR, MAX_BATCH, Settings
from pcae_serve.version import install_command

log = logging.getLogger(__name__)

#: Backends that run a bundle's half-precision graphs, the faster first.
GPU_BACKENDS = ("tensorrt", "cuda")
#: What the log and /tiers add to a backend's name. A record of a run on a GPU takes its entry away.
NOTES = dict.fromkeys(GPU_BACKENDS, "built, not yet run on a GPU")

Pixels = NDArray[np.uint8]  # [N, H, W, 3]


class Output(NamedTuple):
    """What the network said of a batch."""

    vectors: NDArray[np.float32]  # [N, classes] logits, or [N, width] features without a head
    kept: tuple[NDArray[np.int32], ...]  # per stage [N, m_i]: original indices of the patches left
    padding: int = 0  # rows computed beyond N to fill a bucket: waste


class Engine(Protocol):
    """Runs batches, one call at a time; any batch size from 1 to max_batch."""

    name: str  # of the backend, part of the profile's key
    version: str
    device: str
    threads: int  # of one batch; 0 = the backend's own choice
    sizes: Sequence[int]  # of batches that are set up one by one, and tried before traffic

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        """Answers to a batch, at one tier. Blocks until they are there."""
        ...

    def terminate(self) -> None:
        """From another thread: have the batch in progress fail, where that is possible."""
        ...

    def close(self) -> None:
        """Give its memory back; it cannot run afterwards."""
        ...


def at_once(engine: Engine) -> Engine:
    """Batches run when they are asked for."""
    return engine


def load(
    backend: str,
    bundle: Bundle,
    device: str = "auto",
    threads: int = 0,
    max_batch: int = MAX_BATCH,
    cache_dir: Path = CACHE_DIR,
    through: Callable[[Engine], Engine] = at_once,
) -> Engine:
    """The engine that was asked for, every tier of it tried.

    With auto it is the fastest that works, each step down logged.

    backend: auto, tensorrt, cuda, onnxruntime or simulated. device: auto, cpu or cuda:N. One that
    was named is never left for another. threads: of one batch on a CPU; 0 = one a core. max_batch:
    the largest batch that a GPU is set up for. cache_dir: where TensorRT's plans lie. through: what
    the trial batches run through, where they must not get in the way of others.
    Raises StartError, in one line that says what is missing.
    """
    if backend == "simulated":
        from pcae_serve.engines.simulated import SimulatedEngine

        return SimulatedEngine(bundle, "cpu" if device == "auto" else device)
    if backend == "onnxruntime" and device not in ("auto", "cpu"):
        raise StartError(f"backend onnxruntime runs on the CPU: for {device} use --backend cuda")
    if backend in GPU_BACKENDS and device == "cpu":
        raise StartError(f"backend {backend} runs on a GPU: use --device cuda:0, or leave it out")
    if backend == "onnxruntime" or device == "cpu":
        return _on_cpu(bundle, threads, through)

    gpu = "cuda:0" if device == "auto" else device
    names = GPU_BACKENDS if backend == "auto" else (backend,)
    try:
        return _on_gpu(names, bundle, gpu, max_batch, cache_dir, through)
    except StartError as error:
        if (backend, device) != ("auto", "auto"):
            raise
        engine = _on_cpu(bundle, threads, through)
        from pcae_serve.engines.onnx_cpu import for_gpus

        expected = isinstance(error, nvidia.NoGpu) and not for_gpus()
        log.log(logging.INFO if expected else logging.WARNING, "on the CPU: %s", error)
        return engine


def configured(
    settings: Settings,
    bundle: Bundle,
    device: str | None = None,
    through: Callable[[Engine], Engine] = at_once,
) -> Engine:
    """As `load`, by the settings: on `device`, or on the first of theirs (all are equal)."""
    return load(
        settings.backend,
        bundle,
        device or settings.devices[0],
        settings.threads,
        settings.max_batch,
        settings.cache_dir,
        through,
    )


def check(engine: Engine, bundle: Bundle, batches: Sequence[int] = (1,)) -> None:
    """Run every tier at these sizes: what does not fit its manifest is told before any caller asks.

    Raises StartError.
    """
    size = bundle.image_size
    for tier in bundle.tiers:
        for batch in batches:
            try:
                output = engine.run(tier, np.zeros((batch, size, size, 3), np.uint8))
            except Exception as error:  # libraries raise kinds of their own
                raise StartError(
                    f"tier {tier.name!r} does not run on {engine.device} with a batch of {batch}:"
                    f" {one_line(error)}"
                ) from None
            width, counts = output.vectors.shape[1], tuple(k.shape[1] for k in output.kept)
            if width != bundle.width:
                raise StartError(
                    f"tier {tier.name!r} answers with {width} {bundle.answers}, but the bundle"
                    f" names {bundle.width}: export it again"
                )
            if counts != tier.token_counts:
                raise StartError(
                    f"tier {tier.name!r} keeps {counts} patches, but the bundle names"
                    f" {tier.token_counts}: export it again"
                )


def _on_gpu(
    names: Sequence[str],
    bundle: Bundle,
    gpu: str,
    max_batch: int,
    cache_dir: Path,
    through: Callable[[Engine], Engine],
) -> Engine:
    """The first of these backends that works. Raises StartError with every one's reason."""
    found = nvidia.gpus()
    if int(gpu.removeprefix("cuda:")) >= len(found):
        raise StartError(f"there is no {gpu}: this machine has {len(found)} ({', '.join(found)})")
    failures: list[str] = []
    for name in names:
        try:
            engine = _gpu_engine(name, bundle, gpu, max_batch, cache_dir)
            _tried(engine, bundle, through)
        except PcaeError as error:
            failures.append(f"{name}: {error}")
        else:
            for failure in failures:
                log.info("on the GPU without %s", failure)
            return engine
    raise StartError("; ".join(failures))


def _gpu_engine(name: str, bundle: Bundle, gpu: str, max_batch: int, cache_dir: Path) -> Engine:
    try:  # heavy, so imported by those who run it
        if name == "tensorrt":
            from pcae_serve.engines.tensorrt import TensorRtEngine

            return TensorRtEngine(bundle, gpu, cache_dir=cache_dir, max_batch=max_batch)
        from pcae_serve.engines.onnx_cuda import CudaEngine

        return CudaEngine(bundle, gpu, max_batch)
    except ModuleNotFoundError as error:
        extra = "tensorrt" if name == "tensorrt" else "gpu"
        raise StartError(f"{error.name} is not installed: {install_command(extra)}") from None


def _on_cpu(bundle: Bundle, threads: int, through: Callable[[Engine], Engine]) -> Engine:
    try:
        from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
    except ModuleNotFoundError:
        raise StartError(f"onnxruntime is not installed: {install_command('cpu')}") from None
    engine = OnnxRuntimeEngine(bundle, threads)
    _tried(engine, bundle, through)
    return engine


def _tried(engine: Engine, bundle: Bundle, through: Callable[[Engine], Engine]) -> None:
    try:
        check(through(engine), bundle, engine.sizes)
    except BaseException:
        engine.close()
        raise
