"""Fine-tune the encoders of `recipes.py` on 1,000 labels, and compare what learns better.

    python benchmarks/few_labels.py run --data FOLDER --work FOLDER --results FILE [--seeds 1 2]
    python benchmarks/few_labels.py table --results FILE

--work and --results are those of `recipes.py run --wave last`, whose encoders are used. A model is
fine-tuned by `pcae-train finetune` on one of the five draws of 1,000 labelled images for which
`recipes.py` also judges frozen features, and measured on its 8,000 test images. A model that has a
line in --results is not made again; several processes can share the work.

Questions, each a difference between models of the same pretraining seed and draw:

    pretraining  PCAE with and without the term on pixels, MAE and none, at keep ratio 1.0
    ranking      a classifier at keep ratio 0.5 that drops by PTR or at random; a pretraining
                 teacher that drops by either
"""

import argparse
import statistics
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow.parquet as pq
import torch
from filelock import FileLock, Timeout
from recipe_tables import interval
from sklearn.model_selection import StratifiedKFold

from pcae_serve.bundle.tokens import Rule
from pcae_training import checkpoint as checkpoints
from pcae_training.data import LabelledImages
from pcae_training.evaluate import evaluate
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from recipes import (
    DRAWS,
    EPOCH,
    EQUAL_TIME,
    GALLERY,
    JUDGED_ON,
    MODEL,
    MORE,
    Images,
    append,
    read,
)

#: What is fixed beforehand: the settings of `questions.py`, without augmentation that does not suit
#: 28 pixels.
FLAGS: dict[str, Any] = {
    "epochs": 10, "batch_size": 64, "lr": 1e-3, "layer_decay": 1.0, "shift": 2, "crop": 0.0,
    "randaugment": 0, "erase": 0.0, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
}  # fmt: skip
NONE = "none"


@dataclass(frozen=True)
class Model:
    """A model to fine-tune. encoder: a run's label of `recipes.py`, or NONE."""

    encoder: str
    seed: int
    draw: int
    keep: float = 1.0
    reduction: Rule = "ptr"

    @property
    def name(self) -> str:
        rule = "" if self.keep == 1 else f"-{self.keep}-{self.reduction}"
        return f"tuned-{self.encoder}{rule}-{self.seed}-{self.draw}"


#: Encoders, the keep ratio and the rule they are fine-tuned for.
KINDS: tuple[tuple[str, float, Rule], ...] = (
    ("judged-pixels", 1.0, "ptr"),
    ("judged-mae-decoder-2", 1.0, "ptr"),
    (NONE, 1.0, "ptr"),
    ("judged-pixels", 0.5, "ptr"),
    ("judged-pixels", 0.5, "random"),
    ("judged-mae", 1.0, "ptr"),
    ("judged-mae-time", 1.0, "ptr"),
    ("judged-features", 1.0, "ptr"),
    ("judged-pixels-random", 1.0, "ptr"),
)
#: Differences that are reported: question, the first and the second of KINDS.
QUESTIONS = (
    ("PCAE with pixels against none", 0, 2),
    ("PCAE with pixels against MAE, decoder of 2 blocks", 0, 1),
    ("PCAE with pixels against MAE, decoder of 8 blocks, equal epochs", 0, 5),
    ("PCAE with pixels against MAE, decoder of 8 blocks, equal time", 0, 6),
    ("PCAE with pixels against PCAE", 0, 7),
    ("PCAE against none", 7, 2),
    ("the teacher drops by PTR against at random", 0, 8),
    ("the classifier drops by PTR against at random, keep ratio 0.5", 3, 4),
)


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("command", choices=("run", "table"))
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST as parquet files")
    parser.add_argument("--work", type=Path, help="folder of the runs of recipes.py")
    parser.add_argument("--results", type=Path, required=True, help="file of JSON lines")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2])
    args = parser.parse_args()
    if args.command == "table":
        print(*table(read(args.results)), sep="\n")
        return
    torch.set_num_threads(1)
    data = Images(str(args.data), args.work)
    for draw in range(DRAWS):
        for seed in args.seeds:
            for kind in KINDS:
                make(Model(kind[0], seed, draw, *kind[1:]), data, args)


