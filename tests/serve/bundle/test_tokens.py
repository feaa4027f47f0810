import math
from dataclasses import replace
from decimal import Decimal
from fractions import Fraction
from typing import Any

import numpy as np
import pytest

from pcae_serve.bundle.tokens import Geometry, parse_keep_ratio, patches_kept, reduction_points

VIT_B = Geometry(patches=196, width=768, depth=12, patch_values=3 * 16**2, classes=1000)


@pytest.mark.parametrize(
    ("keep_ratio", "counts", "gmacs"),
    [
        (1.0, (196, 196, 196), 17.57),
        (0.9, (176, 158, 142), 15.34),
        (0.8, (156, 124, 99), 13.19),
        (0.7, (137, 95, 66), 11.29),
        (0.6, (117, 70, 42), 9.53),
    ],
)
def test_the_papers_column(keep_ratio: float, counts: tuple[int, ...], gmacs: float) -> None:
    assert VIT_B.counts(keep_ratio) == counts
    assert VIT_B.macs(counts) / 1e9 == pytest.approx(gmacs, rel=1e-3)


def test_one_block_costs_12nd2_and_2n2d() -> None:
    small = Geometry(patches=9, width=8, depth=1, patch_values=5, classes=3, reduction_points=())
    n, d = 10, 8
    assert small.macs(()) == 9 * 5 * d + 12 * n * d * d + 2 * n * n * d + d * 3


def test_floor_is_exact_where_binary_floats_fail() -> None:
    assert patches_kept(90, 0.7, stages=1) == (63,)
    assert math.floor(90 * 0.7) == 62  # what is being avoided


def test_floor_agrees_with_decimal_everywhere() -> None:
    for hundredths in range(1, 101):
        keep_ratio = hundredths / 100
        decimal = Decimal(hundredths) / 100
        for n in range(1, 401):
            expected = int((n * decimal).to_integral_value("ROUND_FLOOR"))
            if expected:
                assert patches_kept(n, keep_ratio, stages=1) == (expected,)
            else:
                with pytest.raises(ValueError, match="leaves no patch"):
                    patches_kept(n, keep_ratio, stages=1)


@pytest.mark.parametrize("same", [0.7, "0.7", Decimal("0.7"), Fraction(7, 10), np.float32(0.7)])
def test_a_ratio_is_the_decimal_that_was_written(same: float) -> None:
    assert parse_keep_ratio(same) == Fraction(7, 10)


@pytest.mark.parametrize("bad", [0, -1, 1.1, math.nan, math.inf, "x", "", "1/0", None, True])
def test_a_senseless_ratio_is_refused_in_one_line(bad: float) -> None:
    with pytest.raises(ValueError, match=r"^keep ratio must be .*\(0, 1\], not .*$"):
        parse_keep_ratio(bad)


def test_tokens_per_block_counts_a_mean_per_stage_that_dropped_some() -> None:
    assert VIT_B.tokens_per_block((137, 95, 66)) == (197, *[139] * 7, *[98] * 3, 70)
    assert VIT_B.tokens_per_block((196, 196, 196)) == (197,) * 12
    assert VIT_B.tokens_per_block((196, 100, 100)) == (*[197] * 8, *[102] * 4)


@pytest.mark.parametrize(
    "counts", [(137, 95), (137, 95, 66, 40), (197, 95, 66), (95, 137, 66), (137, 95, 0)]
)
def test_counts_that_cannot_be_are_refused(counts: tuple[int, ...]) -> None:
    with pytest.raises(ValueError, match="token counts"):
        VIT_B.macs(counts)


@pytest.mark.parametrize(
    ("depth", "points"),
    [(24, (1, 15, 21)), (12, (0, 7, 10)), (11, (0, 6, 9)), (6, (0, 3, 5)), (40, (2, 26, 36)),
     (3, (0, 1, 2)), (2, ()), (1, ())],
)  # fmt: skip
def test_reduction_points_lie_at_the_same_relative_depth(
    depth: int, points: tuple[int, ...]
) -> None:
    assert reduction_points(depth) == points


def test_merging_appends_nothing_and_costs_two_products() -> None:
    merged, counts = replace(VIT_B, reduction="merged"), (117, 70, 42)
    assert merged.tokens_per_block(counts) == (197, *[118] * 7, *[71] * 3, 43)
    blocks = sum(12 * n * 768**2 + 2 * n * n * 768 for n in merged.tokens_per_block(counts))
    stages = 2 * 768 * (196 * 117 + 117 * 70 + 70 * 42)
    assert merged.macs(counts) == 196 * 768 * 768 + blocks + stages + 768 * 1000


def test_ranking_by_attention_computes_it_again() -> None:
    counts = (117, 70, 70)  # the last stage drops nothing
    more = replace(VIT_B, reduction="attention").macs(counts) - VIT_B.macs(counts)
    assert more == sum(3 * n * 768**2 + n * n * 768 for n in (197, 119))


@pytest.mark.parametrize("reduction", ["merged", "attention", "weighted", "random"])
def test_all_rules_cost_the_same_without_reduction(reduction: Any) -> None:
    counts = (196, 196, 196)
    assert replace(VIT_B, reduction=reduction).macs(counts) == VIT_B.macs(counts)
