"""Three questions about PCAE and PTR, answered by training many small models on Fashion-MNIST.

    1  pretraining: PCAE, MAE and none, at equal epochs and at equal time
    2  ranking: PTR and random dropping, in pretraining and in fine-tuning at keep ratio 0.5
    3  elastic: one set of weights for all budgets, against a fine-tuned model for each

    python benchmarks/questions.py --data FOLDER --work FOLDER --scale two-cores --minutes 60
    python benchmarks/questions.py --work FOLDER --report record.json     # results so far

Every job is a `pcae-train` command in its own folder under --work. A finished job is not repeated;
an interrupted one continues from its checkpoint. Seeds run one after another, so that results are
balanced at any time. Results are top-1 on the test images, paired by seed.
"""

import argparse
import json
import os
import signal
import statistics
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from scipy.stats import t

from pcae_training import checkpoint as checkpoints
from pcae_training.journal import describe_machine
from pcae_training.model import ViTConfig

FAILED, OUT_OF_TIME = 1, 3  # exit codes: a job failed; jobs are left to do
TRAIN = [sys.executable, "-m", "pcae_training.cli"]
BUDGETS = (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3)  # of elastic training
KEEP = (1.0, 0.7, 0.5, 0.3)  # of models fine-tuned for one ratio


@dataclass(frozen=True)
class Scale:
    """Sizes of models and runs."""

    model: tuple[str, ...]
    pretrain_split: str
    pretrain: tuple[str, ...]
    pretrain_epochs: int
    finetune_split: str
    finetune: tuple[str, ...]
    finetune_epochs: int


SCALES = {
    # 49 tokens; one thread of a Xeon with AMX trains about 300 images per second
    "two-cores": Scale(
        model=("--image-size=28", "--patch-size=4", "--width=64", "--depth=12", "--heads=2"),
        pretrain_split="train[:12000]",
        pretrain=("--batch-size=128", "--lr=1.5e-3", "--crop=0.5", "--threads=1"),
        pretrain_epochs=10,
        finetune_split="train[:3000]",
        finetune=("--batch-size=64", "--lr=1e-3", "--holdout=200", "--threads=1", "--shift=2"),
        finetune_epochs=10,
    ),
    # 196 tokens, the paper's geometry, at DeiT-Ti's width
    "gpu": Scale(
        model=("--image-size=28", "--patch-size=2", "--width=192", "--depth=12", "--heads=3"),
        pretrain_split="train",
        pretrain=("--batch-size=512", "--lr=1.5e-3", "--crop=0.5", "--precision=bf16"),
        pretrain_epochs=40,
        finetune_split="train[:10000]",
        finetune=(
            "--batch-size=256", "--lr=1e-3", "--holdout=500", "--shift=2", "--precision=bf16",
        ),
        finetune_epochs=20,
    ),
    # takes seconds: shows that every command runs
    "tiny": Scale(
        model=("--image-size=28", "--patch-size=4", "--width=8", "--depth=11", "--heads=2"),
        pretrain_split="train[:64]",
        pretrain=("--batch-size=32", "--crop=0.5", "--threads=1"),
        pretrain_epochs=1,
        finetune_split="train[:96]",
        finetune=("--batch-size=32", "--lr=1e-3", "--holdout=32", "--threads=1"),
        finetune_epochs=1,
    ),
}  # fmt: skip

#: No augmentation that does not suit 28 pixels, and no drop path, which is for larger models.
PLAIN = ("--randaugment=0", "--erase=0", "--mixup=0", "--cutmix=0", "--crop=0", "--drop-path=0")


@dataclass
class Job:
    """A model to fine-tune or pretrain; `name` is its folder."""

    name: str
    command: list[str]
    after: str | None = None  # the job whose checkpoint it starts from
    keep: tuple[float, ...] = ()  # keep ratios to evaluate; empty for pretraining
    timed_by: tuple[str, ...] = ()  # jobs whose durations determine this one's epochs
    process: subprocess.Popen[bytes] | None = field(default=None, repr=False)


