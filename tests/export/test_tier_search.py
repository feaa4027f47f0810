"""--tiers auto, by the command: a bundle with measured tiers, the table and the drawing."""

import re
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest

from pcae_export import tier_search
from pcae_export.commands import Export
from pcae_export.front_report import FRONT_IMAGE
from pcae_export.tier_front import Candidate, Front, choose_tiers
from pcae_export.verify import Parity, ParityError
from pcae_serve.bundle.reader import Bundle, load_bundle
from pcae_serve.command import run
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from tests.support.exporting import bundled, fails

AUTO = ("--tiers", "auto", "--half", "none")


@pytest.fixture(autouse=True)
def short(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tier_search, "TIMING_S", 0.2)
    monkeypatch.setattr(tier_search, "SPACING", tier_search.SPACING * 3)


def candidates(card: str) -> list[list[str]]:
    """Cells of the table's rows: keep ratio, precision, ms, quality, tier."""
    table, _, _ = card.partition(f"]({FRONT_IMAGE})")
    rows = [line.removeprefix("| ").removesuffix(" |").split(" | ") for line in table.splitlines()]
    return [cells for cells in rows if "int8" in cells or "float32" in cells]


def test_tiers_are_measured_chosen_and_shown(
    made: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    # random weights give near ties, in which int8 may be refused: it has a test of its own
    flags = (*AUTO, "--eval-data", data, "--no-int8")
    bundle = bundled(made.checkpoint, tmp_path / "out", *flags)
    card = (bundle.root / "README.md").read_text()
    table = candidates(card)
    assert sorted((float(cells[0]), cells[1]) for cells in table) == [
        (ratio, "float32") for ratio in (0.4, 0.7, 1.0)
    ]
    assert [float(cells[2]) for cells in table] == sorted(float(cells[2]) for cells in table)
    in_table = {cells[4]: (float(cells[0]), cells[1]) for cells in table}
    in_bundle = {tier.name: (tier.keep_ratio, tier.precision) for tier in bundle.tiers}
    assert in_bundle == {name: in_table[name] for name in in_bundle}
    assert in_bundle["full"] == (1, "float32")
    assert "Tiers chosen by `--tiers auto` on 36 images" in card
    assert {tier.accuracy.n for tier in bundle.tiers if tier.accuracy} == {36}  # the other half
    assert f"]({FRONT_IMAGE})" in card
    assert FRONT_IMAGE in bundle.manifest.files
    drawing = ElementTree.parse(bundle.root / FRONT_IMAGE)  # our own
    words = {text.text for text in drawing.iter() if text.tag.endswith("text")}
    assert "top-1, %" in words
    assert {f"{name} ({ratio:g})" for name, (ratio, _) in in_bundle.items()} <= words
    assert "Tiers chosen by" in capsys.readouterr().out


@pytest.mark.slow
def test_int8_that_differs_too_much_is_left_out(
    made: Any, data: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:  # fmt: skip
    """Every int8 candidate is chosen, then refused."""

    def choose(found: list[Candidate], *rest: Any) -> Front:
        front = choose_tiers(found, *rest)
        int8 = any(candidate.tier.precision == "int8" for candidate in found)
        return replace(front, chosen=tuple(found)) if int8 else front

    def refuse(draft: Bundle, *rest: object) -> Parity:
        assert {tier.precision for tier in draft.tiers} == {"int8"}
        raise ParityError("tier 'x': int8 gives another answer")

    monkeypatch.setattr(tier_search, "choose_tiers", choose)
    monkeypatch.setattr(tier_search, "verify_model", refuse)
    bundle = bundled(made.checkpoint, tmp_path / "out", *AUTO, "--eval-data", data)
    err = capsys.readouterr().err
    for ratio in ("0.4", "0.7", "1"):
        assert f"note: keep ratio {ratio} in int8 (vit) is left out: tier 'x': int8 gives" in err
    assert {tier.precision for tier in bundle.tiers} == {"float32"}


def test_only_the_int8_tier_that_differs_is_left_out(
    made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    tiers = [
        made.bundle.tiers[0].model_copy(update={"name": name, "precision": "int8"})
        for name in ("good", "bad")
    ]
    front = Front((), (), tuple(Candidate(tier, None, 1.0) for tier in tiers), 0.0)  # type: ignore[arg-type]

    def verify(draft: Bundle, *_: object) -> None:
        if "bad" in [tier.name for tier in draft.tiers]:
            raise ParityError("differs")

    monkeypatch.setattr(tier_search, "verify_model", verify)
    search = tier_search.TierSearch(None, (), None, 0.1)  # type: ignore[arg-type]
    parts, proven = {tiers[0].model: SimpleNamespace(checkpoint=None)}, set[str]()
    assert search._refuse_int8(made.bundle, parts, front, proven) == {"bad"}  # type: ignore[arg-type]
    assert proven == {"good"}
    assert capsys.readouterr().err.count("is left out: differs") == 1


@pytest.mark.slow
def test_no_int8_as_asked(made: Any, data: Path, tmp_path: Path) -> None:
    flags = (*AUTO, "--eval-data", data, "--no-int8", "--tier-images", 60, "--limit", 5)
    bundle = bundled(made.checkpoint, tmp_path / "out", *flags)
    assert {cells[1] for cells in candidates((bundle.root / "README.md").read_text())} == {
        "float32"
    }
    assert {tier.accuracy.n for tier in bundle.tiers if tier.accuracy} == {5}
    assert "on 60 images" in (bundle.root / "README.md").read_text()


@pytest.mark.slow
def test_several_models_are_candidates(
    tiny: Callable[..., Checkpoint], made: Any, data: Path, tmp_path: Path
) -> None:
    checkpoints.save(tiny(depth=2, reduction_points=(0,)), tmp_path / "small")
    flags = ("--eval-data", data, "--no-int8", "--model-id", "large", "--parity-images", 16)
    words = ("bundle", made.checkpoint, tmp_path / "small", tmp_path / "out", *AUTO, *flags)
    assert run(Export, [str(word) for word in words]) == 0
    bundle = load_bundle(tmp_path / "out")
    models = {cells[0] for cells in candidates((bundle.root / "README.md").read_text())}
    assert models == {"large", "small"}
    assert set(bundle.manifest.models) == {tier.model for tier in bundle.tiers}


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (("IN", "OUT", "--tier", "a=0.5", "--eval-data", "x"), "give either it or --tier"),
        (("IN", "OUT"), "--tiers auto needs images to compare tiers on; give --eval-data"),
        (("OUT", "--eval-data", "x"), "--tiers auto needs a model; give SOURCE before OUT"),
        (("IN", "IN2", "OUT", "--eval-data", "x", "--agreement"), "compares several models by"),
        (("IN", "OUT", "--eval-data", "x", "--max-loss", "0"), "--max-loss"),
    ],
)
def test_flags_that_contradict(
    capsys: pytest.CaptureFixture[str], words: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, 2, "bundle", *words, "--tiers", "auto")


def test_several_sources_need_auto(capsys: pytest.CaptureFixture[str]) -> None:
    assert "several SOURCEs need --tiers auto" in fails(capsys, 2, "bundle", "a", "b", "c")


def test_no_images_are_left_to_measure_on(
    made: Any, data: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    words = (made.checkpoint, tmp_path / "out", *AUTO, "--eval-data", data, "--tier-images", 72)
    line = fails(capsys, 1, "bundle", *words)
    assert re.search("--tier-images 72 leaves none of 72 images to measure", line)
    assert not (tmp_path / "out").exists()
