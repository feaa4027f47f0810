"""What a config.json of `transformers` says of a model, and the fields that all of them share."""

from collections.abc import Collection, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

from pcae_serve.bundle.config_fields import COUNT, POSITIVE, SQUARE, WHOLE, Field, as_json
from pcae_serve.bundle.tokens import Pooling
from pcae_training.import_weights.rename import Renamed
from pcae_training.mlp import Activation
from pcae_training.model import ViTConfig
from pcae_training.model_config import MULTI_LABEL

FILE = "config.json"
DEFAULT_HEADS = 12

#: Fields of any model that change no answer.
IGNORABLE = frozenset({
    # training, and heads that only pretraining or other tasks use
    "hidden_dropout_prob", "attention_probs_dropout_prob", "drop_path_rate", "layerscale_value",
    "initializer_range", "encoder_stride", "mask_ratio", "norm_pix_loss", "use_mask_token",
    "decoder_hidden_size", "decoder_intermediate_size", "decoder_num_attention_heads",
    "decoder_num_hidden_layers", "pooler_act", "pooler_output_size", "apply_layernorm",
    "reshape_hidden_states", "out_features", "out_indices", "_out_features", "_out_indices",
    "stage_names", "gradient_checkpointing",
    # how transformers stores, loads and runs a model
    "_attn_implementation", "_attn_implementation_autoset", "_attn_implementation_internal",
    "_experts_implementation", "_commit_hash", "_name_or_path", "_output_attentions",
    "name_or_path", "transformers_version", "torch_dtype", "dtype", "return_dict",
    "use_return_dict", "output_attentions", "output_hidden_states", "torchscript", "use_cache",
    "use_bfloat16", "tf_legacy_loss", "chunk_size_feed_forward", "finetuning_task", "label2id",
    "task_specific_params", "license", "tags",
    # text generation, which old versions wrote for every model
    "max_length", "min_length", "do_sample", "early_stopping", "num_beams", "num_beam_groups",
    "diversity_penalty", "temperature", "top_k", "top_p", "typical_p", "repetition_penalty",
    "length_penalty", "no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids",
    "num_return_sequences", "output_scores", "return_dict_in_generate", "forced_bos_token_id",
    "forced_eos_token_id", "remove_invalid_values", "exponential_decay_length_penalty",
    "suppress_tokens", "begin_suppress_tokens", "bos_token_id", "pad_token_id", "eos_token_id",
    "sep_token_id", "decoder_start_token_id", "prefix", "tokenizer_class",
    "tie_encoder_decoder", "tie_word_embeddings", "cross_attention_hidden_size",
})  # fmt: skip

#: Sizes, which must be those of the tensors, and what no tensor shows.
SIZES: Mapping[str, Field] = {
    "hidden_size": COUNT,
    "num_hidden_layers": COUNT,
    "num_attention_heads": COUNT,
    "intermediate_size": COUNT,
    "image_size": SQUARE,
    "patch_size": SQUARE,
    "num_channels": COUNT,
    "layer_norm_eps": POSITIVE,
}
#: Our name of each activation in `transformers`.
ACTIVATIONS: Mapping[str, Activation] = {
    "quick_gelu": "quick-gelu",
    "gelu": "gelu",
    "gelu_pytorch_tanh": "gelu-tanh",
    "silu": "silu",
}
LABELS: Mapping[str, Field] = {
    "problem_type": Field.only("single_label_classification", MULTI_LABEL),
    "num_labels": WHOLE,
    "_num_labels": WHOLE,
    "id2label": Field(
        "the names of classes 0, 1, 2, …, by number",
        lambda value: (
            isinstance(value, dict)
            and all(isinstance(name, str | int | float) for name in value.values())
        ),
    ),
}
#: Fields that would make another kind of model of it.
ENCODER: Mapping[str, Field] = {
    "add_cross_attention": Field.only(False),
    "is_decoder": Field.only(False),
    "is_encoder_decoder": Field.only(False),
    "pruned_heads": Field("none", lambda value: value == {}),
}


def one_of(architectures: Collection[str]) -> Field:
    """Return the field of a model's class in `transformers`."""
    return Field(
        "one of " + ", ".join(sorted(architectures)),
        lambda value: (
            isinstance(value, list)
            and len(value) <= 1
            and all(isinstance(name, str) and name in architectures for name in value)
        ),
    )


