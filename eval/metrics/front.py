"""The Pareto front of points that cost and lose something."""

from __future__ import annotations

from collections.abc import Sequence


def pareto(points: Sequence[tuple[float, float]]) -> list[int]:
    """Places of those (cost, loss) that no other beats in one without losing in the other, the
    cheapest first."""
    front: list[int] = []
    for index in sorted(range(len(points)), key=lambda each: points[each]):
        if not front or points[index][1] < points[front[-1]][1]:
            front.append(index)
    return front
