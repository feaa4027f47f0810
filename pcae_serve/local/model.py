"""`pcae_serve.load`: a bundle in this process, with the answers of a server and without one."""

import logging
import os
from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import partial
from math import inf, isfinite
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, get_args, overload

from pcae_serve import schemas
from pcae_serve.bundle.features import DType
from pcae_serve.bundle.preprocess import MAX_PIXELS
from pcae_serve.bundle.reader import demo_path, load_bundle
from pcae_serve.errors import InvalidParameter, TaskNotSupported
from pcae_serve.local.deadlines import POLICY
from pcae_serve.local.image_source import ImageLike, is_image, is_sequence
from pcae_serve.local.runner import Answered, Outcome, Runner, open_runner
from pcae_serve.runtime import refusals, results
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult
from pcae_serve.runtime.tier_info import describe_bundle
from pcae_serve.settings import CACHE_DIR, MAX_BATCH
from pcae_serve.sources.locate import locate_bundle

log = logging.getLogger(__name__)

D = TypeVar("D")
OnError = Literal["raise", "return"]


def load(
    bundle: str | os.PathLike[str] | None = None,
    *,
    device: str = "auto",
    backend: str = "auto",
    threads: int = 0,
    decode_threads: int = 0,
    max_batch: int = MAX_BATCH,
    max_pixels: int = MAX_PIXELS,
    cache_dir: str | os.PathLike[str] = CACHE_DIR,
) -> "Model":
    """Load a bundle into this process; without a name, the demo bundle inside the package.

    bundle: folder of the bundle, or its name, such as hf://OWNER/NAME@REVISION.
    device: one device.

    The other parameters are those of the server of the same name (docs/configuration.md); no
    variable of the server and no config file is read.

    Raise BundleError, FetchError or StartError, which are PcaeErrors, with a one-line reason.
    """
    folder = demo_path()
    if bundle is not None:
        report = partial(log.info, "bundle %s")
        folder = locate_bundle(os.fspath(bundle), Path(cache_dir), report)
    return Model(
        open_runner(
            load_bundle(folder),
            device=device,
            backend=backend,
            threads=threads,
            decode_threads=decode_threads,
            max_batch=max_batch,
            max_pixels=max_pixels,
            cache_dir=Path(cache_dir),
        )
    )


