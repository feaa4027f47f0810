"""Registry: every policy by its name on the command line.

greedy  fixed:fast  nexus:best  slackfit+drop
"""

from collections.abc import Callable

from pcae_serve.errors import StartError
from pcae_serve.scheduling.policies.base import Policy
from pcae_serve.scheduling.policies.conservative import Conservative
from pcae_serve.scheduling.policies.early_drop import EarlyDrop
from pcae_serve.scheduling.policies.fixed import Fixed
from pcae_serve.scheduling.policies.greedy import Greedy
from pcae_serve.scheduling.policies.infaas import Infaas
from pcae_serve.scheduling.policies.model_switching import ModelSwitching
from pcae_serve.scheduling.policies.pace import Pace
from pcae_serve.scheduling.policies.slackfit import SlackFit
from pcae_serve.scheduling.tiers import TierTable

#: Policies that consider the price of waiting.
OURS: dict[str, Callable[[TierTable, float], Policy]] = {"pace": Pace}

PUBLISHED: dict[str, Callable[[TierTable], Policy]] = {
    "greedy": lambda tier_table: Greedy(),
    "conservative": lambda tier_table: Conservative(),
    "slackfit": lambda tier_table: SlackFit(),
    "infaas": lambda tier_table: Infaas(),
    "model-switching": ModelSwitching,
}

#: Policies that take the name of a tier, after a colon.
WITH_TIER: dict[str, Callable[[TierTable, str], Policy]] = {
    "fixed": Fixed,
    "nexus": lambda tier_table, tier_name: EarlyDrop(Fixed(tier_table, tier_name)),
}

#: Names for the first and the last tier of any bundle.
FIRST, LAST = "fastest", "best"

NAMES = (*OURS, *PUBLISHED, *WITH_TIER)


def weighs_waiting(spec: str) -> bool:
    """Return whether a policy considers the price of waiting."""
    return spec.removesuffix("+drop") in OURS


def create(spec: str, tier_table: TierTable, waiting_price: float = 0.0) -> Policy:
    """Create a policy from NAME or NAME:TIER, with early drop if `+drop` follows.

    waiting_price: accuracy points per 100 ms of response time; only `pace` considers it. Raise
    StartError if there is no such policy or tier.
    """
    base = spec.removesuffix("+drop")
    name, colon, tier_name = base.partition(":")
    policy: Policy
    if not colon and name in OURS:
        policy = OURS[name](tier_table, waiting_price)
    elif not colon and name in PUBLISHED:
        policy = PUBLISHED[name](tier_table)
    elif tier_name and name in WITH_TIER:
        tier_name = {FIRST: tier_table.names[0], LAST: tier_table.names[-1]}.get(
            tier_name, tier_name
        )
        policy = WITH_TIER[name](tier_table, tier_name)
    else:
        known = [*OURS, *PUBLISHED, *(f"{name}:TIER" for name in WITH_TIER)]
        tiers = ", ".join((*tier_table.names, FIRST, LAST))
        raise StartError(
            f"no policy is named {spec!r}; the policies are {', '.join(known)} (TIER: {tiers}),"
            " each optionally with +drop"
        )
    drops = isinstance(policy, EarlyDrop)  # Nexus includes early drop
    return EarlyDrop(policy) if spec != base and not drops else policy
