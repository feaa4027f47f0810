"""A checkpoint in memory, in the one form that all readers return."""

from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import Pooling
from pcae_training.checkpoint import CheckpointError
from pcae_training.model import ViTConfig


@dataclass
class LoadedCheckpoint:
    """Weights under timm's names, and their labels, preprocessing and origin."""

    config: ViTConfig  # the checkpoint's sizes; 0 classes if it has no head that fits
    weights: dict[str, Tensor]  # float32; exactly the state dict of a model of `config`
    labels: list[str] | None = None
    preprocess: Preprocess | None = None  # None if the checkpoint does not specify it
    ignored: list[str] = field(default_factory=list)  # decoder, pooler: names as in the file
    antialias: bool = False  # whether its model family antialiases when the position grid shrinks
    training: dict[str, Any] = field(default_factory=dict)  # how it was trained, if recorded
    reduction_known: bool = False  # `config.reduction` was recorded, rather than a default
    pooling_known: bool = True  # `config.pooling` is the family's, rather than a guess
    multi_label: bool | None = False  # labels are independent; None if the checkpoint does not say
    head_problem: str | None = None  # why `config` has no classes although it should have some
    notes: list[str] = field(default_factory=list)  # what was chosen among several, for the user

    def drop_head(self) -> "LoadedCheckpoint":
        """Return a copy without the classification head and labels, pooled to the model's width."""
        weights = {name: t for name, t in self.weights.items() if not name.startswith("head")}
        pooling = "cls" if self.config.pooling == "cls-mean" else self.config.pooling
        return replace(
            self,
            config=replace(self.config, classes=0, pooling=pooling),
            weights=weights,
            labels=None,
            multi_label=False,
            head_problem=None,
        )

    def pool_features(self, kind: Literal["cls", "mean"]) -> "LoadedCheckpoint":
        """Return a copy, of one without a head, with other features from the same weights.

        cls: the normed CLS token. mean: the mean over normed patches; of a model whose final norm
        comes after its mean, that. Raise CheckpointError if the weights have no such features.
        """
        own, poolings = self.config.pooling, dict[str, Pooling](cls="cls", mean="normed-mean")
        if own in (poolings[kind], kind):
            return self
        if own == "mean":
            raise CheckpointError("its final norm was trained on the mean over patches, not on CLS")
        if self.config.projection:
            raise CheckpointError(f"its features are a projection of its own pooling ({own})")
        try:
            config = replace(self.config, pooling=poolings[kind])
        except ValueError as error:
            raise CheckpointError(str(error)) from None
        weights = {name: t for name, t in self.weights.items() if not name.startswith("attn_pool")}
        return replace(self, config=config, weights=weights)

    def check_classes(self, path: Path) -> None:
        """Raise CheckpointError, naming `path`, if the classes that it has cannot be used."""
        if self.head_problem is not None:
            raise CheckpointError(f"{path}: {self.head_problem}")
        if self.config.classes == 1 and not self.multi_label:
            raise CheckpointError(
                f"{path} has a single output and does not say what it means (problem_type); export"
                " it with --answers labels if its sigmoid is the probability of a label (regression"
                " is not supported)"
            )
