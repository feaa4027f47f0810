"""Draw the patches that a model keeps (paper, Figure 2) and its tokens' diversity (Figure 3)."""

import io
import json
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import cycle
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, NamedTuple, Self

import torch
from pydantic import BaseModel, BeforeValidator, Field, model_validator
from pydantic_settings import CliPositionalArg, NoDecode
from torch import Tensor

from pcae_serve.bundle.preprocess import MAX_PIXELS, Preprocess
from pcae_serve.errors import PcaeError, RequestError
from pcae_serve.flags import Metavar
from pcae_serve.loadtest import plot_style
from pcae_serve.sources.locate import locate_checkpoint
from pcae_serve.sources.names import ModelName
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_folders import Layout
from pcae_training.data import load, to_pixels
from pcae_training.data_settings import LAYOUT_HELP
from pcae_training.diversity import measure_layers
from pcae_training.evaluate import (
    Ratios,
    choose_ratios,
    normalise,
    open_checkpoint,
    row_noise,
)
from pcae_training.import_weights import WeightsChoice
from pcae_training.inventory import print_lines
from pcae_training.output import check_writable, write_whole
from pcae_training.progress import Progress
from pcae_training.world import join

if TYPE_CHECKING:  # imported on use, because importing it writes caches
    from matplotlib.figure import Figure

#: Grey level of dropped patches: darker than the page and than most highlights of photographs.
DROPPED_GREY = 192

#: Small images are scaled up by a whole factor to at least this width, in pixels.
MIN_SIDE = 224

#: Margin around panels, and height of their titles, in pixels.
GAP, TITLE = 8, 28

#: Pixels per inch: a power of two, so that sizes in pixels are exact.
DPI = 128

#: Letters 14 pixels high.
FONT_POINTS = 14 * 72 / DPI

#: Images per batch.
BATCH = 32


def _paths(value: object) -> object:
    """Split a comma-separated text into paths."""
    return value.split(",") if isinstance(value, str) else value


