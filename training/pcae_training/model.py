"""The vision transformer and its progressive token reduction (PTR): the one definition.

Parameter names are those of timm, MAE and DeiT. The model knows pixels already normalised to
float; it knows nothing of budgets or tiers, only how many patches to keep after each stage.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_serve.tokens import REDUCTION_POINTS, Geometry


@dataclass(frozen=True)
class ViTConfig:
    """Sizes of a plain ViT; the defaults are ViT-B/16 at 224."""

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 1000
    pooling: Literal["mean", "cls"] = "mean"  # mean over patches as MAE fine-tunes, or CLS as DeiT
    norm_eps: float = 1e-6  # timm, MAE and DeiT; torch's own default is 1e-5
    reduction_points: tuple[int, ...] = REDUCTION_POINTS

    def __post_init__(self) -> None:
        if self.image_size % self.patch_size:
            raise ValueError(f"patch size {self.patch_size} does not divide {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide width {self.width}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4")
        points = self.reduction_points
        if any(not 0 <= point < self.depth for point in points):
            raise ValueError(f"reduction points {points} outside {self.depth} blocks")
        if list(points) != sorted(set(points)):
            raise ValueError(f"reduction points {points} must rise")

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def geometry(self) -> Geometry:
        """What token arithmetic needs to know of this model."""
        return Geometry(
            patches=self.grid**2,
            width=self.width,
            depth=self.depth,
            patch_values=self.channels * self.patch_size**2,
            classes=self.classes,
            mlp_ratio=self.mlp_ratio,
            reduction_points=self.reduction_points,
        )


class Reduced(NamedTuple):
    """What one reduction stage leaves of n patches."""

    kept: Tensor  # [B, m, D], least similar to the mean first
    dropped_mean: Tensor  # [B, 1, D], not a number where nothing was dropped
    indices: Tensor  # [B, m], int64: where in the n patches each kept one stood


def redundancy(patches: Tensor) -> Tensor:
    """Cosine of every patch to the mean patch (paper, equation 3): [B, n, D] to float32 [B, n]."""
    patches = patches.float()  # near ties flip with precision, so never rank in half
    return F.cosine_similarity(patches, patches.mean(dim=1, keepdim=True), dim=-1)


def reduce_patches(patches: Tensor, keep: int, dropped: int | Tensor) -> Reduced:
    """Keep the `keep` patches least like the mean patch, and average the `dropped` others.

    patches [B, n, D]. `dropped` is n - keep; the elastic export passes it as a tensor.
    """
    index = redundancy(patches).topk(keep, dim=1, largest=False).indices
    kept = patches.gather(1, index.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
    mean = (patches.sum(dim=1) - kept.sum(dim=1)) / dropped  # no second gather
    return Reduced(kept, mean.unsqueeze(1), index)


class PatchEmbed(nn.Module):
    """[B, C, H, W] to [B, patches, D], row by row."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.width, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        grid: Tensor = self.proj(images)  # [B, D, H / p, W / p]
        return grid.flatten(2).transpose(1, 2)


class Attention(nn.Module):
    """Multi-head self-attention, fused."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.heads = config.heads
        self.qkv = nn.Linear(config.width, 3 * config.width)
        self.proj = nn.Linear(config.width, config.width)

    def forward(self, x: Tensor) -> Tensor:
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        q, k, v = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # each [B, heads, N, D / heads]
        x = F.scaled_dot_product_attention(q, k, v)
        x = self.proj(x.transpose(1, 2).reshape(batch, tokens, width))
        return x


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.fc1 = nn.Linear(config.width, config.hidden)
        self.fc2 = nn.Linear(config.hidden, config.width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
        return x


class Block(nn.Module):
    """A pre-norm transformer block."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.attn = Attention(config)
        self.norm2 = nn.LayerNorm(config.width, eps=config.norm_eps)
        self.mlp = Mlp(config)

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attn(self.norm1(x))
        x = x + self.mlp(self.norm2(x))
        return x


class VisionTransformer(nn.Module):
    """A plain ViT classifier that can drop redundant patches as it runs (DESIGN section 2)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.pos_embed = nn.Parameter(sincos_position(config.width, config.grid))
        self.blocks = nn.ModuleList(Block(config) for _ in range(config.depth))
        final_norm = nn.LayerNorm(config.width, eps=config.norm_eps)
        if config.pooling == "mean":  # timm's names: `fc_norm` after mean pooling, else `norm`
            self.fc_norm = final_norm
        else:
            self.norm = final_norm
        self.head = nn.Linear(config.width, config.classes)
        self.apply(_init)
        nn.init.normal_(self.cls_token, std=0.02)

    def forward(self, images: Tensor, token_counts: Sequence[int] | None = None) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W].

        token_counts: patches left after each reduction point; None runs the plain ViT.
        """
        return self.classify(images, token_counts)[0]

    def classify(
        self, images: Tensor, token_counts: Sequence[int] | None = None
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the original indices [B, m_i] of the patches left after each stage."""
        counts = dict(
            zip(self.config.reduction_points, token_counts or (), strict=bool(token_counts))
        )
        x = self.embed(images)  # [B, 1 + n + e, D]: CLS, patches, means of what was dropped
        n = x.shape[1] - 1
        position = torch.arange(n, device=x.device).expand(len(x), -1)
        kept = []
        for i, block in enumerate(self.blocks):
            x = block(x)
            if i in counts:
                if (m := counts[i]) < n:
                    cls, patches, appended = x.split([1, n, x.shape[1] - 1 - n], dim=1)
                    patches, mean, index = reduce_patches(patches, m, n - m)
                    x = torch.cat([cls, patches, appended, mean], dim=1)
                    position, n = position.gather(1, index), m
                kept.append(position)
        return self.pool(x[:, 0], x[:, 1 : 1 + n]), kept

    def embed(self, images: Tensor) -> Tensor:
        """CLS and patch tokens with their positions: [B, 1 + n, D]."""
        cls = self.cls_token.expand(images.shape[0], -1, -1)  # len() would fix the exported batch
        return torch.cat([cls, self.patch_embed(images)], dim=1) + self.pos_embed

    def pool(self, cls: Tensor, patches: Tensor) -> Tensor:
        """Logits [B, classes] of CLS [B, D] and patches [B, n, D].

        The appended means are left out (paper, section 3.4).
        """
        mean = self.config.pooling == "mean"
        pooled = self.fc_norm(patches.mean(dim=1)) if mean else self.norm(cls)
        logits: Tensor = self.head(pooled)
        return logits


def sincos_position(width: int, grid: int) -> Tensor:
    """Fixed 2-D sine-cosine positions as MAE starts from: [1, 1 + grid^2, width], zeros for CLS."""
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)  # [grid, D / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D / 2]
    column = axis.repeat(grid, 1)  # x runs fastest
    row = axis.repeat_interleave(grid, dim=0)
    table = torch.cat([column, row], dim=1).float()
    return torch.cat([torch.zeros(1, width), table])[None]


def _init(module: nn.Module) -> None:
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):  # as the linear layer that a patch embedding is
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
