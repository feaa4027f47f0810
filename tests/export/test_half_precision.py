"""Half precision is proven in half precision: overflow, rounding, and the choice between two."""

from collections.abc import Callable
from typing import Any

import numpy as np
import onnx
import onnx.reference
import pytest
import torch

from pcae_export import pack
from pcae_export.half_precision import LARGEST, HalfError, choose_half
from pcae_export.images import generate
from pcae_export.pack import Part, TierSpec
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]
PIXELS = generate(16, 16)


def overflowing(checkpoint: Checkpoint, factor: float = 40_000) -> Checkpoint:
    """The same function, with larger values between the layers of block 2's MLP."""
    mlp: Any = checkpoint.model.blocks[2].mlp
    with torch.no_grad():
        mlp.fc1.weight.mul_(factor)
        mlp.fc1.bias.fill_(0)
        mlp.fc2.weight.div_(factor)
    return checkpoint


def counts(checkpoint: Checkpoint, *ratios: float) -> list[tuple[int, ...]]:
    return [checkpoint.model.config.geometry.counts(ratio) for ratio in ratios]


def test_a_model_within_range_is_float16(tiny: Tiny) -> None:
    checkpoint = tiny()
    choice = choose_half(checkpoint, PIXELS, counts(checkpoint, 1.0, 0.4), "auto")
    assert (choice.half, choice.note) == ("float16", None)
    assert 0.1 < choice.range.largest < 1000
    assert choice.range.images == 16


def test_a_model_that_overflows_is_bfloat16_or_refused(tiny: Tiny) -> None:
    checkpoint = overflowing(tiny())
    before = {name: tensor.clone() for name, tensor in checkpoint.model.state_dict().items()}
    choice = choose_half(checkpoint, PIXELS, counts(checkpoint, 1.0), "auto")
    assert choice.half == "bfloat16"
    assert choice.range.largest > LARGEST["float16"]
    assert choice.range.tensor == "blocks.2.mlp.fc1"
    assert "blocks.2.mlp.fc1 reaches" in (choice.note or "")
    with pytest.raises(HalfError, match=r"float16 is not safe .*fc1 reaches .*give --half bfloat"):
        choose_half(checkpoint, PIXELS, counts(checkpoint, 1.0), "float16")
    assert choose_half(checkpoint, PIXELS, counts(checkpoint, 1.0), "bfloat16").note is None
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(tensor, before[name])


def test_values_near_the_limit_are_too_near(tiny: Tiny) -> None:
    largest = choose_half(overflowing(tiny(), 1000), PIXELS, [(64, 64, 64)], "auto").range.largest
    close = overflowing(tiny(), 1000 * 0.9 * LARGEST["float16"] / largest)
    assert choose_half(close, PIXELS, [(64, 64, 64)], "auto").half == "bfloat16"


@pytest.mark.parametrize("rule", ["ptr", "weighted", "merged", "attention", "random"])
def test_every_rule_is_computed(tiny: Tiny, rule: Any) -> None:
    checkpoint = tiny(reduction=rule)
    ratios = counts(checkpoint, 1.0, 0.4, 0.3)
    assert choose_half(checkpoint, PIXELS[:4], ratios, "auto").half == "float16"


def test_outputs_that_rounding_destroys_are_refused(tiny: Tiny) -> None:
    """Two large values that cancel: within range, but not within float16's precision."""
    checkpoint = tiny()
    blocks: Any = checkpoint.model.blocks
    with torch.no_grad():
        blocks[0].mlp.fc2.bias.fill_(30_000)
        blocks[3].mlp.fc2.bias.fill_(-30_000)
    with pytest.raises(HalfError, match=r"in float16 outputs have a cosine of .*--half none"):
        choose_half(checkpoint, PIXELS, [(64, 64, 64)], "float16")


@pytest.mark.slow
def test_the_reference_evaluator_agrees(tiny: Tiny, tmp_path: Any) -> None:
    """onnx's evaluator computes the graph for TensorRT in float16: NaN if it overflows."""
    sizes: Any = {"depth": 3, "reduction_points": ()}
    for number, checkpoint in enumerate((tiny(**sizes), overflowing(tiny(**sizes)))):
        part = Part(checkpoint, {"full": TierSpec(1.0)}, "float16")
        bundle = pack.write_bundle({"vit": part}, tmp_path / str(number))
        graph = onnx.load(bundle.file("vit", "full.tensorrt.onnx"))
        session = onnx.reference.ReferenceEvaluator(graph)
        with np.errstate(all="ignore"):
            (logits,) = list(session.run(None, {"pixels": PIXELS[:2]}))
        proven = choose_half(checkpoint, PIXELS, [()], "auto").half == "float16"
        assert np.isfinite(logits).all() == proven == (number == 0)