def jobs(scale: Scale, seed: int, data: Path) -> list[Job]:
    """Return the jobs of one seed, the most important first."""
    found: list[Job] = []

    def pretrain(name: str, method: str, *flags: str, timed_by: tuple[str, ...] = ()) -> None:
        command = ["pretrain", f"--method={method}", f"--split={scale.pretrain_split}"]
        command += [f"--epochs={scale.pretrain_epochs}", *scale.model, *scale.pretrain, *flags]
        command += [f"--data={data}", f"--seed={seed}"]
        timing = tuple(f"{job}-{seed}" for job in timed_by)
        found.append(Job(f"{name}-{seed}", command, timed_by=timing))

    def finetune(
        name: str,
        init: str | None,
        keep: float | None,
        *flags: str,
        timed_by: tuple[str, ...] = (),
    ) -> None:
        command = ["finetune", f"--split={scale.finetune_split}", *PLAIN, *scale.finetune]
        command += [f"--epochs={scale.finetune_epochs}", *flags, f"--data={data}"]
        command += [f"--keep={keep}"] if keep else [f"--budgets={','.join(map(str, BUDGETS))}"]
        command += ["--layer-decay=1"] if init else [*scale.model]
        command += [f"--seed={seed}"]
        after = f"{init}-{seed}" if init else None
        timing = tuple(f"{job}-{seed}" for job in timed_by)
        found.append(Job(f"{name}-{seed}", command, after, (keep,) if keep else KEEP, timing))

    pretrain("pcae", "pcae")
    pretrain("mae", "mae")
    finetune("none-1.0", None, 1.0)
    finetune("mae-1.0", "mae", 1.0)
    finetune("pcae-1.0", "pcae", 1.0)
    finetune("pcae-0.5", "pcae", 0.5)
    finetune("pcae-elastic", "pcae", None, "--distil=0.5")
    finetune("pcae-0.5-random", "pcae", 0.5, "--reduction=random")
    finetune("pcae-0.3", "pcae", 0.3)
    finetune("pcae-0.7", "pcae", 0.7)
    pretrain("pcae_random", "pcae", "--reduction=random")
    finetune("pcae_random-1.0", "pcae_random", 1.0)
    pretrain("mae_time", "mae", timed_by=("pcae", "mae"))
    finetune("mae_time-1.0", "mae_time", 1.0)
    finetune("none_time-1.0", None, 1.0, timed_by=("pcae", "pcae-1.0", "none-1.0"))
    finetune("elastic_macs", "pcae", None, "--distil=0.5", f"--epochs={equal_macs(scale)}")
    return found


def equal_macs(scale: Scale) -> int:
    """Return the epochs of elastic training that cost as much as one model for each of KEEP.

    An elastic step runs the largest budget, the smallest and one in between. Without the ramp,
    during which the single models cost more than counted here.
    """
    sizes = dict(flag.removeprefix("--").split("=") for flag in scale.model)
    config = ViTConfig(
        image_size=int(sizes["image-size"]),
        patch_size=int(sizes["patch-size"]),
        width=int(sizes["width"]),
        depth=int(sizes["depth"]),
        heads=int(sizes["heads"]),
        classes=10,
    )
    macs = {k: config.geometry.macs(config.geometry.counts(k)) for k in (*BUDGETS, *KEEP)}
    largest, *inner, smallest = BUDGETS
    step = macs[largest] + macs[smallest] + statistics.mean(macs[k] for k in inner)
    return round(scale.finetune_epochs * sum(macs[k] for k in KEEP) / step)


def work(scale: Scale, args: argparse.Namespace) -> int:
    """Run the jobs of every seed, --jobs at a time. Return 0, FAILED or OUT_OF_TIME."""
    end = time.monotonic() + args.minutes * 60
    waiting = wanted(scale, args)
    waiting = [job for job in waiting if not done(args.work / job.name)]
    running: list[Job] = []
    while (waiting or running) and time.monotonic() < end:
        for job in [job for job in running if job.process and job.process.poll() is not None]:
            if finish(args, job):
                running.remove(job)
        ready = [job for job in waiting if all(done(args.work / name) for name in needs(job))]
        for job in ready[: args.jobs - len(running)]:
            waiting.remove(job)
            start(args, job)
            running.append(job)
        if waiting and not running:
            log(f"{len(waiting)} jobs cannot run: jobs that they depend on have failed")
            return FAILED
        time.sleep(0.2)
    for job in running:
        assert job.process is not None
        job.process.send_signal(signal.SIGTERM)  # it saves a checkpoint to resume from
        job.process.wait()
    if running or waiting:
        log(f"out of time: {len(running)} jobs stopped, {len(waiting)} not started")
        return OUT_OF_TIME
    return 0 if finished(scale, args) else FAILED


def finished(scale: Scale, args: argparse.Namespace) -> bool:
    """Return whether every job has its result."""
    return all(done(args.work / job.name) for job in wanted(scale, args))


