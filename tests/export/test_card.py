from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest

from pcae_export import card
from pcae_export.pack import plan, rank
from pcae_export.verify import Parity
from pcae_serve.bundle import Accuracy, Bundle
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]


@pytest.fixture
def rendered(tiny: Tiny, made: Any) -> Callable[..., str]:
    """The card of the tiny checkpoint after a second phase, with two tiers measured."""

    def render(parity: Parity | None = None) -> str:
        checkpoint = tiny()
        second = {
            "settings": {"data": "toys", "init": "/secret/first", "image_size": 224, "lr": 0.01},
            "epochs_done": 1,
            "history": [],
            "final": {"1.0": {"top1": 0.8, "n": 10}},
            "init": checkpoint.training,
        }
        checkpoint = replace(checkpoint, training=second)
        tiers = plan(checkpoint, {"low": 0.5, "full": 1.0}, "vit")
        accuracy = {
            tier.name: Accuracy(top1=0.75, n=8, interval=(0.4, 0.95), data_set="toys/test")
            for tier in tiers
        }
        bundle: Bundle = made.bundle
        return card.render(bundle.manifest, rank(tiers, accuracy), checkpoint, parity)

    return render


def test_a_tier_no_better_than_a_cheaper_one_is_said_to_be_so(
    rendered: Callable[..., str],
) -> None:
    low, full = (line for line in rendered().splitlines() if line.startswith(("| low", "| full")))
    assert "75.00 % [40.00, 95.00] of 8" in low
    assert "dominated" not in low
    assert full.rstrip(" |").endswith("dominated")


def test_phases_are_told_in_their_order_without_places_on_the_machine(
    rendered: Callable[..., str],
) -> None:
    text = rendered()
    assert text.index("1. 2 epochs") < text.index("2. 1 epochs")
    assert "80.00 % at keep 1.0" in text
    assert "secret" not in text
    assert "image_size" not in text  # the second phase took its sizes from the first


def test_parity_is_claimed_only_where_it_was_proven(rendered: Callable[..., str]) -> None:
    assert "Not checked" in rendered()
    proven = Parity(64, (1, 2), worst={"low": 1e-6}, near_ties={"low": 3})
    assert "3 near ties of 64" in rendered(proven)
