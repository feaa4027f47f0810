"""What traffic a run plays: traces at a pace, and the budgets of their requests, as flags.

It knows what both simulate and replay are asked for; not what serves it, nor what came of it.
"""

from typing import Annotated, Self

from pydantic import BaseModel, Field, ValidationInfo, field_validator, model_validator

from pcae_serve.loadtest import workload

Count = Annotated[int, Field(ge=1)]


class Traffic(BaseModel):
    """Commands that play traffic; what load, rate, requests and seeds mean to one, it says."""

    trace: list[str] = Field(
        ["azure-code"],
        description=f"{', '.join(workload.TRACES)}, or a .csv file with arrival_s[,budget_ms];"
        " with commas or repeated; all: all but files",
    )
    load: list[float] | None
    rate: list[float] | None
    mix: str = Field(
        "mixed",
        description=f"budgets: {', '.join(workload.MIXES)}, or multiples of the last tier's latency"
        " with shares, as 3:0.3,8:0.7",
    )
    requests: Count
    seeds: Count

    def traces(self) -> list[str]:
        """By name, each once. Raises StartError where one, or the mix, cannot be played."""
        workload.parse_mix(self.mix)
        names = [
            name for word in self.trace for name in (workload.TRACES if word == "all" else (word,))
        ]
        for name in names:  # a file that cannot be read must not wait for its turn
            workload.make(name, "8", None if name.endswith(".csv") else 1.0, 2, 1.0, 0)
        return list(dict.fromkeys(names))

    @field_validator("load", "rate")
    @classmethod
    def _positive(cls, given: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if given is not None and not all(0 < value < float("inf") for value in given):
            raise ValueError(f"--{info.field_name}: each must be a number above 0")
        return given

    @model_validator(mode="after")
    def _one_pace(self) -> Self:
        if self.load and self.rate:
            raise ValueError("--load and --rate both say how fast requests come: give one")
        return self
