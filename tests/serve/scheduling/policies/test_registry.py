import pytest

from pcae_serve.errors import StartError
from pcae_serve.scheduling.policies.early_drop import EarlyDrop
from pcae_serve.scheduling.policies.registry import NAMES, create
from tests.support.scheduler_views import TIER_TABLE, view, waiting

PLAIN = ("greedy", "conservative", "slackfit", "infaas", "model-switching")


@pytest.mark.parametrize(
    "spec", [*PLAIN, "greedy+drop", "slackfit+drop", "fixed:full", "nexus:full"]
)
def test_the_name_of_a_policy_is_what_it_was_created_by(spec: str) -> None:
    assert create(spec, TIER_TABLE).name == spec


@pytest.mark.parametrize(
    ("spec", "name", "tier"),
    [
        ("fixed:fastest", "fixed:fast", 0),
        ("fixed:best", "fixed:full", 2),
        ("nexus:best", "nexus:full", 2),
        ("fixed:balanced", "fixed:balanced", 1),
    ],
)
def test_fastest_and_best_stand_for_tiers(spec: str, name: str, tier: int) -> None:
    policy = create(spec, TIER_TABLE)
    assert policy.name == name
    choice = policy.choose(view(waiting(9.0)))
    assert getattr(choice, "tier", None) == tier


@pytest.mark.parametrize("spec", ["nexus:fast", "nexus:fast+drop", "fixed:fast+drop"])
def test_nexus_is_fixed_with_early_drop_and_drops_once(spec: str) -> None:
    policy = create(spec, TIER_TABLE)
    assert isinstance(policy, EarlyDrop)
    assert policy.name == "nexus:fast"


@pytest.mark.parametrize(
    "spec", ["", "+drop", "gredy", "greedy:fast", "greedy+", "greedy+drop+drop", "fixed", "nexus:"]
)
def test_the_error_for_an_unknown_policy_lists_all_on_one_line(spec: str) -> None:
    with pytest.raises(StartError) as error:
        create(spec, TIER_TABLE)
    message = str(error.value)
    assert repr(spec) in message
    assert "\n" not in message
    assert all(name in message for name in (*NAMES, *TIER_TABLE.names, "fastest", "best", "+drop"))


def test_an_unknown_tier_is_an_error() -> None:
    with pytest.raises(
        StartError, match="no tier is named 'slow'; the tiers are fast, balanced, full"
    ):
        create("nexus:slow", TIER_TABLE)


def test_every_call_creates_a_new_policy() -> None:
    assert create("model-switching", TIER_TABLE) is not create("model-switching", TIER_TABLE)
