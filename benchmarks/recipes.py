"""Search for a pretraining recipe that works in short runs, on Fashion-MNIST.

    python benchmarks/recipes.py targets --data FOLDER --work FOLDER --results FILE
    python benchmarks/recipes.py run --data FOLDER --work FOLDER --results FILE [--wave NAME ...]
    python benchmarks/recipes.py table --results FILE

`targets` describes what an untrained teacher's targets consist of, for five seeds.

A run is a short pretraining by the trainer of `pcae-train`. Its result is one line of JSON in
--results: settings, loss, CPU seconds, and how well the encoder's features (the mean over the
patches) classify 2,000 test images from 4,000 labelled training images. A run that has a line is
not repeated; several processes can share the work.

Waves are successive halvings: the first has many runs of 234 steps, later ones fewer and longer
runs. Choices are made on those 2,000 test images. Runs of the last wave are judged on the other
8,000, also as frozen features for 1,000 labels, five times.
"""

import argparse
import json
import math
import sys
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from filelock import FileLock, Timeout
from recipe_tables import row, table
from sklearn.model_selection import StratifiedKFold
from sklearn.neighbors import KNeighborsClassifier
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.svm import SVC
from torch import Tensor
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pcae_training.data import LabelledImages, load
from pcae_training.evaluate import normalise
from pcae_training.feature_figures import effective_rank
from pcae_training.journal import describe_machine
from pcae_training.masking import Mask, gather, hide_patches, patchify
from pcae_training.model import VisionTransformer
from pcae_training.pretrain import (
    Pcae,
    Pretraining,
    Start,
    Targets,
    build,
    build_decoder,
    cosine_loss,
    embed,
)
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import Encoder, new_encoder
from pcae_training.readouts import predict
from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import momentum
from pcae_training.trainer import Trainer, parameter_groups
from pcae_training.world import join

#: 49 tokens, width 128, depth 12.
MODEL = {"image_size": 28, "patch_size": 4, "width": 128, "depth": 12, "heads": 4}
NEIGHBOURS = 5
#: What is left of the running figures of the targets after a step.
MEMORY = 0.95
#: Untrained teachers whose targets are described.
SEEDS = 5
#: Labelled images: rows of the training images, of the test images that choices are made on, and
#: of those that the last wave is judged on. MORE: with the gallery, five draws of 1,000 labels.
MORE, DRAWS = range(54_000, 55_000), 5
SPREAD_ON = range(600)
GALLERY, CHOSEN_ON, JUDGED_ON = range(50_000, 54_000), range(2_000), range(2_000, 10_000)


@dataclass(frozen=True)
class Variant:
    """What differs from the trainer's `pcae`, none of which has a flag.

    centre: what is subtracted from the teacher's standardised tokens: nothing, or a running mean
    over images of all tokens, or of those at the same position. scale: whether each channel is
    also divided by its running deviation. layers: the targets are the mean of the outputs of this
    many of the teacher's last blocks, each standardised (data2vec, arXiv 2202.03555). pixels: the
    weight of a second loss, MAE's on the pixels of the patches in `pixels_of`. ema_end: the
    momentum changes to this value along a cosine. still: share of the run in which the teacher
    does not move.
    """

    centre: Literal["none", "all", "position"] = "none"
    scale: bool = False
    layers: int = 1
    pixels: float = 0.0
    pixels_of: Literal["kept", "hidden"] = "kept"
    ema_end: float | None = None
    still: float = 0.0


@dataclass(frozen=True)
class Run:
    """A pretraining run. flags: of `pcae-train pretrain`."""

    label: str
    steps: int  # the schedules of learning rate and momentum end here
    flags: dict[str, Any]
    variant: Variant = field(default_factory=Variant)
    seed: int = 0
    judged: bool = False  # also measured on the 8,000 images

    @property
    def name(self) -> str:
        return f"{self.label}-{self.steps}-{self.seed}"


