"""Settings of which images a model is measured on: held out of --data, or --eval-data."""

from typing import Annotated, Self

from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode
from torch import Tensor

from pcae_training.data import LabelledImages
from pcae_training.heldout_record import HeldOut
from pcae_training.holdout import Split, default_holdout, hold_out, hold_out_fold
from pcae_training.inventory import list_classes, print_lines
from pcae_training.label_sets import strata

#: Images held out by default, of large data sets.
DEFAULT_HOLDOUT = 5000


def _read_holdout(value: object) -> object:
    """Return a count or a share. Raise ValueError if it is neither."""
    if value is None:
        return None
    try:
        number = float(str(value))
    except ValueError:
        raise ValueError(f"must be a number of images or a share below 1, not {value!r}") from None
    if 0 < number < 1:
        return number
    if number >= 1 and number == int(number):
        return int(number)
    raise ValueError(f"must be a number of images or a share below 1, not {value}")


def _read_fold(value: object) -> object:
    """Parse I/K. Raise ValueError unless 1 <= I <= K and K >= 2."""
    if value is None:
        return None
    parts = value.split("/") if isinstance(value, str) else value
    try:
        fold, folds = map(int, parts)  # type: ignore[call-overload]
    except (TypeError, ValueError):
        raise ValueError(f"must be I/K, such as 1/5, not {value!r}") from None
    if not 1 <= fold <= folds or folds < 2:
        raise ValueError(f"must be I/K with I from 1 to K, and K at least 2, not {value!r}")
    return fold, folds


class HoldoutSettings(BaseModel):
    """Which images are held out."""

    eval_data: str | None = Field(
        None, description="evaluate on these images instead of images held out of --data"
    )
    eval_split: str = Field("validation", description="split of --eval-data")
    holdout: Annotated[int | float | None, BeforeValidator(_read_holdout)] = Field(
        None,
        description="training images held out for evaluation, from each class by its share: a"
        " number, or a share below 1; default: those that the run of --init held out, else"
        f" {DEFAULT_HOLDOUT:,}, or a fifth of the images if that is less",
    )
    group: str | None = Field(
        None,
        description="hold out whole groups, such as all images of a person: a column of a table, or"
        " folder for CLASS/GROUP/FILE",
    )
    fold: Annotated[tuple[int, int] | None, NoDecode, BeforeValidator(_read_fold)] = Field(
        None,
        description="hold out part I of K equal parts instead, written I/K; a run for each I is"
        " K-fold cross-validation",
    )

    @model_validator(mode="after")
    def _check_holdout(self) -> Self:
        held = {"holdout": self.holdout, "group": self.group, "fold": self.fold}
        given = [f"--{name}" for name, value in held.items() if value is not None]
        if given and self.eval_data is not None:
            raise ValueError(f"--eval-data replaces the hold-out; omit {', '.join(given)}")
        if self.holdout is not None and self.fold is not None:
            raise ValueError("--fold determines how many images are held out; omit --holdout")
        return self


def divide(
    settings: HoldoutSettings,
    images: LabelledImages,
    seed: int,
    before: HeldOut | None = None,
    where: str = "",
) -> Split:
    """Divide images into those to train on and those to evaluate on, and print how many.

    before: what an earlier run held out, named `where`. Raise DataError if it is not possible.
    """
    groups = None if settings.group is None else images.groups(settings.group)
    labels, name = images.labels, images.name
    if images.several:
        labels = strata(labels, groups)
    if settings.fold is not None:
        split = hold_out_fold(labels, *settings.fold, name, seed, groups)
        why = f"fold {settings.fold[0]} of {settings.fold[1]}"
    elif settings.holdout is None and before is not None and (same := before.find(images)):
        held = set(same)
        split = Split([row for row in range(len(images)) if row not in held], same)
        why = f"those that {where} held out"
    else:
        split = hold_out(labels, _count(settings.holdout, labels), name, seed, groups)
        why = "--holdout"
    print_lines(f"held out: {len(split.holdout):,} of {len(images):,} images ({why})")
    if split.unmeasured:
        what = "image" if groups is None else "group"
        names = [*images.classes, "no label"]
        single = [names[label] for label in split.unmeasured]
        print_lines(
            f"  note: the only {what} of {list_classes(single)} stays in training, so"
            f" {'they are' if len(single) > 1 else 'it is'} not measured"
        )
    return split


def _count(holdout: float | None, labels: Tensor) -> int:
    """Return how many images to hold out, from the flag: a count, a share or none."""
    if holdout is None:
        return default_holdout(labels, DEFAULT_HOLDOUT)
    return max(1, round(holdout * len(labels))) if holdout < 1 else int(holdout)
