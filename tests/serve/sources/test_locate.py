"""From the name of a checkpoint to a local folder, against a double of the hub."""

from pathlib import Path
from typing import Any

import pytest

from pcae_serve.sources.locate import locate_checkpoint
from pcae_serve.sources.names import FetchError
from tests.support.hub import Hub, Repository

CONFIG = {"config.json": b"{}", "preprocessor_config.json": b"{ }"}  # one blob each
FILES = CONFIG | {
    "model.safetensors": b"weights" * 1000,
    "pytorch_model.bin": b"pickle",
    "modeling_own.py": b"raise SystemExit",
}
NAME = "facebook/dinov2-small"


def locate(name: str, lines: list[str] | None = None) -> Path:
    return locate_checkpoint(name, ([] if lines is None else lines).append)


def refused(name: str) -> str:
    with pytest.raises(FetchError) as error:
        locate(name)
    message = str(error.value)
    assert len(message.splitlines()) == 1
    return message


@pytest.mark.parametrize("name", [NAME, f"hf://{NAME}", f"hf://{NAME}@main"])
def test_a_checkpoint_is_fetched_with_nothing_else(hub: Hub, name: str) -> None:
    repository = hub.add(NAME, FILES)
    lines: list[str] = []
    folder = locate(name, lines)
    assert hub.fetched() == {*CONFIG, "model.safetensors"}
    assert (folder / "model.safetensors").read_bytes() == FILES["model.safetensors"]
    [line] = lines
    assert line == f"hf://{name.removeprefix('hf://')}, commit {repository.commit('main')}"
    hub.requests.clear()
    assert locate(name) == folder
    assert not hub.fetched()


def test_a_revision(hub: Hub) -> None:
    repository = hub.add(NAME, FILES)
    repository.revisions["v2"] = FILES | {"model.safetensors": b"other"}
    assert (locate(f"{NAME}@v2") / "model.safetensors").read_bytes() == b"other"
    commit = repository.commit("v2")
    assert locate(f"hf://{NAME}@{commit}").name == commit


def test_a_file_and_a_folder_in_a_repository(hub: Hub) -> None:
    hub.add(
        NAME, {"onnx/model.onnx": b"1", "onnx/model.onnx_data": b"2", "x/model.safetensors": b""}
    )
    file = locate(f"hf://{NAME}/onnx/model.onnx")
    assert file.read_bytes() == b"1"
    assert (file.parent / "model.onnx_data").read_bytes() == b"2"
    assert (locate(f"hf://{NAME}/x") / "model.safetensors").is_file()
    assert "there is no file y.pth" in refused(f"hf://{NAME}/y.pth")


def test_the_token_is_the_library_s(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES, gated=True)
    hub.add("me/private", FILES, private=True)
    assert f"is gated; accept its conditions at {hub.url}/{NAME}" in refused(NAME)
    assert "or it is private" in refused("me/private")
    monkeypatch.setenv("HF_TOKEN", hub.token)
    assert (locate(NAME) / "config.json").is_file()
    assert (locate("me/private") / "config.json").is_file()
    monkeypatch.setenv("HF_TOKEN", "hf_old")
    assert "rejects the token in HF_TOKEN" in refused(NAME)