#: The lead of docs/training.md, at a smaller batch size.
LEAD: dict[str, Any] = {
    "method": "pcae", "batch_size": 32, "lr": 4e-4, "warmup": 0.3, "ema": 0.9995, "crop": 0.5,
}  # fmt: skip
SHORT = 234


def first_wave() -> Iterator[Run]:
    """Yield runs that differ from the lead in one factor."""

    def run(label: str, variant: Variant | None = None, **flags: Any) -> Run:
        return Run(label, SHORT, {**LEAD, **flags}, variant or Variant())

    auto = {"ema": None}
    yield run("lead")
    yield run("centre-position", Variant(centre="position"))
    yield run("alarm", **auto, lr=1.5e-3, warmup=0.05)  # the lr and warm-up of the first records
    yield run("lr-1e-3", lr=1e-3)
    yield run("centre-position-lr-1e-3", Variant(centre="position"), lr=1e-3)
    yield run("pixels-hidden", Variant(pixels=1.0, pixels_of="hidden"))
    yield run("layers-12", Variant(layers=12))
    yield run("keep-1.0", teacher_keep=1.0)
    yield run("centre-position-scale", Variant(centre="position", scale=True))
    yield run("mae", method="mae", lr=1e-3, warmup=0.1, ema=None)
    yield run("ema-auto", **auto)
    yield run("mask-0.6", mask_ratio=0.6)
    yield run("mask-0.85", mask_ratio=0.85)
    yield run("lr-1e-4", lr=1e-4)
    yield run("warmup-0.05", warmup=0.05)
    yield run("decoder-width-192", decoder_width=192)
    yield run("defaults", **auto, lr=None, warmup=0.05)
    yield run("centre-all", Variant(centre="all"))
    yield run("ema-0.999", ema=0.999)


#: An epoch in batches of 64.
EPOCH = 938


def second_wave() -> Iterator[Run]:
    """Yield runs of an epoch: after 234 steps no encoder, MAE's included, was a better one."""

    def run(label: str, variant: Variant | None = None, **flags: Any) -> Run:
        return Run(label, EPOCH, {**LEAD, "batch_size": 64, **flags}, variant or Variant())

    pixels = Variant(pixels=1.0, pixels_of="hidden")
    both = Variant(centre="position", pixels=1.0, pixels_of="hidden")
    frozen = Variant(centre="position", still=1.0)
    yield run("pixels-hidden-lr-1e-3", pixels, lr=1e-3, warmup=0.1)
    yield run("mae", method="mae", lr=1e-3, warmup=0.1, ema=None)
    yield run("lead")
    yield run("defaults", lr=None, warmup=0.05, ema=None)
    yield run("centre-position-pixels-lr-1e-3", both, lr=1e-3, warmup=0.1)
    yield run("frozen-centre-position-lr-1e-3", frozen, lr=1e-3, warmup=0.1)


def third_wave() -> Iterator[Run]:
    """Yield runs of an epoch around the best of the second wave, the one with pixels."""

    def run(label: str, weight: float, steps: int = EPOCH, **flags: Any) -> Run:
        given = {**LEAD, "batch_size": 64, "lr": 1e-3, "warmup": 0.1, **flags}
        variant = Variant(pixels=weight, pixels_of="hidden") if weight else Variant()
        return Run(label, steps, given, variant)

    shallow = {"method": "mae", "ema": None, "decoder_depth": 2}  # the decoder of pcae
    yield run("mae-decoder-2", 0.0, **shallow)
    yield run("pixels-hidden-batch-32-lr-1e-3", 1.0, 2 * EPOCH, batch_size=32)
    yield run("pixels-hidden-lr-2e-3", 1.0, lr=2e-3)
    yield run("pixels-hidden-0.25-lr-1e-3", 0.25)
    yield run("mae-batch-32", 0.0, 2 * EPOCH, batch_size=32, method="mae", ema=None)
    yield run("pixels-hidden-ema-auto-lr-1e-3", 1.0, ema=None)


#: Steps of MAE with 8 decoder blocks that take as long as an epoch of PCAE with pixels, by the CPU
#: seconds of the third wave (451 and 318).
EQUAL_TIME = 1323


