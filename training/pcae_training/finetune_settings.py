"""Settings of `pcae-train finetune`: its flags, recorded in run.json."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import BeforeValidator, Field, model_validator
from pydantic_settings import NoDecode

from pcae_serve.bundle.tokens import Rule
from pcae_serve.flags import Metavar
from pcae_serve.sources.names import ModelName
from pcae_training.adapter_settings import AdapterSettings
from pcae_training.budget_choice import BudgetChoice
from pcae_training.class_weights import ClassWeights, read_weights
from pcae_training.evaluate import read_ratios
from pcae_training.holdout_settings import HoldoutSettings
from pcae_training.schedule import keep_ratio_ramp
from pcae_training.settings import RunSettings


def _read_names(value: object) -> object:
    return [part.strip() for part in value.split(",")] if isinstance(value, str) else value


def _read_pairs(value: object) -> object:
    """Parse RATIO=NUMBER pairs separated by commas. Raise ValueError if a text is none."""
    if not isinstance(value, str):
        return value
    pairs = [part.split("=") for part in value.split(",")]
    if any(len(pair) != 2 for pair in pairs):
        raise ValueError(f"must be RATIO=NUMBER, separated by commas, not {value!r}")
    return pairs


def _read_points(value: object) -> object:
    return tuple(value.strip("[]()").split(",")) if isinstance(value, str) else value


#: Numbers by keep ratio, as pairs.
RatioValues = Annotated[
    tuple[tuple[float, Annotated[float, Field(ge=0)]], ...], NoDecode, BeforeValidator(_read_pairs)
]


#: Defaults of --preset; flags that are given override them.
PRESETS: dict[str, dict[str, Any]] = {
    # hundreds to a few thousand photographs and pretrained weights: little that distorts an image,
    # the head first, and the best epoch of an averaged model
    "small-data": {
        "epochs": 30, "blr": 1e-3, "layer_decay": 0.75, "freeze_first": 0.2, "crop": 0.5,
        "randaugment": 0.0, "erase": 0.1, "mixup": 0.0, "cutmix": 0.0, "drop_path": 0.0,
        "weight_ema": 0.99, "select": "best",
    },
}  # fmt: skip


class FinetuneSettings(HoldoutSettings, AdapterSettings):
    """Fine-tune on labelled images, for one keep ratio or for all budgets.

    The defaults are MAE's recipe and the paper's ramp.
    """

    flag_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RunSettings.flag_groups,
        "run": (
            "preset", "init", "weights", "freeze", "freeze_first", "lora", "lora_targets",
            "lora_alpha", *RunSettings.flag_groups["run"],
        ),
        "evaluation": (
            "eval_data", "eval_split", "holdout", "group", "fold", "select", "patience",
        ),
        "token reduction": (
            "keep", "budgets", "sampling", "budget_probabilities", "between", "budget_weights",
            "distil", "distil_from", "ramp_start", "ramp_length", "reduction", "reduction_points",
        ),
        "classes": ("class_weights", "balance"),
        "teachers": ("teacher", "teacher_share"),
        "model": (*RunSettings.flag_groups["model"], "pooling"),
        "augmentation": (
            *RunSettings.flag_groups["augmentation"], "randaugment", "erase", "mixup", "cutmix",
            "label_smoothing",
        ),
        "optimiser": (*RunSettings.flag_groups["optimiser"], "layer_decay", "weight_ema"),
    }  # fmt: skip

    preset: Literal["small-data"] | None = Field(
        None,
        description="other defaults; small-data: for a few thousand photographs or fewer, with"
        " --init",
    )
    freeze: bool = Field(
        False,
        description="train only what --init does not provide, such as a new head; the rest stays as"
        " it is",
    )
    freeze_first: float = Field(
        0.0, ge=0, le=1, description="share of the run before which everything else stays frozen"
    )
    pooling: Literal["mean", "cls"] | None = Field(
        None,
        description="input of the head: mean of the patches or CLS; default: mean, or as --init",
    )
    select: Literal["last", "best"] = Field(
        "last",
        description="weights to keep at the end; best: those of the epoch with the highest held-out"
        " top-1, the mean of the largest and the smallest budget",
    )
    patience: int | None = Field(
        None,
        ge=1,
        description="stop after this many epochs without a better one, with --select best",
    )

    keep: float | None = Field(
        None, gt=0, le=1, description="train for one keep ratio, as in the paper"
    )
    budgets: Annotated[tuple[float, ...], NoDecode, BeforeValidator(read_ratios)] = Field(
        (1.0, 0.9, 0.8, 0.7, 0.6, 0.5, 0.4, 0.3),
        description="keep ratios to train for, separated by commas",
    )
    sampling: Literal["sandwich", "one"] = Field(
        "sandwich",
        description="budgets per step; sandwich: the largest, the smallest and some between; one: a"
        " random one",
    )
    between: int = Field(
        1, ge=0, description="for sandwich: number of random budgets between the ends"
    )
    distil: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of the smaller budgets' loss that is distilled from the largest budget's"
        " output; the rest is from the labels",
    )
    distil_from: Literal["largest", "average"] = Field(
        "largest",
        description="what --distil learns from, at the largest budget; largest: the weights of this"
        " step, which needs --sampling sandwich; average: those of --weight-ema",
    )
    budget_probabilities: RatioValues = Field(
        (),
        description="how often a budget is drawn, as in 1.0=0.25,0.3=0.2; the others share the rest"
        " equally",
    )
    budget_weights: RatioValues = Field(
        (), description="factors on the loss of budgets, as in 1.0=2; the others have 1"
    )
    ramp_start: float = Field(
        0.10, ge=0, le=1, description="share of the run before anything is dropped"
    )
    ramp_length: float = Field(
        0.25, ge=0, le=1, description="share of the run over which the drop ratio rises"
    )
    reduction: Rule | None = Field(
        None, description="rule that ranks the patches; default: as --init, else ptr"
    )
    reduction_points: Annotated[tuple[int, ...] | None, NoDecode, BeforeValidator(_read_points)] = (
        Field(
            None,
            description="blocks after which patches are dropped, counted from 0, separated by"
            " commas; default: as --init, else 0,7,10 of 12 blocks, at the same relative depths of"
            " others",
        )
    )

    class_weights: Annotated[
        ClassWeights | None,
        NoDecode,
        BeforeValidator(read_weights),
        Metavar("auto|FILE.json|NAME=WEIGHT,…"),
    ] = Field(
        None,
        description="weights of classes in the loss: auto (by the inverse of their number of"
        " images), NAME=WEIGHT separated by commas, or a .json file of an object; scaled to a mean"
        " of 1 over the training images",
    )
    balance: bool = Field(
        False, description="show each class equally often, whatever its number of images"
    )

    teacher: Annotated[tuple[ModelName, ...], NoDecode, BeforeValidator(_read_names)] = Field(
        (),
        description="models to learn from, on the same pixels, separated by commas: FILE.onnx, or"
        " what --init takes; the mean of their probabilities counts",
    )
    teacher_share: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of a target that is the teachers' probabilities; the rest is the label",
    )

    weight_ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="decay of a moving average of the weights, such as 0.999; the average is"
        " evaluated, saved and exported; 0 = off",
    )
    min_lr: float = Field(1e-6, ge=0, description="learning rate at the end of the run")
    layer_decay: float | None = Field(
        None,
        gt=0,
        le=1,
        description="learning rate of a layer over that of the layer above; default: 0.65 with"
        " --init and without --lora, else 1",
    )
    drop_path: float = Field(
        0.1, ge=0, lt=1, description="stochastic depth: drop rate of the last block; 0 = off"
    )
    crop: float = Field(
        0.08, ge=0, le=1, description="smallest share of the area a random crop keeps; 0 = off"
    )
    randaugment: float = Field(9, ge=0, le=10, description="magnitude of RandAugment; 0 = off")
    erase: float = Field(
        0.25, ge=0, le=1, description="share of images with a random rectangle erased; 0 = off"
    )
    mixup: float = Field(0.8, ge=0, description="alpha of mixup; 0 = off")
    cutmix: float = Field(1.0, ge=0, description="alpha of CutMix; 0 = off")
    label_smoothing: float = Field(
        0.1, ge=0, lt=1, description="share of a target spread over all classes; 0 = off"
    )

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        """Add the defaults of --preset to what is given."""
        preset = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        preset = dict(preset)
        if given.get("freeze") or given.get("init") is None:
            del preset["freeze_first"]
        if given.get("lora"):
            del preset["layer_decay"]
        return preset | given

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.ramp_start + self.ramp_length > 1:
            raise ValueError("--ramp-start and --ramp-length together exceed the run (1.0)")
        if self.keep is not None and "budgets" in self.model_fields_set:
            raise ValueError("--keep trains for one keep ratio, --budgets for several; omit one")
        if self.init is None:
            points = self.reduction_points
            config = self.config(
                classes=1, **({} if points is None else {"reduction_points": points})
            )
            for budget in self.ratios:
                config.geometry.counts(budget)
            if not config.reduction_points and self.ratios[-1] < 1:
                raise ValueError(f"--depth {self.depth} is too small to drop patches; it needs 3")
        if self.stream and self.eval_data is None:
            raise ValueError("--stream cannot hold images out; give --eval-data")
        if self.balance and self.class_weights is not None:
            raise ValueError("--balance shows each class equally often; omit --class-weights")
        if self.stream and (self.balance or self.class_weights is not None):
            flag = "--balance" if self.balance else "--class-weights"
            raise ValueError(f"{flag} needs the labels of all images at once; omit --stream")
        return self

    @model_validator(mode="after")
    def _check_learning(self) -> Self:
        if (self.freeze or self.freeze_first) and self.init is None:
            raise ValueError("--freeze keeps the weights of --init, which is missing")
        if self.freeze and self.freeze_first:
            raise ValueError("--freeze holds for the whole run; omit --freeze-first")
        if self.freeze and self.lora is not None:
            raise ValueError(
                "--freeze trains no adapters; omit it or --lora (the head first: --freeze-first)"
            )
        if self.patience is not None and "select" not in self.model_fields_set:
            self.select = "best"
        if self.patience is not None and self.select != "best":
            raise ValueError("--patience looks for the best epoch; it needs --select best")
        if self.distil_from == "average" and not self.weight_ema:
            raise ValueError("--distil-from average needs --weight-ema")
        if self.distil_from == "average" and len(self.ratios) == 1:
            raise ValueError("--distil-from average needs several --budgets")
        for flag, pairs in (
            ("--budget-probabilities", self.budget_probabilities),
            ("--budget-weights", self.budget_weights),
        ):
            for ratio, _ in pairs:
                if ratio not in self.ratios:
                    trained = ", ".join(map(str, self.ratios))
                    raise ValueError(f"{flag}: {ratio} is not a budget of this run ({trained})")
        total, named = sum(odds for _, odds in self.budget_probabilities), self.budget_probabilities
        if total > 1 + 1e-9 or (len(named) == len(self.ratios) and total < 1 - 1e-9):
            raise ValueError(f"--budget-probabilities: they sum to {total:g}, not to 1")
        return self

    @property
    def ratios(self) -> tuple[float, ...]:
        """The keep ratios to train for, from the largest."""
        return self.budgets if self.keep is None else (self.keep,)

    @property
    def ramp(self) -> tuple[float, ...]:
        """All keep ratios that occur in training, from 1.0 down."""
        if self.keep is not None:
            return keep_ratio_ramp(self.keep)
        return self.budgets if self.budgets[0] == 1.0 else (1.0, *self.budgets)

    @property
    def decay_of_layers(self) -> float:
        """The learning rate of a layer over that of the layer above."""
        whole = self.init is not None and self.lora is None
        return self.layer_decay or (0.65 if whole else 1.0)

    @property
    def frozen_share(self) -> float:
        """The share of the run in which the weights of --init stay as they are."""
        return 1.0 if self.freeze else self.freeze_first

    @property
    def budget_choice(self) -> BudgetChoice:
        """Which keep ratios a step runs."""
        return BudgetChoice(
            self.ramp,
            self.ratios,
            self.ramp_start,
            self.ramp_length,
            one=self.sampling == "one",
            between=self.between,
            single=self.keep is not None,
            probabilities=dict(self.budget_probabilities),
        )