def wanted(scale: Scale, args: argparse.Namespace) -> list[Job]:
    """Return the jobs of all seeds, limited to those named by --only."""
    everything = [job for seed in args.seeds for job in jobs(scale, seed, args.data)]
    return [job for job in everything if not args.only or job.name.rsplit("-", 1)[0] in args.only]


def needs(job: Job) -> Iterator[str]:
    """Yield the jobs that must be finished before."""
    if job.after:
        yield job.after
    yield from job.timed_by


def start(args: argparse.Namespace, job: Job) -> None:
    """Start or resume a job."""
    folder = args.work / job.name
    folder.mkdir(parents=True, exist_ok=True)
    command = [*job.command, f"--out={folder}", f"--device={args.device}"]
    if job.after:
        command.append(f"--init={args.work / job.after}")
    if job.timed_by:
        command.append(f"--epochs={equal_time(args.work, job)}")
    if (checkpoints.find_checkpoint(folder) / "config.json").exists():
        command.append("--resume")
    log(f"{job.name}: pcae-train {' '.join(command)}")
    launch(job, command, folder)


def finish(args: argparse.Namespace, job: Job) -> bool:
    """Continue a trained job with its evaluation; return whether the job has ended.

    A job is done if its result file exists.
    """
    assert job.process is not None
    folder = args.work / job.name
    if job.process.returncode:
        log(f"{job.name} failed: see {folder / 'log.txt'}")
        return True
    result = folder / "result.json"
    if job.keep and not result.exists():
        command = ["evaluate", str(folder), f"--data={args.data}", "--split=test"]
        command += [f"--budgets={','.join(map(str, job.keep))}", f"--json={result}"]
        launch(job, [*command, f"--device={args.device}"], folder)
        return False
    if not job.keep:
        result.write_text("{}\n", encoding="utf-8")
    (folder / "checkpoint" / "training_state.safetensors").unlink()  # half of the checkpoint's size
    log(f"{job.name} done")
    return True


def launch(job: Job, command: list[str], folder: Path) -> None:
    """Start a pcae-train command for a job and append its output to the job's log."""
    environment = os.environ | {"OMP_NUM_THREADS": "1"}  # jobs run in parallel
    with (folder / "log.txt").open("ab") as log:
        job.process = subprocess.Popen([*TRAIN, *command], stdout=log, stderr=log, env=environment)


def equal_time(work: Path, job: Job) -> int:
    """Return the epochs that take as long as the other jobs of `timed_by` together.

    The last of `timed_by` is this job at its usual length, which gives the time per epoch.
    """
    *others, same = job.timed_by
    own, all_epochs = spent_s(work / same)
    total = sum(spent_s(work / name)[0] for name in others)
    return max(1, round(total / (own / all_epochs)))


def spent_s(folder: Path) -> tuple[float, int]:
    """Return the seconds of training steps of a job, and its epochs."""
    history = json.loads((folder / "checkpoint" / "training.json").read_text())["history"]
    return sum(epoch["train_s"] for epoch in history), len(history)


def done(folder: Path) -> bool:
    return (folder / "result.json").exists()


def log(text: str) -> None:
    print(f"{time.strftime('%H:%M:%S')} {text}", flush=True)


#: Question, a job and its keep ratio, and the job and keep ratio it is compared with.
COMPARISONS = (
    ("1 pcae against none, equal epochs of fine-tuning", "pcae-1.0", 1.0, "none-1.0", 1.0),
    ("1 pcae against none, equal time", "pcae-1.0", 1.0, "none_time-1.0", 1.0),
    ("1 pcae against mae, equal epochs", "pcae-1.0", 1.0, "mae-1.0", 1.0),
    ("1 pcae against mae, equal time", "pcae-1.0", 1.0, "mae_time-1.0", 1.0),
    ("2 teacher drops by ptr against at random", "pcae-1.0", 1.0, "pcae_random-1.0", 1.0),
    ("2 classifier drops by ptr against at random", "pcae-0.5", 0.5, "pcae-0.5-random", 0.5),
    ("3 elastic against alone, keep 1.0", "pcae-elastic", 1.0, "pcae-1.0", 1.0),
    ("3 elastic against alone, keep 0.7", "pcae-elastic", 0.7, "pcae-0.7", 0.7),
    ("3 elastic against alone, keep 0.5", "pcae-elastic", 0.5, "pcae-0.5", 0.5),
    ("3 elastic against alone, keep 0.3", "pcae-elastic", 0.3, "pcae-0.3", 0.3),
    *(
        (f"3 elastic against alone, equal MACs, keep {k}", "elastic_macs", k, f"pcae-{k}", k)
        for k in KEEP
    ),
    ("3 elastic, keep 0.5 against 1.0", "pcae-elastic", 0.5, "pcae-elastic", 1.0),
    ("3 elastic, equal MACs, keep 0.5 against 1.0", "elastic_macs", 0.5, "elastic_macs", 1.0),
)


