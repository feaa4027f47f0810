"""What fine-tuning starts from: the model with the weights of --init, and the images."""

from dataclasses import replace
from typing import Any, NamedTuple

from torch import Tensor, nn

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import reduction_points
from pcae_serve.errors import PcaeError
from pcae_training import heldout_record
from pcae_training.checkpoint import Checkpoint
from pcae_training.class_report import MAX_LISTED
from pcae_training.class_weights import describe, weigh_classes
from pcae_training.data import LabelledImages, TrainingData, load
from pcae_training.duplicates import find_duplicates
from pcae_training.finetune_settings import FinetuneSettings
from pcae_training.heldout_record import HeldOut
from pcae_training.holdout_settings import divide
from pcae_training.import_weights import LoadedCheckpoint, initialise
from pcae_training.init_weights import choose_preprocess, load_init, report_use
from pcae_training.inventory import print_inventory, print_lines
from pcae_training.model import VisionTransformer
from pcae_training.trainer import training_data


class Start(NamedTuple):
    """What a run starts from."""

    checkpoint: Checkpoint  # the model to train
    images: TrainingData
    holdout: LabelledImages  # to evaluate on
    held_out: HeldOut  # the record of `holdout`
    new: frozenset[str]  # names of the parameters that --init does not provide
    class_weights: Tensor | None  # float32 [classes], of the loss; None: all 1


def prepare(settings: FinetuneSettings, report: bool = True) -> Start:
    """Load the model of --init or build a new one, and divide the images. Raise PcaeError."""
    init, found = load_init(settings) or (None, None)
    preprocess = choose_preprocess(found, settings)
    source = settings.decoding(preprocess)
    before = None if init is None else heldout_record.read(init)
    images: TrainingData
    if settings.eval_data is not None:
        limit = settings.max_unreadable
        holdout = load(
            settings.eval_data,
            settings.eval_split,
            preprocess,
            max_unreadable=limit,
            **settings.columns,
        )
        images = training_data(settings, source)
        _check_same_labels(images, holdout)
        holdout.align(images.classes)
        print_inventory(images.inventory)
        print_inventory(holdout.inventory)
        if isinstance(images, LabelledImages) and settings.eval_data != settings.data:
            _report_shared(images, holdout)
    else:
        labelled = load_labelled(settings, source)
        print_inventory(labelled.inventory)
        split = divide(settings, labelled, settings.seed, before, str(settings.init))
        images = labelled.subset(split.train)
        holdout = labelled.decoded_by(preprocess).subset(split.holdout)
    chosen = settings.eval_data or settings.holdout or settings.fold
    if before is not None and chosen and isinstance(images, LabelledImages):
        _report_seen(settings, before, images)
    several = holdout.several
    if found is not None and not _has_same_answers(found, images.classes, several):
        dropped = found.drop_head()
        config = replace(dropped.config, pooling=found.config.pooling)
        found = replace(dropped, config=config)
    model, new = _build_model(settings, found, images.classes, preprocess.image_size, report)
    training = {} if found is None else found.training
    checkpoint = Checkpoint(model, preprocess, images.classes, training, several)
    held_out = heldout_record.record(holdout, range(len(holdout)))
    weights = weigh_by_flags(settings, images)
    return Start(checkpoint, images, holdout.readable(), held_out, new, weights)


def weigh_by_flags(settings: FinetuneSettings, images: TrainingData) -> Tensor | None:
    """Apply --balance to the images, and return the weights of --class-weights."""
    if not settings.balance and settings.class_weights is None:
        return None
    assert isinstance(images, LabelledImages)  # --stream is refused with both
    if images.several:
        flag = "--balance" if settings.balance else "--class-weights"
        raise PcaeError(f"{images.name} has lists of labels; {flag} needs one class an image")
    images.balanced = settings.balance
    if settings.class_weights is None:
        return None
    weights = weigh_classes(settings.class_weights, images.labels, images.classes, images.name)
    print_lines(describe(weights, images.classes, MAX_LISTED))
    return weights


