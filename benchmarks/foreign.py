"""Parity of other projects' checkpoints, exported and served, with their own library.

    python benchmarks/foreign.py --images FOLDER [--dinov2 FOLDER] [--json FILE]

    checkpoint   random weights of transformers' classes, as a Hugging Face folder and as a state
                 dict with timm's names; with --dinov2, real weights
    ours         pcae-export bundle, then pcae-serve on a socket, with the image files as requests
    theirs       transformers: its image processor and model, float32

Every image is answered at keep ratio 1, where no token is dropped, so answers must agree up to
rounding. Weights are rounded to float16 first, as bundles store them. For classifiers, the
probabilities of all classes are compared.
"""

import argparse
import json
import re
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import httpx2
import numpy as np
import torch
import transformers
from PIL import Image
from torch import Tensor, nn
from tqdm import tqdm

from pcae_export.measure import cosine
from pcae_training.journal import describe_machine

LABELS = {i: f"class {i}" for i in range(10)}
#: A ViT-Ti at 224 pixels, with all parts of a real model.
SIZES = {
    "hidden_size": 192, "num_hidden_layers": 12, "num_attention_heads": 3,
    "intermediate_size": 768, "id2label": LABELS, "initializer_range": 0.1,
}  # fmt: skip


@dataclass(frozen=True)
class Case:
    """A checkpoint and its reference."""

    name: str
    source: Path
    flags: tuple[str, ...]
    vectors: Callable[[Tensor], Tensor]  # normalised pixels [1, 3, S, S] -> answer [1, n]
    processor: Path  # folder of the image processor


