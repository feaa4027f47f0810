"""What stands in a bundle, and that it stands there whole or not at all."""

import errno
import json
import os
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import pytest
import torch

from pcae_export import graph, pack, weights
from pcae_export.half_precision import Half
from pcae_export.measure import Measured
from pcae_export.pack import Evaluation, Part, TierSpec
from pcae_serve.bundle.quality import Agreement
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.errors import BundleError, PcaeError
from pcae_training.checkpoint import Checkpoint

Tiny = Callable[..., Checkpoint]

REFUSAL = "parity does not hold"
FULL = {"full": TierSpec(1.0)}
QUICK = {"depth": 1, "reduction_points": ()}  # to trace


def refuse(*_: object) -> Evaluation:
    raise PcaeError(REFUSAL)


def one(checkpoint: Checkpoint, **tiers: float) -> dict[str, Part]:
    return {"vit": Part(checkpoint, {name: TierSpec(ratio) for name, ratio in tiers.items()})}


# What stands in it


def test_the_bundle_is_what_the_server_reads(made: Any, tiny: Tiny) -> None:
    bundle, geometry = made.bundle, tiny().model.config.geometry
    assert [tier.name for tier in bundle.tiers] == ["low", "mid", "full"]
    for tier in bundle.tiers:
        assert tier.token_counts == geometry.counts(tier.keep_ratio)
        assert tier.macs == geometry.macs(tier.token_counts)
        assert tier.accuracy.n == 72
        assert tier.accuracy.data_set.endswith("/test")
    model = bundle.manifest.models["vit"]
    assert (model.answers, model.half, model.reduction) == ("classes", "float16", "ptr")
    listed = {bundle.root / path for path in bundle.manifest.files}
    assert listed | {bundle.root / "bundle.json"} == {
        p for p in bundle.root.rglob("*") if p.is_file()
    }
    assert all(path.stat().st_mode & 0o044 == 0o044 for path in listed)  # readable by all
    assert bundle.preprocess == tiny().preprocess
    config = json.loads(bundle.file("vit", "config.json").read_text())
    assert config["model_type"] == "pcae_vit"
    assert config["dtype"] == "float16"


def graphs(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.suffix == ".onnx"}


def test_graphs_of_a_tier_for_every_runtime(made: Any) -> None:
    names = {"elastic.onnx"} | {
        f"{tier}{kind}.onnx" for tier in ("low", "mid", "full") for kind in (
            "", ".cuda", ".tensorrt")
    }  # fmt: skip
    assert graphs(made.bundle.root / "models" / "vit") == names


@pytest.mark.parametrize("half", [None, "float16", "bfloat16"])
def test_graphs_for_gpus_are_written_where_they_are_wanted(
    tiny: Tiny, tmp_path: Path, half: Half | None
) -> None:
    parts = {"vit": Part(tiny(**QUICK), FULL, half)}
    bundle = pack.write_bundle(parts, tmp_path / "out")
    assert bundle.manifest.models["vit"].half == half
    folder = bundle.root / "models" / "vit"
    assert graphs(folder) == {"elastic.onnx", "full.onnx"} | (
        {"full.cuda.onnx", "full.tensorrt.onnx"} if half else set()
    )
    for name in graphs(folder):
        model = onnx.load(folder / name, load_external_data=False)
        metadata = {entry.key: entry.value for entry in model.metadata_props}
        on_gpu = name.count(".") > 1
        assert metadata["pcae.precision"] == (half if on_gpu else "float32")
        casts = {n.attribute[0].i for n in model.graph.node if n.op_type == "Cast"}
        assert (onnx.TensorProto.BFLOAT16 in casts) == (on_gpu and half == "bfloat16")


def test_a_graph_says_of_itself_what_it_takes_and_gives(made: Any) -> None:
    def metadata(name: str) -> dict[str, Any]:
        model = onnx.load(made.bundle.file("vit", name), load_external_data=False)
        return {entry.key: entry.value for entry in model.metadata_props}

    elastic, static = metadata("elastic.onnx"), metadata("mid.cuda.onnx")
    assert elastic["pcae.name"] == "toys"
    assert elastic["pcae.token_counts"] == "an input"
    assert "pcae.tier" not in elastic
    assert json.loads(elastic["pcae.mean"]) == [0.5, 0.4, 0.3]
    assert json.loads(elastic["pcae.labels"]) == ["bag", "coat", "shoe"]
    assert elastic["pcae.resize"] == "shorter side to 16"
    assert (static["pcae.tier"], static["pcae.keep_ratio"]) == ("mid", "0.6")
    assert json.loads(static["pcae.token_counts"]) == [38, 22, 13]
    assert static["pcae.precision"] == "float16"