def test_a_path_wins_over_a_name(hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    monkeypatch.chdir(tmp_path)
    Path(NAME).mkdir(parents=True)
    assert locate(NAME) == Path(NAME)
    assert locate("facebook/missing.pth") == Path("facebook/missing.pth")
    assert locate("./runs/missing") == Path("./runs/missing")
    assert locate("missing") == Path("missing")
    assert not hub.requests


def test_a_mistyped_path_asks_no_hub(
    hub: Hub, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    hub.add("runs/lost", FILES)
    monkeypatch.chdir(tmp_path)
    Path("runs").mkdir()
    message = refused("runs/lost")
    assert message == (
        "checkpoint not found: runs/lost does not exist; if you mean a model on the Hugging Face"
        " hub, write hf://runs/lost"
    )
    assert not hub.requests
    Path("runs/.lost.old").mkdir()  # left by a writer that was killed
    assert locate("runs/lost") == Path("runs/lost")
    assert locate("hf://runs/lost").is_dir()


def test_a_name_that_is_neither(hub: Hub) -> None:
    message = refused("facebook/dinov9")
    assert message == (
        "checkpoint not found: facebook/dinov9 does not exist here; as a name on the hub,"
        " hf://facebook/dinov9: the hub has no model of this name, or it is private; check the"
        " name, or set HF_TOKEN to a token that may read it"
    )
    assert refused("hf://facebook/dinov9").startswith("hf://facebook/dinov9: the hub has no model")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        (f"hf://{NAME}@v9", f"hf://{NAME}@v9: the repository has no branch, tag or commit 'v9'"),
        ("hf://me/empty", "hf://me/empty: there are no weights, neither model.safetensors nor"),
        ("hf://me/broken", "hf://me/broken: cannot reach the hub at"),
        ("hf://me", "hf://me is not a model on the hub; write hf://OWNER/NAME"),
        ("hf://me/a--b", "hf://me/a--b is not a name on the hub: "),
    ],
)
def test_what_cannot_be_fetched(
    hub: Hub, name: str, message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("time.sleep", lambda _: None)  # between tries
    hub.add(NAME, FILES)
    hub.add("me/empty", CONFIG)
    hub.add("me/broken", FILES, broken="model.safetensors")
    assert message in refused(name)


def test_no_network(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    commit = hub.add(NAME, FILES).commit("main")
    folder = locate(NAME)
    monkeypatch.setattr("huggingface_hub.constants.ENDPOINT", "http://127.0.0.1:9")
    lines: list[str] = []
    assert locate(NAME, lines) == folder
    assert lines[0].startswith(f"hf://{NAME}: cannot reach the hub at http://127.0.0.1:9 (")
    assert lines[0].endswith("); the copy in the cache is used")
    assert lines[1] == f"hf://{NAME}, commit {commit}"
    assert "cannot reach the hub at http://127.0.0.1:9 (" in refused("hf://me/other")


def test_a_hub_that_is_down(hub: Hub) -> None:
    hub.add(NAME, FILES)
    hub.down = True
    assert "has failed (HTTP 503), and it is not in the cache" in refused(f"hf://{NAME}")
    hub.down = False
    folder = locate(NAME)
    hub.down = True
    assert locate(NAME) == folder


def test_offline(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)
    hub.add("me/other", FILES)
    folder = locate(NAME)
    hub.requests.clear()
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    lines: list[str] = []
    assert locate(NAME, lines) == folder
    assert "offline mode is on (HF_HUB_OFFLINE); the copy in the cache is used" in lines[0]
    message = refused("hf://me/other")
    assert "offline mode is on (HF_HUB_OFFLINE), and it is not in the cache" in message
    (folder / "model.safetensors").unlink()
    assert "the cache lacks files of it: there are no weights" in refused(NAME)
    assert not hub.requests


def test_without_the_library(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    message = "hf://a/b: huggingface_hub is not installed: pip install '.[hub]'"
    assert refused("hf://a/b") == message
    assert refused("a/b").endswith(message)


def test_a_full_disk(hub: Hub, monkeypatch: pytest.MonkeyPatch) -> None:
    hub.add(NAME, FILES)

    def full(*_: Any, **__: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("huggingface_hub.snapshot_download", full)
    message = refused(f"hf://{NAME}")
    assert message.startswith(f"hf://{NAME}: cannot download it to the cache ")
    assert message.endswith(": No space left on device")


def test_a_repository_is_a_commit_of_its_files() -> None:
    one, other = Repository({"main": {"a": b"1"}}), Repository({"main": {"a": b"2"}})
    assert one.commit("main") != other.commit("main")
