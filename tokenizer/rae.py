"""The constructor of RAE (Zheng et al. 2025, arXiv:2510.11690) and of the VQRAE built on it, as the
parts of a tokenizer here."""

from __future__ import annotations

import dataclasses
import json
from pathlib import Path
from typing import Any

from torch import nn

from tokenizer.autoencoder import Autoencoder
from tokenizer.decoders.pretrained import load_decoder, load_statistics
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.latents import LatentNormaliser
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from training.errors import UserError

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


@dataclasses.dataclass(frozen=True)
class RAEArguments:
    """Arguments by their names there, in their order."""

    encoder_cls: str = "Dinov2withNorm"  # of ENCODER_CLASSES: the family that the checkpoint is of
    encoder_config_path: str = "facebook/dinov2-base"  # a folder as transformers has, or a Hub name
    encoder_input_size: int = 224  # pixels per side that the encoder sees; resized (bicubic)
    encoder_params: dict[str, Any] | None = None  # may hold `revision`
    # vit_mae-base, -large, -xl, or a folder whose config.json gives the decoder_* sizes
    decoder_config_path: str = "vit_mae-base"
    decoder_patch_size: int = 16  # pixels per token and side of what is decoded
    pretrained_decoder_path: str | None = None  # weights of RAE or of diffusers' AutoencoderRAE
    noise_tau: float = 0.8  # largest deviation of the noise that training adds to features
    reshape_to_2d: bool = True  # latents are (B, C, h, w), otherwise (B, N, C)
    # file with `mean` and `var` of the features; without one they stay as they are
    normalization_stat_path: str | None = None
    eps: float = 1e-5
    num_embeddings: int = 8192
    commitment_cost: float = 0.25
    vq_decay: float = 0.99
    vq_epsilon: float = 1e-5
    # quantize the encoder's tokens, and normalise what comes out; otherwise the normalised grid is
    # quantized
    quantize_before_reshape: bool = False
    use_simvq: bool = True  # or a moving-average codebook
    use_projection: bool = True  # around `codebook_dim`, or the encoder's own width
    freeze_encoder: bool = True
    codebook_dim: int = 1536

    def build(self, saved: Path | None = None) -> tuple[Autoencoder, nn.Module]:
        """The tokenizer proper, and the normalisation of latents that it knows nothing of.

        `saved` is the folder of an architecture whose weights are going to be loaded: nothing else
        is read. Raises UserError or ValueError for what cannot be loaded or does not fit.
        """
        encoder = self._encoder(saved)
        side = self.encoder_input_size // encoder.stride
        encoder.stride = self.decoder_patch_size  # of the images that are decoded
        decoder = decoder_config(self.decoder_config_path).build(
            encoder.channels, self.decoder_patch_size, (side, side), encoder
        )
        if self.pretrained_decoder_path is not None and saved is None:
            path = Path(self.pretrained_decoder_path)
            load_decoder(decoder, path, encoder.mean.flatten(), encoder.std.flatten())
        normalises = self.normalization_stat_path is not None
        within = normalises and not self.quantize_before_reshape
        autoencoder = Autoencoder(
            encoder,
            self._quantizer(encoder.channels).build(),
            decoder,
            (side, side),
            normalise=within,
            denormalise=within,
            noise_tau=self.noise_tau,
        )
        outside = normalises and self.quantize_before_reshape
        normaliser = LatentNormaliser(encoder.channels, (side, side)) if outside else nn.Identity()
        for each in (normaliser, autoencoder.normaliser):
            if isinstance(each, LatentNormaliser):
                each.eps = self.eps
                if saved is None:
                    each.load(*load_statistics(Path(self.normalization_stat_path)))
        return autoencoder, normaliser

    def _encoder(self, saved: Path | None) -> nn.Module:
        if self.encoder_cls not in ENCODER_CLASSES:
            known = ", ".join(ENCODER_CLASSES)
            raise ValueError(f"encoder_cls={self.encoder_cls!r} is not one of {known}")
        encoder = FoundationConfig(
            name=self.encoder_config_path,
            revision=(self.encoder_params or {}).get("revision"),
            frozen=self.freeze_encoder,
            final_norm="plain",
            input_size=self.encoder_input_size,
        ).build(self.encoder_input_size, saved)
        family = encoder.model.config.model_type
        if family not in ENCODER_CLASSES[self.encoder_cls]:
            raise ValueError(
                f"encoder_cls={self.encoder_cls} does not go with {self.encoder_config_path}, "
                f"which is {family!r}"
            )
        return encoder

    def _quantizer(self, channels: int) -> SimVQConfig | VectorConfig:
        options: dict[str, Any] = {
            "num_codes": self.num_embeddings,
            "code_dim": self.codebook_dim if self.use_projection else channels,
            "commitment": self.commitment_cost,
        }
        if self.use_simvq:
            return SimVQConfig(**options)
        return VectorConfig(**options, decay=self.vq_decay, epsilon=self.vq_epsilon)


def decoder_config(path: str) -> ViTDecoderConfig:
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
