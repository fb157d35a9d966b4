"""The configuration of a prior's run."""

from __future__ import annotations

import dataclasses
from typing import Any

from priors.families import PRIORS
from priors.interface import SampleOptions
from training.config import one_of
from training.loop import LoopConfig
from training.optim import OptimizerConfig


@dataclasses.dataclass(frozen=True)
class PriorRun:
    name: str = "prior"
    root: str = "runs"
    seed: int = 0
    tokens: str = "${root}/tokens"  # a token cache
    start_from: str | None = None  # a finished prior whose weights to begin with
    prior: Any = one_of(PRIORS, "autoregressive")
    sampling: SampleOptions = dataclasses.field(
        default_factory=SampleOptions
    )  # where generation is asked for no other
    loop: LoopConfig = dataclasses.field(default_factory=LoopConfig)
    optimizer: OptimizerConfig = dataclasses.field(default_factory=OptimizerConfig)

    def __post_init__(self) -> None:
        if self.tokens == "${root}/tokens":  # made in Python, where nothing resolves it
            object.__setattr__(self, "tokens", f"{self.root}/tokens")
