"""pcae-export: what it prints, and the one line and exit code of each failure."""

import errno
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from pcae_export import bundle_command, graph, pack, weights
from pcae_export.choice import Choice
from pcae_export.commands import Export
from pcae_export.images import shuffle_rows
from pcae_export.pack import TierSpec
from pcae_export.tier_flags import TierFlag, parse_tiers
from pcae_serve.bundle.reader import file_sha256, load_bundle
from pcae_serve.command import run
from pcae_serve.errors import PcaeError
from pcae_serve.version import __version__
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from tests.support.exporting import bundled, fails
from tests.support.foreign_checkpoints import saved, vit

Tiny = Callable[..., Checkpoint]
Capture = pytest.CaptureFixture[str]

FULL = ("--tier", "full=1.0", "--half", "none")


@pytest.fixture
def quick(tiny: Tiny, tmp_path: Path) -> Path:
    """A checkpoint of our own that is quick to export."""
    checkpoints.save(tiny(depth=1, reduction_points=()), tmp_path / "quick")
    return tmp_path / "quick"


# bundle


def test_bundle_prints_what_it_made(
    made: Any, quick: Path, tmp_path: Path, capsys: Capture
) -> None:
    bundle = bundled(quick, tmp_path / "out", *FULL, "--eval-data", made.data, "--name", "Toys 2")
    out = capsys.readouterr().out.splitlines()
    size = sum(file.stat().st_size for file in bundle.root.rglob("*") if file.is_file()) / 1e6
    assert out[0] == f"wrote {tmp_path / 'out'} ({size:.1f} MB)"
    assert out[1].split() == ["tier", "keep", "patches", "kept", "GMACs", "quality"]
    top1 = bundle.tiers[0].accuracy
    assert top1 is not None
    assert out[2].startswith("full         1 ")
    assert out[-2].startswith("quality: measured with the weights rounded to float16")
    assert out[-1] == f"serve it with: pcae-serve --bundle {tmp_path / 'out'}"
    assert f"  {100 * top1.top1:.2f} % [" in out[2]
    assert bundle.manifest.name == "Toys 2"


@pytest.mark.parametrize(
    ("flags", "half"),
    [
        pytest.param((), "float16", marks=pytest.mark.slow),
        (("--half", "bfloat16"), "bfloat16"),
        pytest.param(("--half", "none"), None, marks=pytest.mark.slow),
    ],
)
def test_graphs_for_gpus_as_asked(
    quick: Path, tmp_path: Path, flags: tuple[str, ...], half: str | None
) -> None:
    bundle = bundled(quick, tmp_path / "out", "--tier", "full=1.0", *flags)
    assert bundle.manifest.models["vit"].half == half
    graphs = {path.name for path in (bundle.root / "models" / "vit").glob("*.onnx")}
    for_gpus = {"full.cuda.onnx", "full.tensorrt.onnx"}
    assert graphs == {"elastic.onnx", "full.onnx"} | (for_gpus if half else set())
    assert ("not run: bfloat16" in (bundle.root / "README.md").read_text()) == (half == "bfloat16")


