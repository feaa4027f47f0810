"""Pretrain a ViT without labels: PCAE, and what the paper compares it with, in the same code.

    pcae         the student sees the visible patches; a decoder predicts what its moving average,
                 the teacher, makes of the hidden ones that progressive reduction leaves (section 3)
    mae          a decoder predicts the pixels of all hidden patches (arXiv 2111.06377)
    simmim       the encoder itself carries mask tokens to the pixels (arXiv 2111.09886)
    pcae-simmim  the encoder carries mask tokens to the teacher's retained ones (appendix D)

It knows losses and masks; `trainer` has the loop.
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Annotated, Literal, NamedTuple, Self

import torch
from pydantic import Field, field_validator, model_validator
from pydantic_settings import NoDecode
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pcae_serve.bundle.preprocess import Preprocess
from pcae_serve.bundle.tokens import REDUCTION_POINTS, Rule, patches_kept
from pcae_serve.errors import PcaeError, one_line
from pcae_training.augment import Augmentation
from pcae_training.checkpoint import Checkpoint
from pcae_training.decoder import Decoder, default_width
from pcae_training.evaluate import normalise
from pcae_training.masking import Mask, gather, mask, patchify, visible_patches
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.plan import Plan, describe
from pcae_training.sample_rng import SampleRng, drop_path_factors, to_device
from pcae_training.schedule import momentum
from pcae_training.settings import RunSettings
from pcae_training.trainer import Trainer, check_out, parameter_groups, training_data
from pcae_training.world import World, join

Method = Literal["pcae", "mae", "simmim", "pcae-simmim"]


class PretrainSettings(RunSettings):
    """Pretrain without labels; the checkpoint is an encoder to fine-tune from (--init)."""

    method: Method = Field("pcae", description="what is learnt")
    mask_ratio: float | None = Field(
        None, gt=0, lt=1, description="share of patches hidden; 0.75, or SimMIM's 0.6"
    )
    mask_unit: int = Field(
        1, ge=1, description="side, in patches, of what is hidden as a whole; SimMIM's own is 2"
    )
    decoder_depth: int | None = Field(
        None, ge=1, description="decoder blocks; 2 for pcae, 8 for mae"
    )
    decoder_width: int | None = Field(
        None, ge=32, multiple_of=32, description="512 beside ViT-B, narrower beside narrower ones"
    )
    normalise_pixels: bool = Field(True, description="mae: pixel targets standardised by patch")

    ema: float | None = Field(
        None, gt=0, lt=1, description="the teacher's momentum; 0.9999, in a short run less"
    )
    reduce_after: Annotated[tuple[int, ...], NoDecode] = Field(
        (0, 4, 8), description="blocks of the teacher after which it drops tokens; from 0"
    )
    teacher_keep: float = Field(0.5, gt=0, le=1, description="share each of those stages keeps")
    reduction: Rule = Field("ptr", description="how the teacher ranks tokens")
    drop_targets: Literal["none", "loss", "decoder"] = Field(
        "none", description="mae: leave dropped patches out of the loss, or out of the decoder too"
    )

    blr: float = Field(1.5e-4, gt=0, description="peak learning rate for 256 images a step")
    crop: float = Field(
        0.2, ge=0, le=1, description="least share of the image a random crop takes; 0 = off"
    )

    @field_validator("reduce_after", mode="before")
    @classmethod
    def _blocks(cls, blocks: object) -> object:
        return blocks.strip("[]()").split(",") if isinstance(blocks, str) else blocks

    @model_validator(mode="after")
    def _fits(self) -> Self:
        """What flags together cannot mean is told before any data is read."""
        if self.drop_targets != "none" and self.method != "mae":
            raise ValueError("--drop-targets is for --method mae: pcae always drops")
        points = self.reduce_after if self.has_teacher else ()
        config = self.config(classes=0, reduction_points=points)
        if config.grid % self.mask_unit:
            raise ValueError(
                f"--mask-unit {self.mask_unit} does not divide the {config.grid} patches of a side"
            )
        patches = config.grid**2
        if self.visible(patches) < 1:
            raise ValueError(f"--mask-ratio {self.hidden_share} hides all of {patches} patches")
        if self.has_teacher:
            self.teacher_counts(patches)
        return self

    @property
    def hidden_share(self) -> float:
        """The mask ratio in force."""
        return self.mask_ratio or (0.6 if self.method.endswith("simmim") else 0.75)

    def visible(self, patches: int) -> int:
        """Patches that stay visible."""
        square = self.mask_unit**2
        return visible_patches(patches // square, self.hidden_share) * square

    def teacher_counts(self, patches: int) -> tuple[int, ...]:
        """Hidden patches left after each of the teacher's stages: 147 → 73, 36, 18."""
        hidden = patches - self.visible(patches)
        return patches_kept(hidden, self.teacher_keep, len(self.reduce_after))

    @property
    def has_teacher(self) -> bool:
        return self.method.startswith("pcae") or self.drop_targets != "none"