class Model:
    """A bundle in this process. Use it as a context manager, or call `close`.

    Threads may share it. A process that was forked afterwards cannot use it: call `load` there.

        >>> with pcae_serve.load() as model:
        ...     answer = model.classify("docs/samples/bag.png")
        >>> answer.predictions[0].label, answer.tier
        ('Bag', 'full')
    """

    def __init__(self, runner: Runner) -> None:
        """Use `load` instead. The runner is closed with the model."""
        self._runner = runner

    @overload
    def classify(  # type: ignore[overload-overlap]  # a str is a Sequence[str]
        self,
        images: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int = 2,
    ) -> schemas.Classification: ...
    @overload
    def classify(  # type: ignore[overload-overlap]
        self,
        images: Sequence[ImageLike],
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int = 2,
    ) -> list[schemas.Classification]: ...
    @overload
    def classify(
        self,
        images: Iterable[ImageLike],
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int = 2,
    ) -> Iterator[schemas.Classification]: ...
    @overload
    def classify(
        self,
        images: Any,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int = 2,
        on_error: OnError,
    ) -> Any: ...

    def classify(
        self,
        images: Any,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        top_k: int = 5,
        explain: bool = False,
        max_looks: int = 2,
        on_error: OnError = "raise",
    ) -> Any:
        """Classify images and return the `top_k` most probable classes of each.

        images: one image: the path of a file, the bytes of one, a Pillow image, or an array uint8
        [H, W, 3] or [H, W]. Or several: a list or tuple of images, or an array [N, H, W, 3], gives
        a list of answers; any other iterable gives an iterator, which decodes a few batches ahead.
        tier: name of a tier, or "auto": the most accurate one, under a budget that meets it.
        budget_ms: milliseconds from this call until all answers are needed; of an iterator, for
        each image from when it is taken, one at a time. If None, nothing is measured or refused.
        min_tier: cheapest tier that "auto" may use.
        explain: also return the indices of the patches kept after each stage.
        max_looks: how often an image with a budget may run: 1 forbids a second look on a better
            tier.
        on_error: "raise" the first error of an image; or "return" it in place of its answer.

        Raise RequestErrors as the server reports them (docs/errors.md), OSError if a file cannot be
        read, TypeError or ValueError for what is not an image, PcaeError if the model is closed.
        """
        if top_k < 1:
            raise InvalidParameter(f"top_k must be at least 1, not {top_k}")
        if max_looks not in (1, 2):
            raise InvalidParameter(f"max_looks is 1 or 2, not {max_looks!r}")
        document = partial(results.classification, top_k=top_k, explain=explain)
        return self._answer(
            images, "logits", tier, min_tier, budget_ms, on_error, document, max_looks=max_looks
        )

    @overload
    def embed(  # type: ignore[overload-overlap]
        self,
        images: ImageLike,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: DType = "float32",
        patches: bool = False,
    ) -> schemas.Embedding: ...
    @overload
    def embed(  # type: ignore[overload-overlap]
        self,
        images: Sequence[ImageLike],
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: DType = "float32",
        patches: bool = False,
    ) -> list[schemas.Embedding]: ...
    @overload
    def embed(
        self,
        images: Iterable[ImageLike],
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: DType = "float32",
        patches: bool = False,
    ) -> Iterator[schemas.Embedding]: ...
    @overload
    def embed(
        self,
        images: Any,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: DType = "float32",
        patches: bool = False,
        on_error: OnError,
    ) -> Any: ...

    def embed(
        self,
        images: Any,
        *,
        tier: str = "auto",
        budget_ms: float | None = None,
        min_tier: str | None = None,
        explain: bool = False,
        normalize: bool = False,
        dtype: DType = "float32",
        patches: bool = False,
        on_error: OnError = "raise",
    ) -> Any:
        """Return the features of images, from a bundle whose models have no head.

        normalize: divide the features by their Euclidean length.
        dtype: "float32", or "float16" for values that are rounded to it.
        patches: also return the state of every patch [H][W][D], from a bundle that was exported
            with --dense.

        The other parameters and the errors are those of `classify`.
        """
        if dtype not in get_args(DType):
            raise InvalidParameter(f"dtype is float32 or float16, not {dtype!r}")
        document = partial(results.embedding, explain=explain, normalize=normalize, dtype=dtype)
        return self._answer(
            images, "features", tier, min_tier, budget_ms, on_error, document, patches
        )

    def tiers(self) -> schemas.Tiers:
        """Return the bundle, the device and the tiers, the cheapest first.

        Latencies are included once a call had a budget.
        """
        self._runner.require_usable()
        runner = self._runner
        return describe_bundle(
            runner.bundle,
            runner.engine,
            runner.forecast(),
            runner.max_batch,
            device=runner.engine.device,
            policy=POLICY,
            budget_ms=inf,
            max_looks=1,
        )

    def close(self) -> None:
        """Wait for the batches in progress and release the engine; later calls raise PcaeError."""
        self._runner.close()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _answer(
        self,
        images: Any,
        output: Literal["logits", "features"],
        tier: str,
        min_tier: str | None,
        budget_ms: float | None,
        on_error: OnError,
        document: Callable[[InferenceResult, InferenceRequest], D],
        dense: bool = False,
        max_looks: int = 2,
    ) -> D | list[D] | Iterator[D]:
        """Check the arguments, and answer one image, a sequence, or lazily any iterable."""
        bundle = self._runner.bundle
        if output != bundle.output:
            other = "classify" if bundle.output == "logits" else "embed"
            raise TaskNotSupported(f"this bundle's models compute {bundle.output}; call {other}")
        if dense and (error := refusals.no_patches(bundle, [self._runner.engine])):
            raise error
        if on_error not in ("raise", "return"):
            raise ValueError(f'on_error is "raise" or "return", not {on_error!r}')
        if budget_ms is not None and not (isfinite(budget_ms) and budget_ms > 0):
            raise InvalidParameter(f"budget_ms must be a number above 0, not {budget_ms!r}")
        tiers, pinned = bundle.allowed_tiers(tier, min_tier), tier != "auto"
        request = InferenceRequest(0.0, inf if budget_ms is None else budget_ms, tier, min_tier)
        if budget_ms is not None:
            self._runner.measure()  # before the budget's clock starts
        self._runner.require_usable()

        def answers(several: Iterable[ImageLike]) -> Iterator[D]:
            outcomes: Iterable[Outcome]
            if budget_ms is None:
                outcomes = self._runner.run(several, tiers, pinned, dense)
            else:
                outcomes = self._runner.run_in_time(
                    list(several), tiers, pinned, budget_ms, dense, max_looks
                )
            for outcome in outcomes:
                if isinstance(outcome, Answered):
                    yield document(outcome.result, request)
                elif on_error == "raise":
                    raise outcome
                else:
                    yield outcome  # type: ignore[misc]  # as the caller asked for

        if is_image(images):
            [answer] = answers([images])
            return answer
        if is_sequence(images):
            return list(answers(images))
        if budget_ms is None:
            return answers(images)
        return (answer for image in images for answer in answers([image]))
