"""The commands of pcae-train: each runs its settings and prints the result and the next command."""

import os
import shlex
import sys

from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config
from pcae_serve.sources.names import local_name
from pcae_training.evaluate import EvaluateSettings, run_evaluation
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.pretrain import pretrain
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.probe import ProbeSettings, run_probe
from pcae_training.score import Top1
from pcae_training.settings import RunSettings
from pcae_training.trainer import STOPPED
from pcae_training.visualize import VisualizeSettings, visualize

#: Whether this process prints, of those that torchrun started.
MAIN = os.environ.get("RANK", "0") == "0"


class Pretrain(PretrainSettings):
    __doc__ = PretrainSettings.__doc__

    def cli_cmd(self) -> None:
        finished = pretrain(self)
        if self.dry_run:
            _print_start(self)
        elif not finished:
            _exit_stopped(self)
        elif MAIN:
            out = self.folder
            print(f"wrote {out}")
            _print_next(
                "fine-tune it with",
                *("pcae-train", "finetune", "--data", self.data, *self.data_flags),
                *("--init", str(out), "--out", f"{out}-finetuned"),
            )


class Finetune(FinetuneSettings):
    __doc__ = FinetuneSettings.__doc__

    def cli_cmd(self) -> None:
        accuracy = finetune(self)
        if self.dry_run:
            _print_start(self)
        elif accuracy is None:
            _exit_stopped(self)
        elif MAIN:
            out = self.folder
            name = next(iter(accuracy.values())).name
            print(f"wrote {out}; {name} on held-out images:")
            for budget, score in accuracy.items():
                print(f"  keep {budget:<4} {score}")
            _print_next(
                "evaluate it on test images with",
                *("pcae-train", "evaluate", str(out), "--data", self.eval_data or self.data),
                *self.data_flags,
            )
            _print_next(
                "export it with",
                *("pcae-export", "bundle", str(out), f"{out}-bundle"),
                *("--eval-data", self.eval_data or self.data),
                *(("--eval-split", self.eval_split) if self.eval_data else ()),
                *_eval_flags(self.data_flags),
                *(() if name == Top1.name else ("--agreement",)),
            )


class Evaluate(EvaluateSettings):
    __doc__ = EvaluateSettings.__doc__

    def cli_cmd(self) -> None:
        evaluation = run_evaluation(self)
        if evaluation is not None:
            print(evaluation, evaluation.by_class(), sep="\n\n")
            _print_next(
                "export it with",
                *("pcae-export", "bundle", self.checkpoint),
                f"{local_name(self.checkpoint)}-bundle",
                *("--eval-data", self.data, "--eval-split", self.split),
                *_eval_flags(self.data_flags),
                *(("--agreement",) if evaluation.several else ()),
            )


class Probe(ProbeSettings):
    __doc__ = ProbeSettings.__doc__

    def cli_cmd(self) -> None:
        print(run_probe(self))
        _print_next(
            "train a classifier on the frozen features with",
            *("pcae-train", "finetune", "--data", self.data, *self.data_flags),
            *("--init", self.checkpoint, "--freeze", "--out", "runs/frozen"),
        )


class Visualize(VisualizeSettings):
    __doc__ = VisualizeSettings.__doc__

    def cli_cmd(self) -> None:
        for file in visualize(self):
            print(f"wrote {file}")


class Train(BaseSettings):
    """Train vision transformers whose one set of weights runs at several token budgets."""

    model_config = config("pcae-train")

    pretrain: CliSubCommand[Pretrain]
    finetune: CliSubCommand[Finetune]
    evaluate: CliSubCommand[Evaluate]
    probe: CliSubCommand[Probe]
    visualize: CliSubCommand[Visualize]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def _eval_flags(flags: list[str]) -> list[str]:
    """Return flags on --data as those of `pcae-export bundle` on --eval-data."""
    pairs = zip(flags[::2], flags[1::2], strict=True)
    return [text for flag, value in pairs for text in (f"--eval-{flag[2:]}", value)]


def _print_next(purpose: str, *command: str) -> None:
    """Print the command that a user would type next."""
    print(f"{purpose}: {shlex.join(command)}")


def _print_start(settings: RunSettings) -> None:
    """Print how to start the run that a dry run has described."""
    if MAIN:
        out = "" if settings.out else ", and with --out"
        print(f"start it with the same command without --dry-run{out}")


def _exit_stopped(settings: RunSettings) -> None:
    """Exit with the code of a run that a signal stopped."""
    if MAIN:
        again = f"continue with the same command and --resume (--out {settings.out})"
        print(f"pcae-train: stopped and saved; {again}", file=sys.stderr)
    sys.exit(STOPPED)
