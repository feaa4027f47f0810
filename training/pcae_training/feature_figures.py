"""Figures that show whether features still depend on the image: rank, deviation, k-NN accuracy.

They are computed in float32 and float64 whatever the run's number format: the rounding of bfloat16
varies from image to image in all directions, so it looks like features of full rank.
"""

from dataclasses import dataclass, field

import torch
from torch import Tensor

#: Neighbours that vote.
NEIGHBOURS = 5
#: Differences between images below this share of the features' size are rounding.
ROUNDING = 1e-5


def effective_rank(features: Tensor) -> float:
    """Return exp of the entropy of the shares of variance of features [n, D]; 0 if none differ.

    The shares are the squared singular values of the centred features, divided by their sum. The
    result is 1 if all images lie on a line, and D if they are spread evenly over D dimensions.
    """
    exact = features.double()
    values = torch.linalg.svdvals(exact - exact.mean(dim=0))
    largest_rounding = ROUNDING * float(exact.square().mean().sqrt()) * max(exact.shape) ** 0.5
    values = values[values > largest_rounding]
    if len(values) == 0:
        return 0.0
    shares = values.square() / values.square().sum()
    return float(torch.special.entr(shares).sum().exp())


def knn_accuracy(features: Tensor, labels: Tensor, neighbours: int = NEIGHBOURS) -> float:
    """Return the share of features [n, D] whose nearest others, by distance, vote for their label.

    Every image is classified by all others (leave-one-out). Among classes with equal votes, the one
    of the nearest image wins.
    """
    count = min(neighbours, len(features) - 1)
    distance = torch.cdist(features.double(), features.double())
    nearest = distance.fill_diagonal_(torch.inf).topk(count, largest=False).indices
    voted = labels[nearest]  # [n, count], from the nearest
    ahead = 1 + 2.0 ** -torch.arange(4.0, 4 + count, device=features.device)  # decides ties
    votes = ((voted[:, :, None] == voted[:, None, :]) * ahead).sum(dim=2)  # for each one's label
    winner = voted.gather(1, votes.argmax(dim=1, keepdim=True))[:, 0]
    return float((winner == labels).double().mean())


@dataclass
class TokenSpread:
    """Statistics of patch tokens, added up batch by batch."""

    means: list[Tensor] = field(default_factory=list)  # over the patches: float32 [b, D] each
    _sum: Tensor | float = 0.0  # over the images: float64 [patches, D]
    _squares: Tensor | float = 0.0

    def add(self, tokens: Tensor) -> None:
        """Add images: tokens [b, patches, D], the same positions in all of them."""
        exact = tokens.double()
        self.means.append(tokens.float().mean(dim=1))
        self._sum = self._sum + exact.sum(dim=0)
        self._squares = self._squares + exact.square().sum(dim=0)

    @property
    def features(self) -> Tensor:
        """The mean over the patches of each image, float32 [n, D]."""
        return torch.cat(self.means)

    @property
    def deviation(self) -> float:
        """The standard deviation across images at a fixed position, averaged over positions."""
        n = sum(map(len, self.means))
        mean = torch.as_tensor(self._sum) / n
        variance = torch.as_tensor(self._squares) / n - mean.square()
        return float(variance.clamp(min=0).sqrt().mean())
