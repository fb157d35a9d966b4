"""Pretrain a small masked autoencoder (He et al. 2021, arXiv:2111.06377) on the data at hand.

python -m tokenizer.encoders.pretrain CONFIG.yaml [section.key=value ...] [--fresh]

For when no pretrained encoder can be reached, or none fits the images. The model is transformers'
own ViTMAEForPreTraining, and RUN/model is saved in its format, so it loads exactly as
facebook/vit-mae-base does.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path

import torch
from torch import nn

from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.grid import image_grid
from tokenizer.data.identity import open_run
from tokenizer.data.loader import feed
from tokenizer.data.transforms import to_pixels
from tokenizer.decoders.vit import sin_cos_positions
from tokenizer.encoders.foundation import quiet_transformers
from training import distributed, randomness
from training.command import config_command, run_command
from training.errors import UserError
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.optim import OptimizerConfig

MASK_STREAM = 0x4D4145  # sets the mask's draws apart from all others of a step


@dataclasses.dataclass(frozen=True)
class MAEConfig:
    patch_size: int = 4
    dim: int = 128
    depth: int = 6
    heads: int = 4
    mlp_ratio: float = 4.0
    decoder_dim: int = 64
    decoder_depth: int = 2
    decoder_heads: int = 4
    mask_ratio: float = 0.75
    normalise_targets: bool = False  # each patch's pixels, as in the paper's best setting

    def __post_init__(self) -> None:
        for dim, heads in (("dim", "heads"), ("decoder_dim", "decoder_heads")):
            if getattr(self, dim) % getattr(self, heads) or getattr(self, dim) % 4:
                raise ValueError(
                    f"mae.{dim}={getattr(self, dim)} must divide by mae.{heads} and by 4"
                )
        if not 0 < self.mask_ratio < 1:
            raise ValueError(f"mae.mask_ratio={self.mask_ratio} must be above 0 and below 1")

    def build(self, image_size: int) -> nn.Module:
        """transformers' ViTMAEForPreTraining. Raises ValueError when the image is no whole number
        of patches."""
        from transformers import ViTMAEConfig, ViTMAEForPreTraining

        if image_size % self.patch_size:
            near = max(1, round(image_size / self.patch_size)) * self.patch_size
            raise ValueError(
                f"data.image_size={image_size} does not divide by "
                f"mae.patch_size={self.patch_size}: take {near}"
            )
        model = ViTMAEForPreTraining(
            ViTMAEConfig(
                hidden_size=self.dim,
                num_hidden_layers=self.depth,
                num_attention_heads=self.heads,
                intermediate_size=int(self.dim * self.mlp_ratio),
                image_size=image_size,
                patch_size=self.patch_size,
                decoder_hidden_size=self.decoder_dim,
                decoder_num_hidden_layers=self.decoder_depth,
                decoder_num_attention_heads=self.decoder_heads,
                decoder_intermediate_size=int(self.decoder_dim * self.mlp_ratio),
                mask_ratio=self.mask_ratio,
                norm_pix_loss=self.normalise_targets,
            )
        )
        initialise(model, image_size // self.patch_size)
        return model


@torch.no_grad()
def initialise(model: nn.Module, side: int) -> None:
    """Start as the paper does: sin-cos positions, Xavier weights, small class and mask tokens.

    transformers sets all of them from a checkpoint; without one (5.23) it leaves every position at
    zero, and a masked autoencoder that cannot tell its patches apart learns nothing but the mean.
    """
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.init.xavier_uniform_(module.weight)
    embeddings, decoder = model.vit.embeddings, model.decoder
    nn.init.xavier_uniform_(embeddings.patch_embeddings.projection.weight.flatten(1))
    for tokens in (embeddings.cls_token, decoder.mask_token):
        nn.init.normal_(tokens, std=0.02)
    for positions in (embeddings.position_embeddings, decoder.decoder_pos_embed):
        positions.copy_(sin_cos_positions((side, side), positions.shape[-1]))


@dataclasses.dataclass(frozen=True)
class PretrainRun:
    """One run: the folder `root`/`name`."""

    name: str = "encoder"
    root: str = "runs"
    seed: int = 0
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    mae: MAEConfig = dataclasses.field(default_factory=MAEConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)


def pretrain(config: PretrainRun, *, fresh: bool = False) -> None:
    """Train as configured, resuming, and write RUN/model."""
    images = open_split(config.data, "train", augment=True, seed=config.seed)
    held_out = open_split(config.data, "held_out")
    folder = Path(config.root) / config.name
    torch.manual_seed(randomness.mix(config.seed))
    try:  # before the folder is taken, so that a mended configuration may take it
        model = config.mae.build(config.data.image_size)
    except ValueError as error:
        raise UserError(f"{folder}: {error}") from None
    batches = feed(
        images, config.loop.batch_size, config.seed, config.loop.accumulate, config.loop.workers
    )
    run = open_run(folder, config, [images, held_out], fresh=fresh)
    images.announce()
    num_patches = model.vit.embeddings.patch_embeddings.num_patches

    def loss(batch: Batch, step: int) -> Loss:
        noise = randomness.draw((config.seed, step, MASK_STREAM), batch.positions, (num_patches,))
        total = model(batch["images"], noise=noise).loss
        return Loss(total, {"mse": total})

    shown = held_out.gather([(0, index) for index in range(min(16, len(held_out)))])["images"]

    def preview(averaged: nn.Module, path: Path, step: int) -> None:
        images = shown.to(distributed.device())
        noise = torch.rand((len(shown), num_patches), generator=torch.Generator().manual_seed(0))
        output = averaged(images, noise=noise.to(images))
        mask = output.mask[:, :, None].expand(-1, -1, config.mae.patch_size**2 * 3)
        hidden = averaged.unpatchify(mask)
        filled = averaged.unpatchify(output.logits)
        rows = [images, images * (1 - hidden), images * (1 - hidden) + filled * hidden]
        image_grid(to_pixels(torch.stack(rows, 1).flatten(0, 1)), columns=12).save(path)

    phases = [Phase("mae", model, loss, config.optimizer)]
    averaged = train(
        config.loop, run, phases, batches, seed=config.seed, published=model, preview=preview
    )
    if distributed.is_main() and not (run.folder / "model" / "config.json").is_file():
        with run.files.subfolder("model") as folder, quiet_transformers():
            averaged.save_pretrained(folder)
            preprocessing = {
                "image_processor_type": "ViTImageProcessor",
                "do_normalize": True,
                "do_rescale": True,
                "rescale_factor": 1 / 255,
                "do_resize": True,
                "resample": 3,
                "size": {"height": config.data.image_size, "width": config.data.image_size},
                "image_mean": [0.5, 0.5, 0.5],
                "image_std": [0.5, 0.5, 0.5],
            }
            (folder / "preprocessor_config.json").write_text(json.dumps(preprocessing, indent=1))
    distributed.barrier()


def main() -> None:
    description = "Pretrain a small masked autoencoder on your own images."
    config_command("tokenizer.encoders.pretrain", description, PretrainRun, pretrain)


if __name__ == "__main__":
    run_command(main)
