"""Peak memory of one training step of ViT-B/16, with and without --checkpoint-gradients.

benchmarks/gradient_memory.py [BATCH …]      default: 4 16; a process for each measurement

Float32 on the CPU, AdamW, one budget. The peak is that of the process, Python and torch included.
"""

import resource
import subprocess
import sys

import torch

from pcae_training.block import Block
from pcae_training.model import VisionTransformer
from pcae_training.vit_config import ViTConfig

ROUNDS = 3


def step(batch: int, recompute: bool) -> float:
    """Run one step; return the peak of this process in GB."""
    torch.manual_seed(0)
    model = VisionTransformer(ViTConfig(classes=10))
    for block in (m for m in model.modules() if isinstance(m, Block)):
        block.recompute = recompute
    optimiser = torch.optim.AdamW(model.parameters())
    model(torch.rand(batch, 3, 224, 224)).square().sum().backward()
    optimiser.step()
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9


def main(batches: list[int]) -> None:
    """Print the peaks of each batch size, alternating."""
    for batch in batches:
        peaks: dict[str, list[float]] = {"without": [], "with": []}
        for _ in range(ROUNDS):
            for name in peaks:
                command = [sys.executable, __file__, "--step", str(batch), name]
                done = subprocess.run(command, check=True, capture_output=True, text=True)
                peaks[name].append(float(done.stdout))
        shown = "; ".join(f"{name} {min(p):.2f} to {max(p):.2f} GB" for name, p in peaks.items())
        print(f"batch {batch}, {ROUNDS} processes each: {shown}", flush=True)


if __name__ == "__main__":
    if sys.argv[1:2] == ["--step"]:
        print(step(int(sys.argv[2]), sys.argv[3] == "with"))
    else:
        main([int(each) for each in sys.argv[1:]] or [4, 16])
