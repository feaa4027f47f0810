"""The table of reductions, and the rule that follows from it."""

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch

from pcae_export.choice import CANDIDATES, FLOOR, Choice, choose_reduction
from pcae_export.images import generate
from pcae_export.torch_reference import run_torch
from pcae_serve.bundle.tokens import Rule
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import VisionTransformer

Tiny = Callable[..., Checkpoint]
PIXELS = generate(11, 16)  # a whole batch, and a short one


def under(checkpoint: Checkpoint, rule: Rule) -> Checkpoint:
    """The same weights under another rule."""
    model = VisionTransformer(replace(checkpoint.model.config, reduction=rule))
    model.load_state_dict(checkpoint.model.state_dict())
    return replace(checkpoint, model=model.eval())


@pytest.mark.parametrize("classes", [3, 0], ids=["logits", "features"])
def test_cosines_and_shares_are_those_of_torch(tiny: Tiny, classes: int) -> None:
    checkpoint = tiny(classes=classes)
    found = choose_reduction(checkpoint, PIXELS, [1.0, 0.5, "0.7"])
    assert found.ratios == (0.5, "0.7")  # at 1 there is nothing to choose
    assert set(found.cosines) == set(CANDIDATES)
    assert set(found.agreement) == (set(CANDIDATES) if classes else set())
    whole = run_torch(checkpoint, PIXELS, (64, 64, 64)).vectors
    for rule in CANDIDATES:
        for row, ratio in enumerate(found.ratios):
            counts = checkpoint.model.config.geometry.counts(str(ratio))
            answers = run_torch(under(checkpoint, rule), PIXELS, counts).vectors
            one, other = (
                v - v.mean(dim=1, keepdim=True) if classes else v for v in (answers, whole)
            )
            near = torch.cosine_similarity(one, other)
            np.testing.assert_allclose(found.cosines[rule][row], near, atol=1e-5)
            if classes:
                same = (answers.argmax(1) == whole.argmax(1)).double().mean()
                assert found.agreement[rule][row] == pytest.approx(float(same))


def test_the_checkpoint_stays_as_it_was(tiny: Tiny) -> None:
    checkpoint = tiny()
    before = checkpoint.model.config
    again = [choose_reduction(checkpoint, PIXELS, [0.5], ["random", "merged"]) for _ in range(2)]
    assert checkpoint.model.config == before
    for rule in ("random", "merged"):
        np.testing.assert_array_equal(again[0].cosines[rule], again[1].cosines[rule])


def made(agreement: bool = False, **means: float) -> Choice:
    """Two ratios, four images; every rule's cosines spread a little around its mean."""
    spread = np.array([[-0.02, 0.02, -0.01, 0.01]] * 2, dtype=np.float32)
    cosines = {rule: np.float32(mean) + spread * mean for rule, mean in means.items()}
    shares = {rule: np.array([mean, mean]) for rule, mean in means.items() if agreement}
    return Choice(cosines, shares, (0.5, 0.7))  # type: ignore[arg-type]


def test_the_nearest_is_chosen_and_never_the_floor() -> None:
    assert made(ptr=0.8, weighted=0.9, merged=0.7, random=0.95).rule == "weighted"
    assert FLOOR == "random"


def test_the_table_tells_the_means_and_how_sure_the_choice_is() -> None:
    lines = list(made(True, ptr=0.8, weighted=0.9, random=0.95).lines())
    assert lines[0] == "| reduction | k = 0.5 | k = 0.7 |"
    assert lines[2:5] == [
        "| ptr | 0.800, 80 % | 0.800, 80 % |",
        "| weighted | 0.900, 90 % | 0.900, 90 % |",
        "| random | 0.950, 95 % | 0.950, 95 % |",
    ]
    # differences of 0.098, 0.102, 0.099 and 0.101, an image at a time
    assert "on 4 images, and share of images with the same class" in lines[-1]
    assert lines[-1].endswith(
        "Chosen: `weighted`, by 0.1000 ± 0.0018 over the next best, paired by image."
    )


def test_one_candidate_is_ahead_of_none() -> None:
    lines = list(made(ptr=0.8, random=0.1).lines())
    assert lines[2] == "| ptr | 0.800 | 0.800 |"
    assert lines[-1].endswith("Chosen: `ptr`.")
    assert "of the features" in lines[-1]
