import json
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint, CheckpointError
from pcae_training.import_weights import initialise, load_checkpoint
from pcae_training.model import VisionTransformer, ViTConfig
from tests.support.foreign_checkpoints import (
    SCALED,
    SIZES,
    TINY,
    Malicious,
    Weights,
    deit_3,
    dino_teacher,
    giant,
    in_chunks,
    mae_finetuned,
    mae_pretrained,
    randomised,
    rebuilt,
    renamed,
    saved,
    vit,
)

DINOV2_SMALL = Path(__file__).parents[3].parent / "shared" / "data" / "dinov2-small"


GIANT = replace(SCALED, gated_mlp=True, activation="silu", mlp_ratio=1.5)


def pixels(size: int = 24) -> Tensor:
    return torch.randn(2, 3, size, size, generator=torch.Generator().manual_seed(1))


def normed_tokens(model: VisionTransformer, images: Tensor) -> Tensor:
    *_, last = model.walk(model.embed(images))
    tokens: Tensor = model.norm(last.x)
    return tokens


def refused(source: Path, message: str, **flags: Any) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        load_checkpoint(source, **flags)
    assert "\n" not in str(caught.value)
    assert source.name in str(caught.value)


# Hugging Face folders, against transformers itself


@torch.inference_mode()
@pytest.mark.parametrize("as_on_disk", [True, False])
def test_vit_of_hugging_face(hugging_face: Any, as_on_disk: bool, tmp_path: Path) -> None:
    labels = {i: f"class {i}" for i in range(5)}
    config = hugging_face.ViTConfig(**SIZES, intermediate_size=40, id2label=labels)
    theirs = randomised(hugging_face.ViTForImageClassification(config))
    theirs.save_pretrained(tmp_path, save_original_format=as_on_disk)
    names = " ".join(load_file(tmp_path / "model.safetensors"))
    assert ("vit.encoder.layer.0." in names) == as_on_disk
    found = load_checkpoint(tmp_path)
    assert found.config == replace(TINY, mlp_ratio=2.5, norm_eps=0.05)
    assert (found.labels, found.ignored) == (list(labels.values()), [])
    close(rebuilt(found)(pixels()), theirs(pixels()).logits)

    larger = VisionTransformer(replace(found.config, image_size=40)).eval()
    fitted = initialise(larger, found)
    assert (fitted.missing, fitted.unused) == ([], [])
    expected = theirs(pixels(40), interpolate_pos_encoding=True).logits
    close(larger(pixels(40)), expected)


@torch.inference_mode()
def test_vit_without_head_biases_and_prefix(hugging_face: Any, tmp_path: Path) -> None:
    config = hugging_face.ViTConfig(**SIZES, intermediate_size=40, qkv_bias=False)
    theirs = randomised(hugging_face.ViTModel(config))
    theirs.save_pretrained(tmp_path)
    weights = tmp_path / "model.safetensors"
    saved(load_file(weights), tmp_path, "pytorch_model.bin")
    weights.unlink()
    found = load_checkpoint(tmp_path)
    assert (found.config.classes, found.config.qkv_bias, found.labels) == (0, False, None)
    assert sorted(found.ignored) == ["pooler.dense.bias", "pooler.dense.weight"]
    expected = theirs(pixels()).last_hidden_state
    close(normed_tokens(rebuilt(found), pixels()), expected)
    assert (
        load_checkpoint(tmp_path / "pytorch_model.bin").config == found.config
    )  # config.json beside it


@torch.inference_mode()
@pytest.mark.parametrize(
    ("kind", "distilled", "registers"),
    [("ForImageClassificationWithTeacher", True, 0), ("ForImageClassification", False, 1)],
)
def test_deit_of_hugging_face(
    hugging_face: Any, kind: str, distilled: bool, registers: int, tmp_path: Path
) -> None:
    config = hugging_face.DeiTConfig(**SIZES, intermediate_size=40, num_labels=5)
    theirs = randomised(getattr(hugging_face, f"DeiT{kind}")(config))
    theirs.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    assert (found.config.distilled, found.config.registers) == (distilled, registers)
    close(rebuilt(found)(pixels()), theirs(pixels()).logits)


