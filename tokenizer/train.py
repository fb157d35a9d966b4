"""Train a tokenizer: python -m tokenizer.train CONFIG.yaml [section.key=value ...] [--fresh |
--dry-run]

Running the same command again resumes. Under torchrun the same command uses every process.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.data.dataset import Images, open_split
from tokenizer.data.given import MapDataset, open_given
from tokenizer.data.grid import image_grid
from tokenizer.data.identity import open_run
from tokenizer.data.loader import feed, keys_of_step, read
from tokenizer.data.transforms import to_pixels
from tokenizer.dry_run import dry_run
from tokenizer.encoders.foundation import FoundationEncoder
from tokenizer.features import StoredFeatures
from tokenizer.health import Health
from tokenizer.objective import Objective
from tokenizer.run import TokenizerRun, load_autoencoder_weights, load_config
from training import distributed, randomness
from training.checkpoint import weights_hash
from training.command import config_command, run_command
from training.errors import UserError
from training.loop import Phase, train

PIXELS_AT_ONCE = 256 * 64**2  # of images that calibration encodes together


def train_tokenizer(
    config: TokenizerRun,
    *,
    fresh: bool = False,
    images: MapDataset | None = None,
    held_out: MapDataset | None = None,
) -> nn.Module:
    """Train as configured, resuming; returns the averaged tokenizer. Raises UserError for what
    cannot work.

    `images` and `held_out` are map-style data sets of images or (image, label), in place of
    `config.data.source`; without `held_out`, `config.data.held_out` of each class are held out.
    """
    config, images, held_out = open_data(config, images, held_out)
    reading = (config.loop.batch_size, config.seed, config.loop.accumulate, config.loop.workers)
    batches = feed(images, *reading)
    folder = Path(config.root) / config.name
    autoencoder, objective, inputs = _build(config)
    stored = None
    if config.features is not None:
        stored = StoredFeatures(
            images,
            autoencoder.encoder,
            config.features,
            augment=config.data.augment,
            seed=config.seed,
            root=Path(config.root),
        )
        inputs["features"] = stored.hash
    remedy = f", or begin another run with its weights, start_from={folder}"
    run = open_run(folder, config, [images, held_out], fresh=fresh, inputs=inputs, remedy=remedy)
    images.announce()
    if stored is not None and not run.finished(config.loop.steps):
        with run.marking():
            stored.make(autoencoder.encoder, config.loop.workers)
        batches = feed(stored, *reading)
    if isinstance(autoencoder.encoder, FoundationEncoder) and distributed.is_main():
        run.files.note("weights/encoder/config.json", "weights/encoder/preprocessor_config.json")
        autoencoder.encoder.save_architecture(run.folder / "weights" / "encoder")
    shown = _Shown(held_out)
    return train(
        config.loop,
        run,
        phases_of(config, objective),
        batches,
        seed=config.seed,
        published=autoencoder,
        begin=lambda: _start_from_data(config, autoencoder, images),
        preview=shown.preview,
        measure=shown.measure,
        watch=Health(autoencoder.layout.num_codes, config.objective.adaptive_cap).read,
    )


def _build(config: TokenizerRun) -> tuple[nn.Module, Objective, dict[str, str]]:
    """The autoencoder, what it is trained with, and hashes of the weights that they come from.

    Before the run's folder is taken, so that a configuration that was mended may take it.
    """
    inputs = {}
    if config.start_from is not None:
        inputs["start_from"] = weights_hash(Path(config.start_from))
    torch.manual_seed(randomness.mix(config.seed))
    # With weights to start from, those of the pretrained encoder need not be at hand.
    saved = Path(config.start_from) / "weights" if config.start_from else None
    try:
        autoencoder = config.model.build(config.data.image_size, saved)
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{Path(config.root) / config.name}: {error}") from None
    if config.start_from is not None:
        load_autoencoder_weights(autoencoder, Path(config.start_from))
    if config.tune == "decoder":
        autoencoder.hold_codes()
    objective = Objective(
        config.objective, autoencoder, teacher_of(config, autoencoder), config.seed
    )
    if config.start_from is None and isinstance(autoencoder.encoder, FoundationEncoder):
        inputs["encoder"] = autoencoder.encoder.fingerprint()
    if objective.discriminator is not None and hasattr(objective.discriminator.network, "trunk"):
        inputs["discriminator"] = objective.discriminator.network.trunk.fingerprint()
    return autoencoder, objective, inputs


def _start_from_data(config: TokenizerRun, autoencoder: nn.Module, images: Images) -> None:
    """Latent statistics and codebooks from the features of training images, where no earlier run
    has them."""
    if config.start_from is not None or not autoencoder.starts_from_data:
        return
    if distributed.is_main():
        count, folder = min(config.calibration_images, len(images)), Path(config.root) / config.name
        print(f"{folder}: starting from the features of {count} images", flush=True)
    autoencoder.calibrate(_calibration_batches(images.plain(), config), config.seed)


class _Shown:
    """Held-out images, up to 256 from all over their split, that a run shows and measures itself
    by."""

    def __init__(self, held_out: Images) -> None:
        places = torch.linspace(0, len(held_out) - 1, min(256, len(held_out))).long()
        self.images = held_out.gather([(0, int(place)) for place in places])["images"]

    def preview(self, averaged: nn.Module, path: Path, step: int) -> None:
        """A picture of originals beside their reconstructions."""
        every = max(1, len(self.images) // 16)
        originals = self.images[::every][:16].to(distributed.device())
        pairs = torch.stack([originals, averaged(originals).images], dim=1).flatten(0, 1)
        image_grid(to_pixels(pairs), columns=8).save(path)

    def measure(self, averaged: nn.Module) -> dict[str, float]:
        """The mean PSNR of images."""
        errors = [
            (averaged(part.to(distributed.device())).images.clamp(-1, 1).cpu() - part)
            .div(2)
            .square()
            .mean((1, 2, 3))
            for part in self.images.split(64)
        ]
        return {"psnr": float(-10 * torch.cat(errors).log10().mean())}


def open_data(
    config: TokenizerRun, images: MapDataset | None = None, held_out: MapDataset | None = None
) -> tuple[TokenizerRun, Images, Images]:
    """(the run as it is to be recorded, training images, held-out images), of the configured source
    or of the data sets that were given."""
    if images is None:
        train_images = open_split(config.data, "train", augment=True, seed=config.seed)
        return config, train_images, open_split(config.data, "held_out")
    data, splits = open_given(config.data, images, held_out, config.seed)
    config = dataclasses.replace(config, data=data)
    return config, splits["train"], splits["held_out"].plain()


def phases_of(config: TokenizerRun, objective: Objective) -> list[Phase]:
    """What a step moves: the autoencoder, then the discriminator where there is one."""
    autoencoder, adversary = objective.autoencoder, objective.discriminator
    phases = [
        Phase(
            "autoencoder",
            autoencoder,
            objective.autoencoder_loss,
            config.optimizer,
            after_step=autoencoder.update,
        )
    ]
    if adversary is not None:
        phases.append(
            Phase(
                "discriminator",
                adversary,
                objective.discriminator_loss,
                config.discriminator_optimizer,
                config.objective.discriminator_start_step,
                adversary.update,
            )
        )
    return phases


def teacher_of(config: TokenizerRun, autoencoder: nn.Module) -> nn.Module | None:
    """The pretrained encoder as it was before any training here, where features are to stay near
    its own."""
    if config.objective.distillation == 0 or config.objective.distillation_target != "teacher":
        return None
    before = config
    while before.start_from is not None:
        before = load_config(Path(before.start_from))
        if not before.model.encoder.frozen:  # it has learned since
            return config.model.encoder.build(config.data.image_size)
    return copy.deepcopy(autoencoder.encoder)


def _calibration_batches(images: Images, config: TokenizerRun) -> list[Tensor]:
    """On the CPU; the same on every rank and of any number of them, so that all start from one
    codebook."""
    count = min(config.calibration_images, len(images))
    keys = keys_of_step(len(images), count, config.seed, 0)
    size = max(1, min(256, PIXELS_AT_ONCE // config.data.image_size**2))
    parts = (keys[start : start + size] for start in range(0, count, size))
    workers = images.readers(min(config.loop.workers, -(-count // size)))
    with contextlib.closing(read(images, parts, workers, "loop.workers")) as batches:
        return [batch["images"] for batch in batches]


def main() -> None:
    config_command("tokenizer.train", "Train a tokenizer.", TokenizerRun, train_tokenizer, dry_run)


if __name__ == "__main__":
    run_command(main)
