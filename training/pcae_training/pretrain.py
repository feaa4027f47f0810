"""Pretrain a ViT without labels: PCAE, and the methods that the paper compares it with.

pcae         the student encodes the visible patches; a decoder predicts the teacher's tokens of
             those hidden patches that progressive reduction keeps; the teacher is the student's
             moving average (section 3); with --pixel-weight also the pixels of all hidden patches
mae          a decoder predicts the pixels of all hidden patches (arXiv 2111.06377)
simmim       the encoder processes mask tokens too and predicts the pixels (arXiv 2111.09886)
pcae-simmim  the encoder processes mask tokens for the teacher's kept tokens (appendix D)
"""

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim.swa_utils import get_ema_multi_avg_fn

from pcae_serve.bundle.tokens import Rule
from pcae_serve.errors import PcaeError, one_line
from pcae_training.augment import Augmentation
from pcae_training.checkpoint import Checkpoint
from pcae_training.decoder import Decoder, default_width
from pcae_training.evaluate import normalise
from pcae_training.inventory import print_inventory, print_lines
from pcae_training.masking import Mask, gather, hide_patches, patchify
from pcae_training.model import VisionTransformer, ViTConfig
from pcae_training.plan import Plan, describe, fit_batch_size
from pcae_training.pretrain_settings import Method, PretrainSettings
from pcae_training.pretrain_start import Encoder, prepare_encoder
from pcae_training.pretrain_watch import watch_features
from pcae_training.sample_rng import SampleRng, drop_path_factors, to_device
from pcae_training.schedule import momentum
from pcae_training.trainer import Trainer, check_out, parameter_groups, training_data
from pcae_training.world import World, join


class Targets(NamedTuple):
    """The tokens that the teacher keeps of the hidden patches."""

    tokens: Tensor  # [B, w, D], each token standardised
    position: Tensor  # [B, w]: their index among the image's patches
    kept: Tensor  # [B, w]: their index among the hidden patches


class Teacher(nn.Module):
    """The student's moving average, which encodes the hidden patches and drops redundant ones."""

    def __init__(
        self,
        student: VisionTransformer,
        points: tuple[int, ...],
        counts: tuple[int, ...],
        rule: Rule,
        ema: float,
    ) -> None:
        super().__init__()
        # a separate copy of the modules, because the config holds the rule
        self.network = VisionTransformer(replace(student.config, reduction=rule))
        self.network.load_state_dict(student.state_dict())
        self.network.requires_grad_(False)
        self.points, self.counts, self.ema = points, counts, ema
        self._average = get_ema_multi_avg_fn(ema)  # type: ignore[no-untyped-call]

    @torch.no_grad()
    def forward(
        self, values: Tensor, hidden: Tensor, noise: Tensor, *, reduce: bool = True
    ) -> Targets:
        """Return the targets of values [B, n, C p p] at `hidden` [B, h]; all if not `reduce`.

        noise [B, n]: for the `random` rule.
        """
        x = embed(self.network, values, hidden)  # without CLS
        *_, last = self.network.walk(
            x,
            self.counts if reduce else [hidden.shape[1]] * len(self.counts),
            points=self.points,
            prefix=0,
            append=False,
            noise=noise[:, : hidden.shape[1]],
        )
        tokens = self.network.norm(last.x).float()
        variance, mean = torch.var_mean(tokens, dim=-1, keepdim=True)
        standardised = (tokens - mean) / (variance + 1e-6).sqrt()
        return Targets(standardised, hidden.gather(1, last.position), last.position)

    @torch.no_grad()
    def follow(self, student: VisionTransformer) -> None:
        """Update the moving average with the student's weights."""
        self._average(list(self.network.parameters()), list(student.parameters()), None)


class Start(NamedTuple):
    """The parts that every method is built from."""

    encoder: Encoder
    settings: PretrainSettings
    ema: float  # momentum of the teacher

    @property
    def model(self) -> VisionTransformer:
        return self.encoder.model


