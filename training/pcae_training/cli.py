"""pcae-train: the command line of training. It only reads flags and prints results."""

import sys

from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.command import config, run
from pcae_training.finetune import FinetuneSettings, finetune


class Finetune(FinetuneSettings):
    __doc__ = FinetuneSettings.__doc__

    def cli_cmd(self) -> None:
        accuracy = finetune(self)
        print(f"wrote {self.out}; top-1 on {self.holdout:,} images held out from training:")
        for budget, top1 in accuracy.items():
            print(f"  keep {budget:<4} {top1}")


class Train(BaseSettings):
    """Train vision transformers that answer at several token budgets."""

    model_config = config("pcae-train")

    finetune: CliSubCommand[Finetune]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)


def main() -> None:
    sys.exit(run(Train))


if __name__ == "__main__":
    main()
