"""A discrete autoencoder: encoder, latent normalisation, quantizer between two projections,
decoder.

With convolutions it is VQ-VAE (van den Oord et al. 2017, arXiv:1711.00937), with an adversary and
LPIPS VQGAN (Esser et al. 2021, arXiv:2012.09841); VQRAE has a pretrained encoder and a ViT decoder
in their places.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from tokenizer.data.pixels import check_floats
from tokenizer.decoders import DECODERS
from tokenizer.decoders.pretrained import load_decoder
from tokenizer.encoders import ENCODERS
from tokenizer.interface import CodeLayout, QuantizerOutput
from tokenizer.latents import LatentNormaliser, Moments, Projection, rows_to_keep
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.codebook import LowRank, to_rows
from tokenizer.quantizers.kmeans import Reservoir
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class VQVAEConfig:
    kind: str = "vqvae"
    encoder: Any = one_of(ENCODERS, "conv")
    quantizer: Any = one_of(QUANTIZERS, "vector")
    decoder: Any = one_of(DECODERS, "conv")
    normalise: bool = False  # latents, by statistics measured before training
    projections: bool = False  # before and after the quantizer even where widths agree

    def __post_init__(self) -> None:
        check_decoder_weights(self)

    def build(
        self, image_size: int, saved: Path | None = None, weights: bool = True
    ) -> Autoencoder:
        """The autoencoder for square images; without pretrained weights where `saved` holds its
        own, or on request.

        Raises ValueError when the image does not divide into whole patches.
        """
        return _build(self, image_size, saved, weights)


@dataclasses.dataclass(frozen=True)
class VQRAEConfig:
    """VQRAE (arXiv:2511.23386): a pretrained vision encoder made discrete, in two stages.

    Stage 1: the encoder is frozen; codebook and ViT decoder learn. Stage 2 (`start_from` a stage-1
    run, `encoder.frozen: false`): all learn, while the features stay near those of the frozen
    pretrained encoder.
    """

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
                "model.denormalise=true undoes what model.normalise=false does not do: set one of "
                "them"
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
        return _build(self, image_size, saved, weights)


def check_decoder_weights(model: Any) -> None:
    """Raise ValueError where published weights of a decoder would be ignored, or meet features of
    another kind."""
    if not getattr(model.decoder, "weights", None):
        return
    if model.kind == "vqvae2" or model.encoder.kind != "foundation":
        raise ValueError(
            "decoder.weights are of decoders for a pretrained encoder, and "
            f"model.kind={model.kind} with "
            f"encoder.kind={model.encoder.kind} has none that they fit: leave them out"
        )
    if model.normalise and not getattr(model, "denormalise", False):
        remedy = (
            "model.denormalise=true" if hasattr(model, "denormalise") else "model.normalise=false"
        )
        raise ValueError(
            f"decoder.weights were trained on features as the encoder gives them: set {remedy}"
        )


def _build(config: Any, image_size: int, saved: Path | None, weights: bool) -> Autoencoder:
    """The autoencoder that a config of either kind describes."""
    encoder = config.encoder.build(image_size, saved, weights)
    grid = grid_for(encoder, image_size)
    in_channels = _decoder_channels(config, encoder.channels)
    decoder = config.decoder.build(in_channels, encoder.stride, grid, encoder)
    if weights and saved is None and getattr(config.decoder, "weights", None):
        load_decoder(decoder, config.decoder.weights, encoder.mean.flatten(), encoder.std.flatten())
    options = {name: getattr(config, name) for name in OPTIONS if hasattr(config, name)}
    return Autoencoder(encoder, config.quantizer.build(), decoder, grid, **options)


OPTIONS = (
    "normalise",
    "denormalise",
    "noise_tau",
    "projections",
)  # of `Autoencoder`; a kind has some


def _decoder_channels(config: Any, channels: int) -> int:
    """What the decoder is given: features' channels, or where no projection follows, those of
    codes' vectors."""
    quantizer = config.quantizer
    projects = (
        getattr(config, "projections", False)
        or getattr(quantizer, "code_dim", channels) != channels
    )
    return channels if projects else getattr(quantizer, "vector_dim", None) or channels


