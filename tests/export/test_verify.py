"""The gate lets right graphs through, and stops wrong ones."""

import shutil
from collections.abc import Callable
from copy import deepcopy
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pcae_export import graph, int8, pack, weights
from pcae_export.images import generate
from pcae_export.pack import Part, TierSpec
from pcae_export.torch_reference import Reference, run_torch
from pcae_export.verify import (
    MARGIN,
    Compared,
    Parity,
    ParityError,
    check_parity,
    compare_outputs,
    verify_model,
)
from pcae_serve.bundle.manifest import INT8_GRAPH, WEIGHTS
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Output
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]

PIXELS = np.random.default_rng(2).integers(0, 256, (32, 16, 16, 3), dtype=np.uint8)
COUNTS = (38, 22, 13)


@pytest.fixture(scope="module")
def stored(made: Any) -> Checkpoint:
    return checkpoints.load(made.bundle.root / "models" / "vit")


@pytest.fixture
def copied(made: Any, tmp_path: Path) -> Bundle:
    """A copy of the bundle to damage: verification does not check hashes."""
    shutil.copytree(made.bundle.root, tmp_path / "copy")
    found: Bundle = replace(made.bundle, root=tmp_path / "copy")
    return found


def changed(checkpoint: Checkpoint, change: Callable[[Any], object]) -> Checkpoint:
    other = replace(checkpoint, model=deepcopy(checkpoint.model))
    with torch.no_grad():
        change(other.model)
    return other


def rewrite(bundle: Bundle, checkpoint: Checkpoint) -> None:
    """Other weights in the places of the bundle's own, so for all of its graphs."""
    half = weights.to_half(checkpoint.model.state_dict())
    weights.write(half, bundle.file("vit", WEIGHTS))


# Whole bundles


def test_right_graphs_pass(made: Any, stored: Checkpoint) -> None:
    parity = verify_model(made.bundle, stored, PIXELS, "vit")
    assert (parity.images, parity.not_run) == (32, ())
    kinds = ("elastic", "float32"), ("static", "float32"), ("cuda", "float16"), (
        "tensorrt", "float16",
    )  # fmt: skip
    assert [(row.tier, row.graph, row.precision) for row in parity.rows] == [
        (tier, *kind) for tier in ("low", "mid", "full") for kind in kinds
    ]
    for row in parity.rows:
        assert row.images == 32
        if row.precision == "float32":
            assert max(row.largest, row.largest_equal) < 1e-4
            assert (row.agreement, row.other_sets) == (1, 0)
        else:
            assert 1e-5 < row.largest_equal < 0.02  # it is rounded
        if row.tier == "full":
            assert (row.near_ties, row.other_sets) == (0, 0)  # nothing is cut
        assert row.mean <= row.largest
    assert str(parity).startswith(
        "32 images, batches of 1, 2, 3, 8; 6 float32 graphs: largest difference"
    )
    assert "; 6 float16 graphs: largest difference" in str(parity)


def test_other_weights_are_caught(made: Any, stored: Checkpoint) -> None:
    other = changed(stored, lambda model: model.head.bias[0].add_(0.002))
    with pytest.raises(
        ParityError, match=r"tier 'low', elastic graph: a logit differs from torch by 0\.002"
    ):
        verify_model(made.bundle, other, PIXELS, "vit")


def test_other_positions_are_caught(made: Any, stored: Checkpoint) -> None:
    other = changed(stored, lambda m: m.pos_embed[:, 1:].copy_(m.pos_embed[:, 1:].flip(1)))
    with pytest.raises(ParityError, match="a logit differs"):
        verify_model(made.bundle, other, PIXELS, "vit")


