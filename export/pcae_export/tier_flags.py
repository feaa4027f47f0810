"""Parse the --tier flags of `pcae-export bundle`."""

import re
from dataclasses import dataclass

from pcae_export.pack import TierSpec
from pcae_serve.bundle.manifest import NAME_PATTERN, RESERVED_NAMES
from pcae_serve.bundle.tokens import parse_keep_ratio


@dataclass(frozen=True)
class TierFlag:
    """One --tier: what to export, and the checkpoint if it names one."""

    spec: TierSpec
    checkpoint: str | None = None


def parse_tiers(given: list[str]) -> dict[str, TierFlag]:
    """Parse ["fast=0.6", "small=vit-s.pth@0.8:int8", …] to flags by tier name.

    Raises ValueError that names the wrong flag.
    """
    tiers: dict[str, TierFlag] = {}
    for text in given:
        name, equals, rest = text.partition("=")
        if not equals or not re.match(NAME_PATTERN, name):
            raise ValueError(
                f"{text!r} is not NAME=RATIO, such as fast=0.6 (names: a-z, 0-9, '-' and '_')"
            )
        if name in RESERVED_NAMES:
            raise ValueError(f"tier name {name!r} is reserved: {RESERVED_NAMES[name]}")
        if name in tiers:
            raise ValueError(f"tier {name!r} is given twice")
        checkpoint, at, ratio = rest.rpartition("@")
        ratio, _, precision = ratio.partition(":")
        if precision not in ("", "int8", "float32"):
            raise ValueError(f"{text!r}: precision {precision!r} is neither int8 nor float32")
        if at and not checkpoint:
            raise ValueError(f"{text!r} has no checkpoint before '@'")
        parse_keep_ratio(ratio)
        spec = TierSpec(ratio, "int8" if precision == "int8" else "float32")
        tiers[name] = TierFlag(spec, checkpoint if at else None)
    if not tiers:
        raise ValueError("at least one tier is required")
    return tiers
