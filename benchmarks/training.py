"""Speed of training steps: MAE, PCAE and fine-tuning with PTR side by side, images per second.

    python benchmarks/training.py [--device cuda] [--precision bf16] [--batch-size 64] [--json FILE]

By default ViT-B/16 at 224 pixels, on random pixels in device memory, with fused attention in every
case. A step is forward, backward, optimiser and the teacher's moving average, without augmentation.
The cases are interleaved, a round at a time; figures are medians over rounds with quartiles. Each
ratio is compared with the MAC ratio (forward and backward of student and decoder count as three
forward passes, the teacher's forward as one).
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from statistics import median, quantiles
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from pcae_training.checkpoint import Checkpoint
from pcae_training.finetune import Finetuning
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.journal import describe_machine
from pcae_training.model import VisionTransformer
from pcae_training.pretrain import Pretraining, build
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import new_encoder
from pcae_training.sample_rng import SampleRng
from pcae_training.settings import RunSettings
from pcae_training.trainer import parameter_groups


@dataclass
class Case:
    """An objective and its optimiser; a call runs one training step."""

    objective: torch.nn.Module
    optimizer: torch.optim.Optimizer
    settings: RunSettings
    device: torch.device
    steps: int = 0

    def __call__(self) -> None:
        settings, size = self.settings, self.settings.image_size or 224
        shape = (settings.batch_size, 3, size, size)
        if self.steps == 0:
            self.pixels = torch.randint(0, 256, shape, dtype=torch.uint8, device=self.device)
            self.labels = torch.zeros(settings.batch_size, dtype=torch.int64, device=self.device)
        draws = SampleRng(settings.seed, self.steps, settings.batch_size)
        self.optimizer.zero_grad()
        with torch.autocast(
            self.device.type, settings.dtype, enabled=settings.dtype != torch.float32
        ):
            loss = self.objective(self.pixels, self.labels, draws, 1.0)  # after the ramp
        loss.backward()
        self.optimizer.step()
        self.objective.after_step()  # type: ignore[operator]
        self.steps += 1


def pretraining(settings: PretrainSettings, device: torch.device) -> Case:
    """Return a case of a pretraining method."""
    torch.manual_seed(0)
    preprocess = settings.preprocess(settings.image_size or 224)
    objective = build(settings, new_encoder(settings, preprocess), steps=100_000).to(device)
    return _case(objective, settings, device)


def finetuning(settings: FinetuneSettings, device: torch.device, classes: int = 1000) -> Case:
    """Return a case of fine-tuning."""
    torch.manual_seed(0)
    model = VisionTransformer(settings.config(classes))
    labels = [str(i) for i in range(classes)]
    start = Checkpoint(model, settings.preprocess(settings.image_size or 224), labels)
    return _case(Finetuning(start, settings, None).to(device), settings, device)  # type: ignore[arg-type]


def _case(objective: torch.nn.Module, settings: RunSettings, device: torch.device) -> Case:
    groups = parameter_groups(objective, objective.model, settings.weight_decay)  # type: ignore[arg-type]
    optimizer = torch.optim.AdamW(groups, lr=1e-6, fused=True)
    return Case(objective, optimizer, settings, device)


def interleave(
    cases: Mapping[str, Callable[[], None]], rounds: int, steps: int, device: torch.device
) -> dict[str, list[float]]:
    """Return seconds per step of each case and round; an additional first round warms up."""
    seconds: dict[str, list[float]] = {name: [] for name in cases}
    for turn in range(rounds + 1):
        for name, case in cases.items():
            _wait(device)
            begin = time.perf_counter()
            for _ in range(steps):
                case()
            _wait(device)
            if turn:
                seconds[name].append((time.perf_counter() - begin) / steps)
    return seconds


def _wait(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def waits(case: Case) -> int:
    """Return how often a step waits for its GPU, from torch's profiler."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA]) as seen:
        case()
    names = ("cudaStreamSynchronize", "cudaDeviceSynchronize")
    return sum(event.count for event in seen.key_averages() if event.key in names)


