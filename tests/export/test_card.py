"""The content of the model card, and what it omits."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from pcae_export import card
from pcae_export.measure import Measured, Quality
from pcae_export.pack import Part, TierSpec, plan_tiers
from pcae_export.ranking import rank_tiers
from pcae_export.verify import Compared, Parity
from pcae_serve.bundle.manifest import Tier
from pcae_serve.bundle.quality import Accuracy, Agreement, Fidelity
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]
TIERS = {"low": TierSpec(0.5), "full": TierSpec(1.0)}
TOP1 = Accuracy(top1=0.75, n=8, interval=(0.4, 0.95), data_set="toys/test")
SAME = Agreement(share=0.625, n=8, data_set="toys/test")
NEAR = Fidelity(cosine=0.98765, n=1200, data_set="toys/test")
EXACT = Compared("low", "static", "float32", 64, 2e-6, 1e-7, 3e-6, 1.0, 1.0, 3, 0)
HALF = Compared("low", "cuda", "float16", 64, 0.5, 0.1, 0.004, 0.984375, 0.9999, 3, 17)


@pytest.fixture
def rendered(made: Any) -> Callable[..., str]:
    """The card of models by id, every tier worth the same."""

    def render(models: Mapping[str, Part], worth: Quality | None = None, **fields: Any) -> str:
        tiers = plan_tiers(models)
        n = worth.n if worth else 0
        found = {t.name: Measured(worth, np.zeros(n)) for t in tiers} if worth else {}
        checkpoints = {model: part.checkpoint for model, part in models.items()}
        parity = fields.pop("parity", {})
        return card.render(
            made.bundle.manifest, rank_tiers(tiers, found), checkpoints, parity, **fields
        )

    return render


def one(checkpoint: Checkpoint) -> dict[str, Part]:
    return {"vit": Part(checkpoint, TIERS)}


def rows(text: str) -> dict[str, list[str]]:
    """Cells of the card's first table, by the row's first cell."""
    table = text.split("## Tiers\n\n")[1].split("\n\n")[0].splitlines()
    return {cells[0]: cells for cells in (line.strip("| ").split(" | ") for line in table)}


def test_a_tier_worse_than_a_cheaper_one_is_marked(made: Any, tiny: Tiny) -> None:
    models = one(tiny())
    tiers = [
        tier.model_copy(update={"accuracy": TOP1, "dominated": tier.name == "full"})
        for tier in plan_tiers(models)
    ]
    checkpoints = {model: part.checkpoint for model, part in models.items()}
    table = rows(card.render(made.bundle.manifest, tiers, checkpoints, {}))
    assert table["low"][-1] == "75.00 % [40.00, 95.00] of 8"
    assert table["full"][-1] == "75.00 % [40.00, 95.00] of 8, dominated"


@pytest.mark.parametrize(
    ("classes", "worth", "head", "cell", "explained"),
    [
        (3, TOP1, "top-1 (95 % interval)", "75.00 % [40.00, 95.00] of 8", "Top-1 on 8 images of"),
        (3, SAME, "same class as at keep ratio 1", "62.5 % of 8", "ratio 1, without labels, on"),
        (
            0, NEAR, "cosine of the features to those at keep ratio 1", "0.9877 over 1,200",
            "on 1,200 images of toys/test",
        ),
        (3, None, "top-1 (95 % interval)", "not measured", ""),
    ],
    ids=["top-1", "agreement", "cosine", "nothing"],
)  # fmt: skip
def test_tiers_are_worth_what_was_measured(
    rendered: Callable[..., str], tiny: Tiny, classes: int, worth: Quality | None, head: str,
    cell: str, explained: str,
) -> None:  # fmt: skip
    checkpoint = replace(tiny(classes=classes), labels=["bag", "coat", "shoe"][:classes])
    text = rendered(one(checkpoint), worth)
    table = rows(text)
    assert table["tier"][-1] == head
    assert table["low"][-1] == cell
    assert explained in text
    assert ("on the elastic graph (one graph for all tiers" in text) == (worth is not None)
    assert ("rounded to float16, as stored; `pcae-train evaluate` uses" in text) == (
        worth is not None
    )
    purpose = (
        "classifies images into 3 classes (bag, coat, shoe)"
        if classes
        else ("computes 32 features per image")
    )
    assert f"{purpose}. Images have 16 x 16 pixels, divided into 64 patches" in text


def test_tiers_of_several_models_are_told_apart(rendered: Callable[..., str], tiny: Tiny) -> None:
    large, small = tiny(), replace(tiny(width=16, depth=3), training={})
    models = {
        "large": Part(large, {"full": TierSpec(1.0)}),
        "small": Part(small, {"half": TierSpec(0.5), "quick": TierSpec(0.5, "int8")}),
    }
    text = rendered(models, TOP1)
    table = rows(text)
    assert table["tier"][1] == "model"
    assert [table[name][1] for name in ("quick", "half", "full")] == ["small", "small", "large"]
    at = table["tier"].index("precision")
    assert [table[name][at] for name in ("quick", "half", "full")] == ["int8"] + ["float32"] * 2
    full, half = (
        checkpoint.model.config.geometry.macs(counts)
        for checkpoint, counts in ((large, (64, 64, 64)), (small, (32, 16, 8)))
    )
    assert table["half"][-2] == f"{full / half:.2f}"  # of the largest model, not its own
    assert "**large**: A vision transformer (0.05 million" in text
    assert text.count("**small**") == 3  # what it is, its training, its parity
    assert "**small**\n\nNot recorded: the checkpoint does not contain it." in text


def test_tokens_of_the_last_block_count_what_was_appended(
    rendered: Callable[..., str], tiny: Tiny
) -> None:
    table = rows(rendered(one(tiny())))
    assert table["low"][2:4] == ["32, 16, 8", str(8 + 1 + 3)]
    assert table["full"][2:4] == ["64, 64, 64", "65"]
    plain = {"vit": Part(tiny(reduction_points=()), {"full": TierSpec(1.0)})}
    assert rows(rendered(plain))["full"][2] == "all"
    assert "It keeps all patches." in rendered(plain)


@pytest.mark.parametrize(
    ("rule", "sentence"),
    [
        ("ptr", "it drops the patches most similar to the mean patch (progressive token reduction, "
         "the PCAE paper)."),
        ("merged", "it merges into others the patches most similar to the mean patch"),
        ("random", "it drops a fixed random choice of patches"),
        ("attention", "it drops the patches that receive the least attention"),
        ("ptr-normalised", "it drops the patches most similar to the mean of the normalised"),
        ("weighted", "it drops the patches most similar to the mean patch"),
    ],
)  # fmt: skip
def test_the_reduction_is_told_in_words(
    rendered: Callable[..., str], tiny: Tiny, rule: str, sentence: str
) -> None:
    text = rendered(one(tiny(reduction=rule)))
    assert f"After blocks 0, 1, 2 {sentence}" in text
    assert (f"rule `{rule}`" in text) == (rule != "ptr")


def test_phases_are_told_in_their_order_without_places_on_the_machine(
    rendered: Callable[..., str], tiny: Tiny
) -> None:
    first = tiny()
    second = {
        "settings": {"data": "toys", "init": "/secret/first", "image_size": 224, "lr": 0.01},
        "epochs_done": 1,
        "history": [],
        "final": {"1.0": {"top1": 0.8, "n": 10}},
        "init": first.training,
    }
    text = rendered(one(replace(first, training=second)))
    assert text.index("1. 2 epochs") < text.index("2. 1 epochs")
    assert "80.00 % at keep 1.0" in text
    assert "secret" not in text
    assert "image_size" not in text  # the second phase took its sizes from the first


def test_weights_from_a_hub_are_a_phase(rendered: Callable[..., str], tiny: Tiny) -> None:
    source = "hf://facebook/dinov2-small, commit 0123"
    trained = tiny()
    text = rendered(one(replace(trained, training=trained.training | {"init": {"source": source}})))
    assert f"1. Weights of {source}.\n2. 2 epochs" in text


def test_parity_is_claimed_only_where_it_was_verified(
    rendered: Callable[..., str], tiny: Tiny
) -> None:
    assert "Not verified." in rendered(one(tiny()))
    verified = Parity(64, (EXACT, HALF), not_run=("bfloat16 graphs: no kernels",))
    text = rendered(one(tiny()), parity={"vit": verified})
    assert "Not verified" not in text
    assert f"compared with torch on the stored weights: {verified}." in text
    assert "| low | static | float32 | 64 | 2.0e-06 | 1.0e-07 | 3.0e-06 | 100.0 % | 3 | 0 |" in text
    assert "- near ties: images on which two patches at a cut differ by at most 1e-05" in text
    assert "| low | cuda | float16 | 64 | 5.0e-01 | 1.0e-01 | 4.0e-03 | 98.4 % | 3 | 17 |" in text


def test_a_note_stands_above_the_tiers(rendered: Callable[..., str], tiny: Tiny) -> None:
    text = rendered(one(tiny()), note="  Toys, not for use.\n")
    assert "\n\nToys, not for use.\n\n## Tiers\n\n" in text


def test_quality_in_words() -> None:
    tier = Tier(name="low", model="vit", keep_ratio=0.5, token_counts=(1,), macs=1)
    assert card.format_quality(tier) == "not measured"
    assert card.format_quality(tier.model_copy(update={"agreement": SAME})) == "62.5 % of 8"


def test_the_card_begins_with_what_the_hub_reads(
    rendered: Callable[..., str], tiny: Tiny, made: Any
) -> None:
    assert rendered(one(tiny())).startswith(
        "---\nlibrary_name: pcae-serve\npipeline_tag: image-classification\n"
        f"tags: [vision-transformer, onnx, token-reduction]\n---\n\n# {made.bundle.manifest.name}\n"
    )
