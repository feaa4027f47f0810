import hashlib
import json
import re
import shutil
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.manifest import SCHEMA_VERSION
from pcae_serve.bundle.reader import load_bundle
from pcae_serve.errors import BundleError
from tests.support.bundles import write_bundle
from tests.support.odd_files import JSON, KINDS
from tests.support.protobuf import field, tensor


def edit(root: Path, **changes: Any) -> None:
    """Change bundle.json as somebody with an editor would."""
    path = root / "bundle.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | changes))


def refused(root: Path) -> str:
    with pytest.raises(BundleError) as caught:
        load_bundle(root)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_a_sound_bundle_loads(bundle_dir: Path) -> None:
    loaded = load_bundle(bundle_dir)
    assert [tier.name for tier in loaded.tiers] == ["fast", "balanced", "full"]
    assert loaded.labels == ("dark", "dim", "light", "bright")
    assert loaded.image_size == 8
    assert loaded.preprocess.resize == 8
    assert len(loaded.digest) == 64


def test_the_digest_changes_with_any_content(tmp_path: Path) -> None:
    first = load_bundle(write_bundle(tmp_path / "a"))
    second = load_bundle(write_bundle(tmp_path / "b", name="other"))
    assert first.digest != second.digest


def test_a_missing_bundle_says_how_to_make_one(tmp_path: Path) -> None:
    assert "pcae-export bundle" in refused(tmp_path / "nowhere")


@pytest.mark.parametrize("file", ["model.safetensors", "elastic.onnx", "preprocessor_config.json"])
def test_one_flipped_bit_is_found(bundle_dir: Path, file: str) -> None:
    path = bundle_dir / "models" / "vit" / file
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 1
    path.write_bytes(content)
    assert file in refused(bundle_dir)


def test_a_missing_file_is_named(bundle_dir: Path) -> None:
    (bundle_dir / "models" / "vit" / "model.safetensors").unlink()
    assert "model.safetensors" in refused(bundle_dir)


@pytest.mark.parametrize(
    "text", ["", "{", "[]", "null", '{"schema_version": 1}'], ids=lambda text: text or "empty"
)
def test_a_manifest_that_is_none_is_refused(bundle_dir: Path, text: str) -> None:
    (bundle_dir / "bundle.json").write_text(text)
    assert "bundle.json" in refused(bundle_dir)


def test_a_newer_schema_says_to_update(bundle_dir: Path) -> None:
    edit(bundle_dir, schema_version=SCHEMA_VERSION + 1)
    assert "update pcae-serve" in refused(bundle_dir)


@pytest.mark.parametrize("path", ["/etc/passwd", "../secret", "models/../../secret", "..\\secret"])
def test_a_path_that_leaves_the_folder_is_refused(bundle_dir: Path, path: str) -> None:
    files = json.loads((bundle_dir / "bundle.json").read_text())["files"]
    edit(bundle_dir, files=files | {path: "0" * 64})
    assert "is outside the bundle" in refused(bundle_dir)


def test_a_link_that_leaves_the_folder_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    weights = bundle_dir / "models" / "vit" / "model.safetensors"
    (tmp_path / "outside").write_bytes(weights.read_bytes())
    weights.unlink()
    weights.symlink_to(tmp_path / "outside")
    assert "links to a file outside the bundle" in refused(bundle_dir)


def changed(tiers: list[dict[str, Any]], index: int, **changes: Any) -> list[dict[str, Any]]:
    return [tier | (changes if i == index else {}) for i, tier in enumerate(tiers)]


@pytest.mark.parametrize(
    ("index", "changes", "words"),
    [
        (0, {"macs": 9999}, "ascending order of MACs"),
        (0, {"name": "full"}, "differ"),
        (0, {"name": "auto"}, "auto"),
        (0, {"name": "elastic"}, "elastic"),
        (0, {"name": "../x"}, "name"),
        (0, {"model": "other"}, "'other'"),
        (0, {"token_counts": [9, 10, 3]}, "decrease"),
        (0, {"token_counts": [9, 5]}, "stages"),
        (0, {"keep_ratio": 1.5}, "keep_ratio"),
        (0, {"surprise": 1}, "surprise"),
    ],
)
def test_tiers_that_make_no_sense_are_refused(
    bundle_dir: Path, index: int, changes: dict[str, Any], words: str
) -> None:
    tiers = json.loads((bundle_dir / "bundle.json").read_text())["tiers"]
    edit(bundle_dir, tiers=changed(tiers, index, **changes))
    assert words in refused(bundle_dir)


