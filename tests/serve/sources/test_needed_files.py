"""Which files of a repository are fetched."""

import json
from dataclasses import dataclass

import pytest

from pcae_serve.sources.names import FetchError
from pcae_serve.sources.needed_files import bundle_files, checkpoint_files


@dataclass
class Some:
    """A repository of these files."""

    content: dict[str, bytes]

    def has(self, path: str) -> bool:
        return path in self.content

    def read(self, path: str) -> bytes:
        return self.content[path]


def some(*names: str, **content: object) -> Some:
    given = {name.replace("__", "."): json.dumps(value).encode() for name, value in content.items()}
    return Some(dict.fromkeys(names, b"") | given)


CONFIGS = ["config.json", "preprocessor_config.json"]
OTHERS = ["README.md", ".gitattributes", "tf_model.h5", "modeling_own.py", "optimizer.pt"]


def test_safetensors_are_preferred() -> None:
    files = some(*OTHERS, *CONFIGS, "pytorch_model.bin", "model.safetensors")
    assert checkpoint_files(files, "") == [*CONFIGS, "model.safetensors"]


def test_a_pickle_is_taken_if_there_is_nothing_else() -> None:
    files = some(*OTHERS, *CONFIGS, "pytorch_model.bin")
    assert checkpoint_files(files, "") == [*CONFIGS, "pytorch_model.bin"]


def test_shards_are_those_of_the_index() -> None:
    files = some(*CONFIGS, "one.safetensors", "two.safetensors", "other.safetensors")
    places = {
        "weight_map": {"a": "two.safetensors", "b": "one.safetensors", "c": "../../x", "d": 1}
    }
    files.content["model.safetensors.index.json"] = json.dumps(places).encode()
    index = "model.safetensors.index.json"
    assert checkpoint_files(files, "") == [*CONFIGS, index, "one.safetensors", "two.safetensors"]


def test_a_folder_and_a_run() -> None:
    names = ["models/vit/config.json", "models/vit/model.safetensors"]
    assert checkpoint_files(some(*names, *OTHERS), "models/vit") == names
    run = ["holdout.json", "checkpoint/config.json", "checkpoint/model.safetensors"]
    state = "checkpoint/training_state.safetensors"
    assert checkpoint_files(some(*run, state, "journal.jsonl"), "") == run


def test_files_by_name() -> None:
    assert checkpoint_files(some("x.pth", "config.json"), "x.pth") == ["config.json", "x.pth"]
    onnx = ["onnx/model.onnx", "onnx/model.onnx_data"]
    assert checkpoint_files(some(*onnx, *CONFIGS), "onnx/model.onnx") == onnx
    with pytest.raises(FetchError, match=r"there is no file y\.pth"):
        checkpoint_files(some("x.pth"), "y.pth")


def test_no_weights() -> None:
    with pytest.raises(FetchError, match=r"no weights, neither model\.safetensors nor pytorch"):
        checkpoint_files(some(*CONFIGS, "model.gguf"), "")
    with pytest.raises(FetchError, match="no weights in a/b, neither"):
        checkpoint_files(some("model.safetensors"), "a/b")


def test_a_bundle_is_what_its_manifest_lists() -> None:
    listed = {"files": {"README.md": "", "models/vit/elastic.onnx": "", "gone": "", "../up": ""}}
    files = some("README.md", "models/vit/elastic.onnx", "other.bin", bundle__json=listed)
    assert bundle_files(files, "") == ["bundle.json", "README.md", "models/vit/elastic.onnx"]
    assert bundle_files(some("x", bundle__json=[]), "") == ["bundle.json"]
    with pytest.raises(
        FetchError, match=r"there is no bundle\.json in demo, so it is not a bundle"
    ):
        bundle_files(files, "demo")
    files.content["bundle.json"] = b"{"
    with pytest.raises(FetchError, match=r"bundle\.json is not valid JSON"):
        bundle_files(files, "")
