"""Other projects' checkpoints through the command: what they answered, the bundle answers."""

import io
import re
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file
from torch import Tensor

from pcae_export.images import generate
from pcae_serve.bundle.quality import Fidelity
from pcae_serve.bundle.reader import Bundle
from pcae_serve.engines.base import Pixels
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training.model import ViTConfig
from tests.support.exporting import bundled, fails
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
    renamed,
    saved,
    vit,
)

PIXELS = generate(6, 24)
LABELS = {i: f"class {i}" for i in range(5)}
FULL = ("--tier", "full=1.0", "--half", "none")
GIVEN = ("--heads", 2, "--normalise", "half")
MERGED = ("--reduction-points", 0, "--tier", "low=0.5", *FULL)


def rounded(model: Any) -> Any:
    """With its weights as bundles store them."""
    return model.half().float()


def normalised(pixels: Pixels) -> Tensor:
    return (torch.from_numpy(pixels).permute(0, 3, 1, 2) / 255 - 0.5) / 0.5


def answers(bundle: Bundle, pixels: Pixels = PIXELS, tier: int = -1) -> np.ndarray:
    vectors = OnnxRuntimeEngine(bundle, threads=1).run(bundle.tiers[tier], pixels).vectors
    assert vectors.std(axis=0).max() > 0.01  # else any image would do
    return vectors


@torch.inference_mode()
def expected(config: ViTConfig, counts: Sequence[int] | None = None, seed: int = 0) -> np.ndarray:
    found: Tensor = rounded(vit(config, seed))(normalised(PIXELS), counts)
    return found.numpy()


def same(ours: np.ndarray, theirs: Any) -> None:
    np.testing.assert_allclose(ours, theirs, atol=1e-4)


@pytest.fixture
def timm(tmp_path: Path) -> Path:
    return saved(vit().state_dict(), tmp_path, "timm.pth")


# State dicts


REDUCED = replace(TINY, reduction_points=(0,), reduction="merged")


def as_safetensors(weights: Weights, folder: Path) -> Path:
    save_file(weights, folder / "x.safetensors")
    return folder / "x.safetensors"


@pytest.mark.parametrize("save", [saved, pytest.param(as_safetensors, marks=pytest.mark.slow)])
def test_a_vit_of_timm_under_a_budget(save: Callable[..., Path], tmp_path: Path) -> None:
    bundle = bundled(save(vit().state_dict(), tmp_path), tmp_path / "out", *GIVEN, *MERGED)
    assert [tier.token_counts for tier in bundle.tiers] == [(18,), (36,)]
    assert bundle.manifest.models["vit"].reduction == "merged"  # best unmeasured
    assert bundle.labels == ("0", "1", "2", "3", "4")
    same(answers(bundle), expected(TINY))
    same(answers(bundle, tier=0), expected(REDUCED, [18]))
    assert bundle.tiers[0].quality is None  # made-up images measure nothing
    card = (bundle.root / "README.md").read_text()
    assert "16 images, batches of 1, 2, 3, 8; 4 float32 graphs" in card
    assert "Not recorded: the checkpoint does not contain it." in card


@pytest.mark.parametrize(
    ("config", "written"),
    [
        pytest.param(config, written, marks=[pytest.mark.slow] * slow, id=name)
        for name, config, written, slow in [
            ("mae", replace(TINY, classes=0), mae_pretrained, False),
            ("dino", replace(TINY, classes=0), dino_teacher, False),
            ("mae-finetuned", replace(TINY, pooling="mean"), mae_finetuned, True),
            ("deit-distilled", replace(TINY, distilled=True), mae_finetuned, True),
            ("deit-3", SCALED, deit_3, True),
            ("dinov2-registers", replace(SCALED, classes=0, registers=4), in_chunks, True),
            ("dinov2-giant", replace(SCALED, gated_mlp=True, activation="silu"), giant, True),
            ("no-qkv-bias", replace(TINY, qkv_bias=False, mlp_ratio=1.5), dict, True),
        ]
    ],
)
def test_state_dicts_answer_as_they_did(
    config: ViTConfig, written: Callable[[Weights], Any], tmp_path: Path
) -> None:
    file = saved(written(vit(config).state_dict()), tmp_path)
    bundle = bundled(file, tmp_path / "out", *GIVEN, *FULL)
    assert bundle.answers == ("classes" if config.classes else "features")
    same(answers(bundle), expected(config))


