"""Build the model that a loaded checkpoint describes."""

from dataclasses import replace
from pathlib import Path

import torch

from pcae_serve.errors import one_line
from pcae_training.checkpoint import Checkpoint, CheckpointError
from pcae_training.import_weights.loaded import LoadedCheckpoint
from pcae_training.import_weights.resize import fit_weights
from pcae_training.model import VisionTransformer


def build_checkpoint(loaded: LoadedCheckpoint, path: Path) -> Checkpoint:
    """Build the model (float32, evaluation mode) at the image size of its preprocessing.

    Positions for another size, such as DINOv2's for 518 pixels, are interpolated. `labels` is empty
    if they are unknown. Raise CheckpointError, naming `path`, if the preprocessing is unknown or
    the head unusable.
    """
    loaded.check_classes(path)
    if loaded.preprocess is None:
        raise CheckpointError(
            f"{path} does not specify how images are preprocessed; place a preprocessor_config.json"
            " next to the weights"
        )
    try:
        config = replace(loaded.config, image_size=loaded.preprocess.image_size)
    except ValueError as error:
        raise CheckpointError(f"{path}: {one_line(error)}") from None
    with torch.device("meta"):  # nothing is initialised: every tensor comes from the weights
        model = VisionTransformer(config)
    model.load_state_dict(fit_weights(loaded, config).weights, assign=True)
    return Checkpoint(
        model.eval(),
        loaded.preprocess,
        loaded.labels or [],
        loaded.training,
        multi_label=bool(loaded.multi_label),
    )
