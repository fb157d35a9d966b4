"""ViT decoders trained elsewhere, and the latent statistics that go with them, loaded by name.

RAE (Zheng et al. 2025, arXiv:2510.11690) publishes decoders as .pt, diffusers its AutoencoderRAE as
safetensors. Both predict pixels in the normalisation of their encoder; a decoder loaded here
predicts [-1, 1]. They were trained on the encoder's features as they are: a normaliser before the
quantizer has to be undone before such a decoder.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from tokenizer.decoders.vit import ViTDecoder
from training.errors import UserError

# diffusers calls the parts of attention by its own names; RAE by those of transformers' ViT, which
# are ours.
DIFFUSERS_NAMES = {
    ".attention.to_q.": ".attention.attention.query.",
    ".attention.to_k.": ".attention.attention.key.",
    ".attention.to_v.": ".attention.attention.value.",
    ".attention.to_out.0.": ".attention.output.dense.",
}
ENVELOPES = (
    "ema",
    "model",
    "state_dict",
)  # of training checkpoints; averaged weights before others


@torch.no_grad()
def load_decoder(
    decoder: ViTDecoder, path: str | Path, image_mean: Sequence[float], image_std: Sequence[float]
) -> None:
    """Load what RAE or diffusers trained from a file, or from the folder that holds it.

    `image_mean` and `image_std` are the encoder's per-channel normalisation of images in [0, 1]; a
    file that states its own (diffusers') is taken at its word. Raises UserError, before anything is
    written, when a tensor is missing, unknown or of another shape.
    """
    file = _weights_file(Path(path))
    saved = _read(file)
    mean, std = (
        torch.as_tensor(saved.get(name, given), dtype=torch.float64).flatten()
        for name, given in (("encoder_mean", image_mean), ("encoder_std", image_std))
    )
    _check_heads(decoder, file)
    weights = _decoder_part(saved, file)
    state = decoder.state_dict()
    positions = weights.get("decoder_pos_embed")
    if positions is None or (
        positions.shape != state["decoder_pos_embed"].shape and positions.shape[-1] == decoder.dim
    ):
        weights["decoder_pos_embed"] = state[
            "decoder_pos_embed"
        ]  # fixed, and each grid has its own
    for name, tensor in state.items():
        if name not in weights:
            raise UserError(
                f"{file}: {name} is missing: decoder.preset (or depth) must be what it was trained "
                "with"
            )
        if weights[name].shape != tensor.shape:
            raise UserError(
                f"{file}: {name} is {tuple(weights[name].shape)}, and {tuple(tensor.shape)} here: "
                "decoder.preset "
                "(or dim, mlp), the encoder's channels and the pixels per code must be what it "
                "was trained with"
            )
    for name in weights:
        if name not in state:
            raise UserError(
                f"{file}: {name} has no place here: decoder.preset (or depth) must be what it was "
                "trained with"
            )
    rows = len(state["decoder_pred.bias"]) // 3  # (p q c): the channel changes fastest
    scale, shift = (2 * std).repeat(rows), (2 * mean - 1).repeat(rows)  # x -> 2 (x std + mean) - 1
    weights["decoder_pred.weight"] = weights["decoder_pred.weight"].double() * scale[:, None]
    weights["decoder_pred.bias"] = weights["decoder_pred.bias"].double() * scale + shift
    decoder.load_state_dict(weights)


def load_statistics(path: str | Path) -> tuple[Tensor, Tensor]:
    """(mean, var) of latents, float32, as RAE's .pt files hold them: both (C, h, w). Raises
    UserError."""
    saved = _read(Path(path))
    for name in ("mean", "var"):
        if not isinstance(saved.get(name), Tensor):
            raise UserError(
                f"{path}: it holds no tensor {name!r}: give a file of latent statistics, with mean "
                "and var"
            )
    mean, var = saved["mean"].float(), saved["var"].float()
    if mean.shape != var.shape or not (
        mean.isfinite().all() and var.isfinite().all() and (var >= 0).all()
    ):
        raise UserError(
            f"{path}: mean {tuple(mean.shape)} and var {tuple(var.shape)} must be of one shape, "
            "finite, and var not "
            "negative: compute the statistics again"
        )
    return mean, var


def _decoder_part(saved: Mapping[str, Any], file: Path) -> dict[str, Tensor]:
    """The decoder's tensors under our names, whatever they are nested in or prefixed with
    (decoder., module.)."""
    last = "decoder_pred.weight"
    key = next((key for key in saved if key == last or key.endswith(f".{last}")), None)
    if key is None:
        raise UserError(
            f"{file}: it holds no {last}: give the decoder of an RAE, or diffusers' AutoencoderRAE"
        )
    prefix = key[: -len(last)]
    part = {key[len(prefix) :]: value for key, value in saved.items() if key.startswith(prefix)}
    for theirs, ours in DIFFUSERS_NAMES.items():
        part = {key.replace(theirs, ours): value for key, value in part.items()}
    return part


def _check_heads(decoder: ViTDecoder, file: Path) -> None:
    """The one size that weights do not show stands in diffusers' config.json."""
    config = file.with_name("config.json")
    try:
        stated = (
            json.loads(config.read_text()).get("decoder_num_attention_heads")
            if config.is_file()
            else None
        )
    except (ValueError, AttributeError):
        raise UserError(
            f"{config}: it is not the JSON of a model's settings: copy it again"
        ) from None
    if stated not in (None, decoder.heads):
        raise UserError(
            f"{config}: the decoder has {stated} heads, and {decoder.heads} here: set "
            f"decoder.heads={stated}"
        )


def _weights_file(path: Path) -> Path:
    if not path.is_dir():
        return path
    files = sorted(file for file in path.iterdir() if file.suffix in (".safetensors", ".pt"))
    if len(files) != 1:
        names = ", ".join(file.name for file in files) or "none"
        raise UserError(
            f"{path}: one .safetensors or .pt file is expected there, and it has {names}: name one"
        )
    return files[0]


def _read(file: Path) -> dict[str, Any]:
    """A file's entries by name, out of the envelopes of training checkpoints."""
    from safetensors.torch import load_file

    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        saved = torch.load(file, map_location="cpu", weights_only=True)
    except FileNotFoundError:
        raise UserError(
            f"{file}: there is no such file: give the path of downloaded weights"
        ) from None
    except Exception:  # what the two readers raise shares no base
        raise UserError(
            f"{file}: it is damaged, or holds other things than tensors: download it again"
        ) from None
    while isinstance(saved, Mapping) and (
        inner := [v for k in ENVELOPES if isinstance(v := saved.get(k), Mapping)]
    ):
        saved = inner[0]
    if not isinstance(saved, Mapping):
        raise UserError(
            f"{file}: it holds a {type(saved).__name__} and no tensors by name: give a state dict"
        )
    return dict(saved)
