"""--classes: class names become the head of a model with a text tower, as in `transformers`."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors, trainers

from pcae_export.text_classes import TextError, embed_prompts, read_prompts
from pcae_serve.engines.onnx_cpu import OnnxRuntimeEngine
from pcae_training.evaluate import normalise
from tests.support.exporting import bundled, fails
from tests.support.families import FAMILIES, PAIR, write
from tests.support.foreign_checkpoints import randomised

WORDS = ("a", "photo", "of", "this", "is", ".", "cat", "dog", "old", "boat")
NAMES = ["cat", "dog", "old boat"]
LENGTH = 12
TEXT = PAIR["text_config"] | {
    "vocab_size": len(WORDS) + 3, "max_position_embeddings": LENGTH, "hidden_size": 16,
    "num_attention_heads": 2, "pad_token_id": 0, "bos_token_id": len(WORDS) + 1,
    "eos_token_id": len(WORDS) + 2,
}  # fmt: skip
FLAGS = ("--tier", "low=0.5", "--tier", "full=1", "--half", "none", "--normalise", "half")
POINTS = ("--reduction-points", "0")


def write_tokenizer(folder: Path, **config: Any) -> None:
    """A tokenizer of whole words: <pad>, the words, <start>, <end>."""
    names = ("<pad>", *WORDS, "<start>", "<end>")
    made = Tokenizer(models.WordLevel({w: i for i, w in enumerate(names)}, unk_token="<pad>"))
    made.pre_tokenizer = pre_tokenizers.Sequence(
        [pre_tokenizers.WhitespaceSplit(), pre_tokenizers.Punctuation()]
    )
    special = [(name, names.index(name)) for name in ("<start>", "<end>")]
    made.post_processor = processors.TemplateProcessing("<start> $A <end>", special_tokens=special)
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "PreTrainedTokenizerFast", "pad_token": "<pad>"} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.fixture
def names(tmp_path: Path) -> Path:
    (tmp_path / "classes.txt").write_text("\n".join(NAMES) + "\n")
    return tmp_path / "classes.txt"


def model(kind: str, folder: Path) -> Any:
    """Write a whole model with a tokenizer; return the one of `transformers`."""
    text = TEXT | ({"projection_size": 16} if kind == "siglip" else {})
    changes = {"text_config": text, "vision_config": PAIR["vision_config"]}
    changes |= {"projection_dim": 12} if kind == "clip" else {}
    made_class = getattr(transformers, FAMILIES[kind].name)
    made = randomised(made_class(made_class.config_class(**changes)))
    write(made, folder)
    # as the published ones of SigLIP, which was trained without a mask
    write_tokenizer(folder, **({"model_input_names": ["input_ids"]} if kind == "siglip" else {}))
    return made


@pytest.mark.parametrize("kind", ["clip", pytest.param("siglip", marks=pytest.mark.slow)])
def test_logits_are_those_of_transformers(kind: str, names: Path, tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    theirs = model(kind, tmp_path / "whole")
    bundle = bundled(tmp_path / "whole", tmp_path / "out", *FLAGS, *POINTS, "--classes", names)
    assert bundle.labels == tuple(NAMES)
    assert bundle.answers == {"clip": "classes", "siglip": "labels"}[kind]

    template = {"clip": "a photo of a {}.", "siglip": "This is a photo of {}."}[kind]
    whole = {"padding": "max_length", "max_length": LENGTH}
    padding = whole if kind == "siglip" else {"padding": True}
    tokens = AutoTokenizer.from_pretrained(tmp_path / "whole")(
        [template.format(name) for name in NAMES],
        return_tensors="pt", **padding,
    )  # fmt: skip
    size = bundle.image_size
    pixels = np.random.default_rng(0).integers(0, 256, (3, size, size, 3), np.uint8)
    preprocess = bundle.preprocess
    images = normalise(torch.from_numpy(pixels).permute(0, 3, 1, 2), preprocess)
    with torch.inference_mode():
        expected = theirs(pixel_values=images, **tokens).logits_per_image.numpy()
    found = OnnxRuntimeEngine(bundle).run(bundle.tiers[-1], pixels).vectors
    bias = theirs.logit_bias.item() if kind == "siglip" else 0.0
    limit = 2e-3 * np.abs(expected - bias).max()  # the bundle's weights are rounded to float16
    assert np.abs(found - expected).max() < limit
    assert np.ptp(expected, axis=1).min() > 10 * limit  # classes swapped would be seen


def write_gemma_tokenizer(folder: Path, **config: Any) -> None:
    """A tokenizer as SigLIP 2 has it: Gemma's, pieces of words that know upper case."""
    made = Tokenizer(models.BPE(unk_token="<unk>", fuse_unk=True, byte_fallback=True))
    made.normalizer = normalizers.Replace(" ", "\u2581")
    made.pre_tokenizer = pre_tokenizers.Split(" ", "merged_with_previous")
    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    names = special + [f"<0x{byte:02X}>" for byte in range(256)]
    trainer = trainers.BpeTrainer(vocab_size=340, special_tokens=names, show_progress=False)
    made.train_from_iterator(["This is a photo of a Cat.", "this is an old Boat."] * 3, trainer)
    made.post_processor = processors.TemplateProcessing("$A <eos>", special_tokens=[("<eos>", 1)])
    made.save(str(folder / "tokenizer.json"))
    config = {"tokenizer_class": "GemmaTokenizer", "add_bos_token": False} | config
    (folder / "tokenizer_config.json").write_text(json.dumps(config))