class Pretraining(nn.Module):
    """Base of all methods: augmentation, masks, encoder, teacher and checkpoint."""

    def __init__(self, start: Start) -> None:
        super().__init__()
        model, settings = start.model, start.settings
        self.model, self.preprocess, self.settings = model, start.encoder.preprocess, settings
        self.origin = start.encoder.origin
        # fixed sine-cosine, as in MAE; those of --init, learnt or not, stay as they are
        self.model.pos_embed.requires_grad_(False)
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
        """Return the mean loss of uint8 pixels [b, 3, S, S]; labels are ignored."""
        settings, config = self.settings, self.model.config
        device = pixels.device
        with torch.no_grad():
            images = normalise(self.augment(pixels.float() / 255, rng) * 255, self.preprocess)
            values = patchify(images, config.patch_size)
            squares = (config.grid // settings.mask_unit) ** 2
            noise = to_device(rng.uniform("mask", squares), device)
            parts = hide_patches(noise, settings.hidden_share, settings.mask_unit)
        drop_path = drop_path_factors(rng, config.depth, settings.drop_path, device)
        return self.loss(values, parts, rng, drop_path)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        """Return the mean loss of values [b, n, C p p], the pixels of each patch, normalised."""
        raise NotImplementedError

    def encode(self, values: Tensor, visible: Tensor, drop_path: Tensor | None) -> Tensor:
        """Return the latents of CLS and the visible patches: [b, 1 + v, D].

        Distillation and register tokens take part in the encoder alone.
        """
        prefix = self.model.prefix_tokens(len(values))
        x = torch.cat([prefix, embed(self.model, values, visible)], dim=1)
        *_, last = self.model.walk(x, drop_path=drop_path)
        latent: Tensor = self.model.norm(last.x)
        extra = prefix.shape[1] - 1
        return torch.cat([latent[:, :1], latent[:, 1 + extra :]], dim=1) if extra else latent

    def encode_with_masks(
        self,
        values: Tensor,
        visible: Tensor,
        wanted: Tensor,
        token: Tensor,
        drop_path: Tensor | None,
    ) -> Tensor:
        """Encode `visible` patches and mask tokens at `wanted` [b, w]; return these [b, w, D]."""
        prefix = self.model.prefix_tokens(len(values))
        positions = self.model.pos_embed[:, self.model.config.positioned :]
        masks = token + gather(positions.expand(len(values), -1, -1), wanted)
        x = torch.cat([prefix, embed(self.model, values, visible), masks], dim=1)
        *_, last = self.model.walk(x, drop_path=drop_path)
        carried: Tensor = self.model.norm(last.x[:, -wanted.shape[1] :])
        return carried

    def targets(self, values: Tensor, hidden: Tensor, rng: SampleRng) -> Targets:
        """Return the teacher's targets among the patches `hidden` [b, h]."""
        assert self.teacher is not None  # see `has_teacher`
        noise = to_device(rng.uniform("teacher", values.shape[1]), values.device)
        targets: Targets = self.teacher(values, hidden, noise)
        return targets

    def pixel_errors(self, prediction: Tensor, values: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean squared error of predicted pixels of the patches `wanted`: [b, w].

        prediction [b, w, C p p]. The pixels of each patch are standardised if the settings say so.
        """
        target = gather(values, wanted)
        if self.settings.normalise_pixels:
            variance, mean = torch.var_mean(target, dim=-1, keepdim=True)
            target = (target - mean) / (variance + 1e-6).sqrt()
        return (prediction.float() - target).square().mean(dim=-1)

    def views(self, images: Tensor) -> dict[str, Tensor]:
        """Return the patch tokens [b, n, D] of whole, normalised images: the encoder's `features`.

        For PCAE also the teacher's `targets`, of all patches at once.
        """
        views: dict[str, Tensor] = {"features": self.model.patch_features(images)}
        if self.teacher is not None and self.settings.predicts_teacher:
            values = patchify(images, self.model.config.patch_size)
            everything = torch.arange(values.shape[1], device=images.device).expand(len(images), -1)
            noise = torch.zeros(values.shape[:2], device=images.device)  # nothing is dropped
            views["targets"] = self.teacher(values, everything, noise, reduce=False).tokens
        return views

    def macs(self, progress: float = 1.0) -> int:
        """Return the multiply-adds of a training step for one image, the same at any progress.

        Forward and backward of the student count as three forward passes, the teacher as one.
        """
        config, settings = self.model.config, self.settings
        patches, width = config.geometry.patches, config.width
        visible = settings.visible(patches)
        hidden = patches - visible
        masks_encoded = settings.method.endswith("simmim")
        teacher, wanted = 0, hidden
        if self.teacher is not None:
            left, lengths = hidden, []
            after = dict(zip(self.teacher.points, self.teacher.counts, strict=True))
            for block in range(config.depth):  # no CLS, nothing appended
                lengths.append(left)
                left = after.get(block, left)
            teacher = _blocks(config, lengths) + hidden * config.geometry.patch_values * width
            wanted = hidden if settings.decodes_all else left
        tokens = config.prefix + visible + (wanted if masks_encoded else 0)
        student = _blocks(config, [tokens] * config.depth)
        student += visible * config.geometry.patch_values * width
        if isinstance(decoder := getattr(self, "decoder", None), Decoder):
            student += decoder.macs(visible, wanted)
        else:
            student += wanted * width * (width if self.teacher else config.geometry.patch_values)
        return 3 * student + teacher

    def facts(self) -> Iterator[str]:
        """Yield lines of text on the method and its cost, for --dry-run."""
        settings, patches = self.settings, self.model.config.geometry.patches
        visible = settings.visible(patches)
        yield f"method     {settings.method}, {visible} of {patches} patches visible"
        if self.teacher is not None:
            left = " → ".join(map(str, (patches - visible, *self.teacher.counts)))
            rule, ema = settings.reduction, self.teacher.ema
            yield f"  teacher  {left} patches by {rule}, momentum {ema:.5g}"
        yield f"  cost     {self.macs() / 1e9:.3f} GMACs per training image, backward pass included"

    def after_step(self) -> None:
        """Update the teacher."""
        if self.teacher is not None:
            self.teacher.follow(self.model)

    @property
    def kept_prefix(self) -> str:
        """The prefix, in the state dict, of what the checkpoint holds."""
        return "model."

    @property
    def added(self) -> list[str]:
        """Names of the parameters that the method adds to the encoder, by module."""
        names = [name.partition(".")[0] for name, _ in self.named_parameters()]
        return [name for name in dict.fromkeys(names) if name not in ("model", "teacher")]

    @property
    def has_unused(self) -> bool:
        """Whether a step may leave parameters without a gradient."""
        return False

    def checkpoint(self) -> Checkpoint:
        """Return the encoder, without a head."""
        training: dict[str, Any] = {"method": self.settings.method}
        if self.settings.init is not None:
            training["init"] = self.origin or None
        return Checkpoint(self.model, self.preprocess, [], training)

    def after_epoch(self, world: World) -> Mapping[str, Mapping[str, float]]:
        """Return no figures: there is nothing to evaluate without labels."""
        return {}


class Pcae(Pretraining):
    """Predict the teacher's kept tokens from the visible patches (paper, section 3).

    With --pixel-weight the decoder predicts MAE's pixels of all hidden patches as well. That is not
    in the paper: the teacher of a short run knows little, pixels teach from the first step.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        config, settings = start.model.config, start.settings
        self.outputs = [config.width]
        if settings.pixel_weight:
            self.outputs.append(config.geometry.patch_values)
        self.decoder = build_decoder(config, settings, outputs=sum(self.outputs))

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        targets = self.targets(values, mask.hidden, rng)
        latent = self.encode(values, mask.visible, drop_path)
        if not (weight := self.settings.pixel_weight):
            prediction = self.decoder(latent, mask.visible, targets.position)
            return cosine_loss(prediction, targets.tokens)
        decoded = self.decoder(latent, mask.visible, mask.hidden)
        tokens, pixels = decoded.split(self.outputs, dim=-1)  # [b, h, D], [b, h, C p p]
        errors = self.pixel_errors(pixels, values, mask.hidden)
        return cosine_loss(gather(tokens, targets.kept), targets.tokens) + weight * errors.mean()


class PcaeSimMim(Pretraining):
    """Predict the teacher's kept tokens within the encoder (paper, appendix D).

    The appendix states a sequence of 96 tokens: 78 visible and 18 mask tokens. Halving the 118
    hidden patches three times gives 14 and so 92 tokens; --teacher-keep 0.54 gives 63, 34 and 18.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        width = start.model.config.width
        self.mask_token, self.predict = new_mask_token(width), new_linear(width, width)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        targets = self.targets(values, mask.hidden, rng)
        tokens = self.encode_with_masks(
            values, mask.visible, targets.position, self.mask_token, drop_path
        )
        return cosine_loss(self.predict(tokens), targets.tokens)


class Mae(Pretraining):
    """Predict the pixels of the hidden patches from the visible ones.

    --drop-targets excludes the pixels of patches that a teacher drops (paper, appendix C): `loss`
    decodes every hidden patch and counts the kept ones, `decoder` decodes only these. The paper
    does not state what ranks the patches; here it is PCAE's teacher.
    """

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        config = start.model.config
        self.decoder = build_decoder(config, start.settings, outputs=config.geometry.patch_values)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        latent = self.encode(values, mask.visible, drop_path)
        if self.teacher is None:
            return self.errors(latent, values, mask.visible, mask.hidden).mean()
        kept = self.targets(values, mask.hidden, rng).position
        if self.settings.drop_targets == "decoder":
            return self.errors(latent, values, mask.visible, kept).mean()
        errors = self.errors(latent, values, mask.visible, mask.hidden)
        counted = (mask.hidden.unsqueeze(2) == kept.unsqueeze(1)).any(dim=2)
        return (errors * counted).sum() / counted.sum()

    def errors(self, latent: Tensor, values: Tensor, visible: Tensor, wanted: Tensor) -> Tensor:
        """Return the mean squared error of each patch `wanted` [b, w], decoded together: [b, w]."""
        return self.pixel_errors(self.decoder(latent, visible, wanted), values, wanted)


class SimMim(Pretraining):
    """Predict the pixels of the hidden patches within the encoder, by absolute error."""

    def __init__(self, start: Start) -> None:
        super().__init__(start)
        width, values = start.model.config.width, start.model.config.geometry.patch_values
        self.mask_token, self.predict = new_mask_token(width), new_linear(width, values)

    def loss(self, values: Tensor, mask: Mask, rng: SampleRng, drop_path: Tensor | None) -> Tensor:
        tokens = self.encode_with_masks(
            values, mask.visible, mask.hidden, self.mask_token, drop_path
        )
        prediction: Tensor = self.predict(tokens).float()
        return (prediction - gather(values, mask.hidden)).abs().mean()


def pretrain(settings: PretrainSettings) -> bool:
    """Pretrain. Return False if a signal stopped the run, with a checkpoint to resume from."""
    check_out(settings)
    torch.manual_seed(settings.seed)
    if settings.threads:
        torch.set_num_threads(settings.threads)
    with join(settings.device) as world:
        encoder = prepare_encoder(settings)
        source = settings.decoding(encoder.preprocess)
        images = training_data(settings, source, labelled=False)
        print_inventory(images.inventory)
        if (note := fit_batch_size(settings, world, len(images))) is not None:
            print_lines(note)
        plan = Plan(settings, world, len(images))
        try:
            objective = build(settings, encoder, plan.steps).to(world.device)
        except ValueError as error:  # flags that only fit larger images
            raise PcaeError(one_line(error)) from None
        if world.main:
            encoder.report(settings.init, objective.added)
        groups = parameter_groups(objective, objective.model, settings.weight_decay)
        trainer = Trainer(
            settings, objective, groups, (0.9, 0.95), images, world, [images.inventory]
        )
        if encoder.held_out is not None:  # for later runs to hold out the same images
            trainer.at_start = encoder.held_out.write
        if settings.dry_run:
            estimate = trainer.estimate()
            if world.main:
                print(*describe(plan, objective), *objective.facts(), sep="\n")
                print(f"time       {estimate}, for the training steps alone")
            return True
        if settings.watch_images and world.main:
            trainer.watch = watch_features(objective, images, plan)
        return trainer.run()


def build(settings: PretrainSettings, encoder: Encoder, steps: int) -> Pretraining:
    """Return the objective of a run of `steps` optimiser steps."""
    ema = settings.ema if settings.ema is not None else momentum(steps)
    return METHODS[settings.method](Start(encoder, settings, ema))


#: The objective of each method.
METHODS: dict[Method, type[Pretraining]] = {
    "pcae": Pcae,
    "mae": Mae,
    "simmim": SimMim,
    "pcae-simmim": PcaeSimMim,
}


def embed(model: VisionTransformer, values: Tensor, index: Tensor) -> Tensor:
    """Embed the patches `index` [B, m] of values [B, n, C p p], with positions: [B, m, D].

    The patch embedding is applied as a linear layer, to these patches only.
    """
    projection = model.patch_embed.proj
    tokens = F.linear(gather(values, index), projection.weight.flatten(1), projection.bias)
    positions = model.pos_embed[:, model.config.positioned :].expand(len(values), -1, -1)
    return tokens + gather(positions, index)


def _blocks(config: ViTConfig, lengths: Sequence[int]) -> int:
    """Return the multiply-adds of blocks of `lengths` tokens (see `pcae_serve.bundle.tokens`)."""
    width, linear = config.width, 4 * config.width + config.mlp_layers * config.hidden
    return sum(n * width * linear + 2 * n * n * width for n in lengths)


def build_decoder(config: ViTConfig, settings: PretrainSettings, outputs: int) -> Decoder:
    """Return MAE's decoder, by default with the method's depth."""
    depth = settings.decoder_depth or (8 if settings.method == "mae" else 2)
    width = settings.decoder_width or default_width(config.width)
    return Decoder(config, outputs, depth, width, heads=width // 32)


def cosine_loss(prediction: Tensor, target: Tensor) -> Tensor:
    """Return 1 - cosine, averaged over tokens (paper, equation 1)."""
    return 1 - F.cosine_similarity(prediction.float(), target, dim=-1).mean()


def new_mask_token(width: int) -> nn.Parameter:
    """Return a new learnt token that replaces hidden patches: [1, 1, width]."""
    return nn.Parameter(torch.randn(1, 1, width) * 0.02)


def new_linear(inputs: int, outputs: int) -> nn.Linear:
    """Return a prediction layer, initialised like the encoder's layers."""
    layer = nn.Linear(inputs, outputs)
    nn.init.xavier_uniform_(layer.weight)
    nn.init.zeros_(layer.bias)
    return layer
