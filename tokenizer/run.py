"""A tokenizer's run: its configuration, and loading what it made."""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from torch import nn

from tokenizer.autoencoder import Autoencoder, VQRAEConfig, VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.features import FeaturesConfig
from tokenizer.hierarchical import Hierarchical, VQVAE2Config
from tokenizer.objective import ObjectiveConfig
from training import distributed
from training.checkpoint import load_weights
from training.config import load as read_config
from training.config import one_of
from training.errors import UserError
from training.loop import LoopConfig
from training.optim import OptimizerConfig

AUTOENCODERS = {"vqvae": VQVAEConfig, "vqvae2": VQVAE2Config, "vqrae": VQRAEConfig}


@dataclasses.dataclass(frozen=True)
class TokenizerRun:
    """One run: the folder `root`/`name`."""

    name: str = "tokenizer"
    root: str = "runs"
    seed: int = 0
    start_from: str | None = None  # a finished run whose weights to begin with
    # what learns: "all", or the "decoder" alone, so that codes stay those of start_from
    tune: str = "all"
    calibration_images: int = 2048  # for latent statistics and k-means
    data: DataConfig = dataclasses.field(default_factory=DataConfig)
    model: Any = one_of(AUTOENCODERS, "vqrae")
    objective: ObjectiveConfig = dataclasses.field(default_factory=ObjectiveConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    discriminator_optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    features: FeaturesConfig | None = (
        None  # train from stored features of the frozen encoder, not through it
    )

    def __post_init__(self) -> None:
        if self.tune not in ("all", "decoder"):
            raise ValueError(f"tune={self.tune!r} is neither all nor decoder")
        if self.tune == "decoder" and (self.start_from is None or self.model.kind == "vqvae2"):
            reason = "no start_from" if self.start_from is None else f"model.kind={self.model.kind}"
            raise ValueError(
                f"tune=decoder keeps the codes of start_from, and there is {reason}: "
                "name a run with one encoder, or set tune=all"
            )
        if self.features is not None:
            self.features.check(self.data, self.model, self.objective)
        if self.calibration_images < 1:
            raise ValueError(f"calibration_images={self.calibration_images} must be at least 1")
        if self.objective.distillation > 0 and self.objective.distillation_target == "teacher":
            if not isinstance(self.model.encoder, FoundationConfig):
                raise ValueError(
                    f"objective.distillation={self.objective.distillation} keeps features near a "
                    "pretrained encoder's, "
                    f"and model.encoder.kind={self.model.encoder.kind} has none: set it to 0"
                )
            if self.model.encoder.frozen:
                raise ValueError(
                    f"objective.distillation={self.objective.distillation} holds what "
                    "model.encoder.frozen=true holds "
                    "already: set one of them to 0 or false"
                )


def load_config(run_folder: Path) -> TokenizerRun:
    """The resolved configuration of a tokenizer's run. Raises UserError when the folder holds
    none."""
    path = Path(run_folder) / "config.yaml"
    if not path.is_file():
        raise UserError(
            f"{run_folder}: no tokenizer was trained here (there is no config.yaml): run `make "
            "tokenizer`"
        )
    return read_config(TokenizerRun, path, alone=True)


def load(run_folder: str | Path) -> Autoencoder | Hierarchical:
    """A trained tokenizer on this process's device, in evaluation mode; `.config` is its
    TokenizerRun.

    Raises UserError when the folder holds none, or its weights are damaged or of another
    architecture.
    """
    folder = Path(run_folder)
    config = load_config(folder)
    autoencoder = config.model.build(config.data.image_size, saved=folder / "weights")
    load_autoencoder_weights(autoencoder, folder)
    autoencoder.config = config
    return autoencoder.to(distributed.device()).eval().requires_grad_(False)


def load_autoencoder_weights(autoencoder: nn.Module, run_folder: Path) -> None:
    """Fill an autoencoder with a run's published weights. Raises UserError naming the first that
    does not fit."""
    weights, state = load_weights(run_folder), autoencoder.state_dict()
    for name in sorted(weights.keys() ^ state.keys()):
        lacking = "these settings have no" if name in weights else "has no"
        raise UserError(
            f"{run_folder}: {lacking} {name}: `model` must be the same in both runs (quantizer, "
            "dims, …)"
        )
    for name, tensor in weights.items():
        if tensor.shape != state[name].shape:
            raise UserError(
                f"{run_folder}: {name} is {tuple(tensor.shape)} there and "
                f"{tuple(state[name].shape)} "
                "by these settings: "
                "`model` and `data.image_size` must be the same in both runs"
            )
    autoencoder.load_state_dict(weights)