def test_models_that_share_a_bundle(tiny: Tiny, tmp_path: Path) -> None:
    large, small = tiny(), tiny(**QUICK)
    parts = {"large": Part(large, FULL), "small": Part(small, {"fast": TierSpec(1.0)})}
    bundle = pack.write_bundle(parts, tmp_path / "out", name="both")
    assert bundle.manifest.name == "both"
    assert [(tier.name, tier.model) for tier in bundle.tiers] == [
        ("fast", "small"), ("full", "large")
    ]  # fmt: skip
    assert graphs(bundle.root / "models" / "large") == {"elastic.onnx", "full.onnx"}
    assert graphs(bundle.root / "models" / "small") == {"elastic.onnx", "fast.onnx"}
    assert bundle.manifest.models["small"].depth == 1


def test_the_judge_sees_the_weights_as_they_are_stored(tiny: Tiny, tmp_path: Path) -> None:
    checkpoint = tiny(**QUICK)
    seen = {}

    def evaluate(draft: Bundle, stored: Any) -> Evaluation:
        assert draft.root.parent == tmp_path  # beside its place, not yet in it
        assert not (tmp_path / "out").exists()
        seen.update(stored["vit"].model.state_dict())
        worth = Agreement(share=0.5, n=2, data_set="toys")
        return Evaluation({"full": Measured(worth, np.array([0.0, 1.0]))})

    bundle = pack.write_bundle(one(checkpoint, full=1.0), tmp_path / "out", evaluate=evaluate)
    for name, tensor in checkpoint.model.state_dict().items():
        assert torch.equal(seen[name], tensor.half().float()), name
    assert bundle.tiers[0].agreement is not None
    assert "50.0 % of 2" in (bundle.root / "README.md").read_text()


def test_the_card_tells_what_was_measured(made: Any) -> None:
    text = (made.bundle.root / "README.md").read_text()
    low = made.bundle.tiers[0]
    assert f"| low | 0.4 | 25, 10, 4 | 8 | {low.macs / 1e9:.3f} |" in text
    assert f"{100 * low.accuracy.top1:.2f} %" in text
    assert "64 images, batches of 1, 2, 3, 8; 6 float32 graphs: largest difference" in text
    assert "; 6 float16 graphs: largest difference" in text
    assert "Toys, not for use." in text
    assert "75.00 % at keep 1.0" in text
    assert "data toys" in text
    assert "/secret" not in text


def test_a_flipped_byte_in_the_weights_is_refused(made: Any, tmp_path: Path) -> None:
    copy = tmp_path / "copy"
    shutil.copytree(made.bundle.root, copy)
    file = copy / "models" / "vit" / "model.safetensors"
    raw = bytearray(file.read_bytes())
    raw[-1] ^= 1
    file.write_bytes(raw)
    with pytest.raises(BundleError, match=r"model\.safetensors was changed after export"):
        load_bundle(copy)


# Whole or not at all


