"""Teachers: models whose probabilities on the same pixels another model learns from."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.errors import PcaeError
from pcae_serve.sources.locate import locate_checkpoint
from pcae_training.checkpoint import Checkpoint
from pcae_training.evaluate import normalise, open_checkpoint
from pcae_training.inventory import print_lines
from pcae_training.model import VisionTransformer
from pcae_training.task import Task, choose_task

#: A function from pixels, float32 [B, 3, S, S] in [0, 255], to probabilities [B, classes].
Teacher = Callable[[Tensor], Tensor]


@dataclass(frozen=True)
class Teachers:
    """The mean of several teachers' probabilities."""

    members: Sequence[Teacher]
    preprocess: Preprocess  # of the model that learns

    @torch.no_grad()
    def __call__(self, images: Tensor) -> Tensor:
        """Return probabilities, float32 [B, classes], of normalised images [B, 3, S, S]."""
        mean, std = (
            torch.tensor(values).view(1, -1, 1, 1).to(images.device, non_blocking=True)
            for values in (self.preprocess.mean, self.preprocess.std)
        )
        pixels = (images * std + mean) * 255
        return torch.stack([member(pixels) for member in self.members]).mean(dim=0)


@dataclass(frozen=True)
class CheckpointTeacher:
    """A ViT, at keep ratio 1.0, with its own normalisation."""

    model: VisionTransformer
    task: Task
    preprocess: Preprocess
    columns: Tensor | None  # of its outputs, for the classes of the images; None: all, in order

    def __call__(self, pixels: Tensor) -> Tensor:
        """Return probabilities, float32 [B, classes], of pixels [B, 3, S, S] in [0, 255]."""
        logits: Tensor = self.model(normalise(pixels, self.preprocess)).float()
        if self.columns is not None:
            logits = logits.index_select(1, self.columns)
        return self.task.probabilities(logits)


def load_teachers(
    names: Sequence[str], learner: Checkpoint, device: torch.device
) -> Teachers | None:
    """Load the teachers of a run, or return None if there are none.

    learner: the model that learns. Raise PcaeError if a teacher cannot be read, has other classes
    or takes images of another size.
    """
    if not names:
        return None
    return Teachers([_load(name, learner, device) for name in names], learner.preprocess)


def _load(name: str, learner: Checkpoint, device: torch.device) -> Teacher:
    path = locate_checkpoint(name, print_lines)
    classes, preprocess = learner.labels, learner.preprocess
    if path.suffix == ".onnx":
        from pcae_training.onnx_teacher import OnnxTeacher  # loads ONNX Runtime

        if learner.multi_label:
            raise PcaeError(
                f"--teacher {name}: the images have lists of labels, whose teacher must be a"
                " checkpoint of independent labels, not an ONNX file"
            )
        return OnnxTeacher(path, len(classes), preprocess, device)
    found = open_checkpoint(path, weights=None)
    if found.answers != learner.answers:
        raise PcaeError(
            f"--teacher {name} gives {found.answers}; a teacher of this model needs"
            f" {learner.answers}"
        )
    if found.preprocess.image_size != preprocess.image_size:
        raise PcaeError(
            f"--teacher {name} takes images of {found.preprocess.image_size} pixels, and the model"
            f" of {preprocess.image_size}; both see the same pixels, so they must be equal"
        )
    columns = _columns(name, found.labels, found.model.config.classes, classes)
    model = found.model.requires_grad_(False).to(device)
    task = choose_task(found.multi_label)
    return CheckpointTeacher(
        model, task, found.preprocess, None if columns is None else columns.to(device)
    )


def _columns(
    name: str, labels: Sequence[str], outputs: int, classes: Sequence[str]
) -> Tensor | None:
    """Return the teacher's output of each class, or None if they are the same in order."""
    if not labels and outputs == len(classes):
        print(f"note: --teacher {name} does not name its classes: taken in order", file=sys.stderr)
        return None
    missing = [label for label in classes if label not in labels]
    if missing:
        more = f" and {len(missing) - 1} more" if len(missing) > 1 else ""
        raise PcaeError(
            f"--teacher {name} has other classes than the images: it lacks {missing[0]!r}{more}"
            f" (it has {outputs}, the images have {len(classes)})"
        )
    if list(labels) == list(classes):
        return None
    return torch.tensor([list(labels).index(label) for label in classes])
