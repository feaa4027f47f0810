"""The sizes and parts of a vision transformer."""

from dataclasses import dataclass

from pcae_serve.bundle.tokens import REDUCTION_POINTS, Geometry, Pooling, Rule
from pcae_training.mlp import Activation
from pcae_training.model_limits import check_sizes
from pcae_training.reduction import RULES


@dataclass(frozen=True)
class ViTConfig:
    """Sizes and parts of a ViT; the defaults are a plain ViT-B/16 at 224."""

    image_size: int = 224
    patch_size: int = 16
    channels: int = 3
    width: int = 768
    depth: int = 12
    heads: int = 12
    mlp_ratio: float = 4.0
    classes: int = 1000  # 0: no head, the model returns features
    pooling: Pooling = "mean"
    norm_eps: float = 1e-6  # timm, MAE and DeiT; torch's own default is 1e-5
    reduction_points: tuple[int, ...] = REDUCTION_POINTS
    reduction: Rule = "ptr"
    qkv_bias: bool = True
    layer_scale: bool = False  # a learnt scale on each branch (DINOv2)
    distilled: bool = False  # DeiT's second token and head
    class_token: bool = True  # SigLIP has none
    registers: int = 0  # DINOv2's extra tokens, without positions
    activation: Activation = "gelu"
    pre_norm: bool = False  # a norm before the blocks (CLIP)
    rope_theta: float = 0.0  # of rotary positions (DINOv3); 0: positions are learnt
    gated_mlp: bool = False  # the MLP has a third layer, whose outputs are factors (SwiGLU)
    projection: int = 0  # width of features after a linear layer without bias (CLIP); 0: none
    normalised: bool = False  # the head reads features of length 1 (classes from words)

    def __post_init__(self) -> None:
        check_sizes(self)
        if self.image_size % self.patch_size:
            raise ValueError(f"patch size {self.patch_size} does not divide {self.image_size}")
        if self.width % self.heads:
            raise ValueError(f"{self.heads} heads do not divide width {self.width}")
        if self.width % 4:
            raise ValueError(f"width {self.width} is not a multiple of 4")
        if self.rope_theta and self.width // self.heads % 4:
            raise ValueError(
                f"{self.width // self.heads} channels per head are not a multiple of 4"
            )
        points = self.reduction_points
        if any(not 0 <= point < self.depth for point in points):
            raise ValueError(f"reduction points {points} are outside the {self.depth} blocks")
        if list(points) != sorted(set(points)):
            raise ValueError(f"reduction points {points} must be in ascending order")
        if self.reduction not in RULES:
            raise ValueError(f"reduction {self.reduction!r} is not one of {', '.join(RULES)}")
        if self.distilled and self.pooling != "cls":
            raise ValueError("a distilled model must pool its CLS and distillation tokens")
        if not self.class_token and (self.distilled or self.pooling in ("cls", "cls-mean")):
            raise ValueError(f"pooling {self.pooling!r} needs a CLS token, which the model lacks")
        if self.gated_mlp and self.pooling == "attention":
            raise ValueError("a model with gated MLPs cannot be pooled by attention")

    @property
    def hidden(self) -> int:
        """Width inside the MLP."""
        return round(self.width * self.mlp_ratio)

    @property
    def mlp_layers(self) -> int:
        """Number of linear layers in the MLP, each of width times hidden weights."""
        return 3 if self.gated_mlp else 2

    @property
    def grid(self) -> int:
        """Number of patches along one side."""
        return self.image_size // self.patch_size

    @property
    def positioned(self) -> int:
        """Number of prefix tokens with a position embedding: CLS and distillation."""
        return self.class_token + self.distilled

    @property
    def prefix(self) -> int:
        """Number of tokens before the patches: CLS, distillation, registers; never dropped."""
        return self.positioned + self.registers

    @property
    def pooled(self) -> int:
        """Number of vectors of the model's width that the head reads."""
        return 2 if self.pooling == "cls-mean" else 1

    @property
    def beyond_pretraining(self) -> str | None:
        """What pretraining cannot do without changing the model, in words; None for nothing."""
        if self.pre_norm:
            return "a norm before the blocks (CLIP)"
        if not self.class_token:
            return "no CLS token (SigLIP)"
        if self.rope_theta:
            return "rotary positions (DINOv3)"
        return "a projection of its features" if self.projection else None

    @property
    def features(self) -> int:
        """Width of the features, which the head reads."""
        return self.projection or self.pooled * self.width

    @property
    def geometry(self) -> Geometry:
        """The sizes that the token arithmetic needs."""
        return Geometry(
            patches=self.grid**2,
            width=self.width,
            depth=self.depth,
            patch_values=self.channels * self.patch_size**2,
            classes=self.classes,
            prefix_tokens=self.prefix,
            pooled_tokens=self.pooled,
            attention_pool=self.pooling == "attention",
            projection=self.projection,
            mlp_ratio=self.mlp_ratio,
            mlp_layers=self.mlp_layers,
            reduction_points=self.reduction_points,
            reduction=self.reduction,
        )
