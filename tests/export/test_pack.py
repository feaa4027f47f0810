"""What stands in a bundle, and that it stands there whole or not at all."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch

from pcae_export import pack, weights
from pcae_serve import bundle as bundles
from pcae_serve.bundle import Accuracy
from pcae_serve.errors import BundleError, PcaeError

REFUSAL = "the judge says no"


def refuse(*_: object) -> pack.Evidence:
    raise PcaeError(REFUSAL)


def test_the_bundle_is_what_the_server_reads(made: Any, tiny: Any) -> None:
    bundle, geometry = made.bundle, tiny().model.config.geometry
    assert [tier.name for tier in bundle.tiers] == ["low", "mid", "full"]
    for tier in bundle.tiers:
        assert tier.token_counts == geometry.counts(tier.keep_ratio)
        assert tier.macs == geometry.macs(tier.token_counts)
        assert tier.accuracy.n == 72
        assert tier.accuracy.data_set.endswith("/test")
    listed = {bundle.root / path for path in bundle.manifest.files}
    assert listed | {bundle.root / "bundle.json"} == {
        p for p in bundle.root.rglob("*") if p.is_file()
    }
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in listed)  # readable by all
    assert bundle.preprocess == tiny().preprocess
    config = json.loads(bundle.file("vit", "config.json").read_text())
    assert config["model_type"] == "pcae_vit"


def test_a_flipped_byte_in_the_weights_is_refused(made: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.bundle.root, copy)
    file = copy / "models" / "vit" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match=r"model\.safetensors is not the file that was sealed"):
        bundles.load(copy)


def test_failure_leaves_nothing_and_keeps_the_old(made: Any, tmp_path: Path, tiny: Any) -> None:
    out, checkpoint = tmp_path / "out", tiny()
    shutil.copytree(made.bundle.root, out)
    with pytest.raises(pack.PackError, match="exists: choose another place"):
        pack.write(checkpoint, out, {"full": 1.0})
    with pytest.raises(PcaeError, match=REFUSAL):
        pack.write(checkpoint, out, {"low": 0.5}, judge=refuse, force=True)
    assert bundles.load(out).digest == made.bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_only_bundles(tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("")
    with pytest.raises(pack.PackError, match="is no bundle"):
        pack.refuse(tmp_path, force=True)


def test_tiers_not_better_than_a_cheaper_one_are_dominated(tiny: Any) -> None:
    tiers = pack.plan(tiny(), {"d": 1.0, "b": 0.5, "a": 0.4, "c": 0.8}, "vit")
    assert [tier.name for tier in tiers] == ["a", "b", "c", "d"]
    shares = {"a": 0.7, "b": 0.6, "c": 0.7, "d": 0.8}
    accuracy = {
        name: Accuracy(top1=share, n=10, interval=(0, 1), data_set="toys")
        for name, share in shares.items()
    }
    ranked = pack.rank(tiers, accuracy)
    assert [tier.dominated for tier in ranked] == [False, True, True, False]
    assert not any(tier.dominated for tier in pack.rank(tiers, {}))


def test_a_tier_without_patches_is_refused(tiny: Any) -> None:
    with pytest.raises(pack.PackError, match=r"tier 'none': keep ratio 0\.01 leaves no patch"):
        pack.plan(tiny(), {"none": 0.01}, "vit")


def test_weights_beyond_float16_are_refused() -> None:
    with pytest.raises(
        weights.WeightsError, match=r"head\.bias has values that float16 cannot hold"
    ):
        weights.to_half({"head.bias": torch.tensor([1e6])})


def test_the_card_tells_what_was_measured(made: Any) -> None:
    text = (made.bundle.root / "README.md").read_text()
    low = made.bundle.tiers[0]
    assert f"| low | 0.4 | 25, 10, 4 | 8 | {low.macs / 1e9:.3f} |" in text
    assert f"{100 * low.accuracy.top1:.2f} %" in text
    assert "64 images, batches 1, 2, 3, 8, 3 tiers" in text
    assert "Toys, not for use." in text
    assert "75.00 % at keep 1.0" in text
    assert "data toys" in text
    assert "/secret" not in text
