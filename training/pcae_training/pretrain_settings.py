"""Settings of `pcae-train pretrain`: its flags, recorded in run.json."""

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, Literal, Self

from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode

from pcae_serve.bundle.tokens import Rule, patches_kept
from pcae_training.init_settings import InitSettings
from pcae_training.masking import visible_patches
from pcae_training.model import ViTConfig
from pcae_training.settings import RunSettings
from pcae_training.watch_settings import WatchSettings

Method = Literal["pcae", "mae", "simmim", "pcae-simmim"]

#: Defaults of --preset; flags that are given override them.
PRESETS: dict[str, dict[str, Any]] = {
    # epochs, not hundreds of them: a teacher that hardly moves, and the pixels as targets, too
    "short": {"pixel_weight": 1.0, "ema": 0.9995, "lr": 1e-3, "warmup": 0.1},
    # ViT-B on ImageNet: a learning rate of 6e-4 after 40 of 300 epochs
    "paper": {"epochs": 300, "batch_size": 1024, "blr": 1.5e-4, "warmup": 40 / 300, "ema": 0.9999},
}


class PretrainSettings(WatchSettings, InitSettings):
    """Pretrain an encoder without labels, to be fine-tuned with `finetune --init`.

    It starts from random weights, or continues from those of --init.
    """

    flag_groups: ClassVar[Mapping[str, tuple[str, ...]]] = {
        **RunSettings.flag_groups,
        "run": ("method", "preset", "init", "weights", *RunSettings.flag_groups["run"]),
        "method": (
            "mask_ratio", "mask_unit", "decoder_depth", "decoder_width", "pixel_weight",
            "normalise_pixels",
        ),
        "teacher": ("ema", "reduce_after", "teacher_keep", "reduction", "drop_targets"),
        "watch": ("watch_images", "eval_data", "eval_split"),
    }  # fmt: skip

    method: Method = Field("pcae", description="pretraining method")
    preset: Literal["short", "paper"] | None = Field(
        None,
        description="other defaults for pcae; short: what works in runs of a few epochs; paper: the"
        " paper's run on ImageNet (see docs/training.md)",
    )
    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="share of patches hidden; default: 0.75, SimMIM 0.6"
    )
    mask_unit: int = Field(
        1, ge=1, description="patches are hidden in squares of this side; SimMIM's original uses 2"
    )
    decoder_depth: int | None = Field(
        None, ge=1, description="decoder blocks; default: mae 8, pcae 2"
    )
    decoder_width: int | None = Field(
        None,
        ge=32,
        multiple_of=32,
        description="token width of the decoder; default: 512 for ViT-B, proportionally less for"
        " narrower encoders",
    )
    pixel_weight: float = Field(
        0.0,
        ge=0,
        description="pcae: weight of a second loss, that of mae on the pixels of all hidden"
        " patches; 0: none, as in the paper",
    )
    normalise_pixels: bool = Field(
        True,
        description="standardise the target pixels of each patch (mae, and pcae with"
        " --pixel-weight)",
    )

    ema: float | None = Field(
        None,
        gt=0,
        lt=1,
        description="momentum of the teacher; the paper's is 0.9999; default: that, or less in runs"
        " of fewer than 125,000 steps, which may make the teacher too fast (see docs/training.md)",
    )
    reduce_after: Annotated[tuple[int, ...], NoDecode] = Field(
        (0, 4, 8), description="blocks after which the teacher drops tokens, counted from 0"
    )
    teacher_keep: float = Field(
        0.5,
        gt=0,
        le=1,
        description="share of the tokens that the teacher keeps at each block of --reduce-after",
    )
    reduction: Rule = Field("ptr", description="rule that ranks the teacher's tokens")
    drop_targets: Literal["none", "loss", "decoder"] = Field(
        "none", description="mae: exclude patches that the teacher drops from the loss or decoder"
    )

    blr: float = Field(1.5e-4, gt=0, description="peak learning rate per 256 images of a step")
    crop: float = Field(
        0.2, ge=0, le=1, description="smallest share of the area a random crop keeps; 0 = off"
    )

    @field_validator("reduce_after", mode="before")
    @classmethod
    def _split_blocks(cls, blocks: object) -> object:
        return blocks.strip("[]()").split(",") if isinstance(blocks, str) else blocks

    @model_validator(mode="before")
    @classmethod
    def _apply_preset(cls, given: Any) -> Any:
        """Add the defaults of --preset to what is given."""
        preset = PRESETS.get(str(given.get("preset"))) if isinstance(given, dict) else None
        if preset is None:
            return given
        rates = {"lr", "blr"} if given.keys() & {"lr", "blr"} else set()
        return {flag: value for flag, value in preset.items() if flag not in rates} | given

    @model_validator(mode="after")
    def _check_combinations(self) -> Self:
        if self.preset is not None and self.method != "pcae":
            raise ValueError(f"--preset {self.preset} is only for --method pcae, not {self.method}")
        if self.drop_targets != "none" and self.method != "mae":
            raise ValueError("--drop-targets is only for --method mae: pcae always drops targets")
        if self.pixel_weight and self.method != "pcae":
            raise ValueError(f"--pixel-weight is only for --method pcae, not {self.method}")
        if self.init is None:
            self.check_model(self.config(classes=0))
        return self

    def check_model(self, config: ViTConfig) -> None:
        """Raise ValueError if the method does not fit a model of these sizes."""
        if self.has_teacher:
            blocks = ",".join(map(str, self.reduce_after))
            if any(not 0 <= block < config.depth for block in self.reduce_after):
                raise ValueError(
                    f"--reduce-after {blocks} is outside the {config.depth} blocks, which are"
                    " counted from 0"
                )
            if list(self.reduce_after) != sorted(set(self.reduce_after)):
                raise ValueError(f"--reduce-after {blocks} must be in ascending order")
        if config.grid % self.mask_unit:
            raise ValueError(
                f"--mask-unit {self.mask_unit} does not divide the {config.grid} patches per side"
            )
        patches = config.grid**2
        if self.visible(patches) < 1:
            raise ValueError(f"--mask-ratio {self.hidden_share} hides all {patches} patches")
        if self.has_teacher:
            self.teacher_counts(patches)

    @property
    def hidden_share(self) -> float:
        """The mask ratio used: --mask-ratio or the method's default."""
        return self.mask_ratio or (0.6 if self.method.endswith("simmim") else 0.75)

    def visible(self, patches: int) -> int:
        """Return how many of `patches` stay visible."""
        square = self.mask_unit**2
        return visible_patches(patches // square, self.hidden_share) * square

    def teacher_counts(self, patches: int) -> tuple[int, ...]:
        """Return the hidden patches left after each of the teacher's stages: 147 → 73, 36, 18."""
        hidden = patches - self.visible(patches)
        return patches_kept(hidden, self.teacher_keep, len(self.reduce_after))

    @property
    def predicts_teacher(self) -> bool:
        """Whether the targets are the teacher's tokens."""
        return self.method.startswith("pcae")

    @property
    def decodes_all(self) -> bool:
        """Whether the decoder predicts all hidden patches, those that a teacher drops included."""
        return self.drop_targets == "loss" or self.pixel_weight > 0

    @property
    def has_teacher(self) -> bool:
        return self.predicts_teacher or self.drop_targets != "none"