def test_features_are_held_to_a_share_of_the_largest(stored: Checkpoint) -> None:
    expected = Reference(torch.full((16, 8), 3.0), [], torch.full((16,), torch.inf))
    headless = changed(stored, lambda model: None)
    headless.model.config = replace(headless.model.config, classes=0)
    for difference, fine in ((0.002, True), (0.004, False)):
        found = Output(expected.vectors.numpy() + np.float32(difference), ())
        row = compare_outputs(found, expected, headless, PIXELS[:16], "t", "elastic", "float32")
        assert row.agreement is None
        assert row.largest == pytest.approx(difference, rel=1e-3)
        if fine:
            check_parity(row, found, expected, "ptr", "here")
        else:
            with pytest.raises(ParityError, match="here: a feature differs from torch by"):
                check_parity(row, found, expected, "ptr", "here")


@pytest.mark.parametrize(
    ("wrong", "right", "kind"),
    [
        ("low.onnx", "mid.onnx", "static"),
        ("full.cuda.onnx", "mid.cuda.onnx", "cuda"),
        ("low.tensorrt.onnx", "mid.tensorrt.onnx", "tensorrt"),
    ],
)
def test_a_graph_of_other_counts_is_caught(
    copied: Bundle, stored: Checkpoint, wrong: str, right: str, kind: str
) -> None:
    shutil.copy(copied.file("vit", wrong), copied.file("vit", right))
    with pytest.raises(ParityError, match=f"tier 'mid', {kind} graph: output shapes are"):
        verify_model(copied, stored, PIXELS, "vit")


def scaled(model: onnx.ModelProto) -> None:
    """The scale of attention, doubled."""
    scale = next(
        c for c in model.graph.initializer
        if c.data_location != c.EXTERNAL and not c.dims
        and abs(onnx.numpy_helper.to_array(c) - 16**-0.5) < 1e-3
    )  # fmt: skip
    doubled = 2 * onnx.numpy_helper.to_array(scale)
    scale.CopyFrom(onnx.numpy_helper.from_array(doubled, scale.name))


def of_other_heads(model: onnx.ModelProto) -> None:
    for node in model.graph.node:
        for attribute in node.attribute:
            if attribute.name == "num_heads":
                attribute.i = 1


@pytest.mark.parametrize(
    ("file", "damage", "message"),
    [
        ("mid.onnx", scaled, "static graph: a logit differs from torch"),
        ("mid.cuda.onnx", of_other_heads, "cuda graph: "),
        ("mid.tensorrt.onnx", scaled, "tensorrt graph: "),
    ],
)
def test_a_graph_that_computes_something_else_is_caught(
    copied: Bundle, stored: Checkpoint, file: str, damage: Any, message: str
) -> None:
    model = onnx.load(copied.file("vit", file), load_external_data=False)
    damage(model)
    onnx.save(model, copied.file("vit", file))
    with pytest.raises(ParityError, match=f"tier 'mid', {message}"):
        verify_model(copied, stored, PIXELS, "vit")


def test_a_graph_that_does_not_run_is_one_line(copied: Bundle, stored: Checkpoint) -> None:
    copied.file("vit", "mid.cuda.onnx").write_bytes(b"no graph")
    with pytest.raises(
        ParityError, match=r"tier 'mid', cuda graph: ONNX Runtime cannot run .*: "
    ) as caught:
        verify_model(copied, stored, PIXELS, "vit")
    assert "\n" not in str(caught.value)


def test_images_that_prove_nothing_are_refused(copied: Bundle, stored: Checkpoint) -> None:
    """One grey image without positions: all patches are equal."""
    flat = changed(stored, lambda model: model.pos_embed.zero_())
    rewrite(copied, flat)
    with pytest.raises(ParityError, match="tier 'low': 32 of 32 images are near ties"):
        verify_model(copied, flat, np.full_like(PIXELS, 128), "vit")


def test_near_ties_are_counted_and_judged_with_equal_sets_alone(
    copied: Bundle, stored: Checkpoint
) -> None:
    flat = changed(stored, lambda model: model.pos_embed.zero_())
    rewrite(copied, flat)
    pixels = PIXELS.copy()
    pixels[3:12] = 128
    rows = {(row.tier, row.graph): row for row in verify_model(copied, flat, pixels, "vit").rows}
    assert [rows[tier, "static"].near_ties for tier in ("low", "mid", "full")] == [9, 9, 0]
    assert rows["low", "static"].other_sets <= 9
    assert rows["low", "static"].largest_equal < 1e-4


