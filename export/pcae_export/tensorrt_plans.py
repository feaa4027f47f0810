"""`pcae-export tensorrt`: build each tier's TensorRT plan on this GPU, verify it, and cache it.

    graph → parse → build → compare with ONNX Runtime's float32 outputs → cache

A plan is verified with the server's own runner. The precision is part of the graphs: networks are
strongly typed, so no flag changes it.
"""

import time
from collections.abc import Iterator, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import cycle
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from filelock import FileLock, Timeout
from numpy.typing import NDArray
from pydantic import BaseModel, Field, model_validator
from pydantic_settings import CliPositionalArg
from tqdm import tqdm

from pcae_export.bundle_source import BUNDLE_HELP, open_bundle
from pcae_export.cpu_session import GraphError, run_graph
from pcae_export.images import IMAGES_HELP, generate, parity_pixels
from pcae_export.measure import cosine
from pcae_export.progress import Progress
from pcae_export.verify import AGREEMENT, COSINE
from pcae_serve import atomic
from pcae_serve.bounded_file import read_regular
from pcae_serve.bundle.manifest import ELASTIC_GRAPH, Tier
from pcae_serve.bundle.probabilities import same_answer
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines import plan_cache
from pcae_serve.engines.base import Output, Pixels
from pcae_serve.engines.cuda_runtime import CudaError, Gpu, find_gpu
from pcae_serve.engines.plan_cache import Key, Plan, PlanParity, Recipe
from pcae_serve.engines.tensorrt import Library, Runner, load_library, to_output
from pcae_serve.errors import PcaeError, StartError
from pcae_serve.flags import Metavar
from pcae_serve.settings import MAX_BATCH, Settings
from pcae_serve.sources.names import ModelName
from pcae_training.class_folders import Layout
from pcae_training.data import load
from pcae_training.data_settings import LAYOUT_HELP
from pcae_training.inventory import print_inventory

MIN_IMAGES = 64
#: Prefix of TensorRT's name for the kernel that computes a whole attention block.
FUSED = "_gemm_mha"


class PlanError(PcaeError):
    """A plan cannot be built, or its outputs differ too much from its graph's."""


@dataclass(frozen=True)
class Built:
    """A plan that has not been verified yet."""

    data: bytes
    seconds: float
    shapes: dict[str, tuple[int, ...]]  # of `pixels`: min, opt, max
    outputs: dict[str, tuple[str, tuple[int, ...]]]  # name -> dtype and shape for one image
    fused_attention: int


