"""What fine-tuning minimises, what it starts from, and what it leaves behind."""

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from pydantic import ValidationError
from safetensors.torch import save_file
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import LabelledImages
from pcae_training.finetune import Finetuning, finetune
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.finetune_start import prepare
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.sample_rng import SampleRng
from pcae_training.world import join

OFF: dict[str, Any] = {
    "crop": 0, "flip": False, "shift": 0, "randaugment": 0, "erase": 0, "mixup": 0, "cutmix": 0,
    "drop_path": 0, "label_smoothing": 0,
}  # fmt: skip


@pytest.fixture
def settings(class_folders: Any, tmp_path: Path) -> Any:
    """Settings of a run of a second; `out` and others as named."""
    data = str(class_folders(20))

    def make(out: str = "out", **changes: Any) -> FinetuneSettings:
        sizes = {} if "init" in changes else {"image_size": 8, "width": 8, "heads": 2, "depth": 11}
        fixed: dict[str, Any] = {
            "patch_size": 2, "epochs": 2, "batch_size": 10, "lr": 3e-3,
        }  # fmt: skip
        if "eval_data" not in changes:
            fixed["holdout"] = 10
        if "keep" not in changes:
            fixed["budgets"] = (1.0, 0.6)
        return FinetuneSettings(data=data, out=tmp_path / out, **OFF | sizes | fixed | changes)

    return make


