"""Pretraining that continues from other weights."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.commands import Train
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.masking import patchify
from pcae_training.model import ViTConfig
from pcae_training.pretrain import Pretraining, build, pretrain
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import Encoder, prepare_encoder
from pcae_training.sample_rng import SampleRng
from tests.support.foreign_checkpoints import mae_pretrained, saved, vit

METHODS = ("pcae", "mae", "simmim", "pcae-simmim")
SIZES = ViTConfig(
    image_size=16, patch_size=4, width=16, depth=4, heads=2, classes=0, pooling="cls",
    reduction_points=(0, 2),
)  # fmt: skip
PREPROCESS = Preprocess(16, 18, (0.4, 0.5, 0.6), (0.2, 0.3, 0.2))
RUN: dict[str, Any] = {"epochs": 2, "batch_size": 8, "reduce_after": (0, 2), "lr": 1e-3}


@pytest.fixture
def learn(class_folders: Any, tmp_path: Path) -> Any:
    data = str(class_folders(8, size=16))

    def make(out: str, **changes: Any) -> PretrainSettings:
        return PretrainSettings(data=data, out=tmp_path / out, **RUN | changes)

    return make


def write(folder: Path, **sizes: Any) -> Path:
    """A checkpoint of pcae-train, every parameter random, its positions too."""
    config = replace(SIZES, **sizes)
    labels = [f"class {i}" for i in range(config.classes)]
    checkpoints.save(Checkpoint(vit(config), PREPROCESS, labels, {"method": "mae"}), folder)
    return folder


def started(settings: PretrainSettings) -> tuple[Encoder, Pretraining]:
    encoder = prepare_encoder(settings)
    return encoder, build(settings, encoder, steps=100)


def state(folder: Path) -> dict[str, Tensor]:
    return dict(checkpoints.load(folder).model.state_dict())


def test_student_and_teacher_start_from_the_weights(learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init")
    encoder, objective = started(learn("run", init=init))
    assert encoder.model.config == SIZES
    assert encoder.preprocess == PREPROCESS
    assert objective.teacher is not None
    for name, value in state(init).items():
        assert torch.equal(encoder.model.state_dict()[name], value)
        assert torch.equal(objective.teacher.network.state_dict()[name], value)


def test_what_is_loaded_new_and_not_used_is_printed(
    learn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    classifier = write(tmp_path / "classifier", classes=2, pooling="mean")
    encoder, objective = started(learn("run", init=classifier))
    encoder.report(classifier, objective.added)
    loaded = len(state(classifier)) - 4
    assert capsys.readouterr().err.splitlines() == [
        f"{classifier}: {loaded} tensors loaded",
        "  newly initialised: norm.weight, norm.bias, decoder",
        "  not used: fc_norm.weight, fc_norm.bias, head.weight, head.bias",
    ]
    mae = saved(mae_pretrained(vit(SIZES).state_dict()), tmp_path)
    encoder, objective = started(learn("run", init=mae, method="simmim", heads=2))
    encoder.report("mae", objective.added)
    printed = capsys.readouterr().err
    assert "newly initialised: mask_token, predict\n" in printed
    assert "not used: mask_token, decoder_embed.weight\n" in printed
    assert encoder.preprocess.mean == (0.485, 0.456, 0.406)


@pytest.mark.parametrize("pooling", ["normed-mean", "cls-mean"])
def test_a_norm_of_tokens_is_kept(pooling: str, learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init", classes=2, pooling=pooling)
    encoder = prepare_encoder(learn("run", init=init))
    assert torch.equal(encoder.model.norm.weight, state(init)["norm.weight"])
    assert encoder.model.config == SIZES


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize(
    "sizes",
    [
        {"registers": 3, "layer_scale": True},
        {"distilled": True},
        {"qkv_bias": False},
        {"gated_mlp": True, "activation": "silu"},
    ],
)
def test_other_families_learn(
    sizes: dict[str, Any], method: Any, learn: Any, tmp_path: Path
) -> None:
    init = write(tmp_path / "init", **sizes)
    _, objective = started(learn("run", init=init, method=method))
    pixels = torch.randint(0, 256, (4, 3, 16, 16), dtype=torch.uint8)
    loss = objective(pixels, torch.zeros(4), SampleRng(0, 0, 4), 0.5)
    loss.backward()
    without = [n for n, p in objective.named_parameters() if p.requires_grad and p.grad is None]
    assert not without
    assert loss.isfinite()
    assert objective.macs() > 0


@pytest.mark.parametrize(
    ("sizes", "reason"),
    [
        ({"pre_norm": True, "projection": 8}, r"a norm before the blocks \(CLIP\)"),
        ({"class_token": False, "pooling": "attention"}, r"no CLS token \(SigLIP\)"),
        ({"rope_theta": 100.0}, r"rotary positions \(DINOv3\)"),
        ({"projection": 8}, "a projection of its features"),
    ],
)
def test_a_model_that_no_method_computes_is_refused(
    sizes: dict[str, Any], reason: str, learn: Any, tmp_path: Path
) -> None:
    init = write(tmp_path / "init", **sizes)
    with pytest.raises(PcaeError, match=f"init: cannot be pretrained further: it has {reason}"):
        prepare_encoder(learn("run", init=init))


def test_the_decoder_gets_cls_and_patches_of_a_model_with_registers(
    learn: Any, tmp_path: Path
) -> None:
    init = write(tmp_path / "init", registers=3, layer_scale=True)
    encoder, objective = started(learn("run", init=init))
    images, all_patches = torch.randn(2, 3, 16, 16), torch.arange(16).expand(2, -1)
    latent = objective.encode(patchify(images, 4), all_patches, None)
    assert latent.shape == (2, 17, 16)
    *_, last = encoder.model.walk(encoder.model.embed(images))
    normed = encoder.model.norm(last.x)
    torch.testing.assert_close(latent[:, 0], encoder.model(images))
    torch.testing.assert_close(latent[:, 1:], normed[:, 4:])


def test_positions_keep_their_values(learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init")
    first = learn("run", init=init)
    assert pretrain(first)
    before, after = state(init), state(first.folder)
    assert torch.equal(after["pos_embed"], before["pos_embed"])
    assert not torch.equal(after["blocks.0.mlp.fc1.weight"], before["blocks.0.mlp.fc1.weight"])
    training = checkpoints.load(first.folder).training
    assert (training["method"], training["init"]["method"]) == ("pcae", "mae")


def test_another_image_or_patch_size(learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init")
    encoder = prepare_encoder(learn("run", init=init, image_size=24))
    assert (encoder.model.config.grid, encoder.preprocess.image_size) == (6, 24)
    encoder = prepare_encoder(learn("run", init=init, patch_size=2))
    assert encoder.model.config.grid == 8


def test_a_run_from_weights_resumes_exactly(learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init", registers=1)
    whole, parts = learn("whole", init=init), learn("parts", init=init, stop_after=1)
    assert pretrain(whole)
    assert pretrain(parts)
    assert pretrain(learn("parts", init=init, resume=True))
    one, other = (
        state(each.folder) | (checkpoints.load_state(each.folder) or {}) for each in (whole, parts)
    )
    assert list(one) == list(other)
    assert all(torch.equal(one[name], other[name]) for name in one)


def test_images_held_out_before_stay_held_out(learn: Any, tmp_path: Path) -> None:
    """Fine-tune, continue on photographs without labels, and fine-tune again."""
    fixed: dict[str, Any] = {
        "data": learn("x").data, "keep": 1.0, "batch_size": 4, "epochs": 1, "randaugment": 0,
    }  # fmt: skip
    sizes = {"image_size": 16, "patch_size": 4, "width": 16, "depth": 4, "heads": 2}
    first = FinetuneSettings(out=tmp_path / "first", holdout=5, seed=1, **fixed, **sizes)
    finetune(first)
    second = learn("second", init=first.out, epochs=1)
    assert pretrain(second)
    last = FinetuneSettings(out=tmp_path / "last", init=second.out, seed=2, **fixed)
    assert prepare(last).held_out == prepare(first).held_out


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reduce_after": (0, 4)}, "init: --reduce-after 0,4 is outside the 4 blocks"),
        ({"mask_unit": 3}, "init: --mask-unit 3 does not divide the 4 patches per side"),
        ({"patch_size": 5}, "init: patch size 5 does not divide 16"),
        ({"mask_ratio": 0.99}, "init: --mask-ratio 0.99 hides all 16 patches"),
    ],
)
def test_flags_that_do_not_fit_the_model(
    changes: dict[str, Any], message: str, learn: Any, tmp_path: Path
) -> None:
    init = write(tmp_path / "init")
    with pytest.raises(PcaeError) as caught:
        prepare_encoder(learn("run", **{"init": init} | changes))
    assert message in str(caught.value)


def test_images_of_another_number_of_channels(learn: Any, tmp_path: Path) -> None:
    init = write(tmp_path / "init", channels=1)
    with pytest.raises(PcaeError, match="init has a patch kernel of 1 channels; images have 3"):
        prepare_encoder(learn("run", init=init))


def test_sizes_of_the_weights_are_refused(learn: Any) -> None:
    with pytest.raises(ValidationError, match="sizes; omit --depth, --width"):
        learn("run", init="x", width=8, depth=2)


def test_the_flag(learn: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    init = write(tmp_path / "init")
    flags = [f"--{n.replace('_', '-')}={v}" for n, v in RUN.items() if n != "reduce_after"]
    common = ["pretrain", "--data", learn("x").data, *flags, "--reduce-after", "0,2"]
    assert run(Train, [*common, "--init", str(init), "--out", str(tmp_path / "out")]) == 0
    assert f"{init}: {len(state(init))} tensors loaded\n" in capsys.readouterr().err
    assert run(Train, [*common, "--init", str(tmp_path / "out"), "--dry-run"]) == 0
    assert "16 px in patches of 4 (16 patches), width 16, depth 4" in capsys.readouterr().out
    assert run(Train, [*common, "--init", "nowhere.pth", "--dry-run"]) == 1
    assert "nowhere.pth" in capsys.readouterr().err
    assert run(Train, [*common, "--init", str(init), "--depth", "3", "--dry-run"]) == 2
    assert "--init determines the model's sizes; omit --depth" in capsys.readouterr().err
