"""What a tokenizer minimises: pixels, perception, commitment, distillation, and an adversary when asked."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder
from tokenizer.discriminators import DISCRIMINATORS
from tokenizer.perceptual import Perceptual
from training import distributed
from training.config import one_of
from training.loop import Batch, Loss


@dataclasses.dataclass(frozen=True)
class ObjectiveConfig:
    l1: float = 0.0
    l2: float = 1.0
    perceptual: float = 0.0  # LPIPS
    lpips_net: str = "vgg"
    lpips_weights: str | None = None  # the trunk's file
    distillation: float = 0.0  # stage 2
    adversarial: float = 0.0
    adversarial_start_step: int = 0
    adversarial_ramp_steps: int = 500
    discriminator_start_step: int = 0
    adaptive_cap: float = 1.0  # largest adaptive weight (VQGAN's reaches 1e4)
    discriminator: Any = one_of(DISCRIMINATORS, "patch")

    def __post_init__(self) -> None:
        if self.perceptual > 0 and not self.lpips_weights:
            raise ValueError(
                f"objective.perceptual={self.perceptual} needs objective.lpips_weights, the file of the "
                f"{self.lpips_net} trunk; set objective.perceptual=0 to train without LPIPS"
            )


class Objective:
    """The losses of both turns. Holds the frozen helpers (LPIPS, teacher), which no checkpoint contains."""

    def __init__(self, config: ObjectiveConfig, autoencoder: Autoencoder, teacher: nn.Module | None) -> None:
        """`teacher`: a frozen copy of the pretrained encoder, when the config asks for distillation."""
        device = distributed.device()
        self.config, self.autoencoder = config, autoencoder
        self.discriminator = config.discriminator.build() if config.adversarial > 0 else None
        self.perceptual = None
        if config.perceptual > 0:
            self.perceptual = Perceptual(config.lpips_net, Path(config.lpips_weights)).to(device)
        self.teacher = None
        if config.distillation > 0:
            assert teacher is not None
            self.teacher = teacher.to(device).eval().requires_grad_(False)

    def autoencoder_loss(self, batch: Batch, step: int) -> Loss:
        """Reconstruction + quantizer + w_d |Z - T(X)|^2 (VQRAE, stage 2) + ramped, capped adversarial term."""
        images = batch["images"]
        output = self.autoencoder(images)
        error = output.images.float() - images
        mse = error.square().mean()
        parts = {"mse": mse, "quantizer": output.quantized.loss, **output.quantized.parts}
        reconstruction = self.config.l2 * mse + self.config.l1 * error.abs().mean()
        if self.perceptual is not None:
            parts["lpips"] = self.perceptual(output.images, images).mean()
            reconstruction = reconstruction + self.config.perceptual * parts["lpips"]
        total = reconstruction + output.quantized.loss
        if self.teacher is not None:
            with torch.no_grad():
                target = self.teacher(images)
            parts["distillation"] = F.mse_loss(output.features.float(), target.float())
            total = total + self.config.distillation * parts["distillation"]
        if self.discriminator is not None:
            batch.extras["reconstruction"] = output.images.detach()
            weight = self._ramp(step)
            if weight > 0:
                fooling = -self.discriminator(output.images).mean()
                adaptive = self._adaptive_weight(reconstruction, fooling)
                total = total + weight * adaptive * fooling
                parts |= {"adversarial": fooling, "adaptive_weight": adaptive}
        return Loss(total, parts)

    def discriminator_loss(self, batch: Batch, step: int) -> Loss:
        """Hinge loss (Lim & Ye 2017, arXiv:1705.02894) on the reconstructions of this step's autoencoder turn."""
        assert self.discriminator is not None
        real = self.discriminator(batch["images"])
        fake = self.discriminator(batch.extras["reconstruction"])
        total = 0.5 * (F.relu(1 - real).mean() + F.relu(1 + fake).mean())
        return Loss(total, {"hinge": total, "real_logit": real.mean(), "fake_logit": fake.mean()})

    def _ramp(self, step: int) -> float:
        since = step - self.config.adversarial_start_step
        return self.config.adversarial * min(1.0, max(0.0, since / max(1, self.config.adversarial_ramp_steps)))

    def _adaptive_weight(self, reconstruction: Tensor, fooling: Tensor) -> Tensor:
        """|d reconstruction / d W| / |d fooling / d W| at the decoder's last layer W (Esser et al. 2021, eq. 7)."""
        last = self.autoencoder.decoder.last_layer
        norms = [torch.autograd.grad(loss, last, retain_graph=True)[0].norm() for loss in (reconstruction, fooling)]
        wanted, other = distributed.mean_(torch.stack(norms))
        return (wanted / (other + 1e-4)).clamp(max=self.config.adaptive_cap).detach()
