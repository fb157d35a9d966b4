"""What quantizers of several levels share: the table of what a level may be, one reduction over
ranks, averages."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from tokenizer.interface import QuantizerOutput
from tokenizer.quantizers.codebook import share
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig

LEVELS = {"vector": VectorConfig, "simvq": SimVQConfig}


def update_levels(levels: nn.ModuleList, step: int, taken: bool) -> None:
    """Update each level; what they gathered is summed over ranks at once."""
    if taken:
        share([level.statistics for level in levels])
    for level in levels:
        level.update(step, taken)


def mean_parts(outputs: Sequence[QuantizerOutput]) -> dict[str, Tensor]:
    """The named terms of several levels, averaged."""
    return {
        name: torch.stack([output.parts[name] for output in outputs]).mean()
        for name in outputs[0].parts
    }