@torch.inference_mode()
@pytest.mark.parametrize("as_on_disk", [True, False])
@pytest.mark.parametrize("gated", [True, False])
def test_dinov2_with_registers(
    hugging_face: Any, gated: bool, as_on_disk: bool, tmp_path: Path
) -> None:
    sizes = SIZES | {"mlp_ratio": 2, "num_register_tokens": 3, "use_swiglu_ffn": gated}
    config = hugging_face.Dinov2WithRegistersConfig(**sizes)
    theirs = randomised(hugging_face.Dinov2WithRegistersModel(config))
    theirs.save_pretrained(tmp_path, save_original_format=as_on_disk)
    found = load_checkpoint(tmp_path)
    assert (found.config.registers, found.config.layer_scale) == (3, True)
    assert (found.config.gated_mlp, found.config.hidden) == (gated, 24 if gated else 32)
    assert found.ignored == ["embeddings.mask_token"]
    for size in (24, 16, 32):  # smaller is told from larger by antialiasing
        ours = VisionTransformer(replace(found.config, image_size=size)).eval()
        initialise(ours, found)
        close(normed_tokens(ours, pixels(size)), theirs(pixels(size)).last_hidden_state)


@torch.inference_mode()
@pytest.mark.parametrize("registers", [0, 3])
def test_dinov2_classifier_reads_cls_and_mean(
    hugging_face: Any, registers: int, tmp_path: Path
) -> None:
    name = "Dinov2WithRegisters" if registers else "Dinov2"
    more = {"num_register_tokens": registers} if registers else {}
    config = getattr(hugging_face, f"{name}Config")(**SIZES, mlp_ratio=2, num_labels=5, **more)
    theirs = randomised(getattr(hugging_face, f"{name}ForImageClassification")(config))
    theirs.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    assert (found.config.classes, found.config.pooling) == (5, "cls-mean")
    assert found.labels == [f"LABEL_{i}" for i in range(5)]
    close(rebuilt(found)(pixels()), theirs(pixels()).logits)
    encoder = theirs.dinov2_with_registers if registers else theirs.dinov2
    close(rebuilt(found.drop_head())(pixels()), encoder(pixels()).pooler_output)


@torch.inference_mode()
def test_mae_of_hugging_face(hugging_face: Any, tmp_path: Path) -> None:
    config = hugging_face.ViTMAEConfig(
        **SIZES,
        intermediate_size=40,
        decoder_hidden_size=16,
        decoder_num_hidden_layers=1,
        decoder_num_attention_heads=2,
        decoder_intermediate_size=16,
        mask_ratio=0.0,
    )
    theirs = randomised(hugging_face.ViTMAEForPreTraining(config))
    theirs.save_pretrained(tmp_path)
    found = load_checkpoint(tmp_path)
    assert found.config.classes == 0
    assert all(name.startswith("decoder.") for name in found.ignored)
    assert "decoder.mask_token" in found.ignored
    in_order = torch.arange(36.0).expand(2, -1)
    expected = theirs.vit(pixels(), noise=in_order).last_hidden_state
    close(normed_tokens(rebuilt(found), pixels()), expected)


@torch.inference_mode()
@pytest.mark.skipif(not DINOV2_SMALL.is_dir(), reason=f"no weights of DINOv2 at {DINOV2_SMALL}")
def test_real_dinov2_at_224(hugging_face: Any) -> None:
    found = load_checkpoint(DINOV2_SMALL)
    assert found.preprocess is not None
    assert (found.preprocess.resize, found.preprocess.image_size) == (256, 224)
    assert found.config == ViTConfig(
        image_size=518,
        patch_size=14,
        width=384,
        heads=6,
        classes=0,
        pooling="cls",
        layer_scale=True,
    )
    ours = VisionTransformer(replace(found.config, image_size=224)).eval()
    initialise(ours, found)
    theirs = hugging_face.Dinov2Model.from_pretrained(DINOV2_SMALL, dtype=torch.float32).eval()
    tokens, expected = normed_tokens(ours, pixels(224)), theirs(pixels(224)).last_hidden_state
    assert tokens.shape == expected.shape == (2, 257, 384)
    assert (tokens - expected).norm() < 1e-5 * expected.norm()


def close(ours: Tensor, expected: Tensor) -> None:
    assert expected.std() > 0.1  # else every model would agree
    torch.testing.assert_close(ours, expected, atol=1e-5, rtol=1e-5)


# State dicts, made from our own model by renaming


@torch.inference_mode()
@pytest.mark.parametrize(
    ("config", "written"),
    [
        (replace(TINY, classes=0), mae_pretrained),
        (replace(TINY, pooling="mean"), mae_finetuned),
        (TINY, dict),  # timm, DeiT
        (replace(TINY, distilled=True), lambda weights: {"model": weights}),
        (replace(TINY, classes=0), dino_teacher),
        (replace(TINY, classes=0), lambda weights: {"teacher": renamed(weights, ("^", "module."))}),
        (TINY, lambda weights: {"state_dict": renamed(weights, ("^", "module.encoder."))}),
        (replace(SCALED, classes=0, registers=4), in_chunks),
        (SCALED, deit_3),
        (GIANT, giant),
        (replace(SCALED, registers=4, qkv_bias=False, mlp_ratio=1.5, channels=1), dict),
    ],
)
def test_state_dicts_give_the_same_logits(
    config: ViTConfig, written: Callable[[Weights], Any], tmp_path: Path
) -> None:
    model = vit(config)
    found = load_checkpoint(saved(written(model.state_dict()), tmp_path), heads=2)
    assert found.config == config
    images = pixels()[:, : config.channels]
    assert torch.equal(rebuilt(found)(images), model(images))