class TensorRt(BaseModel):
    """Build a bundle's TensorRT plans on this GPU, verify them and cache them for the server."""

    bundle: CliPositionalArg[Annotated[ModelName, Metavar("BUNDLE")]] = Field(
        description=BUNDLE_HELP
    )
    device: str = Field("cuda:0", description="GPU to build on, and for")
    cache_dir: Path | None = Field(
        None, description="cache folder to write to (default: the server's)"
    )
    max_batch: int = Field(MAX_BATCH, ge=1, description="largest batch that the plan takes")
    opt_batch: int = Field(8, ge=1, description="batch size that kernels are optimised for")
    optimization_level: int = Field(
        3, ge=0, le=5, description="thoroughness of TensorRT's search: 0 is fast, 5 exhaustive"
    )
    workspace_mb: int = Field(4096, ge=1, description="GPU memory for kernels' workspace, in MB")
    eval_data: str | None = Field(
        None, description=f"images: {IMAGES_HELP} (default: generated images)"
    )
    eval_split: str = Field("test", description="split of --eval-data")
    eval_layout: Layout = Field("auto", description=LAYOUT_HELP)
    parity_images: int = Field(256, ge=MIN_IMAGES, description="number of images to verify on")
    dry_run: bool = Field(
        False, description="build every plan and discard it; needs no GPU with tensorrt_rtx"
    )

    @model_validator(mode="after")
    def _ordered(self) -> "TensorRt":
        if self.opt_batch > self.max_batch:
            raise ValueError(f"--opt-batch {self.opt_batch} is above --max-batch {self.max_batch}")
        return self

    @property
    def recipe(self) -> Recipe:
        return Recipe(
            opt_batch=self.opt_batch,
            max_batch=self.max_batch,
            optimization_level=self.optimization_level,
            workspace_mb=self.workspace_mb,
        )

    def cli_cmd(self) -> None:
        bundle = open_bundle(self.bundle, self.cache_dir)
        for tier in bundle.tiers:
            plan_cache.find_graph(bundle, tier)  # report a missing graph before the slow part
        found = load_library()
        if self.dry_run:
            self._build_only(bundle, found)
            return
        gpu = find_gpu(self.device)
        if found.ahead_of_time:
            print(f"TensorRT is not installed; building for {found.name} {found.version}")
        pixels, data_set = self._pixels(bundle)
        cache_dir = self.cache_dir or Settings().cache_dir
        builder = PlanBuilder(bundle, found, gpu, self.recipe, cache_dir, pixels, data_set)
        for tier in bundle.tiers:
            plan, new = builder.ensure(tier)
            state = f"built in {plan.build_s:.0f} s" if new else "already cached"
            print(f"{tier.name:<12} {state:<18} {plan.parity}; {_fused(bundle, tier, plan)}")
        print(f"serve it with: pcae-serve --bundle {self.bundle} --backend tensorrt")

    def _build_only(self, bundle: Bundle, found: Library) -> None:
        if not found.ahead_of_time:
            find_gpu(self.device)  # TensorRT's builder crashes without a GPU
        for tier in bundle.tiers:
            built = build_plan(found, bundle, tier, self.recipe, None)
            print(
                f"{tier.name:<12} builds in {built.seconds:.0f} s with {found.name}"
                f" {found.version}: {len(built.data) / 1e6:.1f} MB; {_fused(bundle, tier, built)}"
            )

    def _pixels(self, bundle: Bundle) -> tuple[Pixels, str]:
        if self.eval_data is None:
            return generate(self.parity_images, bundle.image_size), "generated images"
        data = load(
            self.eval_data,
            self.eval_split,
            bundle.preprocess,
            labelled=False,
            layout=self.eval_layout,
        )
        print_inventory(data.inventory)
        rows = np.random.default_rng(0).permutation(len(data))[: self.parity_images]
        some = data.subset(rows.tolist()).readable()
        return parity_pixels(some, self.parity_images, bundle.image_size, MIN_IMAGES), data.name


@dataclass(frozen=True)
class PlanBuilder:
    """Puts a verified plan of each tier into the cache."""

    bundle: Bundle
    library: Library
    gpu: Gpu
    recipe: Recipe
    cache_dir: Path
    pixels: Pixels  # [N, H, W, 3], to verify on
    data_set: str

    def ensure(self, tier: Tier) -> tuple[Plan, bool]:
        """Return the tier's plan, and whether this call built it.

        One process builds a plan; others wait for it and use it. Raises PlanError if the plan does
        not build or fails verification; nothing is cached then. Raises PcaeError if the cache
        cannot be written.
        """
        key = plan_cache.make_key(self.bundle, tier, self.library.target(self.gpu), self.recipe)
        folder = plan_cache.plans_folder(self.cache_dir)
        try:
            folder.mkdir(parents=True, exist_ok=True)
            with _locked(folder / f"{key.name}.lock", tier):
                plan = self._cached(key)
                return (plan, False) if plan else (self._build(key, tier), True)
        except OSError as error:
            raise PcaeError(
                f"cannot write the plan of tier {tier.name!r} to {folder}"
                f" ({error.strerror or error}); choose another --cache-dir"
            ) from None

    def _cached(self, key: Key) -> Plan | None:
        """Return the cached plan if it is intact and loads."""
        plan = plan_cache.load_plan(self.cache_dir, key)
        if plan is None:
            return None
        try:
            data = plan_cache.read_plan(self.cache_dir, plan)
            Runner(self.library, self.gpu, {key.tier: data}, (1,)).close()
        except StartError as error:
            tqdm.write(f"{error}; rebuilding it")
            return None
        return plan

    def _build(self, key: Key, tier: Tier) -> Plan:
        target = plan_cache.digest(key.target.model_dump_json().encode())[:24]
        timings = plan_cache.plans_folder(self.cache_dir) / f"{target}.timings"
        built = build_plan(self.library, self.bundle, tier, self.recipe, timings)
        parity = verify_plan(
            self.library, self.gpu, self.bundle, tier, built, self.pixels, self.data_set
        )
        plan = Plan(
            key=key,
            sha256=plan_cache.digest(built.data),
            built=datetime.now(UTC),
            build_s=round(built.seconds, 3),
            driver=self.gpu.driver,
            shapes=built.shapes,
            fused_attention=built.fused_attention,
            parity=parity,
        )
        plan_cache.write_plan(self.cache_dir, plan, built.data)
        return plan


