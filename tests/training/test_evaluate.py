import json
from contextlib import nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import config, run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.data import DataError, LabelledImages, load
from pcae_training.evaluate import (
    EvaluateSettings,
    check_labels,
    choose_ratios,
    describe_precision,
    evaluate,
    join_scores,
    normalise,
    run_evaluation,
)
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.sample_rng import generator
from pcae_training.score import Score
from pcae_training.world import World

PREPROCESS = Preprocess(8, 8, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
TINY = ViTConfig(8, 2, width=8, heads=2, classes=2)


@pytest.fixture
def images(class_folders: Any) -> LabelledImages:
    return load(str(class_folders(6)), "train", PREPROCESS)


def vit(config: ViTConfig = TINY) -> VisionTransformer:
    """A model that answers now one class, now the other, and not the same at every budget."""
    torch.manual_seed(33)
    model = VisionTransformer(config)
    if config.classes:
        torch.nn.init.normal_(model.get_parameter("head.weight"))
    return model


@pytest.fixture
def model() -> VisionTransformer:
    return vit()


@pytest.fixture
def settings(class_folders: Any, tmp_path: Path) -> Any:
    """Settings of an evaluation of a checkpoint, of a model of `config` that was trained so."""
    data = class_folders(6, split="test")

    def make(
        config: ViTConfig = TINY,
        labels: tuple[str, ...] = ("bright", "dark"),
        training: dict[str, Any] | None = None,
        **changes: Any,
    ) -> EvaluateSettings:
        folder = tmp_path / "checkpoint"
        checkpoints.save(Checkpoint(vit(config), PREPROCESS, list(labels), training or {}), folder)
        return EvaluateSettings(checkpoint=folder, data=str(data), **changes)

    return make


def test_normalise_is_what_the_graph_does() -> None:
    pixels = torch.tensor([0, 102, 255], dtype=torch.uint8).view(1, 3, 1, 1)
    expected = [(0 - 0.5) / 0.5, (0.4 - 0.4) / 0.25, (1 - 0.3) / 0.2]
    torch.testing.assert_close(normalise(pixels, PREPROCESS).flatten(), torch.tensor(expected))


def test_every_budget_is_measured_on_the_rows_asked_for(
    images: LabelledImages, model: VisionTransformer, slow_score: Any
) -> None:
    rows, budgets = [0, 3, 7, 8, 11], (1.0, 0.6)
    scores: Any = evaluate(model, images, rows, budgets, batch_size=2)
    assert list(scores) == [1.0, 0.6]
    for budget in budgets:
        counts = model.config.geometry.counts(budget)
        logits = [model(normalise(images[row][0][None], PREPROCESS), counts)[0] for row in rows]
        expected = slow_score(torch.stack(logits).detach(), images.labels[rows])
        assert scores[budget].correct.tolist() == expected.top1
        assert scores[budget].confidence.tolist() == pytest.approx(expected.confidence, abs=1e-5)


def test_a_budget_named_twice_counts_once(images: LabelledImages, model: VisionTransformer) -> None:
    scores = evaluate(model, images, range(12), (1.0, 1.0))
    assert list(scores) == [1.0]
    assert scores[1.0].n == 12


def test_no_rows_are_a_score_that_adds_nothing(
    images: LabelledImages, model: VisionTransformer
) -> None:
    both: Any = [evaluate(model, images, range(n), (0.6,))[0.6] for n in (12, 0)]
    some, none = both
    assert none.n == 0
    assert torch.equal((none + some).confidence, some.confidence)


def test_random_reduction_is_by_row_and_not_by_batch(images: LabelledImages) -> None:
    model, rows = vit(replace(TINY, reduction="random")), [9, 2, 5, 11]
    noise = torch.stack([torch.rand(16, generator=generator("evaluate", row)) for row in rows])
    pixels = torch.stack([images[row][0] for row in rows])
    counts = model.config.geometry.counts(0.6)
    logits = model(normalise(pixels, PREPROCESS), counts, noise=noise)
    expected = logits.softmax(dim=1).amax(dim=1).detach()
    for batch_size in (1, 3, 4):
        score: Any = evaluate(model, images, rows, (0.6,), batch_size=batch_size)[0.6]
        torch.testing.assert_close(score.confidence, expected)


@pytest.mark.parametrize("training", [True, False])
def test_nothing_changes(images: LabelledImages, model: VisionTransformer, training: bool) -> None:
    model.train(training)
    before = {name: tensor.clone() for name, tensor in model.state_dict().items()}
    state = torch.get_rng_state()
    evaluate(model, images.in_memory(), range(12), (1.0,), precision=torch.bfloat16)
    assert model.training is training
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[name], tensor) for name, tensor in model.state_dict().items())


