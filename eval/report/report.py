"""The report: report.json (every figure with its settings), report.md, and one self-contained
report.html."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.compare import table_of
from eval.generation import measure_generation
from eval.metrics.likelihood import measure_likelihood
from eval.pipeline import Pipeline
from eval.reconstruction import measure_reconstruction
from eval.record import Measurement, Record, dump_json, nameless, write_pages
from eval.report.markup import markdown
from eval.report.page import html_page
from eval.report.sections import SECTIONS, Section, curves_section
from eval.report.tables import (
    ARROWS,
    extractor_text,
    interval_text,
    seed_text,
    unique_figures,
    value_text,
)
from eval.token_records import measure_codebook
from priors.record import is_prior
from training.checkpoint import digest, weights_hash
from training.errors import UserError
from training.log import CLOCKS
from training.words import dump, undump

KEPT = ("rate", "rate_distortion")  # records that a report takes as they are
PAGE = 2  # what is shown, and how: pages of another number are written again
BARE_LOG_KEYS = ("step", *CLOCKS)


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the pipeline."""

    name: str
    config: str  # YAML
    curves: dict[str, list[tuple[int, float]]]  # (step, value) by log key

    @staticmethod
    def read(folder: Path) -> Stage:
        config = folder / "config.yaml"
        curves = {
            key: points for key, points in read_log(folder).items() if key not in BARE_LOG_KEYS
        }
        return Stage(folder.name, _without_folders(config) if config.is_file() else "", curves)


def _without_folders(config: Path) -> str:
    """A run's configuration, of absolute paths only the last part: a page is shared. As it is where
    it is damaged."""

    def shown(value: Any) -> Any:
        if isinstance(value, dict):
            return {key: shown(each) for key, each in value.items()}
        return (
            os.path.basename(value.rstrip("/"))
            if isinstance(value, str) and os.path.isabs(value)
            else value
        )

    try:
        return dump(shown(undump(config)))
    except ValueError:
        return config.read_text(errors="replace")


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by key of a run's log.jsonl, if there is one; lines that are damaged are passed
    over."""
    curves: dict[str, dict[int, float]] = {}
    log = folder / "log.jsonl"
    for line in log.read_bytes().splitlines() if log.is_file() else ():
        try:
            values = json.loads(line)
            step = int(values["step"])
            values = {
                key: float(value) for key, value in values.items() if isinstance(value, int | float)
            }
        except (ValueError, KeyError, TypeError, AttributeError, OverflowError, RecursionError):
            continue
        for key, value in values.items():
            if math.isfinite(value):
                curves.setdefault(key, {})[step] = value
    return {key: sorted(points.items()) for key, points in curves.items()}


def find_stages(root: Path, others: Iterable[Path] = ()) -> list[Stage]:
    """The training runs right below a pipeline's folder and those it was built on, the oldest
    first."""
    folders = {path.parent.resolve() for path in root.glob("*/log.jsonl")}
    folders |= {folder.resolve() for folder in others if (folder / "log.jsonl").is_file()}
    return [
        Stage.read(folder)
        for folder in sorted(folders, key=lambda f: (f / "log.jsonl").stat().st_mtime)
    ]


def collect_records(pipeline: Pipeline) -> list[Record]:
    """What a report shows of a pipeline: measured where need be; what takes long, only if it was
    measured already."""
    prior = pipeline.options.prior or pipeline.folder / "prior"
    if pipeline.options.prior and not is_prior(prior):
        raise UserError(
            f"--prior {prior}: holds no trained prior: name the run folder of one, or leave the option out"
        )
    records = [measure_reconstruction(pipeline), measure_codebook(pipeline)]
    generation, notes = measure_generation(pipeline), []
    subject = {
        "tokenizer_sha256": pipeline.tokenizer_hash,
        "samples_sha256": generation.settings["samples_sha256"],
        "data": records[0].settings["data"],
    }
    if is_prior(prior):
        subject["prior_sha256"] = weights_hash(prior)
        try:
            records.append(measure_likelihood(pipeline, prior))
        except UserError as error:
            notes.append(f"The prior's likelihood is left out: {error}.")
    current = nameless(subject)
    for kind in KEPT:
        record = Record.read(pipeline.report_folder, kind)
        if (
            record
            and nameless({key: record.settings.get(key, value) for key, value in subject.items()})
            == current
        ):
            records.append(record)
    generation = dataclasses.replace(generation, notes=[*generation.notes, *notes])
    return [*records, generation]


def write_report(
    folder: Path,
    title: str,
    records: Sequence[Record],
    stages: Sequence[Stage],
    class_names: Sequence[str],
) -> bool:
    """Write the three files and images/ into `folder`; False, and nothing written, when they are
    current."""
    current = digest(
        {
            "page": PAGE,
            "title": title,
            "records": [record.to_dict() for record in records],
            "stages": [dataclasses.asdict(stage) for stage in stages],
        }
    )
    names = ("report.json", "report.md", "report.html")
    if (
        all((folder / name).is_file() for name in names)
        and _hash_of(folder / "report.json") == current
    ):
        return False
    sections = [
        section for record in records for section in SECTIONS[record.kind](record, class_names)
    ]
    sections += [curves_section(stages)] if stages else []
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    figures = unique_figures(records)
    pictures = [picture for section in sections for picture in section.pictures]
    content = {
        "title": title,
        "hash": current,
        "notes": notes,
        "figures": [figure.to_dict() for figure in figures],
        "records": {
            record.kind: {"hash": record.hash, "settings": record.settings} for record in records
        },
        "environment": {record.kind: record.environment for record in records},
    }
    files = {f"images/{picture.name}": picture.file() for picture in pictures}
    files["report.md"] = _markdown(title, notes, figures, sections).encode()
    files["report.html"] = html_page(title, notes, figures, sections, records, stages).encode()
    write_pages(
        folder, files | {"report.json": dump_json(content)}
    )  # last: it says that the others are current
    return True


def _markdown(
    title: str, notes: list[str], figures: Sequence[Measurement], sections: Sequence[Section]
) -> str:
    lines = [f"# {markdown(title)}", "", *(f"> {markdown(note)}\n" for note in notes)]
    lines += [
        "| figure | value | 95 % | N | of | extractor | seed | settings |",
        "|---|---|---|---|---|---|---|---|",
    ]
    for figure in figures:
        name = f"{figure.name} {ARROWS[figure.higher_is_better]}".strip()
        cells = [
            name,
            value_text(figure),
            interval_text(figure),
            f"{figure.n:,}",
            figure.split,
            extractor_text(figure),
        ]
        cells = [*map(markdown, [*cells, seed_text(figure)]), f"`{figure.settings_hash[:8]}`"]
        lines.append(f"| {' | '.join(cells)} |")
    lines += ["", "Every figure with its full settings is in [report.json](report.json)."]
    for section in sections:
        lines += ["", f"## {section.title}", "", markdown(section.text)]
        lines += ["", *table_of(section.table.columns)] if section.table else []
        for picture in section.pictures:
            lines += [
                "",
                f"![{picture.name}](images/{picture.name})",
                "",
                markdown(picture.caption),
            ]
    return "\n".join(lines) + "\n"


def _hash_of(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
