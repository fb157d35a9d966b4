"""What a tokenizer minimises: pixels, perception, commitment, distillation, and an adversary when
asked."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.discriminators import DISCRIMINATORS
from tokenizer.discriminators.augment import NUM_DRAWS, diff_augment
from tokenizer.perceptual import Perceptual
from training import batch_means, distributed, randomness
from training.algorithms import lay_out
from training.config import one_of
from training.loop import Batch, Loss

DISTILLATION_TARGETS = ("teacher", "codes")
AUGMENT_STREAM, NOISE_STREAM = 0x415547, 0x4E4F49  # set their draws apart from all others of a step


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0  # LPIPS
    lpips_net: str = "vgg"
    lpips_weights: str | None = None  # the trunk's file
    distillation: float = 0.0  # stage 2
    distillation_target: str = (
        "teacher"  # or "codes": the quantized vectors follow the continuous ones
    )
    adversarial: float = 0.0
    gan: str = "hinge"  # or "non_saturating"
    adversarial_start_step: int = 0
    adversarial_ramp_steps: int = 500
    adaptive: bool = (
        True  # weigh the adversarial term by the ratio of gradients at the decoder's last layer
    )
    adaptive_cap: float = 1.0  # largest such ratio (VQGAN's reaches 1e4)
    augment: float = 0.0  # DiffAugment: the probability of each of its transformations
    lecam: float = 0.0  # weight of LeCAM
    lecam_start_step: int = 0
    discriminator_start_step: int = 0  # before adversarial_start_step, to warm it up
    discriminator: Any = one_of(DISCRIMINATORS, "patch")

    def __post_init__(self) -> None:
        for name in (
            "l1",
            "l2",
            "perceptual",
            "distillation",
            "adversarial",
            "adaptive_cap",
            "lecam",
        ):
            if not getattr(self, name) >= 0:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)} must not be negative: 0 leaves it out"
                )
        for name, choices in (("distillation_target", DISTILLATION_TARGETS), ("gan", tuple(GANS))):
            if getattr(self, name) not in choices:
                raise ValueError(
                    f"objective.{name}={getattr(self, name)!r} is not one of {', '.join(choices)}"
                )
        if not 0 <= self.augment <= 1:
            raise ValueError(
                f"objective.augment={self.augment} is a probability: give it a value from 0 to 1"
            )
        if self.adversarial > 0 and self.discriminator_start_step > self.adversarial_start_step:
            raise ValueError(
                f"objective.discriminator_start_step={self.discriminator_start_step} would set an "
                "untrained "
                f"discriminator against the decoder from objective.adversarial_start_step="
                f"{self.adversarial_start_step}: let the discriminator start no later"
            )
        if self.perceptual > 0 and not self.lpips_weights:
            raise ValueError(
                f"objective.perceptual={self.perceptual} needs objective.lpips_weights, the file "
                "of the "
                f"{self.lpips_net} trunk; set objective.perceptual=0 to train without LPIPS"
            )


class Objective:
    """The losses of both phases. Holds the frozen helpers (LPIPS, teacher), which no checkpoint
    contains."""

    def __init__(
        self,
        config: ObjectiveConfig,
        autoencoder: nn.Module,
        teacher: nn.Module | None,
        seed: int = 0,
    ) -> None:
        """`teacher`: a frozen copy of the pretrained encoder, when the config distils from one.

        Raises UserError for a discriminator that does not fit the images, and for LPIPS weights of
        another network.
        """
        device = distributed.device()
        self.config, self.autoencoder, self.seed = config, autoencoder, seed
        self.discriminator = None
        image_size = autoencoder.layout.grids[-1][0] * autoencoder.encoder.stride
        if config.adversarial > 0:
            lecam = LeCam() if config.lecam > 0 else None
            self.discriminator = Adversary(config.discriminator.build(image_size), lecam)
        self.perceptual = None
        if config.perceptual > 0:
            self.perceptual = lay_out(
                Perceptual(config.lpips_net, Path(config.lpips_weights)).to(device), device
            )
            self.perceptual.check(image_size)
        self.teacher = None
        if config.distillation > 0 and config.distillation_target == "teacher":
            assert teacher is not None
            self.teacher = teacher.to(device).eval().requires_grad_(False)

    def autoencoder_loss(self, batch: Batch, step: int) -> Loss:
        """Reconstruction + quantizer + distillation (VQRAE, stage 2) + ramped, capped adversarial
        term."""
        images = batch["images"]
        given = {
            "noise": self._noise(images, batch.positions, step),
            "features": batch.tensors.get("features"),
        }
        output = self.autoencoder(
            images, **{name: value for name, value in given.items() if value is not None}
        )
        error = output.images.float() - images
        mse = error.square().mean()
        parts = {"mse": mse, "quantizer": output.loss, **output.parts}
        reconstruction = self.config.l2 * mse
        if self.config.l1 > 0:
            parts["l1"] = error.abs().mean()
            reconstruction = reconstruction + self.config.l1 * parts["l1"]
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(output.images, images).mean()
            reconstruction = reconstruction + self.config.perceptual * parts["lpips"]
        total = reconstruction + output.loss
        if self.config.distillation > 0:
            parts["distillation"] = self._distillation(images, output)
            total = total + self.config.distillation * parts["distillation"]
        if self.discriminator is not None:
            batch.extras["reconstruction"] = output.images.detach()
            weight = self._ramp(step)
            if weight > 0:
                fooling = GANS[self.config.gan].generator(
                    self._judge(output.images, batch, step, 0)
                )
                parts["adversarial"] = fooling
                if self.config.adaptive:
                    parts["adaptive_weight"] = self._adaptive_weight(reconstruction, fooling)
                    weight = weight * parts["adaptive_weight"]
                total = total + weight * fooling
        return Loss(total, parts)

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        """Tell the images from the reconstructions of this step's autoencoder phase; LeCAM when
        asked."""
        assert self.discriminator is not None
        real = self._judge(batch["images"], batch, step, 1)
        fake = self._judge(batch.extras["reconstruction"], batch, step, 2)
        total = GANS[self.config.gan].discriminator(real, fake)
        right = ((real > 0).float().mean() + (fake < 0).float().mean()) / 2
        parts = {
            self.config.gan: total,
            "real_logit": real.mean(),
            "fake_logit": fake.mean(),
            "accuracy": right,
        }
        if self.discriminator.lecam is not None:
            parts["lecam"] = self.discriminator.lecam(real, fake)
            if step >= self.config.lecam_start_step:
                total = total + self.config.lecam * parts["lecam"]
        return Loss(total, parts)

    def _judge(self, images: Tensor, batch: Batch, step: int, stream: int) -> Tensor:
        """Logits of augmented images; `stream` sets the three passes of a step apart."""
        assert self.discriminator is not None
        images = images.float()
        if self.config.augment > 0:
            seed = (self.seed, step, AUGMENT_STREAM, stream)
            images = diff_augment(
                images, randomness.draw(seed, batch.positions, (NUM_DRAWS,)), self.config.augment
            )
        return self.discriminator(images)

    def _distillation(self, images: Tensor, output: Any) -> Tensor:
        if self.teacher is None:  # the design notes' variant
            return distillation_loss(output.vectors, output.latents)
        with torch.no_grad():
            target = self.teacher(images)
        return distillation_loss(output.features, target)

    def _noise(self, images: Tensor, positions: Tensor, step: int) -> Tensor | None:
        """(B, C, h, w) for an autoencoder that trains its decoder on noisy features."""
        tau, encoder = self.autoencoder.noise_tau, self.autoencoder.encoder
        if tau == 0 or not self.autoencoder.training:
            return None
        height, width = (side // encoder.stride for side in images.shape[2:])
        return feature_noise(
            (self.seed, step, NOISE_STREAM), positions, (encoder.channels, height, width), tau
        )

    def _ramp(self, step: int) -> float:
        since = step - self.config.adversarial_start_step
        return self.config.adversarial * min(
            1.0, max(0.0, since / max(1, self.config.adversarial_ramp_steps))
        )

    def _adaptive_weight(self, reconstruction: Tensor, fooling: Tensor) -> Tensor:
        """|d reconstruction / d W| / |d fooling / d W| at the decoder's last layer W (Esser et al.
        2021, eq. 7).

        Of gradients that are averaged over the global batch first.
        """
        last = self.autoencoder.last_layer
        gradients = [
            torch.autograd.grad(loss, last, retain_graph=True)[0]
            for loss in (reconstruction, fooling)
        ]
        wanted, other = (
            batch_means.batch_mean(torch.stack(gradients).float()).flatten(1).norm(dim=1)
        )
        return (wanted / (other + 1e-4)).clamp(max=self.config.adaptive_cap)


class Adversary(nn.Module):
    """What the discriminator's phase moves: its network, and LeCAM's anchors beside it."""

    def __init__(self, network: nn.Module, lecam: LeCam | None) -> None:
        super().__init__()
        self.network, self.lecam = network, lecam

    def forward(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [-1, 1] -> (B, M, h, w) float32 logits of being real."""
        return self.network(images).float()

    def update(self, step: int, taken: bool) -> None:
        """After each optimizer step of the discriminator's phase."""
        if self.lecam is not None:
            self.lecam.update(taken)
        if taken and hasattr(self.network, "update"):
            self.network.update()


