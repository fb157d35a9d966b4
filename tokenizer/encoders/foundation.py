"""Pretrained vision transformers as encoders, through transformers' own classes, from a folder or the Hub."""

from __future__ import annotations

import contextlib
import dataclasses
import hashlib
import json
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from training.command import UserError


@dataclasses.dataclass(frozen=True)
class FoundationConfig:
    kind: str = "foundation"
    name: str = "facebook/dinov2-base"  # a folder in transformers' format, or a model of the Hub
    revision: str | None = None
    frozen: bool = True

    def build(self, image_size: int, saved: Path | None = None) -> FoundationEncoder:
        """The encoder with its pretrained weights; with `saved` only its architecture, from that folder.

        Raises UserError when the name is neither a folder nor a reachable model, or the model is of a family
        that is not known here.
        """
        if saved is None:
            model, preprocessing = load_pretrained(self.name, self.revision)
        else:
            model, preprocessing = load_architecture(saved / "encoder")
        return FoundationEncoder(model, preprocessing, self.frozen)


@dataclasses.dataclass(frozen=True)
class Family:
    """How one architecture is loaded and called."""

    model_class: str
    prefix_tokens: Callable[[Any], int]  # config -> tokens that are no patches
    load_arguments: dict[str, Any] = dataclasses.field(default_factory=dict)
    interpolates: bool = True  # takes interpolate_pos_encoding; otherwise it always interpolates
    unused: tuple[str, ...] = ()  # parameters that a forward pass does not touch


FAMILIES = {
    "vit_mae": Family("ViTMAEModel", lambda config: 1, {"mask_ratio": 0.0}),
    "vit": Family("ViTModel", lambda config: 1, {"add_pooling_layer": False}),
    "dinov2": Family("Dinov2Model", lambda config: 1, interpolates=False, unused=("embeddings.mask_token",)),
    "dinov2_with_registers": Family(
        "Dinov2WithRegistersModel", lambda config: 1 + config.num_register_tokens,
        interpolates=False, unused=("embeddings.mask_token",),
    ),
}  # fmt: skip


class FoundationEncoder(nn.Module):
    """(B, 3, H, W) in [-1, 1] -> patch features (B, channels, H / stride, W / stride).

    Images are normalised as the model's preprocessor_config.json says; class and register tokens are dropped.
    A frozen encoder runs without gradients and stays in evaluation mode.
    """

    def __init__(self, model: nn.Module, preprocessing: dict[str, Any], frozen: bool) -> None:
        super().__init__()
        self.model, self.frozen = model, frozen
        self.preprocessing = preprocessing
        config = model.config
        self.family = FAMILIES[config.model_type]
        self.channels, self.stride, self.image_size = config.hidden_size, config.patch_size, config.image_size
        self.register_buffer("mean", torch.tensor(preprocessing["image_mean"], dtype=torch.float32).view(3, 1, 1))
        self.register_buffer("std", torch.tensor(preprocessing["image_std"], dtype=torch.float32).view(3, 1, 1))
        for name, parameter in model.named_parameters():
            if frozen or name in self.family.unused:
                parameter.requires_grad_(False)

    def train(self, mode: bool = True) -> FoundationEncoder:
        return super().train(mode and not self.frozen)

    def forward(self, images: Tensor) -> Tensor:
        height, width = images.shape[2] // self.stride, images.shape[3] // self.stride
        with torch.set_grad_enabled(torch.is_grad_enabled() and not self.frozen):
            pixels = ((images + 1) / 2 - self.mean) / self.std
            arguments: dict[str, Any] = {}
            if self.family.interpolates and tuple(images.shape[2:]) != (self.image_size, self.image_size):
                arguments["interpolate_pos_encoding"] = True
            if self.model.config.model_type == "vit_mae":
                # Even with nothing masked, MAE shuffles its patches by this noise: keep their order.
                order = torch.arange(height * width, device=images.device, dtype=torch.float32)
                arguments["noise"] = order.expand(len(images), -1)
            tokens = self.model(pixels, **arguments).last_hidden_state
            patches = tokens[:, self.family.prefix_tokens(self.model.config) :]
        return patches.transpose(1, 2).unflatten(2, (height, width))

    def fingerprint(self) -> str:
        """SHA-256 of the weights as they are now."""
        digest = hashlib.sha256()
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(name.encode())
            digest.update(tensor.detach().cpu().contiguous().numpy().tobytes())
        return digest.hexdigest()

    def save_architecture(self, folder: Path) -> None:
        """Write what `load_architecture` reads: two small JSON files."""
        folder.mkdir(parents=True, exist_ok=True)
        self.model.config.save_pretrained(folder)
        (folder / "preprocessor_config.json").write_text(json.dumps(self.preprocessing, indent=1))


