import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from numpy.typing import NDArray
from PIL import Image
from pydantic import ValidationError
from pydantic_settings import BaseSettings, CliApp, CliSubCommand

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.command import config, run
from pcae_serve.errors import PcaeError
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.diversity import measure_layers
from pcae_training.evaluate import normalise, row_noise
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.visualize import (
    DROPPED_GREY,
    GAP,
    TITLE,
    Curves,
    Panel,
    VisualizeSettings,
    draw_chart,
    draw_sheet,
    visualize,
)

PREPROCESS = Preprocess(8, 8, (0.5, 0.4, 0.3), (0.5, 0.25, 0.2))
TINY = ViTConfig(8, 2, width=8, heads=2, classes=2)
SCALE = 28  # 8 pixels to 224
Pixels = NDArray[np.uint8]


def vit(config: ViTConfig = TINY) -> VisionTransformer:
    torch.manual_seed(0)
    return VisionTransformer(config).eval()


@pytest.fixture
def settings(tmp_path: Path) -> Any:
    """Settings that draw from a checkpoint with a tiny model of `config`, trained so."""

    def make(
        config: ViTConfig = TINY, training: dict[str, Any] | None = None, **changes: Any
    ) -> VisualizeSettings:
        folder = tmp_path / "checkpoint"
        checkpoint = Checkpoint(vit(config), PREPROCESS, ["bright", "dark"], training or {})
        checkpoints.save(checkpoint, folder)
        return VisualizeSettings(checkpoint=folder, **changes)

    return make


@pytest.fixture
def files(tmp_path: Path) -> list[Path]:
    """Two images of the model's size, and one that is cropped to it."""
    rng, paths = np.random.default_rng(5), []
    for name, shape in (("one", (8, 8, 3)), ("two", (8, 8, 3)), ("wide", (8, 20, 3))):
        paths.append(tmp_path / f"{name}.png")
        Image.fromarray(rng.integers(0, 200, shape, dtype=np.uint8)).save(paths[-1])
    return paths


def seen(path: Path) -> Pixels:
    """An image as the model sees it: the centre of 8 x 8."""
    pixels = read(path)
    left = (pixels.shape[1] - 8) // 2
    return pixels[:, left : left + 8]


def model_input(path: Path) -> torch.Tensor:
    return normalise(torch.tensor(seen(path)).permute(2, 0, 1)[None], PREPROCESS)


def panel(sheet: Pixels, row: int, column: int) -> Pixels:
    """One panel cut out of a sheet, scaled up as it is."""
    side = 8 * SCALE
    top, left = row * (TITLE + side) + TITLE, GAP + column * (GAP + side)
    return sheet[top : top + side, left : left + side]