@pytest.mark.parametrize(
    "config",
    [{"padding_side": "right", "do_lower_case": True, "model_input_names": ["input_ids"]}, {}],
    ids=["as published", "only the class"],
)
def test_siglip_2_reads_lower_case_at_full_length(tmp_path: Path, config: dict[str, Any]) -> None:
    """Its tokenizer is Gemma's; `transformers` has another class for what it was trained on."""
    from transformers.models.siglip2.tokenization_siglip2 import Siglip2Tokenizer

    text = TEXT | {
        "vocab_size": 400, "max_position_embeddings": 64, "pad_token_id": 0, "bos_token_id": 2,
        "eos_token_id": 1, "projection_size": 16,
    }  # fmt: skip
    made_config = transformers.SiglipConfig(text_config=text, vision_config=PAIR["vision_config"])
    theirs = randomised(transformers.SiglipModel(made_config))
    write(theirs, tmp_path / "whole")
    write_gemma_tokenizer(tmp_path / "whole", **config)
    prompts = ["This is a photo of a Cat.", "THIS IS an old boat.", "This is \u00c9mile."]
    head = embed_prompts(tmp_path / "whole", {text: [text] for text in prompts})

    tokenizer = Siglip2Tokenizer.from_pretrained(tmp_path / "whole", padding_side="right")
    ids = tokenizer(prompts, padding="max_length", max_length=64, return_tensors="pt")["input_ids"]
    assert ids.shape == (3, 64)
    with torch.inference_mode():
        found = theirs.get_text_features(input_ids=ids)
    expected = torch.nn.functional.normalize(getattr(found, "pooler_output", found), dim=1)
    assert torch.allclose(head.vectors, expected, atol=1e-5)
    assert (expected[0] - expected[1]).abs().max() > 1e-3


def test_several_prompts_are_averaged(tmp_path: Path) -> None:
    model("clip", tmp_path / "whole")
    head = embed_prompts(tmp_path / "whole", {"cat": ["a cat", "old cat"], "dog": ["dog"]})
    alone = embed_prompts(tmp_path / "whole", {"a": ["a cat"], "b": ["old cat"], "c": ["dog"]})
    mean = alone.vectors[:2].mean(dim=0)
    assert torch.allclose(head.vectors[0], mean / mean.norm(), atol=1e-6)
    assert torch.allclose(head.vectors[1], alone.vectors[2], atol=1e-6)
    assert (head.bias, alone.scale) == (0, head.scale)


