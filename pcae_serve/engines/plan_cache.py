"""The cache of TensorRT plans, which are built from the tiers' graphs for one GPU.

    <cache>/tensorrt/<key>.plan    the engine as serialised by TensorRT
    <cache>/tensorrt/<key>.json    its key, build data and verification; written last

A plan is cached only after its outputs were compared with the bundle's on this GPU.
"""

import hashlib
import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field

from pcae_serve import atomic
from pcae_serve.bounded_file import read_regular
from pcae_serve.bounded_json import read_json
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import BundleError, StartError
from pcae_serve.frozen_model import FrozenModel

log = logging.getLogger(__name__)

#: A sidecar has 2 kB; a plan has little more than the weights in half precision.
MAX_SIDECAR_BYTES = 1_000_000
MAX_PLAN_BYTES = 16_000_000_000

BUILD_COMMAND = "pcae-export tensorrt"


class GpuTarget(FrozenModel):
    """The GPU and TensorRT version that a plan is valid for."""

    library: str  # tensorrt, or tensorrt_rtx
    version: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.gpu} with {self.library} {self.version}"


class Recipe(FrozenModel):
    """How a plan is built: its optimisation profile and the builder's flags."""

    opt_batch: Annotated[int, Field(ge=1)] = 8  # kernels are optimised for it
    max_batch: Annotated[int, Field(ge=1)] = 32  # largest batch that runs
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    workspace_mb: Annotated[int, Field(ge=1)] = 4096


class Key(FrozenModel):
    """Everything that a plan depends on; its hash is the files' name."""

    bundle: str  # its digest
    tier: str
    graph: str  # its SHA-256
    target: GpuTarget
    recipe: Recipe

    @property
    def name(self) -> str:
        """Return the files' name without suffix."""
        return digest(self.model_dump_json().encode())[:24]


class PlanParity(FrozenModel):
    """Comparison of a plan's outputs with those of the tier's float32 graph on ONNX Runtime."""

    images: Annotated[int, Field(ge=1)]
    data_set: str
    measure: Literal["top-1 agreement", "label agreement", "mean cosine"]  # by what outputs mean
    value: float
    largest_difference: float  # of an output value
    same_patches: float  # share of kept patches that both keep, over all stages

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.value:.4f} on {self.images} images of {self.data_set}, largest"
            f" difference {self.largest_difference:.2g}, {self.same_patches:.1%} of patches equal"
        )


class Plan(FrozenModel):
    """The content of a plan's sidecar file."""

    key: Key
    sha256: str  # of the plan
    built: datetime
    build_s: float
    driver: str  # newest CUDA version of the driver at build time
    shapes: dict[str, tuple[int, ...]]  # of `pixels`: min, opt, max
    fused_attention: int  # attention blocks that run as one kernel, by TensorRT's log
    parity: PlanParity


def find_graph(bundle: Bundle, tier: Tier) -> Path:
    """Return the graph that a plan is built from. Raises BundleError if the bundle lacks it."""
    path = bundle.file(tier.model, tier.tensorrt_graph)
    if f"models/{tier.model}/{tier.tensorrt_graph}" not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.root} has no {tier.tensorrt_graph}, which the tensorrt backend needs; export"
            " the bundle again"
        )
    return path


def make_key(bundle: Bundle, tier: Tier, target: GpuTarget, recipe: Recipe) -> Key:
    """Return the key of a tier's plan. Raises BundleError if the bundle has no graph for it."""
    find_graph(bundle, tier)
    source = bundle.manifest.files[f"models/{tier.model}/{tier.tensorrt_graph}"]
    return Key(bundle=bundle.digest, tier=tier.name, graph=source, target=target, recipe=recipe)


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """Return the batch sizes that run, powers of two and max_batch; others are padded up."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return (*powers, max_batch)


def plans_folder(cache_dir: Path) -> Path:
    """Return the folder of plans in a cache."""
    return cache_dir / "tensorrt"


def load_plan(cache_dir: Path, wanted: Key) -> Plan | None:
    """Return the plan of a key; None if there is none, or its sidecar cannot be read."""
    plan = _sidecar(plans_folder(cache_dir) / f"{wanted.name}.json")
    return plan if plan and plan.key == wanted else None


def find_plan(
    cache_dir: Path, bundle: Bundle, tier: Tier, target: GpuTarget, max_batch: int = 1
) -> Plan:
    """Return the newest plan of a tier for this target that takes batches of max_batch.

    Raises StartError with the command to build one; BundleError if the bundle has no graph for it.
    """
    find_graph(bundle, tier)
    sidecars = sorted(plans_folder(cache_dir).glob("*.json"))
    fitting = [
        plan
        for plan in map(_sidecar, sidecars)
        if plan and plan.key == make_key(bundle, tier, target, plan.key.recipe)
    ]
    if not fitting:
        raise StartError(
            f"no TensorRT plan of tier {tier.name!r} for {target} in {plans_folder(cache_dir)};"
            f" run '{BUILD_COMMAND} {bundle.root}'"
        )
    large_enough = [plan for plan in fitting if plan.key.recipe.max_batch >= max_batch]
    if not large_enough:
        largest = max(plan.key.recipe.max_batch for plan in fitting)
        raise StartError(
            f"the TensorRT plan of tier {tier.name!r} takes batches of at most {largest} images,"
            f" not {max_batch}; serve with --max-batch {largest}, or run '{BUILD_COMMAND}"
            f" {bundle.root} --max-batch {max_batch}'"
        )
    return max(large_enough, key=lambda plan: plan.built)


def read_plan(cache_dir: Path, plan: Plan) -> bytes:
    """Return a plan's bytes. Raises StartError if the file is missing or damaged."""
    path = plans_folder(cache_dir) / f"{plan.key.name}.plan"
    try:
        data = read_regular(path, MAX_PLAN_BYTES)
    except OSError as error:
        raise StartError(
            f"cannot read {path} ({error.strerror}); run '{BUILD_COMMAND}' again"
        ) from None
    if digest(data) != plan.sha256:
        raise StartError(f"{path} is damaged (its SHA-256 is wrong); run '{BUILD_COMMAND}' again")
    return data


def digest(data: bytes) -> str:
    """Return the SHA-256 of a plan in hex."""
    return hashlib.sha256(data).hexdigest()


def write_plan(cache_dir: Path, plan: Plan, data: bytes) -> None:
    """Write a plan and its sidecar to the cache, each atomically. Raises OSError.

    The caller holds the key's lock.
    """
    target = plans_folder(cache_dir) / plan.key.name
    target.with_suffix(".json").unlink(missing_ok=True)  # it describes the plan being replaced
    atomic.write_file(target.with_suffix(".plan"), data)
    atomic.write_file(target.with_suffix(".json"), plan.model_dump_json(indent=1).encode())


def _sidecar(path: Path) -> Plan | None:
    try:
        return Plan.model_validate(read_json(path, MAX_SIDECAR_BYTES))
    except FileNotFoundError:
        return None
    except (OSError, ValueError):  # ValidationError is a ValueError
        log.warning("cannot read %s; ignoring its plan", path)
        return None
