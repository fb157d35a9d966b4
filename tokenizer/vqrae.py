"""VQRAE: a pretrained vision encoder made discrete (arXiv:2511.23386), in two stages.

Stage 1: the encoder is frozen; codebook and ViT decoder learn. Stage 2 (`start_from` a stage-1 run,
`encoder.frozen: false`): all learn, while the features stay near those of the frozen pretrained
encoder.

`VQRAEConfig` is what runs are made of. `VQRAE` is the same tokenizer behind the constructor and
methods of RAE (Zheng et al. 2025, arXiv:2510.11690), for code that was written for them.
"""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.autoencoder import Autoencoder, LatentNormaliser, build_parts, check_decoder_weights
from tokenizer.decoders import DECODERS
from tokenizer.decoders.pretrained import load_decoder, load_statistics
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.encoders import ENCODERS
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.objective import distillation_loss
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from training.command import UserError
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class VQRAEConfig:
    kind: str = "vqrae"
    encoder: Any = one_of(ENCODERS, "foundation")
    quantizer: Any = one_of(QUANTIZERS, "simvq")
    decoder: Any = one_of(DECODERS, "vit")
    normalise: bool = True  # features, by measured statistics
    denormalise: bool = False  # undo it before the decoder, as RAE does
    noise_tau: float = (
        0.0  # training adds noise of a standard deviation drawn from [0, noise_tau) (RAE: 0.8)
    )

    def __post_init__(self) -> None:
        if self.denormalise and not self.normalise:
            raise ValueError(
                "model.denormalise=true undoes what model.normalise=false does not do: set one of them"
            )
        check_decoder_weights(self)
        if self.noise_tau < 0:
            raise ValueError(f"model.noise_tau={self.noise_tau} must be at least 0")

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> Autoencoder:
        """The autoencoder for square images; without pretrained weights where `saved` holds its
        own, or on request.

        Raises ValueError when the image does not divide into whole patches.
        """
        parts = build_parts(self, image_size, saved, weights)
        options = {
            "normalise": self.normalise,
            "denormalise": self.denormalise,
            "noise_tau": self.noise_tau,
        }
        return Autoencoder(*parts, **options)


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

    def __init__(
        self,
        encoder_cls: str = "Dinov2withNorm",
        encoder_config_path: str = "facebook/dinov2-base",
        encoder_input_size: int = 224,
        encoder_params: dict[str, Any] | None = None,
        decoder_config_path: str = "vit_mae-base",
        decoder_patch_size: int = 16,
        pretrained_decoder_path: str | None = None,
        noise_tau: float = 0.8,
        reshape_to_2d: bool = True,
        normalization_stat_path: str | None = None,
        eps: float = 1e-5,
        num_embeddings: int = 8192,
        commitment_cost: float = 0.25,
        vq_decay: float = 0.99,
        vq_epsilon: float = 1e-5,
        quantize_before_reshape: bool = False,
        use_simvq: bool = True,
        use_projection: bool = True,
        freeze_encoder: bool = True,
        codebook_dim: int = 1536,
        *,
        saved: str | Path | None = None,
    ) -> None:
        """The arguments of RAE and of the VQRAE built on it.

        encoder_cls             one of ENCODER_CLASSES: which family the checkpoint must be of
        encoder_config_path     a folder in transformers' format, or a model of the Hub
        encoder_input_size      pixels per side that the encoder sees; images are resized (bicubic)
        encoder_params          may hold `revision`
        decoder_config_path     vit_mae-base, -large, -xl, or a folder whose config.json gives the decoder_* sizes
        decoder_patch_size      pixels per token and side of what is decoded
        pretrained_decoder_path decoder weights of RAE or of diffusers' AutoencoderRAE
        noise_tau               largest standard deviation of the noise that training adds to features
        reshape_to_2d           latents are (B, C, h, w), otherwise (B, N, C)
        normalization_stat_path file with `mean` and `var` of the features; without one they stay as
        they are quantize_before_reshape quantize the encoder's tokens, and normalise what comes
        out; otherwise the
                                normalised grid is quantized
        use_simvq, use_projection   SimVQ or a moving-average codebook; `codebook_dim` with projections around it, or
                                the encoder's own width

        saved                   folder of an architecture whose weights are going to be loaded: nothing else is read

        Raises UserError or ValueError for what cannot be loaded or does not fit.
        """
        self.arguments = {
            name: value
            for name, value in locals().items()
            if name not in ("self", "saved", "__class__")
        }
        super().__init__()
        if encoder_cls not in ENCODER_CLASSES:
            raise ValueError(
                f"encoder_cls={encoder_cls!r} is not one of {', '.join(ENCODER_CLASSES)}"
            )
        encoder = FoundationConfig(
            name=encoder_config_path,
            revision=(encoder_params or {}).get("revision"),
            frozen=freeze_encoder,
            final_norm="plain",
            input_size=encoder_input_size,
        )
        tokens = encoder.build(encoder_input_size, None if saved is None else Path(saved))
        family = tokens.model.config.model_type
        if family not in ENCODER_CLASSES[encoder_cls]:
            raise ValueError(
                f"encoder_cls={encoder_cls} does not go with {encoder_config_path}, which is {family!r}"
            )
        side = encoder_input_size // tokens.stride
        tokens.stride = decoder_patch_size  # of the images that are decoded
        dim = codebook_dim if use_projection else tokens.channels
        if use_simvq:
            quantizer = SimVQConfig(
                num_codes=num_embeddings, code_dim=dim, commitment=commitment_cost
            )
        else:
            quantizer = VectorConfig(
                num_codes=num_embeddings,
                code_dim=dim,
                commitment=commitment_cost,
                decay=vq_decay,
                epsilon=vq_epsilon,
            )
        built = _decoder_config(decoder_config_path).build(
            tokens.channels, decoder_patch_size, (side, side), tokens
        )
        if pretrained_decoder_path is not None and saved is None:
            load_decoder(
                built, Path(pretrained_decoder_path), tokens.mean.flatten(), tokens.std.flatten()
            )
        normalise = normalization_stat_path is not None
        within = normalise and not quantize_before_reshape
        self.autoencoder = Autoencoder(
            tokens,
            quantizer.build(),
            built,
            (side, side),
            normalise=within,
            denormalise=within,
            noise_tau=noise_tau,
        )
        # With quantize_before_reshape the tokenizer proper knows nothing of the normalisation of
        # latents.
        outer = normalise and quantize_before_reshape
        self.normaliser = (
            LatentNormaliser(tokens.channels, (side, side)) if outer else nn.Identity()
        )
        for normaliser in (self.normaliser, self.autoencoder.normaliser):
            if isinstance(normaliser, LatentNormaliser):
                normaliser.eps = eps
                if saved is None:
                    normaliser.load(*load_statistics(Path(normalization_stat_path)))
        self.reshape_to_2d, self.codebook_dim, self._steps, self._pending = (
            reshape_to_2d,
            dim,
            0,
            False,
        )
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
        from tokenizer.sharing import save_vqrae

        save_vqrae(self, folder)

    @classmethod
    def from_pretrained(cls, name_or_folder: str | Path, revision: str | None = None) -> VQRAE:
        """From a folder, or a repository of the Hub. Raises UserError when there is none, or it is
        damaged."""
        from tokenizer.sharing import load_vqrae

        return load_vqrae(name_or_folder, revision)

    def push_to_hub(self, repo_id: str, *, private: bool = True) -> str:
        """Upload what `save_pretrained` writes to the Hub's `repo_id` (owner/name); its address."""
        from tokenizer.sharing import push_vqrae

        return push_vqrae(self, repo_id, private=private)

    def update(self, taken: bool = True) -> None:
        """Apply what the codebook gathered since the last call; `taken=False` throws it away."""
        self.autoencoder.update(self._steps, taken)
        self._steps, self._pending = self._steps + 1, False