def test_few_images_are_refused(made: Any, stored: Checkpoint) -> None:
    with pytest.raises(ParityError, match="needs at least 16 images, not 15"):
        verify_model(made.bundle, stored, PIXELS[:15], "vit")


def test_graphs_in_bfloat16_are_said_not_to_have_run(tiny: Tiny, tmp_path: Path) -> None:
    parts = {"vit": Part(tiny(depth=1, reduction_points=()), {"full": TierSpec(1.0)})}
    parts = {name: replace(part, half="bfloat16") for name, part in parts.items()}
    bundle = pack.write_bundle(parts, tmp_path / "out")
    stored = checkpoints.load(bundle.root / "models" / "vit")
    parity = verify_model(bundle, stored, PIXELS, "vit")
    assert [row.graph for row in parity.rows] == ["elastic", "static"]
    assert len(parity.not_run) == 1
    assert str(parity).endswith(
        "; not run: bfloat16 graphs: ONNX Runtime has no kernels for them on a CPU"
    )


def test_int8_graphs_are_held_to_the_class(copied: Bundle, stored: Checkpoint) -> None:
    elastic = graph.make_elastic(graph.trace(stored.model, stored.preprocess))
    tier = copied.tiers[-1].model_copy(update={"precision": "int8"})
    bundle = replace(copied, manifest=copied.manifest.model_copy(update={"tiers": (tier,)}))
    file = copied.file("vit", INT8_GRAPH)
    int8.save(elastic, stored.model.state_dict(), file, {})
    (row,) = verify_model(bundle, stored, PIXELS, "vit").rows
    assert (row.graph, row.precision) == ("elastic", "int8")
    assert row.largest > 1e-3  # more than float32 may differ

    other = changed(stored, lambda model: model.head.weight.copy_(model.head.weight.flip(0)))
    int8.save(elastic, other.model.state_dict(), file, {})
    with pytest.raises(ParityError, match="elastic graph: int8 gives another answer than torch"):
        verify_model(bundle, stored, PIXELS, "vit")


# Arithmetic and selection


def forced(stored: Checkpoint, kept: Reference) -> Reference:
    return run_torch(stored, PIXELS, COUNTS, [stage.numpy() for stage in kept.kept])


def output(found: Reference, kept: Reference | None = None) -> Output:
    stages = (kept or found).kept
    return Output(found.vectors.numpy().copy(), tuple(stage.numpy().copy() for stage in stages))


@pytest.fixture(scope="module")
def expected(stored: Checkpoint) -> Reference:
    return run_torch(stored, PIXELS, COUNTS)


@pytest.fixture(scope="module")
def others(stored: Checkpoint) -> Reference:
    """Outputs of the same weights with the patches that other positions would keep."""
    other = changed(stored, lambda m: m.pos_embed[:, 1:].copy_(m.pos_embed[:, 1:].flip(1)))
    return forced(stored, run_torch(other, PIXELS, COUNTS))


def compared(
    found: Output, expected: Reference, stored: Checkpoint, precision: Any = "float32"
) -> Compared:
    return compare_outputs(found, expected, stored, PIXELS, "mid", "static", precision)


def test_equal_sets_tell_arithmetic_from_selection(
    stored: Checkpoint, expected: Reference, others: Reference
) -> None:
    row = compared(output(others), expected, stored)
    assert row.other_sets == 32
    assert row.largest > 0.01
    assert row.largest_equal < 1e-5
    row = compared(output(expected, kept=others), expected, stored)  # not kept
    assert row.largest == 0
    assert row.largest_equal > 0.01


