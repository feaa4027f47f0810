"""What each method learns from, against the paper's numbers and slow references."""

from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from pydantic import ValidationError
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.finetune import finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.masking import Mask, hide_patches, patchify
from pcae_training.pretrain import Pretraining, build, embed, pretrain
from pcae_training.pretrain_settings import PretrainSettings
from pcae_training.pretrain_start import new_encoder
from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import momentum

PREPROCESS = Preprocess(24, 24, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
METHODS = ("pcae", "mae", "simmim", "pcae-simmim")


def settings(**changes: Any) -> PretrainSettings:
    fixed: dict[str, Any] = {
        "data": "x", "out": Path("y"), "image_size": 24, "patch_size": 4, "width": 16,
        "depth": 9, "heads": 2, "batch_size": 4, "crop": 0, "flip": False,
    }  # fmt: skip
    return PretrainSettings(**fixed | changes)


def objective(**changes: Any) -> Pretraining:
    torch.manual_seed(0)
    run = settings(**changes)
    return build(run, new_encoder(run, PREPROCESS), steps=1000)


def batch(size: int = 4) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(0, 256, (size, 3, 24, 24), dtype=torch.uint8, generator=generator)


def loss(learner: Pretraining, pixels: Tensor, step: int = 0) -> Tensor:
    result: Tensor = learner(pixels, torch.zeros(len(pixels)), SampleRng(0, step, len(pixels)), 0.5)
    return result


def split(learner: Pretraining, pixels: Tensor) -> tuple[Tensor, Mask]:
    """Patch values and mask as the objective makes them at step 0."""
    images = (pixels.float() / 255 - 0.5) / 0.5
    ratio = learner.settings.hidden_share
    return patchify(images, 4), hide_patches(
        SampleRng(0, 0, len(pixels)).uniform("mask", 36), ratio
    )


@pytest.mark.parametrize(
    ("flags", "visible", "counts"),
    [
        ({}, 49, (73, 36, 18)),  # the paper: 147 to 18
        ({"mask_ratio": 0.85}, 29, (83, 41, 20)),
        ({"mask_ratio": 0.9}, 19, (88, 44, 22)),
        ({"method": "pcae-simmim"}, 78, (59, 29, 14)),  # appendix D says 18
        ({"method": "pcae-simmim", "teacher_keep": 0.54}, 78, (63, 34, 18)),
        ({"reduce_after": (2, 6), "teacher_keep": 0.35}, 49, (51, 17)),
    ],
)
def test_token_counts_at_196_patches(
    flags: dict[str, Any], visible: int, counts: tuple[int, ...]
) -> None:
    run = PretrainSettings(data="x", out=Path("y"), **flags)
    assert run.visible(196) == visible
    assert run.teacher_counts(196) == counts


@pytest.mark.parametrize(
    ("flags", "gmacs"),
    [  # the and the research page's figures for ViT-B at 224, by hand
        ({"method": "mae"}, 29.3),
        ({"method": "mae", "decoder_depth": 2}, 17.5),
        ({"method": "pcae"}, 19.2),
    ],
)
def test_what_a_training_image_costs(flags: dict[str, Any], gmacs: float) -> None:
    run = PretrainSettings(data="x", out=Path("y"), width=768, heads=12, **flags)
    with torch.device("meta"), mock.patch("pcae_training.model.init_weights"):
        learner = build(run, new_encoder(run, PREPROCESS), steps=1000)
    assert learner.macs() / 1e9 == pytest.approx(gmacs, rel=0.02)


def test_a_dry_run_says_what_the_teacher_keeps(
    class_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(data=str(class_folders(size=24)), out=tmp_path / "out", dry_run=True)
    assert pretrain(run)
    printed = capsys.readouterr().out
    assert "pcae, 9 of 36 patches visible" in printed
    assert "27 → 13 → 6 → 3 patches by ptr, momentum" in printed
    assert "GMACs per training image" in printed
    assert "for 100 epochs on this machine" in printed
    assert not run.folder.exists()


def test_flags_that_only_fit_larger_images(class_folders: Any, tmp_path: Path) -> None:
    run = settings(data=str(class_folders(size=24)), out=tmp_path / "out", shift=24)
    with pytest.raises(PcaeError, match="shift"):
        pretrain(run)


def slow_teacher(network: Any, tokens: Tensor, points: dict[int, int]) -> tuple[Tensor, list[int]]:
    """One image's hidden tokens [h, D] through the teacher, a token at a time: section 3.2."""
    left = dict(enumerate(tokens))
    for i, block in enumerate(network.blocks):
        out = block(torch.stack(list(left.values()))[None])[0]
        left = dict(zip(left, out, strict=True))
        if i in points:
            mean = out.mean(dim=0)
            cosine = {j: float(F.cosine_similarity(left[j], mean, dim=0)) for j in left}
            stay = sorted(left, key=lambda j: cosine[j])[: points[i]]
            left = {j: left[j] for j in stay}
    return torch.stack([network.norm(token) for token in left.values()]), list(left)


def test_pcae_is_the_cosine_to_what_the_teacher_retains() -> None:
    learner, pixels = objective(), batch(2)
    with torch.no_grad():  # make teacher and student differ
        for parameter in learner.teacher.network.parameters():  # type: ignore[union-attr]
            parameter += 0.05 * torch.randn(parameter.shape)
    values, parts = split(learner, pixels)
    network = learner.teacher.network  # type: ignore[union-attr]
    losses = []
    for i in range(2):
        hidden = embed(network, values[i : i + 1], parts.hidden[i : i + 1])[0]
        tokens, stay = slow_teacher(network, hidden, {0: 13, 4: 6, 8: 3})  # of 27
        standard = (tokens - tokens.mean(1, keepdim=True)) / tokens.std(1, keepdim=True)
        x = embed(learner.model, values[i : i + 1], parts.visible[i : i + 1])
        x = torch.cat([learner.model.cls_token + learner.model.pos_embed[:, :1], x], dim=1)
        for block in learner.model.blocks:
            x = block(x)
        wanted = parts.hidden[i : i + 1, stay]
        prediction = learner.decoder(learner.model.norm(x), parts.visible[i : i + 1], wanted)  # type: ignore[operator]
        losses += [1 - F.cosine_similarity(prediction[0], standard, dim=1)]
    expected = torch.cat(losses).mean()
    torch.testing.assert_close(loss(learner, pixels), expected, rtol=1e-4, atol=1e-5)


def test_patches_nobody_asks_for_take_no_part() -> None:
    learner, pixels = objective(method="pcae"), batch(1)
    values, parts = split(learner, pixels)
    targets = learner.targets(values, parts.hidden, SampleRng(0, 0, 1))
    dropped = sorted(set(parts.hidden[0].tolist()) - set(targets.position[0].tolist()))
    assert len(dropped) == 27 - 3
    latent = learner.encode(values, parts.visible, None)
    changed = values.clone()
    changed[:, parts.hidden[0]] = 7.0
    assert torch.equal(learner.encode(changed, parts.visible, None), latent)


def test_mae_is_the_mean_squared_error_of_standardised_patches() -> None:
    learner, pixels = objective(method="mae"), batch(2)
    values, parts = split(learner, pixels)
    latent = learner.encode(values, parts.visible, None)
    prediction = learner.decoder(latent, parts.visible, parts.hidden)  # type: ignore[operator]
    target = torch.stack([values[i, parts.hidden[i]] for i in range(2)])
    target = (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True)
    torch.testing.assert_close(
        loss(learner, pixels), F.mse_loss(prediction, target), rtol=1e-4, atol=1e-5
    )
    raw = objective(method="mae", normalise_pixels=False)
    assert not torch.isclose(loss(raw, pixels), loss(learner, pixels))


def test_a_pixel_weight_adds_the_error_of_all_hidden_patches() -> None:
    learner, pixels = objective(pixel_weight=0.5), batch(2)
    values, parts = split(learner, pixels)
    targets = learner.targets(values, parts.hidden, SampleRng(0, 0, 2))
    latent = learner.encode(values, parts.visible, None)
    decoded = learner.decoder(latent, parts.visible, parts.hidden)  # type: ignore[operator]
    places = torch.tensor(
        [
            [hidden.tolist().index(position) for position in kept]
            for hidden, kept in zip(parts.hidden, targets.position.tolist(), strict=True)
        ]
    )
    tokens = torch.stack([decoded[i, places[i], :16] for i in range(2)])
    features = 1 - F.cosine_similarity(tokens, targets.tokens, dim=-1)
    target = torch.stack([values[i, parts.hidden[i]] for i in range(2)])
    target = (target - target.mean(-1, keepdim=True)) / target.std(-1, keepdim=True)
    expected = features.mean() + 0.5 * F.mse_loss(decoded[..., 16:], target)
    torch.testing.assert_close(loss(learner, pixels), expected, rtol=1e-4, atol=1e-5)
    assert learner.macs() > objective().macs()  # it decodes 27 patches instead of 3


def test_simmim_carries_mask_tokens_to_the_pixels() -> None:
    learner, pixels = objective(method="simmim"), batch(2)
    model = learner.model
    values, parts = split(learner, pixels)
    tokens = model.embed_patches((pixels.float() / 255 - 0.5) / 0.5).clone()  # [2, 36, D]
    for i in range(2):
        for j in parts.hidden[i].tolist():
            tokens[i, j] = learner.mask_token[0, 0] + model.pos_embed[0, 1 + j]  # type: ignore[index]
    *_, last = model.walk(torch.cat([model.prefix_tokens(2), tokens], dim=1))
    errors = [
        (learner.predict(model.norm(last.x[i, 1 + j])) - values[i, j]).abs()  # type: ignore[operator]
        for i in range(2)
        for j in parts.hidden[i].tolist()
    ]
    torch.testing.assert_close(
        loss(learner, pixels), torch.stack(errors).mean(), rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("setting", ["loss", "decoder"])
def test_mae_with_dropped_targets(setting: str) -> None:
    learner, pixels = objective(method="mae", drop_targets=setting), batch(2)
    values, parts = split(learner, pixels)
    retained = learner.targets(values, parts.hidden, SampleRng(0, 0, 2)).position
    assert retained.shape == (2, 3)
    latent = learner.encode(values, parts.visible, None)
    decoded = parts.hidden if setting == "loss" else retained
    errors = learner.errors(latent, values, parts.visible, decoded)  # type: ignore[operator]
    counted = [
        errors[i, column]
        for i in range(2)
        for column, j in enumerate(decoded[i].tolist())
        if j in retained[i].tolist()
    ]
    assert len(counted) == 6
    torch.testing.assert_close(loss(learner, pixels), torch.stack(counted).mean())
    whole = objective(method="mae", drop_targets="none")
    assert whole.teacher is None


@pytest.mark.parametrize(
    ("method", "flags"), [*((method, {}) for method in METHODS), ("pcae", {"pixel_weight": 1})]
)
def test_everything_that_learns_gets_a_gradient(method: str, flags: dict[str, Any]) -> None:
    learner = objective(method=method, **flags)
    loss(learner, batch()).backward()  # type: ignore[no-untyped-call]
    without = [
        name
        for name, parameter in learner.named_parameters()
        if parameter.requires_grad and parameter.grad is None
    ]
    assert without == []  # processes that share gradients would wait for ever
    fixed = {name for name, p in learner.named_parameters() if not p.requires_grad}
    assert "model.pos_embed" in fixed
    assert all(p.grad is None for n, p in learner.named_parameters() if n in fixed)
    assert any(name.startswith("teacher.") for name in fixed) == method.startswith("pcae")


def test_the_teacher_begins_as_the_student_and_follows() -> None:
    learner = objective(ema=0.9)
    assert learner.teacher is not None
    before = {n: p.clone() for n, p in learner.teacher.network.named_parameters()}
    for name, parameter in learner.model.named_parameters():
        assert torch.equal(before[name], parameter)
    with torch.no_grad():
        for parameter in learner.model.parameters():
            parameter.add_(1.0)
    learner.after_step()
    for name, parameter in learner.teacher.network.named_parameters():
        torch.testing.assert_close(parameter, before[name] + 0.1)


@pytest.mark.parametrize(
    ("steps", "expected"), [(125_000, 0.9999), (1_000_000, 0.9999), (5000, 0.9975), (1, 0.0)]
)
def test_momentum_averages_over_a_share_of_a_short_run(steps: int, expected: float) -> None:
    assert momentum(steps) == pytest.approx(expected)


@pytest.mark.parametrize("rule", ["random", "attention", "ptr-normalised"])
def test_other_rules_retain_other_patches(rule: Any) -> None:
    pixels = batch()
    paper, other = objective(), objective(reduction=rule)
    values, parts = split(paper, pixels)
    positions = [
        learner.targets(values, parts.hidden, SampleRng(0, 0, 4)).position
        for learner in (paper, other)
    ]
    assert positions[0].shape == positions[1].shape
    assert not torch.equal(*(p.sort(dim=1).values for p in positions))


def test_random_dropping_is_even(monkeypatch: pytest.MonkeyPatch) -> None:
    learner = objective(reduction="random")
    values = torch.zeros(64, 36, 48)
    hidden = torch.arange(9, 36).expand(64, -1)
    kept = torch.zeros(36)
    for step in range(30):
        position = learner.targets(values, hidden, SampleRng(0, step, 64)).position
        kept += torch.bincount(position.flatten(), minlength=36)
    assert kept[:9].sum() == 0
    share = kept[9:] / (64 * 30)
    assert (share - 3 / 27).abs().max() < 0.035


def test_presets_are_other_defaults() -> None:
    def values(**given: Any) -> tuple[float | None, ...]:
        made = settings(**given)
        return made.pixel_weight, made.ema, made.peak_lr, made.warmup

    assert values(preset="short") == (1.0, 0.9995, 1e-3, 0.1)
    assert values(preset="short", ema=0.999, lr=1e-4)[1:3] == (0.999, 1e-4)
    assert values(preset="short", blr=1e-4, batch_size=512)[2] == pytest.approx(2e-4)
    paper = settings(preset="paper", batch_size=1024)
    assert (paper.epochs, paper.ema, paper.pixel_weight) == (300, 0.9999, 0.0)
    assert (paper.peak_lr, 300 * paper.warmup) == pytest.approx((6e-4, 40))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"mask_ratio": 0.999}, "hides all 36 patches"),
        ({"mask_ratio": 0.05}, "leaves no patch"),
        ({"mask_unit": 4}, "--mask-unit 4 does not divide the 6 patches per side"),
        ({"teacher_keep": 0.1}, "leaves no patch"),
        ({"reduce_after": "0,4,9"}, "outside the 9 blocks"),
        ({"reduce_after": "4,0"}, "must be in ascending order"),
        ({"drop_targets": "loss"}, "--drop-targets is only for --method mae"),
        ({"method": "mae", "pixel_weight": 1}, "--pixel-weight is only for --method pcae, not mae"),
        ({"method": "mae", "preset": "short"}, "--preset short is only for --method pcae, not mae"),
        ({"pixel_weight": -1}, "greater than or equal to 0"),
        ({"stream": True}, "--epoch-size"),
        ({"epoch_size": 10}, "--epoch-size is only for --stream"),
        ({"min_lr": 1}, "--min-lr 1.0 is above the peak"),
        ({"seed": -1}, "greater than or equal to 0"),
        ({"accumulate": 3}, "cannot be divided"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        settings(**changes)


@pytest.mark.parametrize(
    "method",
    ["pcae", "mae"] + [pytest.param(m, marks=pytest.mark.slow) for m in ("simmim", "pcae-simmim")],
)
def test_a_run_learns_and_can_be_fine_tuned_from(
    method: Any, class_folders: Any, tmp_path: Path
) -> None:
    data = str(class_folders(20, size=24))
    run = settings(
        data=data, out=tmp_path / method, method=method, epochs=6, batch_size=10, blr=0.05, depth=11
    )
    assert pretrain(run)
    saved = checkpoints.load(run.folder)
    assert saved.model.config.classes == 0
    assert saved.labels == []
    losses = [epoch["train_loss"] for epoch in saved.training["history"]]
    assert losses[-1] < losses[0]

    tuned = FinetuneSettings(
        data=data, out=tmp_path / "tuned", init=run.out, budgets=(1.0, 0.6), epochs=1,
        batch_size=10, holdout=10, randaugment=0, mixup=0, cutmix=0, crop=0, lr=1e-9, min_lr=0,
    )  # fmt: skip
    finetune(tuned)
    classifier = checkpoints.load(tuned.folder)
    assert classifier.model.config == replace(
        saved.model.config, classes=2, pooling="mean", reduction_points=(0, 6, 9)
    )
    encoder, start = classifier.model.state_dict(), saved.model.state_dict()
    torch.testing.assert_close(
        encoder["blocks.3.attn.qkv.weight"], start["blocks.3.attn.qkv.weight"]
    )
    assert classifier.training["init"]["method"] == method
