"""First answers of a bundle in service: which are held for a second look, and what they owe.

The scheduler decides whether a second look is worth its time; here the first answer is kept until
then, and sent if no second look replaces it.
"""

import asyncio
from collections.abc import Callable, Iterable
from dataclasses import replace

from pcae_serve.bundle.probabilities import margin
from pcae_serve.bundle.reader import Bundle
from pcae_serve.runtime.memory_budget import MemoryBudget
from pcae_serve.runtime.offered import OfferedRequest
from pcae_serve.runtime.reasons import explain_first_look, explain_second_look
from pcae_serve.runtime.requests import InferenceResult
from pcae_serve.scheduling.escalation import Escalations
from pcae_serve.scheduling.second_looks import answer_by_s


class FirstAnswers:
    """Holds the first answers that a second look may improve."""

    def __init__(
        self,
        bundle: Bundle,
        escalations: Escalations,
        on_sent: Callable[[OfferedRequest, InferenceResult], None],
    ) -> None:
        """on_sent: called with a request that ends with its first answer, and that answer."""
        self._bundle, self._escalations, self._on_sent = bundle, escalations, on_sent

    def may_look_again(self, request: OfferedRequest) -> bool:
        """Return whether a request may run twice, if its first answer is unsure."""
        may = request.scheduled.max_looks > 1 and request.request.tier == "auto"
        return may and bool(self._escalations)

    def hold(
        self, request: OfferedRequest, result: InferenceResult
    ) -> tuple[InferenceResult, float | None]:
        """Hold a first answer if a second look may improve it and there is time.

        Returns the answer with what its reason is if it is sent, and the margin of an answer that
        is held, else None.
        """
        scheduled, tier = request.scheduled, self._bundle.tiers.index(result.tier)
        found = self._margin(result)
        gains = self._escalations.gains(tier, found, scheduled.tiers)
        request.look_gain = max(gains.values(), default=0.0)
        if tier < scheduled.tiers[-1]:  # else the reason of the best tier says it
            reason = explain_first_look(result.tier.name, request.look_gain)
            result = replace(result, reason=reason)
        until_s = answer_by_s(scheduled)
        if not gains or asyncio.get_running_loop().time() >= until_s:
            return result, None
        request.hold(result, until_s, self._on_sent)
        return result, found

    def explain_again(self, first: InferenceResult) -> str:
        """Return why a request runs again after its first answer."""
        return explain_second_look(first.tier.name, self._margin(first))

    def _margin(self, result: InferenceResult) -> float:
        return float(margin(result.vector, self._bundle.temperature(result.tier)))


def send_first_answers(
    requests: Iterable[OfferedRequest], memory: MemoryBudget, wanted_bytes: int
) -> None:
    """Send first answers that wait, until `wanted_bytes` are free."""
    for request in list(requests):
        if memory.free_bytes >= wanted_bytes:
            break
        request.send_first_answer()
