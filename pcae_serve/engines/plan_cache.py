"""Plans: what TensorRT built of the tiers' graphs, kept in this machine's cache.

    <cache>/tensorrt/<key>.plan    the engine as TensorRT serialised it
    <cache>/tensorrt/<key>.json    what it was built from, with and on, and its proof; written last

A plan lies here only after its answers were compared with the bundle's on this GPU. This module
knows files and what a plan is valid for, nothing of TensorRT.
"""

import hashlib
import logging
from datetime import datetime
from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, ValidationError

from pcae_serve import atomic
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.reader import Bundle
from pcae_serve.errors import BundleError, StartError
from pcae_serve.frozen_model import FrozenModel

log = logging.getLogger(__name__)

BUILD_COMMAND = "pcae-export tensorrt"


class GpuTarget(FrozenModel):
    """What must be the same where a plan is built and where it runs."""

    library: str  # tensorrt, or tensorrt_rtx
    version: str
    gpu: str
    compute_capability: str

    def __str__(self) -> str:
        return f"{self.gpu} with {self.library} {self.version}"


class Recipe(FrozenModel):
    """How a plan is built: its one optimisation profile and the builder's flags."""

    opt_batch: Annotated[int, Field(ge=1)] = 8  # kernels are chosen for it
    max_batch: Annotated[int, Field(ge=1)] = 32  # batches of one up to it run
    optimization_level: Annotated[int, Field(ge=0, le=5)] = 3
    workspace_mb: Annotated[int, Field(ge=1)] = 4096


class Key(FrozenModel):
    """What a plan is valid for; its hash names the files."""

    bundle: str  # digest
    tier: str
    graph: str  # sha256
    target: GpuTarget
    recipe: Recipe

    @property
    def name(self) -> str:
        """Of the files, without their endings."""
        return digest(self.model_dump_json().encode())[:24]


class Parity(FrozenModel):
    """A plan's answers beside those of the same tier's float32 graph on ONNX Runtime."""

    images: Annotated[int, Field(ge=1)]
    data_set: str
    measure: Literal["top-1 agreement", "mean cosine"]  # of logits, of features
    value: float
    largest_difference: float  # of a number in an answer
    same_patches: float  # share of the patches kept that both keep, over the stages

    def __str__(self) -> str:
        return (
            f"{self.measure} {self.value:.4f} on {self.images} images of {self.data_set}, largest"
            f" difference {self.largest_difference:.2g}, {self.same_patches:.1%} of patches alike"
        )


class Plan(FrozenModel):
    """The sidecar: all that is known of a plan."""

    key: Key
    sha256: str  # of the plan
    built: datetime
    build_s: float
    driver: str  # the newest CUDA that the driver ran
    shapes: dict[str, tuple[int, ...]]  # of `pixels`, least, best and largest
    fused_attention: int  # attention blocks that TensorRT runs as one kernel, as its log names them
    parity: Parity


def find_graph(bundle: Bundle, tier: Tier) -> Path:
    """The graph that TensorRT builds from. Raises BundleError where the bundle lacks it."""
    path = bundle.file(tier.model, tier.tensorrt_graph)
    if f"models/{tier.model}/{tier.tensorrt_graph}" not in bundle.manifest.files:
        raise BundleError(
            f"{bundle.root} has no {tier.tensorrt_graph}, which TensorRT builds from: export the"
            " bundle again"
        )
    return path


def make_key(bundle: Bundle, tier: Tier, target: GpuTarget, recipe: Recipe) -> Key:
    """What a plan of the tier is valid for. Raises BundleError where the bundle has no graph."""
    find_graph(bundle, tier)
    source = bundle.manifest.files[f"models/{tier.model}/{tier.tensorrt_graph}"]
    return Key(bundle=bundle.digest, tier=tier.name, graph=source, target=target, recipe=recipe)


def batch_buckets(max_batch: int) -> tuple[int, ...]:
    """The batch sizes that run: powers of two, then max_batch; others are padded to the next."""
    powers = [1 << i for i in range(max_batch.bit_length()) if 1 << i < max_batch]
    return (*powers, max_batch)


def plans_folder(cache_dir: Path) -> Path:
    """Where plans lie in a cache."""
    return cache_dir / "tensorrt"


def load_plan(cache_dir: Path, wanted: Key) -> Plan | None:
    """The sidecar of that key; None where there is none, or none that can be read."""
    plan = _sidecar(plans_folder(cache_dir) / f"{wanted.name}.json")
    return plan if plan and plan.key == wanted else None


def find_plan(
    cache_dir: Path, bundle: Bundle, tier: Tier, target: GpuTarget, max_batch: int = 1
) -> Plan:
    """The newest plan of a tier that was built for this machine and takes such batches.

    Raises StartError that says what to build; BundleError where the bundle has no graph for it.
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
            f"no TensorRT plan of tier {tier.name!r} for {target} in {plans_folder(cache_dir)}:"
            f" run '{BUILD_COMMAND} {bundle.root}'"
        )
    taking = [plan for plan in fitting if plan.key.recipe.max_batch >= max_batch]
    if not taking:
        most = max(plan.key.recipe.max_batch for plan in fitting)
        raise StartError(
            f"the TensorRT plan of tier {tier.name!r} takes {most} images at most, not"
            f" {max_batch}: serve with --max-batch {most}, or run '{BUILD_COMMAND} {bundle.root}"
            f" --max-batch {max_batch}'"
        )
    return max(taking, key=lambda plan: plan.built)


def read_plan(cache_dir: Path, plan: Plan) -> bytes:
    """The plan as it was written. Raises StartError where it is gone or damaged."""
    path = plans_folder(cache_dir) / f"{plan.key.name}.plan"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StartError(
            f"{path} cannot be read ({error.strerror}): run '{BUILD_COMMAND}' again"
        ) from None
    if digest(data) != plan.sha256:
        raise StartError(f"{path} is not what was written there: run '{BUILD_COMMAND}' again")
    return data


def digest(data: bytes) -> str:
    """Hex digest of a plan, as its sidecar has it."""
    return hashlib.sha256(data).hexdigest()


def write_plan(cache_dir: Path, plan: Plan, data: bytes) -> None:
    """Put a plan and its sidecar into the cache, each whole or not at all. Raises OSError.

    The caller holds the key's lock: names of files being written are fixed, so that those an
    interrupted build left behind are replaced and do not pile up.
    """
    target = plans_folder(cache_dir) / plan.key.name
    target.with_suffix(".json").unlink(missing_ok=True)  # it speaks of the plan being replaced
    atomic.write_file(target.with_suffix(".plan"), data)
    atomic.write_file(target.with_suffix(".json"), plan.model_dump_json(indent=1).encode())


def _sidecar(path: Path) -> Plan | None:
    try:
        return Plan.model_validate_json(path.read_bytes())
    except FileNotFoundError:
        return None
    except (OSError, ValidationError):
        log.warning("%s cannot be read, so its plan is left out", path)
        return None
