"""Settings of low-rank adapters."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pcae_serve.flags import Metavar
from pcae_training.adapters import AdapterTargets
from pcae_training.init_settings import InitSettings


class AdapterSettings(InitSettings):
    """Whether a run trains low-rank adapters instead of all weights."""

    lora: Annotated[int | None, Metavar("RANK")] = Field(
        None,
        ge=1,
        description="train low-rank adapters (LoRA) of this rank, the head and the final norm; the"
        " other weights of --init stay as they are; the saved model has the adapters merged",
    )
    lora_targets: AdapterTargets = Field(
        "attention", description="layers with adapters; attention: qkv and proj; all: the MLP, too"
    )
    lora_alpha: float | None = Field(
        None,
        gt=0,
        description="what adapters add is scaled by this over the rank; default: the rank",
    )

    @model_validator(mode="after")
    def _check_adapters(self) -> Self:
        if self.lora is None:  # values, not what was given: settings are made from dumps, too
            for flag, value, default in (
                ("--lora-targets", self.lora_targets, "attention"),
                ("--lora-alpha", self.lora_alpha, None),
            ):
                if value != default:
                    raise ValueError(f"{flag} is for adapters; give their rank with --lora RANK")
        if self.lora is not None and self.init is None:
            raise ValueError("--lora adapts the weights of --init, which is missing")
        return self
