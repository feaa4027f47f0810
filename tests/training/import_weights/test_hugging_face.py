"""config.json of Hugging Face: understood or refused by field; single outputs; Trainer folders."""

import json
from pathlib import Path
from typing import Any

import pytest
from safetensors.torch import save_file

from pcae_export.source import SourceError, SourceOverrides, read_labels, read_source
from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights import LoadedCheckpoint, load_checkpoint
from tests.support.foreign_checkpoints import SIZES

PROCESSOR = {"image_processor_type": "ViTImageProcessor", "size": 24}


@pytest.fixture
def folder(hugging_face: Any, tmp_path: Path) -> Path:
    """Write a ViT of 5 classes."""
    return write(hugging_face, tmp_path / "theirs", 5)


def write(hugging_face: Any, folder: Path, classes: int) -> Path:
    config = hugging_face.ViTConfig(**SIZES, intermediate_size=40, num_labels=classes)
    hugging_face.ViTForImageClassification(config).save_pretrained(folder)
    (folder / "preprocessor_config.json").write_text(json.dumps(PROCESSOR))
    return folder


def edited(folder: Path, **changes: Any) -> LoadedCheckpoint:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes), encoding="utf-8-sig")
    return load_checkpoint(folder)


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"problem_type": "regression"}, 'problem_type is "regression"; supported'),
        ({"image_size": [24, 12]}, r"image_size is \[24, 12\]; supported: a number or \[n, n\]"),
        ({"image_size": 48}, "image_size is 48, but the weights have 24"),
        ({"qkv_bias": False}, "qkv_bias is false, but the weights have True"),
        ({"num_labels": 4}, "num_labels is 4, but the weights have 5"),
        ({"id2label": {"0": "a", "1": "b", "3": "c", "4": "d"}}, "no name for class 2 of"),
        ({"id2label": {str(i): "x" for i in range(6)}}, 'names class "5", but the head has'),
        ({"id2label": dict.fromkeys("01234")}, "id2label is .*; supported: the names of classes"),
        ({"architectures": ["Mine"]}, r'architectures is \["Mine"\]; supported: one of'),
        ({"architectures": ["DeiTModel"]}, "has \"DeiTModel\", which is not of model_type 'vit'"),
        ({"quantization_config": {"bits": 4}}, 'field "quantization_config"'),
        ({"mystery": 3}, r'config.json: field "mystery" \(3\) is not known; remove it'),
    ],
)
def test_what_changes_an_answer_is_refused_by_name(
    folder: Path, changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(CheckpointError, match=message) as caught:
        edited(folder, **changes)
    assert "\n" not in str(caught.value)


def test_what_changes_no_answer_is_ignored(folder: Path) -> None:
    names = {str(i): "crane" for i in range(5)}
    ignorable = {"_attn_implementation": "eager", "torch_dtype": "float16", "max_length": 20}
    found = edited(folder, id2label=names, mystery=None, **ignorable)
    assert found.labels == ["crane"] * 5
    assert found.multi_label is False


def test_one_output_of_unknown_meaning_asks_for_it(hugging_face: Any, tmp_path: Path) -> None:
    folder = write(hugging_face, tmp_path / "one", 1)
    with pytest.raises(CheckpointError, match=r"single output .*with --answers labels"):
        read_source(folder, SourceOverrides())
    with pytest.raises(SourceError, match="would always have probability 1"):
        read_source(folder, SourceOverrides(answers="classes"))
    found = read_source(folder, SourceOverrides(answers="labels"))
    assert found.checkpoint.answers == "labels"


def test_a_head_that_is_missing_is_not_passed_over(folder: Path) -> None:
    from safetensors.torch import load_file

    weights = load_file(folder / "model.safetensors")
    kept = {name: t for name, t in weights.items() if not name.startswith("classifier")}
    save_file(kept, folder / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"ViTForImageClassification, but .*give --features"):
        read_source(folder, SourceOverrides())
    assert read_source(folder, SourceOverrides(features=True)).checkpoint.answers == "features"


@pytest.mark.parametrize(
    ("state", "taken", "why"),
    [
        ({"best_model_checkpoint": "/old/place/checkpoint-5"}, "checkpoint-5", "the best"),
        ({"best_model_checkpoint": "run/checkpoint-7"}, "checkpoint-10", "is missing"),
        ({"best_model_checkpoint": None}, "checkpoint-10", "the last"),
        (None, "checkpoint-10", "the last"),
    ],
)
def test_the_output_folder_of_a_trainer(
    folder: Path, state: Any, taken: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "run").mkdir()
    for number in (10, 5):
        target = tmp_path / "run" / f"checkpoint-{number}"
        target.mkdir()
        for file in folder.iterdir():
            (target / file.name).write_bytes(file.read_bytes())
    if state is not None:
        last = tmp_path / "run" / "checkpoint-10" / "trainer_state.json"
        last.write_text(json.dumps(state))
    [note] = load_checkpoint(tmp_path / "run").notes
    assert f"{taken} is used" in note
    assert why in note


def test_label_lists_may_have_a_byte_order_mark_and_names_twice(tmp_path: Path) -> None:
    file = tmp_path / "labels.txt"
    file.write_text("crane\ncrane\nmaillot\n", encoding="utf-8-sig")
    assert read_labels(file) == ["crane", "crane", "maillot"]