def test_a_head_left_out_leaves_the_features_before_it(timm: Path, tmp_path: Path) -> None:
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *FULL, "--features")
    assert (bundle.answers, bundle.labels, bundle.width) == ("features", (), 16)
    same(answers(bundle), expected(replace(TINY, classes=0)))


@pytest.mark.slow
def test_another_image_size_interpolates_positions(timm: Path, tmp_path: Path) -> None:
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *FULL, "--image-size", 32)
    assert (bundle.image_size, bundle.preprocess.resize) == (32, 37)
    assert bundle.manifest.models["vit"].patches == 64
    assert answers(bundle, generate(6, 32)).shape == (6, 5)


# Hugging Face folders, against transformers itself


def model_of(transformers: Any, kind: str) -> Any:
    name, changes = {
        "vit": ("ViTForImageClassification", {"intermediate_size": 40}),
        "deit-distilled": ("DeiTForImageClassificationWithTeacher", {"intermediate_size": 40}),
        "deit": ("DeiTForImageClassification", {"intermediate_size": 40}),
        "dinov2-registers": ("Dinov2WithRegistersModel", {"num_register_tokens": 3}),
        "dinov2": ("Dinov2Model", {}),
    }[kind]
    model = getattr(transformers, name)
    return randomised(model(model.config_class(**SIZES | changes, id2label=LABELS)))


def processor_of(transformers: Any, kind: str) -> Any:
    """As such models are published with it: squashed, or cropped."""
    size = {"height": 24, "width": 24}
    if kind == "vit":
        return transformers.ViTImageProcessor(size=size, resample=2)
    return transformers.BitImageProcessor(size={"shortest_edge": 28}, crop_size=size)


@torch.inference_mode()
@pytest.mark.parametrize(
    "kind",
    [
        "vit",
        *(
            pytest.param(kind, marks=pytest.mark.slow)
            for kind in ("deit-distilled", "deit", "dinov2-registers", "dinov2")
        ),
    ],
)
def test_a_folder_of_hugging_face_answers_as_transformers_do(
    hugging_face: Any, kind: str, tmp_path: Path
) -> None:
    theirs, processor = model_of(hugging_face, kind), processor_of(hugging_face, kind)
    theirs.save_pretrained(tmp_path / "theirs")
    processor.save_pretrained(tmp_path / "theirs")
    bundle = bundled(tmp_path / "theirs", tmp_path / "out", *FULL)
    classes = not kind.startswith("dinov2")
    assert bundle.labels == (tuple(LABELS.values()) if classes else ())
    pictures = [Image.fromarray(picture[:40]) for picture in generate(6, 60)]  # 60 x 40
    pixels = np.stack([bundle.preprocess(png(picture)) for picture in pictures])
    found = rounded(theirs)(processor(pictures, return_tensors="pt")["pixel_values"])
    same(answers(bundle, pixels), found.logits if classes else found.pooler_output)


def png(picture: Image.Image) -> bytes:
    body = io.BytesIO()
    picture.save(body, "PNG")
    return body.getvalue()


# Data without the labels of the checkpoint


def test_tiers_without_labels_are_held_against_k_1(timm: Path, data: Path, tmp_path: Path) -> None:
    flags = ("--eval-data", data, "--agreement", "--limit", 20, "--reduction", "merged")
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *MERGED, *flags)
    low, full = bundle.tiers
    assert low.agreement is not None
    assert full.agreement is not None
    assert (full.agreement.share, full.agreement.n) == (1, 20)
    assert full.agreement.data_set.endswith("/test")
    card = (bundle.root / "README.md").read_text()
    assert "same class as at keep ratio 1" in card
    assert "Reductions compared" not in card  # --reduction names it