def test_what_means_nothing_is_named(tmp_path: Path) -> None:
    weights = vit(replace(TINY, classes=0)).state_dict()
    found = load_checkpoint(saved(mae_pretrained(weights), tmp_path), heads=2)
    assert found.ignored == ["mask_token", "decoder_embed.weight"]
    found = load_checkpoint(saved(dino_teacher(weights), tmp_path), heads=2)
    assert found.ignored == ["head.mlp.0.weight"]


def test_half_weights_of_a_safetensors_file_come_as_float32(tmp_path: Path) -> None:
    weights = vit().half().state_dict()
    save_file(weights, tmp_path / "x.safetensors")
    found = load_checkpoint(tmp_path / "x.safetensors", heads=2)
    assert {tensor.dtype for tensor in found.weights.values()} == {torch.float32}
    assert torch.equal(found.weights["head.bias"], weights["head.bias"].float())


@pytest.mark.parametrize(("width", "heads"), [(64, 1), (192, 3), (1280, 16)])  # ViT-H: 80 a head
def test_heads_by_width(width: int, heads: int, tmp_path: Path) -> None:
    model = VisionTransformer(replace(TINY, width=width, heads=1, depth=1, mlp_ratio=0.1))
    assert load_checkpoint(saved(model.state_dict(), tmp_path)).config.heads == heads


def test_deep_models_reduce_where_the_paper_does(tmp_path: Path) -> None:
    model = VisionTransformer(replace(TINY, depth=12))
    assert load_checkpoint(
        saved(model.state_dict(), tmp_path), heads=2
    ).config.reduction_points == (0, 7, 10)


def test_folder_of_timm(tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    preprocess = {
        "input_size": [3, 24, 24],
        "crop_pct": 0.9,
        "interpolation": "bilinear",
        "mean": [0.5, 0.5, 0.5],
        "std": [0.1, 0.2, 0.3],
    }
    write_json(tmp_path, {"architecture": "vit_tiny", "pretrained_cfg": preprocess})
    found = load_checkpoint(tmp_path, heads=2)
    assert found.config == TINY
    assert found.preprocess == Preprocess(
        24,
        26,
        (0.5, 0.5, 0.5),
        (0.1, 0.2, 0.3),
        Image.Resampling.BILINEAR,
        crop_offset="half-even",
    )


def test_preprocessing_that_lies_beside(tmp_path: Path) -> None:
    source = saved(vit().state_dict(), tmp_path)
    assert load_checkpoint(source, heads=2).preprocess is None
    content = {"size": 24, "image_mean": [0.1] * 3, "image_std": [0.2] * 3, "resample": 2}
    write_json(tmp_path, content, "preprocessor_config.json")
    found = load_checkpoint(source, heads=2)
    expected = Preprocess(24, 24, (0.1,) * 3, (0.2,) * 3, Image.Resampling.BILINEAR, squash=True)
    assert found.preprocess == expected
    write_json(tmp_path, {"size": 24}, "preprocessor_config.json")
    refused(source, "preprocessor_config.json: image_mean is missing", heads=2)


def test_checkpoints_of_our_own(tmp_path: Path) -> None:
    model, preprocess = vit(), Preprocess(24, 24, (0.5,) * 3, (0.5,) * 3)
    checkpoints.save(Checkpoint(model, preprocess, list("abcde")), tmp_path / "run")
    for source in (tmp_path / "run", tmp_path / "run" / "model.safetensors"):
        found = load_checkpoint(source)
        assert (found.config, found.labels, found.preprocess) == (TINY, list("abcde"), preprocess)
        assert torch.equal(rebuilt(found)(pixels()), model(pixels()))


def write_json(folder: Path, content: Any, name: str = "config.json") -> None:
    (folder / name).write_text(json.dumps(content))


# Files that are refused


def with_tensor(name: str) -> Weights:
    return vit().state_dict() | {name: torch.zeros(2)}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (
            with_tensor("blocks.0.mlp.w12.weight"),
            r"blocks.0.mlp.fc1.weight and blocks.0.mlp.w12.weight are tensors of one layer",
        ),
        (with_tensor("blocks.0.attn.relative_position_bias_table"), "relative positions"),
        (with_tensor("blocks.0.attn.q_norm.weight"), "normalised queries and keys"),
        (with_tensor("norm_pre.weight"), "a norm before the blocks"),
        (with_tensor("layers.0.blocks.0.norm1.weight"), "Swin, whose stages merge patches"),
        (with_tensor("pre_logits.fc.weight"), r"unexpected tensor pre_logits.fc.weight \[2\]"),
        (with_tensor("momentum.patch_embed.proj.weight"), "more than one encoder"),
        ({"conv1.weight": torch.zeros(2)}, "not a vision transformer"),
        ({1: torch.zeros(2)}, "not a vision transformer"),
        ({"model": {"epoch": 3}}, "not a vision transformer"),
        ([1, 2], "contains a list, expected a state dict"),
        (
            renamed(vit().state_dict(), ("^norm.weight", "mask_token")),
            r"norm.weight .* is missing",
        ),
        (renamed(vit().state_dict(), ("^pos_embed", "mask_token")), "pos_embed is missing"),
        (
            vit().state_dict() | {"pos_embed": torch.zeros(1, 31, 16)},
            "30 patches do not form",
        ),
        (
            vit().state_dict() | {"norm.bias": torch.zeros(3)},
            r"norm.bias has shape \[3\]",
        ),
        (vit().state_dict() | {"pos_embed": torch.zeros(16)}, r"pos_embed \[16\] must have 3"),
    ],
)
def test_state_dicts_that_are_no_plain_vit(content: Any, message: str, tmp_path: Path) -> None:
    refused(saved(content, tmp_path), message, heads=2)


