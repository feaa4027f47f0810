"""The commands of pcae-export, as one settings model."""

from typing import Annotated

from pydantic import BaseModel, Field
from pydantic_settings import BaseSettings, CliApp, CliPositionalArg, CliSubCommand

from pcae_export.bundle_command import WriteBundle
from pcae_export.bundle_source import BUNDLE_HELP, open_bundle
from pcae_export.images import IMAGES_HELP, generate, parity_pixels, shuffle_rows
from pcae_export.profiling import Profile
from pcae_export.push import Push
from pcae_export.tensorrt_plans import TensorRt
from pcae_export.verify import LEGEND, MIN_IMAGES, verify_model
from pcae_serve.command import config
from pcae_serve.engines.base import Pixels
from pcae_serve.flags import Metavar
from pcae_serve.sources.names import ModelName
from pcae_training import checkpoint as checkpoints
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_folders import Layout
from pcae_training.data import load
from pcae_training.data_settings import LAYOUT_HELP
from pcae_training.inventory import print_inventory


class Verify(BaseModel):
    """Compare every graph of a bundle with torch, from the bundle's own files."""

    bundle: CliPositionalArg[Annotated[ModelName, Metavar("BUNDLE")]] = Field(
        description=BUNDLE_HELP
    )
    data: str | None = Field(None, description=f"images: {IMAGES_HELP} (default: generated images)")
    split: str = Field("test", description="split of --data")
    layout: Layout = Field("auto", description=LAYOUT_HELP)
    images: int = Field(64, ge=MIN_IMAGES, description="number of images")

    def cli_cmd(self) -> None:
        bundle = open_bundle(self.bundle)
        for model in bundle.manifest.models:
            stored = checkpoints.load(bundle.root / "models" / model)
            parity = verify_model(bundle, stored, self._pixels(stored), model)
            print(f"{self.bundle}, model {model}: parity holds: {parity}\n")
            print(*parity.format_table(), "", LEGEND, sep="\n")
        print(f"\nserve it with: pcae-serve --bundle {self.bundle}")

    def _pixels(self, stored: Checkpoint) -> Pixels:
        if self.data is None:
            return generate(self.images, stored.preprocess.image_size)
        found = load(self.data, self.split, stored.preprocess, labelled=False, layout=self.layout)
        print_inventory(found.inventory)
        some = found.subset(shuffle_rows(len(found))[: self.images]).readable()
        return parity_pixels(some, self.images, stored.preprocess.image_size, MIN_IMAGES)


class Export(BaseSettings):
    """Turn checkpoints of vision transformers into bundles that pcae-serve serves."""

    model_config = config("pcae-export")

    bundle: CliSubCommand[WriteBundle]
    verify: CliSubCommand[Verify]
    profile: CliSubCommand[Profile]
    tensorrt: CliSubCommand[TensorRt]
    push: CliSubCommand[Push]

    def cli_cmd(self) -> None:
        CliApp.run_subcommand(self)
