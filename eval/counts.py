"""How many images each figure needs at least: with fewer it is left out, and a note says so."""

from __future__ import annotations

import dataclasses

# What a set has to have, whatever else is wrong with so few: below it the figure is undefined, or
# the same for all.
LEAST = {
    "a Fréchet distance": 2,  # a covariance
    "a distance at endless N": 20,  # a tenth of N as the lowest count, and 15 counts apart
    "a kernel distance": 4,  # two subsets of two
    # ten splits of two: of one image it is 1, whatever the image
    "a score of class probabilities": 20,
    "precision, recall, density and coverage": 6,  # five neighbours
    "CMMD": 2,
    "nearer to train than held-out images": 2,  # a variance
}


@dataclasses.dataclass
class Counts:
    """Images of each set that figures are of; what was asked for in vain becomes notes."""

    sets: dict[str, int]  # by what a note calls them
    lacking: dict[str, list[str]] = dataclasses.field(default_factory=dict)  # figures by set

    def suffice(self, figure: str, *of: str) -> bool:
        """Whether each of these sets has images enough for a figure of LEAST; what has not is
        noted."""
        few = [name for name in of if self.sets[name] < LEAST[figure]]
        for name in few:
            figures = self.lacking.setdefault(name, [])
            figures += [] if figure in figures else [figure]
        return not few

    @property
    def notes(self) -> list[str]:
        """A line for each set: N is too few for ..."""
        return [
            f"N = {self.sets[name]:,} ({name}) is too few for "
            + "; ".join(f"{figure} (at least {LEAST[figure]})" for figure in figures)
            + ": left out."
            for name, figures in self.lacking.items()
        ]