def build_plan(
    library: Library, bundle: Bundle, tier: Tier, recipe: Recipe, timings: Path | None
) -> Built:
    """Build a plan from the tier's graph.

    timings: file of kernel timings, read and updated; None to build without. Raises PlanError with
    the message of the parser or the builder.
    """
    trt, graph = library.trt, plan_cache.find_graph(bundle, tier)
    where = f"tier {tier.name!r}: {library.name} {library.version}"
    library.messages.layers.clear()
    builder = trt.Builder(library.messages)
    network = builder.create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, library.messages)
    if not parser.parse_from_file(str(graph)):
        errors = [parser.get_error(number).desc() for number in range(parser.num_errors)]
        reason = (
            "; ".join(error.strip().splitlines()[0] for error in errors) or library.last_error()
        )
        raise PlanError(f"{where} cannot read {graph}: {reason}")
    pixels = network.get_input(0)
    least, best, largest = (
        (batch, *tuple(pixels.shape)[1:]) for batch in (1, recipe.opt_batch, recipe.max_batch)
    )
    profile = builder.create_optimization_profile()
    profile.set_shape(pixels.name, least, best, largest)
    config = builder.create_builder_config()
    config.add_optimization_profile(profile)
    config.builder_optimization_level = recipe.optimization_level
    config.set_memory_pool_limit(trt.MemoryPoolType.WORKSPACE, recipe.workspace_mb << 20)
    config.profiling_verbosity = trt.ProfilingVerbosity.DETAILED  # names layers, for `FUSED`
    if library.ahead_of_time:
        timings = None  # TensorRT-RTX does not time kernels ahead of time
    if timings:
        _read_timings(config, timings)
    start = time.perf_counter()
    with Progress(f"building the plan of tier {tier.name}", 0, "steps") as progress:
        monitor = _monitor(trt, progress)
        config.progress_monitor = monitor
        plan = builder.build_serialized_network(network, config)
    if plan is None:
        raise PlanError(f"{where} cannot build {graph}: {library.last_error()}")
    seconds = time.perf_counter() - start
    if timings:
        atomic.write_file(timings, bytes(config.get_timing_cache().serialize()))
    outputs = map(network.get_output, range(network.num_outputs))
    return Built(
        bytes(plan),
        seconds,
        {"min": least, "opt": best, "max": largest},
        {o.name: (np.dtype(trt.nptype(o.dtype)).name, tuple(o.shape)[1:]) for o in outputs},
        sum(layer.startswith(FUSED) for layer in library.messages.layers),
    )


def verify_plan(
    library: Library,
    gpu: Gpu,
    bundle: Bundle,
    tier: Tier,
    built: Built,
    pixels: Pixels,
    data_set: str,
) -> PlanParity:
    """Run a plan as the server would, and compare it with ONNX Runtime's float32 outputs.

    Every batch size that the server uses runs, and every image of pixels [N, H, W, 3]. Raises
    PlanError if the outputs differ by more than half precision allows.
    """
    sizes = plan_cache.batch_buckets(built.shapes["max"][0])
    try:
        runner = Runner(library, gpu, {tier.name: built.data}, sizes)
        try:
            batches = list(_batches(len(pixels), sizes))
            answers = [to_output(bundle, tier, runner.run(tier.name, pixels[b])) for b in batches]
        finally:
            runner.close()
    except (StartError, CudaError) as error:
        raise PlanError(f"tier {tier.name!r}: the new plan does not run: {error}") from None
    rows = np.concatenate(batches)
    # float32 also for tiers that are served in int8
    try:
        expected = run_graph(bundle.file(tier.model, ELASTIC_GRAPH), pixels, tier.token_counts)
    except GraphError as error:
        raise PlanError(str(error)) from None
    return compare_outputs(
        bundle, tier, _joined(answers), _rows(expected, rows), len(pixels), data_set
    )