def _check_same_labels(images: TrainingData, holdout: LabelledImages) -> None:
    """Raise PcaeError if only one of the two has lists of labels."""
    several = isinstance(images, LabelledImages) and images.several
    if several != holdout.several:
        kinds = ("lists of labels", "one class an image")
        ours, theirs = kinds if several else reversed(kinds)
        raise PcaeError(f"--data has {ours}, and --eval-data has {theirs}")


def _report_seen(settings: FinetuneSettings, before: HeldOut, images: LabelledImages) -> None:
    """Report images to train on that the run of --init had held out."""
    if seen := len(before.find(images)):
        print_lines(
            f"  warning: {seen:,} images to train on are among the {len(before.digests):,} that"
            f" {settings.init} held out, by which its settings may have been chosen; omit"
            " --holdout to hold out the same ones"
        )


def _report_shared(images: LabelledImages, holdout: LabelledImages) -> None:
    """Report files of the training data that are also among the images to evaluate on."""
    found = find_duplicates([*images.files("--data"), *holdout.files("--eval-data")], "--data")
    if found.across:
        print_lines(f"  note: {found.notes[0]}")


def load_labelled(settings: FinetuneSettings, preprocess: Preprocess) -> LabelledImages:
    """Open all of --data, decoded by `preprocess`."""
    images = training_data(settings, preprocess)
    assert isinstance(images, LabelledImages)  # --stream requires --eval-data
    return images


def _has_same_answers(found: LoadedCheckpoint, classes: list[str], several: bool) -> bool:
    """Return whether the head of --init may answer the same as the model to train."""
    if not found.config.classes:
        return True  # there is no head
    return found.labels in (None, classes) and bool(found.multi_label) == several


def _build_model(
    settings: FinetuneSettings,
    found: LoadedCheckpoint | None,
    labels: list[str],
    image_size: int,
    report: bool,
) -> tuple[VisionTransformer, frozenset[str]]:
    """Build the model, load the weights of --init that fit, and return the names of all others."""
    classes = len(labels)
    if found is None:
        changes: dict[str, Any] = {"pooling": settings.pooling or "mean"}
        changes["reduction"] = settings.reduction or "ptr"
        if settings.reduction_points is not None:
            changes["reduction_points"] = settings.reduction_points
        model = VisionTransformer(settings.config(classes, **changes))
        return model, frozenset(name for name, _ in model.named_parameters())
    pooling = settings.pooling or (found.config.pooling if found.pooling_known else "mean")
    points = settings.reduction_points
    if points is None:
        points = found.config.reduction_points or reduction_points(found.config.depth)
    try:
        config = replace(
            found.config,
            image_size=image_size,
            patch_size=settings.patch_size or found.config.patch_size,
            classes=classes,
            pooling=pooling,
            reduction=settings.reduction or found.config.reduction,
            reduction_points=points,
        )
        for ratio in settings.ratios:
            config.geometry.counts(ratio)
    except ValueError as error:
        raise PcaeError(f"{settings.init}: {error}{_hint(found, pooling)}") from None
    if not config.reduction_points and settings.ratios[-1] < 1:
        raise PcaeError(
            f"{settings.init} has {config.depth} blocks, too few to drop patches; it needs 3"
        )
    if found.reduction_known and config.reduction != found.config.reduction:
        print_lines(
            f"note: {settings.init} was trained with --reduction {found.config.reduction}, and this"
            f" run trains with {config.reduction}"
        )
    model = VisionTransformer(config)
    fitted = initialise(model, found)
    if isinstance(model.head, nn.Linear) and "head.weight" in fitted.missing:
        nn.init.trunc_normal_(model.head.weight, std=2e-5)  # as MAE: near zero at first
    if report:
        unused = [*fitted.unused, *found.ignored]
        report_use(settings.init, found, len(fitted.weights), fitted.missing, unused)
    return model, frozenset(fitted.missing)


def _hint(found: LoadedCheckpoint, pooling: str) -> str:
    """Return what to change if a distilled model cannot be pooled as asked for."""
    return "; give --pooling cls" if found.config.distilled and pooling != "cls" else ""