def last_wave() -> Iterator[Run]:
    """Yield what is compared on the 8,000 images: an epoch in batches of 32, three seeds."""

    def run(label: str, seed: int, steps: int = 2 * EPOCH, **flags: Any) -> Run:
        given = {"batch_size": 32, "lr": 1e-3, "warmup": 0.1, "crop": 0.5, **flags}
        return Run(label, steps, given, seed=seed, judged=True)

    pixels: dict[str, Any] = {"method": "pcae", "ema": 0.9995, "pixel_weight": 1.0}
    for seed in range(1, 4):  # seed 0 has made the choices
        yield run("judged-pixels", seed, **pixels)
        yield run("judged-mae-decoder-2", seed, method="mae", decoder_depth=2)
        yield run("judged-features", seed, method="pcae", ema=0.9995)
        yield run("judged-mae", seed, method="mae")
        yield run("judged-mae-time", seed, EQUAL_TIME, method="mae")
        yield run("judged-pixels-random", seed, **pixels, reduction="random")


class Changed(Pcae):
    """PCAE with a variant."""

    def __init__(self, start: Start, variant: Variant, steps: int) -> None:
        super().__init__(start)
        config, self.variant, self.steps, self.done = start.model.config, variant, steps, 0
        self.values = config.geometry.patch_values
        if variant.pixels:
            self.decoder = build_decoder(config, start.settings, config.width + self.values)
        rows = config.geometry.patches if variant.centre == "position" else 1
        # 1 and the mean and mean square of each channel, all divided by the same sum of weights
        self.register_buffer("sums", torch.zeros(rows, 1 + 2 * config.width))

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        variant, width = self.variant, self.model.config.width
        targets = self.chosen_targets(values, mask.hidden, rng)
        latent = self.encode(values, mask.visible, drop_path)
        wanted = targets.position
        if variant.pixels and variant.pixels_of == "hidden":
            wanted = mask.hidden
        prediction = self.decoder(latent, mask.visible, wanted)
        features = prediction[..., :width]
        if wanted is not targets.position:
            place = (wanted.unsqueeze(1) == targets.position.unsqueeze(2)).float().argmax(dim=2)
            features = gather(features, place)
        loss = cosine_loss(features, self.standardise(targets))
        if variant.pixels:
            pixels = gather(values, wanted)
            variance, mean = torch.var_mean(pixels, dim=-1, keepdim=True)
            pixels = (pixels - mean) / (variance + 1e-6).sqrt()
            error = (prediction[..., width:].float() - pixels).square().mean()
            loss = loss + variant.pixels * error
        return loss

    @torch.no_grad()
    def chosen_targets(self, values: Tensor, hidden: Tensor, rng: SampleRng) -> Targets:
        """Return the teacher's targets, as means over the last `layers` blocks."""
        if self.variant.layers == 1:
            return self.targets(values, hidden, rng)
        assert self.teacher is not None
        network = self.teacher.network
        walk = network.walk(
            embed(network, values, hidden),
            self.teacher.counts,
            points=self.teacher.points,
            prefix=0,
            append=False,
        )
        layers = list(walk)[-self.variant.layers :]
        kept = layers[-1].position
        mean = torch.zeros(())
        for tokens in layers:
            place = (tokens.position.unsqueeze(1) == kept.unsqueeze(2)).float().argmax(dim=2)
            mean = mean + F.layer_norm(gather(tokens.x, place).float(), tokens.x.shape[-1:])
        return Targets(F.layer_norm(mean, mean.shape[-1:]), hidden.gather(1, kept), kept)

    @torch.no_grad()
    def standardise(self, targets: Targets) -> Tensor:
        """Return the tokens, centred and scaled by running figures as the variant says."""
        if self.variant.centre == "none" and not self.variant.scale:
            return targets.tokens
        tokens = targets.tokens.flatten(0, 1)
        rows = targets.position.flatten()
        if self.variant.centre != "position":
            rows = torch.zeros_like(rows)
        ones = torch.ones(len(tokens), 1)
        sums = self.get_buffer("sums")
        new = torch.zeros_like(sums)
        new.index_add_(0, rows, torch.cat([ones, tokens, tokens.square()], dim=1))
        sums.mul_(MEMORY).add_(new)
        mean, square = (sums[:, 1:] / sums[:, :1].clamp(min=1e-9)).chunk(2, dim=1)
        deviation = (square - mean.square()).clamp(min=1e-6).sqrt()
        found = tokens if self.variant.centre == "none" else tokens - mean[rows]
        if self.variant.scale:
            found = found / deviation[rows]
        return found.view_as(targets.tokens)

    def after_step(self) -> None:
        assert self.teacher is not None
        self.done += 1
        progress, variant = self.done / self.steps, self.variant
        if progress <= variant.still:
            return
        if variant.ema_end is not None:
            first, last = self.teacher.ema, variant.ema_end
            now = last - (last - first) * (1 + math.cos(math.pi * progress)) / 2
            self.teacher._average = get_ema_multi_avg_fn(now)  # type: ignore[no-untyped-call]
        super().after_step()


