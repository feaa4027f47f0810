"""Watch the encoder's features during pretraining, and warn if they collapse.

PCAE's loss is a distance to a teacher's output. A teacher whose output does not depend on the image
is a perfect solution, so a falling loss can mean that the features collapse. The figures (see
`feature_figures`) of a fixed sample of images show it. Each stands next to that of the encoder at
the start of the run, and a warning compares the rank with that of an untrained encoder.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.evaluate import normalise
from pcae_training.feature_figures import NEIGHBOURS, TokenSpread, effective_rank, knn_accuracy
from pcae_training.journal import Journal
from pcae_training.watch_settings import BATCH, Sample

#: Measurements that even a short run makes, if they are cheap.
REPORTS = 8
#: The largest share of a run's steps that measuring may cost, apart from its start and end.
COST_SHARE = 0.05
#: Features have collapsed if their effective rank is below this share of an untrained encoder's.
#: The runs of docs/training.md that collapsed are at 0.52 to 0.91, the healthy ones at 2.3 and
#: more. Just below 1, features that have hardly changed do not warn.
RANK_BOUND = 0.95

FEATURES_RANK = "features/rank"
#: Ending of the figures at the start of the run.
START = "_start"


class Watched(Protocol):
    """The objective whose features are watched."""

    def views(self, images: Tensor) -> Mapping[str, Tensor]:
        """Return patch tokens [b, patches, D] of normalised images, by name."""
        ...


@dataclass(frozen=True)
class WatchTimes:
    """The steps after which features are measured: often in a short run, but never at a high cost.

    cost: of one measurement, in training steps.
    """

    steps_per_epoch: int
    epochs: int
    cost: float

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` steps; always after the last one."""
        epoch, place = divmod(step, self.steps_per_epoch)
        if epoch == self.epochs:
            return True
        affordable = COST_SHARE * self.steps_per_epoch / self.cost  # measurements per epoch
        parts = min(math.floor(affordable), math.ceil(REPORTS / self.epochs), self.steps_per_epoch)
        if parts < 1:
            return place == 0 and epoch % math.ceil(1 / affordable) == 0
        return place in {part * self.steps_per_epoch // parts for part in range(parts)}


class FeatureWatch:
    """The figures of one run. `record` is stored with it, so that a resumed run continues it."""

    def __init__(
        self,
        objective: Watched,
        sample: Sample,
        preprocess: Preprocess,
        device: torch.device,
        times: WatchTimes,
        *,
        first_warning: int,
        advice: str,
        untrained: Watched | None = None,
    ) -> None:
        """first_warning: the step after which it may warn. advice: what to change then.

        untrained: an untrained encoder, if the objective's starts from other weights.
        """
        self.record: dict[str, Any] = {
            "start": {}, "untrained_rank": 0.0, "warned": None, "reports": [],
        }  # fmt: skip
        self._untrained = untrained
        self._objective, self._sample, self._preprocess = objective, sample, preprocess
        self._device, self._times = device, times
        self._first_warning, self._advice = first_warning, advice

    def begin(self, step: int, log: Journal) -> None:
        """Measure the encoder at the start of the run, unless this start continues a run."""
        if step == 0:
            self.record["start"] = figures = self.measure()
            untrained = figures if self._untrained is None else self.measure(self._untrained)
            self.record["untrained_rank"] = untrained[FEATURES_RANK]
            log.report(0, {"epoch": 0, **figures})
        self._untrained = None  # its memory is free again

    def due(self, step: int) -> bool:
        """Return whether to measure after `step` steps."""
        return self._times.due(step)

    def report(self, step: int, log: Journal) -> None:
        """Measure and record the figures after `step` steps; warn once if the rank is too low."""
        figures = self.measure()
        if not all(map(math.isfinite, figures.values())):
            return  # the trainer stops a run whose weights are not finite
        start: dict[str, float] = self.record["start"]
        self.record["reports"].append({"step": step, **figures})
        epoch = (step - 1) // self._times.steps_per_epoch + 1
        earlier = {name + START: value for name, value in start.items()}
        log.report(step, {"epoch": epoch, **figures, **earlier})
        log.write(f"step {step:,}  " + describe(figures, start))
        rank, untrained = figures[FEATURES_RANK], self.record["untrained_rank"]
        if (
            rank < RANK_BOUND * untrained
            and step >= self._first_warning
            and self.record["warned"] is None
        ):
            self.record["warned"] = step
            log.write(
                f"warning: the effective rank of the features, {rank:.2f}, is below the"
                f" {untrained:.2f} of an untrained encoder: they collapse, whatever the loss;"
                f" {self._advice}"
            )

    @torch.inference_mode()
    def measure(self, watched: Watched | None = None) -> dict[str, float]:
        """Return the figures now, such as features/rank; not a number if a token is not finite.

        watched: default: the objective.
        """
        watched = watched or self._objective
        spreads: dict[str, TokenSpread] = {}
        # compiled blocks are not compiled again for these shapes
        with torch.compiler.set_stance("force_eager"):
            for pixels in torch.split(self._sample.pixels, BATCH):
                images = normalise(pixels.to(self._device), self._preprocess)
                for name, tokens in watched.views(images).items():
                    spreads.setdefault(name, TokenSpread()).add(tokens)
        figures: dict[str, float] = {}
        for name, spread in spreads.items():
            features = spread.features
            finite = bool(features.isfinite().all())
            figures[f"{name}/rank"] = effective_rank(features) if finite else math.nan
            figures[f"{name}/deviation"] = spread.deviation
            if name == "features" and self._sample.labels is not None:
                labels = self._sample.labels.to(features.device)
                figures[f"{name}/knn"] = knn_accuracy(features, labels) if finite else math.nan
        return figures


def describe(figures: Mapping[str, float], start: Mapping[str, float]) -> str:
    """Return figures as text, each next to that of the start."""
    parts: dict[str, list[str]] = {}
    for key, value in figures.items():
        name, figure = key.split("/")
        title, pattern = TITLES[figure]
        before = f" ({pattern.format(start[key])} at the start)" if key in start else ""
        parts.setdefault(name, []).append(f"{title} {pattern.format(value)}{before}")
    return "; ".join(f"{name}: {', '.join(each)}" for name, each in parts.items())


#: Title and format of each figure.
TITLES = {
    "rank": ("effective rank", "{:.2f}"),
    "deviation": ("deviation", "{:.3f}"),
    "knn": (f"{NEIGHBOURS}-NN", "{:.1%}"),
}
