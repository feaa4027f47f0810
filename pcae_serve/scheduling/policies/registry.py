"""The catalogue: every policy by its name, as written on a command line.

    greedy  fixed:fast  nexus:best  slackfit+drop

It knows how policies are called and made, not what they do.
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
from pcae_serve.scheduling.tiers import Ladder

OURS: dict[str, Callable[[Ladder], Policy]] = {"pace": Pace}

PUBLISHED: dict[str, Callable[[Ladder], Policy]] = {
    "greedy": lambda ladder: Greedy(),
    "conservative": lambda ladder: Conservative(),
    "slackfit": lambda ladder: SlackFit(),
    "infaas": lambda ladder: Infaas(),
    "model-switching": ModelSwitching,
}

#: Written with a tier's name behind a colon.
WITH_TIER: dict[str, Callable[[Ladder, str], Policy]] = {
    "fixed": Fixed,
    "nexus": lambda ladder, tier_name: EarlyDrop(Fixed(ladder, tier_name)),
}

#: Words for tiers that every ladder has.
FIRST, LAST = "fastest", "best"

NAMES = (*OURS, *PUBLISHED, *WITH_TIER)


def create(spec: str, ladder: Ladder) -> Policy:
    """A fresh policy: a name, a tier behind a colon where one is due, `+drop` for early drop."""
    base = spec.removesuffix("+drop")
    name, colon, tier_name = base.partition(":")
    if not colon and (make := {**OURS, **PUBLISHED}.get(name)) is not None:
        policy = make(ladder)
    elif tier_name and name in WITH_TIER:
        tier_name = {FIRST: ladder.names[0], LAST: ladder.names[-1]}.get(tier_name, tier_name)
        policy = WITH_TIER[name](ladder, tier_name)
    else:
        known = [*OURS, *PUBLISHED, *(f"{name}:TIER" for name in WITH_TIER)]
        tiers = ", ".join((*ladder.names, FIRST, LAST))
        raise StartError(
            f"no policy is called {spec!r}; there are {', '.join(known)} (TIER: {tiers}), "
            "each also with +drop"
        )
    drops = isinstance(policy, EarlyDrop)  # Nexus is early drop already
    return EarlyDrop(policy) if spec != base and not drops else policy