def build_variant(
    variant: Variant, settings: PretrainSettings, encoder: Encoder, steps: int
) -> Pretraining:
    """Return the objective of a run."""
    if variant == Variant():
        return build(settings, encoder, steps)
    ema = settings.ema if settings.ema is not None else momentum(steps)
    return Changed(Start(encoder, settings, ema), variant, steps)


WAVES = {"first": first_wave, "second": second_wave, "third": third_wave, "last": last_wave}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("targets", "run", "table"))
    parser.add_argument("--data", help="folder with Fashion-MNIST as parquet files")
    parser.add_argument("--work", type=Path, help="folder for the runs")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--wave", nargs="+", choices=WAVES, default=list(WAVES))
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    if args.command == "table":
        print(*table(read(args.results)), sep="\n")
        return
    torch.set_num_threads(args.threads)
    if args.command == "targets":
        describe_targets(args)
        return
    runs = [run for wave in args.wave for run in WAVES[wave]()]
    search(runs, args)


def describe_targets(args: argparse.Namespace) -> None:
    """Record what the targets of untrained teachers consist of."""
    data = Images(args.data, args.work)
    for seed in range(SEEDS):
        run = Run("targets", SHORT, LEAD, seed=seed)
        if run.name not in read(args.results):
            objective = start(run, data)
            targets = spread(objective, data.test.subset(SPREAD_ON))
            append(args.results, {"name": run.name, "seed": seed, "targets": targets})


def search(runs: list[Run], args: argparse.Namespace) -> None:
    """Make the runs that have no result yet."""
    waiting = [run for run in runs if run.name not in read(args.results)]
    if not waiting:
        return
    data = Images(args.data, args.work)
    if "pixels" not in read(args.results):
        figures = data.measure(None, judged=True)
        append(args.results, {"name": "pixels", **describe_machine(), **figures})
    for run in waiting:
        name = f"untrained-{run.seed}" + ("-judged" if run.judged else "")
        if name not in read(args.results):
            append(args.results, {"name": name, "seed": run.seed, **untrained(run, data)})
        try:
            with FileLock(args.work / f"{run.name}.lock", timeout=0):
                if run.name in read(args.results):
                    continue
                result = pretrain(run, data, args.work / run.name, args.threads)
                append(args.results, result)
        except Timeout:
            continue  # another process makes it
        except Interrupted:
            sys.exit(f"{run.name} was stopped")
        print(time.strftime("%H:%M:%S"), *row(result), flush=True)


class Interrupted(Exception):
    """A signal stopped a run."""


