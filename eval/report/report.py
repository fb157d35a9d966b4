"""The report: report.json (every figure with its settings), report.md, and one self-contained
report.html."""

from __future__ import annotations

import dataclasses
import datetime
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.generation import measure_generation
from eval.metrics.likelihood import measure_likelihood
from eval.pipeline import Pipeline
from eval.reconstruction import measure_reconstruction
from eval.record import Measurement, Record, dump_json, nameless, write_pages
from eval.report.markup import markdown
from eval.report.meaning import warnings
from eval.report.page import html_page
from eval.report.sections import SECTIONS, Section, curves_section
from eval.report.stages import Stage
from eval.report.tables import (
    FIGURE_COLUMNS,
    FIGURE_NUMBERS,
    columns_of,
    figure_cells,
    markdown_table,
    number,
    unique_figures,
)
from eval.token_records import measure_codebook
from priors.record import is_prior
from training.checkpoint import digest, weights_hash
from training.errors import UserError

KEPT = ("rate", "rate_distortion")  # records that a report takes as they are
PAGE = 3  # what is shown, and how: pages of another number are written again


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
    whole = all((folder / name).is_file() for name in names)
    if whole and _hash_of(folder / "report.json") == current:
        return False
    sections = [
        section for record in records for section in SECTIONS[record.kind](record, class_names)
    ]
    sections += [curves_section(stages)] if stages else []
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    figures = unique_figures(records)
    about = about_lines(records, figures)
    content = {
        "title": title,
        "hash": current,
        "notes": notes,
        "warnings": warnings(figures),
        "figures": [figure.to_dict() for figure in figures],
        "records": {
            record.kind: {"hash": record.hash, "settings": record.settings} for record in records
        },
        "environment": {record.kind: record.environment for record in records},
    }
    pictures = [picture for section in sections for picture in section.pictures]
    files = {f"images/{picture.name}": picture.content for picture in pictures}
    files["report.md"] = _markdown(title, about, notes, figures, sections).encode()
    page = html_page(title, about, notes, figures, sections, records, stages)
    files["report.html"] = page.encode()
    files["report.json"] = dump_json(content)  # last: it says that the others are current
    write_pages(folder, files)
    return True


def about_lines(records: Sequence[Record], figures: Sequence[Measurement]) -> list[str]:
    """What stands below a report's title: the codes in a line, then the day, the commit and the
    machine."""
    named = {figure.name: figure for figure in figures}
    lines = [_codes_line(each.arrays, named) for each in records if each.kind == "codebook"]
    environment = records[0].environment if records else {}
    made = [f"{datetime.date.today()}", *_made_by(environment)]
    return [*lines, " · ".join(made)]


def _codes_line(arrays: Mapping[str, np.ndarray], figures: Mapping[str, Measurement]) -> str:
    """25 codes of 256 an image (5 × 5): 200.0 bits, 186.9 by how often each code comes."""
    levels = []
    for level in range(sum(name.startswith("histogram_") for name in arrays)):
        grid = arrays[f"position_entropy_{level}"].shape
        num_codes = len(arrays[f"histogram_{level}"])
        levels.append(f"{math.prod(grid)} codes of {num_codes:,} ({' × '.join(map(str, grid))})")
    bits = [
        f"{number(figures[name].value)} bits{how}"
        for name, how in (
            ("rate, fixed", ""),
            ("rate, unigram entropy", " by how often each comes"),
        )
        if name in figures
    ]
    return f"An image is {' + '.join(levels)}" + (f": {', '.join(bits)}." if bits else ".")


def _made_by(environment: Mapping[str, Any]) -> list[str]:
    commit, torch = environment.get("git_commit"), environment.get("packages", {}).get("torch")
    named = {"commit": commit and commit[:10] + commit[40:], "torch": torch}
    named["on"] = environment.get("device")
    return [f"{name} {value}" for name, value in named.items() if value]


def _markdown(
    title: str,
    about: Sequence[str],
    notes: Sequence[str],
    figures: Sequence[Measurement],
    sections: Sequence[Section],
) -> str:
    lines = [f"# {markdown(title)}", "", *(f"{markdown(line)}\n" for line in about)]
    lines += [f"> **{markdown(text)}**\n" for text in warnings(figures)]
    lines += [f"> {markdown(note)}\n" for note in notes]
    cells = [[*map(markdown, figure_cells(figure))] for figure in figures]
    columns = columns_of(FIGURE_COLUMNS, cells)
    columns["settings"] = [f"`{figure.settings_hash[:8]}`" for figure in figures]
    to_left = [name for name in columns if name not in FIGURE_NUMBERS]
    lines += markdown_table(columns, to_left)
    lines += ["", "Every figure with its full settings is in [report.json](report.json)."]
    for section in sections:
        lines += ["", f"## {section.title}", "", markdown(section.text)]
        lines += ["", *markdown_table(section.table.columns)] if section.table else []
        for picture in section.pictures:
            lines += ["", markdown(picture.heading)] if picture.heading else []
            lines += ["", f"![{picture.name}](images/{picture.name})"]
            lines += ["", markdown(picture.caption)] if picture.caption else []
    return "\n".join(lines) + "\n"


def _hash_of(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
