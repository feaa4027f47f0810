"""pcae-train: the command line of training. It only reads flags and prints results."""

import os
import sys

from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config, run
from pcae_training.evaluate import EvaluateSettings, run_evaluation
from pcae_training.finetune import FinetuneSettings, finetune
from pcae_training.pretrain import PretrainSettings, pretrain
from pcae_training.settings import RunSettings
from pcae_training.trainer import STOPPED
from pcae_training.visualize import VisualizeSettings, visualize

#: Whether this process is the one that prints, where torchrun started several.
MAIN = os.environ.get("RANK", "0") == "0"


class Pretrain(PretrainSettings):
    __doc__ = PretrainSettings.__doc__

    def cli_cmd(self) -> None:
        if not pretrain(self):
            _stopped(self)
        if not self.dry_run and MAIN:
            print(f"wrote {self.out}; fine-tune from it: pcae-train finetune --init {self.out}")


class Finetune(FinetuneSettings):
    __doc__ = FinetuneSettings.__doc__

    def cli_cmd(self) -> None:
        accuracy = finetune(self)
        if accuracy is None:
            _stopped(self)
        if accuracy and MAIN:
            print(f"wrote {self.out}; top-1 on images that were not trained on:")
            for budget, top1 in accuracy.items():
                print(f"  keep {budget:<4} {top1}")


class Evaluate(EvaluateSettings):
    __doc__ = EvaluateSettings.__doc__

    def cli_cmd(self) -> None:
        if (evaluation := run_evaluation(self)) is not None:
            print(evaluation)


class Visualize(VisualizeSettings):
    __doc__ = VisualizeSettings.__doc__

    def cli_cmd(self) -> None:
        for file in visualize(self):
            print(f"wrote {file}")


class Train(BaseSettings):
    """Train vision transformers that answer at several token budgets."""

    model_config = config("pcae-train")

    pretrain: CliSubCommand[Pretrain]
    finetune: CliSubCommand[Finetune]
    evaluate: CliSubCommand[Evaluate]
    visualize: CliSubCommand[Visualize]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def _stopped(settings: RunSettings) -> None:
    if MAIN:
        print(f"pcae-train: stopped; go on with --resume --out {settings.out}", file=sys.stderr)
    sys.exit(STOPPED)


def main() -> None:
    sys.exit(run(Train))


if __name__ == "__main__":
    main()