class Images:
    """The images, decoded once for all processes."""

    def __init__(self, source: str, work: Path) -> None:
        self.preprocess = settings_of(Run("", SHORT, LEAD), Path()).preprocess(28)
        self.train = load(source, "train", self.preprocess)
        self.test = load(source, "test", self.preprocess)
        for name, images in (("train", self.train), ("test", self.test)):
            decoded = work / f"{name}.pt"
            if decoded.exists():
                images._pixels = torch.load(decoded)
            else:
                torch.save(images.in_memory()._pixels, decoded)

    def measure(self, model: VisionTransformer | None, *, judged: bool) -> dict[str, Any]:
        """Return the figures of an encoder's features, or of raw pixels."""

        def view(images: LabelledImages) -> np.ndarray:
            return pixels_of(images) if model is None else encode(model, images, self.preprocess)

        gallery = self.train.subset(GALLERY)
        known, labels = view(gallery), gallery.labels.numpy()
        chosen_on = self.test.subset(CHOSEN_ON)
        found: dict[str, Any] = {
            "rank": effective_rank(torch.from_numpy(known)),
            "chosen_on": classify(known, labels, view(chosen_on), chosen_on.labels.numpy()),
        }
        if judged:
            judged_on, more = self.test.subset(JUDGED_ON), self.train.subset(MORE)
            features, truth = view(judged_on), judged_on.labels.numpy()
            found["judged_on"] = classify(known, labels, features, truth)
            known = np.concatenate([known, view(more)])
            labels = np.concatenate([labels, more.labels.numpy()])
            parts = StratifiedKFold(DRAWS, shuffle=True, random_state=0).split(known, labels)
            found["few_labels"] = [
                classify(known[draw], labels[draw], features, truth, rbf=True) for _, draw in parts
            ]
        return found


def pixels_of(images: LabelledImages) -> np.ndarray:
    """Return the grey values [n, 784], float32."""
    parts = [pixels[:, 0].flatten(1) for pixels, _ in images.batches(range(len(images)), 1000)]
    return torch.cat(parts).float().div(255).numpy()


@torch.inference_mode()
def encode(model: VisionTransformer, images: LabelledImages, preprocess: Any) -> np.ndarray:
    """Return the mean over the patches of the encoder's normed tokens: float32 [n, D]."""
    parts = [
        model.patch_features(normalise(pixels, preprocess)).mean(dim=1)
        for pixels, _ in images.batches(range(len(images)), 250)
    ]
    return torch.cat(parts).float().numpy()


def classify(
    known: np.ndarray,
    labels: np.ndarray,
    features: np.ndarray,
    truth: np.ndarray,
    *,
    rbf: bool = False,
) -> dict[str, float]:
    """Return the accuracy of nearest neighbours, of ridge regression and of an RBF kernel."""
    answers = {
        "knn": KNeighborsClassifier(NEIGHBOURS).fit(known, labels).predict(features),
        "ridge": predict("ridge", known, labels, features),
    }
    if rbf:
        answers["nearest"] = KNeighborsClassifier(1).fit(known, labels).predict(features)
        machine = make_pipeline(StandardScaler(), SVC(C=10))
        answers["rbf"] = machine.fit(known, labels).predict(features)
    return {name: float((each == truth).mean()) for name, each in answers.items()}


@torch.inference_mode()
def spread(objective: Pretraining, images: LabelledImages) -> dict[str, float]:
    """Return what the teacher's targets of images consist of.

    constant, position, image: shares of the tokens' mean squared length: of their mean, of the
    means by position beyond it, and the rest, which depends on the image. loss_constant and
    loss_position: the loss of the best answer that is the same for all tokens, or for all images.
    """
    pixels = torch.cat([pixels for pixels, _ in images.batches(range(len(images)), 100)])
    values = patchify(normalise(pixels, objective.preprocess), objective.model.config.patch_size)
    noise = torch.rand(values.shape[:2], generator=torch.Generator().manual_seed(0))
    mask = hide_patches(noise, objective.settings.hidden_share)
    assert objective.teacher is not None
    targets = objective.teacher(values, mask.hidden, noise)
    tokens, position = F.normalize(targets.tokens, dim=-1), targets.position
    rows = position.flatten()
    count = torch.bincount(rows, minlength=values.shape[1]).clamp(min=1)
    sums = torch.zeros(values.shape[1], tokens.shape[-1])
    by_position = sums.index_add_(0, rows, tokens.flatten(0, 1)) / count[:, None]
    constant = tokens.mean(dim=(0, 1))
    whole = by_position[position]
    return {
        "constant": float(constant.square().sum()),
        "position": float((whole - constant).square().sum(dim=-1).mean()),
        "image": float((tokens - whole).square().sum(dim=-1).mean()),
        "loss_constant": float(1 - constant.norm()),  # the mean direction has the highest cosine
        "loss_position": float(1 - (F.normalize(whole, dim=-1) * tokens).sum(dim=-1).mean()),
    }