def test_the_papers_five_budgets_where_none_are_named(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    parts = planned(monkeypatch, "bundle", made.checkpoint, tmp_path / "out")
    assert {name: float(tier.keep_ratio) for name, tier in parts["vit"].tiers.items()} == {
        "fast": 0.6, "brisk": 0.7, "balanced": 0.8, "careful": 0.9, "full": 1.0
    }  # fmt: skip


def test_labels_of_images_are_those_of_the_checkpoint(
    quick: Path, data: Path, tmp_path: Path
) -> None:
    """Top-1 is measured with the images' labels, and agreement if labels are ignored."""
    labelled = bundled(quick, tmp_path / "a", *FULL, "--eval-data", data, "--limit", 10).tiers[0]
    assert labelled.accuracy is not None
    assert (labelled.accuracy.n, labelled.agreement) == (10, None)
    flags = ("--eval-data", data, "--agreement")
    unlabelled = bundled(quick, tmp_path / "b", *FULL, *flags).tiers[0]
    assert unlabelled.agreement is not None
    assert (unlabelled.agreement.n, unlabelled.accuracy) == (72, None)


# Which reduction: seen in what would be written


def planned(
    monkeypatch: pytest.MonkeyPatch, *argv: object, best: str | None = None
) -> dict[str, pack.Part]:
    """What the command would write. `best`: what every choice ends with, were there one."""
    seen = {}

    def write(parts: dict[str, pack.Part], out: Path, **flags: Any) -> None:
        seen.update(parts)
        raise PcaeError("enough")

    def choose(checkpoint: Checkpoint, pixels: Any, ratios: Any) -> Choice:
        assert best is not None, "nothing is open to be chosen"
        assert len(pixels) == 32
        return Choice({best: np.ones((len(ratios), 32), np.float32)}, {}, tuple(ratios))  # type: ignore[dict-item]

    monkeypatch.setattr(pack, "write_bundle", write)
    monkeypatch.setattr(bundle_command, "choose_reduction", choose)
    assert run(Export, [str(word) for word in argv]) == 1
    return seen


FOREIGN = ("--heads", 2, "--normalise", "half", "--reduction-points", 0)
LOW = ("--tier", "low=0.5")


@pytest.mark.parametrize(
    ("ours", "flags", "tried", "rule"),
    [
        (True, (), False, "weighted"),  # as it was trained
        (True, ("--eval-data", "DATA"), False, "weighted"),
        (True, ("--reduction", "ptr"), False, "ptr"),
        (True, ("--reduction", "auto", "--eval-data", "DATA"), True, "attention"),
        (False, (), False, "merged"),  # best unmeasured
        (False, ("--eval-data", "DATA"), True, "attention"),
        (False, ("--reduction", "auto", "--eval-data", "DATA"), True, "attention"),
        (False, ("--reduction", "random", "--eval-data", "DATA"), False, "random"),
        (False, ("--reduction", "ptr"), False, "ptr"),
    ],
)
def test_which_reduction_it_is(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    ours: bool, flags: tuple[str, ...], tried: bool, rule: str,
) -> None:  # fmt: skip
    source = tmp_path / "x.pth"
    if ours:
        checkpoints.save(tiny(reduction="weighted"), source)
    else:
        saved(vit().state_dict(), tmp_path)
    given = (data if flag == "DATA" else flag for flag in flags)
    argv = (*(() if ours else FOREIGN), *LOW, *given, "--agreement")
    best = rule if tried else None
    parts = planned(monkeypatch, "bundle", source, tmp_path / "out", *argv, best=best)
    assert parts["vit"].checkpoint.model.config.reduction == rule


def test_nothing_is_tried_where_nothing_is_dropped(
    data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    source, flags = saved(vit().state_dict(), tmp_path), ("--eval-data", data, "--agreement")
    parts = planned(monkeypatch, "bundle", source, tmp_path / "out", *FOREIGN, *FULL, *flags)
    assert set(parts) == {"vit"}


def test_a_model_out_of_a_bundle_keeps_the_reduction_it_says(
    tiny: Tiny, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It has no record of its training, and yet it is our own."""
    weighted = replace(tiny(reduction="weighted"), training={})
    checkpoints.save(weighted, tmp_path / "model")
    (tmp_path / "model" / "training.json").unlink()
    argv = (tmp_path / "model", tmp_path / "out", "--tier", "low=0.5", "--eval-data", data)
    parts = planned(monkeypatch, "bundle", *argv)
    assert parts["vit"].checkpoint.model.config.reduction == "weighted"


# Flags


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (["--tier", "fast"], "'fast' is not NAME=RATIO"),
        (["--tier", "Fast=0.5"], "'Fast=0.5' is not NAME=RATIO"),
        (["--tier", "fast=1.5"], "keep ratio must be in"),
        (["--tier", "fast=0"], "keep ratio must be in"),
        (["--tier", "fast=-0.5"], "keep ratio must be in"),
        (["--tier", "fast=nan"], "keep ratio must be a number"),
        (["--tier", "fast="], "keep ratio must be a number"),
        (["--tier", "fast=0.5:int4"], "precision 'int4' is neither int8 nor float32"),
        (["--tier", "fast=@0.5"], "has no checkpoint before '@'"),
        (["--tier", "auto=0.5"], "tier name 'auto' is reserved"),
        (["--tier", "elastic=0.5"], "tier name 'elastic' is reserved"),
        (["--tier", "a=0.5", "--tier", "a=0.6"], "tier 'a' is given twice"),
        (["--limit", "0"], "--limit"),
        (["--parity-images", "15"], "--parity-images"),
        (["--choice-images", "1"], "--choice-images"),
        (["--half", "float8"], "--half"),
        (["--normalise", "clip"], "--normalise"),
        (["--reduction", "best"], "--reduction"),
        (
            ["--reduction", "auto"],
            "--reduction auto needs images to compare rules",
        ),
        (["--reduction-points", "0,x"], "--reduction-points"),
        (["--model-id", "A/b"], "--model-id"),
        (["--name", ""], "--name"),
        (["--colour", "red"], "unrecognized arguments: --colour red"),
    ],
    ids=lambda value: " ".join(value) if isinstance(value, list) else "",
)
def test_wrong_flags(
    made: Any, tmp_path: Path, capsys: Capture, flags: list[str], message: str
) -> None:
    argv = ["bundle", made.checkpoint, tmp_path / "out", *flags]
    assert message in fails(capsys, 2, *argv)
    assert not list(tmp_path.iterdir())


def test_a_tier_without_a_checkpoint(tmp_path: Path, capsys: Capture) -> None:
    line = fails(capsys, 2, "bundle", tmp_path / "out", "--tier", "a=x@1.0", "--tier", "b=0.5")
    assert "tier 'b' has no checkpoint; give SOURCE before OUT" in line


def test_tiers_as_they_are_written() -> None:
    assert parse_tiers(["full=1.0", "a=0.8:int8", "b=x/y@z.pth@0.5", "c=d@.25:float32"]) == {
        "full": TierFlag(TierSpec("1.0")),
        "a": TierFlag(TierSpec("0.8", "int8")),
        "b": TierFlag(TierSpec("0.5"), "x/y@z.pth"),
        "c": TierFlag(TierSpec(".25"), "d"),
    }
    with pytest.raises(ValueError, match="at least one tier is required"):
        parse_tiers([])


def test_images_are_taken_from_all_over_and_always_the_same_ones() -> None:
    order = shuffle_rows(1000)
    assert sorted(order) == list(range(1000))
    assert order == shuffle_rows(1000)
    assert 300 < np.mean(order[:50]) < 700


# What cannot be done


def test_what_cannot_be_done(made: Any, tmp_path: Path, write_images: Any, capsys: Capture) -> None:
    out, data = tmp_path / "out", ["--eval-data", made.data]
    words = [str(tmp_path / "none"), "config.json"]
    line = fails(capsys, 1, "bundle", tmp_path / "none", out, *data)
    assert all(word in line for word in words)

    argv = ["bundle", made.checkpoint, out, "--eval-data"]
    assert "cannot read split" in fails(capsys, 1, *argv, tmp_path / "none")
    assert "has no split 'train'; its splits are test" in fails(
        capsys, 1, *argv, made.data, "--eval-split", "train"
    )

    other = write_images(tmp_path / "other", ["bag", "coat", "sock"])
    line = fails(capsys, 1, *argv, other)
    assert "not among the 3 expected ('bag', 'coat', 'shoe'): 'sock'; provide images" in line
    assert "measure without labels (--agreement)" in line
    few = write_images(tmp_path / "few", ["bag", "coat", "shoe"], each=6)
    line = fails(capsys, 1, *argv, few, "--parity-images", "20")
    assert (
        "only 18 images of the 20 to verify on; provide more, or lower --parity-images to 18"
        in (line)
    )

    assert "leaves no patch" in fails(capsys, 1, *argv, made.data, "--tier", "none=0.01")
    assert not out.exists()


@pytest.mark.parametrize("force", [False, True])
def test_what_stands_at_out_is_kept(
    made: Any, tmp_path: Path, capsys: Capture, force: bool
) -> None:
    (tmp_path / "precious").mkdir()
    (tmp_path / "precious" / "photo.png").write_text("")
    argv = ("bundle", made.checkpoint, tmp_path / "precious", *["--force"] * force)
    line = fails(capsys, 1, *argv)
    message = "is not a bundle: --force replaces" if force else "exists; choose another folder"
    assert message in line
    assert [path.name for path in tmp_path.rglob("*")] == ["precious", "photo.png"]
    line = fails(capsys, 1, "bundle", made.checkpoint, made.bundle.root)
    assert "exists; choose another folder, or replace it with --force" in line
    assert load_bundle(made.bundle.root).digest == made.bundle.digest


def test_force_replaces_a_bundle(made: Any, quick: Path, tmp_path: Path) -> None:
    shutil.copytree(made.bundle.root, tmp_path / "out")
    bundle = bundled(quick, tmp_path / "out", *FULL, "--force")
    assert [tier.name for tier in bundle.tiers] == ["full"]
    assert bundle.digest != made.bundle.digest
    assert {path.name for path in tmp_path.iterdir()} == {"quick", "out"}


def test_a_disk_that_fills_up_midway_leaves_nothing(
    quick: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    save, saved = graph.save, list[Path]()

    def full(model: Any, file: Path, metadata: Any) -> None:
        if saved:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        saved.append(file)
        save(model, file, metadata)

    monkeypatch.setattr(graph, "save", full)
    line = fails(capsys, 1, "bundle", quick, tmp_path / "out", *FULL)
    assert f"cannot write {tmp_path / 'out'}: " in line
    assert "No space left on device" in line
    assert saved
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]


def test_graphs_that_answer_otherwise_are_not_sealed(
    quick: Path, tmp_path: Path, capsys: Capture, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The bundle is verified before it is put in place."""
    write = weights.write

    def wrong(stored: Any, file: Path) -> None:
        write(stored | {"head.bias": stored["head.bias"] + 1}, file)

    monkeypatch.setattr(weights, "write", wrong)
    line = fails(capsys, 1, "bundle", quick, tmp_path / "out", *FULL)
    assert "tier 'full', elastic graph: a logit differs from torch by 1, more than" in line
    assert [path.name for path in tmp_path.iterdir()] == ["quick"]


# Entry point


WITHOUT_TORCH = """
import sys
class Hidden:
    def find_spec(self, name, *_):
        if name == "torch":
            raise ModuleNotFoundError("No module named 'torch'", name=name)
sys.meta_path.insert(0, Hidden())
from pcae_export.cli import start
sys.exit(start(sys.argv[1:]))
"""


def test_without_torch_one_line_says_what_to_install() -> None:
    """In a process of its own: an imported torch cannot be removed."""
    argv = [sys.executable, "-c", WITHOUT_TORCH]
    done = subprocess.run([*argv, "verify", "bundle"], capture_output=True, text=True)
    assert done.returncode == 1
    assert done.stderr == "pcae-export: torch is not installed: pip install '.[export]'\n"
    done = subprocess.run([*argv, "--version"], capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, f"pcae-export {__version__}\n")


# verify


def test_verify_proves_a_bundle_again(made: Any, capsys: Capture) -> None:
    assert run(Export, ["verify", str(made.bundle.root), "--data", str(made.data)]) == 0
    out = capsys.readouterr().out
    head = (
        f"{made.bundle.root}, model vit: parity holds: 64 images, batches of 1, 2, 3, 8; 6 float32"
    )
    assert out.startswith(head)
    assert "\n| full | elastic | float32 | 64 | " in out
    assert "\n| low | tensorrt | float16 | 64 | " in out
    assert "\n- with equal sets: the largest difference, over all images" in out
    assert out.endswith(f"serve it with: pcae-serve --bundle {made.bundle.root}\n")


def test_verify_makes_images_up_where_there_are_none(made: Any, capsys: Capture) -> None:
    assert run(Export, ["verify", str(made.bundle.root), "--images", "16"]) == 0
    out = capsys.readouterr().out
    assert "parity holds: 16 images" in out


def test_verify_proves_every_model(tiny: Tiny, tmp_path: Path, capsys: Capture) -> None:
    quick = tiny(depth=1, reduction_points=())
    parts = {
        model: pack.Part(quick, {tier: TierSpec(1.0)})
        for model, tier in (("one", "full"), ("two", "also"))
    }
    bundle = pack.write_bundle(parts, tmp_path / "out")
    argv = ("verify", str(bundle.root), "--images", "16")
    assert run(Export, argv) == 0
    out = capsys.readouterr().out
    assert out.index("model one: parity holds: ") < out.index("model two: parity holds: ")

    name = "models/two/preprocessor_config.json"  # torch's word against the graphs'
    file, manifest = bundle.root / name, bundle.root / "bundle.json"
    file.write_text(file.read_text().replace("0.4", "0.6"))
    before, after = (f'"{name}": "{x}"' for x in (bundle.manifest.files[name], file_sha256(file)))
    manifest.write_text(manifest.read_text().replace(before, after))
    line = fails(capsys, 1, *argv)
    assert "tier 'also', elastic graph: a logit differs from torch by" in line


def test_verify_refuses_files_that_were_changed(made: Any, tmp_path: Path, capsys: Capture) -> None:
    shutil.copytree(made.bundle.root, tmp_path / "copy")
    file = tmp_path / "copy" / "models" / "vit" / "mid.onnx"
    shutil.copy(file.with_name("low.onnx"), file)
    line = fails(capsys, 1, "verify", tmp_path / "copy")
    assert "mid.onnx was changed after export (its SHA-256 differs" in line


def test_generated_images_are_added_to_few(
    made: Any, write_images: Any, tmp_path: Path, capsys: Capture
) -> None:
    few = write_images(tmp_path / "few", ["bag"], each=13)
    assert run(Export, ["verify", str(made.bundle.root), "--data", str(few)]) == 0
    printed = capsys.readouterr()
    assert "note: graphs are compared on 13 images and 3 generated ones" in printed.err
    assert "parity holds: 16 images" in printed.out


def test_what_verify_cannot_do(made: Any, tmp_path: Path, capsys: Capture) -> None:
    assert "no bundle at" in fails(capsys, 1, "verify", tmp_path / "none")
    assert "cannot read split" in fails(
        capsys, 1, "verify", made.bundle.root, "--data", tmp_path / "none"
    )
    assert "--images" in fails(capsys, 2, "verify", made.bundle.root, "--images", "15")


def test_calibration_is_for_classes(
    tiny: Tiny, data: Path, tmp_path: Path, capsys: Capture
) -> None:
    checkpoints.save(tiny(depth=1, reduction_points=()), tmp_path / "m")
    argv = ("bundle", tmp_path / "m", tmp_path / "out", *FULL, "--features")
    line = fails(capsys, 1, *argv, "--calibration-data", data)
    assert "only models that give one of several classes are calibrated" in line
