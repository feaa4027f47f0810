"""Raw and averaged weights in one file, and weights in shards."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import load_checkpoint
from tests.support.foreign_checkpoints import SIZES, Weights, renamed, saved, vit

RAW = vit().state_dict()
EMA = {name: 1.5 * tensor for name, tensor in RAW.items()}


def prefixed(weights: Weights, prefix: str) -> Weights:
    return renamed(weights, ("^", prefix))


AVERAGED = prefixed(EMA, "module.") | {"n_averaged": torch.tensor(3)}


@pytest.mark.parametrize(
    "content",
    [
        {"epoch": 3, "state_dict": RAW, "state_dict_ema": EMA},  # timm
        {"model": RAW, "model_ema": EMA},  # DeiT
        {"model": RAW, "model_ema": AVERAGED},  # torchvision
        {"model": RAW, "ema": {"module": EMA, "updates": 4}},
        {"student": prefixed(RAW, "module.backbone."), "teacher": prefixed(EMA, "backbone.")},
        {"state_dict": EMA, "current_model_state": RAW, "averaging_state": {}},  # Lightning
        {"state_dict": RAW, "callbacks": {"EMA": {"ema_state_dict": EMA}, "Other": {"a": 1}}},
        {"state_dict": prefixed(RAW, "model.") | prefixed(EMA, "ema_model.")},
        {"state_dict": prefixed(RAW, "net.") | prefixed(EMA, "net_ema.module.")},
        RAW | prefixed(EMA, "ema."),
        {"model": RAW, "swa_model": AVERAGED},
        {"state_dict": RAW, "ema_model": {"state_dict": EMA}},
        {"model": RAW, "ema": {"decay": 0.9, "shadow": EMA}},
    ],
)
def test_the_average_is_taken_unless_raw_weights_are_asked_for(
    content: Any, tmp_path: Path
) -> None:
    file = saved(content, tmp_path)
    for weights, expected in ((None, EMA), ("ema", EMA), ("raw", RAW)):
        found = load_checkpoint(file, heads=2, weights=weights)  # type: ignore[arg-type]
        assert torch.equal(found.weights["norm.weight"], expected["norm.weight"]), weights
        assert len(found.weights) == len(RAW)
        [note] = found.notes
        kind, other = ("raw", "ema") if weights == "raw" else ("averaged", "raw")
        assert f"its {kind} weights (" in note
        assert f"--weights {other} uses" in note


def test_weights_that_are_passed_over_are_named(tmp_path: Path) -> None:
    file = saved({"model": RAW, "best": EMA, "optimizer": {"state": {0: {"step": 1}}}}, tmp_path)
    found = load_checkpoint(file, heads=2)
    assert torch.equal(found.weights["norm.weight"], RAW["norm.weight"])
    assert found.notes == [f"{file}: its weights (model) are used, not those in best"]
    with pytest.raises(CheckpointError, match="contains no averaged weights"):
        load_checkpoint(file, heads=2, weights="ema")


def test_a_counter_of_averaged_models_tells_that_they_are(tmp_path: Path) -> None:
    file = saved(AVERAGED, tmp_path)
    [note] = load_checkpoint(file, heads=2).notes
    assert "its averaged weights (n_averaged) are used, as it contains no others" in note
    with pytest.raises(CheckpointError, match="contains only averaged weights"):
        load_checkpoint(file, heads=2, weights="raw")


def test_a_wrapper_that_contains_itself_ends(tmp_path: Path) -> None:
    content: dict[str, Any] = {"a": torch.zeros(1)}
    content["model"] = content
    with pytest.raises(CheckpointError, match="its state dict is nested too deeply"):
        load_checkpoint(saved(content, tmp_path), heads=2)


def test_an_average_alone_is_taken_and_named(tmp_path: Path) -> None:
    file = saved({"state_dict_ema": EMA, "state_dict": {}}, tmp_path)
    found = load_checkpoint(file, heads=2)
    assert torch.equal(found.weights["norm.weight"], EMA["norm.weight"])
    assert found.notes == [
        f"{file}: its averaged weights (state_dict_ema) are used, as it contains no others"
    ]
    with pytest.raises(CheckpointError, match="contains only averaged weights"):
        load_checkpoint(file, heads=2, weights="raw")
    plain = saved({"state_dict": RAW, "state_dict_ema": None}, tmp_path, "plain.pth")
    assert load_checkpoint(plain, heads=2).notes == []
    with pytest.raises(CheckpointError, match="contains no averaged weights"):
        load_checkpoint(plain, heads=2, weights="ema")


@pytest.mark.parametrize("kind", ["safetensors", "bin"])
def test_shards(hugging_face: Any, kind: str, tmp_path: Path) -> None:
    config = hugging_face.ViTConfig(**SIZES, intermediate_size=40, num_labels=5)
    hugging_face.ViTForImageClassification(config).save_pretrained(tmp_path, max_shard_size="3KB")
    index = tmp_path / "model.safetensors.index.json"
    places = json.loads(index.read_text())["weight_map"]
    shards = sorted(set(places.values()))
    assert len(shards) > 2
    if kind == "bin":
        index.unlink()
        places = {name: place.replace("safetensors", "bin") for name, place in places.items()}
        for shard in shards:
            from safetensors.torch import load_file

            saved(load_file(tmp_path / shard), tmp_path, shard.replace("safetensors", "bin"))
            (tmp_path / shard).unlink()
        shards = sorted(set(places.values()))
        index = tmp_path / "pytorch_model.bin.index.json"
        index.write_text(json.dumps({"weight_map": places}))
    found = load_checkpoint(tmp_path)
    for part in (index, tmp_path / shards[0]):
        assert load_checkpoint(part).config == found.config
    (tmp_path / shards[1]).unlink()
    with pytest.raises(CheckpointError, match=rf"{shards[1]} is missing, shard 2 of {len(shards)}"):
        load_checkpoint(tmp_path)


@pytest.mark.parametrize("name", ["../x.safetensors", "/etc/passwd", "..", "a\\b", "", 3])
def test_shards_that_leave_the_folder(name: Any, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"cls_token": name}}))
    with pytest.raises(CheckpointError, match="is not the name of a file in its folder"):
        load_checkpoint(tmp_path)


def test_a_shard_without_a_tensor_that_the_index_lists(tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text('{"model_type": "vit"}')
    save_file({"a": torch.zeros(1)}, tmp_path / "x.safetensors")
    index = tmp_path / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "x.safetensors", "b": "x.safetensors"}}))
    with pytest.raises(CheckpointError, match=r"x\.safetensors lacks b, which"):
        load_checkpoint(tmp_path)
    index.write_text("{}")
    with pytest.raises(CheckpointError, match="has no weight_map"):
        load_checkpoint(tmp_path)
