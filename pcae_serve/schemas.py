"""What the REST API says, as pydantic models: they are the documentation under /docs."""

from pydantic import BaseModel, Field

from pcae_serve.bundle import Accuracy, Agreement


class Prediction(BaseModel):
    label: str
    index: int = Field(description="row of the label in the bundle's list")
    probability: float = Field(description="softmax of the logits")


class Timings(BaseModel):
    decode: float = Field(description="reading the body's image, with the wait for a decoder")
    queue: float = Field(description="waiting for the device")
    compute: float = Field(description="the batch it was part of")
    total: float = Field(description="from the request's headers to this answer")


class Classification(BaseModel):
    """The answer to one image."""

    predictions: list[Prediction]
    tier: str = Field(description="the tier that answered")
    keep_ratio: float
    tokens: list[int] = Field(description="patches left after each reduction stage")
    reason: str = Field(description="why this tier")
    budget_ms: float
    met_budget: bool
    timings_ms: Timings
    kept: list[list[int]] | None = Field(
        None, description="with explain: the patches left after each stage, by index in the image"
    )


class TierInfo(BaseModel):
    name: str
    keep_ratio: float
    tokens: list[int] = Field(description="patches left after each reduction stage")
    macs: int = Field(description="multiply-adds for one image")
    accuracy: Accuracy | None
    agreement: Agreement | None = Field(description="with k = 1.0, where no labels were at hand")
    dominated: bool = Field(description="a cheaper tier is as good: auto never takes it")
    latency_ms: dict[int, float] | None = Field(
        description="by batch size, on this machine, as expected now; null until measured"
    )


class Tiers(BaseModel):
    """What this server offers, the cheapest tier first."""

    bundle: str
    digest: str = Field(description="sha256 of the bundle's manifest")
    backend: str
    device: str
    policy: str
    budget_ms: float = Field(description="for requests that name none")
    image_size: int
    labels: list[str]
    tiers: list[TierInfo]


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """An error, as RFC 9457 says it (application/problem+json)."""

    type: str
    title: str
    status: int
    detail: str = Field(description="what was wrong and what to do, in one line")
