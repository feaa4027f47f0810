"""The demo's teacher: a small residual CNN on Fashion-MNIST, written as an ONNX graph.

    python training/recipes/fashion_mnist_teacher.py DATA TEACHER.onnx [--epochs 15] [--seed 0]

DATA is a folder of Fashion-MNIST parquet files, or zalando-datasets/fashion_mnist on the hub. It is
trained on the same 55,000 images as the demo (the same 5,000 are held out). The graph takes uint8
[N, 28, 28, 3] and returns logits [N, 10]: a --teacher of `pcae-train finetune`. An interrupted run
continues from TEACHER.pt, which is removed at the end.
"""

import argparse
import json
import time
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_serve.bundle.preprocess import Preprocess
from pcae_training.augment import Augmentation
from pcae_training.average import WeightAverage
from pcae_training.data import LabelledImages, load
from pcae_training.holdout import hold_out
from pcae_training.sample_rng import SampleRng
from pcae_training.schedule import cosine

SIZE, BATCH, HELD_OUT = 28, 128, 5_000
PEAK_LR, WEIGHT_DECAY, AVERAGE = 2e-3, 0.05, 0.999
#: Mean and standard deviation of the grey values of the training images, in [0, 1].
MEAN, STD = 0.286, 0.353


class Block(nn.Module):
    """Two 3x3 convolutions next to a shortcut."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.first, self.second = convolution(width, width), convolution(width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Return [B, width, H, W]."""
        return F.relu(x + self.second(F.relu(self.first(x))))


class Network(nn.Module):
    """29 million multiply-adds, 0.4 million parameters."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            convolution(1, 32), nn.ReLU(),
            convolution(32, 48, stride=2), nn.ReLU(), Block(48),
            convolution(48, 96, stride=2), nn.ReLU(), Block(96), Block(96),
        )  # fmt: skip
        self.head = nn.Linear(96, 10)

    def forward(self, grey: Tensor) -> Tensor:
        """Return logits [B, 10] of normalised grey values [B, 1, 28, 28]."""
        logits: Tensor = self.head(self.features(grey).mean(dim=(2, 3)))
        return logits


class OnPixels(nn.Module):
    """The network on uint8 pixels, as it is exported."""

    def __init__(self, network: nn.Module) -> None:
        super().__init__()
        self.network = network

    def forward(self, pixels: Tensor) -> Tensor:
        """Return logits [N, 10] of pixels uint8 [N, 28, 28, 3]."""
        grey = pixels.permute(0, 3, 1, 2).float().mean(dim=1, keepdim=True)
        logits: Tensor = self.network((grey / 255 - MEAN) / STD)
        return logits


def convolution(inputs: int, outputs: int, stride: int = 1) -> nn.Module:
    """Return a 3x3 convolution with batch norm."""
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, padding=1, bias=False), nn.BatchNorm2d(outputs)
    )


def train(images: LabelledImages, held_out: LabelledImages, options: argparse.Namespace) -> Network:
    """Train, with a checkpoint after each epoch, and return the averaged network."""
    torch.manual_seed(options.seed)
    network = Network()
    nn.Module.to(network, memory_format=torch.channels_last)  # type: ignore[call-overload]
    average = WeightAverage(network, AVERAGE)
    optimizer = torch.optim.AdamW(network.parameters(), weight_decay=WEIGHT_DECAY, fused=True)
    augment = Augmentation(size=SIZE, shift=2, flip=True, erase=0.5)
    steps = len(images) // BATCH
    saved, first = options.out.with_suffix(".pt"), 0
    if saved.exists():
        state = torch.load(saved, weights_only=True)
        first = state["epoch"]
        network.load_state_dict(state["network"])
        average.load_state_dict(state["average"])
        optimizer.load_state_dict(state["optimizer"])
    for epoch in range(first, options.epochs):
        start_s, total = time.monotonic(), 0.0
        slices = [slice(i * BATCH, (i + 1) * BATCH) for i in range(steps)]
        batches = images.epoch(options.seed, epoch, slices, torch.device("cpu"))
        network.train()
        for step, (pixels, labels) in enumerate(batches, epoch * steps):
            factor = cosine((step + 0.5) / (options.epochs * steps), warmup=0.05)
            for group in optimizer.param_groups:
                group["lr"] = PEAK_LR * factor
            rng = SampleRng(options.seed, step, BATCH)
            grey = (augment(pixels.float() / 255, rng).mean(dim=1, keepdim=True) - MEAN) / STD
            grey = augment.erase_rectangles(grey.expand(-1, 3, -1, -1), rng)[:, :1]
            logits = network(grey.contiguous(memory_format=torch.channels_last))
            loss = F.cross_entropy(logits, labels, label_smoothing=0.05)
            optimizer.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            optimizer.step()
            average.update(network)
            total += loss.item()
        state = {"epoch": epoch + 1, "network": network.state_dict()}
        state |= {"average": average.state_dict(), "optimizer": optimizer.state_dict()}
        torch.save(state, saved)
        print(
            f"epoch {epoch + 1}/{options.epochs}: loss {total / steps:.4f},"
            f" held-out top-1 {accuracy(average.module, held_out):.2%},"
            f" {time.monotonic() - start_s:.0f} s",
            flush=True,
        )
    averaged = average.module
    assert isinstance(averaged, Network)
    return averaged


@torch.inference_mode()
def accuracy(network: nn.Module, images: LabelledImages) -> float:
    """Return top-1 on images, in [0, 1]."""
    network.eval()
    model, correct = OnPixels(network), 0
    for pixels, labels in images.batches(range(len(images)), 500):
        correct += int((model(pixels.permute(0, 2, 3, 1)).argmax(1) == labels).sum())
    return correct / len(images)


def main() -> None:
    """Train, measure and export."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("data")
    parser.add_argument("out", type=Path)
    parser.add_argument("--epochs", type=int, default=15)
    parser.add_argument("--seed", type=int, default=0, help="of weights, order and augmentation")
    options = parser.parse_args()
    preprocess = Preprocess(SIZE, SIZE, (MEAN,) * 3, (STD,) * 3)
    images = load(options.data, "train", preprocess)
    split = hold_out(images.labels, HELD_OUT, images.name, seed=0)
    held_out = images.subset(split.holdout).in_memory()
    network = train(images.subset(split.train).in_memory(), held_out, options).eval()
    program = torch.onnx.export(
        OnPixels(network),
        (torch.zeros(2, SIZE, SIZE, 3, dtype=torch.uint8),),
        dynamo=True,
        dynamic_shapes=({0: torch.export.Dim.DYNAMIC},),
        input_names=["pixels"],
        output_names=["logits"],
        verbose=False,
    )
    assert program is not None
    program.save(str(options.out))
    test = load(options.data, "test", preprocess).in_memory()
    figures = {
        "parameters": sum(p.numel() for p in network.parameters()),
        "epochs": options.epochs,
        "holdout_top1": accuracy(network, held_out),
        "test_top1": accuracy(network, test),
    }
    options.out.with_suffix(".json").write_text(json.dumps(figures, indent=2) + "\n")
    options.out.with_suffix(".pt").unlink()
    print(figures)


if __name__ == "__main__":
    main()