def test_lines_of_classes(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    file.write_text("\ufeffcat\n\nsea gull\ta gull over water\nsea gull\ta white gull\n")
    assert read_prompts(file, "a photo of a {}.") == {
        "cat": ["a photo of a cat."],
        "sea gull": ["a gull over water", "a white gull"],
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("", "names 0 classes; at least two are needed"),
        ("cat\n", "names 1 classes"),
        ("cat\ndog\ncat\n", "line 3: class 'cat' is given twice"),
        ("cat\ta cat\ncat\n", "line 2: class 'cat' is given twice"),
        ("cat\n\tof nothing\n", "line 2: needs a name, a tab and a prompt, or a name"),
        ("cat\t\ndog\n", "line 1: needs a name"),
    ],
)
def test_lines_that_name_no_classes(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "classes.txt").write_text(text)
    with pytest.raises(TextError, match=message):
        read_prompts(tmp_path / "classes.txt", "{}")


def test_a_template_without_a_place_for_the_name(names: Path) -> None:
    with pytest.raises(TextError, match=r"must have \{\} once"):
        read_prompts(names, "a photo")


def test_a_prompt_that_is_too_long(tmp_path: Path) -> None:
    model("clip", tmp_path / "whole")
    with pytest.raises(TextError, match="has 17 tokens, and the text tower takes 12"):
        embed_prompts(tmp_path / "whole", {"cat": ["cat " * 15], "dog": ["dog"]})


def test_a_tokenizer_of_another_model(tmp_path: Path) -> None:
    model("clip", tmp_path / "whole")
    write_gemma_tokenizer(tmp_path / "whole")
    with pytest.raises(TextError, match=r"gives token \d+, but its text tower has 13"):
        embed_prompts(tmp_path / "whole", {"cat": ["a cat"], "dog": ["a dog"]})


def test_what_has_no_text_tower(
    made: Any, names: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    ours = ("bundle", made.checkpoint, tmp_path / "out", "--classes", names)
    assert "of type 'pcae_vit' and has no text tower" in fails(capsys, 1, *ours)
    model("clip", tmp_path / "whole")
    words = ("bundle", tmp_path / "whole", tmp_path / "out", *FLAGS, "--classes", names)
    (tmp_path / "whole" / "tokenizer.json").write_text("{}")
    assert "has no usable tokenizer" in fails(capsys, 1, *words)
    (tmp_path / "whole" / "tokenizer.json").unlink()
    assert "has no tokenizer: none of tokenizer.json, vocab.json" in fails(capsys, 1, *words)
    # transformers would make a tokenizer of a few marks without words
    (tmp_path / "whole" / "tokenizer_config.json").unlink()
    assert "has no tokenizer: none of tokenizer.json, vocab.json" in fails(capsys, 1, *words)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("every", [True, False], ids=["all", "one"])
def test_missing_weights_are_named(tmp_path: Path, every: bool) -> None:
    model("clip", tmp_path / "whole")
    file = tmp_path / "whole" / "model.safetensors"
    gone = "text_model." if every else "text_model.final_layer_norm.bias"
    save_file({n: t for n, t in load_file(file).items() if not n.startswith(gone)}, file)
    with pytest.raises(TextError, match=r"\(text_model\.[^\n]*\); use a checkpoint"):
        embed_prompts(tmp_path / "whole", {"cat": ["a cat"], "dog": ["a dog"]})


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (("--template", "a {}"), "--template makes prompts of the names in --classes"),
        (("--classes", "x", "--labels", "y"), "--classes names the classes; omit --labels"),
        (("--classes", "x", "--classes-from", "y"), "omit --classes-from"),
        (("--classes", "x", "--dense"), "only POST /embed returns patches; omit --dense"),
        (("--classes-from", "x", "--dense"), "only POST /embed returns patches; omit --dense"),
        (("--classes", "x", "--tier", "a=other@0.5"), "makes a classifier of one model"),
    ],
)
def test_flags_that_contradict(
    capsys: pytest.CaptureFixture[str], flags: tuple[str, ...], message: str
) -> None:
    assert message in fails(capsys, 2, "bundle", "IN", "OUT", *flags)
