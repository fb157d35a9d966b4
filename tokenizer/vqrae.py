"""VQRAE (arXiv:2511.23386) behind the constructor and methods of RAE (arXiv:2510.11690).

For code that was written for them; what runs are made of is `autoencoder.VQRAEConfig`. A folder of
it holds config.json, the constructor's arguments, beside what tokenizer/shared_folder.py says.
"""

from __future__ import annotations

import dataclasses
import json
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.latents import LatentNormaliser
from tokenizer.model_card import LICENCE, front_matter, titled
from tokenizer.objective import distillation_loss
from tokenizer.rae import RAEArguments
from tokenizer.run import load_autoencoder_weights
from tokenizer.shared_folder import check_target, fetch, portable, replacing, seal, upload
from training.checkpoint import weights_path, write_weights
from training.errors import UserError

USAGE = """```python
from tokenizer import VQRAE

model = VQRAE.from_pretrained("owner/name")  # or this folder
codes = model.encode_to_indices(images)  # (B, 3, H, W) in [0, 1] -> (B, h, w) int64
images = model.decode_from_indices(codes)
```"""


class CodebookUsage(float):
    """The share of codes met, in [0, 1], with `perplexity` of those and `num_codes`, how many there
    are."""

    def __new__(cls, share: float, perplexity: float = 1.0, num_codes: int = 0) -> CodebookUsage:
        usage = super().__new__(cls, share)
        usage.perplexity, usage.num_codes = perplexity, num_codes
        return usage


class VQRAE(nn.Module):
    """RAE's interface with a codebook between encoder and decoder; images (B, 3, H, W) in [0, 1].

    `.autoencoder` is the tokenizer proper, which everything else in this project speaks to. In
    training mode the codebook's statistics gather until `update` applies them; `forward`, called
    for an optimizer step at a time, does so for the step before.
    """

    def __init__(self, *positional: Any, saved: str | Path | None = None, **arguments: Any) -> None:
        """The arguments are those of `RAEArguments`, which says what they mean.

        `saved`: folder of an architecture whose weights are going to be loaded. Raises UserError or
        ValueError for what cannot be loaded or does not fit.
        """
        super().__init__()
        meant = RAEArguments(*positional, **arguments)
        self.arguments = dataclasses.asdict(meant)
        self.autoencoder, self.normaliser = meant.build(None if saved is None else Path(saved))
        self.reshape_to_2d = meant.reshape_to_2d
        self.codebook_dim = self.autoencoder.quantizer.dim
        self._steps, self._pending = 0, False
        self.last_vq_loss: Tensor | None = None  # of the last encode, already weighted

    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> quantized latents (B, C, h, w), or (B, N, C); sets
        `last_vq_loss`.

        Gradients pass straight through the codebook. The latents are normalised where there are
        statistics.
        """
        features = self._features(images)
        if self.training and self.autoencoder.noise_tau > 0:
            scale = (
                torch.rand(len(features), 1, 1, 1, device=features.device)
                * self.autoencoder.noise_tau
            )
            features = features + scale * torch.randn_like(features)
        _, quantized = self.autoencoder.quantize(features)
        self._pending = self.training
        self.last_vq_loss = quantized.loss
        latents = self.normaliser(self.autoencoder.project_out(quantized.vectors))
        return latents if self.reshape_to_2d else latents.flatten(2).transpose(1, 2)

    def _features(self, images: Tensor) -> Tensor:
        return self.autoencoder.encoder(images * 2 - 1, self.autoencoder.grid)

    def decode(self, latents: Tensor) -> Tensor:
        """Latents as `encode` gives them -> images (B, 3, H, W), about [0, 1]."""
        if latents.ndim == 3:
            side = round(latents.shape[1] ** 0.5)
            if side * side != latents.shape[1]:
                raise ValueError(
                    f"{latents.shape[1]} tokens are no square grid: give latents as (B, C, h, w)"
                )
            latents = latents.transpose(1, 2).unflatten(2, (side, side))
        if isinstance(self.normaliser, LatentNormaliser):
            latents = self.normaliser.inverse(latents)
        return (self.autoencoder.to_images(latents) + 1) / 2

    def forward(self, images: Tensor) -> Tensor:
        """decode(encode(images)). In training, applies first what the codebook gathered in the step
        before."""
        if self._pending and self.training:
            self.update()
        return self.decode(self.encode(images))

    @torch.no_grad()
    def encode_to_indices(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) in [0, 1] -> (B, h, w) int64; (B, N) without reshape_to_2d. Adds no noise,
        gathers nothing."""
        training = self.autoencoder.quantizer.training
        self.autoencoder.quantizer.eval()
        _, quantized = self.autoencoder.quantize(self._features(images))
        self.autoencoder.quantizer.train(training)
        codes = quantized.codes[:, 0]
        return codes if self.reshape_to_2d else codes.flatten(1)

    @torch.no_grad()
    def decode_from_indices(self, indices: Tensor) -> Tensor:
        """(B, h, w) or (B, N) int64 -> images (B, 3, H, W), about [0, 1]. Raises ValueError for
        other codes."""
        codes = indices.flatten(1)
        grid = tuple(indices.shape[1:]) if indices.ndim == 3 else self.autoencoder.grid
        layout = self.autoencoder.layout_of(
            *(side * self.autoencoder.encoder.stride for side in grid)
        )
        return (self.autoencoder.decode(codes, layout) + 1) / 2

    def set_stage(self, stage: int) -> None:
        """1: the encoder is frozen; 2: it learns."""
        self.autoencoder.set_stage(stage)

    def compute_distillation_loss(self, z_cont: Tensor, z_quant: Tensor) -> Tensor:
        """Mean squared error between quantized features and the continuous ones, which get no
        gradient.

        Through straight-through vectors it moves the features *away* from their codes; training
        here keeps the features near a frozen teacher's instead (objective.distillation_target).
        """
        return distillation_loss(z_quant, z_cont.detach())

    def get_codebook_usage(self) -> CodebookUsage:
        """Share of codes met in recent training steps, a number in [0, 1]; beside it what
        CodebookUsage has."""
        figures = self.autoencoder.quantizer.statistics.figures()
        return CodebookUsage(
            float(figures["usage"]),
            float(figures["perplexity"]),
            self.autoencoder.quantizer.num_codes[0],
        )

    def save_pretrained(self, folder: str | Path) -> None:
        """Write a folder that `from_pretrained` reads: arguments, weights, the encoder's
        architecture, a card."""
        save_vqrae(self, folder)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None) -> VQRAE:
        """From a folder, or a repository of the Hub. Raises UserError when there is none, or it is
        damaged."""
        return load_vqrae(name_or_folder, revision)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to the Hub's `repo_id` (owner/name); its address."""
        return push_vqrae(self, repo_id, private=private)

    def update(self, taken: bool = True) -> None:
        """Apply what the codebook gathered since the last call; `taken=False` throws it away."""
        self.autoencoder.update(self._steps, taken)
        self._steps, self._pending = self._steps + 1, False


