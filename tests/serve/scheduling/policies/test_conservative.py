"""Conservative; one image takes 0.1, 0.2 and 0.4 s: 10, 5 and 2.5 per second."""

import pytest

from pcae_serve.scheduling.policies.conservative import Conservative
from tests.support.scheduler_views import ids, load, view, waiting


@pytest.mark.parametrize(
    ("budget_s", "now_s", "tier"),
    [(0.81, 0.0, 2), (0.79, 0.0, 1), (0.39, 0.0, 0), (1.0, 0.55, 2), (1.0, 0.65, 1)],
)
def test_a_batch_takes_at_most_half_the_budget(budget_s: float, now_s: float, tier: int) -> None:
    """Half of the whole budget, and at most what is left of it."""
    assert Conservative().choose(view(waiting(budget_s), now_s=now_s)).tier == tier


@pytest.mark.parametrize(
    ("rate", "devices", "queued", "tier"),
    [
        (0.0, 1, 1, 2),
        (2.4, 1, 1, 2),
        (2.6, 1, 1, 1),
        (5.1, 1, 1, 0),
        (99.0, 1, 1, 0),
        (4.8, 2, 1, 2),  # devices share the load
        (11.0, 1, 8, 2),  # a batch of 8 in 0.68 s
    ],
)
def test_the_tier_sustains_the_load(rate: float, devices: int, queued: int, tier: int) -> None:
    run = Conservative().choose(
        view(waiting(*[9.0] * queued), arrivals=load(rate), devices=devices)
    )
    assert (run.tier, len(run.requests)) == (tier, queued)


def test_if_no_tier_suits_the_fastest_serves_those_that_fit() -> None:
    run = Conservative().choose(view(waiting(*[0.125] * 9), arrivals=load(1000.0)))
    assert (run.tier, ids(run)) == (0, [0, 1, 2])
