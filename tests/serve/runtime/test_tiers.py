"""A bundle's tiers, as policies see them."""

import pytest

from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement
from pcae_serve.bundle.reader import Bundle
from pcae_serve.runtime.tiers import tier_table


@pytest.mark.parametrize(
    ("accuracy", "agreement", "wanted"),
    [
        ((0.6, 0.7, 0.8), (None, None, None), (0.6, 0.7, 0.8)),
        ((None, None, None), (0.9, 0.95, 1.0), (0.9, 0.95, 1.0)),
        ((None, None, None), (None, None, None), (0.9, 0.95, 1.0)),
        ((0.6, None, 0.8), (None, None, None), (0.9, 0.95, 1.0)),
    ],
)
def test_what_policies_are_told_of_accuracy(
    small_bundle: Bundle,
    accuracy: tuple[float | None, ...],
    agreement: tuple[float | None, ...],
    wanted: tuple[float, ...],
) -> None:
    def measured(tier: Tier, top1: float | None, share: float | None) -> Tier:
        known = {
            "accuracy": None
            if top1 is None
            else Accuracy(top1=top1, n=9, interval=(0, 1), data_set="toy"),
            "agreement": None if share is None else Agreement(share=share, n=9, data_set="toy"),
        }
        return tier.model_copy(update=known)

    tiers = list(map(measured, small_bundle.tiers, accuracy, agreement))
    found = tier_table(tiers)
    assert found.names == ("fast", "balanced", "full")
    assert found.accuracy == pytest.approx(wanted)
