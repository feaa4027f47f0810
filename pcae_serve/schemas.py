"""Documents of the REST API, as pydantic models; /docs is generated from them."""

from pydantic import BaseModel, ConfigDict, Field

from pcae_serve.bundle.manifest import Answers
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_serve.bundle.tokens import Rule


class Prediction(BaseModel):
    """A class or label and its probability."""

    label: str = Field(description="name of the class or label; two may have the same name")
    index: int = Field(description="index of the label in the bundle's list")
    probability: float = Field(
        description="softmax over all classes, or for independent labels the sigmoid of the logit;"
        " of the logits divided by the tier's temperature, if the bundle is calibrated"
    )


class Timings(BaseModel):
    """The time that an answer spent in each stage, in milliseconds."""

    decode: float = Field(description="decoding the image, including the wait for a decoder")
    queue: float = Field(description="waiting in the queue for a device")
    compute: float = Field(description="running the batch that the image was part of")
    total: float = Field(description="from the arrival of the request's headers to the answer")


class Result(BaseModel):
    """Fields of every answer to an image."""

    tier: str = Field(description="name of the tier that answered")
    keep_ratio: float = Field(description="fraction of patches that each reduction stage keeps")
    tokens: list[int] = Field(description="number of patches left after each reduction stage")
    reason: str = Field(description="why this tier was chosen")
    budget_ms: float = Field(description="the budget that applied, in milliseconds")
    met_budget: bool = Field(description="whether the answer was ready within the budget")
    timings_ms: Timings
    kept: list[list[int]] | None = Field(
        None,
        description="with explain: indices of the patches left after each stage, ascending;"
        " patches are numbered row by row",
    )


class Classes(BaseModel):
    """The part of an answer that only classification has."""

    predictions: list[Prediction] = Field(description="most probable first")
    confidence: float | None = Field(
        None,
        description="probability of the first class or label; how often such answers are right, if"
        " the bundle is calibrated",
    )
    looks: int = Field(
        1,
        description="how often the image ran: 2 if a second look on a better tier gave the answer",
    )
    first_tier: str | None = Field(
        None, description="name of the tier of the first look, if the second gave the answer"
    )


class Features(BaseModel):
    """The part of an answer that only feature extraction has."""

    features: list[float] = Field(
        description="features of the image, as the model computes them; with normalize, of length 1"
    )
    patches: list[list[list[float]]] | None = Field(
        None,
        description="with patches: the state of every patch [H][W][D], in the same form as the"
        " features; a dropped patch has the state that it was dropped with",
    )


class Classification(Result, Classes):  # fields of the last base come first
    """The answer to one image, from a model with a head."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "predictions": [
                    {"label": "Ankle boot", "index": 9, "probability": 0.885802},
                    {"label": "Sneaker", "index": 7, "probability": 0.070225},
                ],
                "confidence": 0.885802,
                "looks": 1,
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
    """A tier: a model with a keep ratio, its quality and its latency."""

    name: str
    model: str = Field(description="name of the model in the bundle")
    reduction: Rule = Field(description="rule by which the model selects patches to drop")
    precision: str = Field(description="number format of products with weights, on this backend")
    keep_ratio: float = Field(description="fraction of patches that each reduction stage keeps")
    tokens: list[int] = Field(description="number of patches left after each reduction stage")
    patches: int = Field(description="patches of an image before the first reduction")
    macs: int = Field(description="multiply-accumulate operations for one image")
    accuracy: Accuracy | None = Field(description="measured on labelled images; null if unmeasured")
    agreement: Agreement | None = Field(
        description="agreement with keep ratio 1.0, for bundles exported without labels"
    )
    fidelity: Fidelity | None = Field(
        description="similarity to the features at keep ratio 1.0, for bundles without a head"
    )
    dominated: bool = Field(
        description="whether a cheaper tier is better, beyond the uncertainty of the measurement;"
        " auto uses such a tier only if all others have failed"
    )
    in_service: bool = Field(
        True, description="false while the tier fails; it then answers no requests"
    )
    latency_ms: dict[int, float] | None = Field(
        description="expected median latency of a batch by its size, on this machine under current"
        " conditions; null until measured"
    )


class Tiers(BaseModel):
    """The server's bundle, device and tiers."""

    bundle: str = Field(description="name of the bundle")
    digest: str = Field(description="SHA-256 of the bundle's manifest")
    backend: str = Field(description="runtime that executes the model")
    backend_version: str
    backend_note: str | None = Field(description="known limitation of the backend, if any")
    device: str = Field(description="device that runs batches; several devices share one queue")
    policy: str = Field(description="scheduling policy")
    budget_ms: float = Field(description="budget of requests that state none, in milliseconds")
    image_size: int = Field(description="side of the model's input, in pixels")
    resize: int = Field(
        description="the shorter side of an image is scaled to this before its centre is taken"
    )
    squash: bool = Field(description="both sides are scaled to `resize` instead")
    answers: Answers = Field(
        description="classes: one of them applies (softmax), use POST /classify; labels: any number"
        " of them apply (a sigmoid each), use POST /classify; features: use POST /embed"
    )
    width: int = Field(description="length of the output: number of classes or of features")
    patch_grid: list[int] | None = Field(
        None, description="shape [H, W, D] of the patches that /embed returns; null if it does not"
    )
    max_looks: int = Field(
        1, description="how often an image may run: 2 if the bundle is calibrated and --max-looks 2"
    )
    labels: list[str] = Field(description="class names in the order of the logits")
    tiers: list[TierInfo] = Field(description="cheapest first")


class Health(BaseModel):
    """The answer to a health check."""

    status: str = Field(description="alive (GET /livez) or ready (GET /readyz)")


class Problem(BaseModel):
    """An error as an RFC 9457 problem document (application/problem+json)."""

    model_config = ConfigDict(
        json_schema_extra={
            "example": {
                "type": "urn:pcae-serve:overloaded",
                "title": "Server overloaded",
                "status": 503,
                "detail": "the server is too busy to answer within 50 ms without delaying requests"
                " already accepted; retry later, allow a faster tier or raise the budget",
                "retry_after_s": 0.31,
            }
        }
    )

    type: str = Field(description="urn:pcae-serve: and the error's code")
    title: str = Field(description="short summary, the same for all errors of this type")
    status: int
    detail: str = Field(description="the fault and what to do, in one line")
    needed_ms: float | None = Field(
        None,
        description="for budget-too-small: milliseconds that decoding and the fastest tier need",
    )
    retry_after_s: float | None = Field(None, description="seconds until a retry is useful")


class ImageOutcome(BaseModel):
    """The part of every image's outcome in a batch."""

    status: int = Field(description="HTTP status that the image would have had on its own")
    problem: Problem | None = None


class BatchItem(ImageOutcome):
    """The outcome of one image: an answer with status 200, or a problem with its own status."""

    answer: Classification | None = None


class Batch(BaseModel):
    """The outcome of every image, in the order in which they were sent."""

    results: list[BatchItem]


class EmbeddingItem(ImageOutcome):
    """The outcome of one image: features with status 200, or a problem with its own status."""

    answer: Embedding | None = None


class EmbeddingBatch(BaseModel):
    """The outcome of every image, in the order in which they were sent."""

    results: list[EmbeddingItem]


class Reload(BaseModel):
    """The bundle that is served after a reload."""

    bundle: str = Field(description="name of the bundle")
    digest: str = Field(description="SHA-256 of the bundle's manifest")
    tiers: list[str] = Field(description="names of the tiers, cheapest first")
    seconds: float = Field(description="duration of the reload")