@dataclass(frozen=True)
class Row:
    """Differences between our answers and the reference."""

    case: str
    answers: str  # probabilities or features
    images: int
    largest: float  # largest absolute difference of a value
    scale: float  # largest absolute value
    cosine: float  # smallest over the images
    same_class: float | None


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--images", type=Path, required=True, help="folder of test/*.png")
    parser.add_argument("--dinov2", type=Path, help="Hugging Face folder of real weights")
    parser.add_argument("--json", type=Path, help="write all figures to this file")
    options = parser.parse_args()
    files = sorted((options.images / "test").glob("*.png"))
    rows = []
    with tempfile.TemporaryDirectory() as scratch:
        for case in cases(Path(scratch), options.dinov2):
            rows.append(compare(case, options.images, files, Path(scratch)))
            print(rows[-1], flush=True)
    print(*table(rows), sep="\n")
    if options.json:
        content = {"transformers": transformers.__version__, "rows": [asdict(r) for r in rows]}
        options.json.write_text(json.dumps(content | describe_machine(), indent=1) + "\n")


def cases(scratch: Path, dinov2: Path | None) -> Iterator[Case]:
    """Yield the cases, each created when needed."""
    torch.manual_seed(0)
    made: dict[str, nn.Module] = {
        "vit": transformers.ViTForImageClassification(transformers.ViTConfig(**SIZES)),
        "deit": transformers.DeiTForImageClassificationWithTeacher(
            transformers.DeiTConfig(**SIZES)
        ),
        "dinov2-registers": transformers.Dinov2WithRegistersModel(
            transformers.Dinov2WithRegistersConfig(
                **(SIZES | {"image_size": 224, "patch_size": 14})
            )
        ),
    }
    for name, model in made.items():
        folder = scratch / name
        rounded(model).save_pretrained(folder)  # type: ignore[operator]
        transformers.ViTImageProcessorPil(size=224).save_pretrained(folder)
        vectors = features(model) if name.startswith("dinov2") else logits(model)
        yield Case(f"Hugging Face {name}", folder, (), vectors, folder)
    timm = scratch / "timm.pth"
    torch.save(under_timms_names(made["vit"].state_dict()), timm)
    flags = ("--normalise", "half", "--image-size", "224", "--resize", "224")
    square = scratch / "square"
    # resize and crop, as timm does; ViT's own processor does not keep the aspect ratio
    transformers.BitImageProcessorPil(
        size={"shortest_edge": 224}, crop_size=224, resample=3, image_mean=[0.5] * 3,
        image_std=[0.5] * 3,
    ).save_pretrained(square)  # fmt: skip
    yield Case("vit under timm's names", timm, flags, logits(made["vit"]), square)
    if dinov2 is not None:
        real = transformers.AutoModel.from_pretrained(dinov2).float().eval()
        yield Case("DINOv2, real weights", dinov2, (), features(real), dinov2)


def rounded(model: nn.Module) -> nn.Module:
    """Return the model with its weights rounded to float16 values."""
    for parameter in model.parameters():
        parameter.data = parameter.data.half().float()
    return model.eval()


def logits(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda pixels: model(pixels).logits


def features(model: nn.Module) -> Callable[[Tensor], Tensor]:
    return lambda pixels: model(pixels).pooler_output  # CLS token after the last norm


def under_timms_names(weights: dict[str, Tensor]) -> dict[str, Tensor]:
    """Return a Hugging Face ViT's state dict with timm's names, q, k and v concatenated."""
    found: dict[str, Tensor] = {}
    names = {
        r"^vit\.embeddings\.cls_token$": "cls_token",
        r"^vit\.embeddings\.position_embeddings$": "pos_embed",
        r"^vit\.embeddings\.patch_embeddings\.projection\.": "patch_embed.proj.",
        r"^vit\.(?:encoder\.layer|layers)\.(\d+)\.": r"blocks.\1.",
        r"layernorm_before": "norm1",
        r"layernorm_after": "norm2",
        r"attention\.(?:output\.dense|o_proj)": "attn.proj",
        r"(?:intermediate\.dense|mlp\.fc1)": "mlp.fc1",
        r"(?<!attention\.)output\.dense|mlp\.fc2": "mlp.fc2",
        r"attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)": r"attn.\1",
        r"^vit\.layernorm": "norm",
        r"^classifier": "head",
    }
    for name, tensor in weights.items():
        for pattern, replacement in names.items():
            name = re.sub(pattern, replacement, name)
        found[name] = tensor.clone()
    for name in [name for name in found if ".attn.q." in name]:
        parts = [found.pop(name.replace(".attn.q.", f".attn.{x}.")) for x in "qkv"]
        found[name.replace(".attn.q.", ".attn.qkv.")] = torch.cat(parts)
    return found


@torch.inference_mode()
def compare(case: Case, images: Path, files: list[Path], scratch: Path) -> Row:
    """Export and serve a checkpoint, and compare the answers with those of transformers."""
    out = scratch / f"{case.source.name}-bundle"
    command = [sys.executable, "-m", "pcae_export.cli", "bundle", case.source, out, *case.flags]
    command += [f"--eval-data={images}", "--agreement", "--half=none", "--parity-images=16"]
    command += ["--choice-images=8", "--tier=half=0.5", "--tier=full=1"]
    subprocess.run(list(map(str, command)), check=True, stdout=subprocess.DEVNULL)
    processor = transformers.AutoImageProcessor.from_pretrained(case.processor)
    ours, theirs = [], []
    with server(out) as url, httpx2.Client(timeout=60) as client:
        embeds = client.get(f"{url}/tiers").json()["answers"] == "features"
        path = "/embed?tier=full" if embeds else "/classify?tier=full&top_k=1000"
        for file in tqdm(files, desc=case.name, leave=False):
            reply = client.post(f"{url}{path}&budget_ms=60000", content=file.read_bytes())
            ours.append(vector(reply.raise_for_status().json()))
            pixels = processor(Image.open(file).convert("RGB"), return_tensors="pt")["pixel_values"]
            answer = case.vectors(pixels)[0]
            theirs.append((answer if embeds else answer.softmax(0)).numpy())
    one, other = np.stack(ours), np.stack(theirs)
    same = one.argmax(axis=1) == other.argmax(axis=1)
    return Row(
        case=case.name,
        answers="features" if embeds else "probabilities",
        images=len(files),
        largest=float(np.abs(one - other).max()),
        scale=float(np.abs(other).max()),
        cosine=float(cosine(one, other).min()),
        same_class=None if embeds else float(same.mean()),
    )


def vector(reply: dict[str, Any]) -> np.ndarray:
    """Return the values of an answer, classes in the order of their index."""
    if "features" in reply:
        return np.array(reply["features"], np.float32)
    ordered = sorted(reply["predictions"], key=lambda found: found["index"])
    return np.array([found["probability"] for found in ordered], np.float32)


@contextmanager
def server(bundle: Path) -> Iterator[str]:
    """Start a server for the bundle on the CPU; yield its address."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    command = [sys.executable, "-m", "pcae_serve", f"--bundle={bundle}", f"--port={port}"]
    command += ["--device=cpu", "--profile-s=0.5", f"--cache-dir={bundle}-cache"]
    process = subprocess.Popen(
        command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
    )
    url = f"http://127.0.0.1:{port}"
    try:
        while not ready(url):
            if process.poll() is not None:
                raise RuntimeError(f"the server did not start: {process.communicate()[1]}")
            time.sleep(0.1)
        yield url
    finally:
        process.terminate()
        process.communicate()


def ready(url: str) -> bool:
    try:
        return httpx2.get(f"{url}/readyz").status_code == 200
    except httpx2.TransportError:
        return False


def table(rows: list[Row]) -> Iterator[str]:
    """Yield the rows as a Markdown table."""
    yield (
        "| checkpoint | answers | images | largest difference | largest value | cosine"
        " | same class |"
    )
    yield "| --- |" + " --- |" * 6
    for row in rows:
        same = "" if row.same_class is None else f"{100 * row.same_class:.0f} %"
        yield (
            f"| {row.case} | {row.answers} | {row.images} | {row.largest:.1e} | {row.scale:.2f}"
            f" | {row.cosine:.7f} | {same} |"
        )


if __name__ == "__main__":
    main()