def load_pretrained(name: str, revision: str | None) -> tuple[nn.Module, dict[str, Any]]:
    """(model, preprocessing) of a local folder or a Hub model; safetensors only, no remote code."""
    import transformers
    from safetensors import SafetensorError

    local = Path(name).is_dir()
    if not local and (name.startswith((".", "/", "~")) or name.count("/") != 1):
        raise UserError(
            f"model.encoder.name={name}: there is no such folder, and it is no Hub name (owner/model): "
            "train one on your own data with `make encoder`, or give the path of one"
        )
    where = {"revision": revision} if revision else {}
    try:
        with quiet_transformers():
            config = transformers.AutoConfig.from_pretrained(name, trust_remote_code=False, **where)
            family = _family(config, name)
            model, report = getattr(transformers, family.model_class).from_pretrained(
                name, use_safetensors=True, output_loading_info=True, ignore_mismatched_sizes=True,
                dtype=torch.float32, **family.load_arguments, **where,
            )  # fmt: skip
            preprocessing = _preprocessing(name, where)
    except (OSError, ValueError, SafetensorError) as error:
        if isinstance(error, UserError):
            raise
        reason = str(error).split("\n")[0]
        hint = "is damaged or not in transformers' format" if local else "is no folder here, and the Hub gave no model"
        raise UserError(f"model.encoder.name={name} {hint} ({reason}): give the path of a downloaded model") from None
    misfits = sorted({*report["missing_keys"], *(key for key, *_ in report["mismatched_keys"])})
    if misfits:
        raise UserError(f"model.encoder.name={name}: its weights lack {misfits[0]} as its config.json describes it")
    return model, preprocessing


@contextlib.contextmanager
def quiet_transformers() -> Iterator[None]:
    """Without its progress bars, its table of the weights that an encoder does not need, and the Hub's retries."""
    from huggingface_hub.utils import logging as hub_logging
    from transformers.utils import logging

    verbosity, hub_verbosity = logging.get_verbosity(), hub_logging.get_verbosity()
    bars = logging.is_progress_bar_enabled()
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    hub_logging.set_verbosity_error()
    try:
        yield
    finally:
        logging.set_verbosity(verbosity)
        hub_logging.set_verbosity(hub_verbosity)
        if bars:
            logging.enable_progress_bar()


def load_architecture(folder: Path) -> tuple[nn.Module, dict[str, Any]]:
    """(model with random weights, preprocessing) from the two JSON files of a saved tokenizer."""
    import transformers

    if not (folder / "config.json").is_file():
        raise UserError(f"{folder}/config.json is missing: train that tokenizer again, or copy its whole folder")
    config = transformers.AutoConfig.from_pretrained(folder, trust_remote_code=False)
    family = _family(config, str(folder))
    arguments = dict(family.load_arguments)
    for key in [key for key in arguments if hasattr(config, key)]:
        setattr(config, key, arguments.pop(key))
    return getattr(transformers, family.model_class)(config, **arguments), _preprocessing(str(folder), {})


def _family(config: Any, name: str) -> Family:
    if config.model_type not in FAMILIES:
        known = ", ".join(FAMILIES)
        raise UserError(f"model.encoder.name={name}: model type {config.model_type!r} is not one of {known}")
    return FAMILIES[config.model_type]


def _preprocessing(name: str, where: dict[str, Any]) -> dict[str, Any]:
    from transformers import BaseImageProcessor

    kept, _ = BaseImageProcessor.get_image_processor_dict(name, **where)
    try:
        return {key: list(kept[key]) for key in ("image_mean", "image_std")}
    except KeyError as error:
        raise UserError(f"model.encoder.name={name}: its preprocessor_config.json lacks {error}: add it") from None
