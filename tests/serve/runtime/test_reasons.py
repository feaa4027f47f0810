"""Why a request ran on its tier; one image takes 0.1, 0.2 and 0.4 s on the three tiers."""

import dataclasses

import pytest

from pcae_serve.runtime.reasons import explain_tier
from pcae_serve.scheduling.event_log import Setup
from pcae_serve.scheduling.latency import Seconds
from pcae_serve.scheduling.request_queue import Request
from tests.support.scheduler_views import ALL, LATENCY, LINES, TIER_TABLE

SETUP = Setup(
    policy="pace",
    waiting_price=0.1,
    tier_table=TIER_TABLE,
    seconds=[{b: Seconds(o + b * i, o + b * i) for b in (1, 32)} for o, i in LINES],
    max_batch=32,
    queue_limit=256,
    devices=1,
)
#: The last two tiers are equally accurate.
EQUAL = SETUP.model_copy(
    update={"tier_table": dataclasses.replace(TIER_TABLE, margin=((0.06,) * 3,) * 3)}
)
#: The first two tiers are equally accurate.
LAST_BETTER = SETUP.model_copy(
    update={"tier_table": dataclasses.replace(TIER_TABLE, accuracy=(0.8, 0.8, 0.9))}
)
FREE = SETUP.model_copy(update={"waiting_price": 0.0})
GREEDY = SETUP.model_copy(update={"policy": "greedy"})


@pytest.mark.parametrize(
    ("setup", "tier", "budget_s", "words"),
    [
        (SETUP, 2, 1.0, "the most accurate tier fits the 1000 ms left"),
        (SETUP, 1, 1.0, "a more accurate tier also fits the 1000 ms left, but is not worth"),
        (SETUP, 1, 0.3, "the most accurate tier that fits the 300 ms left"),
        (SETUP, 0, 0.15, "only the fastest allowed tier fits"),
        (SETUP, 0, 0.05, "the fastest allowed tier that may be late"),
        (EQUAL, 1, 1.0, "no allowed tier is measurably more accurate; fits the 1000 ms left"),
        (EQUAL, 0, 1.0, "a more accurate tier also fits"),
        (LAST_BETTER, 0, 0.3, "no measurably more accurate tier fits the 300 ms left"),
        (FREE, 1, 1.0, "chosen by policy 'pace' under the current load, within the 1000 ms left"),
        (GREEDY, 1, 1.0, "chosen by policy 'greedy' under the current load"),
    ],
)
def test_the_reason_says_what_decided(setup: Setup, tier: int, budget_s: float, words: str) -> None:
    request = Request(0, 0.0, budget_s, ALL)
    forecast = LATENCY.forecast(0.0)
    assert words in explain_tier(request, tier, 1, forecast, 0.0, setup, setup.policy)


def test_the_only_tier_allowed_is_no_choice() -> None:
    request, forecast = Request(0, 0.0, 1.0, (1,)), LATENCY.forecast(0.0)
    assert explain_tier(request, 1, 1, forecast, 0.0, SETUP, "pace") == "the only tier allowed"


def test_domination_is_named_if_it_decides() -> None:
    request, forecast = Request(0, 0.0, 1.0, (0,)), LATENCY.forecast(0.0)
    reason = explain_tier(request, 0, 1, forecast, 0.0, SETUP, "pace", ("mid", "full"))
    assert reason == "a cheaper tier is better than mid, full, which are left out"