class LeCam(nn.Module):
    """LeCAM regularisation (Tseng et al. 2021, arXiv:2104.03310): logits stay near the other side's
    moving average.

    E max(0, D(x) - a_fake)^2 + E max(0, a_real - D(G))^2, rectified as the authors' code is and
    their equation is not: the penalty only ever draws the two sides together. 0 until there are
    averages. The decay is that of tokenizers (Open-MAGVIT2, TiTok); the authors' own code has 0.9
    with BigGAN and 0.99 with StyleGAN2.
    """

    def __init__(self, decay: float = 0.999) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("anchors", torch.zeros(2))  # of real and fake logits
        self.register_buffer("num_updates", torch.zeros((), dtype=torch.int64))
        self.register_buffer(
            "sums", torch.zeros(3), persistent=False
        )  # of both means this step, and their number

    def forward(self, real: Tensor, fake: Tensor) -> Tensor:
        """Penalty on logits of any shape; what they are is gathered for `update`."""
        with torch.no_grad():
            self.sums += torch.stack([real.mean(), fake.mean(), torch.ones_like(self.sums[0])])
        real_anchor, fake_anchor = self.anchors
        penalty = (
            F.relu(real - fake_anchor).square().mean() + F.relu(real_anchor - fake).square().mean()
        )
        return penalty * (self.num_updates > 0)

    @torch.no_grad()
    def update(self, taken: bool) -> None:
        """Move the anchors to the step's means over micro-batches and ranks; the first ones set
        them."""
        if taken:
            sums = distributed.sum_(self.sums)  # in place: they begin anew below
            self.num_updates += 1
            self.anchors.lerp_(sums[:2] / sums[2], (1 / self.num_updates).clamp(min=1 - self.decay))
        self.sums.zero_()


