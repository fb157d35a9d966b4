"""What a tokenizer's log says about its health: collapse, dead codes, a lopsided game, numbers that
are none.

The limits are rules of thumb for where runs stop recovering by themselves.
"""

from __future__ import annotations

import dataclasses
import math
from collections import defaultdict, deque
from collections.abc import Callable, Iterator

REVIVE = (
    "start it from data (quantizer.init=kmeans), restart dead codes (quantizer.restart=data) or "
    "raise its entropy "
    "term (quantizer.entropy), as the kind allows"
)


@dataclasses.dataclass(frozen=True)
class Thresholds:
    readings: int = 5  # in a row, before what noise could also do is named
    perplexity: float = 0.1  # of num_codes, when it does not rise either
    perplexity_drop: float = 0.5  # of its best so far
    usage: float = 0.5  # when it does not rise either
    rise: float = 1.02  # last by first of the readings
    strong: float = 0.95  # share of logits on the right side
    weak: float = 0.55
    pinned: float = 0.99  # of adaptive_cap
    psnr_drop: float = 1.0  # dB, from its best so far


class Health:
    """Reads figures as they are logged and says what is wrong, once, until it clears and comes
    back.

    What it says follows from the readings alone: fed the kept lines of a log first, it goes on as
    if never stopped.
    """

    def __init__(
        self,
        num_codes: tuple[int, ...],
        adaptive_cap: float | None = None,
        thresholds: Thresholds = Thresholds(),
    ) -> None:
        """`num_codes` per level; `adaptive_cap`: the objective's, where the adaptive weight is to
        be watched."""
        self.num_codes = sum(num_codes) / len(num_codes)  # perplexity is a mean over levels, too
        self.adaptive_cap, self.thresholds = adaptive_cap, thresholds
        self.recent: dict[str, deque[float]] = defaultdict(
            lambda: deque(maxlen=thresholds.readings)
        )
        self.best: dict[str, float] = defaultdict(lambda: -math.inf)
        self.said: set[str] = set()

    def read(self, step: int, figures: dict[str, float]) -> list[str]:
        """New warnings, one line each: the figure, its value, the limit, and which settings to
        change.

        `figures` by the names of log.jsonl; a trouble whose figures are not among them is not
        judged this time.
        """
        for name, value in figures.items():
            self.recent[name].append(value)
            if math.isfinite(value):
                self.best[name] = max(self.best[name], value)
        warnings = []
        for trouble, warning in self._judge(figures):
            if warning is None:
                self.said.discard(trouble)
            elif trouble not in self.said:
                self.said.add(trouble)
                warnings.append(warning)
        return warnings

    def _judge(self, figures: dict[str, float]) -> Iterator[tuple[str, str | None]]:
        """(trouble, what to say of it or None where all is well) for all that these figures allow
        to judge."""
        if any(not name.startswith("held_out.") for name in figures):
            yield "non-finite", self._non_finite(figures)
        for name in figures:
            if name.endswith(".skipped"):
                yield name, self._skipped(name)
            if name.startswith("autoencoder.") and name.endswith(
                "usage"
            ):  # the mean's, and levels' that log theirs
                yield name, self._dead_codes(name)
        if "autoencoder.perplexity" in figures:
            yield "collapse", self._collapse("autoencoder.perplexity")
            yield "drift", self._drift("autoencoder.perplexity")
        if "discriminator.accuracy" in figures and "autoencoder.adversarial" in figures:
            yield (
                "strong",
                self._strong("discriminator.accuracy", self.recent["autoencoder.adversarial"]),
            )
            yield (
                "weak",
                self._weak("discriminator.accuracy", self.recent["autoencoder.adversarial"]),
            )
        if "autoencoder.adaptive_weight" in figures and self.adaptive_cap is not None:
            yield "pinned", self._pinned("autoencoder.adaptive_weight", self.adaptive_cap)
        if "held_out.psnr" in figures:
            yield "psnr", self._worse("held_out.psnr")

    def _non_finite(self, figures: dict[str, float]) -> str | None:
        wrong = [name for name, value in figures.items() if not math.isfinite(value)]
        if not wrong:
            return None
        others = f" and {len(wrong) - 1} more are" if len(wrong) > 1 else " is"
        return (
            f"{wrong[0]}={figures[wrong[0]]}{others} not finite: lower optimizer.lr or loop.clip, "
            "lengthen "
            "optimizer.warmup_steps, or set loop.precision=fp32"
        )

    def _skipped(self, name: str) -> str | None:
        if not self.recent[name][-1] > 0:
            return None
        optimizer = "discriminator_optimizer" if name.startswith("discriminator.") else "optimizer"
        return (
            f"{name}={self.recent[name][-1]:.2g}, above 0: that share of the steps since the last "
            "reading had a "
            f"gradient that is not finite and moved nothing: lower {optimizer}.lr, lengthen "
            f"{optimizer}.warmup_steps, "
            "or set loop.precision=fp32"
        )

    def _collapse(self, name: str) -> str | None:
        limit = self.thresholds.perplexity * self.num_codes
        if not self._all(name, lambda value: value < limit) or self._rises(name):
            return None
        return (
            f"{name}={self.recent[name][-1]:.3g} stays below {limit:.3g} "
            f"({self.thresholds.perplexity:.0%} of "
            f"{self.num_codes:.0f} codes): the codebook collapses: set model.normalise=true, "
            f"{REVIVE}, or take another "
            "quantizer.kind"
        )

    def _drift(self, name: str) -> str | None:
        limit = self.thresholds.perplexity_drop * self.best[name]
        if not self._all(name, lambda value: value < limit):
            return None
        return (
            f"{name}={self.recent[name][-1]:.3g} fell below {limit:.3g} "
            f"({self.thresholds.perplexity_drop:.0%} of its "
            "best): the encoder leaves the codebook behind: lower optimizer.lr (of the encoder "
            "alone: "
            f"optimizer.rates), or {REVIVE}"
        )

    def _dead_codes(self, name: str) -> str | None:
        limit = self.thresholds.usage
        if not self._all(name, lambda value: value < limit) or self._rises(name):
            return None
        return (
            f"{name}={self.recent[name][-1]:.1%} of the codes stays below {limit:.0%}: the rest "
            f"are dead: {REVIVE}, or "
            "take fewer (quantizer.num_codes)"
        )

    def _strong(self, name: str, fooling: deque[float]) -> str | None:
        limit = self.thresholds.strong
        grows = self._full(fooling) and fooling[-1] > fooling[0]
        if not self._all(name, lambda value: value > limit) or not grows:
            return None
        return (
            f"{name}={self.recent[name][-1]:.1%} stays above {limit:.0%} while "
            "autoencoder.adversarial grows from "
            f"{fooling[0]:.3g} to {fooling[-1]:.3g}: the discriminator is too strong: lower "
            "discriminator_optimizer.lr, or set objective.augment=1 or objective.lecam=0.001"
        )

    def _weak(self, name: str, fooling: deque[float]) -> str | None:
        limit = self.thresholds.weak
        if not self._all(name, lambda value: value < limit) or not self._full(fooling):
            return None
        return (
            f"{name}={self.recent[name][-1]:.1%} stays below {limit:.0%}: it cannot tell "
            "reconstructions from images, "
            "and its gradient is noise: raise discriminator_optimizer.lr, lower objective.augment "
            "or objective.lecam, "
            "or let it start earlier (objective.discriminator_start_step)"
        )

    def _pinned(self, name: str, cap: float) -> str | None:
        if not self._all(name, lambda value: value >= self.thresholds.pinned * cap):
            return None
        return (
            f"{name}={self.recent[name][-1]:.3g} stays at its cap of {cap:.3g}: it balances "
            "nothing: lower "
            "objective.adversarial if reconstructions suffer, raise objective.adaptive_cap if "
            "they stay blurred, or "
            "set objective.adaptive=false"
        )

    def _worse(self, name: str) -> str | None:
        value, best, drop = self.recent[name][-1], self.best[name], self.thresholds.psnr_drop
        if not value < best - drop:
            return None
        advice = "lower optimizer.lr, or train for fewer loop.steps"
        if "autoencoder.adversarial" in self.recent:
            advice = (
                "the adversarial term takes over: lower objective.adversarial or "
                "objective.adaptive_cap, lengthen "
                "objective.adversarial_ramp_steps, or warm the discriminator up "
                "(objective.discriminator_start_step)"
            )
        return (
            f"{name}={value:.2f} dB is more than {drop:.3g} dB below its best, {best:.2f} dB: "
            f"{advice}"
        )

    def _all(self, name: str, bad: Callable[[float], bool]) -> bool:
        """Whether the last readings were all bad; fewer than enough say nothing."""
        return self._full(self.recent[name]) and all(map(bad, self.recent[name]))

    def _full(self, recent: deque[float]) -> bool:
        return len(recent) == self.thresholds.readings

    def _rises(self, name: str) -> bool:
        return self.recent[name][-1] > self.thresholds.rise * self.recent[name][0]
