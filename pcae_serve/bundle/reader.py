"""Read a bundle from disk and check its schema and the hash of every file.

The bundle is the contract between export and server; the server never writes to it.
"""

import hashlib
import json
from dataclasses import dataclass
from functools import cached_property
from importlib.resources import files
from pathlib import Path
from typing import Literal

from pydantic import ValidationError

from pcae_serve.bundle.manifest import MANIFEST, SCHEMA_VERSION, Manifest, Tier
from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import BundleError, InvalidParameter, shown


@dataclass(frozen=True)
class Bundle:
    """A bundle whose schema and hashes have been checked."""

    root: Path
    manifest: Manifest
    digest: str  # sha256 of bundle.json, and so of everything in it

    @property
    def tiers(self) -> tuple[Tier, ...]:
        """By MACs, the cheapest first."""
        return self.manifest.tiers

    def allowed_tiers(self, tier: str = "auto", min_tier: str | None = None) -> tuple[int, ...]:
        """Tiers that may answer, cheapest first. Raises InvalidParameter for an unknown name."""
        names = [t.name for t in self.tiers]
        known = {"tier": (*names, "auto"), "min_tier": (*names, None)}
        for parameter, name in (("tier", tier), ("min_tier", min_tier)):
            if name not in known[parameter]:
                choice = ", ".join(filter(None, known[parameter]))
                raise InvalidParameter(
                    f"{parameter} {shown(name)} is unknown: choose one of {choice}"
                )
        lowest = 0 if min_tier is None else names.index(min_tier)
        if tier != "auto":
            pinned = names.index(tier)
            if pinned < lowest:
                raise InvalidParameter(f"tier {tier!r} is below min_tier {min_tier!r}")
            return (pinned,)
        tiers = range(lowest, len(names))
        return tuple(i for i in tiers if i == lowest or not self.tiers[i].dominated)

    @property
    def labels(self) -> tuple[str, ...]:
        return self.manifest.labels

    @property
    def image_size(self) -> int:
        return next(iter(self.manifest.models.values())).image_size

    @property
    def answers(self) -> Literal["logits", "features"]:
        """What its models say of an image."""
        return next(iter(self.manifest.models.values())).answers

    @property
    def width(self) -> int:
        """Numbers in an answer: one a label, or the features'."""
        return len(self.labels) or next(iter(self.manifest.models.values())).width

    def file(self, model: str, name: str) -> Path:
        """Path of one of a model's files."""
        return self.root / "models" / model / name

    @cached_property
    def preprocess(self) -> Preprocess:
        """How image bytes become pixels; one for all models, whose graphs normalise by themselves.

        Raises BundleError where they want other pixels.
        """
        found = {model: self._preprocess(model) for model in self.manifest.models}
        first = found[self.tiers[0].model]
        for model, preprocess in found.items():
            if not preprocess.same_pixels(first):
                raise BundleError(
                    f"{self.root}: model {model!r} resizes images in another way than"
                    f" {self.tiers[0].model!r}, but one decoding serves both"
                )
        return first

    def _preprocess(self, model: str) -> Preprocess:
        path = self.file(model, "preprocessor_config.json")
        try:
            return Preprocess.from_config(json.loads(path.read_text()))
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise BundleError(f"{path} is no preprocessor config: {error}") from None


def load_bundle(root: Path) -> Bundle:
    """Read and check a bundle. Raises BundleError with one line that says what is wrong."""
    path = root / MANIFEST
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise BundleError(
            f"no bundle at {root}: {MANIFEST} cannot be read ({error.strerror});"
            " make one with 'pcae-export bundle'"
        ) from None
    try:
        document = json.loads(raw)
        version = document.get("schema_version") if isinstance(document, dict) else None
        if isinstance(version, int) and version > SCHEMA_VERSION:
            raise BundleError(
                f"{path} has schema version {version}, but this server reads {SCHEMA_VERSION}:"
                " update pcae-serve or export again"
            )
        manifest = Manifest.model_validate(document)
    except ValidationError as error:
        first = error.errors(include_url=False)[0]
        where = ".".join(str(part) for part in first["loc"]) or "manifest"
        message = first["msg"].removeprefix("Value error, ")
        raise BundleError(f"{path} is no valid manifest: {where}: {message}") from None
    except ValueError as error:
        raise BundleError(f"{path} is no valid JSON: {error}") from None
    for name, expected in manifest.files.items():
        _check(root, name, expected)
    bundle = Bundle(root, manifest, hashlib.sha256(raw).hexdigest())
    if bundle.preprocess.image_size != bundle.image_size:
        raise BundleError(f"{root}: the preprocessor crops to another size than the model takes")
    return bundle


def file_sha256(file: Path) -> str:
    """Hex digest of a file, as the manifest lists it."""
    with file.open("rb") as stream:
        return hashlib.file_digest(stream, "sha256").hexdigest()


def demo_path() -> Path:
    """Where the demo bundle lies inside the installed package."""
    return Path(str(files("pcae_serve"))) / "demo"


def _check(root: Path, name: str, expected: str) -> None:
    path = root / name
    try:
        if not path.resolve().is_relative_to(root.resolve()):
            raise BundleError(f"{path} leads out of the bundle: it must be a file inside it")
        found = file_sha256(path)
    except OSError as error:
        raise BundleError(f"the bundle lacks {path}: {error.strerror}; export it again") from None
    if found != expected:
        raise BundleError(
            f"{path} is not the file that was sealed (its sha256 differs): copy or export the"
            " bundle again"
        )