def test_failure_leaves_nothing_and_keeps_the_old(made: Any, tmp_path: Path, tiny: Tiny) -> None:
    out, parts = tmp_path / "out", one(tiny(**QUICK), full=1.0)
    shutil.copytree(made.bundle.root, out)
    with pytest.raises(pack.PackError, match="exists; choose another folder"):
        pack.write_bundle(parts, out)
    with pytest.raises(PcaeError, match=REFUSAL):
        pack.write_bundle(parts, out, evaluate=refuse, force=True)
    assert load_bundle(out).digest == made.bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_a_full_disk_leaves_nothing_and_keeps_the_old(
    made: Any, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "out", one(tiny(**QUICK), full=1.0)
    shutil.copytree(made.bundle.root, out)

    def full(*_: object) -> None:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(graph, "save", full)
    with pytest.raises(pack.PackError, match=r"cannot write .*out: .*No space left on device"):
        pack.write_bundle(parts, out, force=True)
    assert load_bundle(out).digest == made.bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_what_cannot_be_put_into_its_place_leaves_the_old_there(
    made: Any, tmp_path: Path, tiny: Tiny, monkeypatch: pytest.MonkeyPatch
) -> None:
    out, parts = tmp_path / "out", one(tiny(**QUICK), full=1.0)
    shutil.copytree(made.bundle.root, out)
    rename = Path.rename

    def failing(path: Path, target: Path) -> Path:
        if path.name.startswith(".out.") and not path.name.endswith(".old"):
            raise OSError(errno.EIO, os.strerror(errno.EIO))
        return rename(path, target)

    monkeypatch.setattr(Path, "rename", failing)
    with pytest.raises(pack.PackError, match="Input/output error"):
        pack.write_bundle(parts, out, force=True)
    assert load_bundle(out).digest == made.bundle.digest
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_a_bundle_with_all_that_was_in_it(
    made: Any, tmp_path: Path, tiny: Tiny
) -> None:
    out = tmp_path / "out"
    shutil.copytree(made.bundle.root, out)
    bundle = pack.write_bundle(one(tiny(**QUICK), low=1.0), out, force=True)
    assert [(tier.name, tier.quality) for tier in bundle.tiers] == [("low", None)]
    assert graphs(out / "models" / "vit") == {"elastic.onnx", "low.onnx"}
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def test_force_replaces_only_bundles(made: Any, tmp_path: Path) -> None:
    (tmp_path / "precious.txt").write_text("")
    (tmp_path / "link").symlink_to(made.bundle.root)
    for place in (tmp_path, tmp_path / "precious.txt", tmp_path / "link"):
        with pytest.raises(pack.PackError, match="is not a bundle: --force replaces only bundles"):
            pack.check_output(place, force=True)


def test_a_place_below_a_file_is_refused_before_the_work(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PcaeError, match="file is not a writable folder"):
        pack.check_output(tmp_path / "file" / "out", force=False)
    pack.check_output(tmp_path / "new" / "out", force=False)


def test_a_place_that_cannot_be_written_to(tiny: Tiny, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PcaeError, match=r"cannot write .*out: .*file is not a writable folder"):
        pack.write_bundle(one(tiny(**QUICK), full=1.0), tmp_path / "file" / "out")


def test_weights_beyond_float16_are_refused_before_anything_is_written(
    tiny: Tiny, tmp_path: Path
) -> None:
    checkpoint = tiny(**QUICK)
    checkpoint.model.state_dict()["head.bias"][0] = 1e6
    with pytest.raises(weights.WeightsError, match=r"head\.bias has values beyond"):
        pack.write_bundle(one(checkpoint, full=1.0), tmp_path / "out")
    assert not list(tmp_path.iterdir())


# Tiers and models that cannot be


def test_tiers_go_by_what_they_cost(tiny: Tiny) -> None:
    wanted = {
        "d": TierSpec(1.0), "b": TierSpec(0.5), "a": TierSpec(0.4), "e": TierSpec(0.5, "int8"),
        "c": TierSpec("0.8"),
    }  # fmt: skip
    tiers = pack.plan_tiers({"vit": Part(tiny(), wanted)})
    assert [tier.name for tier in tiers] == ["a", "e", "b", "c", "d"]  # int8 before its equal
    assert [tier.precision for tier in tiers] == ["float32", "int8", *["float32"] * 3]


def test_a_tier_without_patches_is_refused(tiny: Tiny) -> None:
    with pytest.raises(pack.PackError, match=r"tier 'none': keep ratio 0\.01 leaves no patch"):
        pack.plan_tiers(one(tiny(), none=0.01))


def test_a_model_without_reduction_points_has_one_budget(tiny: Tiny) -> None:
    plain = tiny(**QUICK)
    assert [tier.token_counts for tier in pack.plan_tiers(one(plain, full=1.0))] == [()]
    with pytest.raises(pack.PackError, match=r"tier 'low': model 'vit' has 1 blocks and no"):
        pack.plan_tiers(one(plain, full=1.0, low=0.5))


def unlike(checkpoint: Checkpoint, change: str) -> Checkpoint:
    preprocess = checkpoint.preprocess
    if change == "labels":
        return replace(checkpoint, labels=["bag", "coat", "sock"])
    if change == "resize":
        return replace(checkpoint, preprocess=replace(preprocess, resize=20))
    return replace(checkpoint, preprocess=replace(preprocess, mean=(0.1, 0.2, 0.3)))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("labels", "models 'a' and 'b' cannot share a bundle: their labels differ"),
        (
            "resize",
            "models 'a' and 'b' cannot share a bundle: their image sizes or resizing differ",
        ),
        ("mean", None),  # the graph's own matter
    ],
)
def test_models_share_labels_and_pixels(tiny: Tiny, change: str, message: str | None) -> None:
    parts = {"a": Part(tiny(), FULL), "b": Part(unlike(tiny(), change), {"fast": TierSpec(0.5)})}
    if message is None:
        assert [tier.model for tier in pack.plan_tiers(parts)] == ["b", "a"]
        return
    with pytest.raises(pack.PackError, match=message):
        pack.plan_tiers(parts)


def test_features_share_their_width(tiny: Tiny) -> None:
    wide, narrow = (replace(tiny(classes=0, width=w), labels=[]) for w in (32, 16))
    parts = {"a": Part(wide, FULL), "b": Part(narrow, {"fast": TierSpec(0.5)})}
    with pytest.raises(pack.PackError, match="their features have different widths"):
        pack.plan_tiers(parts)


def test_a_preprocessor_of_another_size(tiny: Tiny) -> None:
    checkpoint = tiny()
    larger = replace(checkpoint.preprocess, image_size=32, resize=32)
    with pytest.raises(pack.PackError, match="makes images of 32 pixels, but its model takes 16"):
        pack.plan_tiers(one(replace(checkpoint, preprocess=larger), full=1.0))
