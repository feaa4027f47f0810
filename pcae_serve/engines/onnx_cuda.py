"""ONNX Runtime on an NVIDIA GPU: a session per tier, a CUDA graph per (tier, bucket).

    pixels -> pad to a bucket -> buffer on the GPU -> replay the captured graph -> rows

A captured graph has a fixed shape, fixed addresses and one thread. So batches are padded to a
bucket (a fixed batch size), inputs and outputs have permanent buffers, and all runs on one thread.

Each session has its own copy of the weights. Python has two ways to share them, and neither works:
`add_initializer` does not take buffers that ONNX Runtime allocated on a GPU, and
`add_external_initializers` copied them per session until onnxruntime#29013 (2026).

With device "cpu", the CPU provider does the same without the capture; this is for tests.
"""

import io
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import redirect_stdout
from typing import NamedTuple

import numpy as np
import onnxruntime as ort

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import nvidia
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.plan_cache import batch_buckets
from pcae_serve.errors import StartError, one_line
from pcae_serve.settings import MAX_BATCH
from pcae_serve.version import install_command

CUDA = "CUDAExecutionProvider"
INSTALL = install_command("gpu")


class Replay(NamedTuple):
    """What ONNX Runtime needs to rerun a tier at one bucket with the same addresses."""

    binding: ort.IOBinding
    options: ort.RunOptions  # contain the captured graph's id
    outputs: list[ort.OrtValue]  # logits or features, then kept per stage


class CudaEngine:
    """One session per tier, of its static half-precision graph. Outputs are float32 and int32."""

    name = "cuda"
    version: str = f"onnxruntime {ort.__version__}"
    threads = 0

    def __init__(self, bundle: Bundle, device: str = "cuda:0", max_batch: int = MAX_BATCH) -> None:
        """Capture every tier at every bucket up to max_batch.

        Raises StartError if the library, the GPU or a graph is missing or fails.
        """
        self._kind, _, number = device.partition(":")
        self._number = int(number or 0)
        provider, missing = self._provider()
        self.device = (
            device if self._kind == "cpu" else f"{device} ({nvidia.list_gpus()[self._number]})"
        )
        self._sessions = {
            tier.name: _session(_graph(bundle, tier), provider, missing) for tier in bundle.tiers
        }
        self.sizes: Sequence[int] = batch_buckets(max_batch)
        side = bundle.image_size
        self._padded = {n: np.zeros((n, side, side, 3), np.uint8) for n in self.sizes}
        try:
            self._inputs = {n: self._buffer((n, side, side, 3), np.uint8) for n in self.sizes}
            self._replays = {
                (name, n): self._bind(session, n)
                for name, session in self._sessions.items()
                for n in self.sizes
            }
        except Exception as error:  # ONNX Runtime raises a dozen types of its own
            raise StartError(
                f"ONNX Runtime cannot set up batches on {self.device}: {one_line(error)}"
            ) from None
        self._thread = ThreadPoolExecutor(1, "cuda")

    def run(self, tier: Tier, pixels: Pixels) -> Output:
        return self._thread.submit(self._run, tier, pixels).result()

    def terminate(self) -> None:
        """Do nothing: a graph that was launched on the GPU cannot be stopped."""

    def close(self) -> None:
        self._thread.shutdown(wait=False)
        self._replays.clear()
        self._sessions.clear()

    def _run(self, tier: Tier, pixels: Pixels) -> Output:
        count = len(pixels)
        bucket = next((n for n in self.sizes if n >= count), None)
        if bucket is None or not count:
            raise ValueError(f"a batch has 1 to {self.sizes[-1]} images, not {count}")
        if count < bucket:
            self._padded[bucket][:count] = pixels  # the other rows' outputs are not read
            pixels = self._padded[bucket]
        self._inputs[bucket].update_inplace(pixels)
        replay = self._replays[tier.name, bucket]
        self._sessions[tier.name].run_with_iobinding(replay.binding, replay.options)
        # copied: on a CPU, numpy() is a view of the buffer that the next batch overwrites
        vectors, *kept = (output.numpy()[:count].copy() for output in replay.outputs)
        return Output(vectors, tuple(kept), padding=bucket - count)

    def _provider(self) -> tuple[str | tuple[str, dict[str, str]], str]:
        """Return ONNX Runtime's provider with options, and its output about missing libraries."""
        if self._kind == "cpu":
            return "CPUExecutionProvider", ""
        if CUDA not in ort.get_available_providers():
            raise StartError(
                "the installed onnxruntime is the build for CPUs: pip uninstall onnxruntime, then"
                f" {INSTALL}"
            )
        ort.set_default_logger_severity(3)  # errors only: it warns of missing providers
        with redirect_stdout(io.StringIO()) as printed:
            ort.preload_dlls()  # from the nvidia-* packages
        options = {
            "device_id": str(self._number),
            "enable_cuda_graph": "1",
            "use_tf32": "0",  # patches are chosen by similarity, which needs full float32
            "arena_extend_strategy": "kSameAsRequested",  # else up to twice the memory per tier
        }
        return (CUDA, options), printed.getvalue()

    def _bind(self, session: ort.InferenceSession, bucket: int) -> Replay:
        binding, options, outputs = session.io_binding(), ort.RunOptions(), []
        options.add_run_config_entry("gpu_graph_id", str(bucket))
        binding.bind_ortvalue_input("pixels", self._inputs[bucket])
        for i, output in enumerate(session.get_outputs()):
            shape = (bucket, *output.shape[1:])
            outputs.append(self._buffer(shape, np.int32 if i else np.float32))
            binding.bind_ortvalue_output(output.name, outputs[-1])
        return Replay(binding, options, outputs)

    def _buffer(self, shape: Sequence[int], dtype: type[np.generic]) -> ort.OrtValue:
        return ort.OrtValue.ortvalue_from_shape_and_type(
            list(shape), dtype, self._kind, self._number
        )


def _graph(bundle: Bundle, tier: Tier) -> str:
    """Return the path of a tier's graph. Raises StartError if the bundle lacks it."""
    if f"models/{tier.model}/{tier.cuda_graph}" not in bundle.manifest.files:
        raise StartError(
            f"{bundle.root} has no {tier.cuda_graph}, which the cuda backend needs; export the"
            " bundle again, or use --device cpu"
        )
    return str(bundle.file(tier.model, tier.cuda_graph))


def _session(
    graph: str, provider: str | tuple[str, dict[str, str]], missing: str
) -> ort.InferenceSession:
    """Return a session of a static graph on this provider alone. missing: from `_provider`.

    Raises StartError if the provider does not load; ONNX Runtime would continue without it.
    """
    options = ort.SessionOptions()
    options.log_severity_level = 3  # errors only
    options.intra_op_num_threads = 1  # nothing is computed on the CPU
    try:
        session = ort.InferenceSession(graph, options, providers=[provider], enable_fallback=False)
    except Exception as error:
        raise StartError(f"ONNX Runtime cannot load {graph}: {one_line(error)}") from None
    name = provider if isinstance(provider, str) else provider[0]
    if name not in session.get_providers():
        first = next(iter(missing.splitlines()), "see its message above")
        raise StartError(f"ONNX Runtime cannot use {name} ({first}): {INSTALL}")
    for output in session.get_outputs():
        if not all(isinstance(size, int) for size in output.shape[1:]):
            raise StartError(
                f"{graph} must be static, but {output.name} has shape {output.shape}; export the"
                " bundle again"
            )
    return session