def grid_for(encoder: nn.Module, image_size: int) -> tuple[int, int]:
    """Codes per side of square images; an encoder whose codes have no grid says so itself
    (`grid_of`)."""
    if hasattr(encoder, "grid_of"):
        return encoder.grid_of(image_size, image_size)
    return grid_of(image_size, encoder.stride)


def grid_of(image_size: int, stride: int) -> tuple[int, int]:
    """Codes per side. Raises ValueError when the image is no whole number of them."""
    if image_size % stride:
        near = max(1, round(image_size / stride)) * stride
        raise ValueError(
            f"data.image_size={image_size} does not divide by the encoder's {stride} pixels per "
            f"code: {near} would"
        )
    return image_size // stride, image_size // stride


@dataclasses.dataclass
class Reconstruction:
    images: Tensor  # (B, 3, H, W), about [-1, 1]
    features: Tensor  # (B, C, h, w), the encoder's own, before normalisation
    latents: Tensor  # (B, D, h, w), what the quantizer was given
    vectors: Tensor  # (B, D, h, w), what it made of them; gradients pass straight through
    codes: Tensor  # (B, N) int64
    loss: Tensor  # the quantizers', already weighted
    parts: dict[str, Tensor]  # its named terms


AFTER_CODES = ("project_out", "decoder")  # parts of an autoencoder


