"""Items of a split that cannot be read: counted and told to people by one process, whichever
process meets them."""

from __future__ import annotations

import dataclasses
import warnings

from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Findings:
    """What one process has read for another since it last told it."""

    reads: int
    unreadable: list[tuple[int, str]]  # (place within the split, "item: reason")


class Skipped:
    """Of one split. A process that reads ahead for another (`tell_another`) judges nothing and
    warns of nothing: what it found is added up where it is read for (`drain`, `merge`), so that any
    number of processes say what one says.
    """

    def __init__(
        self, source: str, split: str, listed: int, max_bad: float, fewest_reads: int
    ) -> None:
        """`listed`: items of the split; `max_bad`: the share of bad ones that is borne, of
        `fewest_reads` or more."""
        self.source, self.split, self.listed = source, split, listed
        self.max_bad, self.fewest_reads = max_bad, fewest_reads
        self.lines: list[str] = []  # "item: reason"
        self.reads = 0  # of items, where they are decoded as they are read
        self._places: set[int] = set()
        self._untold: list[tuple[int, str]] | None = (
            None  # for another process; None: this one tells people
        )

    def __contains__(self, place: int) -> bool:
        """Whether the item at this place is known to be unreadable."""
        return place in self._places

    def add(self, place: int, line: str) -> None:
        """An item that could not be read. Raises UserError where there are too many."""
        if place in self._places:
            return
        self._places.add(place)
        if self._untold is not None:
            self._untold.append((place, line))
            return
        self.lines.append(line)
        count = len(self._places)
        if count.bit_count() == 1:  # 1, 2, 4, ...: a line each, not one per image
            warnings.warn(f"{self.source}: skipped {first_of(self.lines)}", stacklevel=3)
        self.judge(count, min(self.listed, max(self.reads, self.fewest_reads)))

    def judge(self, count: int, among: int) -> None:
        """Refuse when `count` unusable items are too many of `among`, or all are unusable."""
        if count > self.max_bad * among or len(self.lines) == self.listed:
            raise UserError(
                f"{self.source}: too many of its {among} {self.split} images cannot be used: "
                f"{first_of(self.lines)}; mend or remove them, or raise data.max_bad={self.max_bad}"
            )

    def tell_another(self) -> None:
        """From now on this process reads for another."""
        if self._untold is None:
            self.reads, self._untold = 0, []

    def drain(self) -> Findings:
        """What was found since the last call, for `merge` in the process that this one reads
        for."""
        findings = Findings(self.reads, self._untold or [])
        self.reads, self._untold = 0, []
        return findings

    def merge(self, findings: Findings) -> None:
        """Count what another process found, as `add` does."""
        self.reads += findings.reads
        for place, line in findings.unreadable:
            self.add(place, line)


def first_of(lines: list[str], count: int = 3) -> str:
    """How many there are, and the first of them."""
    more = f" and {len(lines) - count} more" if len(lines) > count else ""
    return f"{len(lines)} ({'; '.join(lines[:count])}{more})"
