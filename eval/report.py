"""The report: report.json (every figure with its settings), report.md, and one self-contained report.html."""

from __future__ import annotations

import dataclasses
import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from eval.page import html_page
from eval.pictures import ERROR_TOP, Picture, bars, codebook_plot, curves_plot, pair_strip, png
from eval.record import Measurement, Record, dump_json
from eval.tables import ARROWS, extractor_text, interval_text, seed_text, unique_figures, value_text
from training.checkpoint import digest, replace_file

BARE_LOG_KEYS = ("step", "seconds", "images_per_second")


@dataclasses.dataclass(frozen=True)
class Stage:
    """One training run of the pipeline."""

    name: str
    config: str  # YAML
    curves: dict[str, list[tuple[int, float]]]  # (step, value) by log key

    @staticmethod
    def read(folder: Path) -> Stage:
        config = folder / "config.yaml"
        curves = {key: points for key, points in read_log(folder).items() if key not in BARE_LOG_KEYS}
        return Stage(folder.name, config.read_text() if config.is_file() else "", curves)


def read_log(folder: Path) -> dict[str, list[tuple[int, float]]]:
    """(step, value) by key of a run's log.jsonl, if there is one; lines that a crash cut short are passed over."""
    curves: dict[str, dict[int, float]] = {}
    log = folder / "log.jsonl"
    for line in log.read_text().splitlines() if log.is_file() else ():
        try:
            values = json.loads(line)
            step = int(values["step"])
        except (ValueError, KeyError, TypeError):
            continue
        for key, value in values.items():
            if isinstance(value, int | float) and math.isfinite(value):
                curves.setdefault(key, {})[step] = float(value)
    return {key: sorted(points.items()) for key, points in curves.items()}


def find_stages(root: Path, others: Iterable[Path] = ()) -> list[Stage]:
    """The training runs right below a pipeline's folder and those it was built on, the oldest first."""
    folders = {path.parent.resolve() for path in root.glob("*/log.jsonl")}
    folders |= {folder.resolve() for folder in others if (folder / "log.jsonl").is_file()}
    return [Stage.read(folder) for folder in sorted(folders, key=lambda f: (f / "log.jsonl").stat().st_mtime)]


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str
    pictures: list[Picture]


def write_report(
    folder: Path, title: str, records: Sequence[Record], stages: Sequence[Stage], class_names: Sequence[str]
) -> bool:
    """Write the three files and images/ into `folder`; False, and nothing written, when they are current."""
    current = digest(
        {
            "title": title,
            "records": [record.to_dict() for record in records],
            "stages": [dataclasses.asdict(stage) for stage in stages],
        }
    )
    names = ("report.json", "report.md", "report.html")
    if all((folder / name).is_file() for name in names) and _hash_of(folder / "report.json") == current:
        return False
    sections = [section for record in records for section in SECTIONS[record.kind](record, class_names)]
    sections += [_curves_section(stages)] if stages else []
    notes = list(dict.fromkeys(note for record in records for note in record.notes))
    figures = unique_figures(records)
    for picture in (picture for section in sections for picture in section.pictures):
        replace_file(folder / "images" / picture.name, picture.file())
    replace_file(folder / "report.md", _markdown(title, notes, figures, sections).encode())
    replace_file(folder / "report.html", html_page(title, notes, figures, sections, records, stages).encode())
    content = {
        "title": title,
        "hash": current,
        "notes": notes,
        "figures": [figure.to_dict() for figure in figures],
        "records": {record.kind: {"hash": record.hash, "settings": record.settings} for record in records},
        "environment": {record.kind: record.environment for record in records},
    }
    replace_file(folder / "report.json", dump_json(content))  # last: it says that the others are current
    return True


# Sections of the records


def _reconstruction_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    arrays = record.arrays
    pictures = [
        Picture(
            "reconstructions.png",
            f"Originals, reconstructions, and absolute error (white is {ERROR_TOP} levels of 255 or more); "
            "images that lie evenly in the split.",
            pair_strip(arrays["shown_originals"], arrays["shown_images"]),
        )
    ]
    by = "LPIPS" if "best_lpips" in arrays else "PSNR"
    for which in ("best", "worst"):
        values = " ".join(f"{value:.1f}" for value in arrays[f"{which}_psnr"])
        caption = f"The {which} by {by}, {which} first. PSNR: {values} dB."
        strip = pair_strip(arrays[f"{which}_originals"], arrays[f"{which}_images"])
        pictures.append(Picture(f"{which}.png", caption, strip))
    histograms = [arrays[f"histogram_{i}"] for i in range(sum(n.startswith("histogram_") for n in arrays))]
    plots = []
    for level, counts in enumerate(histograms, start=1):
        suffix = f"-{level}" if len(histograms) > 1 else ""
        caption = f"Use of the {len(counts):,} codes, most used first" + (f", level {level}." if suffix else ".")
        plots.append(Picture(f"codebook{suffix}.svg", caption, codebook_plot(counts)))
    return [
        Section("Reconstructions", "Held-out images, never seen in training.", pictures),
        Section("Codebook", "Counted over the whole held-out split; the line marks even use.", plots),
    ]


def _generation_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    arrays = record.arrays
    images, labels = arrays["samples"], arrays.get("sample_labels")
    if labels is None:
        grid, caption = png(images, 12), "Samples in order, not chosen."
    else:
        shown = list(dict.fromkeys(labels.tolist()))
        columns = max(int((labels == label).sum()) for label in shown)
        blank = np.full((columns, *images.shape[1:]), 255, np.uint8)
        rows = [np.concatenate([images[labels == label], blank])[:columns] for label in shown]
        names = [class_names[label] if label < len(class_names) else "unconditional" for label in shown]
        grid, caption = (
            png(np.concatenate(rows), columns),
            f"One class per row: {', '.join(names)}. Not chosen.",
        )
    found = [Section("Samples", "Drawn from the prior and decoded.", [Picture("samples.png", caption, grid)])]
    if "agreement_total" in arrays:
        total, right = arrays["agreement_total"], arrays["agreement_right"]
        shares = [(class_names[i], 100 * right[i] / total[i]) for i in np.flatnonzero(total)[:50]]
        picture = Picture(
            "agreement.svg", "Share of each class's samples that the classifier recognises.", bars(shares)
        )
        found.append(Section("Class agreement", "By the in-domain classifier, trained on real images.", [picture]))
    return found


SECTIONS = {"reconstruction": _reconstruction_sections, "generation": _generation_sections}


def _curves_section(stages: Sequence[Stage]) -> Section:
    pictures = []
    for number, stage in enumerate(stages, start=1):
        if stage.curves:
            pictures.append(Picture(f"training-{number}-{stage.name}.svg", stage.name, curves_plot(stage.curves)))
    return Section("Training", "Every run's log over steps, oldest run first.", pictures)


def _markdown(title: str, notes: list[str], figures: Sequence[Measurement], sections: Sequence[Section]) -> str:
    lines = [f"# {title}", "", *(f"> {note}\n" for note in notes)]
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
        cells += [seed_text(figure), f"`{figure.settings_hash[:8]}`"]
        lines.append("| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |")
    lines += ["", "Every figure with its full settings is in [report.json](report.json)."]
    for section in sections:
        lines += ["", f"## {section.title}", "", section.text]
        for picture in section.pictures:
            lines += ["", f"![{picture.name}](images/{picture.name})", "", picture.caption]
    return "\n".join(lines) + "\n"


def _hash_of(path: Path) -> str | None:
    try:
        return json.loads(path.read_text())["hash"]
    except (OSError, ValueError, KeyError, TypeError):
        return None