def test_no_tiers_are_refused(bundle_dir: Path) -> None:
    edit(bundle_dir, tiers=[])
    assert "tiers" in refused(bundle_dir)


def test_weights_must_be_among_the_sealed_files(bundle_dir: Path) -> None:
    files = json.loads((bundle_dir / "bundle.json").read_text())["files"]
    del files["models/vit/model.safetensors"]
    edit(bundle_dir, files=files)
    assert "model.safetensors" in refused(bundle_dir)


def test_a_dominated_tier_is_left_to_those_who_ask_for_it(bundle_dir: Path) -> None:
    document = json.loads((bundle_dir / "bundle.json").read_text())
    document["tiers"][1]["dominated"] = True
    (bundle_dir / "bundle.json").write_text(json.dumps(document))
    served = load_bundle(bundle_dir)
    assert served.allowed_tiers("auto", None) == (0, 2)
    assert served.allowed_tiers("balanced", None) == (1,)
    assert served.allowed_tiers("auto", "balanced") == (1, 2)  # what dominates it is not allowed


def seal(root: Path, **changes: Any) -> None:
    """Write the hashes of all files into bundle.json, as an attacker would."""
    document = json.loads((root / "bundle.json").read_text()) | changes
    hashes = {name: hashlib.sha256((root / name).read_bytes()) for name in document["files"]}
    document["files"] = {name: digest.hexdigest() for name, digest in hashes.items()}
    (root / "bundle.json").write_text(json.dumps(document))


@pytest.mark.parametrize(
    "location",
    [
        "unlisted.bin",
        "/etc/passwd",
        "../../../outside.bin",
        "model.safetensors/../x",
        "",
        "x/" * 99,
    ],
)
def test_a_graph_whose_data_is_not_sealed_is_refused(bundle_dir: Path, location: str) -> None:
    for name in ("unlisted.bin", "x"):
        (bundle_dir / "models" / "vit" / name).write_bytes(b"weights")
    graph = bundle_dir / "models" / "vit" / "elastic.onnx"
    graph.write_bytes(field(7, field(5, tensor(location))))
    seal(bundle_dir)
    assert "elastic.onnx takes its data from" in refused(bundle_dir)


def test_a_path_through_a_link_to_a_folder_is_refused(bundle_dir: Path, tmp_path: Path) -> None:
    (tmp_path / "elsewhere" / "inner").mkdir(parents=True)
    (tmp_path / "elsewhere" / "model.safetensors").write_bytes(b"other weights")
    graph = bundle_dir / "models" / "vit" / "elastic.onnx"
    (graph.parent / "link").symlink_to(tmp_path / "elsewhere" / "inner")
    graph.write_bytes(field(7, field(5, tensor("link/../model.safetensors"))))
    seal(bundle_dir)
    assert "takes its data from 'link/../model.safetensors'" in refused(bundle_dir)


@pytest.mark.parametrize(
    "location", ["model.safetensors", "./model.safetensors", "../vit/model.safetensors"]
)
def test_a_graph_whose_data_is_sealed_loads(bundle_dir: Path, location: str) -> None:
    graph = bundle_dir / "models" / "vit" / "elastic.onnx"
    graph.write_bytes(field(7, field(5, tensor(location))))
    seal(bundle_dir)
    assert load_bundle(bundle_dir)


def test_a_file_that_is_not_a_graph_is_refused(bundle_dir: Path) -> None:
    (bundle_dir / "models" / "vit" / "elastic.onnx").write_bytes(b"graph")
    seal(bundle_dir)
    assert "not an ONNX graph" in refused(bundle_dir)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize(
    "file", ["bundle.json", "models/vit/elastic.onnx", "models/vit/preprocessor_config.json"]
)
def test_what_is_not_a_regular_file_is_refused_at_once(
    tmp_path: Path, file: str, kind: str
) -> None:
    root = write_bundle(tmp_path / "b")
    make, words = KINDS[kind]
    (root / file).unlink()
    (tmp_path / "x").mkdir()
    make(tmp_path / "x" / "y")  # a short name: a socket's path has at most 108 bytes
    shutil.move(tmp_path / "x" / "y", root / file)
    if kind == "link in a circle":
        (root / file).unlink()
        make(root / file)
    assert re.search(words, refused(root))