def test_features_are_held_against_k_1_by_their_cosine(
    timm: Path, data: Path, tmp_path: Path
) -> None:
    flags = ("--features", "--reduction", "merged", "--eval-data", data, "--limit", 9)
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *FULL, *flags)
    (full,) = bundle.tiers
    assert isinstance(full.fidelity, Fidelity)
    assert full.fidelity.cosine == pytest.approx(1)
    assert full.fidelity.n == 9
    card = (bundle.root / "README.md").read_text()
    assert "| full | 1 | 1.0000 | 1.0000 | 1.0000 | 9 |" in card.split("## Features")[1]


def test_the_reduction_that_answers_best_is_chosen_and_the_card_says_so(
    timm: Path, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    flags = ("--eval-data", data, "--agreement", "--choice-images", 8)
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *MERGED, *flags)
    chosen = bundle.manifest.models["vit"].reduction
    card = (bundle.root / "README.md").read_text()
    assert "| reduction | k = 0.5 |" in card
    for rule in ("ptr", "weighted", "merged", "random"):
        assert re.search(rf"^\| {rule} \| [01]\.\d{{3}}, \d+ % \|$", card, re.MULTILINE)
    assert "on 8 images, and share of images with the same class" in card
    assert f"`random` is the baseline. Chosen: `{chosen}`, " in card
    out = capsys.readouterr().out
    assert "| reduction | k = 0.5 |" in out  # the table next to its result
    assert f"Chosen: `{chosen}`" in out


# Several models, and int8


def test_a_tier_of_each_of_two_checkpoints(tmp_path: Path) -> None:
    large, small = (
        saved(vit(seed=seed).state_dict(), tmp_path, f"{name}.pth")
        for seed, name in ((1, "Large"), (2, "small"))
    )
    tiers = ("--tier", f"full={large}@1.0", "--tier", f"fast={small}@0.8")
    bundle = bundled(
        None, tmp_path / "out", *GIVEN, *tiers, "--reduction-points", 0, "--half", "none"
    )
    assert [(tier.name, tier.model, tier.token_counts) for tier in bundle.tiers] == [
        ("fast", "small", (28,)), ("full", "large", (36,))
    ]  # fmt: skip
    same(answers(bundle, tier=1), expected(TINY, seed=1))
    same(answers(bundle, tier=0), expected(REDUCED, [28], seed=2))
    card = (bundle.root / "README.md").read_text()
    assert "**large**: A vision transformer" in card
    assert "| fast | small | 0.8 | 28 |" in card
    assert card.count("Every graph was compared with torch on the stored weights: 16") == 2


def test_a_tier_of_another_checkpoint_beside_those_of_source(timm: Path, tmp_path: Path) -> None:
    other = saved(vit(seed=1).state_dict(), tmp_path, "vit.pth")  # the id that SOURCE's model has
    tiers = ("--tier", f"mine={other}@0.8", "--tier", "full=1.0", "--tier", f"same={timm}@0.5")
    bundle = bundled(
        timm, tmp_path / "out", *GIVEN, *tiers, "--reduction-points", 0, "--half", "none"
    )
    assert [(tier.name, tier.model) for tier in bundle.tiers] == [
        ("same", "vit"), ("mine", "vit-2"), ("full", "vit")
    ]  # fmt: skip


def test_an_int8_tier(timm: Path, tmp_path: Path) -> None:
    flags = ("--reduction-points", 0, "--tier", "fast=0.6:int8", "--tier", "full=1.0")
    bundle = bundled(timm, tmp_path / "out", *GIVEN, *flags, "--half", "none")
    fast, full = bundle.tiers
    assert (fast.precision, full.precision) == ("int8", "float32")
    same(answers(bundle), expected(TINY))
    close, exact = answers(bundle, tier=0), expected(REDUCED, [21])
    assert 0 < np.abs(close - exact).max() < 0.05 * np.abs(exact).max()
    card = (bundle.root / "README.md").read_text()
    assert "| fast | elastic | int8 |" in card


# What is refused


CNN = {"conv1.weight": torch.zeros(8, 3, 7, 7), "layer1.0.conv1.weight": torch.zeros(8, 8, 3, 3)}
OBLONG = vit().state_dict() | {"patch_embed.proj.weight": torch.zeros(16, 3, 4, 3)}
HUGE = vit().state_dict() | {"head.bias": torch.full((5,), 1e6)}