def learner(**changes: Any) -> Finetuning:
    """An objective without data, on a tiny model of two classes."""
    fixed: dict[str, Any] = {"image_size": 12, "patch_size": 2, "width": 8, "heads": 2}
    run = FinetuneSettings(data="x", out=Path("y"), **OFF | fixed | changes)
    torch.manual_seed(0)
    model = VisionTransformer(run.config(2, reduction=run.reduction or "ptr"))
    preprocess = Preprocess(12, 12, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    return Finetuning(Checkpoint(model, preprocess, ["a", "b"]), run, None)  # type: ignore[arg-type]


def batch() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(1)
    pixels = torch.randint(0, 256, (4, 3, 12, 12), dtype=torch.uint8, generator=generator)
    return pixels, torch.tensor([0, 1, 1, 0])


def test_learns_what_can_be_told_apart(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    run = settings(epochs=4, lr=1e-2)
    accuracy = finetune(run)
    assert accuracy is not None
    assert {budget: (t.value, t.n) for budget, t in accuracy.items()} == {
        1.0: (1.0, 10),
        0.6: (1.0, 10),
    }
    saved = checkpoints.load(run.out)
    assert saved.labels == ["bright", "dark"]
    training = saved.training
    losses = [epoch["train_loss"] for epoch in training["history"]]
    assert losses[-1] < losses[0] / 2
    assert [epoch["epoch"] for epoch in training["history"]] == [1, 2, 3, 4]
    assert set(training["history"][0]["holdout_top1"]) == {"1.0", "0.6"}
    assert training["final"] == {"1.0": {"top1": 1.0, "n": 10}, "0.6": {"top1": 1.0, "n": 10}}
    assert training["epochs_done"] == 4
    assert training["settings"]["budgets"] == [1.0, 0.6]
    printed = capsys.readouterr()
    assert "epoch 4  holdout_top1/1.0 1.0000  holdout_top1/0.6 1.0000" in printed.err


def test_a_run_can_be_had_in_two_parts(settings: Any) -> None:
    whole, parts = settings("whole", epochs=2), settings("parts", epochs=2)
    finetune(whole)
    finetune(parts.model_copy(update={"stop_after": 1}))
    training = checkpoints.load(parts.out).training
    assert training["epochs_done"] == 1
    assert training["final"]
    finetune(parts.model_copy(update={"resume": True}))
    one, two = (checkpoints.load(run.out).model.state_dict() for run in (whole, parts))
    assert all(torch.equal(one[name], two[name]) for name in one)


def test_the_large_budget_learns_labels_and_the_small_ones_learn_from_it() -> None:
    objective = learner(budgets=(1.0, 0.7, 0.4), between=0, distil=1.0)
    pixels, labels = batch()
    images = (pixels.float() / 255 - 0.5) / 0.5
    geometry = objective.model.config.geometry
    full, small = (objective.model(images, geometry.counts(k)) for k in (1.0, 0.4))
    taught = -(full.softmax(1) * small.log_softmax(1)).sum(1).mean()
    expected = (F.cross_entropy(full, labels) + taught) / 2
    loss = objective(pixels, labels, SampleRng(0, 0, 4), 1.0)
    torch.testing.assert_close(loss, expected)

    half = learner(budgets=(1.0, 0.4), distil=0.5)
    expected = (F.cross_entropy(full, labels) + (taught + F.cross_entropy(small, labels)) / 2) / 2
    torch.testing.assert_close(half(pixels, labels, SampleRng(0, 0, 4), 1.0), expected)

    loss.backward()  # the teacher's side of the distillation gives no gradient
    from_both = head_gradient(objective)
    objective.zero_grad()
    full, small = (objective.model(images, geometry.counts(k)) for k in (1.0, 0.4))
    one_sided = -(full.detach().softmax(1) * small.log_softmax(1)).sum(1).mean()
    ((F.cross_entropy(full, labels) + one_sided) / 2).backward()
    torch.testing.assert_close(from_both, head_gradient(objective))


def head_gradient(objective: Finetuning) -> Tensor:
    gradient = objective.model.get_parameter("head.weight").grad
    assert gradient is not None
    return gradient.clone()


def test_one_ratio_is_plain_cross_entropy() -> None:
    objective = learner(keep=0.7, label_smoothing=0.2)
    pixels, labels = batch()
    images = (pixels.float() / 255 - 0.5) / 0.5
    logits = objective.model(images, objective.model.config.geometry.counts(0.7))
    expected = F.cross_entropy(logits, labels, label_smoothing=0.2)
    torch.testing.assert_close(objective(pixels, labels, SampleRng(0, 0, 4), 1.0), expected)


def test_random_dropping_is_drawn_by_sample() -> None:
    objective = learner(keep=0.5, reduction="random", ramp_start=0, ramp_length=0)
    pixels, labels = batch()
    whole = objective(pixels, labels, SampleRng(0, 3, 4), 1.0)
    halves = [
        objective(pixels[i : i + 2], labels[i : i + 2], SampleRng(0, 3, 4, i, i + 2), 1.0)
        for i in (0, 2)
    ]
    torch.testing.assert_close(torch.stack(halves).mean(), whole)
    assert not torch.isclose(whole, objective(pixels, labels, SampleRng(0, 4, 4), 1.0))


def test_from_a_checkpoint_with_another_patch_size(settings: Any) -> None:
    first = settings("first", patch_size=4, epochs=1, budgets=(1.0,))
    finetune(first)
    second = settings("second", init=first.out, epochs=1)
    finetune(second)
    saved = checkpoints.load(second.out)
    assert (saved.model.config.patch_size, saved.model.config.image_size) == (2, 8)
    assert saved.training["init"]["settings"]["patch_size"] == 4  # how it came about is kept


def test_other_labels_get_a_new_head(settings: Any, capsys: pytest.CaptureFixture[str]) -> None:
    first = settings("first", epochs=1)
    finetune(first)
    config = first.out / "checkpoint" / "config.json"
    config.write_text(config.read_text().replace('"dark"', '"dusky"'))
    before = checkpoints.load(first.out).model
    start = prepare(settings("second", init=first.out, patch_size=None)).checkpoint
    assert start.labels == ["bright", "dark"]
    ours, theirs = start.model.state_dict(), before.state_dict()
    assert not torch.equal(ours["head.weight"], theirs["head.weight"])
    assert torch.equal(ours["patch_embed.proj.weight"], theirs["patch_embed.proj.weight"])
    assert "newly initialised: head.weight, head.bias" in capsys.readouterr().err


def test_from_a_state_dict_of_another_project(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    theirs = VisionTransformer(ViTConfig(16, 4, width=8, heads=2, classes=3, pooling="cls"))
    state = theirs.state_dict() | {"mask_token": torch.zeros(1, 1, 8)}
    save_file(state, tmp_path / "theirs.safetensors")
    run = settings(init=tmp_path / "theirs.safetensors", heads=2, patch_size=None, image_size=20)
    start = prepare(run).checkpoint
    assert start.model.config == replace(
        theirs.config, image_size=20, classes=2, reduction_points=(0, 7, 10)
    )
    assert start.preprocess.mean == (0.485, 0.456, 0.406)
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(start.model.get_parameter(name), theirs.get_parameter(name))
    printed = capsys.readouterr().err
    assert "newly initialised: head.weight, head.bias" in printed
    unused = next(line for line in printed.splitlines() if "not used: " in line)
    assert set(unused.split(": ")[1].split(", ")) == {"head.weight", "head.bias", "mask_token"}


def dinov2(folder: Path, classes: int = 0) -> Path:
    """A DINOv2 of transformers, with positions for 28 pixels and a processor for 14."""
    torch.manual_seed(0)
    sizes: dict[str, Any] = {
        "hidden_size": 8, "num_attention_heads": 2, "num_hidden_layers": 12, "patch_size": 2,
        "image_size": 28,
    }  # fmt: skip
    if classes:
        labels = {i: f"class {i}" for i in range(classes)}
        config = transformers.Dinov2Config(**sizes, id2label=labels)
        transformers.Dinov2ForImageClassification(config).save_pretrained(folder)
    else:
        transformers.Dinov2Model(transformers.Dinov2Config(**sizes)).save_pretrained(folder)
    processor = {
        "image_processor_type": "BitImageProcessor", "size": {"shortest_edge": 16}, "resample": 3,
        "crop_size": {"height": 14, "width": 14}, "image_mean": [0.485, 0.456, 0.406],
        "image_std": [0.229, 0.224, 0.225], "do_convert_rgb": True,
    }  # fmt: skip
    (folder / "preprocessor_config.json").write_text(json.dumps(processor))
    return folder


@pytest.mark.parametrize(("classes", "pooling"), [(0, "cls"), (3, "cls-mean")])
def test_another_familys_image_size_pooling_and_norm_are_kept(
    classes: int, pooling: str, settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """DINOv2's positions are for 518 pixels, and its images have 224."""
    folder = dinov2(tmp_path / "dino", classes)
    start = prepare(settings(init=folder, patch_size=None)).checkpoint
    assert start.model.config.geometry.patches == 49
    assert start.preprocess.image_size == 14
    assert start.model.config.pooling == pooling
    assert start.model.config.reduction_points == (0, 7, 10)
    assert "newly initialised: head.weight, head.bias\n" in capsys.readouterr().err
    larger = prepare(settings(init=folder, patch_size=None, image_size=28)).checkpoint
    assert larger.model.config.geometry.patches == 196
    assert larger.preprocess.image_size == 28


def test_a_distilled_model_without_a_head(settings: Any, tmp_path: Path) -> None:
    torch.manual_seed(0)
    config = ViTConfig(8, 2, width=8, heads=2, classes=0, pooling="cls", distilled=True)
    weights = {
        name: value
        for name, value in VisionTransformer(config).state_dict().items()
        if not name.startswith("head")
    }
    save_file(weights, tmp_path / "deit.safetensors")
    run = {"init": tmp_path / "deit.safetensors", "heads": 2, "patch_size": None}
    assert prepare(settings(**run, pooling="cls")).checkpoint.model.config.distilled
    with pytest.raises(PcaeError, match=r"deit\.safetensors: a distilled .*; give --pooling cls"):
        prepare(settings(**run, pooling="mean"))


def test_the_rule_of_the_checkpoint_is_kept_or_the_change_is_stated(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    first = settings("first", epochs=1, reduction="merged")
    finetune(first)
    same = prepare(settings("same", init=first.out)).checkpoint
    assert same.model.config.reduction == "merged"
    assert "--reduction" not in capsys.readouterr().err
    other = prepare(settings("other", init=first.out, reduction="ptr")).checkpoint
    assert other.model.config.reduction == "ptr"
    assert "trained with --reduction merged, and this run trains with ptr" in (
        capsys.readouterr().err
    )


def test_reduction_points_are_a_flag(settings: Any) -> None:
    first = settings("first", epochs=1, reduction_points="1,5")
    finetune(first)
    assert checkpoints.load(first.out).model.config.reduction_points == (1, 5)
    kept, changed = (
        prepare(settings(f"{points}", init=first.out, reduction_points=points)).checkpoint
        for points in (None, (0, 3, 7))
    )
    assert kept.model.config.reduction_points == (1, 5)
    assert changed.model.config.reduction_points == (0, 3, 7)
    with pytest.raises(ValidationError, match="outside the 11 blocks"):
        settings("deep", reduction_points="0,11")


def test_held_out_images_are_read_by_the_workers(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    seen = []

    def batches(_: Any, rows: Any, size: int, workers: int = 0) -> Any:
        seen.append(workers)
        return original(images, rows, size)

    monkeypatch.setattr("pcae_training.data.MEMORY_LIMIT_BYTES", 0)
    start = prepare(settings(workers=1))
    images, original = start.holdout, LabelledImages.batches
    monkeypatch.setattr(LabelledImages, "batches", batches)
    objective = Finetuning(start.checkpoint, settings(workers=3), start.holdout)
    with join("cpu") as world:
        objective.measure([1.0], world)
    assert seen == [3]


@pytest.mark.parametrize(("choice", "taken"), [(None, "ema"), ("ema", "ema"), ("raw", "raw")])
def test_raw_or_averaged_weights_to_start_from(
    settings: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    choice: str | None,
    taken: str,
) -> None:
    models = {
        kind: VisionTransformer(ViTConfig(16, 4, width=8, heads=2, classes=2)).state_dict()
        for kind in ("raw", "ema")
    }
    file = tmp_path / "both.pth"
    torch.save({"state_dict": models["raw"], "state_dict_ema": models["ema"]}, file)
    run = settings(init=file, weights=choice, heads=2, patch_size=None, image_size=16)
    start = prepare(run).checkpoint
    name = "blocks.3.mlp.fc1.weight"
    assert torch.equal(start.model.get_parameter(name), models[taken][name])
    assert "state_dict_ema" in capsys.readouterr().err


def test_a_budget_the_checkpoint_cannot_serve(settings: Any) -> None:
    first = settings("first", patch_size=4, epochs=1, budgets=(1.0,))
    finetune(first)
    with pytest.raises(PcaeError, match=r"keep ratio 0.3 leaves no patch"):
        finetune(settings("second", init=first.out, patch_size=None, budgets=(0.3,)))


def test_a_place_that_holds_something_else_is_refused_before_training(
    settings: Any, tmp_path: Path
) -> None:
    (tmp_path / "out" / "checkpoint").mkdir(parents=True)
    (tmp_path / "out" / "checkpoint" / "thesis.txt").write_text("")
    with pytest.raises(PcaeError, match="is not a checkpoint, so it is not replaced"):
        finetune(settings())


def test_bf16_and_lazy_loading(settings: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("pcae_training.data.MEMORY_LIMIT_BYTES", 0)
    run = settings(epochs=1, precision="bf16")
    finetune(run)
    saved = checkpoints.load(run.out)
    assert {tensor.dtype for tensor in saved.model.state_dict().values()} == {torch.float32}
    assert saved.training["epochs_done"] == 1


def test_measured_on_images_of_another_data_set(settings: Any, class_folders: Any) -> None:
    folder = str(class_folders(3, split="validation"))
    accuracy = finetune(settings(epochs=1, eval_data=folder))
    assert accuracy is not None
    assert accuracy[1.0].n == 6


def test_sizes_fit_a_small_data_set_by_default(
    settings: Any, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(epochs=1, holdout=None)
    _, images, holdout, *_ = prepare(run)
    assert (len(images), len(holdout)) == (32, 8)
    assert holdout.labels.tolist().count(0) == 4
    printed = capsys.readouterr().err
    assert "data images: 40 images of train, 2 classes" in printed
    assert "held out: 8 of 40 images (--holdout)" in printed


def test_the_run_records_its_data(settings: Any) -> None:
    run = settings(epochs=1)
    finetune(run)
    (data,) = json.loads((run.folder / "data.json").read_text())
    assert data["images"] == {"train": {"bright": 20, "dark": 20}}


def test_classes_of_other_evaluation_images_are_matched_by_name(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    other = tmp_path / "other" / "dark"
    other.mkdir(parents=True)
    for file in (Path(settings().data) / "train" / "dark").iterdir():
        (other / file.name).write_bytes(file.read_bytes())
    (tmp_path / "other" / "bright").mkdir()
    _, images, holdout, *_ = prepare(settings(eval_data=str(tmp_path / "other")))
    assert "images of --data that are also in another split: 20, such as" in capsys.readouterr().err
    assert images.classes == holdout.classes == ["bright", "dark"]
    assert set(holdout.labels.tolist()) == {1}


def test_a_dry_run_says_what_would_be_done(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(dry_run=True).model_copy(update={"out": None})
    before = set(tmp_path.iterdir())
    assert finetune(run) == {}
    printed = capsys.readouterr().out
    assert "16 patches), width 8, depth 11, 2 heads, 2 classes" in printed
    assert "keep 0.6   16 → 9 → 5 → 3 patches" in printed
    assert "2 epochs x 3 steps of 10 images (30 images per epoch)" in printed
    assert "for 2 epochs on this machine, for the training steps alone" in printed
    assert "writes     nothing" in printed
    assert set(tmp_path.iterdir()) - before <= {tmp_path / "cache"}


def test_the_defaults_are_the_recipe_of_mae_and_the_ramp_of_the_paper() -> None:
    run = FinetuneSettings(data="x", out=Path("y"), batch_size=1024)
    assert (run.peak_lr, run.min_lr, run.warmup * run.epochs) == (2e-3, 1e-6, 5)
    assert (run.drop_path, run.randaugment, run.erase, run.mixup, run.cutmix) == (
        0.1, 9, 0.25, 0.8, 1.0,
    )  # fmt: skip
    assert (run.ramp_start * run.epochs, run.ramp_length * run.epochs) == (10, 25)


@pytest.mark.parametrize("written", ["1.0,.5", "[1.0, 0.5]", ".5,1", (0.5, 1.0, 1.0), ["1", ".5"]])
def test_budgets_are_read_in_many_forms(written: Any) -> None:
    run = FinetuneSettings(data="x", out=Path("y"), budgets=written)
    assert run.budgets == (1.0, 0.5)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"budgets": "a"}, "keep ratio must be a number"),
        ({"budgets": ""}, "keep ratio must be a number"),
        ({"budgets": "1.0,1.1"}, "not 1.1"),
        ({"budgets": "nan"}, "keep ratio must be"),
        ({"budgets": ()}, "keep ratios must be numbers separated by commas"),
        ({"budgets": 0.01}, "keep ratios must be numbers separated by commas"),
        ({"budgets": "0.01"}, "leaves no patch"),
        ({"image_size": 28}, "patch size 16 does not divide 28"),
        ({"width": 194}, "do not divide width"),
        ({"depth": 2}, "--depth 2 is too small to drop patches; it needs 3"),
        ({"keep": 0.5, "budgets": (0.5,)}, "omit one"),
        ({"stream": True, "epoch_size": 9}, "--eval-data"),
        ({"ramp_start": 0.5, "ramp_length": 0.6}, "together exceed the run"),
        ({"init": Path("z"), "width": 64, "depth": 12}, "omit --depth, --width"),
        ({"device": "tpu"}, "should match pattern"),
        ({"lr": 0}, "greater than 0"),
    ],
)
def test_flags_that_cannot_be(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValidationError, match=message):
        FinetuneSettings(data="x", out=Path("y"), **changes)


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a CUDA device")
def test_no_such_device(settings: Any) -> None:
    with pytest.raises(PcaeError, match="there is no cuda on this machine"):
        finetune(settings(device="cuda"))
