"""What pretraining starts from: the encoder of --init, or random weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError, one_line
from pcae_training import heldout_record
from pcae_training.heldout_record import HeldOut
from pcae_training.import_weights import FittedWeights, LoadedCheckpoint, initialise
from pcae_training.init_weights import choose_preprocess, load_init, report_use
from pcae_training.model import VisionTransformer
from pcae_training.pretrain_settings import PretrainSettings


@dataclass(frozen=True)
class Encoder:
    """An encoder, without a head, with weights to train from."""

    model: VisionTransformer
    preprocess: Preprocess
    origin: Mapping[str, Any] = field(default_factory=dict)  # how the weights of --init came about
    held_out: HeldOut | None = None  # the images that the run of --init held out
    found: LoadedCheckpoint | None = None
    fitted: FittedWeights | None = None
    dropped: tuple[str, ...] = ()  # tensors of the head of --init

    def report(self, name: object, new: Iterable[str]) -> None:
        """Print what is used of --init. new: names of what the method adds to the encoder."""
        if self.found is None or self.fitted is None:
            return
        missing = [*self.fitted.missing, *new]
        unused = [*self.fitted.unused, *self.dropped, *self.found.ignored]
        report_use(name, self.found, len(self.fitted.weights), missing, unused)


def prepare_encoder(settings: PretrainSettings) -> Encoder:
    """Load the encoder of --init, or build one with random weights. Raise PcaeError."""
    path, found = load_init(settings) or (None, None)
    preprocess = choose_preprocess(found, settings)
    if path is None or found is None:
        return new_encoder(settings, preprocess)
    encoder = found.drop_head()
    if reason := encoder.config.beyond_pretraining:
        raise PcaeError(f"{settings.init}: cannot be pretrained further: it has {reason}")
    dropped = tuple(name for name in found.weights if name not in encoder.weights)
    if encoder.config.pooling == "normed-mean":  # its norm, too, is applied to each token
        encoder = replace(encoder, config=replace(encoder.config, pooling="cls"))
    try:
        config = replace(
            encoder.config,
            image_size=preprocess.image_size,
            patch_size=settings.patch_size or encoder.config.patch_size,
            pooling="cls",
        )
        settings.check_model(config)
    except ValueError as error:
        raise PcaeError(f"{settings.init}: {one_line(error)}") from None
    model = VisionTransformer(config)
    fitted = initialise(model, encoder)
    before = heldout_record.read(path)
    return Encoder(model, preprocess, found.training, before, found, fitted, dropped)


def new_encoder(settings: PretrainSettings, preprocess: Preprocess) -> Encoder:
    """Build an encoder with random weights."""
    return Encoder(VisionTransformer(settings.config(classes=0, pooling="cls")), preprocess)