def test_a_model_is_left_training_where_an_image_is_damaged(
    class_folders: Any, model: VisionTransformer
) -> None:
    root = class_folders(2)
    (root / "train" / "dark" / "001.png").write_bytes(b"\x89PNG")
    model.train()
    with pytest.raises(DataError, match="row 3"):
        evaluate(model, load(str(root), "train", PREPROCESS), range(4), (1.0,), batch_size=1)
    assert model.training


def test_a_run_tells_what_a_loop_finds(settings: Any, slow_score: Any, tmp_path: Path) -> None:
    file = tmp_path / "new" / "numbers.json"
    asked = settings(budgets=(1.0, 0.6, 0.5), json=file, batch_size=5)
    text = str(run_evaluation(asked))
    model, images = vit().eval(), load(asked.data, "test", PREPROCESS)
    right: dict[float, NDArray[np.bool_]] = {}
    content = json.loads(file.read_text())
    assert (content["n"], content["data"]) == (12, images.name)
    assert content["checkpoint"] == str(tmp_path / "checkpoint")
    for found in content["budgets"]:
        ratio = found["keep_ratio"]
        counts = model.config.geometry.counts(ratio)
        batch = normalise(torch.stack([images[i][0] for i in range(12)]), PREPROCESS)
        expected = slow_score(model(batch, counts).detach(), images.labels)
        right[ratio] = np.array(expected.top1)
        assert found["patches"] == list(counts)
        assert found["macs"] == model.config.geometry.macs(counts)
        assert found["top1"]["value"] == pytest.approx(right[ratio].mean())
        assert found["top1"]["interval"][0] < right[ratio].mean() < found["top1"]["interval"][1]
        assert found["top5"] is None
        error = expected.calibration_error
        assert found["calibration_error"] == pytest.approx(error, abs=1e-5)
        assert found["wrong"] == (~right[ratio]).nonzero()[0].tolist()
        assert f"{100 * right[ratio].mean():.2f} [" in text
    first, *others = content["budgets"]
    assert first["top1_difference"] is None
    assert any(found["top1_difference"]["value"] for found in others)  # else nothing is tried here
    for found in others:
        change = right[found["keep_ratio"]].astype(int) - right[1.0].astype(int)
        assert found["top1_difference"]["value"] == pytest.approx(change.mean())
        assert f"{100 * change.mean():+.2f} [" in text
    header, *lines, note, precision = text.splitlines()[1:]
    assert "minus keep 1 " in header
    assert [line.split()[0] for line in lines] == ["1", "0.6", "0.5"]
    assert "9, 5, 3" in lines[1]
    assert note == "top-5 is not meaningful with 2 classes"
    assert precision == content["precision"]


def test_scores_of_processes_are_put_together_by_budget() -> None:
    def score(*right: bool) -> Score:
        return Score(
            torch.zeros(len(right)), (~torch.tensor(right)).long(), None, torch.ones(len(right))
        )

    parts: list[Any] = [
        {1.0: score(True), 0.5: score(False)},
        {1.0: score(True, False), 0.5: score(True, True)},
    ]
    scores: Any = join_scores(parts)
    whole = {budget: joined.correct.tolist() for budget, joined in scores.items()}
    assert whole == {1.0: [True, True, False], 0.5: [False, True, True]}


