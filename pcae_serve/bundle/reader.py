"""Read a bundle from disk and check its schema and the hash of every file.

The bundle is the contract between export and server; the server never writes to it.
"""

import hashlib
import posixpath
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from math import isqrt
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pcae_serve.bounded_file import open_regular, read_regular
from pcae_serve.bounded_json import parse_json, read_json
from pcae_serve.bundle import processor_config
from pcae_serve.bundle.graph_files import external_files
from pcae_serve.bundle.manifest import MANIFEST, SCHEMA_VERSION, Answers, Manifest, Tier
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import BundleError, InvalidParameter, one_line, shown

#: The demo's has 5 kB; a hundred tiers with the labels of ImageNet-21k have less than 2 MB.
MAX_MANIFEST_BYTES = 8_000_000


@dataclass(frozen=True)
class Bundle:
    """A bundle whose schema and hashes have been checked."""

    root: Path
    manifest: Manifest
    digest: str  # SHA-256 of bundle.json, which contains those of all other files

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """Return the tiers, the cheapest first."""
        return self.manifest.tiers

    def allowed_tiers(self, tier: str = "auto", min_tier: str | None = None) -> tuple[int, ...]:
        """Return indices of the tiers that a request allows, the cheapest first.

        Raises InvalidParameter if a name is unknown, or `tier` is below `min_tier`.
        """
        names = [t.name for t in self.tiers]
        known = {"tier": (*names, "auto"), "min_tier": (*names, None)}
        for parameter, name in (("tier", tier), ("min_tier", min_tier)):
            if name not in known[parameter]:
                choice = ", ".join(filter(None, known[parameter]))
                raise InvalidParameter(
                    f"{parameter} {shown(name)} is unknown; choose one of {choice}"
                )
        lowest = 0 if min_tier is None else names.index(min_tier)
        if tier != "auto":
            pinned = names.index(tier)
            if pinned < lowest:
                raise InvalidParameter(f"tier {tier!r} is below min_tier {min_tier!r}")
            return (pinned,)
        tiers = range(lowest, len(names))
        return tuple(i for i in tiers if i == lowest or not self.tiers[i].dominated)

    def dominated_above(self, allowed: Sequence[int]) -> tuple[str, ...]:
        """Return the names of dominated tiers left out of `allowed`, above its cheapest."""
        return tuple(
            tier.name
            for i, tier in enumerate(self.tiers)
            if tier.dominated and i > allowed[0] and i not in allowed
        )

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    @property
    def image_size(self) -> int:
        return next(iter(self.manifest.models.values())).image_size

    @property
    def answers(self) -> Answers:
        """Return what the models' outputs mean."""
        return next(iter(self.manifest.models.values())).answers

    def temperature(self, tier: Tier) -> float:
        """Return what a tier's logits are divided by before they become probabilities."""
        calibration = self.manifest.calibration
        return 1.0 if calibration is None else calibration.tiers[tier.name].temperature

    @property
    def output(self) -> Literal["logits", "features"]:
        """Return what the models compute."""
        return next(iter(self.manifest.models.values())).output

    @property
    def width(self) -> int:
        """Return the length of an output vector: the number of labels, or of features."""
        return len(self.labels) or next(iter(self.manifest.models.values())).width

    @property
    def patch_grid(self) -> tuple[int, int, int] | None:
        """Return the shape [H, W, D] of an image's patch grid, or None if graphs return none."""
        model = next(iter(self.manifest.models.values()))
        side = isqrt(model.patches)
        return None if model.patch_width is None else (side, side, model.patch_width)

    def file(self, model: str, name: str) -> Path:
        """Return the path of one of a model's files."""
        return self.root / "models" / model / name

    @cached_property
    def preprocess(self) -> Preprocess:
        """Return how image bytes become pixels, the same for all models.

        Graphs normalise inside, so mean and std may differ. Raises BundleError if anything else
        differs.
        """
        found = {model: self._preprocess(model) for model in self.manifest.models}
        first = found[self.tiers[0].model]
        for model, preprocess in found.items():
            if not preprocess.same_pixels(first):
                raise BundleError(
                    f"{self.root}: models {model!r} and {self.tiers[0].model!r} resize images"
                    " differently, but must share the decoded image"
                )
        return first

    def _preprocess(self, model: str) -> Preprocess:
        path = self.file(model, processor_config.FILE)
        try:
            return processor_config.read_own_processor(read_json(path))
        except (OSError, ValueError, LookupError, TypeError, AttributeError) as error:
            raise BundleError(f"{path} is not a valid preprocessor config: {error}") from None


def load_bundle(root: Path) -> Bundle:
    """Read a bundle and check its schema and hashes. Raises BundleError with a one-line reason."""
    path = root / MANIFEST
    try:
        raw = read_regular(path, MAX_MANIFEST_BYTES)
    except OSError as error:
        raise BundleError(
            f"no bundle at {root}: cannot read {MANIFEST} ({error.strerror});"
            " create one with 'pcae-export bundle'"
        ) from None
    try:
        document = parse_json(raw)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, but this server supports {SCHEMA_VERSION};"
                " update pcae-serve or export the bundle again"
            )
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path} is not a valid manifest: {where}: {message}") from None
    except ValueError as error:
        raise BundleError(f"{path} is not valid JSON: {error}") from None
    for name, expected in manifest.files.items():
        _check_hash(root, name, expected)
        if name.endswith(".onnx"):
            _check_references(root, name, manifest)
    bundle = Bundle(root, manifest, hashlib.sha256(raw).hexdigest())
    if bundle.preprocess.image_size != bundle.image_size:
        raise BundleError(f"{root}: the preprocessor's crop size is not the model's image size")
    return bundle


def file_sha256(file: Path) -> str:
    """Return the hex digest of a file, as in the manifest."""
    with open_regular(file) as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def demo_path() -> Path:
    """Return the folder of the demo bundle inside the installed package."""
    return Path(str(files("pcae_serve"))) / "demo"


def _check_references(root: Path, graph: str, manifest: Manifest) -> None:
    """Raise BundleError if a graph refers to a file whose hash is not in the manifest."""
    path = root / graph
    try:
        locations = external_files(path)
    except OSError as error:
        raise BundleError(f"cannot read {path} ({error.strerror})") from None
    except ValueError as error:
        raise BundleError(f"{path} cannot be used: {one_line(error)}") from None
    for location in sorted(locations):
        name = posixpath.normpath(posixpath.join(posixpath.dirname(graph), location))
        # opened as it is written, a path through a link to a folder would lead elsewhere
        if name not in manifest.files or not _same_file(path.parent / location, root / name):
            raise BundleError(
                f"{path} takes its data from {shown(location)}, which {MANIFEST} does not list;"
                " export the bundle again"
            )


def _same_file(one: Path, other: Path) -> bool:
    try:
        return one.samefile(other)
    except (OSError, ValueError):  # ValueError: a null character
        return False


def _check_hash(root: Path, name: str, expected: str) -> None:
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"{path} links to a file outside the bundle: it must be inside")
        found = file_sha256(path)
    except (OSError, RuntimeError) as error:  # RuntimeError: links in a circle, before Python 3.13
        reason = getattr(error, "strerror", None) or one_line(error)
        raise BundleError(f"cannot read {path} ({reason}); export the bundle again") from None
    if found != expected:
        raise BundleError(
            f"{path} was changed after export (its SHA-256 differs from the manifest's); copy or"
            " export the bundle again"
        )
