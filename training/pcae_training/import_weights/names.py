"""How other projects name the tensors of an encoder, as patterns that give our names."""

import re
from collections.abc import Mapping, Sequence
from typing import Literal, NamedTuple

#: Whose names a state dict has: timm's (which MAE, DeiT, DINO and this project follow), those of
#: Hugging Face's ViT, DeiT, DINOv2 and ViTMAE, of its DINOv3, or of its CLIP and SigLIP.
Scheme = Literal["timm", "hugging-face", "dinov3", "clip"]

#: First layers of gated MLPs.
GATED = re.compile(r"mlp\.(?:w12|weights_in|gate_proj)\.")


class Names(NamedTuple):
    """The names of one scheme."""

    renames: Sequence[tuple[str, str]]  # patterns inside the encoder, applied in this order
    outside: Mapping[str, str]  # modules outside of the encoder that the model keeps
    unsupported: Sequence[tuple[str, str]]  # patterns inside the encoder, and what they show

    def rename(self, name: str) -> str:
        """Return our name of a tensor inside the encoder. Raise ValueError if not supported."""
        inner = name
        for pattern, feature in (*_UNSUPPORTED, *self.unsupported):
            if re.search(pattern, inner):
                raise ValueError(f"not supported: {feature} (tensor {name})")
        for pattern, replacement in self.renames:
            inner = re.sub(pattern, replacement, inner)
        return inner


_UNSUPPORTED = (
    (r"\b[qk]_norm\.", "normalised queries and keys"),
    (r"\.(?:attn|mlp)\.norm\.", "norms inside attention or MLPs (EVA-02)"),
)

TIMM = Names(
    renames=(
        (r"^blocks\.\d+\.(\d+)\.", r"blocks.\1."),  # DINOv2 in chunks; the second counts through
        (r"\.gamma_([12])$", r".ls\1.gamma"),  # DeiT III
        (r"\.mlp\.w12\.", ".mlp.fc1."),  # DINOv2's giant
        (r"\.mlp\.w3\.", ".mlp.fc2."),
        (r"^register_tokens$", "reg_token"),  # DINOv2
    ),
    outside={"linear_head": "head"},  # of DINOv2's own classifiers, next to `backbone`
    unsupported=(
        (r"^norm_pre\.", "a norm before the blocks (CLIP), except in Hugging Face's format"),
        (r"^rope|^storage_tokens$", "rotary positions (DINOv3), except in Hugging Face's format"),
        (r"^attn_pool\.", "pooling by attention (SigLIP), except in Hugging Face's format"),
    ),
)

#: Of an MLP; a gated one has a layer of its own for the gate, which `rename` joins to the first.
_MLP = (
    (r"\.mlp\.gate_proj\.", ".mlp.gate."),
    (r"\.mlp\.(?:up_proj|weights_in)\.", ".mlp.fc1."),
    (r"\.mlp\.(?:down_proj|weights_out)\.", ".mlp.fc2."),
)

#: Names of transformers 4, which version 5 still writes, and of version 5 in memory.
HUGGING_FACE = Names(
    renames=(
        (r"^embeddings\.patch_embeddings\.projection\.", "patch_embed.proj."),
        (r"^embeddings\.position_embeddings$", "pos_embed"),
        (r"^embeddings\.distillation_token$", "dist_token"),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.", ""),  # cls_token, mask_token
        (r"^(?:encoder\.)?layers?\.(\d+)\.", r"blocks.\1."),
        (r"\.layernorm_before\.", ".norm1."),
        (r"\.layernorm_after\.", ".norm2."),
        (r"\.attention\.(?:attention\.)?([qkv])(?:uery|ey|alue|_proj)\.", r".attn.\1."),
        (r"\.attention\.(?:output\.dense|o_proj)\.", ".attn.proj."),
        (r"\.intermediate\.dense\.", ".mlp.fc1."),
        (r"\.output\.dense\.", ".mlp.fc2."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        (r"^layernorm\.", "norm."),
        *_MLP,
    ),
    outside={
        "classifier": "head",
        "cls_classifier": "head",
        "distillation_classifier": "head_dist",
    },
    unsupported=(),
)

DINOV3 = Names(
    renames=(
        (r"^embeddings\.patch_embeddings\.", "patch_embed.proj."),
        (r"^embeddings\.register_tokens$", "reg_token"),
        (r"^embeddings\.", ""),  # cls_token, mask_token
        (r"^(?:model\.)?layer\.(\d+)\.", r"blocks.\1."),
        (r"\.attention\.([qkv])_proj\.", r".attn.\1."),
        (r"\.attention\.o_proj\.", ".attn.proj."),
        (r"\.layer_scale([12])\.lambda1$", r".ls\1.gamma"),
        *_MLP,
    ),
    outside={},
    unsupported=(),
)

CLIP = Names(
    renames=(
        (r"^embeddings\.patch_embedding\.", "patch_embed.proj."),
        (r"^embeddings\.position_embedding\.weight$", "pos_embed"),
        (r"^embeddings\.class_embedding$", "cls_token"),
        (r"^embeddings\.", ""),  # position_ids, which old versions stored
        (r"^pre_layrnorm\.", "norm_pre."),
        (r"^post_layernorm\.", "norm."),
        (r"^encoder\.layers\.(\d+)\.", r"blocks.\1."),
        (r"\.layer_norm([12])\.", r".norm\1."),
        (r"\.self_attn\.([qkv])_proj\.", r".attn.\1."),
        (r"\.self_attn\.out_proj\.", ".attn.proj."),
        (r"^head\.probe$", "attn_pool.latent"),
        (r"^head\.attention\.in_proj_", "attn_pool.qkv."),
        (r"^head\.attention\.out_proj\.", "attn_pool.proj."),
        (r"^head\.layernorm\.", "attn_pool.norm."),
        (r"^head\.mlp\.", "attn_pool.mlp."),
    ),
    outside={"visual_projection": "projection", "classifier": "head"},
    unsupported=(),
)

SCHEMES: Mapping[Scheme, Names] = {
    "timm": TIMM,
    "hugging-face": HUGGING_FACE,
    "dinov3": DINOV3,
    "clip": CLIP,
}