def test_keys_without_biases_among_queries_that_have_them(tmp_path: Path) -> None:
    q, k, v = vit().state_dict()["blocks.0.attn.qkv.weight"].chunk(3)
    names = (
        (r"^patch_embed\.proj", "embeddings.patch_embeddings.projection"),
        (r"^pos_embed", "embeddings.position_embeddings"),
        (r"blocks\.", "layers."),
    )
    weights = renamed(vit().state_dict(), *names)
    weights.pop("layers.0.attn.qkv.weight")
    weights |= {"layers.0.attention.q_proj.weight": q, "layers.0.attention.v_proj.weight": v}
    refused(saved(weights, tmp_path), "blocks.0.attn.qkv.weight .* is missing", heads=2)
    weights["layers.0.attention.k_proj.weight"] = k
    assert load_checkpoint(saved(weights, tmp_path), heads=2).config == TINY


def test_heads_no_tensor_tells(tmp_path: Path) -> None:
    source = saved(vit().state_dict(), tmp_path)
    refused(source, "cannot derive the number of heads from width 16; give --heads")
    refused(source, "3 heads do not divide width 16", heads=3)


def test_code_in_a_pickle_is_not_run(tmp_path: Path) -> None:
    source = saved({"model": Malicious(tmp_path / "ran")}, tmp_path)
    refused(source, "contains objects other than tensors")
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize("name", ["x.safetensors", "x.pth", "x.bin"])
def test_files_that_are_damaged(name: str, tmp_path: Path) -> None:
    file = tmp_path / name
    refused(file, "checkpoint not found: .* does not exist")
    if file.suffix == ".safetensors":
        save_file(vit().state_dict(), file)
    else:
        saved(vit().state_dict(), tmp_path, name)
    whole = file.read_bytes()
    for content in (whole[: len(whole) // 2], whole[:5], b"", b"<html>404</html>"):
        file.write_bytes(content)
        refused(file, "cannot read|truncated|damaged")


@pytest.mark.parametrize(
    ("config", "message"),
    [
        ({"model_type": "swin"}, 'config.json: model_type is "swin"; supported: vit, deit'),
        ({"hidden_size": 16}, "model_type is null; supported"),
        (
            {"model_type": "vit", "hidden_act": "quick_gelu"},
            'hidden_act is "quick_gelu"',
        ),
        (
            {"model_type": "dinov2", "num_attention_heads": 2, "use_swiglu_ffn": True},
            "use_swiglu_ffn is true, but the weights have False",
        ),
        (
            {"model_type": "vit", "num_attention_heads": "two"},
            'config.json: num_attention_heads is "two"; supported: a positive whole number',
        ),
        (
            {"model_type": "vit", "num_attention_heads": 2, "id2label": {"0": "a"}},
            "id2label has no name for class 1 of the head's 5 classes",
        ),
    ],
)
def test_folders_that_are_no_plain_vit(config: Any, message: str, tmp_path: Path) -> None:
    save_file(vit().state_dict(), tmp_path / "model.safetensors")
    write_json(tmp_path, config)
    refused(tmp_path, message)


def test_folders_that_lack_something(tmp_path: Path) -> None:
    refused(tmp_path, r"checkpoint not found: .*config.json")
    write_json(tmp_path, {"model_type": "vit"})
    refused(tmp_path, "contains neither model.safetensors nor pytorch_model.bin")
