"""What the REST API says, as pydantic models: they are the documentation under /docs."""

from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.tokens import Rule


class Prediction(BaseModel):
    label: str
    index: int = Field(description="row of the label in the bundle's list")
    probability: float = Field(description="softmax of the logits")


class Timings(BaseModel):
    decode: float = Field(description="reading the body's image, with the wait for a decoder")
    queue: float = Field(description="waiting for the device")
    compute: float = Field(description="the batch it was part of")
    total: float = Field(description="from the request's headers to this answer")


class Result(BaseModel):
    """What every answer to an image tells of itself."""

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


class Classes(BaseModel):
    predictions: list[Prediction]


class Features(BaseModel):
    features: list[float] = Field(description="of the image; not scaled to length 1")


class Classification(Result, Classes):  # fields of the last base come first
    """The answer to one image, from a model with a head."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "predictions": [
                    {"label": "Ankle boot", "index": 9, "probability": 0.885802},
                    {"label": "Sneaker", "index": 7, "probability": 0.070225},
                ],
                "tier": "fast",
                "keep_ratio": 0.25,
                "tokens": [49, 12, 3],
                "reason": "only the fastest allowed tier fits the 8 ms left",
                "budget_ms": 15.0,
                "met_budget": True,
                "timings_ms": {"decode": 1.95, "queue": 0.19, "compute": 5.76, "total": 8.27},
                "kept": None,
            }
        }
    )


class Embedding(Result, Features):
    """The answer to one image, from a model without a head."""


class TierInfo(BaseModel):
    name: str
    model: str
    reduction: Rule = Field(description="how its model chooses the patches that go")
    precision: str = Field(description="of the products with the weights, on this backend")
    keep_ratio: float
    tokens: list[int] = Field(description="patches left after each reduction stage")
    macs: int = Field(description="multiply-adds for one image")
    accuracy: Accuracy | None
    agreement: Agreement | None = Field(description="with k = 1.0, where no labels were at hand")
    fidelity: Fidelity | None = Field(description="to the features of k = 1.0, without a head")
    dominated: bool = Field(description="a cheaper tier is as good: auto never takes it")
    in_service: bool = Field(True, description="false while it fails: nobody is answered on it")
    latency_ms: dict[int, float] | None = Field(
        description="by batch size, on this machine, as expected now; null until measured"
    )


class Tiers(BaseModel):
    """What this server offers, the cheapest tier first."""

    bundle: str
    digest: str = Field(description="sha256 of the bundle's manifest")
    backend: str
    backend_version: str
    backend_note: str | None = Field(description="what to know before relying on it")
    device: str = Field(description="where batches run; several share one queue")
    policy: str
    budget_ms: float = Field(description="for requests that name none")
    image_size: int
    answers: Literal["logits", "features"] = Field(
        description="logits: POST /classify; features: POST /embed"
    )
    width: int = Field(description="numbers the models answer with: classes, or features")
    labels: list[str]
    tiers: list[TierInfo]


class Health(BaseModel):
    status: str


class Problem(BaseModel):
    """An error, as RFC 9457 says it (application/problem+json)."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:pcae-serve:overloaded",
                "title": "Server overloaded",
                "status": 503,
                "detail": "the load leaves no allowed tier within 50 ms, but for making others"
                " late: retry later, allow a faster tier or a larger budget",
                "retry_after_s": 0.31,
            }
        }
    )

    type: str
    title: str
    status: int
    detail: str = Field(description="what was wrong and what to do, in one line")
    needed_ms: float | None = Field(
        None, description="of a budget too small: what the fastest allowed tier takes"
    )
    retry_after_s: float | None = Field(None, description="when to come back")


class BatchItem(BaseModel):
    """What became of one image: an answer with status 200, or a problem with its own."""

    status: int
    answer: Classification | None = None
    problem: Problem | None = None


class Batch(BaseModel):
    """What became of every image, in the order in which they were sent."""

    results: list[BatchItem]


class Reload(BaseModel):
    """What is served from now on."""

    bundle: str
    digest: str = Field(description="sha256 of the bundle's manifest")
    tiers: list[str]
    seconds: float = Field(description="that it took, beside live traffic")
