"""Load the engine that the settings ask for, and try every tier on it before it serves."""

import logging
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import nvidia
from pcae_serve.engines.base import GPU_BACKENDS, DenseEngine, Engine, run_directly
from pcae_serve.errors import PcaeError, StartError, one_line
from pcae_serve.settings import CACHE_DIR, MAX_BATCH, Settings
from pcae_serve.version import install_command

log = logging.getLogger(__name__)


def load_engine(
    backend: str,
    bundle: Bundle,
    device: str = "auto",
    threads: int = 0,
    max_batch: int = MAX_BATCH,
    cache_dir: Path = CACHE_DIR,
    wrap: Callable[[Engine], Engine] = run_directly,
) -> Engine:
    """Load an engine and try every tier on it.

    With backend "auto", load the fastest backend that works; each one that does not is logged. A
    backend or device other than "auto" is never replaced.

    backend: auto, tensorrt, cuda, onnxruntime or simulated. device: auto, cpu or cuda:N. threads:
    per batch on a CPU; 0 for one per CPU. max_batch: largest batch that a GPU is set up for.
    cache_dir: folder of TensorRT's plans. wrap: applied to the engine for the trial batches, for
    example to keep them from delaying other requests. Raises StartError with a one-line reason.
    """
    if backend == "simulated":
        from pcae_serve.engines.simulated import SimulatedEngine

        return SimulatedEngine(bundle, "cpu" if device == "auto" else device)
    if backend == "onnxruntime" and device not in ("auto", "cpu"):
        raise StartError(f"backend onnxruntime runs on the CPU; use --backend cuda for {device}")
    if backend in GPU_BACKENDS and device == "cpu":
        raise StartError(f"backend {backend} runs on a GPU; use --device cuda:0 or omit --device")
    if backend == "onnxruntime" or device == "cpu":
        return _on_cpu(bundle, threads, wrap)

    gpu = "cuda:0" if device == "auto" else device
    names = GPU_BACKENDS if backend == "auto" else (backend,)
    try:
        return _on_gpu(names, bundle, gpu, max_batch, cache_dir, wrap)
    except StartError as error:
        if (backend, device) != ("auto", "auto"):
            raise
        engine = _on_cpu(bundle, threads, wrap)
        from pcae_serve.engines.onnx_cpu import is_gpu_build

        expected = isinstance(error, nvidia.NoGpu) and not is_gpu_build()
        log.log(logging.INFO if expected else logging.WARNING, "using the CPU: %s", error)
        return engine


def load_configured_engine(
    settings: Settings,
    bundle: Bundle,
    device: str | None = None,
    wrap: Callable[[Engine], Engine] = run_directly,
) -> Engine:
    """Load the engine of the settings, on `device` or on their first device."""
    return load_engine(
        settings.backend,
        bundle,
        device or settings.devices[0],
        settings.threads,
        settings.max_batch,
        settings.cache_dir,
        wrap,
    )


def check_engine(engine: Engine, bundle: Bundle, batches: Sequence[int] = (1,)) -> None:
    """Run every tier at these batch sizes, before any request does.

    Raises StartError if one fails, or its outputs do not match the manifest.
    """
    size = bundle.image_size
    for tier in bundle.tiers:
        for batch in batches:
            try:
                output = engine.run(tier, np.zeros((batch, size, size, 3), np.uint8))
            except Exception as error:  # libraries raise types of their own
                raise StartError(
                    f"tier {tier.name!r} does not run on {engine.device} with a batch of {batch}:"
                    f" {one_line(error)}"
                ) from None
            _check_patches(engine, bundle, tier, batch)
            width, counts = output.vectors.shape[1], tuple(k.shape[1] for k in output.kept)
            if width != bundle.width:
                raise StartError(
                    f"tier {tier.name!r} computes {width} {bundle.output}, but the manifest has"
                    f" {bundle.width}; export the bundle again"
                )
            if counts != tier.token_counts:
                raise StartError(
                    f"tier {tier.name!r} keeps {counts} patches, but the manifest has"
                    f" {tier.token_counts}; export the bundle again"
                )


def _check_patches(engine: Engine, bundle: Bundle, tier: Tier, batch: int) -> None:
    """Raise StartError if a dense bundle's patch grids do not match its manifest."""
    if bundle.patch_grid is None or not isinstance(engine, DenseEngine):
        return
    size = bundle.image_size
    found = engine.run_densely(tier, np.zeros((batch, size, size, 3), np.uint8)).patches
    if found is None or found.shape[1:] != bundle.patch_grid:
        shape = None if found is None else found.shape[1:]
        raise StartError(
            f"tier {tier.name!r} returns patches of shape {shape}, but the manifest has"
            f" {bundle.patch_grid}; export the bundle again"
        )


def _on_gpu(
    names: Sequence[str],
    bundle: Bundle,
    gpu: str,
    max_batch: int,
    cache_dir: Path,
    wrap: Callable[[Engine], Engine],
) -> Engine:
    """Load the first of these backends that works. Raises StartError with the reason of each."""
    gpus = nvidia.list_gpus()
    if int(gpu.removeprefix("cuda:")) >= len(gpus):
        raise StartError(f"there is no {gpu}: the GPUs from cuda:0 are {', '.join(gpus)}")
    failures: list[str] = []
    for name in names:
        try:
            engine = _gpu_engine(name, bundle, gpu, max_batch, cache_dir)
            _try_engine(engine, bundle, wrap)
        except PcaeError as error:
            failures.append(f"{name}: {error}")
        else:
            for failure in failures:
                log.info("backend not used: %s", failure)
            return engine
    raise StartError("; ".join(failures))


def _gpu_engine(name: str, bundle: Bundle, gpu: str, max_batch: int, cache_dir: Path) -> Engine:
    try:  # heavy imports, so only for the backend in use
        if name == "tensorrt":
            from pcae_serve.engines.tensorrt import TensorRtEngine

            return TensorRtEngine(bundle, gpu, cache_dir=cache_dir, max_batch=max_batch)
        from pcae_serve.engines.onnx_cuda import CudaEngine

        return CudaEngine(bundle, gpu, max_batch)
    except ModuleNotFoundError as error:
        extra = "tensorrt" if name == "tensorrt" else "gpu"
        raise StartError(f"{error.name} is not installed: {install_command(extra)}") from None


def _on_cpu(bundle: Bundle, threads: int, wrap: Callable[[Engine], Engine]) -> Engine:
    try:
        from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
    except ModuleNotFoundError:
        raise StartError(f"onnxruntime is not installed: {install_command('cpu')}") from None
    engine = OnnxRuntimeEngine(bundle, threads)
    _try_engine(engine, bundle, wrap)
    return engine


def _try_engine(engine: Engine, bundle: Bundle, wrap: Callable[[Engine], Engine]) -> None:
    try:
        check_engine(wrap(engine), bundle, engine.sizes)
    except BaseException:
        engine.close()
        raise
