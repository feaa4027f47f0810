"""Each family of `transformers`: what they compute, the model and every tier of a bundle compute.

`bundled` compares each graph of each tier with the model; here the model, and the tier at keep
ratio 1, are compared with `transformers`.
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, get_args

import numpy as np
import pytest
import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.flop_counter import FlopCounterMode

from pcae_export.images import generate
from pcae_serve.bundle.tokens import Rule
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.import_weights import initialise, load_checkpoint
from pcae_training.model import VisionTransformer
from tests.support.exporting import PREPROCESS, bundled
from tests.support.families import FAMILIES, REAL, build, build_real, write
from tests.support.foreign_checkpoints import rebuilt

RULES: tuple[Rule, ...] = get_args(Rule)
#: The families whose bundles the fast tests write, and the rule of each. CLIP's is written there
#: by test_text_classes.
FAST: dict[str, Rule] = {"siglip": "weighted", "dinov3-gated": "merged"}
each_family = pytest.mark.parametrize("kind", FAMILIES)


def images(batch: int = 3) -> Tensor:
    return torch.randn(batch, 3, 24, 24, generator=torch.Generator().manual_seed(0))


@pytest.fixture
def model(hugging_face: Any, kind: str, tmp_path: Path) -> VisionTransformer:
    """Return our model of a family's checkpoint, with a stage after its first block."""
    found = rebuilt(load_checkpoint(write(build(hugging_face, kind), tmp_path)))
    found.config = replace(found.config, reduction_points=(0,))
    return found


@torch.inference_mode()
@each_family
def test_features_are_those_of_transformers(hugging_face: Any, kind: str, tmp_path: Path) -> None:
    theirs = build(hugging_face, kind)
    ours = rebuilt(load_checkpoint(write(theirs, tmp_path)))
    expected = FAMILIES[kind].answer(theirs, images())
    assert expected.std(dim=0).max() > 0.01  # else any image would do
    torch.testing.assert_close(ours(images()), expected, atol=1e-4, rtol=0)


@torch.inference_mode()
@each_family
def test_a_family_stored_as_our_own_checkpoint_stays_as_it_is(
    model: VisionTransformer, kind: str, tmp_path: Path
) -> None:
    size, classes = model.config.image_size, model.config.classes
    labels = [str(number) for number in range(classes)]
    preprocess = replace(PREPROCESS, image_size=size, resize=size)
    checkpoints.save(Checkpoint(model, preprocess, labels, {}), tmp_path / "own")
    again = rebuilt(load_checkpoint(tmp_path / "own"))
    assert again.config == model.config
    assert torch.equal(again(images(), (18,)), model(images(), (18,)))


@each_family
def test_a_family_can_be_fine_tuned(hugging_face: Any, kind: str, tmp_path: Path) -> None:
    found = load_checkpoint(write(build(hugging_face, kind), tmp_path))
    config = replace(found.config, classes=3, reduction_points=(0,), reduction="merged")
    model = VisionTransformer(config)
    fitted = initialise(model, found)
    assert fitted.missing == ["head.weight", "head.bias"]
    model(images(), (18,)).square().sum().backward()
    without = [name for name, parameter in model.named_parameters() if parameter.grad is None]
    assert not without


@torch.inference_mode()
@each_family
@pytest.mark.parametrize("rule", RULES)
def test_every_rule_reduces_every_family(model: VisionTransformer, kind: str, rule: Rule) -> None:
    whole = model(images())
    model.config = replace(model.config, reduction=rule)
    torch.testing.assert_close(model(images(), (36,)), whole)  # nothing is dropped
    reduced, (kept,) = model.classify(images(), (18,))
    assert kept.shape == (3, 18)
    assert reduced.isfinite().all()
    assert not torch.allclose(reduced, whole)


@each_family
@pytest.mark.parametrize("rule", ["ptr", "weighted", "attention"])
def test_multiply_adds_are_those_that_torch_counts(
    model: VisionTransformer, kind: str, rule: Rule
) -> None:
    model.requires_grad_(False).config = replace(model.config, reduction=rule)
    for counts in ((36,), (18,)):
        # only this backend's products are counted
        with FlopCounterMode(display=False) as counter, sdpa_kernel(SDPBackend.MATH):
            model(images(batch=1), counts)
        assert counter.get_total_flops() == 2 * model.config.geometry.macs(counts)


@pytest.mark.parametrize(
    ("kind", "rule"),
    [
        pytest.param(kind, rule, marks=[] if FAST.get(kind) == rule else pytest.mark.slow)
        for kind in FAMILIES
        for rule in RULES
    ],
)
@torch.inference_mode()
def test_every_tier_of_a_family_is_proven(
    hugging_face: Any, kind: str, rule: Rule, tmp_path: Path
) -> None:
    theirs = build(hugging_face, kind)
    folder = write(theirs, tmp_path / "theirs")
    tiers = ("--tier", "low=0.5", "--tier", "full=1.0", "--reduction-points", 0)
    # half precision of one rule: what it adds to the others is the same
    half = ("--half", "auto" if rule == "weighted" else "none")
    given = ("--normalise", "half", "--reduction", rule, *tiers, *half)
    bundle = bundled(folder, tmp_path / "out", *given)
    pixels = generate(6, 24)
    found = OnnxRuntimeEngine(bundle, threads=1).run(bundle.tiers[-1], pixels).vectors
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = FAMILIES[kind].answer(theirs.half().float(), normalised).numpy()
    np.testing.assert_allclose(found, expected, atol=1e-4)
    assert bundle.width == expected.shape[1]


@pytest.mark.slow
@pytest.mark.parametrize("kind", REAL)
@torch.inference_mode()
def test_a_model_of_a_real_size(hugging_face: Any, kind: str, tmp_path: Path) -> None:
    theirs = build_real(hugging_face, kind)
    folder = write(theirs, tmp_path / "theirs")
    given = ("--normalise", "half", "--tier", "low=0.7", "--tier", "full=1.0", "--half", "none")
    bundle = bundled(folder, tmp_path / "out", *given)
    pixels = generate(2, bundle.image_size)
    found = OnnxRuntimeEngine(bundle).run(bundle.tiers[-1], pixels).vectors
    normalised = (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5
    expected = REAL[kind].answer(theirs.half().float(), normalised).numpy()
    assert expected.std(axis=0).max() > 0.01
    np.testing.assert_allclose(found, expected, atol=1e-4 * max(1, np.abs(expected).max()))
