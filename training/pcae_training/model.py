"""The vision transformer that can drop redundant patches as it runs: the one definition.

Parameter names are those of timm, MAE and DeiT. The model knows pixels already normalised to
float; it knows nothing of budgets or tiers, only how many patches to keep after each stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Literal, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_serve.bundle.tokens import REDUCTION_POINTS, Geometry, Rule
from pcae_training.reduction import RULES, Tokens, attention_received, reduce_tokens


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
    classes: int = 1000  # 0: no head, the model gives features
    pooling: Literal["mean", "cls"] = "mean"  # mean over patches as MAE fine-tunes, or CLS as DeiT
    norm_eps: float = 1e-6  # timm, MAE and DeiT; torch's own default is 1e-5
    reduction_points: tuple[int, ...] = REDUCTION_POINTS
    reduction: Rule = "ptr"
    qkv_bias: bool = True
    layer_scale: bool = False  # DINOv2 scales each branch
    distilled: bool = False  # DeiT's second token and head
    registers: int = 0  # DINOv2's extra tokens, without positions

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
        if self.reduction not in RULES:
            raise ValueError(f"reduction {self.reduction!r} is none of {', '.join(RULES)}")
        if self.distilled and self.pooling != "cls":
            raise ValueError("a distilled model pools its CLS and distillation tokens")

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def grid(self) -> int:
        """Patches along one side."""
        return self.image_size // self.patch_size

    @property
    def positioned(self) -> int:
        """Tokens before the patches that have a position embedding: CLS, and distillation."""
        return 1 + self.distilled

    @property
    def prefix(self) -> int:
        """Tokens before the patches: CLS, distillation, registers. No stage drops them."""
        return self.positioned + self.registers

    @property
    def geometry(self) -> Geometry:
        """What token arithmetic needs to know of this model."""
        return Geometry(
            patches=self.grid**2,
            width=self.width,
            depth=self.depth,
            patch_values=self.channels * self.patch_size**2,
            classes=self.classes,
            prefix_tokens=self.prefix,
            mlp_ratio=self.mlp_ratio,
            reduction_points=self.reduction_points,
        )


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

    def __init__(self, width: int, heads: int, qkv_bias: bool = True) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width, bias=qkv_bias)
        self.proj = nn.Linear(width, width)

    def split(self, x: Tensor) -> tuple[Tensor, ...]:
        """Queries, keys and values of x [B, N, D], each [B, heads, N, D / heads]."""
        batch, tokens, width = x.shape
        qkv = self.qkv(x).view(batch, tokens, 3, self.heads, width // self.heads)
        return tuple(qkv.permute(2, 0, 3, 1, 4).unbind(0))

    def forward(self, x: Tensor, bias: Tensor | None = None) -> Tensor:
        """x [B, N, D]; bias, broadcast to [B, heads, N, N], is added before the softmax."""
        q, k, v = self.split(x)
        mask = None if bias is None else bias.to(q.dtype)
        mixed = F.scaled_dot_product_attention(q, k, v, attn_mask=mask)
        x = self.proj(mixed.transpose(1, 2).reshape(x.shape))
        return x


class Mlp(nn.Module):
    """Two linear layers with an exact GELU between."""

    def __init__(self, width: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, hidden)
        self.fc2 = nn.Linear(hidden, width)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc2(F.gelu(self.fc1(x)))
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

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int,
        norm_eps: float = 1e-6,
        qkv_bias: bool = True,
        layer_scale: bool = False,
    ) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width, eps=norm_eps)
        self.attn = Attention(width, heads, qkv_bias)
        self.ls1 = LayerScale(width) if layer_scale else nn.Identity()
        self.norm2 = nn.LayerNorm(width, eps=norm_eps)
        self.mlp = Mlp(width, hidden)
        self.ls2 = LayerScale(width) if layer_scale else nn.Identity()

    def forward(
        self, x: Tensor, drop_path: Tensor | None = None, bias: Tensor | None = None
    ) -> Tensor:
        """x [B, N, D]; drop_path [2, B]: what each sample's two branches are multiplied by.

        bias: see `Attention`.
        """
        attended = self.ls1(self.attn(self.norm1(x), bias))
        if drop_path is not None:
            attended = attended * drop_path[0, :, None, None].to(attended.dtype)
        x = x + attended
        transformed = self.ls2(self.mlp(self.norm2(x)))
        if drop_path is not None:
            transformed = transformed * drop_path[1, :, None, None].to(transformed.dtype)
        x = x + transformed
        return x

    def attention_received(self, x: Tensor) -> Tensor:
        """How much the tokens of x [B, N, D] attend to each one in this block: [B, N]."""
        q, k, _ = self.attn.split(self.norm1(x))
        return attention_received(q, k)


class VisionTransformer(nn.Module):
    """A plain ViT that can drop redundant patches as it runs (DESIGN section 2)."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width))
        self.pos_embed = nn.Parameter(sincos_position(width, config.grid, config.positioned))
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.hidden,
                config.norm_eps,
                config.qkv_bias,
                config.layer_scale,
            )
            for _ in range(config.depth)
        )
        final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        if config.pooling == "mean":  # timm's names: `fc_norm` after mean pooling, else `norm`
            self.fc_norm = final_norm
        else:
            self.norm = final_norm
        self.head = nn.Linear(width, config.classes) if config.classes else nn.Identity()
        if config.distilled:
            self.head_dist = nn.Linear(width, config.classes) if config.classes else nn.Identity()
        self.apply(init_weights)
        for name in ("cls_token", "dist_token", "reg_token"):
            if hasattr(self, name):
                nn.init.normal_(getattr(self, name), std=0.02)

    def forward(
        self,
        images: Tensor,
        token_counts: Sequence[int] | None = None,
        *,
        drop_path: Tensor | None = None,
        noise: Tensor | None = None,
    ) -> Tensor:
        """Logits [B, classes] of normalised images [B, C, H, W]; features [B, D] without a head.

        token_counts: patches left after each reduction point; None runs the plain ViT.
        drop_path [depth, 2, B]: factors on the branches. noise [B, patches]: what the `random`
        rule ranks by; drawn here where None.
        """
        return self.classify(images, token_counts, drop_path=drop_path, noise=noise)[0]

    def classify(
        self,
        images: Tensor,
        token_counts: Sequence[int] | None = None,
        *,
        drop_path: Tensor | None = None,
        noise: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor]]:
        """As `forward`, with the original indices [B, m_i] of the patches left after each stage."""
        positions, tokens = [], None
        layers = self.walk(
            self.embed(images), token_counts, drop_path=drop_path, noise=noise, kept=kept
        )
        for i, tokens in enumerate(layers, start=-1):
            if token_counts and i in self.config.reduction_points:
                positions.append(tokens.position)
        assert tokens is not None  # `walk` begins with the tokens it is given
        return self.pool(tokens), positions

    def walk(
        self,
        x: Tensor,
        token_counts: Sequence[int] | None = None,
        *,
        drop_path: Tensor | None = None,
        noise: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
        prefix: int | None = None,
        points: Sequence[int] | None = None,
        append: bool = True,
    ) -> Iterator[Tokens]:
        """The tokens as they come in, [B, prefix + n, D], then as each block and stage leaves them.

        prefix: how many of x are no patches (default: all of the model's own). points: the blocks
        after which `token_counts` hold (default: the model's). append: whether the mean of what a
        stage drops goes on as a token (section 3.4), or not (pretraining, section 3.2).
        kept, per stage [B, m_i]: original indices of the patches to keep, whatever the rule says.
        """
        points = self.config.reduction_points if points is None else points
        counts = dict(zip(points, token_counts or (), strict=bool(token_counts)))
        chosen = dict(zip(points, kept, strict=True)) if kept is not None else {}
        tokens = self.tokens(x, prefix)
        yield tokens
        if self.config.reduction == "random" and counts and noise is None:
            noise = torch.rand(tokens.position.shape, device=x.device)
        for i, block in enumerate(cast(Iterable[Block], self.blocks)):
            n, m = tokens.patches, counts.get(i, tokens.patches)
            scores = None
            if m < n and i in chosen:
                scores = (tokens.position[..., None] != chosen[i][:, None]).all(dim=-1).float()
            elif m < n:
                scores = self.scores(block, tokens, noise)
            factors = None if drop_path is None else drop_path[i]
            tokens = tokens._replace(x=block(tokens.x, factors, tokens.attention_bias))
            if m < n:
                tokens = reduce_tokens(tokens, m, n - m, self.config.reduction, scores, int(append))
            yield tokens

    def tokens(self, x: Tensor, prefix: int | None = None) -> Tokens:
        """x [B, prefix + n, D] as the tokens before the first block."""
        prefix = self.config.prefix if prefix is None else prefix
        n = x.shape[1] - prefix
        return Tokens(x, n, torch.arange(n, device=x.device).expand(x.shape[0], -1), prefix)

    def scores(self, block: Block, tokens: Tokens, noise: Tensor | None) -> Tensor | None:
        """What the stage after `block` ranks by, where that is known before the block has run.

        [B, n], the lowest stay; None: by the tokens that come out of it. noise [1 or B, patches].
        """
        if self.config.reduction == "random":
            assert noise is not None
            return noise.expand(tokens.position.shape[0], -1).gather(1, tokens.position)
        if self.config.reduction == "attention":
            received = block.attention_received(tokens.x)
            return -received[:, tokens.prefix : tokens.prefix + tokens.patches]
        return None

    def embed(self, images: Tensor) -> Tensor:
        """Prefix and patch tokens with their positions: [B, prefix + n, D]."""
        patches = self.embed_patches(images)
        return torch.cat([self.prefix_tokens(images.shape[0]), patches], dim=1)

    def embed_patches(self, images: Tensor) -> Tensor:
        """Patch tokens with their positions: [B, n, D]."""
        patches: Tensor = self.patch_embed(images)
        return patches + self.pos_embed[:, self.config.positioned :]

    def prefix_tokens(self, batch: int) -> Tensor:
        """CLS, distillation and register tokens, with positions where they have one."""
        tokens: Tensor = self.cls_token
        if self.config.distilled:
            tokens = torch.cat([tokens, self.dist_token], dim=1)
        tokens = tokens + self.pos_embed[:, : self.config.positioned]
        if self.config.registers:
            tokens = torch.cat([tokens, self.reg_token], dim=1)
        return tokens.expand(batch, -1, -1)

    def pool(self, tokens: Tokens) -> Tensor:
        """Logits [B, classes] of the last block's tokens; features [B, D] without a head."""
        if self.config.pooling == "mean":
            logits: Tensor = self.head(self.fc_norm(tokens.pooled()))
            return logits
        logits = self.head(self.norm(tokens.x[:, 0]))
        if self.config.distilled:  # DeiT, at inference: the mean of both heads
            logits = (logits + self.head_dist(self.norm(tokens.x[:, 1]))) / 2
        return logits


def sincos_position(width: int, grid: int, positioned: int = 1) -> Tensor:
    """Fixed 2-D sine-cosine positions as MAE starts from: [1, positioned + grid^2, width].

    Zeros for the `positioned` tokens before the patches.
    """
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)  # [grid, D / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D / 2]
    column = axis.repeat(grid, 1)  # x runs fastest
    row = axis.repeat_interleave(grid, dim=0)
    table = torch.cat([column, row], dim=1).float()
    return torch.cat([torch.zeros(positioned, width), table])[None]


def init_weights(module: nn.Module) -> None:
    """MAE's initialisation: Xavier uniform, no biases, the patch embedding as a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
