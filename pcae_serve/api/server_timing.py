"""What is told of answers beside their bodies: Server-Timing, the access log's fields, the trace.

It knows answers, requests and their headers, nothing of how a body is written.
"""

from collections import Counter
from collections.abc import Sequence

from fastapi import Request, Response

from pcae_serve.observability import tracing
from pcae_serve.runtime.requests import InferenceResult
from pcae_serve.schemas import Timings

HEADER = "Server-Timing"


def timings(answer: InferenceResult) -> Timings:
    """In milliseconds."""
    return Timings(
        decode=round(answer.decode_s * 1e3, 2),
        queue=round(answer.queue_s * 1e3, 2),
        compute=round(answer.compute_s * 1e3, 2),
        total=round(answer.total_s * 1e3, 2),
    )


def record_timing(request: Request, response: Response, answers: Sequence[InferenceResult]) -> None:
    """Tell of one image's answer, or of several: which tiers, and the times of the last one.

    Of no answer at all there is nothing to tell.
    """
    if not answers:
        return
    last = max(answers, key=lambda answer: answer.total_s)
    request.state.tier = tally([answer.tier.name for answer in answers])
    tracing.annotate(tier=request.state.tier, queue_ms=round(1e3 * last.queue_s, 2))
    response.headers[HEADER] = ", ".join(
        f"{name};dur={ms}" for name, ms in timings(last).model_dump().items()
    )


def tally(words: Sequence[object]) -> str:
    """One word as it is; of several, how often each comes, as fast:3,full:1."""
    if len(words) == 1:
        return str(words[0])
    counts = Counter(map(str, words))
    return ",".join(f"{word}:{counts[word]}" for word in sorted(counts))
