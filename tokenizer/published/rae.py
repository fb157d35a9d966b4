"""bytetriper/RAE (nyu-visionx/RAE-collections): decoders of pretrained encoders' features, without
codes."""

from __future__ import annotations

from pathlib import Path
from typing import NoReturn

from torch import Tensor, nn

from tokenizer.decoders.pretrained import load_statistics
from tokenizer.decoders.vit import Size, ViTDecoder
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.latents import LatentNormaliser
from tokenizer.published.files import Hyperparameters, read_config
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from training.errors import UserError


class RAE(nn.Module):
    """Images (B, 3, H, W) in [-1, 1] <-> continuous latents (B, C, h, w). It has no codes."""

    def __init__(
        self, encoder: nn.Module, decoder: ViTDecoder, statistics: tuple[Tensor, Tensor] | None
    ) -> None:
        super().__init__()
        self.encoder, self.decoder = encoder, decoder
        self.normaliser = (
            LatentNormaliser(encoder.channels, decoder.grid) if statistics else nn.Identity()
        )
        if statistics:
            self.normaliser.load(*statistics)

    def features(self, images: Tensor) -> Tensor:
        """What the encoder makes of images, (B, C, h, w)."""
        stride = self.decoder.stride
        return self.encoder(images, (images.shape[2] // stride, images.shape[3] // stride))

    def to_latents(self, images: Tensor) -> Tensor:
        return self.normaliser(self.features(images))

    def to_images(self, latents: Tensor) -> Tensor:
        """About [-1, 1]."""
        if isinstance(self.normaliser, LatentNormaliser):
            latents = self.normaliser.inverse(latents)
        # The decoder predicts pixels in its encoder's normalisation.
        return (self.decoder(latents) * self.encoder.std + self.encoder.mean) * 2 - 1

    def encode(self, images: Tensor) -> NoReturn:
        raise UserError(
            "an RAE is continuous and has no codes: train a tokenizer with its decoder, "
            "decoder.weights=FILE"
        )

    def decode(self, codes: Tensor, layout: object = None) -> NoReturn:
        self.encode(codes)

    def check_outputs(
        self, images: Tensor | None = None, latents: Tensor | None = None
    ) -> dict[str, Tensor]:
        """What a case holds: of images, or of latents."""
        if images is None:
            return {"reconstruction": self.to_images(latents)}
        features = self.features(images)
        latents = self.normaliser(features)
        return {"features": features, "latents": latents, "reconstruction": self.to_images(latents)}


def build(shapes: Shapes, hyper: Hyperparameters) -> tuple[RAE, dict[str, str]]:
    """The model without its decoder's weights, and its decoder's names. Raises UserError for what
    is not there."""
    folder = Path(hyper.path).parent

    def path(key: str) -> Path | None:
        """A path in the configuration: as it stands, or beside it."""
        value = hyper.find(key)
        return (
            None
            if value is None
            else next((p for p in (folder / value, Path(value)) if p.exists()), Path(value))
        )

    settings = path("decoder_config_path")
    if settings is None or hyper.find("encoder_config_path") is None:
        raise UserError(
            f"{hyper.path}: no configuration says encoder_config_path and decoder_config_path, and "
            "a decoder alone is "
            "no model: give one that does (config=FILE), or train a tokenizer with it, "
            "decoder.weights=FILE"
        )
    file = settings / "config.json" if settings.is_dir() else settings
    heads = Hyperparameters(read_config(file), file).needed(
        "decoder_num_attention_heads", why="and shapes do not tell the heads of attention"
    )
    source = hyper.find("encoder_params", "dinov2_path") or hyper.find("encoder_config_path")
    local = next((p for p in (folder / source, Path(source)) if p.is_dir()), None)
    encoder = FoundationConfig(
        name=str(local or source),
        final_norm="plain",
        input_size=hyper.number("encoder_input_size"),
        frozen=True,
    ).build(hyper.needed("encoder_input_size", why="which is how many pixels its encoder sees"))
    stride = hyper.needed("decoder_patch_size", why="which is how many pixels a token becomes")
    side = hyper.number("encoder_input_size") // encoder.patch
    dim, in_channels = shapes["decoder_embed.weight"]
    size = Size(
        dim,
        count(shapes, "decoder_layers.{}."),
        heads,
        shapes["decoder_layers.0.intermediate.dense.weight"][0],
    )
    statistics = path("normalization_stat_path")
    model = RAE(
        encoder,
        ViTDecoder(in_channels, stride, (side, side), size),
        load_statistics(statistics) if statistics else None,
    )
    return model, {f"decoder.{name}": name for name in model.decoder.state_dict()}


def _no_autoencoder(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    raise AssertionError("it is built by `build`")


RAE_PEER = Peer(
    kind="rae",
    title="RAE decoders (bytetriper/RAE, nyu-visionx/RAE-collections)",
    licence="MIT",
    recognises=has("decoder_embed.weight", "decoder_pred.weight", "trainable_cls_token"),
    architecture=_no_autoencoder,
    build=build,
    unit_range=True,
    quirks=(
        "continuous: there are no codes. Its decoder begins a tokenizer's with "
        "`decoder.weights=FILE`",
        "the encoder is transformers' own, of which class and register tokens and the last norm's "
        "scale and shift are "
        "dropped; images are resized for it",
        "latents are normalised by statistics for each channel and place",
    ),
    files=(
        PublishedFile(
            "rae-dinov2-b",
            "nyu-visionx/RAE-collections",
            "decoders/dinov2/wReg_base/ViTXL_n08/model.pt",
            "1152 wide, 28 layers, 16 heads; statistics in "
            "stats/dinov2/wReg_base/imagenet1k/stat.pt",
            "rFID 0.57 reported, 0.54 reproduced (ImageNet val at 256 px, tau 0.8)",
        ),
    ),
)
