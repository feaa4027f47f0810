"""Inference results as the documents of schemas, for the REST API and `pcae_serve.load`."""

from typing import Any

import numpy as np

from pcae_serve import schemas
from pcae_serve.bundle.features import convert
from pcae_serve.bundle.probabilities import sigmoid, softmax
from pcae_serve.runtime.requests import InferenceRequest, InferenceResult


def classification(
    answer: InferenceResult, inference: InferenceRequest, top_k: int, explain: bool
) -> schemas.Classification:
    """Return the `top_k` most probable classes or labels of an image; `answer` holds its logits."""
    predictions = _predictions(answer, top_k)
    return schemas.Classification(
        predictions=predictions,
        confidence=predictions[0].probability,
        looks=answer.looks,
        first_tier=None if answer.first_tier is None else answer.first_tier.name,
        **_common(answer, inference, explain),
    )


def embedding(
    answer: InferenceResult,
    inference: InferenceRequest,
    explain: bool,
    normalize: bool = False,
    dtype: str = "float32",
) -> schemas.Embedding:
    """Return the features of an image, and its patch grid if it was requested.

    Raises InvalidParameter, see `features.convert`.
    """
    features, patches = convert(answer.vector, normalize, dtype), answer.patches
    return schemas.Embedding(
        features=features.tolist(),
        patches=None if patches is None else convert(patches, normalize, dtype).tolist(),
        **_common(answer, inference, explain),
    )


def timings(answer: InferenceResult) -> schemas.Timings:
    """Return where the time of an answer went, in milliseconds."""
    return schemas.Timings(
        decode=round(answer.decode_s * 1e3, 2),
        queue=round(answer.queue_s * 1e3, 2),
        compute=round(answer.compute_s * 1e3, 2),
        total=round(answer.total_s * 1e3, 2),
    )


def _predictions(answer: InferenceResult, top_k: int) -> list[schemas.Prediction]:
    convert = sigmoid if answer.bundle.answers == "labels" else softmax
    probabilities = convert(answer.vector / answer.bundle.temperature(answer.tier))  # [labels]
    best = np.argsort(-answer.vector, kind="stable")[:top_k]
    return [
        schemas.Prediction(
            label=answer.bundle.labels[index],
            index=int(index),
            probability=round(float(probabilities[index]), 6),
        )
        for index in best
    ]


def _common(answer: InferenceResult, inference: InferenceRequest, explain: bool) -> dict[str, Any]:
    """Return the fields of schemas.Result."""
    return {
        "tier": answer.tier.name,
        "keep_ratio": answer.tier.keep_ratio,
        "tokens": list(answer.tier.token_counts),
        "reason": answer.reason,
        "budget_ms": inference.budget_ms,
        "met_budget": answer.met_budget,
        "timings_ms": timings(answer),
        "kept": [np.sort(stage).tolist() for stage in answer.kept] if explain else None,
    }