@pytest.mark.parametrize(
    ("content", "flags", "message"),
    [
        (CNN, GIVEN, "not a vision transformer: it has no patch_embed.proj.weight"),
        (OBLONG, GIVEN, "proj.weight has shape [16, 3, 4, 3], expected [16, 3, 4, 4]"),
        (renamed(vit().state_dict(), ("^norm", "norms")), GIVEN, "norm.weight [16] is missing"),
        (HUGE, GIVEN, "head.bias has values beyond the range of float16 (largest 1e+06)"),
        (vit().state_dict(), (*GIVEN, "--image-size", 30), "patch size 4 does not divide 30"),
        (vit().state_dict(), (*GIVEN, "--resize", 20), "cannot crop 24 pixels out of 20"),
        (vit().state_dict(), GIVEN[2:], "number of heads from width 16; give --heads"),
        (vit().state_dict(), (*GIVEN[2:], "--heads", 3), "3 heads do not divide width 16"),
        (vit().state_dict(), GIVEN[:2], "does not contain mean and std of its images; give --"),
        (
            vit().state_dict(), (*GIVEN, "--tier", "low=0.5"),
            "model 'vit' has 2 blocks and no reduction points at which to drop patches",
        ),
        (
            vit().state_dict(), (*GIVEN, "--reduction-points", "0,2"),
            "reduction points (0, 2) are outside the 2 blocks",
        ),
        (
            vit(replace(TINY, channels=1)).state_dict(), GIVEN,
            "takes 1 channels; only RGB is supported",
        ),
        (
            vit(replace(TINY, classes=0)).state_dict(), (*GIVEN, "--labels", __file__),
            "has no head, so --labels does not apply",
        ),
        ([1, 2], GIVEN, "contains a list, expected a state dict"),
    ],
)  # fmt: skip
def test_what_cannot_be_a_bundle_is_one_line_and_leaves_nothing(
    content: Any, flags: Any, message: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    file = saved(content, tmp_path)
    assert message in fails(capsys, 1, "bundle", file, tmp_path / "out", *FULL, *flags)
    assert list(tmp_path.iterdir()) == [file]


def test_code_in_a_pickle_is_not_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = saved({"model": vit().state_dict(), "epoch": Malicious(tmp_path / "ran")}, tmp_path)
    line = fails(capsys, 1, "bundle", file, tmp_path / "out", *FULL, *GIVEN)
    assert "x.pth: contains objects other than tensors, or is damaged; save its state dict" in line
    assert list(tmp_path.iterdir()) == [file]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"size": {"height": 24, "width": 32}}, 'size is {"height": 24, "width": 32}; supported'),
        ({"do_resize": False}, "preprocessor_config.json: do_resize is false; supported: true"),
        ({"do_pad": True}, "preprocessor_config.json: do_pad is true; supported: false"),
    ],
)
def test_a_preprocessing_that_is_unknown(
    hugging_face: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str],
    change: dict[str, Any], message: str,
) -> None:  # fmt: skip
    folder = tmp_path / "theirs"
    config = hugging_face.ViTConfig(**SIZES, intermediate_size=40)
    hugging_face.ViTForImageClassification(config).save_pretrained(folder)
    processor = hugging_face.ViTImageProcessor(size={"height": 24, "width": 24})
    processor.save_pretrained(folder)
    file = folder / "preprocessor_config.json"
    file.write_text(processor.from_dict(processor.to_dict() | change).to_json_string())
    assert message in fails(capsys, 1, "bundle", folder, tmp_path / "out", *FULL)
    assert [path.name for path in tmp_path.iterdir()] == ["theirs"]


def test_checkpoints_that_cannot_share_a_bundle(
    timm: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = saved(vit(replace(TINY, classes=4)).state_dict(), tmp_path, "other.pth")
    tiers = ("--tier", f"fast={other}@1.0", "--tier", "full=1.0")
    line = fails(capsys, 1, "bundle", timm, tmp_path / "out", *GIVEN, *tiers)
    assert (
        "models 'other' and 'vit' cannot share a bundle: their labels differ (4 and 5 classes)"
        in line
    )
