"""The order of an epoch in which each class occurs equally often."""

import torch
from torch import Tensor


def balanced_order(labels: Tensor, generator: torch.Generator) -> Tensor:
    """Return as many rows as there are labels, int64 [rows]: equally many of each class.

    labels: int64 [rows]. The images of a class are drawn without replacement, again from the start
    once all have been drawn. The number of images of two classes differs by at most one.
    """
    present = torch.unique(labels)
    turns = torch.randperm(len(present), generator=generator)  # who gets what is left over
    quota = torch.full((len(present),), len(labels) // len(present))
    quota[turns[: len(labels) % len(present)]] += 1
    rows = []
    for label, count in zip(present.tolist(), quota.tolist(), strict=True):
        own = (labels == label).nonzero().flatten()
        rounds = -(-count // len(own))
        drawn = [own[torch.randperm(len(own), generator=generator)] for _ in range(rounds)]
        rows.append(torch.cat(drawn)[:count])
    every = torch.cat(rows)
    return every[torch.randperm(len(every), generator=generator)]
