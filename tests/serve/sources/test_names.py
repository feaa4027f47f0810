"""Names of models: what is a path, and what is a repository on the hub."""

from pathlib import Path

import pytest
from pydantic import BaseModel

from pcae_serve.sources.names import (
    FetchError,
    HubName,
    ModelName,
    implied_hub_name,
    local_name,
    parse_hub_name,
)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("hf://facebook/dinov2-small", HubName("facebook/dinov2-small")),
        ("hf://a/b/", HubName("a/b")),
        ("hf://a/b@v1.0", HubName("a/b", "v1.0")),
        ("hf://a/b@refs/pr/3", HubName("a/b", "refs/pr/3")),
        ("hf://a/b@refs/pr/3/x.onnx", HubName("a/b", "refs/pr/3", "x.onnx")),
        ("hf://a/b@feature%2Fone", HubName("a/b", "feature/one")),
        ("hf://a/b/onnx/model.onnx", HubName("a/b", None, "onnx/model.onnx")),
        ("hf://a/b@main/models/vit", HubName("a/b", "main", "models/vit")),
    ],
)
def test_a_name_on_the_hub(text: str, name: HubName) -> None:
    assert parse_hub_name(text) == name


@pytest.mark.parametrize(
    "text",
    [
        "hf://", "hf://bert", "hf://a/b@", "hf://a/b@x@y", "hf://a/b/../../etc", "hf://a/b//c",
        "hf:///a/b", "hf://a/b/./c", "hf://datasets/a/b", "hf://-a/b", "hf://a b/c",
    ],
)  # fmt: skip
def test_what_is_not_a_name_is_refused(text: str) -> None:
    with pytest.raises(FetchError, match=r"hf://"):
        parse_hub_name(text)


@pytest.mark.parametrize(
    ("text", "name"),
    [
        ("facebook/dinov2-small", HubName("facebook/dinov2-small")),
        ("timm/vit_base.augreg_in21k", HubName("timm/vit_base.augreg_in21k")),  # dots are usual
        ("a/b@v1", HubName("a/b", "v1")),
        *((text, None) for text in ("x", "./a/b", "/a/b", "a/b/c", "../b", "a/b.pth", "~/b", "a/")),
        *((text, None) for text in ("a/B.ONNX", "a/model.safetensors", "a//b", "", "a\\b", "a/.b")),
    ],
)
def test_a_path_may_be_a_name_on_the_hub(text: str, name: HubName | None) -> None:
    assert implied_hub_name(text) == name


def test_a_path_that_exists_is_a_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "facebook").mkdir()
    (tmp_path / "facebook" / "dangling").symlink_to("nowhere")
    assert implied_hub_name("facebook/dangling") is None


def test_records_have_no_secrets() -> None:
    class Flags(BaseModel):
        model: ModelName
        teachers: tuple[ModelName, ...] = ()

    url = "https://me:word@x.org/vit.pth?sig=1"
    flags = Flags(model=url, teachers=(url, "hf://a/b@v1", "runs/x"))
    assert flags.model == url
    public = "https://x.org/vit.pth"
    assert flags.model_dump(mode="json") == {
        "model": public,
        "teachers": [public, "hf://a/b@v1", "runs/x"],
    }


def test_names_of_what_is_made_from_it() -> None:
    assert local_name("runs/x") == "runs/x"
    assert local_name("hf://a/b@v1") == "b"
    assert local_name("hf://a/b/models/vit") == "vit"
