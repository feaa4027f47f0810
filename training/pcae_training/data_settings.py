"""Settings of how data are read: flags that several commands share."""

from typing import Annotated

from pydantic import BaseModel, BeforeValidator, Field
from pydantic_settings import NoDecode

from pcae_training.class_folders import Layout
from pcae_training.columns import DataChoice
from pcae_training.skipped import MAX_UNREADABLE

#: Descriptions of the flags.
LAYOUT_HELP = (
    "what the first level of folders is: splits, classes, or auto to decide by their names"
)
IMAGE_COLUMN_HELP = "column of images, if the data set has more than one"
LABEL_COLUMN_HELP = "column of labels (words or integers), if it is not found by its name"
CLASSES_HELP = (
    "all class names separated by commas; for labels that are numbers, in their order from 0 on,"
    " or as NUMBER=NAME"
)
MAX_UNREADABLE_HELP = "stop if a larger share of the images cannot be read"


def _split_names(classes: object) -> object:
    return classes.split(",") if isinstance(classes, str) else classes


#: Class names of a flag.
ClassNames = Annotated[tuple[str, ...] | None, NoDecode, BeforeValidator(_split_names)]


class DataSettings(BaseModel):
    """How --data is read."""

    layout: Layout = Field("auto", description=LAYOUT_HELP)
    image_column: str | None = Field(None, description=IMAGE_COLUMN_HELP)
    label_column: str | None = Field(None, description=LABEL_COLUMN_HELP)
    classes: ClassNames = Field(None, description=CLASSES_HELP)
    max_unreadable: float = Field(MAX_UNREADABLE, ge=0, le=1, description=MAX_UNREADABLE_HELP)

    @property
    def columns(self) -> DataChoice:
        """How the data are read, as far as flags choose it."""
        return DataChoice(
            layout=self.layout,
            image_column=self.image_column,
            label_column=self.label_column,
            classes=self.classes,
        )

    @property
    def data_flags(self) -> list[str]:
        """The flags that state how to read the data, for the next command."""
        flags = [] if self.layout == "auto" else ["--layout", self.layout]
        flags += [] if self.image_column is None else ["--image-column", self.image_column]
        flags += [] if self.label_column is None else ["--label-column", self.label_column]
        return flags if self.classes is None else [*flags, "--classes", ",".join(self.classes)]
