import json
import shutil
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint, CheckpointError, load, load_state, save
from pcae_training.model import VisionTransformer, ViTConfig

TINY = ViTConfig(image_size=16, patch_size=4, width=16, depth=12, heads=2, classes=3)
PREPROCESS = Preprocess(16, 16, (0.5, 0.4, 0.3), (0.5, 0.6, 0.7))
LABELS = ["cat", "dog", "ünter"]


def fresh(seed: int = 0, config: ViTConfig = TINY) -> Checkpoint:
    torch.manual_seed(seed)
    return Checkpoint(VisionTransformer(config), PREPROCESS, LABELS, {"seed": seed})


def same_weights(one: Checkpoint, other: Checkpoint) -> bool:
    a, b = one.model.state_dict(), other.model.state_dict()
    return list(a) == list(b) and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize(
    "config",
    [
        TINY,
        replace(TINY, pooling="cls", norm_eps=1e-5),
        replace(TINY, depth=2, reduction_points=()),
        *(replace(TINY, depth=1, reduction_points=(0,), mlp_ratio=h / 16) for h in range(1, 64, 6)),
        replace(TINY, depth=1, width=48, heads=3, reduction_points=(0,), mlp_ratio=8 / 3),
    ],
)
def test_round_trip_is_exact(config: ViTConfig, tmp_path: Path) -> None:
    before = fresh(config=config)
    state = {"exp_avg/head.bias": torch.arange(3.0), "step/head.bias": torch.tensor(7.0)}
    save(before, tmp_path / "a" / "b", state)
    after = load(tmp_path / "a" / "b")
    assert after.model.config.hidden == config.hidden
    assert replace(after.model.config, mlp_ratio=config.mlp_ratio) == config
    assert same_weights(before, after)
    assert (after.preprocess, after.labels) == (PREPROCESS, LABELS)
    assert after.training == {"seed": 0}
    assert not after.model.training
    restored = load_state(tmp_path / "a" / "b")
    assert restored is not None
    assert all(torch.equal(restored[key], state[key]) for key in state)


def test_without_state_there_is_none(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "one")
    assert load_state(tmp_path / "one") is None


def test_half_weights_come_back_as_float32(tmp_path: Path) -> None:
    before = fresh()
    before.model.half()
    save(before, tmp_path / "one")
    assert load(tmp_path / "one").model.head.weight.dtype == torch.float32


def test_replacing_leaves_nothing_beside_it(tmp_path: Path) -> None:
    for seed in range(3):
        save(fresh(seed), tmp_path / "one")
    assert load(tmp_path / "one").training == {"seed": 2}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


@pytest.mark.parametrize("step", ["_write_json", "_write_tensors"])
def test_a_failure_while_writing_leaves_the_old_one(
    step: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save(fresh(1), tmp_path / "one")

    def full(*_: Any) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoints, step, full)
    with pytest.raises(CheckpointError, match=r"cannot write .* No space left"):
        save(fresh(2), tmp_path / "one")
    assert load(tmp_path / "one").training == {"seed": 1}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


class Killed(BaseException):
    pass


@pytest.mark.parametrize("rename", [1, 2])
def test_killed_between_the_renames_the_last_good_one_is_found(
    rename: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    place, calls, real = tmp_path / "one", 0, Path.rename
    save(fresh(1), place, {"x": torch.ones(1)})

    def dying(self: Path, target: Path) -> Path:
        nonlocal calls
        calls += 1
        if calls == rename:
            raise Killed
        return real(self, target)

    with monkeypatch.context() as patch:
        patch.setattr(Path, "rename", dying)
        patch.setattr(shutil, "rmtree", lambda *_, **__: None)  # the killed clean nothing up
        with pytest.raises(Killed):
            save(fresh(2), place, {"x": torch.zeros(1)})
    assert place.exists() == (rename == 1)
    assert load(place).training == {"seed": 1}
    state = load_state(place)
    assert state is not None
    assert state["x"] == 1
    save(fresh(3), place)
    assert load(place).training == {"seed": 3}
    assert [path.name for path in tmp_path.iterdir()] == ["one"]


def test_what_is_no_checkpoint_is_never_replaced(tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("years of work")
    for place in (tmp_path, tmp_path / "thesis.txt"):
        with pytest.raises(CheckpointError, match="is not a checkpoint, so it is not replaced"):
            save(fresh(), place)
    assert (tmp_path / "thesis.txt").read_text() == "years of work"
    (tmp_path / "empty").mkdir()
    save(fresh(), tmp_path / "empty")


def test_a_place_under_a_file_is_one_line(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(PcaeError, match=r"^cannot write .*one: .*file is not a writable folder$"):
        save(fresh(), tmp_path / "file" / "one")


def edit_config(folder: Path, **changes: Any) -> None:
    file = folder / "config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def truncate(file: Path) -> None:
    file.write_bytes(file.read_bytes()[:100])


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (shutil.rmtree, r"checkpoint not found: .*config\.json does not exist"),
        (lambda f: (f / "config.json").unlink(), r"config\.json does not exist"),
        (lambda f: (f / "config.json").write_text("{"), r"config\.json is not valid JSON"),
        (lambda f: (f / "config.json").write_bytes(b"\xff\xfe"), r"config\.json is not valid JSON"),
        (lambda f: (f / "config.json").write_text("[]"), r"is not a JSON object"),
        (lambda f: edit_config(f, model_type="vit"), 'model_type is "vit"; supported: "pcae_vit"'),
        (
            lambda f: (f / "config.json").write_text('{"model_type": "pcae_vit"}'),
            "no field 'id2label'",
        ),
        (lambda f: edit_config(f, patch_size="4"), "configuration is invalid"),
        (lambda f: edit_config(f, patch_size=0), "configuration is invalid"),
        (lambda f: edit_config(f, hidden_size=20), "invalid|do not match"),
        (lambda f: edit_config(f, hidden_size=32), r"do not match config.json: .*size mismatch"),
        (lambda f: edit_config(f, id2label={"1": "x"}), "id2label is .*; supported: the names of"),
        (
            lambda f: (f / "preprocessor_config.json").unlink(),
            "preprocessor_config.json does not",
        ),
        (lambda f: (f / "preprocessor_config.json").write_text("{}"), "size is missing"),
        (lambda f: (f / "model.safetensors").unlink(), r"model\.safetensors does not exist"),
        (lambda f: truncate(f / "model.safetensors"), r"cannot read .*model\.safetensors"),
    ],
)
def test_damage_is_reported_in_one_line(damage: Any, message: str, tmp_path: Path) -> None:
    save(fresh(), tmp_path / "one")
    damage(tmp_path / "one")
    with pytest.raises(CheckpointError, match=message) as raised:
        load(tmp_path / "one")
    assert "\n" not in str(raised.value)
    assert str(tmp_path / "one") in str(raised.value)


def test_a_damaged_state_is_reported_in_one_line(tmp_path: Path) -> None:
    save(fresh(), tmp_path / "one", {"x": torch.ones(100)})
    truncate(tmp_path / "one" / "training_state.safetensors")
    with pytest.raises(CheckpointError, match=r"cannot read .*training_state\.safetensors"):
        load_state(tmp_path / "one")
