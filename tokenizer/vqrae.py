"""VQRAE: a pretrained vision encoder made discrete (arXiv:2511.23386), in two stages.

Stage 1: the encoder is frozen; codebook and ViT decoder learn. Stage 2 (`start_from` a stage-1 run,
`encoder.frozen: false`): all learn, while the features stay near those of the frozen pretrained encoder.
"""

from __future__ import annotations

import dataclasses
from pathlib import Path
from typing import Any

from tokenizer.autoencoder import Autoencoder, build_autoencoder
from tokenizer.decoders import DECODERS
from tokenizer.encoders import ENCODERS
from tokenizer.quantizers import QUANTIZERS
from training.config import one_of


@dataclasses.dataclass(frozen=True)
class VQRAEConfig:
    kind: str = "vqrae"
    encoder: Any = one_of(ENCODERS, "foundation")
    quantizer: Any = one_of(QUANTIZERS, "simvq")
    decoder: Any = one_of(DECODERS, "vit")
    normalise: bool = True  # latents, by measured statistics

    def build(self, image_size: int, saved: Path | None = None) -> Autoencoder:
        """The autoencoder for square images; with `saved`, the folder of its weights, architecture only."""
        return build_autoencoder(self, image_size, saved)
