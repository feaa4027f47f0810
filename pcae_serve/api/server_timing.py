"""Timing of answers outside their bodies: Server-Timing header, access-log fields, the trace."""

from collections.abc import Sequence

from fastapi import Request, Response

from pcae_serve.observability import tracing
from pcae_serve.observability.logs import join_counts
from pcae_serve.runtime.requests import InferenceResult
from pcae_serve.runtime.results import timings

HEADER = "Server-Timing"


def record_timing(request: Request, response: Response, answers: Sequence[InferenceResult]) -> None:
    """Set Server-Timing, access-log and span attributes from the slowest answer.

    The looks in log and trace are those of all answers together. Does nothing if there are none.
    """
    if not answers:
        return
    slowest = max(answers, key=lambda answer: answer.total_s)
    request.state.tier = join_counts([answer.tier.name for answer in answers])
    request.state.looks = sum(answer.looks for answer in answers)
    tracing.annotate(
        tier=request.state.tier,
        looks=request.state.looks,
        queue_ms=round(1e3 * slowest.queue_s, 2),
    )
    stages = [f"{name};dur={ms}" for name, ms in timings(slowest).model_dump().items()]
    response.headers[HEADER] = ", ".join((*stages, f'looks;desc="{slowest.looks}"'))