def macs(case: Case) -> float:
    """Return the multiply-adds of a training step per image."""
    if isinstance(case.objective, Pretraining):
        return case.objective.macs(1.0)
    assert isinstance(case.settings, FinetuneSettings)
    geometry = case.objective.model.config.geometry  # type: ignore[union-attr]
    return 3.0 * geometry.macs(geometry.counts(case.settings.ratios[-1]))


def cases(args: argparse.Namespace, device: torch.device) -> dict[str, Case]:
    """Return the cases, each group's reference first."""
    common = {
        "data": "none",
        "out": Path("none"),
        "image_size": args.image_size,
        "patch_size": args.patch_size,
        "width": args.width,
        "heads": args.width // 64,
        "batch_size": args.batch_size,
        "precision": args.precision,
        "crop": 0,
        "flip": False,
    }
    plain = {"randaugment": 0, "erase": 0, "mixup": 0, "cutmix": 0, "drop_path": 0}

    def pre(**flags: Any) -> Case:
        return pretraining(PretrainSettings(**common, **flags), device)

    def fine(keep: float) -> Case:
        return finetuning(FinetuneSettings(**common, **plain, keep=keep), device)

    return {
        "mae": pre(method="mae"),
        "mae, 2-block decoder": pre(method="mae", decoder_depth=2),
        "pcae, mask 0.75": pre(method="pcae"),
        "pcae, mask 0.85": pre(method="pcae", mask_ratio=0.85),
        "fine-tune, keep 1.0": fine(1.0),
        "fine-tune, keep 0.6": fine(0.6),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--precision", choices=("fp32", "bf16"), default="fp32")
    parser.add_argument("--batch-size", type=int, default=8)
    parser.add_argument("--image-size", type=int, default=224)
    parser.add_argument("--patch-size", type=int, default=16)
    parser.add_argument("--width", type=int, default=768)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--steps", type=int, default=1, help="steps per round")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    args = parser.parse_args()
    device = torch.device(args.device)
    compared = cases(args, device)
    seconds = interleave(compared, args.rounds, args.steps, device)
    found = rows(compared, seconds, args.batch_size)
    print(*table(found), sep="\n")
    if device.type == "cuda":
        for row in found:
            row["waits_a_step"] = waits(compared[row["case"]])
        print(
            *(f"{row['case']}: waits {row['waits_a_step']} times per step" for row in found),
            sep="\n",
        )
    if args.json:
        flags = {name: value for name, value in vars(args).items() if name != "json"}
        content = {"flags": flags, **describe_machine(), "rows": found}
        args.json.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


def rows(
    compared: Mapping[str, Case], seconds: Mapping[str, list[float]], batch_size: int
) -> list[dict[str, Any]]:
    """Return a row per case, with ratios to its group's reference in the same rounds."""
    found = []
    for name, case in compared.items():
        base = "mae" if isinstance(case.settings, PretrainSettings) else "fine-tune, keep 1.0"
        ratios = [a / b for a, b in zip(seconds[base], seconds[name], strict=True)]
        low, _, high = quantiles(ratios, n=4) if len(ratios) > 1 else ratios * 3
        expected = macs(compared[base]) / macs(case)
        found.append(
            {
                "case": name,
                "img_per_s": batch_size / median(seconds[name]),
                "gmacs_an_image": macs(case) / 1e9,
                "ratio": median(ratios),
                "ratio_quartiles": [low, high],
                "mac_ratio": expected,
                "efficiency": median(ratios) / expected,
                "rounds": len(ratios),
            }
        )
    return found


def table(found: list[dict[str, Any]]) -> Iterator[str]:
    """Yield the rows as a Markdown table."""
    yield "| case | img/s | GMACs per image | ratio (quartiles) | MAC ratio | ratio / MAC ratio |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for row in found:
        low, high = row["ratio_quartiles"]
        yield (
            f"| {row['case']} | {row['img_per_s']:.1f} | {row['gmacs_an_image']:.2f}"
            f" | {row['ratio']:.2f} ({low:.2f}-{high:.2f}) | {row['mac_ratio']:.2f}"
            f" | {row['efficiency']:.2f} |"
        )


if __name__ == "__main__":
    main()
