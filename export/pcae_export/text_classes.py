"""Make a zero-shot classifier of a model with a text tower and class names, for `--classes`.

    lines of classes -> prompts -> the checkpoint's own tokenizer and text tower -> head

The head reads the normalised image features: its logits are those of `logits_per_image` in
`transformers`. The text tower runs once, here; the bundle does not contain it.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from pcae_serve.bounded_file import read_bounded
from pcae_serve.bounded_json import CONFIG_BYTES, read_json
from pcae_serve.errors import PcaeError, one_line
from pcae_training.checkpoint import Checkpoint
from pcae_training.model import VisionTransformer

#: Prompts in which a class name takes the place of `{}`, by model type: those of the papers' code.
TEMPLATES = {"clip": "a photo of a {}.", "siglip": "This is a photo of {}."}
#: Files of which a tokenizer needs one: without, transformers makes one that knows no words.
VOCABULARIES = ("tokenizer.json", "vocab.json", "spiece.model", "tokenizer.model")
#: Prompts that go through the text tower at a time.
BATCH = 64


class TextError(PcaeError):
    """Classes cannot be made from words."""


@dataclass(frozen=True)
class TextHead:
    """A head made of text: unit vectors, and what the model makes logits of cosines with."""

    vectors: Tensor  # float32 [classes, D], of length 1
    scale: float
    bias: float

    def attach(self, checkpoint: Checkpoint, labels: Sequence[str]) -> Checkpoint:
        """Return the model of image features [B, D] as a classifier into `labels`."""
        config = checkpoint.model.config
        if config.features != self.vectors.shape[1]:
            raise TextError(
                f"the text tower has {self.vectors.shape[1]} features, the vision tower"
                f" {config.features}"
            )
        model = VisionTransformer(replace(config, classes=len(labels), normalised=True))
        state = checkpoint.model.state_dict()
        state["head.weight"] = self.scale * self.vectors
        state["head.bias"] = torch.full((len(labels),), self.bias)
        model.load_state_dict(state)
        return replace(checkpoint, model=model.eval(), labels=list(labels))


def read_prompts(file: Path, template: str) -> dict[str, list[str]]:
    """Read the prompts of each class: a line is NAME, or NAME, a tab and a prompt.

    A name alone takes its place in the template. A class with several lines of prompts is the mean
    of them. Raises TextError.
    """
    try:
        lines = read_bounded(file, CONFIG_BYTES).decode("utf-8-sig").splitlines()
    except (OSError, ValueError) as error:
        raise TextError(f"cannot read {file}: {error}") from None
    if template.count("{}") != 1:
        raise TextError(f"the template {template!r} must have {{}} once, for the class name")
    prompts: dict[str, list[str]] = {}
    plain: set[str] = set()
    for number, line in enumerate(lines, 1):
        name, tab, prompt = line.partition("\t")
        name, prompt, given = name.strip(), prompt.strip(), bool(tab)
        if not name and not prompt:
            continue
        if not name or (given and not prompt):
            raise TextError(f"{file}, line {number}: needs a name, a tab and a prompt, or a name")
        if name in plain or (name in prompts and not given):
            raise TextError(f"{file}, line {number}: class {name!r} is given twice")
        if not given:
            plain.add(name)
        prompts.setdefault(name, []).append(prompt if given else template.replace("{}", name))
    if len(prompts) < 2:
        raise TextError(f"{file} names {len(prompts)} classes; at least two are needed")
    return prompts


def text_model_type(path: Path) -> str:
    """Return the model type of a checkpoint's folder with a text tower. Raises TextError."""
    try:
        config: Any = read_json(path / "config.json")
    except (OSError, ValueError) as error:
        raise TextError(f"{path} is not a folder with a text tower: {one_line(error)}") from None
    kind = config.get("model_type") if isinstance(config, Mapping) else None
    if kind not in TEMPLATES:
        raise TextError(
            f"{path} is of type {kind!r} and has no text tower; --classes needs a whole"
            f" {' or '.join(TEMPLATES)} model"
        )
    return str(kind)


def embed_prompts(path: Path, prompts: Mapping[str, Sequence[str]]) -> TextHead:
    """Run the text tower of the checkpoint at `path` on all prompts.

    Raises TextError if transformers is not installed, or the tower or its tokenizer is missing.
    """
    if find_spec("transformers") is None:
        raise TextError("--classes needs transformers: pip install 'pcae-serve[text]'")
    from transformers import AutoModel, AutoTokenizer

    kind = text_model_type(path)
    if not any((path / name).is_file() for name in VOCABULARIES):
        raise TextError(f"{path} has no tokenizer: none of {', '.join(VOCABULARIES)} is there")
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, local_files_only=True)
    except (OSError, ValueError, ImportError, KeyError) as error:
        raise TextError(f"{path} has no usable tokenizer: {one_line(error)}") from None
    try:
        model, loaded = AutoModel.from_pretrained(
            path, local_files_only=True, dtype=torch.float32, output_loading_info=True
        )
    except (OSError, ValueError, ImportError, RuntimeError) as error:
        raise TextError(f"{path} has no usable text tower: {one_line(error)}") from None
    if missing := sorted(name for name in loaded["missing_keys"] if "vision" not in name):
        some = missing[0] if len(missing) == 1 else f"{missing[0]} and {len(missing) - 1} more"
        raise TextError(
            f"{path} lacks weights of its text tower ({some}); use a checkpoint with both towers,"
            " or photographs (--classes-from)"
        )
    length = model.config.text_config.max_position_embeddings
    texts = [text for some in prompts.values() for text in some]
    parts = []
    with torch.inference_mode():
        for start in range(0, len(texts), BATCH):
            some = texts[start : start + BATCH]
            tokens = _encode(tokenizer, kind, some, length)
            if (longest := tokens["input_ids"].shape[1]) > length:
                raise TextError(
                    f"a prompt has {longest} tokens, and the text tower takes {length}; the longest"
                    f" is {max(some, key=len)!r}"
                )
            words = model.config.text_config.vocab_size
            if (largest := int(tokens["input_ids"].max())) >= words:
                raise TextError(
                    f"{path}: its tokenizer gives token {largest:,}, but its text tower has"
                    f" {words:,}"
                )
            found = model.eval().get_text_features(**tokens)
            parts.append(F.normalize(getattr(found, "pooler_output", found), dim=1))
        vectors = torch.split(torch.cat(parts), [len(some) for some in prompts.values()])
        classes = torch.stack([F.normalize(some.mean(dim=0), dim=0) for some in vectors])
        bias = float(model.logit_bias) if hasattr(model, "logit_bias") else 0.0
        return TextHead(classes.clone(), float(model.logit_scale.exp()), bias)


def _encode(tokenizer: Any, kind: str, texts: Sequence[str], length: int) -> dict[str, Tensor]:
    """Return the tokens [N, T] of prompts as the model was trained on them.

    CLIP ends a prompt at its last token. SigLIP was trained on prompts that are padded on the right
    to their full length, without a mask; SigLIP 2, whose tokenizer is Gemma's, on lower case, which
    Gemma's does not do itself.
    """
    if kind == "clip":
        return dict(tokenizer(list(texts), return_tensors="pt", padding=True))
    tokenizer.padding_side = "right"
    if type(tokenizer).__name__.startswith("Gemma"):
        texts = [text.lower() for text in texts]
    tokens = tokenizer(list(texts), return_tensors="pt", padding="max_length", max_length=length)
    return {"input_ids": tokens["input_ids"]}