class Family(NamedTuple):
    """A model_type: what its configuration defaults to, and its classes in `transformers`."""

    norm_eps: float
    without_head: tuple[str, ...]
    with_head: tuple[str, ...] = ()

    @property
    def architectures(self) -> tuple[str, ...]:
        return (*self.without_head, *self.with_head)


def family_of(found: Mapping[str, Any], families: Mapping[str, Family]) -> Family:
    """Return the family of a model_type. Raise ValueError if the class is of another."""
    kind = found["model_type"]
    for name in found.get("architectures", ()):
        if name not in families[kind].architectures:
            raise ValueError(
                f"{FILE}: architectures has {as_json(name)}, which is not of model_type {kind!r}"
            )
    return families[kind]


@dataclass(frozen=True)
class Description:
    """What config.json says of a model."""

    found: Mapping[str, Any]  # its understood fields
    family: Family

    @property
    def architecture(self) -> str | None:
        """Return the model's class in `transformers`, if it is stated."""
        return next(iter(self.found.get("architectures", ())), None)

    @property
    def has_head(self) -> bool:
        return self.architecture in self.family.with_head

    @property
    def sizes(self) -> Mapping[str, Any]:
        """Return the fields of SIZES."""
        return self.found

    @property
    def heads(self) -> int:
        return int(self.sizes.get("num_attention_heads", DEFAULT_HEADS))

    @property
    def norm_eps(self) -> float:
        return float(self.sizes.get("layer_norm_eps", self.family.norm_eps))

    @property
    def pooling(self) -> Pooling | None:
        """Return the pooling, or None if the tensors show it."""
        return None

    @property
    def pooling_known(self) -> bool:
        """Return whether the pooling is the family's, rather than a guess."""
        return True

    @property
    def stated(self) -> Mapping[str, Any]:
        """Return fields of ViTConfig that no tensor shows."""
        return {}

    def arrange(self, renamed: Renamed) -> Renamed:
        """Change tensors as the configuration asks. Raise ValueError if one is missing."""
        return renamed

    def check(self, config: ViTConfig) -> None:
        """Raise ValueError if a size differs from that of the tensors."""
        stated = self.sizes.get("image_size", config.image_size)
        side = stated[0] if isinstance(stated, list) else stated
        if side % config.patch_size:
            raise ValueError(
                f"{FILE}: image_size is {as_json(stated)}, which patches of {config.patch_size}"
                " pixels do not fill; supported: a multiple"
            )
        sizes = {
            "hidden_size": config.width,
            "num_hidden_layers": config.depth,
            "intermediate_size": config.hidden,
            "image_size": config.image_size,
            "patch_size": config.patch_size,
            "num_channels": config.channels,
        }
        check_sizes(FILE, self.sizes, sizes)

    def labels(self, classes: int) -> list[str] | None:
        """Return the names of the classes. Raise ValueError if they are not numbered 0 to n - 1."""
        if not classes:
            return None
        for field in ("num_labels", "_num_labels"):
            check_sizes(FILE, self.found, {field: classes})
        names = self.found.get("id2label")
        if names is None:
            return None
        numbers = {str(i) for i in range(classes)}
        if unexpected := next((key for key in names if key not in numbers), None):
            raise ValueError(
                f"{FILE}: id2label names class {as_json(unexpected)}, but the head has the classes"
                f" 0 to {classes - 1}"
            )
        if missing := next((i for i in range(classes) if str(i) not in names), None):
            raise ValueError(
                f"{FILE}: id2label has no name for class {missing} of the head's {classes} classes"
            )
        return [str(names[str(i)]) for i in range(classes)]

    def multi_label(self, classes: int) -> bool | None:
        """Return whether labels are independent; None for one output of unknown meaning."""
        if self.found.get("problem_type") == MULTI_LABEL:
            return True
        return None if classes == 1 else False


def check_sizes(file: str, found: Mapping[str, Any], sizes: Mapping[str, float | bool]) -> None:
    """Raise ValueError for the first field of `found` that differs from the tensors' size."""
    for name, size in sizes.items():
        value = found.get(name)
        if isinstance(value, list):  # a square
            value = value[0]
        if value is not None and value != size:
            actual = size if isinstance(size, bool) else f"{size:g}"
            raise ValueError(
                f"{file}: {name} is {as_json(found[name])}, but the weights have {actual}"
            )
