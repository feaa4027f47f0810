import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from pcae_serve.command import run
from pcae_serve.version import __version__
from pcae_training import checkpoint as checkpoints
from pcae_training import cli
from pcae_training.commands import Train

# fmt: off
TINY = [
    "--image-size", "8", "--patch-size", "2", "--width", "8", "--heads", "2", "--depth", "11",
    "--epochs", "1", "--batch-size", "10", "--shift", "0", "--holdout", "10",
    "--budgets", "1.0,.5", "--no-flip", "--threads", "1", "--crop", "0", "--randaugment", "0",
    "--mixup", "0", "--cutmix", "0", "--erase", "0",
]
# fmt: on


def test_the_installed_command(class_folders: Any, tmp_path: Path) -> None:
    beside = Path(sys.executable).with_name("pcae-train")
    command = str(beside) if beside.exists() else shutil.which("pcae-train")
    assert command is not None, "the package is not installed: make test does that"
    flags = ["--data", str(class_folders()), "--out", str(tmp_path / "out")]
    done = subprocess.run(
        [command, "finetune", *flags, *TINY], capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr
    assert f"wrote {tmp_path / 'out'}; top-1 on held-out images" in done.stdout
    assert "keep 1.0  " in done.stdout
    assert "keep 0.5  " in done.stdout
    assert done.stdout.splitlines()[-1] == (
        f"export it with: pcae-export bundle {tmp_path / 'out'} {tmp_path / 'out'}-bundle"
        f" --eval-data {flags[1]}"
    )
    assert checkpoints.load(tmp_path / "out").training["settings"]["budgets"] == [1.0, 0.5]


@pytest.mark.parametrize(
    ("change", "code", "message"),
    [
        (["--budgets", "1.0,x"], 2, "--budgets: keep ratio must be a number in (0, 1], not 'x'"),
        (["--budgets", "1.0,0"], 2, "--budgets: keep ratio must be in (0, 1], not 0"),
        (["--budgets", ""], 2, "--budgets: keep ratio must be a number"),
        (["--patch-size", "3"], 2, "patch size 3 does not divide 8"),
        (["--epochs", "0"], 2, "--epochs: Input should be greater than or equal to 1"),
        (["--epochs", "many"], 2, "--epochs: Input should be a valid integer"),
        (["--colour", "red"], 2, "unrecognized arguments: --colour red"),
        (["--data", "/nowhere/at/all"], 1, "cannot read split 'train' of data set '/nowhere"),
        (["--holdout", "24"], 1, "cannot hold out 24 of the 24 images of images/train"),
        (["--resume"], 1, "checkpoint not found: "),
        (["--keep", "0.5"], 2, "--keep trains for one keep ratio, --budgets for several; omit one"),
        (["--batch-size", "100"], 1, "14 images are fewer than one step of --batch-size 100"),
        (["--init", "/nowhere.pth"], 2, "--init determines the model's sizes; omit"),
        (
            ["--out", "/dev/null/x"],
            1,
            "cannot write /dev/null/x/checkpoint: /dev/null is not a writable folder",
        ),
    ],
)
def test_what_is_wrong_is_one_line(
    change: list[str],
    code: int,
    message: str,
    class_folders: Any,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    flags = ["--data", str(class_folders()), "--out", str(tmp_path / "out"), *TINY]
    names = [flag for flag in change if flag.startswith("--") and flag in flags]
    for name in names:
        at = flags.index(name)
        del flags[at : at + 2]
    assert run(Train, ["finetune", *flags, *change]) == code
    lines = [line for line in capsys.readouterr().err.splitlines() if "pcae-train" in line]
    assert len(lines) == 1
    assert lines[0].startswith(f"pcae-train: {message}")
    assert not (tmp_path / "out").exists()


def test_what_is_missing_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Train, ["finetune"]) == 2
    assert capsys.readouterr().err == "pcae-train: --data: Field required\n"
    assert run(Train, ["finetune", "--data", "x"]) == 2
    assert capsys.readouterr().err == (
        "pcae-train: --out: Field required (except with --dry-run)\n"
    )


def test_the_version(capsys: pytest.CaptureFixture[str]) -> None:
    assert cli.start(["--version"]) == 0
    assert capsys.readouterr().out == f"pcae-train {__version__}\n"


def test_without_torch_one_line_says_what_to_install() -> None:
    code = "import sys; sys.modules['torch'] = None; from pcae_training.cli import main; main()"
    for flags, status, output in (
        (["finetune", "--help"], 1, "torch is not installed: pip install '.[train]'"),
        (["--version"], 0, __version__),
    ):
        command = [sys.executable, "-c", code, *flags]
        done = subprocess.run(command, capture_output=True, text=True, timeout=600)
        assert done.returncode == status
        assert (done.stderr or done.stdout) == f"pcae-train{':' * status} {output}\n"


def test_alone_it_prints_its_usage(capsys: pytest.CaptureFixture[str]) -> None:
    assert run(Train, []) == 2
    printed = capsys.readouterr().err
    assert printed.startswith("usage: pcae-train")
    assert "finetune" in printed


def test_the_whole_way(
    class_folders: Any, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Pretrain, fine-tune from it, and measure: as a person would, one command after the other."""
    data, first, second = str(class_folders()), tmp_path / "first", tmp_path / "second"
    class_folders(6, split="test")
    model, steps = TINY[:10], ["--batch-size", "10", "--epochs", "1", "--threads", "1"]
    assert run(Train, ["pretrain", "--data", data, "--out", str(first), *model, *steps]) == 0
    assert capsys.readouterr().out.splitlines() == [
        f"wrote {first}",
        f"fine-tune it with: pcae-train finetune --data {data} --init {first}"
        f" --out {first}-finetuned",
    ]
    tune = ["--init", str(first), "--out", str(second), "--holdout", "4", "--keep", "0.5"]
    assert run(Train, ["finetune", "--data", data, *tune, *steps]) == 0
    assert "not used: norm." in capsys.readouterr().err
    result = tmp_path / "result.json"
    assert run(Train, ["evaluate", str(second), "--data", data, "--json", str(result)]) == 0
    printed = capsys.readouterr().out
    assert "12 images of images/test" in printed
    assert "\ncomputed in float32 with float32 weights; a bundle stores" in printed
    assert "\nby class, at keep 0.5:\n" in printed
    assert printed.splitlines()[-1] == (
        f"export it with: pcae-export bundle {second} {second}-bundle --eval-data {data}"
        " --eval-split test"
    )
    (budget,) = json.loads(result.read_text())["budgets"]
    assert budget["keep_ratio"] == 0.5
    assert budget["top1"]["value"] == pytest.approx(1 - len(budget["wrong"]) / 12)
