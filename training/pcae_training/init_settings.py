"""Settings of runs that may start from the weights of another model."""

from typing import Annotated, Self

from pydantic import Field, model_validator

from pcae_serve.flags import Metavar
from pcae_serve.sources.names import ModelName
from pcae_training.import_weights import WeightsChoice
from pcae_training.settings import RunSettings


class InitSettings(RunSettings):
    """Which weights a run starts from."""

    init: Annotated[ModelName | None, Metavar("CHECKPOINT")] = Field(
        None,
        description="weights to start from: a run or checkpoint of pcae-train, a Hugging Face or"
        " timm folder, a .pth or .safetensors file, or a name on the hub such as"
        " facebook/dinov2-small",
    )
    weights: WeightsChoice | None = Field(
        None,
        description="which weights to take from an --init with raw and averaged ones; default: the"
        " averaged ones, ema",
    )

    @model_validator(mode="after")
    def _check_sizes(self) -> Self:
        if self.init is not None and (fixed := self.model_fields_set & {"width", "depth"}):
            flags = ", ".join(f"--{name}" for name in sorted(fixed))
            raise ValueError(f"--init determines the model's sizes; omit {flags}")
        return self