def test_processes_share_the_images_and_keep_their_order(
    settings: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    asked, parts = settings(budgets=(0.6,)), []
    whole: Any = run_evaluation(asked)

    class Together(World):
        """Three processes, one after the other."""

        def gather(self, value: Any) -> list[Any]:
            parts.append(value)
            return parts

    for rank in range(3):
        place = Together(torch.device("cpu"), rank, 3)
        monkeypatch.setattr("pcae_training.evaluate.join", lambda _, at=place: nullcontext(at))
        assert (run_evaluation(asked) is None) == (rank > 0)
    shared: Any = join_scores(parts)[0.6]
    assert [part[0.6].n for part in parts] == [4, 4, 4]
    assert torch.equal(shared.correct, whole.scores[0.6].correct)


@pytest.mark.parametrize(
    ("training", "ratios"),
    [
        ({"settings": {"budgets": [0.5, 1.0]}}, (1.0, 0.5)),
        ({"settings": {"budgets": [1.0, 0.5], "keep": 0.7}}, (0.7,)),
        ({"settings": {"budgets": [1.0, 0.5], "keep": None}}, (1.0, 0.5)),
        ({"settings": {"epochs": 3}}, (1.0, 0.9, 0.8, 0.7, 0.6)),
        ({}, (1.0, 0.9, 0.8, 0.7, 0.6)),
    ],
)
def test_budgets_are_those_of_the_training(
    training: dict[str, Any], ratios: tuple[float, ...]
) -> None:
    checkpoint = Checkpoint(vit(), PREPROCESS, ["bright", "dark"], training)
    assert choose_ratios(checkpoint, None) == ratios
    assert choose_ratios(checkpoint, (0.8,)) == (0.8,)


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (("dark", "dim"), "images of classes that are not among the 2 expected ('dark', 'dim'): "),
        ((), "no classes; fine-tune it"),
    ],
)
def test_other_labels_are_refused(settings: Any, labels: tuple[str, ...], message: str) -> None:
    wrong = settings(replace(TINY, classes=len(labels)), labels)
    with pytest.raises(PcaeError) as caught:
        run_evaluation(wrong)
    assert message in str(caught.value)
    assert "\n" not in str(caught.value)


def test_independent_labels_have_no_top1(settings: Any) -> None:
    run = settings()
    saved = checkpoints.load(Path(run.checkpoint))
    checkpoints.save(replace(saved, multi_label=True), Path(run.checkpoint))
    with pytest.raises(PcaeError, match="gives any number of labels an image, and"):
        run_evaluation(run)