def test_other_patches_are_a_fault_in_float32_alone(
    stored: Checkpoint, expected: Reference, others: Reference
) -> None:
    mixture = output(expected)
    mixture.vectors[0] = others.vectors[0]
    for ours, theirs in zip(mixture.kept, others.kept, strict=True):
        ours[0] = theirs[0]
    row = compared(mixture, expected, stored)
    assert row.other_sets == 1
    with pytest.raises(ParityError, match="here: a logit differs from torch"):
        check_parity(row, mixture, expected, "ptr", "here")
    check_parity(compared(mixture, expected, stored, "float16"), mixture, expected, "ptr", "here")


def test_other_patches_with_the_same_answer_are_a_fault_in_float32(
    stored: Checkpoint, expected: Reference
) -> None:
    found = output(expected)
    found.kept[1][5, 0] = next(i for i in range(64) if i not in found.kept[1][5])
    row = compared(found, expected, stored)
    with pytest.raises(ParityError, match="here: keeps other patches than torch after stage 1"):
        check_parity(row, found, expected, "ptr", "here")


def test_where_torch_was_close_only_equal_sets_are_judged(
    stored: Checkpoint, expected: Reference, others: Reference
) -> None:
    margin = expected.margin.clone()
    margin[0] = MARGIN
    close = replace(expected, margin=margin)
    found = output(expected)
    found.vectors[0] = others.vectors[0]
    for ours, theirs in zip(found.kept, others.kept, strict=True):
        ours[0] = theirs[0]
    row = compared(found, close, stored)
    assert (row.near_ties, row.other_sets) == (1, 1)
    assert row.largest == 0
    check_parity(row, found, close, "ptr", "here")

    found.vectors[0, 0] += 0.01
    row = compared(found, close, stored)
    assert row.largest == 0
    with pytest.raises(ParityError, match="here: with equal sets a logit differs from torch by"):
        check_parity(row, found, close, "ptr", "here")


@pytest.mark.parametrize("precision", ["float32", "float16", "int8"])
@pytest.mark.parametrize("images", [slice(0, 1), slice(None)])
def test_no_number_is_no_parity(
    stored: Checkpoint, expected: Reference, precision: Any, images: slice
) -> None:
    found = output(expected)
    found.vectors[images] = np.nan
    with pytest.raises(ParityError, match="tier 'mid', static graph: some outputs are not finite"):
        compared(found, expected, stored, precision)


def test_answers_of_another_shape(stored: Checkpoint, expected: Reference) -> None:
    right = output(expected)
    for wrong in (
        Output(right.vectors[:, :2], right.kept),
        Output(right.vectors, right.kept[:2]),
        Output(right.vectors, (right.kept[0], right.kept[1][:, :9], right.kept[2])),
    ):
        with pytest.raises(ParityError, match="tier 'mid', static graph: output shapes are"):
            compared(wrong, expected, stored)


# Limits by precision and rule


def row(**changes: Any) -> Compared:
    fields: dict[str, Any] = {
        "tier": "mid", "graph": "cuda", "precision": "float16", "images": 200, "largest": 9.0,
        "mean": 1.0, "largest_equal": 0.03, "agreement": 1.0, "cosine": 1.0, "near_ties": 0,
        "other_sets": 50,
    }  # fmt: skip
    return Compared(**(fields | changes))


def expected_logits(largest: float = 2.0, margin: float = 0.1) -> Reference:
    """Torch's answers to 200 images, whose largest logit is `largest`."""
    vectors = torch.tensor([[largest, 0.0, -1.0]]).expand(200, -1)
    return Reference(vectors, [], torch.full((200,), margin))


def check(found: Compared, expected: Reference, rule: Any = "ptr") -> None:
    check_parity(found, Output(expected.vectors.numpy(), ()), expected, rule, "here")


@pytest.mark.parametrize("precision", ["float16", "bfloat16", "int8"])
@pytest.mark.parametrize(
    ("images", "misses", "fine"), [(200, 4, True), (200, 5, False), (1000, 11, True),
                                   (1000, 12, False), (16, 1, True), (16, 2, False)]
)  # fmt: skip
def test_classes_that_may_differ(precision: str, images: int, misses: int, fine: bool) -> None:
    found = row(precision=precision, images=images, agreement=1 - misses / images)
    if fine:
        check(found, expected_logits())
        return
    with pytest.raises(ParityError, match=f"here: {precision} gives another answer than torch on "
                       f"{misses} of {images} images"):  # fmt: skip
        check(found, expected_logits())


