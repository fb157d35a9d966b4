"""AdamW (Loshchilov & Hutter 2019, arXiv:1711.05101) with warmup and a cosine or constant
schedule."""

from __future__ import annotations

import dataclasses
import math

import torch
from torch import nn

from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class OptimizerConfig:
    lr: float = 3e-4
    betas: tuple[float, float] = (0.9, 0.99)
    weight_decay: float = 0.0
    warmup_steps: int = 100
    schedule: str = "cosine"  # or "constant"
    final_lr_ratio: float = 0.1  # where the cosine ends, as a share of lr
    rates: dict[str, float] = dataclasses.field(default_factory=dict)  # lr by parameter-name prefix

    def __post_init__(self) -> None:
        if self.schedule not in SCHEDULES:
            raise ValueError(
                f"optimizer.schedule={self.schedule!r} is not one of {', '.join(SCHEDULES)}"
            )
        for prefix, rate in self.rates.items():
            if not isinstance(
                rate, int | float
            ):  # what `optimizer.rates.a.b=1e-4` on the command line makes
                raise ValueError(
                    f"optimizer.rates.{prefix}={rate!r} is no number: write dotted prefixes in the "
                    "file"
                )

    def build(self, module: nn.Module, *, fused: bool = False) -> torch.optim.AdamW:
        """An optimizer over the module's trainable parameters; decay spares vectors and scalars.

        `fused`: one kernel for many parameters, which heeds the optimizer's `found_inf`. Its
        roundings are its own. Raises UserError for a prefix in `rates` that names no trainable
        parameter.
        """
        groups: dict[tuple[float, float], list[nn.Parameter]] = {}
        unused = set(self.rates)
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                prefix = max((p for p in self.rates if name.startswith(p)), key=len, default=None)
                unused.discard(prefix)
                rate = self.lr if prefix is None else self.rates[prefix]
                decay = self.weight_decay if parameter.ndim >= 2 else 0.0
                groups.setdefault((rate, decay), []).append(parameter)
        if unused:
            raise UserError(
                f"optimizer.rates: {sorted(unused)[0]} begins the name of no trainable parameter"
            )
        return torch.optim.AdamW(
            [
                {"params": group, "lr": rate, "base_lr": rate, "weight_decay": decay}
                for (rate, decay), group in groups.items()
            ],
            betas=self.betas,
            fused=fused or None,
        )

    def factor(self, step: int, steps: int) -> float:
        """What multiplies every learning rate at a step of `steps`."""
        if step < self.warmup_steps:
            return (step + 1) / self.warmup_steps
        progress = (step - self.warmup_steps) / max(1, steps - self.warmup_steps)
        return SCHEDULES[self.schedule](min(progress, 1.0), self.final_lr_ratio)


def _cosine(progress: float, final: float) -> float:
    return final + (1 - final) * 0.5 * (1 + math.cos(math.pi * progress))


def _constant(progress: float, final: float) -> float:
    return 1.0


SCHEDULES = {"cosine": _cosine, "constant": _constant}