@pytest.mark.parametrize("labels", [("dark", "bright"), ("bright", "dim", "dark")])
def test_classes_are_matched_by_name(
    settings: Any, labels: tuple[str, ...], capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(replace(TINY, classes=len(labels)), labels)
    checkpoint = checkpoints.load(Path(run.checkpoint))
    images = load(run.data, "test", PREPROCESS)
    check_labels(checkpoint, images)
    named = [images.classes[value] for value in images.labels.tolist()]
    assert named == ["bright"] * 6 + ["dark"] * 6
    evaluation = run_evaluation(run)
    assert evaluation is not None
    assert evaluation.n == 12
    printed = capsys.readouterr().err
    assert f"data images: 12 images of test, {len(labels)} classes" in printed
    assert ("no image in test of class dim" in printed) == ("dim" in labels)


def test_unreadable_images_are_counted_and_left_out(
    settings: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    run = settings(json_file=tmp_path / "out.json")
    (Path(run.data) / "test" / "bright" / "000.png").write_bytes(b"")
    (Path(run.data) / "test" / "dark" / "new.heic").write_bytes(b"\0\0\0\x18ftypheic")
    evaluation = run_evaluation(run)
    assert evaluation is not None
    assert evaluation.n == 11
    printed = capsys.readouterr().err
    assert "cannot be read: HEIC: 1 (.heic 1)" in printed
    assert "2 of 13 images cannot be read and are skipped (.heic 1, .png 1); the" in printed
    written = json.loads((tmp_path / "out.json").read_text())
    assert written["inventory"]["unreadable_types"] == {"HEIC": {".heic": 1}}
    assert all(0 not in budget["wrong"] for budget in written["budgets"])  # rows of the data


def test_precision_is_named_if_it_differs_from_the_bundle(model: VisionTransformer) -> None:
    assert describe_precision(model, torch.float32).startswith("computed in float32 with float32 w")
    assert "bfloat16" in describe_precision(model, torch.bfloat16)
    model.half().float()  # as stored in a bundle
    assert describe_precision(model, torch.float32) == ""


def test_a_checkpoint_of_another_project(
    hugging_face: Any, class_folders: Any, tmp_path: Path
) -> None:
    sizes = {"image_size": 8, "patch_size": 2, "hidden_size": 8, "num_attention_heads": 2}
    names = {0: "bright", 1: "dark"}
    theirs = hugging_face.ViTForImageClassification(
        hugging_face.ViTConfig(**sizes, num_hidden_layers=11, intermediate_size=16, id2label=names)
    )
    theirs.save_pretrained(tmp_path / "vit")
    data = str(class_folders(6, split="test"))
    settings = EvaluateSettings(checkpoint=tmp_path / "vit", data=data)
    with pytest.raises(PcaeError, match="does not specify how images are preprocessed"):
        run_evaluation(settings)
    content = json.dumps(PREPROCESS.to_config())
    (tmp_path / "vit" / "preprocessor_config.json").write_text(content)
    evaluation: Any = run_evaluation(settings)
    images = load(data, "test", PREPROCESS)
    pixels = torch.stack([images[i][0] for i in range(12)])
    with torch.inference_mode():
        answers = theirs.eval()(normalise(pixels, PREPROCESS)).logits.argmax(dim=1)
    assert evaluation.scores[1.0].correct.tolist() == (answers == images.labels).tolist()


def test_what_cannot_be_is_told_before_anything_is_measured(
    settings: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcae_training.evaluate.evaluate", None)
    with pytest.raises(PcaeError, match=r"--budgets: keep ratio 0\.2 leaves no patch"):
        run_evaluation(settings(budgets="1.0,.2"))
    with pytest.raises(PcaeError, match="it is a folder"):
        run_evaluation(settings(json=tmp_path))
    (tmp_path / "file").touch()
    with pytest.raises(PcaeError, match="is not a writable folder"):
        run_evaluation(settings(json=tmp_path / "file" / "x.json"))
    with pytest.raises(PcaeError, match="checkpoint not found"):
        run_evaluation(EvaluateSettings(checkpoint=tmp_path / "none", data="x"))
    if not torch.cuda.is_available():
        with pytest.raises(PcaeError, match="there is no cuda"):
            run_evaluation(settings(device="cuda"))
    for budgets in ("1.0,x", "0", (), "1.5"):
        with pytest.raises(ValidationError):
            EvaluateSettings(checkpoint=tmp_path, data="x", budgets=budgets)


def test_flags_name_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    class Evaluate(EvaluateSettings):
        def cli_cmd(self) -> None:
            print(self.checkpoint, self.data, self.budgets, self.json_file, self.batch_size)

    class Command(BaseSettings):
        model_config = config("test")
        evaluate: CliSubCommand[Evaluate]

        def cli_cmd(self) -> None:
            CliApp.run_subcommand(self)

    flags = ["runs/x", "--data", "d", "--budgets", ".6,1.0", "--json", "n.json"]
    assert run(Command, ["evaluate", *flags, "--batch-size", "7"]) == 0
    assert capsys.readouterr().out == "runs/x d (1.0, 0.6) n.json 7\n"
    assert run(Command, ["evaluate", "runs/x", "--data", "d", "--budgets", "x"]) == 2
    assert "--budgets: keep ratio must be a number in (0, 1], not 'x'" in capsys.readouterr().err
