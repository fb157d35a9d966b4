"""What a prior is: a distribution over code sequences given a class label."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Callable
from typing import Protocol

from torch import Tensor

from tokenizer.interface import CodeLayout
from training.errors import UserError
from training.loop import Loss

MOST_GUIDANCE, MOST_STEPS = (
    1_000,
    100_000,
)  # beyond, numbers overflow, and a step takes memory of its own
KINDS = {
    "float": ((int, float), "a number"),
    "int": (int, "a whole number"),
    "str": (str, "a text"),
}


@dataclasses.dataclass(frozen=True)
class SampleOptions:
    """How to sample. Guidance: logits = u + s (c - u), so s = 1 is none (Ho & Salimans 2022,
    arXiv:2207.12598)."""

    guidance: float = 1.0  # s, of the last step; of one step where there is but one
    guidance_schedule: str = (
        "constant"  # or "linear", "power_cosine" (Yu et al. 2024, arXiv:2411.00776): from 1 to s
    )
    guidance_power: float = 2.75  # of power_cosine: the larger, the later
    temperature: float = (
        1.0  # divides the guided logits; 0 takes the likeliest code at each draw (greedy)
    )
    top_k: int = 0  # 0 keeps all
    top_p: float = 1.0  # 1 keeps all
    steps: int = 0  # of iterative samplers; 0 takes the prior's default
    sampler: str = ""  # one of the prior's; empty takes its default
    seed: int = 0

    def __post_init__(self) -> None:
        for field in dataclasses.fields(self):
            kinds, called = KINDS[field.type]
            value = getattr(self, field.name)
            if not isinstance(value, kinds) or isinstance(value, bool):
                raise UserError(f"{_flag(field.name)} is {value!r}: it must be {called}")
        ranges = {
            "guidance": (
                0 <= self.guidance <= MOST_GUIDANCE,
                f"a number from 0 to {MOST_GUIDANCE:,}",
            ),
            "guidance_schedule": (
                self.guidance_schedule in GUIDANCE,
                "one of " + ", ".join(GUIDANCE),
            ),
            "guidance_power": (0 < self.guidance_power < float("inf"), "a number above 0"),
            "temperature": (
                0 <= self.temperature < float("inf"),
                "a number from 0, which is greedy",
            ),
            "top_k": (self.top_k >= 0, "a count, or 0 for all"),
            "top_p": (0 < self.top_p <= 1, "a share in (0, 1]"),
            "steps": (
                0 <= self.steps <= MOST_STEPS,
                f"a count to {MOST_STEPS:,}, or 0 for the prior's own",
            ),
            "seed": (0 <= self.seed < 2**63, "from 0 to 2^63 - 1"),
        }
        for name, (holds, expected) in ranges.items():
            if not holds:
                raise UserError(f"{_flag(name)} is {getattr(self, name)}: it must be {expected}")

    def guidance_at(self, progress: float) -> float:
        """s of the step after which the share `progress` in (0, 1] of the sampling is done: (k + 1)
        / N of step k."""
        share = GUIDANCE[self.guidance_schedule](progress, self.guidance_power)
        return share * self.guidance + (1 - share)  # the last is s to the last bit


def _flag(name: str) -> str:
    return name.replace("_", "-")


# progress and power -> how much of s - 1 applies
GUIDANCE: dict[str, Callable[[float, float], float]] = {
    "constant": lambda progress, power: 1.0,
    "linear": lambda progress, power: progress,
    "power_cosine": lambda progress, power: (1 - math.cos(math.pi * progress**power)) / 2,
}


@dataclasses.dataclass
class Likelihood:
    """Negative log-likelihood per image, in nats."""

    nats: Tensor  # (B,) float64
    kind: str  # "exact", "bound", or "none" where the loss is no likelihood


class Prior(Protocol):
    """The unconditional label is `num_classes`; it also serves classifier-free guidance.

    `uniform` (B, N + 2) in [0, 1) is all that a loss draws for its samples: column 0 drops the
    label, column 1 is the time, the rest belong to the positions. Without it, torch's global
    generator draws it. `sample_ids` (B,) int64 seed the samples: sample i depends on options.seed,
    its id and its label only. `known` (B, N) holds codes to keep and -1 where codes are to be
    sampled. `given` (B, M) are codes of other levels, known completely, where the prior was built
    on such a layout.
    """

    layout: CodeLayout
    num_classes: int

    def loss(
        self,
        codes: Tensor,
        labels: Tensor,
        uniform: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Loss: ...

    def nll(
        self, codes: Tensor, labels: Tensor, given: Tensor | None = None
    ) -> Likelihood: ...  # (B, N), (B,) int64

    def sample(
        self,
        labels: Tensor,
        options: SampleOptions,
        sample_ids: Tensor,
        known: Tensor | None = None,
        given: Tensor | None = None,
    ) -> Tensor: ...  # (B, N) int64