class Targets(NamedTuple):
    """What the teacher retains of the hidden patches."""

    tokens: Tensor  # [B, w, D], standardised by token
    position: Tensor  # [B, w]: which of the image's patches they are


class Teacher(nn.Module):
    """The student's moving average, which sees the hidden patches and drops the redundant."""

    def __init__(
        self,
        student: VisionTransformer,
        points: tuple[int, ...],
        counts: tuple[int, ...],
        rule: Rule,
        ema: float,
    ) -> None:
        super().__init__()
        # its own copy of the modules, with the rule that ranks
        self.network = VisionTransformer(replace(student.config, reduction=rule))
        self.network.load_state_dict(student.state_dict())
        self.network.requires_grad_(False)
        self.points, self.counts, self.ema = points, counts, ema
        self._average = get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def forward(self, values: Tensor, hidden: Tensor, noise: Tensor) -> Targets:
        """values [B, n, C p p]; hidden [B, h]; noise [B, n], for the `random` rule."""
        x = embed(self.network, values, hidden)  # no CLS: the teacher sees patches alone
        *_, last = self.network.walk(
            x,
            self.counts,
            points=self.points,
            prefix=0,
            append=False,
            noise=noise[:, : hidden.shape[1]],
        )
        tokens = self.network.norm(last.x).float()
        variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
        return Targets((tokens - mean) / (variance + 1e-6).sqrt(), hidden.gather(1, last.position))

    @torch.no_grad()
    def follow(self, student: VisionTransformer) -> None:
        """Move a step towards the student."""
        self._average(list(self.network.parameters()), list(student.parameters()), None)


class Start(NamedTuple):
    """What a method is made from."""

    model: VisionTransformer  # a new encoder, without a head
    preprocess: Preprocess
    settings: PretrainSettings
    ema: float  # the teacher's momentum


