"""A block of the vision transformer. Parameter names are those of timm, MAE and DeiT."""

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from pcae_training.mlp import Activation, GatedMlp, Mlp
from pcae_training.reduction import attention_received
from pcae_training.rotary import Rotation


class Attention(nn.Module):
    """Multi-head self-attention, fused."""

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, ...]:
        """Return queries, keys and values of x [B, N, D], each [B, heads, N, D / heads]."""
        return tuple(part.transpose(1, 2) for part in self.project(x, rotation))

    def project(self, x: Tensor, rotation: Rotation | None = None) -> tuple[Tensor, ...]:
        """Return queries, keys and values of x [B, N, D], each [B, N, heads, D / heads].

        rotation: turns queries and keys.
        """
        batch, tokens, width = x.shape
        heads = self.qkv(x).view(batch, tokens, 3 * self.heads, width // self.heads)
        if rotation is not None:
            turned, values = heads.split([2 * self.heads, self.heads], dim=2)
            return (*rotation.turn(turned).chunk(2, dim=2), values)
        return tuple(heads.chunk(3, dim=2))

    def forward(
        self, x: Tensor, bias: Tensor | None = None, rotation: Rotation | None = None
    ) -> Tensor:
        """Return [B, N, D] of x [B, N, D].

        bias [B, heads, N, N]: added before the softmax. rotation: see `project`.
        """
        q, k, v = self.split(x, rotation)
        mask = None if bias is None else bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x


class LayerScale(nn.Module):
    """A learnt factor per channel on a branch (DINOv2)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.gamma = nn.Parameter(torch.full((width,), 1e-5))

    def forward(self, x: Tensor) -> Tensor:
        return x * self.gamma


class Block(nn.Module):
    """A pre-norm transformer block."""

    #: Compute the block again in the backward pass, instead of keeping what it computes inside.
    recompute = False

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        layer_scale: bool = False,
        activation: Activation = "gelu",
        gated_mlp: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = (GatedMlp if gated_mlp else Mlp)(width, hidden, activation)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(
        self,
        x: Tensor,
        drop_path: Tensor | None = None,
        bias: Tensor | None = None,
        rotation: Rotation | None = None,
    ) -> Tensor:
        """Return [B, N, D] of x [B, N, D].

        drop_path [2, B]: factors on each sample's two branches. bias, rotation: see `Attention`.
        """
        if self.recompute and torch.is_grad_enabled():
            inputs = (x, drop_path, bias, rotation)
            transformed: Tensor = checkpoint(
                self.transform,
                *inputs,
                use_reentrant=False,
                preserve_rng_state=False,  # nothing here is random
            )
            return transformed
        return self.transform(x, drop_path, bias, rotation)

    def transform(
        self,
        x: Tensor,
        drop_path: Tensor | None,
        bias: Tensor | None,
        rotation: Rotation | None,
    ) -> Tensor:
        """Return what `forward` does."""
        attended = self.ls1(self.attn(self.norm1(x), bias, rotation))
        if drop_path is not None:
            attended = attended * drop_path[0, :, None, None].to(attended.dtype)
        x = x + attended
        transformed = self.ls2(self.mlp(self.norm2(x)))
        if drop_path is not None:
            transformed = transformed * drop_path[1, :, None, None].to(transformed.dtype)
        x = x + transformed
        return x

    def attention_received(self, x: Tensor, rotation: Rotation | None = None) -> Tensor:
        """Return the attention that each token of x [B, N, D] receives in this block: [B, N]."""
        q, k, _ = self.attn.split(self.norm1(x), rotation)
        return attention_received(q, k)
