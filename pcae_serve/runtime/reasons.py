"""Explain in the response why a request ran on its tier.

Policies do not explain themselves; this is derived from what the forecast allowed.
"""

from collections.abc import Sequence

from pcae_serve.scheduling.escalation import LEAST_GAIN
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.latency import Forecast
from pcae_serve.scheduling.policies.registry import weighs_waiting
from pcae_serve.scheduling.request_queue import Request


def explain_tier(
    request: Request,
    tier: int,
    batch: int,
    forecast: Forecast,
    now_s: float,
    setup: Setup,
    policy: str,
    dominated: Sequence[str] = (),
) -> str:
    """Return why `request`, which could choose its tier, runs on `tier` in a batch of `batch`.

    policy: name of the policy that chose it. dominated: tiers that were left out because a cheaper
    one is better.
    """
    tiers = request.tiers
    left_s = request.deadline_s - now_s
    left = f"the {left_s * 1e3:.0f} ms left" + (f", in a batch of {batch}" if batch > 1 else "")
    if len(tiers) == 1 and dominated:
        are = "is" if len(dominated) == 1 else "are"
        return f"a cheaper tier is better than {', '.join(dominated)}, which {are} left out"
    if len(tiers) == 1:
        return "the only tier allowed"
    if forecast.p99(tier, batch) > left_s:
        kind = "the fastest allowed tier" if tier == tiers[0] else "a tier"
        return f"{kind} that may be late with {left}, chosen by policy {policy!r}"
    if tier == tiers[-1]:
        return f"the most accurate tier fits {left}"
    better = tiers[tiers.index(tier) + 1]
    if forecast.p99(better, batch) <= left_s:
        if setup.waiting_price and weighs_waiting(policy):
            counted = setup.counted_accuracy(tiers)
            more = [other for other in tiers if counted[other] > counted[tier]]
            if not more:
                return f"no allowed tier is measurably more accurate; fits {left}"
            if forecast.p99(more[0], batch) <= left_s:
                return (
                    f"chosen by policy {policy!r}: a more accurate tier also fits {left}, but is"
                    " not worth the delay or the missed deadlines that it may cause"
                )
            return f"no measurably more accurate tier fits {left}"
        return f"chosen by policy {policy!r} under the current load, within {left}"
    if tier == tiers[0]:
        return f"only the fastest allowed tier fits {left}"
    return f"the most accurate tier that fits {left}"


def explain_first_look(tier: str, gain: float) -> str:
    """Return why the first answer was sent, of a request that could have run twice.

    gain: accuracy that the second look was expected to add.
    """
    if not gain:
        return (
            f"tier {tier!r} is sure: a second look is expected to gain less than"
            f" {100 * LEAST_GAIN:g} points"
        )
    return f"tier {tier!r} answered; a second look did not fit into the time left or the load"


def explain_second_look(tier: str, margin: float) -> str:
    """Return why a request runs again after its first answer, on `tier`, with this margin."""
    return (
        f"a second look: on tier {tier!r} the first class was only {100 * margin:.0f} points more"
        " probable than the second"
    )