def report(args: argparse.Namespace) -> dict[str, Any]:
    """Return the results so far: every job's top-1, and differences paired by seed.

    The 95 % t-interval over seeds includes the variation of training and of test images; with one
    seed there is none.
    """
    seeds = [seed for seed in args.seeds if any(args.work.glob(f"*-{seed}/result.json"))]
    models: dict[str, dict[str, Any]] = {}
    for file in sorted(args.work.glob("*/result.json")):
        name, seed = file.parent.name.rsplit("-", 1)
        seconds, epochs = spent_s(file.parent)
        model = models.setdefault(name, {"train_s": {}, "epochs": {}, "top1": {}})
        model["epochs"][seed] = epochs
        model["train_s"][seed] = round(seconds, 1)
        for budget in json.loads(file.read_text()).get("budgets", []):
            share = budget["top1"]["value"]
            model["top1"].setdefault(str(budget["keep_ratio"]), {})[seed] = share
    compared = []
    for question, one, ratio, other, other_ratio in COMPARISONS:
        pairs = [
            (
                models[one]["top1"][str(ratio)][str(seed)],
                models[other]["top1"][str(other_ratio)][str(seed)],
            )
            for seed in seeds
            if str(seed) in models.get(one, {}).get("top1", {}).get(str(ratio), {})
            and str(seed) in models.get(other, {}).get("top1", {}).get(str(other_ratio), {})
        ]
        points = [100 * (a - b) for a, b in pairs]
        if not points:
            continue
        half = None
        if len(points) > 1:
            spread = statistics.stdev(points) / len(points) ** 0.5
            half = float(t.ppf(0.975, len(points) - 1)) * spread
        compared.append(
            {
                "question": question,
                "points": statistics.mean(points),
                "half_width": half,
                "by_seed": points,
            }
        )
    return {"scale": args.scale, "seeds": seeds, "models": models, "compared": compared}


def table(found: dict[str, Any]) -> Iterator[str]:
    """Yield the report as Markdown."""
    yield "| trained | epochs | seconds | keep | top-1 %, by seed | mean |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for name, model in found["models"].items():
        seconds = statistics.mean(model["train_s"].values())
        for ratio, shares in model["top1"].items() or {"": {}}.items():
            each = ", ".join(f"{100 * share:.2f}" for share in shares.values())
            mean = f"{100 * statistics.mean(shares.values()):.2f}" if shares else ""
            epochs = "/".join(map(str, dict.fromkeys(model["epochs"].values())))
            yield f"| {name} | {epochs} | {seconds:.0f} | {ratio} | {each} | {mean} |"
    yield ""
    yield "| question | points [95 % over seeds] | by seed |"
    yield "| --- | --- | --- |"
    for row in found["compared"]:
        half = row["half_width"]
        interval = "" if half is None else f" ± {half:.2f}"
        each = ", ".join(f"{points:+.2f}" for points in row["by_seed"])
        yield f"| {row['question']} | {row['points']:+.2f}{interval} | {each} |"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--data", type=Path, help="folder with Fashion-MNIST as parquet files")
    parser.add_argument("--work", type=Path, required=True, help="folder for the jobs")
    parser.add_argument("--scale", choices=SCALES, default="two-cores")
    parser.add_argument("--finetune-epochs", type=int, help="instead of the scale's")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--only", nargs="+", help="jobs by name; include those that they depend on")
    parser.add_argument("--jobs", type=int, default=2, help="parallel jobs")
    parser.add_argument("--minutes", type=float, default=60, help="time limit")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--report", type=Path, help="write the results so far to this JSON file")
    args = parser.parse_args()
    scale = SCALES[args.scale]
    if args.finetune_epochs:
        scale = replace(scale, finetune_epochs=args.finetune_epochs)
    code = work(scale, args) if args.data else 0
    found = report(args)
    print(*table(found), sep="\n")
    if args.report:
        content = found | {"finished": finished(scale, args)} | describe_machine()
        args.report.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    sys.exit(code)


if __name__ == "__main__":
    main()