def compare_outputs(
    bundle: Bundle, tier: Tier, found: Output, expected: Output, distinct: int, data_set: str
) -> PlanParity:
    """Compare outputs row by row. distinct: number of different images among the rows.

    Raises PlanError if they agree less than AGREEMENT (logits) or COSINE (features).
    """
    if bundle.output == "logits":
        same = same_answer(found.vectors, expected.vectors, bundle.answers)
        same &= np.isfinite(found.vectors).all(axis=1)
        parity_measure, value, least = "top-1 agreement", float(same.mean()), AGREEMENT
        if bundle.answers == "labels":
            parity_measure = "label agreement"
    else:
        near = float(cosine(found.vectors, expected.vectors).mean())
        parity_measure, value, least = "mean cosine", near, COSINE
    shared = [
        len(np.intersect1d(kept, reference)) / len(reference)
        for stages in zip(found.kept, expected.kept, strict=True)
        for kept, reference in zip(*stages, strict=True)
    ]
    difference = float(np.abs(found.vectors - expected.vectors).max())
    if not value >= least:  # negated, so that NaN fails
        raise PlanError(
            f"tier {tier.name!r}: the plan's {parity_measure} with ONNX Runtime is {value:.4f} on"
            f" {distinct} images of {data_set}, below {least} (largest difference"
            f" {difference:.3g}); the plan is discarded"
        )
    return PlanParity(
        images=distinct,
        data_set=data_set,
        measure=parity_measure,
        value=value,
        largest_difference=difference,
        same_patches=float(np.mean(shared)) if shared else 1.0,
    )


def _batches(images: int, sizes: Sequence[int]) -> Iterator[NDArray[np.intp]]:
    """Yield rows of batches: every size once, then in turn until all images have been used."""
    start = 0
    for turn, size in enumerate(cycle(sizes)):
        if turn < len(sizes):
            yield np.arange(start, start + size) % images
        elif start < images:
            yield np.arange(start, min(start + size, images))
        else:
            return
        start += size


def _joined(answers: list[Output]) -> Output:
    stages = zip(*(answer.kept for answer in answers), strict=True)
    return Output(
        np.concatenate([answer.vectors for answer in answers]),
        tuple(np.concatenate(stage) for stage in stages),
    )


def _rows(answers: Output, rows: NDArray[np.intp]) -> Output:
    return Output(answers.vectors[rows], tuple(stage[rows] for stage in answers.kept))


MAX_TIMINGS_BYTES = 1_000_000_000


def _read_timings(config: Any, timings: Path) -> None:
    """Load earlier kernel timings; TensorRT refuses those of another version or GPU."""
    try:
        data = read_regular(timings, MAX_TIMINGS_BYTES)
    except FileNotFoundError:
        data = b""
    if not config.set_timing_cache(config.create_timing_cache(data), False):
        config.set_timing_cache(config.create_timing_cache(b""), False)


def _locked(path: Path, tier: Tier) -> AbstractContextManager[object]:
    lock = FileLock(path)
    try:
        return lock.acquire(timeout=0)
    except Timeout:
        tqdm.write(f"tier {tier.name!r}: waiting for another process to build it")
        return lock.acquire()


def _monitor(trt: Any, progress: Progress) -> Any:
    """Return an IProgressMonitor that updates a progress bar by the steps of the whole build."""

    class Monitor(trt.IProgressMonitor):  # type: ignore[misc]
        def __init__(self) -> None:
            super().__init__()
            self._whole = ""

        def phase_start(self, phase: str, parent: str | None, steps: int) -> None:
            if parent is None:
                self._whole = phase
                progress.reset(steps)
            progress.describe(phase)

        def step_complete(self, phase: str, step: int) -> bool:
            if phase == self._whole:
                progress.update()
            return True  # go on

        def phase_finish(self, phase: str) -> None:
            pass

    return Monitor()


def _fused(bundle: Bundle, tier: Tier, plan: Plan | Built) -> str:
    depth = bundle.manifest.models[tier.model].depth
    return f"{plan.fused_attention} of {depth} attention blocks fused"