class Pretraining(nn.Module):
    """What all methods share: images, masks, the encoder, and what is kept of them."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        model, settings = start.model, start.settings
        self.model, self.preprocess, self.settings = model, start.preprocess, settings
        self.model.pos_embed.requires_grad_(False)  # fixed sine-cosine, as MAE
        self.teacher: Teacher | None = None
        if settings.has_teacher:
            counts = settings.teacher_counts(model.config.grid**2)
            points, rule = settings.reduce_after, settings.reduction
            self.teacher = Teacher(model, points, counts, rule, start.ema)
        self.augment = Augmentation(
            size=model.config.image_size,
            crop=settings.crop,
            shift=settings.shift,
            flip=settings.flip,
        )

    def forward(self, pixels: Tensor, labels: Tensor, rng: SampleRng, progress: float) -> Tensor:
        """Mean loss of uint8 pixels [b, 3, S, S]; labels are not looked at."""
        settings, config = self.settings, self.model.config
        device = pixels.device
        with torch.no_grad():
            images = normalise(self.augment(pixels.float() / 255, rng) * 255, self.preprocess)
            values = patchify(images, config.patch_size)
            squares = (config.grid // settings.mask_unit) ** 2
            noise = to_device(rng.uniform("mask", squares), device)
            parts = mask(noise, settings.hidden_share, settings.mask_unit)
        drop_path = drop_path_factors(rng, config.depth, settings.drop_path, device)
        return self.loss(values, parts, rng, drop_path)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        """values [b, n, C p p]: the patches of normalised images, as plain numbers."""
        raise NotImplementedError

    def encode(self, values: Tensor, visible: Tensor, drop_path: Tensor | None) -> Tensor:
        """Latents of CLS and the visible patches: [b, 1 + v, D]."""
        cls = self.model.prefix_tokens(len(values))
        x = torch.cat([cls, embed(self.model, values, visible)], dim=1)
        *_, last = self.model.walk(x, drop_path=drop_path)
        latent: Tensor = self.model.norm(last.x)
        return latent

    def carry(
        self,
        values: Tensor,
        visible: Tensor,
        wanted: Tensor,
        token: Tensor,
        drop_path: Tensor | None,
    ) -> Tensor:
        """SimMIM's encoder: mask tokens at `wanted` [b, w] go along; what they become [b, w, D]."""
        cls = self.model.prefix_tokens(len(values))
        positions = self.model.pos_embed[:, self.model.config.positioned :]
        masks = token + gather(positions.expand(len(values), -1, -1), wanted)
        x = torch.cat([cls, embed(self.model, values, visible), masks], dim=1)
        *_, last = self.model.walk(x, drop_path=drop_path)
        carried: Tensor = self.model.norm(last.x[:, -wanted.shape[1] :])
        return carried

    def targets(self, values: Tensor, hidden: Tensor, rng: SampleRng) -> Targets:
        """What the teacher retains of the patches `hidden` [b, h]."""
        assert self.teacher is not None  # `has_teacher` says which methods have one
        noise = to_device(rng.uniform("teacher", values.shape[1]), values.device)
        targets: Targets = self.teacher(values, hidden, noise)
        return targets

    def macs(self) -> int:
        """Multiply-adds of a training step for one image.

        Forward and backward of what learns count as three forward passes, the teacher as one.
        """
        config, settings = self.model.config, self.settings
        patches, width = config.geometry.patches, config.width
        visible = settings.visible(patches)
        hidden = patches - visible
        carried = settings.method.endswith("simmim")
        taught, wanted = 0, hidden
        if self.teacher is not None:
            left, lengths = hidden, []
            after = dict(zip(self.teacher.points, self.teacher.counts, strict=True))
            for block in range(config.depth):  # no CLS, nothing appended
                lengths.append(left)
                left = after.get(block, left)
            taught = _blocks(width, lengths) + hidden * config.geometry.patch_values * width
            wanted = hidden if settings.drop_targets == "loss" else left
        learnt = _blocks(width, [1 + visible + (wanted if carried else 0)] * config.depth)
        learnt += visible * config.geometry.patch_values * width
        if isinstance(decoder := getattr(self, "decoder", None), Decoder):
            learnt += decoder.macs(visible, wanted)
        else:
            learnt += wanted * width * (width if self.teacher else config.geometry.patch_values)
        return 3 * learnt + taught

    def facts(self) -> Iterator[str]:
        """Lines for people on what this method makes of the model."""
        settings, patches = self.settings, self.model.config.geometry.patches
        visible = settings.visible(patches)
        yield f"method     {settings.method}, {visible} of {patches} patches visible"
        if self.teacher is not None:
            left = " → ".join(map(str, (patches - visible, *self.teacher.counts)))
            rule, ema = settings.reduction, self.teacher.ema
            yield f"  teacher  {left} patches by {rule}, momentum {ema:.5g}"
        yield f"  cost     {self.macs() / 1e9:.3f} GMACs a training image, backward and teacher too"

    def stepped(self) -> None:
        """The optimiser has made a step: the teacher follows."""
        if self.teacher is not None:
            self.teacher.follow(self.model)

    def checkpoint(self) -> Checkpoint:
        """The encoder, without a head."""
        training = {"method": self.settings.method}
        return Checkpoint(self.model, self.preprocess, [], training)

    def epoch_ended(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Nothing to measure without labels."""
        return {}


class Pcae(Pretraining):
    """Predict the teacher's retained tokens from the visible patches (paper, section 3)."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        config = start.model.config
        self.decoder = decoder(config, start.settings, outputs=config.width)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        targets = self.targets(values, mask.hidden, rng)
        latent = self.encode(values, mask.visible, drop_path)
        prediction = self.decoder(latent, mask.visible, targets.position)
        return cosine_loss(prediction, targets.tokens)


class PcaeSimMim(Pretraining):
    """Predict the teacher's retained tokens within the encoder (paper, appendix D).

    The text's sequence of 96 tokens is 78 visible and 18 mask tokens. Halving the 118 hidden
    patches three times gives 14, so 92; --teacher-keep 0.54 gives 63, 34 and the text's 18.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        width = start.model.config.width
        self.mask_token, self.predict = mask_token(width), linear(width, width)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        targets = self.targets(values, mask.hidden, rng)
        carried = self.carry(values, mask.visible, targets.position, self.mask_token, drop_path)
        return cosine_loss(self.predict(carried), targets.tokens)


class Mae(Pretraining):
    """Predict the pixels of the hidden patches from the visible ones.

    --drop-targets leaves out the pixels of what a teacher drops (paper, appendix C): `loss` decodes
    every hidden patch and counts the retained ones, `decoder` decodes only these. The text does not
    say what ranks the patches; here it is PCAE's teacher.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        config = start.model.config
        self.decoder = decoder(config, start.settings, outputs=config.geometry.patch_values)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        latent = self.encode(values, mask.visible, drop_path)
        if self.teacher is None:
            return self.errors(latent, values, mask.visible, mask.hidden).mean()
        retained = self.targets(values, mask.hidden, rng).position
        if self.settings.drop_targets == "decoder":
            return self.errors(latent, values, mask.visible, retained).mean()
        errors = self.errors(latent, values, mask.visible, mask.hidden)
        counted = (mask.hidden.unsqueeze(2) == retained.unsqueeze(1)).any(dim=2)
        return (errors * counted).sum() / counted.sum()

    def errors(self, latent: Tensor, values: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Mean squared error of the patches `wanted` [b, w], as decoded together: [b, w]."""
        prediction: Tensor = self.decoder(latent, visible, wanted)
        target = gather(values, wanted)
        if self.settings.normalise_pixels:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (prediction.float() - target).square().mean(dim=-1)


class SimMim(Pretraining):
    """Predict the pixels of hidden patches within the encoder, by absolute error."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        width, values = start.model.config.width, start.model.config.geometry.patch_values
        self.mask_token, self.predict = mask_token(width), linear(width, values)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        carried = self.carry(values, mask.visible, mask.hidden, self.mask_token, drop_path)
        prediction: Tensor = self.predict(carried).float()
        return (prediction - gather(values, mask.hidden)).abs().mean()


def pretrain(settings: PretrainSettings) -> bool:
    """Train to the end, or until stopped by a signal: then False, with a checkpoint to resume."""
    check_out(settings)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with join(settings.device) as world:
        preprocess = settings.preprocess(settings.image_size or 224)
        images = training_data(settings, settings.source(preprocess), labelled=False)
        plan = Plan(settings, world, len(images))
        try:
            objective = build(settings, preprocess, plan.steps).to(world.device)
        except ValueError as error:  # of flags that only fit larger images
            raise PcaeError(one_line(error)) from None
        groups = parameter_groups(objective, objective.model, settings.weight_decay)
        trainer = Trainer(settings, objective, groups, (0.9, 0.95), images, world)
        if settings.dry_run:
            if world.main:
                print(*describe(plan, objective), *objective.facts(), sep="\n")
            return True
        return trainer.run()


def build(settings: PretrainSettings, preprocess: Preprocess, steps: int) -> Pretraining:
    """The objective of a run of `steps` optimiser steps, from random weights."""
    points = REDUCTION_POINTS if settings.depth > max(REDUCTION_POINTS) else ()
    config = settings.config(classes=0, pooling="cls", reduction_points=points)
    model = VisionTransformer(config)
    ema = settings.ema if settings.ema is not None else momentum(steps)
    start = Start(model, preprocess, settings, ema)
    return METHODS[settings.method](start)


#: The objective of each method.
METHODS: dict[Method, type[Pretraining]] = {
    "pcae": Pcae,
    "mae": Mae,
    "simmim": SimMim,
    "pcae-simmim": PcaeSimMim,
}


def embed(model: VisionTransformer, values: Tensor, index: Tensor) -> Tensor:
    """Tokens of the patches `index` [B, m], of values [B, n, C p p], with positions: [B, m, D].

    The patch embedding as the linear layer it is: patches that nobody sees cost nothing.
    """
    projection = model.patch_embed.proj
    tokens = F.linear(gather(values, index), projection.weight.flatten(1), projection.bias)
    positions = model.pos_embed[:, model.config.positioned :].expand(len(values), -1, -1)
    return tokens + gather(positions, index)


def _blocks(width: int, lengths: Sequence[int]) -> int:
    """Multiply-adds of blocks with so many tokens each (see `pcae_serve.bundle.tokens`)."""
    return sum(12 * n * width**2 + 2 * n * n * width for n in lengths)


def decoder(config: ViTConfig, settings: PretrainSettings, outputs: int) -> Decoder:
    """MAE's decoder with the depth that belongs to the method."""
    depth = settings.decoder_depth or (8 if settings.method == "mae" else 2)
    width = settings.decoder_width or default_width(config.width)
    return Decoder(config, outputs, depth, width, heads=width // 32)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """1 - cosine, averaged over tokens (paper, equation 1)."""
    return 1 - F.cosine_similarity(prediction.float(), target, dim=-1).mean()


def mask_token(width: int) -> nn.Parameter:
    """What stands for a hidden patch: [1, 1, width]."""
    return nn.Parameter(torch.randn(1, 1, width) * 0.02)


def linear(inputs: int, outputs: int) -> nn.Linear:
    """A prediction layer, initialised as the encoder's."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
