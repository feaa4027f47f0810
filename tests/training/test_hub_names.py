"""Checkpoints on the hub: --init, --teacher, evaluate, probe and visualize, against its double."""

import json
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.commands import Train
from pcae_training.model import ViTConfig
from tests.support.foreign_checkpoints import vit
from tests.support.hub import Hub

NAME = "me/tiny"
CONFIG = ViTConfig(8, 2, width=8, heads=2, classes=2)


@pytest.fixture
def name(hub: Hub, tmp_path: Path) -> str:
    """The name of a checkpoint on the hub."""
    preprocess = Preprocess(8, 8, (0.5, 0.5, 0.5), (0.5, 0.5, 0.5))
    folder = tmp_path / "made" / "checkpoint"
    checkpoints.save(Checkpoint(vit(CONFIG), preprocess, ["bright", "dark"]), folder)
    hub.add(NAME, folder)
    return NAME


def test_every_command_takes_a_name(
    name: str,
    hub: Hub,
    class_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    data = str(class_folders(12))
    commit = hub.repositories[name].commit("main")
    line = f"hf://{name}, commit {commit}"
    out = tmp_path / "out"
    train = ["--batch-size", "8", "--epochs", "1", "--budgets", "1.0,0.6", "--out", str(out)]
    for command in (
        ["finetune", "--data", data, "--init", name, "--teacher", f"hf://{name}", *train],
        ["evaluate", f"hf://{name}", "--data", data, "--split", "train", "--json", "e.json"],
        ["probe", name, "--data", data, "--methods", "ridge", "--budgets", "1.0"],
        ["visualize", name, "--data", data, "--split", "train", "--out", "x.png"],
    ):
        assert run(Train, command) == 0
        printed = capsys.readouterr()
        assert printed.err.splitlines().count(line) == 1 + (command[0] == "finetune")
        if command[0] == "evaluate":
            assert f"pcae-export bundle hf://{name} tiny-bundle --eval-data" in printed.out
    assert json.loads(Path("e.json").read_text())["checkpoint"] == f"hf://{name}"
    assert json.loads((out / "run.json").read_text())["settings"]["init"] == name
    trained = json.loads((out / "checkpoint" / "training.json").read_text())
    assert trained["init"] == {"source": line}


def test_failures_are_one_line(
    name: str, hub: Hub, class_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = str(class_folders(6))
    hub.repositories[name].private = True
    neither = (
        "checkpoint not found: me/none does not exist here; as a name on the hub, hf://me/none"
    )
    out = tmp_path / "out"
    for command, message in (
        (["evaluate", "me/none", "--data", data], neither),
        (["evaluate", f"{name}@main", "--data", data], "or it is private"),
        (["finetune", "--data", data, "--init", "me/none", "--out", str(out)], neither),
        (["probe", "./me/none", "--data", data], "checkpoint not found: me/none/config.json"),
        (["evaluate", "hf://none", "--data", data], "hf://none is not a model on the hub"),
    ):
        assert run(Train, command) == 1
        error = capsys.readouterr().err.splitlines()
        assert error[-1].startswith("pcae-train: ")
        assert message in error[-1]
        assert not (out / "run.json").exists()