@pytest.mark.parametrize("case", JSON)
@pytest.mark.parametrize("file", ["bundle.json", "models/vit/preprocessor_config.json"])
def test_json_beyond_the_bounds_is_refused(bundle_dir: Path, file: str, case: str) -> None:
    content, word = JSON[case]
    (bundle_dir / file).write_bytes(content)
    if file != "bundle.json":
        seal(bundle_dir)
    assert word in refused(bundle_dir)


@pytest.mark.parametrize(
    "config", [[], "text", 5, {"size": 5}, {"size": {"height": 8}}, {"size": {"height": "8"}}]
)
def test_a_preprocessor_of_another_form_is_refused(bundle_dir: Path, config: object) -> None:
    (bundle_dir / "models" / "vit" / "preprocessor_config.json").write_text(json.dumps(config))
    seal(bundle_dir)
    assert "is not a valid preprocessor config" in refused(bundle_dir)


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("image_size", 10**9),
        ("image_size", -8),
        ("patches", 10**12),
        ("depth", 10**9),
        ("width", 10**15),
        ("parameters", 10**19),
        ("reduction_points", [0] * 100_000),
    ],
)
def test_a_model_of_an_absurd_size_is_refused(bundle_dir: Path, name: str, value: object) -> None:
    models = json.loads((bundle_dir / "bundle.json").read_text())["models"]
    edit(bundle_dir, models={"vit": models["vit"] | {name: value}})
    assert f"models.vit.{name}" in refused(bundle_dir)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"labels": ["x"] * 1_000_000}, "labels: "),
        ({"labels": ["x" * 2000] * 4}, "labels.0: "),
        ({"name": "x" * 1_000_000}, "name: "),
        ({"files": {f"models/vit/{i}": "" for i in range(20_000)}}, "files: "),
    ],
)
def test_absurd_amounts_are_refused(bundle_dir: Path, changes: dict[str, Any], words: str) -> None:
    edit(bundle_dir, **changes)
    assert words in refused(bundle_dir)


@pytest.mark.parametrize("answers", [["logits"], {"logits": 1}, None, 5, "words"])
def test_a_damaged_bundle_of_version_1_is_refused(bundle_dir: Path, answers: object) -> None:
    models = json.loads((bundle_dir / "bundle.json").read_text())["models"]
    edit(bundle_dir, schema_version=1, models={"vit": models["vit"] | {"answers": answers}})
    assert "answers" in refused(bundle_dir)


def test_a_bundle_of_version_1_is_read(bundle_dir: Path) -> None:
    edit(bundle_dir, schema_version=1)
    assert load_bundle(bundle_dir).answers == "classes"
    document = json.loads((bundle_dir / "bundle.json").read_text())
    for word, answers in (("logits", "classes"), ("features", "features")):
        document["models"]["vit"]["answers"] = word
        labels = document["labels"] if word == "logits" else []
        edit(bundle_dir, schema_version=1, models=document["models"], labels=labels)
        loaded = load_bundle(bundle_dir)
        assert (loaded.answers, loaded.output) == (answers, word)
    document["models"]["vit"]["answers"] = "labels"
    edit(bundle_dir, schema_version=1, models=document["models"], labels=["a"])
    assert "answers" in refused(bundle_dir)


def test_dominated_tiers_that_were_left_out_are_named(bundle_dir: Path) -> None:
    document = json.loads((bundle_dir / "bundle.json").read_text())
    for tier in document["tiers"][1:]:
        tier["dominated"] = True
    edit(bundle_dir, tiers=document["tiers"])
    loaded = load_bundle(bundle_dir)
    allowed = loaded.allowed_tiers()
    assert allowed == (0,)
    assert loaded.dominated_above(allowed) == ("balanced", "full")
    assert loaded.dominated_above(loaded.allowed_tiers(min_tier="full")) == ()