@pytest.mark.parametrize(("cosine", "fine"), [(0.9901, True), (0.9899, False), (np.nan, False)])
@pytest.mark.parametrize("precision", ["float16", "int8"])
def test_features_are_held_to_a_cosine(precision: str, cosine: float, fine: bool) -> None:
    found = row(precision=precision, agreement=None, cosine=cosine)
    if fine:
        check(found, expected_logits())
        return
    with pytest.raises(ParityError, match=f"here: {precision} features have a mean cosine of"):
        check(found, expected_logits())


@pytest.mark.parametrize(
    ("precision", "largest", "fine"),
    [
        ("float16", 2.0, True),  # 0.03 of 2: 1.5 %
        ("float16", 1.4, False),
        ("bfloat16", 1.4, False),
        ("int8", 1.4, True),  # held to the class alone
    ],
)
def test_half_is_held_to_its_share_of_the_largest_with_equal_sets(
    precision: str, largest: float, fine: bool
) -> None:
    found = row(precision=precision)
    if fine:
        check(found, expected_logits(largest))
        return
    with pytest.raises(ParityError, match="here: with equal sets it differs from torch by"):
        check(found, expected_logits(largest))


@pytest.mark.parametrize(
    ("margin", "fine"), [(0.1, True), (torch.inf, False)], ids=["dropping", "dropping nothing"]
)
def test_what_half_merges_into_what_is_no_fault_of_arithmetic(margin: float, fine: bool) -> None:
    found, expected = row(), expected_logits(1.4, margin)
    if fine:
        check(found, expected, "merged")
        return
    with pytest.raises(ParityError, match="with equal sets"):
        check(found, expected, "merged")


def test_merged_patches_of_near_ties_are_left_out_of_equal_sets(
    stored: Checkpoint, expected: Reference
) -> None:
    merged = changed(stored, lambda model: None)
    merged.model.config = replace(stored.model.config, reduction="merged")
    margin = expected.margin.clone()
    margin[0] = MARGIN
    close = replace(expected, margin=margin)
    found = output(expected)
    found.vectors[0] += 1
    assert compared(found, close, merged).largest_equal == 0
    assert compared(found, close, stored).largest_equal == 1


def test_parity_in_words() -> None:
    exact = row(precision="float32", largest=2e-6, largest_equal=3e-6, near_ties=1)
    assert str(Parity(64, (exact,))) == (
        "64 images, batches of 1, 2, 3, 8; 1 float32 graphs: largest difference 2.0e-06 as served,"
        " 3.0e-06 with equal sets, 1 near tie"
    )
    rough = row(agreement=0.984375), row(precision="int8", agreement=1.0)
    assert str(Parity(64, rough)) == (
        "64 images, batches of 1, 2, 3, 8; 2 float16/int8 graphs: largest difference 3.0e-02 with"
        " equal sets, the same class on at least 98.4 % of the images"
    )
    features = row(agreement=None, cosine=0.99912)
    assert str(Parity(64, (features,), ("x: why",))).endswith(
        "with equal sets, cosine at least 0.99912; not run: x: why"
    )
    table = list(Parity(64, (features,)).format_table())
    assert "| cosine | near ties | other patches |" in table[0]
    assert (
        table[2]
        == "| mid | cuda | float16 | 200 | 9.0e+00 | 1.0e+00 | 3.0e-02 | 0.999120 | 0 | 50 |"
    )


def test_generated_images_prove_as_well(made: Any, stored: Checkpoint) -> None:
    parity = verify_model(made.bundle, stored, generate(16, 16), "vit")
    assert max(row.near_ties for row in parity.rows) < 8
