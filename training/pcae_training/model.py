"""The vision transformer with progressive token reduction: the one definition of the model.

Parameter names are those of timm, MAE and DeiT. Inputs are normalised float images, and the number
of patches to keep after each stage.
"""

from collections.abc import Iterable, Iterator, Sequence
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from pcae_training.attention_pool import AttentionPool
from pcae_training.block import Block
from pcae_training.reduction import PatchGrid, Tokens, reduce_tokens
from pcae_training.rotary import RotaryPositions
from pcae_training.vit_config import ViTConfig as ViTConfig


class PatchEmbed(nn.Module):
    """Embed the patches of images [B, C, H, W], row by row: [B, patches, D]."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        size = config.patch_size
        self.proj = nn.Conv2d(config.channels, config.width, kernel_size=size, stride=size)

    def forward(self, images: Tensor) -> Tensor:
        grid: Tensor = self.proj(images)  # [B, D, H / p, W / p]
        return grid.flatten(2).transpose(1, 2)


class VisionTransformer(nn.Module):
    """A plain ViT with optional progressive token reduction."""

    def __init__(self, config: ViTConfig) -> None:
        super().__init__()
        self.config = config
        width = config.width
        self.patch_embed = PatchEmbed(config)
        if config.class_token:
            self.cls_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.distilled:
            self.dist_token = nn.Parameter(torch.zeros(1, 1, width))
        if config.registers:
            self.reg_token = nn.Parameter(torch.zeros(1, config.registers, width))
        if config.rope_theta:
            self.rotary = RotaryPositions(config.grid, width // config.heads, config.rope_theta)
        else:
            self.pos_embed = nn.Parameter(sincos_position(width, config.grid, config.positioned))
        if config.pre_norm:
            self.norm_pre = nn.LayerNorm(width, eps=config.norm_eps)
        self.blocks = nn.ModuleList(
            Block(
                width,
                config.heads,
                config.hidden,
                config.norm_eps,
                config.qkv_bias,
                config.layer_scale,
                config.activation,
                config.gated_mlp,
            )
            for _ in range(config.depth)
        )
        final_norm = nn.LayerNorm(width, eps=config.norm_eps)
        if config.pooling == "mean":  # timm's names: `fc_norm` after mean pooling, else `norm`
            self.fc_norm = final_norm
        else:
            self.norm = final_norm
        if config.pooling == "attention":
            self.attn_pool = AttentionPool(
                width, config.heads, config.hidden, config.norm_eps, config.activation
            )
        if config.projection:
            self.projection = nn.Linear(config.pooled * width, config.projection, bias=False)
        read = config.features
        self.head = nn.Linear(read, config.classes) if config.classes else nn.Identity()
        if config.distilled:
            self.head_dist = nn.Linear(read, config.classes) if config.classes else nn.Identity()
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
        """Return logits [B, classes] of normalised images [B, C, H, W]; without a head, features.

        token_counts: patches to keep after each reduction point; None runs the plain ViT.
        drop_path [depth, 2, B]: factors on the branches. noise [B, patches]: ranking of the
        `random` rule; drawn here if None.
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
        """Return `forward`'s result and the indices [B, m_i] of the patches kept after each stage.

        kept: see `walk`.
        """
        tokens, positions = self._last(
            images, token_counts, drop_path=drop_path, noise=noise, kept=kept
        )
        return self.pool(tokens), positions

    def classify_densely(
        self,
        images: Tensor,
        token_counts: Sequence[int] | None = None,
        *,
        noise: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
    ) -> tuple[Tensor, list[Tensor], Tensor]:
        """Return what `classify` does, and the patch grid (see `patch_grid`)."""
        tokens, positions = self._last(images, token_counts, noise=noise, kept=kept, dense=True)
        return self.pool(tokens), positions, self.patch_grid(tokens)

    def _last(
        self,
        images: Tensor,
        token_counts: Sequence[int] | None,
        *,
        drop_path: Tensor | None = None,
        noise: Tensor | None = None,
        kept: Sequence[Tensor] | None = None,
        dense: bool = False,
    ) -> tuple[Tokens, list[Tensor]]:
        """Return the tokens after the last block, and the patches kept after each stage."""
        positions, tokens = [], None
        layers = self.walk(
            self.embed(images), token_counts, drop_path=drop_path, noise=noise, kept=kept,
            dense=dense,
        )  # fmt: skip
        for i, tokens in enumerate(layers, start=-1):
            if token_counts and i in self.config.reduction_points:
                positions.append(tokens.position)
        assert tokens is not None  # `walk` yields at least the input tokens
        return tokens, positions

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
        dense: bool = False,
    ) -> Iterator[Tokens]:
        """Yield the input tokens x [B, prefix + n, D], then the tokens after each block and stage.

        prefix: number of tokens in x before the patches (default: the model's). points: blocks that
        `token_counts` apply after (default: the model's). append: whether the mean of the patches
        that a stage drops is appended (section 3.4), or not (pretraining, section 3.2). kept, per
        stage [B, m_i]: original indices of the patches to keep, instead of the rule's choice.
        dense: store the states of patches that are dropped, for `patch_grid`.
        """
        points = self.config.reduction_points if points is None else points
        counts = dict(zip(points, token_counts or (), strict=bool(token_counts)))
        chosen = dict(zip(points, kept, strict=True)) if kept is not None else {}
        tokens = self.tokens(x, prefix, dense)
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
            x = block(tokens.x, factors, tokens.attention_bias, tokens.rotation)
            tokens = tokens._replace(x=x)
            if m < n:
                tokens = reduce_tokens(tokens, m, n - m, self.config.reduction, scores, int(append))
            yield tokens

    def tokens(self, x: Tensor, prefix: int | None = None, dense: bool = False) -> Tokens:
        """Return x [B, prefix + n, D] as the tokens before the first block. dense: see `walk`."""
        prefix = self.config.prefix if prefix is None else prefix
        n = x.shape[1] - prefix
        position = torch.arange(n, device=x.device).expand(x.shape[0], -1)
        rotation = self.rotary(prefix) if self.config.rope_theta else None
        grid = PatchGrid() if dense else None
        return Tokens(x, n, position, prefix, rotation=rotation, grid=grid)

    def scores(self, block: Block, tokens: Tokens, noise: Tensor | None) -> Tensor | None:
        """Return the scores [B, n] of the stage after `block`, of which the lowest are kept.

        Return None if the rule ranks by the block's output. noise: [1 or B, patches].
        """
        if self.config.reduction == "random":
            assert noise is not None
            return noise.expand(tokens.position.shape[0], -1).gather(1, tokens.position)
        if self.config.reduction == "attention":
            received = block.attention_received(tokens.x, tokens.rotation)
            return -received[:, tokens.prefix : tokens.prefix + tokens.patches]
        return None

    @property
    def device(self) -> torch.device:
        """Return where the weights are."""
        return self.patch_embed.proj.weight.device

    def embed(self, images: Tensor) -> Tensor:
        """Return prefix and patch tokens, with positions unless they are rotary: [B, N, D]."""
        patches = self.embed_patches(images)
        x = patches
        if self.config.prefix:
            x = torch.cat([self.prefix_tokens(images.shape[0]), patches], dim=1)
        return self.norm_pre(x) if self.config.pre_norm else x

    def embed_patches(self, images: Tensor) -> Tensor:
        """Return patch tokens, with positions unless they are rotary: [B, n, D]."""
        patches: Tensor = self.patch_embed(images)
        if self.config.rope_theta:
            return patches
        return patches + self.pos_embed[:, self.config.positioned :]

    def prefix_tokens(self, batch: int) -> Tensor:
        """Return CLS, distillation and register tokens; only the first two may have positions."""
        names = {"cls_token": self.config.class_token, "dist_token": self.config.distilled}
        tokens = [getattr(self, name) for name, there in names.items() if there]
        if tokens and not self.config.rope_theta:
            positions = self.pos_embed[:, : self.config.positioned]
            tokens = [torch.cat(tokens, dim=1) + positions]
        if self.config.registers:
            tokens.append(self.reg_token)
        return torch.cat(tokens, dim=1).expand(batch, -1, -1)

    def patch_features(self, images: Tensor) -> Tensor:
        """Return the normed patch tokens [B, n, D] of normalised images, none dropped."""
        *_, last = self.walk(self.embed(images))
        features: Tensor = self.norm(last.patch_tokens)
        return features

    def patch_grid(self, tokens: Tokens) -> Tensor:
        """Return the last state of every patch after the final norm, [B, H, W, D].

        Dropped patches have the state that they were dropped with, merged ones that of the patch
        they went into. tokens: of the last block, from a dense `walk`. With mean pooling, the norm
        comes after the mean in the model itself; here it is applied to each patch.
        """
        assert tokens.grid is not None
        states = tokens.grid.states_of(tokens.patch_tokens, tokens.position).float()
        norm = self.fc_norm if self.config.pooling == "mean" else self.norm
        grid: Tensor = norm(states).view(-1, self.config.grid, self.config.grid, self.config.width)
        return grid

    def pool(self, tokens: Tokens) -> Tensor:
        """Return logits [B, classes] of the last block's tokens; features without a head."""
        features = self.project(self.summarise(tokens))
        if self.config.normalised:
            features = F.normalize(features, dim=1)
        logits: Tensor = self.head(features)
        if self.config.distilled:  # DeiT at inference: the mean of both heads
            logits = (logits + self.head_dist(self.project(self.norm(tokens.x[:, 1])))) / 2
        return logits

    def summarise(self, tokens: Tokens) -> Tensor:
        """Return one vector per image, [B, pooled * D], of the last block's tokens."""
        if self.config.pooling == "mean":
            pooled: Tensor = self.fc_norm(tokens.pool())
            return pooled
        if self.config.pooling == "cls":
            pooled = self.norm(tokens.x[:, 0])
            return pooled
        normed = tokens._replace(x=self.norm(tokens.x))
        if self.config.pooling == "cls-mean":
            return torch.cat([normed.x[:, 0], normed.pool()], dim=1)
        if self.config.pooling == "attention":
            pooled = self.attn_pool(normed.image_tokens, normed.image_bias)
            return pooled
        return normed.pool()

    def project(self, pooled: Tensor) -> Tensor:
        """Return the features [B, features] of what `summarise` returns."""
        return self.projection(pooled) if self.config.projection else pooled


def sincos_position(width: int, grid: int, positioned: int = 1) -> Tensor:
    """Return MAE's fixed 2-D sine-cosine positions, [1, positioned + grid^2, width].

    The `positioned` tokens before the patches get zeros.
    """
    frequency = 1.0 / 10000 ** (torch.arange(width // 4, dtype=torch.float64) / (width // 4))
    angle = torch.outer(torch.arange(grid, dtype=torch.float64), frequency)  # [grid, D / 4]
    axis = torch.cat([angle.sin(), angle.cos()], dim=1)  # [grid, D / 2]
    column = axis.repeat(grid, 1)  # x runs fastest
    row = axis.repeat_interleave(grid, dim=0)
    table = torch.cat([column, row], dim=1).float()
    return torch.cat([torch.zeros(positioned, width), table])[None]


def init_weights(module: nn.Module) -> None:
    """Initialise as MAE: Xavier uniform, zero biases, the patch embedding as a linear layer."""
    if isinstance(module, nn.Linear):
        nn.init.xavier_uniform_(module.weight)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
    elif isinstance(module, nn.Conv2d):
        nn.init.xavier_uniform_(module.weight.flatten(1))
        if module.bias is not None:
            nn.init.zeros_(module.bias)