def _rows(value: object) -> object:
    """Parse row numbers and ranges separated by commas: 0-3,17 is 0, 1, 2, 3, 17."""
    if not isinstance(value, str):
        return value
    rows: list[int] = []
    for part in value.strip("[]()").split(","):
        first, _, last = part.strip().partition("-")
        last = last or first
        if not (first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise ValueError(f"rows must be numbers and ranges, such as 0-3,17, not {value!r}")
        rows.extend(range(int(first), int(last) + 1))
    return rows


class VisualizeSettings(BaseModel):
    """Draw which patches a checkpoint keeps of images, or the diversity of its tokens."""

    checkpoint: Annotated[CliPositionalArg[ModelName], Metavar("CHECKPOINT")] = Field(
        description="run or checkpoint of pcae-train, a Hugging Face or timm folder, or a name on"
        " the hub"
    )
    image: Annotated[tuple[Path, ...], NoDecode, BeforeValidator(_paths)] = Field(
        (), description="image files, separated by commas or by repeating the flag"
    )
    weights: WeightsChoice | None = Field(
        None,
        description="which weights to take from a file with raw and averaged ones; default:"
        " the averaged ones, ema",
    )
    data: str | None = Field(None, description="also draw images of this data set, see --rows")
    split: str = Field("test", description="split of --data")
    layout: Layout = Field("auto", description=LAYOUT_HELP)
    rows: Annotated[tuple[int, ...], NoDecode, BeforeValidator(_rows)] = Field(
        (0, 1, 2, 3), min_length=1, description="rows of --data, such as 0-3,17"
    )
    out: Path = Field(description="one .png file for all images, or a folder for one per image")
    budgets: Ratios = Field(
        None, description="keep ratios separated by commas; default: those trained for"
    )
    diversity: bool = Field(
        False, description="draw the tokens' diversity by layer, and write the figures as JSON"
    )
    device: str = Field("cpu", pattern=r"^(cpu|cuda(:\d+)?)$", description="cpu, cuda or cuda:N")

    @model_validator(mode="after")
    def _has_images(self) -> Self:
        if not self.image and self.data is None:
            raise ValueError("nothing to draw; give --image or --data")
        return self

    @property
    def file(self) -> Path | None:
        """The file to write, or None if --out is a folder. Raise PcaeError if it is neither."""
        if self.out.is_dir() or not self.out.suffix:
            return None
        if self.out.suffix.lower() != ".png":
            raise PcaeError(f"--out {self.out} is neither a .png file nor an existing folder")
        return self.out


class Picture(NamedTuple):
    """An image, decoded when it is drawn."""

    number: int  # index among all pictures, which seeds the `random` rule
    name: str  # of the output file
    place: str  # for error messages
    body: Callable[[], bytes]

    def pixels(self, preprocess: Preprocess) -> Tensor:
        """Return uint8 [3, S, S], preprocessed as in the server. Raise PcaeError."""
        try:
            return to_pixels(preprocess, self.body())
        except OSError as error:
            raise PcaeError(f"cannot read the image {self.place}: {error.strerror}") from None
        except RequestError as error:
            raise PcaeError(f"{self.place}: {error}") from None


class Panel(NamedTuple):
    """One image of a sheet, with its title."""

    title: str
    pixels: Tensor  # uint8 [3, S, S]


def visualize(settings: VisualizeSettings) -> list[Path]:
    """Draw the images that the settings name, and return the files written.

    Kept patches: all images in one .png, or one each in a folder. Diversity: a chart and a JSON
    file with its figures. Each file is written atomically. Raise PcaeError.
    """
    path = locate_checkpoint(settings.checkpoint, print_lines)
    checkpoint = open_checkpoint(path, settings.weights)
    ratios = choose_ratios(checkpoint, settings.budgets)
    if settings.budgets is None:  # 1.0 drops nothing: it is for curves alone
        smaller = tuple(ratio for ratio in ratios if ratio < 1)
        ratios = (1.0, *smaller) if settings.diversity else smaller or ratios
    pictures = list(_pictures(settings, checkpoint.preprocess))
    files = _files(settings, pictures)
    with join(settings.device) as world:
        checkpoint.model.to(world.device)
        if settings.diversity:
            curves = measure_diversity(checkpoint, pictures, ratios)
            contents = iter([draw_chart(curves), curves.to_json()])
        else:
            groups = [pictures] if settings.file else [[picture] for picture in pictures]
            contents = (draw_sheet(kept_panels(checkpoint, group, ratios)) for group in groups)
        for file, content in zip(files, contents, strict=True):
            write_whole(file, content)
    return files


@torch.inference_mode()
def kept_panels(
    checkpoint: Checkpoint, pictures: Sequence[Picture], ratios: Sequence[float]
) -> list[list[Panel]]:
    """Return a row of panels per picture and keep ratio: the model's input, then each stage."""
    model, preprocess = checkpoint.model, checkpoint.preprocess
    config, device = model.config, model.device
    rows = []
    for picture in pictures:
        pixels = picture.pixels(preprocess)
        images = normalise(pixels[None].to(device), preprocess)
        noise = row_noise(config, [picture.number], device)
        for ratio in ratios:
            counts = config.geometry.counts(ratio)
            _, kept = model.classify(images, counts, noise=noise)
            before = (config.geometry.patches, *counts)
            rows.append([Panel(f"keep {ratio:g}: {before[0]} patches", pixels)])
            for n, m, index in zip(before, counts, kept, strict=False):
                left = hide_dropped(pixels, index[0].cpu(), config.patch_size)
                rows[-1].append(Panel(f"{n} → {m}", left))
    return rows


def hide_dropped(pixels: Tensor, kept: Tensor, patch_size: int) -> Tensor:
    """Return the image [3, S, S] with all patches except `kept` [m], counted by row, in grey."""
    grid = pixels.shape[-1] // patch_size
    mask = torch.zeros(grid * grid, dtype=torch.bool)
    mask[kept] = True
    mask = mask.view(grid, grid)
    for dim in (0, 1):
        mask = mask.repeat_interleave(patch_size, dim)
    return pixels.masked_fill(~mask, DROPPED_GREY)


def draw_sheet(rows: Sequence[Sequence[Panel]]) -> bytes:
    """Draw rows of panels of one size as a PNG file, small ones scaled up by a whole factor.

    Raise PcaeError if the file would have more than MAX_PIXELS pixels.
    """
    from matplotlib.figure import Figure

    size = rows[0][0].pixels.shape[-1]
    scale = -(-MIN_SIDE // size)
    cell, line = size * scale + GAP, size * scale + TITLE
    width, height = len(rows[0]) * cell + GAP, len(rows) * line + GAP
    if width * height > MAX_PIXELS:
        raise PcaeError(
            f"{len(rows)} rows of panels do not fit into one file; give a folder, or fewer images"
        )
    figure = Figure(figsize=(width / DPI, height / DPI), dpi=DPI, facecolor="white")
    for i, row in enumerate(rows):
        for j, panel in enumerate(row):
            left, top = GAP + j * cell, height - i * line  # pixels from the lower left corner
            large = panel.pixels.repeat_interleave(scale, 1).repeat_interleave(scale, 2)
            figure.figimage(large.permute(1, 2, 0).numpy(), left, top - line, origin="upper")
            middle = (top - TITLE / 2) / height
            figure.text(left / width, middle, panel.title, va="center", fontsize=FONT_POINTS)
    return _png(figure)


@dataclass(frozen=True)
class Curves:
    """The diversity of patch tokens at every layer, averaged over images."""

    images: int
    stages: tuple[int, ...]  # layers after which patches are dropped; layer 0 is the input
    values: dict[float, list[float]]  # by keep ratio: nuclear norm per token, [depth + 1]

    def to_json(self) -> bytes:
        """Return the curves as a JSON file."""
        content = {
            "measure": "nuclear norm of the unit-length patch tokens, divided by their number",
            "images": self.images,
            "stages": self.stages,
            "curves": [
                {"keep_ratio": ratio, "values": values} for ratio, values in self.values.items()
            ],
        }
        return (json.dumps(content, indent=2) + "\n").encode()


def measure_diversity(
    checkpoint: Checkpoint, pictures: Sequence[Picture], ratios: Sequence[float]
) -> Curves:
    """Return a curve for each keep ratio, averaged over all pictures."""
    model, preprocess = checkpoint.model, checkpoint.preprocess
    config, device = model.config, model.device
    totals = {ratio: torch.zeros(config.depth + 1) for ratio in ratios}
    with Progress("measuring diversity", len(pictures)) as progress:
        for start in range(0, len(pictures), BATCH):
            batch = pictures[start : start + BATCH]
            pixels = torch.stack([picture.pixels(preprocess) for picture in batch])
            images = normalise(pixels.to(device), preprocess)
            noise = row_noise(config, [picture.number for picture in batch], device)
            for ratio, total in totals.items():
                counts = config.geometry.counts(ratio)
                mean = measure_layers(model, images, counts, noise=noise)
                total += mean.cpu() * len(batch)
            progress.update(len(batch))
    return Curves(
        images=len(pictures),
        stages=tuple(point + 1 for point in config.reduction_points),
        values={ratio: (total / len(pictures)).tolist() for ratio, total in totals.items()},
    )


def draw_chart(curves: Curves) -> bytes:
    """Draw the curves as a PNG file, with dotted lines at the layers that drop patches."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4.5), dpi=DPI, facecolor="white", layout="constrained")
    axes = figure.add_subplot()
    for stage in curves.stages:
        axes.axvline(stage, color="0.7", linestyle=":")
    looks = cycle(zip(plot_style.COLOURS, plot_style.MARKERS, strict=False))
    for (ratio, values), (colour, marker) in zip(curves.values.items(), looks, strict=False):
        label = f"keep {ratio:g}"
        axes.plot(range(len(values)), values, color=colour, marker=marker, label=label)
    axes.set_xlabel("layer (0: input tokens; dotted: patches are dropped)")
    axes.set_ylabel("nuclear norm / tokens")
    title = f"Diversity of patch tokens, mean of {curves.images:,} images"
    axes.set_title(plot_style.dated(title), fontsize=plot_style.TITLE)
    plot_style.style(axes)
    axes.legend(fontsize=plot_style.LABEL, frameon=False)
    return _png(figure)


def _pictures(settings: VisualizeSettings, preprocess: Preprocess) -> Iterator[Picture]:
    """Yield the image files, then the rows of the data set."""
    for number, path in enumerate(settings.image):
        yield Picture(number, path.stem, str(path), path.read_bytes)
    if settings.data is None:
        return
    images = load(settings.data, settings.split, preprocess, labelled=False, layout=settings.layout)
    for number, row in enumerate(settings.rows, start=len(settings.image)):
        if row >= len(images):
            raise PcaeError(f"--rows: {images.name} has {len(images)} rows, but no row {row}")
        place = f"{images.name}, row {row}"
        yield Picture(number, f"row-{row}", place, partial(images.body, row))


def _files(settings: VisualizeSettings, pictures: Sequence[Picture]) -> list[Path]:
    """Return the files to write. Raise PcaeError if one is not writable or is an input image."""
    file, folder = settings.file, settings.out
    if settings.diversity:
        chart = file or folder / "diversity.png"
        files = [chart, chart.with_suffix(".json")]
    elif file is not None:
        files = [file]
    else:
        names = [f"{picture.name}-kept" for picture in pictures]
        for i, name in enumerate(names):
            if name in names[:i]:
                names[i] = f"{name}-{i}"
        files = [folder / f"{name}.png" for name in names]
    read = {path.resolve() for path in settings.image}
    for target in files:
        if target.resolve() in read:
            raise PcaeError(f"--out would overwrite the image {target}; choose another --out")
        check_writable(target)
    return files


def _png(figure: "Figure") -> bytes:
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=DPI)
    return buffer.getvalue()
