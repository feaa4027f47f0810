"""pcae-export: the command line of export. It only reads flags, fetches data and prints results."""

import re
import sys
from pathlib import Path

import torch
from pydantic import BaseModel, Field, field_validator
from pydantic_settings import (
    BaseSettings,
    CliApp,
    CliPositionalArg,
    CliSubCommand,
)

from pcae_export import card, measure, pack, verify
from pcae_serve import bundle as bundles
from pcae_serve.bundle import Bundle
from pcae_serve.command import config, run
from pcae_serve.engines.onnx_runtime import OnnxRuntimeEngine
from pcae_serve.errors import PcaeError
from pcae_serve.tokens import KeepRatio, exact
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages, load


class EvalData(BaseModel):
    """Where the images come from that prove and measure."""

    eval_data: str = Field(
        description="class folders, a folder of parquet, a .parquet file or a hub name"
    )
    eval_split: str = Field("test", description="split of --eval-data")
    parity_images: int = Field(
        verify.MIN_IMAGES, ge=verify.MIN_IMAGES, description="images that parity is proven on"
    )

    def open(self, checkpoint: Checkpoint) -> LabelledImages:
        """The images, checked to carry the checkpoint's labels. Raises PcaeError."""
        images = load(self.eval_data, self.eval_split, checkpoint.preprocess)
        if not checkpoint.labels:
            raise PcaeError("the checkpoint has no classes: fine-tune it before it is exported")
        if images.classes != checkpoint.labels:
            raise PcaeError(
                f"{images.name} has {len(images.classes)} labels ({_first(images.classes)}), but"
                f" the checkpoint {len(checkpoint.labels)} ({_first(checkpoint.labels)}): give data"
                " with the labels it was trained on"
            )
        if len(images) < self.parity_images:
            raise PcaeError(
                f"{images.name} has {len(images)} images, but parity is proven on"
                f" {self.parity_images}: give more"
            )
        return images


class Write(EvalData):
    """Export a checkpoint to a bundle: proven against torch, measured as served, sealed."""

    checkpoint: CliPositionalArg[Path] = Field(description="folder written by pcae-train")
    out: CliPositionalArg[Path] = Field(description="bundle folder to write")
    tier: list[str] = Field(
        [f"{name}={ratio}" for name, ratio in pack.DEFAULT_TIERS.items()],
        description="NAME=RATIO, repeated: the tiers and their keep ratios",
    )
    limit: int | None = Field(
        None, ge=1, description="measure top-1 on so many images, drawn by seed 0"
    )
    name: str | None = Field(None, min_length=1, description="of the bundle; default: OUT's name")
    model_id: str = Field("vit", pattern=bundles.NAME, description="folder of the model")
    card_note: str = Field("", description="a paragraph more for the card, such as licences")
    force: bool = Field(False, description="replace a bundle that stands at OUT")

    @field_validator("tier")
    @classmethod
    def _tiers(cls, given: list[str]) -> list[str]:
        parse_tiers(given)
        return given

    def cli_cmd(self) -> None:
        pack.refuse(self.out, self.force)  # before the slow part
        checkpoint = checkpoints.load(self.checkpoint)
        pack.plan(checkpoint, parse_tiers(self.tier), self.model_id)
        images = self.open(checkpoint)
        order = shuffled(len(images))

        proven: list[verify.Parity] = []

        def judge(draft: Bundle, stored: Checkpoint) -> pack.Evidence:
            pixels = measure.decode(images, order[: self.parity_images])
            proven.append(verify.prove(draft, stored, pixels))
            engine = OnnxRuntimeEngine(draft)
            accuracy = measure.top1(draft, engine, images, order[: self.limit])
            return pack.Evidence(accuracy, proven[0])

        bundle = pack.write(
            checkpoint,
            self.out,
            parse_tiers(self.tier),
            name=self.name,
            model_id=self.model_id,
            judge=judge,
            note=self.card_note,
            force=self.force,
        )
        print(f"wrote {self.out} ({_megabytes(bundle.root):.1f} MB); parity: {proven[0]}")
        _print_tiers(bundle)


class Verify(EvalData):
    """Prove again, from a bundle's own files, that its graphs answer as torch does."""

    bundle: CliPositionalArg[Path] = Field(description="bundle folder")

    def cli_cmd(self) -> None:
        bundle = bundles.load(self.bundle)
        for model in bundle.manifest.models:
            stored = checkpoints.load(bundle.root / "models" / model)
            images = self.open(stored)
            pixels = measure.decode(images, shuffled(len(images))[: self.parity_images])
            parity = verify.prove(bundle, stored, pixels, model)
            print(f"{self.bundle}: parity holds: {parity}")
        _print_tiers(bundle)


class Export(BaseSettings):
    """Turn checkpoints into bundles that pcae-serve serves."""

    model_config = config("pcae-export")

    bundle: CliSubCommand[Write]
    verify: CliSubCommand[Verify]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def parse_tiers(given: list[str]) -> dict[str, KeepRatio]:
    """["fast=0.6", …] to {"fast": "0.6", …}. Raises ValueError that names the one at fault."""
    tiers: dict[str, KeepRatio] = {}
    for text in given:
        name, equals, ratio = text.partition("=")
        if not equals or not re.match(bundles.NAME, name):
            raise ValueError(
                f"{text!r} is no NAME=RATIO, such as fast=0.6 (names: a-z, 0-9, '-' and '_')"
            )
        if name in bundles.RESERVED:
            raise ValueError(f"no tier may be named {name!r}: {bundles.RESERVED[name]}")
        if name in tiers:
            raise ValueError(f"tier {name!r} is given twice")
        exact(ratio)
        tiers[name] = ratio
    if not tiers:
        raise ValueError("at least one tier is needed")
    return tiers


def shuffled(count: int) -> list[int]:
    """Row numbers in an order that is always the same: class folders come class by class."""
    order: list[int] = torch.randperm(count, generator=torch.Generator().manual_seed(0)).tolist()
    return order


def _print_tiers(bundle: Bundle) -> None:
    print(f"{'tier':<12} {'keep':<5} {'patches kept':<16} {'GMACs':>7}  top-1")
    for tier in bundle.tiers:
        counts = ", ".join(map(str, tier.token_counts))
        top1 = card.quality(tier.accuracy) if tier.accuracy else "not measured"
        print(
            f"{tier.name:<12} {tier.keep_ratio:<5g} {counts:<16} {tier.macs / 1e9:>7.3f}  {top1}"
            + ("  dominated" if tier.dominated else "")
        )


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file()) / 1e6


def _first(labels: list[str]) -> str:
    return ", ".join(labels[:3]) + (", …" if len(labels) > 3 else "")


def main() -> None:
    sys.exit(run(Export))


if __name__ == "__main__":
    main()
