"""The light decoder that predicts hidden patches from visible ones (MAE; paper, appendix B)."""

import torch
from torch import Tensor, nn

from pcae_training.block import Block
from pcae_training.masking import gather
from pcae_training.model import ViTConfig, init_weights, sincos_position


class Decoder(nn.Module):
    """Predict the patches at given positions from latents of CLS and visible patches."""

    def __init__(self, config: ViTConfig, outputs: int, depth: int, width: int, heads: int) -> None:
        """config: of the encoder. outputs: numbers predicted per patch."""
        super().__init__()
        self.decoder_embed = nn.Linear(config.width, width)
        self.mask_token = nn.Parameter(torch.zeros(1, 1, width))
        self.register_buffer("decoder_pos_embed", sincos_position(width, config.grid))
        hidden = round(width * config.mlp_ratio)
        self.decoder_blocks = nn.ModuleList(
            Block(width, heads, hidden, config.norm_eps) for _ in range(depth)
        )
        self.decoder_norm = nn.LayerNorm(width, eps=config.norm_eps)
        self.decoder_pred = nn.Linear(width, outputs)
        self.hidden = hidden
        self.apply(init_weights)
        nn.init.normal_(self.mask_token, std=0.02)

    def forward(self, latent: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Return predictions [B, w, outputs] for the patches `wanted` [B, w].

        latent [B, 1 + v, D]: CLS and the patches `visible` [B, v]. Other patches are left out.
        """
        positions: Tensor = self.decoder_pos_embed  # type: ignore[assignment]
        table = positions[:, 1:].expand(latent.shape[0], -1, -1)
        shown = self.decoder_embed(latent)
        cls, shown = shown[:, :1] + positions[:, :1], shown[:, 1:] + gather(table, visible)
        x = torch.cat([cls, shown, self.mask_token + gather(table, wanted)], dim=1)
        for block in self.decoder_blocks:
            x = block(x)
        prediction: Tensor = self.decoder_pred(self.decoder_norm(x[:, -wanted.shape[1] :]))
        return prediction

    def macs(self, visible: int, wanted: int) -> int:
        """Return the multiply-adds for one image.

        visible, wanted: number of visible and of predicted patches.
        """
        embed, predict, tokens = self.decoder_embed, self.decoder_pred, 1 + visible + wanted
        width, depth = embed.out_features, len(self.decoder_blocks)
        linear = 4 * width + 2 * self.hidden
        blocks = depth * (tokens * width * linear + 2 * tokens**2 * width)
        outside = (1 + visible) * embed.in_features + wanted * predict.out_features
        return blocks + outside * width


def default_width(width: int) -> int:
    """Return the decoder's width for an encoder's: 512 for ViT-B as in MAE, else in proportion."""
    return min(512, max(32, round(width * 2 / 3 / 32) * 32))