def masked(image: Pixels, kept: list[int]) -> Pixels:
    """What a panel should be, a pixel at a time: patches of 2, 4 in a row, each pixel 28 wide."""
    out = np.empty((8 * SCALE, 8 * SCALE, 3), np.uint8)
    for y in range(8):
        for x in range(8):
            patch = (y // 2) * 4 + x // 2
            colour = image[y, x] if patch in kept else (DROPPED_GREY,) * 3
            out[y * SCALE : (y + 1) * SCALE, x * SCALE : (x + 1) * SCALE] = colour
    return out


def read(path: Path) -> Pixels:
    with Image.open(path) as image:
        assert image.format == "PNG"
        return np.asarray(image.convert("RGB"))


def test_panels_show_the_patches_left_pixel_by_pixel(settings: Any, files: list[Path]) -> None:
    out = files[0].parent / "out" / "sheet.png"
    assert visualize(settings(image=files, budgets=(0.8, 0.5), out=out)) == [out]
    sheet = read(out)
    assert sheet.shape == (GAP + 6 * (TITLE + 224), GAP + 4 * (GAP + 224), 3)
    model, row = vit(), 0
    for path in files:
        for counts in ((12, 9, 7), (8, 4, 2)):
            _, kept = model.classify(model_input(path), counts)
            assert np.array_equal(panel(sheet, row, 0), masked(seen(path), list(range(16))))
            for stage, index in enumerate(kept):
                expected = masked(seen(path), index[0].tolist())
                assert np.array_equal(panel(sheet, row, stage + 1), expected)
            row += 1
    margin = sheet[:, :GAP]
    assert (margin == 255).all()
    assert (sheet[:TITLE] < 128).any()  # a title is written


def test_titles_count_the_patches(
    settings: Any, files: list[Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    titles: list[list[str]] = []

    def note(rows: list[list[Panel]]) -> bytes:
        titles.extend([panel.title for panel in row] for row in rows)
        return b""

    monkeypatch.setattr("pcae_training.visualize.draw_sheet", note)
    visualize(settings(image=files[:1], budgets="0.7,1.0", out=files[0].with_name("x.png")))
    assert titles == [
        ["keep 1: 16 patches", "16 → 16", "16 → 16", "16 → 16"],
        ["keep 0.7: 16 patches", "16 → 11", "11 → 7", "7 → 4"],
    ]


def test_a_folder_takes_a_file_for_each_image(
    settings: Any, files: list[Path], class_folders: Any
) -> None:
    (files[0].parent / "other").mkdir()
    same_name = files[0].rename(files[0].parent / "other" / "two.png")
    out, data = files[0].parent / "drawn", str(class_folders(3, split="test"))
    written = visualize(
        settings(image=(files[1], same_name), data=data, rows="1,4-5", budgets=(0.5,), out=out)
    )
    names = ["two-kept.png", "two-kept-1.png", "row-1-kept.png", "row-4-kept.png", "row-5-kept.png"]
    assert written == [out / name for name in names]
    assert sorted(path.name for path in out.iterdir()) == sorted(names)
    sources = [files[1], same_name, *sorted((Path(data) / "test" / "bright").iterdir())[1:2]]
    for path, source in zip(written, sources, strict=False):
        assert np.array_equal(panel(read(path), 0, 0), masked(seen(source), list(range(16))))


@pytest.mark.parametrize(
    ("training", "rows"),
    [({"settings": {"budgets": [1.0, 0.5]}}, 1), ({"settings": {"budgets": [1.0]}}, 1), ({}, 4)],
)
def test_budgets_that_drop_nothing_are_drawn_only_when_asked_for(
    settings: Any, files: list[Path], training: dict[str, Any], rows: int
) -> None:
    out = files[0].with_name("sheet.png")
    visualize(settings(training=training, image=files[:1], out=out))
    assert len(read(out)) == GAP + rows * (TITLE + 224)


def test_large_images_are_not_scaled() -> None:
    pixels = torch.zeros(3, 256, 256, dtype=torch.uint8)
    with Image.open(io.BytesIO(draw_sheet([[Panel("a", pixels), Panel("b", pixels)]]))) as image:
        assert image.size == (GAP + 2 * (256 + GAP), GAP + TITLE + 256)


def test_a_sheet_that_nothing_could_open_is_refused() -> None:
    pixels = torch.zeros(3, 224, 224, dtype=torch.uint8)
    with pytest.raises(PcaeError, match="1000 rows of panels do not fit into one file"):
        draw_sheet([[Panel("", pixels)] * 4] * 1000)


@pytest.mark.parametrize("reduction", ["ptr", "random"])
def test_curves_are_the_mean_over_images(
    settings: Any, files: list[Path], reduction: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("pcae_training.visualize.BATCH", 2)  # batches of 2 and 1
    tiny, out = replace(TINY, reduction=reduction), files[0].with_name("curves.png")
    asked = settings(tiny, {"settings": {"keep": 0.5}}, image=files, out=out, diversity=True)
    numbers = out.with_suffix(".json")
    assert visualize(asked) == [out, numbers]
    assert read(out).shape == (576, 896, 3)
    content = json.loads(numbers.read_text())
    assert (content["images"], content["stages"]) == (3, [1, 8, 11])
    assert [curve["keep_ratio"] for curve in content["curves"]] == [1.0, 0.5]
    model, device = vit(tiny), torch.device("cpu")
    for curve, counts in zip(content["curves"], [(16, 16, 16), (8, 4, 2)], strict=True):
        each = [
            measure_layers(model, model_input(path), counts, noise=row_noise(tiny, [i], device))
            for i, path in enumerate(files)
        ]
        assert curve["values"] == pytest.approx(torch.stack(each).mean(dim=0).tolist(), abs=1e-5)


def test_a_chart_has_a_line_for_each_budget() -> None:
    flat = Curves(2, (1,), {1.0: [0.5, 0.5]})
    two = Curves(2, (1,), {1.0: [0.5, 0.5], 0.5: [0.5, 0.9]})
    charts = []
    for curves in (flat, two):
        with Image.open(io.BytesIO(draw_chart(curves))) as image:
            pixels = np.asarray(image.convert("RGB"))
        colours = {tuple(pixel) for pixel in pixels.reshape(-1, 3).tolist()}
        charts.append(len({(0, 114, 178), (230, 159, 0)} & colours))  # our first two
    assert charts == [1, 2]


def test_what_cannot_be_drawn(settings: Any, files: list[Path], class_folders: Any) -> None:
    folder, data = files[0].parent, str(class_folders(2, split="test"))
    (folder / "text.png").write_text("no image")
    (folder / "file").touch()
    out = folder / "out.png"
    cases: list[tuple[dict[str, Any], str]] = [
        ({"image": (folder / "none.png",), "out": out}, "none.png: No such file"),
        ({"image": (folder / "text.png",), "out": out}, "text.png: unknown image type"),
        ({"image": (folder,), "out": out}, "cannot read the image"),
        ({"image": files, "out": folder / "x.jpg"}, "neither a .png file nor an existing folder"),
        ({"image": files, "out": folder / "file" / "x.png"}, "not a writable folder"),
        ({"image": files, "out": folder / "file"}, "not a writable folder"),
        ({"image": files, "out": files[1]}, "would overwrite the image"),
        ({"data": data, "rows": "0,4", "out": out}, "has 4 rows, but no row 4"),
        ({"image": files, "out": out, "budgets": ".2"}, "leaves no patch"),
    ]
    for changes, message in cases:
        with pytest.raises(PcaeError) as caught:
            visualize(settings(**changes))
        assert message in str(caught.value)
        assert "\n" not in str(caught.value)
    assert not out.exists()
    assert read(files[1]).shape == (8, 8, 3)
    with pytest.raises(PcaeError, match="checkpoint not found"):
        visualize(VisualizeSettings(checkpoint=folder / "none", image=tuple(files), out=out))


@pytest.mark.parametrize(
    "changes",
    [{}, {"data": "x", "rows": "3-1"}, {"data": "x", "rows": "a"}, {"data": "x", "rows": ()}],
)
def test_settings_that_draw_nothing(changes: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        VisualizeSettings(checkpoint=Path("x"), out=Path("y.png"), **changes)


def test_flags_name_the_settings(capsys: pytest.CaptureFixture[str]) -> None:
    class Visualize(VisualizeSettings):
        def cli_cmd(self) -> None:
            print(self.checkpoint, *self.image, self.data, self.rows, self.budgets, self.diversity)

    class Command(BaseSettings):
        model_config = config("test")
        visualize: CliSubCommand[Visualize]

        def cli_cmd(self) -> None:
            CliApp.run_subcommand(self)

    images = ["--image", "a b.png,[1].png", "--image", "it's.png"]
    flags = ["--data", "d", "--rows", "0-2,7", "--budgets", ".5,1", "--diversity", "--out", "o"]
    assert run(Command, ["visualize", "runs/x", *images, *flags]) == 0
    expected = "runs/x a b.png [1].png it's.png d (0, 1, 2, 7) (1.0, 0.5) True\n"
    assert capsys.readouterr().out == expected
    assert run(Command, ["visualize", "runs/x", "--out", "o"]) == 2
    assert "nothing to draw; give --image or --data" in capsys.readouterr().err
