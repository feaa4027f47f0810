"""Load a checkpoint of any supported format, and fit its weights to a model of other sizes.

    FILE.pth | .pt | .bin | .safetensors   MAE, timm, DeiT, DINO and DINOv2 state dicts
    FOLDER                                 Hugging Face ViT, DeiT, DINOv2, DINOv3, ViTMAE, and the
                                           vision towers of CLIP and SigLIP; timm; our own

`load_checkpoint` detects the format once (`detect`) and calls its one reader (`readers`). A reader
takes the state dict out of the file (`tensors`), renames it (`rename`) and derives the model's
sizes from the tensors' shapes (`sizes`); what shapes do not determine (heads, epsilon, pooling,
labels) comes from config.json (`model_types`, `timm`). A tensor or field that would change an
answer is never skipped: the checkpoint is refused. `initialise` loads the weights into a model,
resized if necessary (`resize`); `build_checkpoint` returns it as it is.
"""

from pathlib import Path

from pcae_serve.errors import one_line
from pcae_training.checkpoint import CheckpointError
from pcae_training.import_weights.build import build_checkpoint
from pcae_training.import_weights.detect import detect_format
from pcae_training.import_weights.loaded import LoadedCheckpoint
from pcae_training.import_weights.readers import READERS, Choices
from pcae_training.import_weights.resize import FittedWeights, fit_weights, initialise
from pcae_training.import_weights.tensors import WeightsChoice

__all__ = [
    "FittedWeights",
    "LoadedCheckpoint",
    "WeightsChoice",
    "build_checkpoint",
    "fit_weights",
    "initialise",
    "load_checkpoint",
]


def load_checkpoint(
    path: Path, *, heads: int | None = None, weights: WeightsChoice | None = None
) -> LoadedCheckpoint:
    """Read a state dict, a Hugging Face or timm folder, or a checkpoint of pcae-train.

    heads: number of attention heads, for files that do not state it; default: config.json's, else
    the published models' for that width. weights: which to take if a file has raw and averaged
    ones; default: the averaged. Without config.json, pooling is "mean" if the file has an
    `fc_norm`, else "cls". Reduction points are the paper's, at the same relative depth.
    Raise CheckpointError with a one-line message that names the file.
    """
    source = detect_format(path)
    try:
        return READERS[source.format](source, Choices(heads, weights))
    except ValueError as error:  # of ViTConfig too
        raise CheckpointError(f"{source.path}: {one_line(error)}") from None
    except TypeError as error:  # a field of config.json is not a number
        reason = one_line(error)
        raise CheckpointError(f"{source.path}: invalid value in config.json: {reason}") from None