def settings_of(run: Run, folder: Path) -> PretrainSettings:
    """Return the trainer's settings of a run."""
    batch_size = run.flags.get("batch_size", 64)
    return PretrainSettings(
        data="fashion-mnist",
        out=folder,
        seed=run.seed,
        resume_or_begin=True,
        epochs=-(-run.steps * batch_size // 60_000),
        watch_images=0,
        **{**MODEL, **run.flags},
    )


def start(run: Run, data: Images) -> Pretraining:
    """Return the trainer's own objective with the weights that a run starts from."""
    settings = settings_of(run, Path())
    torch.manual_seed(run.seed)
    return build(settings, new_encoder(settings, data.preprocess), run.steps)


def untrained(run: Run, data: Images) -> dict[str, Any]:
    """Return the figures of the encoder that a run starts from."""
    return data.measure(start(run, data).model, judged=run.judged)


def pretrain(run: Run, data: Images, folder: Path, threads: int) -> dict[str, Any]:
    """Make a run and measure its encoder. Raise Interrupted."""
    settings = settings_of(run, folder)
    stopped = settings.resume  # of a run that was stopped, the CPU time so far is lost
    count = run.steps * settings.batch_size // settings.epochs
    images = data.train.subset(range(count))
    torch.manual_seed(settings.seed)
    started, cpu_s = time.monotonic(), time.process_time()
    with join(settings.device) as world:
        encoder: Encoder = new_encoder(settings, data.preprocess)
        objective = build_variant(run.variant, settings, encoder, run.steps)
        groups = parameter_groups(objective, objective.model, settings.weight_decay)
        trainer = Trainer(settings, objective, groups, (0.9, 0.95), images, world)
        assert trainer.plan.steps == run.steps
        if not trainer.run():
            raise Interrupted
        trained_s = time.process_time() - cpu_s
        after = data.measure(objective.model, judged=run.judged)
        if settings.has_teacher:
            after["targets"] = spread(objective, data.test.subset(SPREAD_ON))
    (folder / "checkpoint" / "training_state.safetensors").unlink()  # most of the checkpoint's size
    records = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    losses = [record["loss"] for record in records if "loss" in record]
    return {
        "name": run.name,
        "label": run.label,
        "seed": run.seed,
        "steps": run.steps,
        "images": run.steps * settings.batch_size,
        "flags": run.flags,
        "variant": asdict(run.variant),
        "momentum": settings.ema or momentum(run.steps),
        "peak_lr": settings.peak_lr,
        "gmacs_per_image": objective.macs() / 1e9,
        "loss": losses[-1],
        "lowest_loss": min(losses),
        **after,
        "train_cpu_s": None if stopped else round(trained_s, 1),
        "cpu_s": round(time.process_time() - cpu_s, 1),
        "wall_s": round(time.monotonic() - started, 1),
        "threads": threads,
    }


def read(results: Path) -> dict[str, dict[str, Any]]:
    """Return the results so far, by name."""
    if not results.exists():
        return {}
    lines = results.read_text(encoding="utf-8").splitlines()
    return {record["name"]: record for record in map(json.loads, lines)}


def append(results: Path, record: dict[str, Any]) -> None:
    """Add one line to the results."""
    results.parent.mkdir(parents=True, exist_ok=True)
    with results.open("a", encoding="utf-8") as file:
        file.write(json.dumps(record) + "\n")


if __name__ == "__main__":
    main()
