"""Choose the files of a repository that a checkpoint or a bundle consists of; others stay there.

Weights in safetensors are preferred to pickles. Code is never among the files.
"""

import posixpath
from typing import Any, Protocol

from pcae_serve.bounded_json import parse_json
from pcae_serve.bundle.manifest import MANIFEST
from pcae_serve.sources.names import FetchError

#: End of the name of a file that lists the shards of the weights.
SHARD_INDEX = ".index.json"
#: Names of the weights file in a checkpoint's folder, in order of preference.
FOLDER_WEIGHTS = (
    "model.safetensors",
    f"model.safetensors{SHARD_INDEX}",
    "pytorch_model.bin",
    f"pytorch_model.bin{SHARD_INDEX}",
)
#: Other files of a checkpoint: sizes and labels, preprocessing, how pcae-train trained it.
_DESCRIPTIONS = (
    "config.json",
    "preprocessor_config.json",
    "processor_config.json",
    "training.json",
    "holdout.json",
)
#: A tokenizer's, whatever its kind: vocabulary, rules, special tokens.
_TOKENIZER = (
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "merges.txt",
    "spiece.model",
    "tokenizer.model",
)
#: Where a run of pcae-train keeps its checkpoint.
_RUN_CHECKPOINT = "checkpoint"
#: Suffixes of files that are a checkpoint or a teacher by themselves.
_FILES = (".pth", ".pt", ".ckpt", ".bin", ".safetensors", ".onnx")
#: What the name of a file with an ONNX graph's weights adds to the graph's.
_ONNX_DATA = ("_data", ".data")


class Files(Protocol):
    """The files of a repository, by their paths in it."""

    def has(self, path: str) -> bool:
        """Return whether there is such a file."""

    def read(self, path: str) -> bytes:
        """Return the content of a small file. Raise FetchError if it cannot be read."""


def checkpoint_files(files: Files, path: str) -> list[str]:
    """Return the files of the checkpoint at `path` ("" for the root), or of a teacher.

    Raise FetchError if there is none.
    """
    if path.endswith((*_FILES, SHARD_INDEX)):
        if not files.has(path):
            raise FetchError(f"there is no file {path}")
        folder = posixpath.dirname(path)
        if path.endswith(".onnx"):
            return [path, *_present(files, [f"{path}{end}" for end in _ONNX_DATA])]
        return [*_described(files, folder), *_with_shards(files, path)]
    found = _described(files, path)
    for folder in (path, posixpath.join(path, _RUN_CHECKPOINT)):
        for name in FOLDER_WEIGHTS:
            weights = posixpath.join(folder, name)
            if files.has(weights):
                found += _described(files, folder) if folder != path else []
                return [*found, *_with_shards(files, weights)]
    where = f" in {path}" if path else ""
    names = " nor ".join(name for name in FOLDER_WEIGHTS if not name.endswith(SHARD_INDEX))
    raise FetchError(f"there are no weights{where}, neither {names}, whole or in shards")


def text_model_files(files: Files, path: str) -> list[str]:
    """Return the files of the checkpoint at `path` and of its tokenizer.

    Raise FetchError if there is no checkpoint.
    """
    found = checkpoint_files(files, path)
    return found + _present(files, [posixpath.join(path, name) for name in _TOKENIZER])


def bundle_files(files: Files, path: str) -> list[str]:
    """Return the files of the bundle at `path` ("" for the root), the manifest first.

    Raise FetchError if there is none. What the manifest says is checked when the bundle is read.
    """
    manifest = posixpath.join(path, MANIFEST)
    if not files.has(manifest):
        where = f" in {path}" if path else ""
        raise FetchError(
            f"there is no {MANIFEST}{where}, so it is not a bundle; create one with 'pcae-export"
            " bundle'"
        )
    content = _read_json(files, manifest)
    listed = content.get("files")
    names = [name for name in listed if _is_inside(name)] if isinstance(listed, dict) else []
    return [manifest, *_present(files, [posixpath.join(path, name) for name in names])]


def _described(files: Files, folder: str) -> list[str]:
    return _present(files, [posixpath.join(folder, name) for name in _DESCRIPTIONS])


def _with_shards(files: Files, weights: str) -> list[str]:
    """Return a file of weights; if it is a list of shards, with the shards that are there.

    The reader of the checkpoint names one that is missing.
    """
    if not weights.endswith(SHARD_INDEX):
        return [weights]
    places = _read_json(files, weights).get("weight_map")
    names = places.values() if isinstance(places, dict) else ()
    shards = {name for name in names if _is_inside(name)}
    folder = posixpath.dirname(weights)
    return [weights, *_present(files, [posixpath.join(folder, name) for name in sorted(shards)])]


def _present(files: Files, paths: list[str]) -> list[str]:
    return [path for path in paths if files.has(path)]


def _read_json(files: Files, path: str) -> dict[str, Any]:
    try:
        content = parse_json(files.read(path))
    except ValueError as error:
        raise FetchError(f"{path} is not valid JSON: {error}") from None
    return content if isinstance(content, dict) else {}


def _is_inside(name: object) -> bool:
    """Return whether a name is that of a file below the folder that lists it."""
    if not isinstance(name, str) or "\\" in name or "\0" in name:
        return False
    return not any(part in ("", ".", "..") for part in name.split("/"))
