"""Pooling by attention: one learnt query attends to an image's tokens (SigLIP).

Parameter names are those of timm.
"""

import torch
from torch import Tensor, nn

from pcae_training.mlp import Activation, Mlp


class AttentionPool(nn.Module):
    """Attention of one learnt query, and an MLP on its result."""

    def __init__(
        self, width: int, heads: int, hidden: int, norm_eps: float, activation: Activation
    ) -> None:
        super().__init__()
        self.heads = heads
        self.latent = nn.Parameter(torch.zeros(1, 1, width))
        self.q = nn.Linear(width, width)
        self.kv = nn.Linear(width, 2 * width)
        self.proj = nn.Linear(width, width)
        self.norm = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden, activation)
        nn.init.normal_(self.latent, std=0.02)

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """Return [B, D] of tokens x [B, K, D]; bias is added before the softmax, [B, 1, 1, K]."""
        batch, tokens, width = x.shape
        split = (self.heads, width // self.heads)
        query = self.q(self.latent).view(1, 1, *split).transpose(1, 2)
        k, v = self.kv(x).view(batch, tokens, 2, *split).permute(2, 0, 3, 1, 4).unbind(0)
        scores = (query * split[1] ** -0.5) @ k.transpose(-2, -1)  # [B, heads, 1, K]
        if bias is not None:
            scores = scores + bias
        mixed = scores.softmax(dim=-1) @ v  # [B, heads, 1, D / heads]
        pooled: Tensor = self.proj(mixed.reshape(batch, width))
        pooled = pooled + self.mlp(self.norm(pooled))
        return pooled
