"""pcae-serve classify without a server, as a person calls it."""

import csv
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

import pcae_serve
from pcae_serve.cli import start
from pcae_serve.local.runner import Runner
from tests.support.bundles import write_bundle
from tests.support.hub import Hub
from tests.support.images import image_bytes
from tests.support.server_process import COMMAND

Captured = pytest.CaptureFixture[str]
ROOT = Path(__file__).parents[3]
SAMPLES = ROOT / "docs" / "samples"
LEVELS = {"a.png": 0, "b.png": 100, "c.png": 150, "d.png": 250}
LABELS = ("dark", "dim", "light", "bright")


@pytest.fixture
def here(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Four images in the folder `photos` of the working directory; the command for a bundle."""
    bundle = write_bundle(tmp_path / "bundle")
    monkeypatch.setenv("PCAE_CACHE_DIR", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    Path("photos").mkdir()
    for name, level in LEVELS.items():
        Path("photos", name).write_bytes(image_bytes(level))
    return ["classify", "--bundle", str(bundle), "--backend", "simulated"]


def rows(path: str) -> list[list[str]]:
    with Path(path).open(newline="") as file:
        return list(csv.reader(file))[1:]


def files(path: str) -> list[str]:
    return [row[0] for row in rows(path)]


PHOTOS = [f"photos/{name}" for name in LEVELS]


def test_lines_are_printed_as_from_a_server(here: list[str], capsys: Captured) -> None:
    assert start([*here, "photos"]) == 0
    output = capsys.readouterr()
    assert output.err == ""
    shown = [line.rpartition(", ")[0] for line in output.out.splitlines()]
    assert shown == [
        f"{photo}  {label} {0.9802:.4f}  (full" for photo, label in zip(PHOTOS, LABELS, strict=True)
    ]
    assert start([*here, "--json", "--top-k", "2", "photos/d.png"]) == 0
    answer = json.loads(capsys.readouterr().out, parse_constant=pytest.fail)
    assert (answer["file"], answer["tier"], answer["budget_ms"]) == ("photos/d.png", "full", None)
    assert [each["label"] for each in answer["predictions"]] == ["bright", "dark"]


def test_each_image_has_its_own_budget(here: list[str], capsys: Captured) -> None:
    assert start([*here, "photos", "--budget-ms", "60000", "--min-tier", "balanced"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in lines] == list(LABELS)
    assert start([*here, "photos", "--budget-ms", "0.001"]) == 1
    output = capsys.readouterr()
    assert output.out == ""
    assert [line.split(": ")[1] for line in output.err.splitlines()] == PHOTOS
    assert output.err.count("raise the budget of 0.001 ms") == 4


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_table_of_a_folder(suffix: str, here: list[str], capsys: Captured) -> None:
    out = f"results.{suffix}"
    Path("photos", "notes.txt").write_text("no image")
    Path("photos", ".hidden.png").write_bytes(image_bytes())
    assert start([*here, "photos", "--out", out, "--top-k", "2"]) == 0
    output = capsys.readouterr()
    assert output.out == ""
    left_out, summary = output.err.splitlines()
    assert left_out == "pcae-serve: 1 other file left out: 1 .txt"
    assert summary.startswith(f"pcae-serve: {out}: 4 images at ")
    if suffix == "csv":
        with Path(out).open(newline="") as file:
            table: list[dict[str, Any]] = list(csv.DictReader(file))
        assert list(table[0]) == [
            *("file", "tier", "label", "index", "probability"),
            *("label_2", "index_2", "probability_2"),
        ]
    elif suffix == "jsonl":
        lines = [json.loads(line) for line in Path(out).read_text().splitlines()]
        table = [line | line["predictions"][0] for line in lines]
        assert [len(line["predictions"]) for line in lines] == [2] * 4
    else:
        parquet = pytest.importorskip("pyarrow.parquet")
        table = parquet.read_table(out).to_pylist()
        assert not Path(f"{out}.part").exists()
    assert [row["file"] for row in table] == PHOTOS
    assert [row["label"] for row in table] == list(LABELS)
    assert {row["tier"] for row in table} == {"full"}
    assert all(abs(float(row["probability"]) - 0.98) < 0.01 for row in table)


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_second_run_continues(suffix: str, here: list[str], capsys: Captured) -> None:
    out = f"results.{suffix}"
    assert start([*here, "photos/a.png", "photos/b.png", "--out", out]) == 0
    assert start([*here, "photos", "--out", out]) == 0
    assert "2 images" in capsys.readouterr().err
    assert start([*here, "photos", "--out", out]) == 0
    assert f"{out}: no new images, 4 kept from before" in capsys.readouterr().err
    if suffix == "parquet":
        parquet = pytest.importorskip("pyarrow.parquet")
        assert parquet.read_table(out).column("file").to_pylist() == PHOTOS
    else:
        assert [photo for photo in PHOTOS if photo not in Path(out).read_text()] == []
        assert len(Path(out).read_text().splitlines()) == 4 + (suffix == "csv")


@pytest.mark.parametrize("suffix", ["csv", "jsonl", "parquet"])
def test_a_run_that_is_stopped_keeps_its_rows(
    suffix: str, here: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    """As by Ctrl-C, and by a kill in the middle of a row."""
    out = f"results.{suffix}"
    run = Runner.run

    def stop(*arguments: Any, **more: Any) -> Any:
        for i, each in enumerate(run(*arguments, **more)):
            if i == 2:
                raise KeyboardInterrupt
            yield each

    with monkeypatch.context() as patch:
        patch.setattr(Runner, "run", stop)
        assert start([*here, "photos", "--out", out]) == 130
    assert f"stopped after 2 answers; the same command continues {out}" in capsys.readouterr().err
    written = Path(f"{out}.part" if suffix == "parquet" else out)
    with written.open("ab") as file:
        file.write(b'{"file": "photos/c' if suffix != "csv" else b'"photos/c\n.p')
    assert start([*here, "photos", "--out", out]) == 0
    assert "2 images" in capsys.readouterr().err
    if suffix == "csv":
        assert [(row[0], row[2]) for row in rows(out)] == list(zip(PHOTOS, LABELS, strict=True))


def test_overwrite_begins_a_new_file(here: list[str]) -> None:
    out = ["--out", "r.csv"]
    assert start([*here, "photos", *out]) == 0
    assert start([*here, "photos/b.png", *out, "--tier", "fast", "--overwrite"]) == 0
    assert [row[:3] for row in rows("r.csv")] == [["photos/b.png", "fast", "dim"]]


def test_failures_are_listed_at_the_end(here: list[str], capsys: Captured) -> None:
    Path("photos", "b.png").write_bytes(b"")
    Path("photos", "c.png").write_bytes(image_bytes()[:30])
    names = ["nowhere.png", "photos", "none/*.png"]
    assert start([*here, *names, "--out", "r.csv"]) == 0
    lines = capsys.readouterr().err.splitlines()
    assert [line.partition(": ")[2] for line in lines[:-1]] == [
        "none/*.png: no file matches this pattern",
        "nowhere.png: No such file or directory",
        "photos/b.png: the file is empty",
        "photos/c.png: the image's header is truncated or damaged",
    ]
    assert lines[-1].endswith(", 4 failed, listed above")
    assert files("r.csv") == ["photos/a.png", "photos/d.png"]
    assert start([*here, *names, "--out", "r.csv", "--strict"]) == 1  # they are tried again
    assert capsys.readouterr().err.splitlines()[:-1] == lines[:-1]
    Path("photos", "b.png").write_bytes(image_bytes(100))
    assert start([*here, "photos", "--out", "r.csv"]) == 0
    assert files("r.csv") == ["photos/a.png", "photos/d.png", "photos/b.png"]
    assert start([*here, "photos/c.png", "nowhere.png", "--out", "s.csv"]) == 1  # no answer at all


def test_patterns_and_folders_are_expanded_once(here: list[str], capsys: Captured) -> None:
    Path("photos", "more").mkdir()
    Path("photos", "more", "e.JPG").write_bytes(image_bytes(10, "JPEG"))
    Path("photos", "[f].png").write_bytes(image_bytes(10))
    assert start([*here, "photos/[a-b].png", "photos", "photos/[f].png", "--out", "r.csv"]) == 0
    more = ["photos/[f].png", *PHOTOS[2:], "photos/more/e.JPG"]
    assert files("r.csv") == [*PHOTOS[:2], *more]
    assert start([*here, "photos/**/*.JPG", "--out", "s.csv"]) == 0
    assert files("s.csv") == ["photos/more/e.JPG"]


def test_names_of_any_kind(here: list[str]) -> None:
    names = [
        "a, b.png",
        'say "x".png',
        "new\nline.png",
        "ä.png",
        b"\xff.png".decode(errors="surrogateescape"),
    ]
    for name in names:
        Path("photos", name).write_bytes(image_bytes(0))
    for _ in range(2):
        assert start([*here, "photos", "--out", "r.csv"]) == 0
        assert len(rows("r.csv")) == 4 + len(names)
    assert {f"photos/{name}" for name in names[:-1]} | {"photos/\\xff.png"} <= set(files("r.csv"))


def test_the_time_for_all_chooses_the_tier(here: list[str], capsys: Captured) -> None:
    assert start([*here, "photos", "--out", "r.csv", "--total-time", "10m"]) == 0
    assert {row[1] for row in rows("r.csv")} == {"full"}
    capsys.readouterr()
    assert start([*here, "photos", "--out", "s.csv", "--total-time", "0.001s"]) == 0
    assert {row[1] for row in rows("s.csv")} == {"fast"}
    assert "--total-time is too short even for tier fast" in capsys.readouterr().err


def test_overlays_veil_what_was_dropped(here: list[str]) -> None:
    for name in ("photos/a.png", str(Path("photos/b.png").resolve()), "../" + Path.cwd().name):
        command = [*here, name, "--tier", "fast", "--explain", "photos/overlays"]
        assert start([*command, "--out", f"{len(name)}.csv"]) == 0
    picture = np.asarray(Image.open("photos/overlays/photos/a.png.png"))
    assert picture.shape == (224, 224, 3)
    patches = picture[::56, ::56, 0].ravel()  # 4 x 4 patches; the simulated engine keeps 0, 1, 2
    assert (patches[:3] == 0).all()
    assert (patches[3:] > 150).all()
    with Image.open("photos/overlays/contact-sheet.png") as sheet:
        assert sheet.size == (4 * 120 + 8, 148 + 8)  # of the last run, which had four images
    absolute = str(Path("photos/b.png").resolve())
    assert Path(f"photos/overlays/{absolute}.png").is_file()
    assert len(list(Path("photos/overlays/__").rglob("*.png"))) == 4  # not the overlays' own


@pytest.mark.parametrize(
    ("words", "line"),
    [
        (["photos", "--out", "r.txt"], "--out r.txt: unknown suffix '.txt'; use .csv, .jsonl or"),
        (["photos", "--out", "r"], "--out r: unknown suffix ''"),
        (["photos", "--out", "no/r.csv"], "--out no/r.csv: No such file or directory"),
        (["photos", "--out", "photos/a.png/r.csv"], "--out photos/a.png/r.csv: Not a directory"),
        (["photos", "--tier", "turbo"], "tier 'turbo' is unknown; choose one of fast, balanced,"),
        (["photos", "--bundle", "no"], "no bundle at no"),
        (["*.gif"], "no images: *.gif: no file matches this pattern"),
        (["empty"], "no images: empty: a folder without images"),
        (["photos", "--out", "r.csv", "--explain", "photos/a.png"], "--explain photos/a.png: File"),
    ],
)
def test_one_line_for_each_mistake(
    words: list[str], line: str, here: list[str], capsys: Captured
) -> None:
    Path("empty").mkdir()
    assert start([*here, *words]) == 1
    [first, *_] = capsys.readouterr().err.splitlines()
    assert first.startswith(f"pcae-serve: {line}")
    assert not list(Path().glob("r*"))  # nothing is begun


def test_a_full_disk_is_one_line_and_the_file_can_be_continued(here: list[str]) -> None:
    """A limit of file size stands in for the disk."""
    for i in range(60):
        Path("photos", f"{i:02}.png").write_bytes(image_bytes(0))
    command = (*COMMAND, *here, "photos", "--out", "r.csv")
    limited = ("bash", "-c", 'ulimit -f 1 && exec "$@"', "bash", *command)
    done = subprocess.run(limited, capture_output=True, text=True, timeout=120)
    assert done.returncode == 1
    stopped, line = done.stderr.splitlines()
    assert stopped.startswith("pcae-serve: stopped after ")
    assert line == "pcae-serve: --out r.csv: File too large"
    assert start([*here, "photos", "--out", "r.csv"]) == 0
    assert len(set(files("r.csv"))) == len(files("r.csv")) == 64


def test_a_reader_of_only_the_first_line_ends_the_command_quietly(here: list[str]) -> None:
    command = (*COMMAND, *here, *["photos"] * 500)
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        assert process.stdout.readline()
        process.stdout.close()
        assert process.stderr.read() == b""
        assert process.wait(timeout=60) == 1


def test_other_settings_are_refused(here: list[str], capsys: Captured) -> None:
    command = [*here, "photos", "--out", "r.csv"]
    assert start([*command, "--top-k", "2"]) == 0
    before = Path("r.csv").read_bytes()
    capsys.readouterr()
    for flags, message in (
        ([], "was written with top_k 2, not 1; use the same settings, choose another name, or"),
        (["--top-k", "2", "--tier", "fast"], "was written with tier auto, not fast"),
        (["--top-k", "2", "--total-time", "1h"], "was written with total_time False, not True"),
    ):
        assert start([*command, *flags]) == 1
        [line] = capsys.readouterr().err.splitlines()
        assert line.startswith(f"pcae-serve: --out r.csv exists and {message}")
    Path("r.csv.run.json").unlink()
    assert start([*command, "--top-k", "2"]) == 1
    assert "cannot be continued, because r.csv.run.json is missing" in capsys.readouterr().err
    assert Path("r.csv").read_bytes() == before


def test_a_bundle_of_features_has_no_classes(
    here: list[str], tmp_path: Path, capsys: Captured
) -> None:
    root = write_bundle(tmp_path / "features", labels=[])
    manifest = (root / "bundle.json").read_text()
    (root / "bundle.json").write_text(
        manifest.replace('"pooling"', '"answers":"features","pooling"')
    )
    assert start([*here, "photos", "--bundle", str(root)]) == 1
    assert "compute features and have no classes" in capsys.readouterr().err


def test_parquet_needs_its_extra(
    here: list[str], capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "pyarrow", None)
    monkeypatch.delitem(sys.modules, "pyarrow.parquet", raising=False)
    assert start([*here, "photos", "--out", "r.parquet"]) == 1
    [line] = capsys.readouterr().err.splitlines()
    assert line == "pcae-serve: a .parquet file needs pyarrow: pip install '.[parquet]'"


def test_the_installed_command_on_the_demo(tmp_path: Path) -> None:
    """As `pcae-serve` is started, with the real engine; the answers are those of `load`."""
    command = (
        *COMMAND,
        "classify",
        SAMPLES,
        "--out",
        tmp_path / "r.csv",
        "--explain",
        tmp_path / "x",
    )
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    demo, summary = done.stderr.splitlines()
    assert demo.startswith("pcae-serve: the demo bundle answers; --bundle names another one")
    assert summary.startswith(f"pcae-serve: {tmp_path / 'r.csv'}: 5 images at ")
    with pcae_serve.load() as model:
        samples = sorted(SAMPLES.glob("*.png"))
        expected = [
            [str(sample), answer.tier, best.label, str(best.index), str(best.probability)]
            for sample, answer in zip(samples, model.classify(samples), strict=True)
            for best in answer.predictions[:1]
        ]
    assert rows(str(tmp_path / "r.csv")) == expected
    assert len(list((tmp_path / "x").rglob("*.png"))) == 5 + 1  # and a sheet of them


def test_a_bundle_by_name(
    here: list[str], hub: Hub, monkeypatch: pytest.MonkeyPatch, capsys: Captured
) -> None:
    commit = hub.add("me/b", Path("bundle")).commit("main")
    assert start(["classify", "--bundle", "hf://me/b", "--backend", "simulated", PHOTOS[0]]) == 0
    output = capsys.readouterr()
    assert output.out.startswith(f"{PHOTOS[0]}  dark ")
    assert f"hf://me/b, commit {commit}" in output.err
    monkeypatch.setenv("PCAE_BUNDLE", "hf://me/none")
    assert start(["classify", "--backend", "simulated", PHOTOS[0]]) == 1
    assert "hf://me/none: the hub has no model of this name" in capsys.readouterr().err
