"""What may be compared, and how it is laid out: runs and records side by side that differ only
where they may.

`python -m eval.compare A B` prints the figures of two records, JSON files or the folders that hold
them.
"""

from __future__ import annotations

import dataclasses
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from eval.record import Measurement, nameless
from eval.report.tables import ARROWS, interval_text, markdown_table, number, value_text
from training.command import Parser, run_command
from training.config import flat, to_dict
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Figures:
    """What a record, a report or a folder of records holds, by the figures' names without
    extractors' hashes."""

    path: Path
    measured: dict[str, Measurement]
    environments: dict[str, dict[str, Any]]  # by kind of record

    @staticmethod
    def read(path: Path) -> Figures:
        """Raises UserError when there is nothing to read, or it is damaged."""
        folder = path / "report" if (path / "report").is_dir() else path
        files = [folder / f"{kind}.json" for kind in KINDS] if path.is_dir() else [path]
        files = [file for file in files if file.is_file()]
        if not files:
            raise UserError(f"{path}: holds no record: measure it first (python -m eval.run)")
        measured: dict[str, Measurement] = {}
        environments: dict[str, dict[str, Any]] = {}
        for file in files:
            try:
                fields = json.loads(file.read_text())
                found = [
                    Measurement.from_dict(each)
                    for each in fields.get("measurements", fields.get("figures"))
                ]
                whole = (
                    {fields["kind"]: fields["environment"]}
                    if "kind" in fields
                    else fields["environment"]
                )
            except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
                raise UserError(
                    f"{file}: no record of eval.run, or damaged ({error}): measure again"
                ) from None
            for figure in found:
                measured.setdefault(_plain(figure.name), figure)
            environments |= whole
        return Figures(path, measured, environments)


# Records that a run's folder may hold; "probe" and those of several priors or protocols are
# compared by their files.
KINDS = ("reconstruction", "codebook", "rate", "rate_distortion", "likelihood", "generation")


def compare_records(first: Figures, second: Figures, allowed: Sequence[str] = ()) -> list[str]:
    """Lines of Markdown: each figure that both have, and the difference, second less first.

    Raises UserError when there is none, and when the settings of one differ in a field that is not
    `allowed`.
    """
    shared = [name for name in first.measured if name in second.measured]
    if not shared:
        raise UserError(f"{first.path} and {second.path} have no figure in common")
    pairs = [(first.measured[name], second.measured[name]) for name in shared]
    known = {field for pair in pairs for figure in pair for field in conditions(figure)}
    for field in allowed:
        if not any(_covers(field, each) for each in known):
            raise UserError(
                f"--allow-differences {field}: is not one of {', '.join(sorted(known))}"
            )
    for name, (ours, theirs) in zip(shared, pairs):
        own, other = conditions(ours), conditions(theirs)
        differing = [
            field
            for field in {**own, **other}
            if own.get(field, ABSENT) != other.get(field, ABSENT)
        ]
        differing = [
            field for field in differing if not any(_covers(each, field) for each in allowed)
        ]
        if differing:
            field = differing[0]
            also = f" (also {', '.join(differing[1:])})" if len(differing) > 1 else ""
            raise UserError(
                f"{first.path} and {second.path} do not compare: {name} has {field} {own.get(field, ABSENT)} and "
                f"{other.get(field, ABSENT)}{also}: measure both alike, or pass --allow-differences {field}"
            )
    columns: dict[str, list[str]] = {
        head: [] for head in ("figure", "A", "A, 95 %", "B", "B, 95 %", "B - A", "better")
    }
    for name, (ours, theirs) in zip(shared, pairs):
        difference = (
            theirs.value - ours.value if theirs.value != ours.value else 0.0
        )  # equal infinities
        cells = [
            f"{name} {ARROWS[ours.higher_is_better]}".strip(),
            value_text(ours),
            interval_text(ours),
        ]
        cells += [
            value_text(theirs),
            interval_text(theirs),
            number(difference),
            _better(ours, theirs),
        ]
        for column, cell in zip(columns.values(), cells):
            column.append(cell)
    lines = markdown_table(columns)
    for one, other in ((first, second), (second, first)):
        if alone := [name for name in one.measured if name not in other.measured]:
            lines.append(f"only in {one.path}: {', '.join(alone)}")
    return [*lines, *_environments(first, second)]


def conditions(figure: Measurement) -> dict[str, Any]:
    """All that two figures must share to be compared, by field; data sets by what they hold,
    wherever they lie."""
    return {
        "n": figure.n,
        "split": figure.split,
        "unit": figure.unit,
        **flat(nameless(figure.settings)),
    }


ABSENT = "nothing"


def _covers(allowed: str, field: str) -> bool:
    """ "data" allows data.source."""
    return field == allowed or field.startswith(f"{allowed}.")


def _plain(name: str) -> str:
    """Without hashes: FD[cnn@a1b2c3d4] of two extractors is one figure, of two settings."""
    return re.sub(r"@[0-9a-f]{8}", "", name)


def _better(ours: Measurement, theirs: Measurement) -> str:
    """Which one, where their intervals lie apart. They know nothing of images that both share: this
    errs on the side of silence."""
    if ours.higher_is_better is None or not ours.interval or not theirs.interval:
        return ""
    if ours.interval[0] <= theirs.interval[1] and theirs.interval[0] <= ours.interval[1]:
        return ""
    return "B" if (theirs.value > ours.value) == ours.higher_is_better else "A"


def _environments(first: Figures, second: Figures) -> list[str]:
    """What may move the last digits, and where it differs."""
    lines = []
    for kind in first.environments:
        one, other = (flat(each.environments.get(kind, {})) for each in (first, second))
        differing = [field for field in one if field in other and one[field] != other[field]]
        lines += [
            f"note: {kind} was measured with {field} {one[field]} and {other[field]}"
            for field in differing
        ]
    return lines


def check_alike(conditions: Mapping[Path, Mapping[str, str]], allowed: Sequence[str]) -> None:
    """`conditions` of each folder; raise UserError for the first that differs and is not allowed
    to."""
    (folder, first), *others = conditions.items()
    for field in allowed:
        if field not in first:
            raise UserError(f"--allow-differences {field}: is not one of {', '.join(first)}")
    for field, was in first.items():
        for other, own in others:
            if field not in allowed and was != own[field]:
                raise UserError(
                    f"{folder} and {other} differ in {field} ({was} and {own[field]}), so they do not compare: "
                    f"train them alike, or allow and show it with --allow-differences {field}"
                )


def own_settings(configs: Sequence[Any]) -> list[str]:
    """What each run's configuration says that not all others' say."""
    settings = [flat(to_dict(config)) for config in configs]
    return [
        ", ".join(
            f"`{key}={value}`"
            for key, value in config.items()
            if key not in ("name", "root")
            and any(key not in other or other[key] != value for other in settings)
        )
        or "none"
        for config in settings
    ]


def main() -> None:
    parser = Parser(
        prog="python -m eval.compare", description="The figures of B beside those of A."
    )
    for name in ("A", "B"):
        parser.add_argument(name, type=Path, help="a record or report (.json), or a run's folder")
    parser.add_argument(
        "--allow-differences",
        nargs="+",
        default=(),
        metavar="FIELD",
        help="settings that may differ, such as n",
    )
    arguments = parser.parse_args()
    pair = (Figures.read(path) for path in (arguments.A, arguments.B))
    print("\n".join(compare_records(*pair, arguments.allow_differences)))


if __name__ == "__main__":
    run_command(main)