class Autoencoder(nn.Module):
    """images (B, 3, H, W) in [-1, 1] <-> codes (B, N) int64. Other sizes than the one trained on
    are taken, too."""

    def __init__(
        self,
        encoder: nn.Module,
        quantizer: nn.Module,
        decoder: nn.Module,
        grid: tuple[int, int],
        *,
        normalise: bool,
        denormalise: bool = False,
        noise_tau: float = 0.0,
        projections: bool = False,
    ) -> None:
        """`normalise` features before the quantizer and, with `denormalise`, undo it before the
        decoder.

        `projections` stand on both sides of the quantizer even where widths agree.
        `noise_tau`: largest standard deviation of the noise that training adds to features.
        """
        assert normalise or not denormalise
        super().__init__()
        self.encoder, self.quantizer, self.decoder = encoder, quantizer, decoder
        self.grid, self.noise_tau = grid, noise_tau
        self.denormalise = denormalise
        self.normaliser = LatentNormaliser(encoder.channels, grid) if normalise else nn.Identity()
        same = encoder.channels == quantizer.dim and not projections
        self.project_in = nn.Identity() if same else Projection(encoder.channels, quantizer.dim)
        vector_dim = getattr(quantizer, "vector_dim", quantizer.dim)
        self.project_out = nn.Identity() if same else Projection(vector_dim, encoder.channels)
        self.layout = self._layout_of(grid)
        self.held: tuple[str, ...] = ()  # parts that do not learn

    def hold_codes(self) -> None:
        """From now on only what follows the codes learns, so that the codes of images stay."""
        self.held = tuple(name for name, _ in self.named_children() if name not in AFTER_CODES)
        for name in self.held:
            self.get_submodule(name).requires_grad_(False)
        self.train(self.training)

    def train(self, mode: bool = True) -> Autoencoder:
        super().train(mode)
        for name in self.held:
            self.get_submodule(name).eval()
        return self

    @property
    def last_layer(self) -> nn.Parameter:
        """The weight whose gradients balance the adversarial loss."""
        return self.decoder.last_layer

    def forward(
        self, images: Tensor, noise: Tensor | None = None, features: Tensor | None = None
    ) -> Reconstruction:
        """`noise` (B, C, h, w) is added to the features, in training of decoders that must bear it
        (RAE, section 4).

        `features` (B, C, h, w) are what a frozen encoder made of the images, where that is known:
        it does not run.
        """
        features = self.encoder(images) if features is None else features.float()
        latents, quantized = self.quantize(features if noise is None else features + noise)
        pictures = self.from_vectors(quantized.vectors)
        codes = quantized.codes.flatten(1)
        return Reconstruction(
            pictures, features, latents, quantized.vectors, codes, quantized.loss, quantized.parts
        )

    @torch.no_grad()
    def encode(self, images: Tensor) -> Tensor:
        """(B, 3, H, W) floats in [-1, 1] -> (B, N) int64. Raises ValueError for others."""
        check_floats(images)
        return self.quantize(self.encoder(images))[1].codes.flatten(1)

    @torch.no_grad()
    def decode(self, codes: Tensor, layout: CodeLayout | None = None) -> Tensor:
        """(B, N) int64 -> (B, 3, H, W). Raises ValueError for codes that this tokenizer cannot have
        made.

        `layout` (of `layout_of`) is needed where the images are not of the size trained on.
        """
        layout = layout or self.layout
        layout.check(codes)
        return self.from_vectors(self.quantizer.lookup(torch.stack(layout.split(codes), 1)))

    def layout_of(self, height: int, width: int) -> CodeLayout:
        """What the codes of images (3, height, width) mean."""
        if hasattr(self.encoder, "grid_of"):
            return self._layout_of(self.encoder.grid_of(height, width))
        return self._layout_of((height // self.encoder.stride, width // self.encoder.stride))

    def update(self, step: int, taken: bool) -> None:
        """After each optimizer step; see Quantizer."""
        if not self.held:
            self.quantizer.update(step, taken)

    def set_stage(self, stage: int) -> None:
        """1: the encoder is frozen; 2: it learns. Raises ValueError for others, or an encoder
        without stages."""
        if stage not in (1, 2):
            raise ValueError(
                f"stage {stage!r} is neither 1 (the encoder is frozen) nor 2 (it learns)"
            )
        if not hasattr(self.encoder, "set_frozen"):
            raise ValueError(
                "only pretrained encoders have stages; this one is trained from the start"
            )
        self.encoder.set_frozen(stage == 1)

    @property
    def starts_from_data(self) -> bool:
        """Whether `calibrate` does anything."""
        return isinstance(self.normaliser, LatentNormaliser) or self.quantizer.starts_from_data

    @torch.no_grad()
    def calibrate(self, batches: list[Tensor], seed: int) -> None:
        """Measure latent statistics and start the codebook from data: `batches` of (B, 3, H, W)
        images, anywhere."""
        if not self.starts_from_data:
            return
        self.eval()
        num_positions, device = self.grid[0] * self.grid[1], next(self.parameters()).device
        sample = Reservoir(
            rows_to_keep(self.quantizer, num_positions * sum(map(len, batches))), seed
        )
        moments = Moments()
        for images in batches:
            features = self.encoder(images.to(device))
            moments.add(features)
            sample.add(to_rows(features))
        rows, of_image = sample.rows, (sample.places // num_positions).to(device)
        if isinstance(self.normaliser, LatentNormaliser):
            self.normaliser.load(*moments.mean_and_variance())
            rows = self.normaliser.of_rows(rows, (sample.places % num_positions).to(rows.device))
        project = self.project_in.of_rows if isinstance(self.project_in, Projection) else None
        if project is not None and self.quantizer.dim < rows.shape[1]:  # it keeps no distances
            rows, project = torch.cat([project(part) for part in rows.split(8192)]), None
        self.quantizer.initialise(rows, seed, project, images=of_image)

    def quantize(self, features: Tensor) -> tuple[Tensor, QuantizerOutput]:
        """The encoder's features (B, C, h, w) -> what the quantizer is given, and what it makes of
        that.

        In fp32 whatever the autocast, so that it chooses no other codes for the same features.
        """
        with torch.autocast(features.device.type, enabled=False):
            normalised = self.normaliser(features.float())
            latents = self.project_in(normalised)
            if (
                getattr(self.quantizer, "takes_low_rank", False)
                and 2 * normalised.shape[1] <= latents.shape[1]
            ):
                low_rank = LowRank(
                    to_rows(normalised), self.project_in.weight, self.project_in.bias
                )
                return latents, self.quantizer(latents, low_rank)
            return latents, self.quantizer(latents)

    def to_images(self, features: Tensor) -> Tensor:
        """Features as the quantizer leaves them, (B, C, h, w) and normalised where `normalise` is
        set -> images."""
        return self.decoder(self.normaliser.inverse(features) if self.denormalise else features)

    def from_vectors(self, vectors: Tensor) -> Tensor:
        """Vectors as the quantizer gives them, (B, D, h, w) -> images."""
        return self.to_images(self.project_out(vectors))

    def _layout_of(self, grid: tuple[int, int]) -> CodeLayout:
        return CodeLayout((grid,) * len(self.quantizer.num_codes), self.quantizer.num_codes)