def _decoder_config(path: str) -> ViTDecoderConfig:
    """Of a name as `vit_mae-base` or `ViTXL`, or of a config.json with transformers' decoder_*
    fields."""
    name = Path(path).name.removesuffix(".json").lower()
    if name in DECODER_PRESETS:
        return ViTDecoderConfig(preset=DECODER_PRESETS[name])
    file = Path(path, "config.json") if Path(path).is_dir() else Path(path)
    if not file.is_file():
        known = ", ".join(DECODER_PRESETS)
        raise UserError(
            f"decoder_config_path={path}: there is no such file, and it is none of {known}"
        )
    try:
        fields = json.loads(file.read_text())
        return ViTDecoderConfig(
            dim=fields["decoder_hidden_size"],
            depth=fields["decoder_num_hidden_layers"],
            heads=fields["decoder_num_attention_heads"],
            mlp=fields["decoder_intermediate_size"],
        )
    except (ValueError, KeyError, TypeError) as error:
        raise UserError(
            f"{file}: describes no decoder ({error}): decoder_hidden_size, … are needed"
        ) from None


DECODER_PRESETS = {
    "vit_mae-base": "B",
    "vitb": "B",
    "vit_mae-large": "L",
    "vitl": "L",
    "vit_mae-xl": "XL",
    "vitxl": "XL",
}

ENCODER_CLASSES = {
    "Dinov2withNorm": ("dinov2", "dinov2_with_registers"),
    "Dinov3withNorm": ("dinov3_vit",),
    "SigLIP2wNorm": ("siglip_vision_model", "siglip2_vision_model"),
    "MAEwNorm": ("vit_mae",),
    "ViTwNorm": ("vit",),
    "InternViTwNorm": ("internvl_vision",),
}