def save_vqrae(model: VQRAE, folder: str | Path) -> Path:
    """Write a VQRAE, trained by whatever code, to a folder for `load_vqrae`; return it."""
    folder, encoder, decoder = Path(folder), model.autoencoder.encoder, model.autoencoder.decoder
    check_target(None, folder)
    arguments = portable(dict(model.arguments))
    arguments["freeze_encoder"] = encoder.frozen  # set_stage may have changed it
    sizes = {
        "decoder_hidden_size": decoder.dim,
        "decoder_num_hidden_layers": len(decoder.decoder_layers),
        "decoder_num_attention_heads": decoder.heads,
        "decoder_intermediate_size": decoder.decoder_layers[0].intermediate["dense"].out_features,
    }
    (grid,), (num_codes,) = model.autoencoder.layout.grids, model.autoencoder.layout.num_codes
    about = f"A VQRAE: images to {grid[0]} x {grid[1]} codes of {num_codes}, and back."
    front = front_matter(["vqrae"], arguments["encoder_config_path"], None)
    with replacing(folder) as temporary:
        (temporary / "config.json").write_text(
            json.dumps({"class": "VQRAE", "arguments": arguments}, indent=1)
        )
        write_weights(weights_path(temporary), model.state_dict(), {})
        encoder.save_architecture(temporary / "weights" / "encoder")
        (temporary / "weights" / "decoder").mkdir()
        (temporary / "weights" / "decoder" / "config.json").write_text(json.dumps(sizes, indent=1))
        seal(
            temporary,
            front + titled(folder.name, [about, "", USAGE, "", "## Licence", "", LICENCE]),
        )
    return folder


def load_vqrae(name_or_folder: str | Path, revision: str | None = None) -> VQRAE:
    """The VQRAE that `save_vqrae` wrote, from its folder or a Hub name, in evaluation mode. Raises
    UserError."""
    folder = fetch(name_or_folder, revision)
    file = folder / "config.json"
    if not file.is_file():
        raise UserError(
            f"{folder}: it holds no VQRAE (there is no config.json): give what save_pretrained "
            "wrote"
        )
    try:
        arguments = json.loads(file.read_text())["arguments"]
        arguments["decoder_config_path"] = str(folder / "weights" / "decoder")
        model = VQRAE(**arguments, saved=folder / "weights")
    except UserError:
        raise
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(f"{file}: it does not describe a VQRAE ({error}): save it again") from None
    load_autoencoder_weights(model, folder)
    return model.eval()


def push_vqrae(model: VQRAE, repo_id: str, *, private: bool = True) -> str:
    """Upload a VQRAE; return its address. A new repository is private unless told otherwise."""
    with tempfile.TemporaryDirectory() as temporary:
        return upload(
            save_vqrae(model, Path(temporary, repo_id.rpartition("/")[2])), repo_id, private
        )