def distillation_loss(features: Tensor, target: Tensor) -> Tensor:
    """|Z - T|^2 as a mean over elements, in fp32; the target gets no gradient."""
    return F.mse_loss(features.float(), target.detach().float())


def feature_noise(
    seed: tuple[int, ...], positions: Tensor, shape: tuple[int, ...], tau: float
) -> Tensor:
    """(len(positions), *shape): normal noise of a deviation that each sample draws from [0, tau)
    (RAE, section 4).

    A sample's noise depends on its place in the global batch alone, not on how the batch is split.
    """
    deviations = tau * randomness.draw(seed, positions, (1,) * len(shape))
    return randomness.normal(seed, positions, shape).mul_(deviations)


@dataclasses.dataclass(frozen=True)
class Gan:
    """Both sides of an adversarial loss, of logits of any shape."""

    generator: Callable[[Tensor], Tensor]  # (fake)
    discriminator: Callable[[Tensor, Tensor], Tensor]  # (real, fake)


def _hinge(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())


def _logistic(real: Tensor, fake: Tensor) -> Tensor:
    return 0.5 * (F.softplus(-real).mean() + F.softplus(fake).mean())


GANS = {
    "hinge": Gan(lambda fake: -fake.mean(), _hinge),  # Lim & Ye 2017, arXiv:1705.02894
    "non_saturating": Gan(
        lambda fake: F.softplus(-fake).mean(), _logistic
    ),  # Goodfellow et al. 2014, arXiv:1406.2661
}