def make(model: Model, data: Images, args: argparse.Namespace) -> None:
    """Fine-tune and measure a model that has no result yet and whose encoder is there."""
    encoder = args.work / f"{model.encoder}-{steps(model)}-{model.seed}"
    found = read(args.results)
    if model.name in found or (model.encoder != NONE and encoder.name not in found):
        return
    try:
        with FileLock(args.work / f"{model.name}.lock", timeout=0):
            if model.name not in read(args.results):
                append(args.results, tune(model, encoder, data, args))
    except Timeout:
        return  # another process makes it


def steps(model: Model) -> int:
    """Return the length of an encoder's pretraining, a part of its folder's name."""
    return EQUAL_TIME if model.encoder == "judged-mae-time" else 2 * EPOCH


def tune(model: Model, encoder: Path, data: Images, args: argparse.Namespace) -> dict[str, Any]:
    """Fine-tune an encoder on a draw; return the result."""
    known = np.concatenate([np.arange(len(data.train))[rows] for rows in slices()])
    labels = data.train.labels.numpy()[known]
    parts = StratifiedKFold(DRAWS, shuffle=True, random_state=0).split(known, labels)
    rows = known[[draw for _, draw in parts][model.draw]]
    folder = args.work / f"draw-{model.draw}"
    if not folder.exists():
        [source] = args.data.glob("train-*.parquet")
        folder.mkdir()
        pq.write_table(pq.read_table(source).take(rows), folder / "train.parquet")
    started, cpu_s = time.monotonic(), time.process_time()
    start: dict[str, Any] = dict(MODEL) if model.encoder == NONE else {"init": str(encoder)}
    out = args.work / model.name
    settings = FinetuneSettings(
        data=str(folder), out=out, seed=model.seed, threads=1, keep=model.keep,
        reduction=model.reduction, eval_data=str(args.data), eval_split="test[:200]",
        resume_or_begin=True, **FLAGS, **start,
    )  # fmt: skip
    if finetune(settings) is None:
        raise SystemExit(f"{model.name} was stopped")
    trained_s = time.process_time() - cpu_s
    judged: LabelledImages = data.test.subset(JUDGED_ON)
    scores = evaluate(checkpoints.load(out).model, judged, range(len(judged)), [model.keep])
    score = scores[model.keep]
    return {
        "name": model.name,
        "kind": [model.encoder, model.keep, model.reduction],
        "seed": model.seed,
        "draw": model.draw,
        "flags": FLAGS,
        "labels": len(rows),
        "n": score.n,
        "top1": score.headline.value,
        "train_cpu_s": round(trained_s, 1),
        "wall_s": round(time.monotonic() - started, 1),
    }


def slices() -> Iterator[slice]:
    for rows in (GALLERY, MORE):
        yield slice(rows.start, rows.stop)


def table(found: dict[str, dict[str, Any]]) -> Iterator[str]:
    """Yield the results as Markdown, as far as they are there."""
    tuned = {key: record["top1"] for key, record in found.items() if key.startswith("tuned-")}
    seeds = sorted({record["seed"] for key, record in found.items() if key in tuned})
    cells = [(seed, draw) for seed in seeds for draw in range(DRAWS)]

    def values(kind: tuple[str, float, Rule]) -> dict[tuple[int, int], float]:
        names = {cell: Model(kind[0], *cell, *kind[1:]).name for cell in cells}
        return {cell: 100 * tuned[name] for cell, name in names.items() if name in tuned}

    yield "| encoder | keep | rule | seeds x draws | top-1 %, mean | lowest to highest |"
    yield "| --- " * 6 + "|"
    for kind in KINDS:
        if found_here := list(values(kind).values()):
            low, high = min(found_here), max(found_here)
            mean = statistics.mean(found_here)
            shown = f"{len(found_here)} | {mean:.1f} | {low:.1f} to {high:.1f}"
            yield f"| {kind[0]} | {kind[1]} | {kind[2]} | {shown} |"
    yield ""
    yield "| question | points [95 % over draws] | n | by seed |"
    yield "| --- " * 4 + "|"
    for question, first, second in QUESTIONS:
        one, other = values(KINDS[first]), values(KINDS[second])
        gains = {cell: one[cell] - other[cell] for cell in one if cell in other}
        if len(gains) > 1:
            by_seed = [
                statistics.mean(gain for cell, gain in gains.items() if cell[0] == seed)
                for seed in sorted({seed for seed, _ in gains})
            ]
            shown = ", ".join(f"{gain:+.2f}" for gain in by_seed)
            yield f"| {question} | {interval(list(gains.values()))} | {len(gains)} | {shown} |"


if __name__ == "__main__":
    main()
