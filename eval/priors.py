"""Priors side by side: all runs in a pipeline's folder that learned its tokens, in one table, a
plot and a grid."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from eval.compare import check_alike, own_settings
from eval.generation import measure_generation
from eval.metrics.likelihood import measure_likelihood
from eval.pipeline import Options, Pipeline
from eval.record import Measurement, Record, dump_json, write_pages
from eval.report.pictures import Picture, labelled_grid
from eval.report.plots import named_points
from eval.report.tables import markdown_table, number
from eval.sample_facts import read_cost
from priors.record import is_prior, read_record
from priors.run import PriorRun
from training import config, distributed
from training.checkpoint import weights_path
from training.config import to_dict
from training.errors import UserError

NAME = "priors"
PER_CLASS = 2  # samples of each class in the grid
SHOWN = 20


@dataclasses.dataclass(frozen=True)
class Row:
    """A prior's run with its figures."""

    folder: Path
    config: PriorRun
    parameters: int
    likelihood: Record
    generation: Record
    facts: dict[str, Any]  # of samples.json

    @staticmethod
    def measure(pipeline: Pipeline, folder: Path) -> Row:
        likelihood = measure_likelihood(pipeline, folder, f"likelihood-{folder.name}")
        generation = measure_generation(pipeline, folder / "samples", f"generation-{folder.name}")
        facts = read_cost(folder / "samples")
        return Row(folder, load_config(folder), _parameters(folder), likelihood, generation, facts)

    @property
    def name(self) -> str:
        return self.folder.name

    @property
    def figures(self) -> dict[str, Measurement]:
        return {
            m.name: m for record in (self.likelihood, self.generation) for m in record.measurements
        }

    def figure(self, start: str, end: str = "") -> Measurement | None:
        """The figure of an extractor whose name begins and ends so."""
        found = [
            m for name, m in self.figures.items() if name.startswith(start) and name.endswith(end)
        ]
        return found[0] if found else None

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "parameters": self.parameters,
            "seconds_per_image": self.facts["seconds_per_image"],
            "device": self.facts["device"],
            "figures": [figure.to_dict() for figure in self.figures.values()],
            "config": to_dict(self.config),
        }


def compare_priors(options: Options) -> None:
    """Write FOLDER/priors.md, priors.json and images/ over all priors in a pipeline's folder that
    were sampled.

    What was not measured yet is measured. Raises UserError when there is none, and when they were
    not trained or sampled alike, naming the first setting that differs and is not allowed to.
    """
    folders = [
        path.parent for path in sorted(options.run.glob("*/config.yaml")) if is_prior(path.parent)
    ]
    folders = [folder for folder in folders if (folder / "samples" / "samples.json").is_file()]
    if not folders:
        raise UserError(
            f"{options.run}: no folder in it is a prior's run with samples/ in it: make compare-priors"
        )
    check_alike({folder: conditions_of(folder) for folder in folders}, options.allow_differences)
    pipeline = Pipeline(options)
    rows = sorted((Row.measure(pipeline, folder) for folder in folders), key=_distance)
    if not distributed.is_main():
        return
    pictures = draw(rows)
    notes = list(dict.fromkeys(note for row in rows for note in row.generation.notes))
    table = markdown_table(columns_of(rows))
    files = {f"images/{picture.name}": picture.content for picture in pictures}
    files[f"{NAME}.json"] = dump_json({"notes": notes, "runs": [row.to_dict() for row in rows]})
    files[f"{NAME}.md"] = markdown(rows, table, notes, pictures).encode()
    write_pages(options.run, files)
    print("\n".join([*notes, *table, f"{options.run / NAME}.md: written"]), flush=True)


def conditions_of(folder: Path) -> dict[str, str]:
    """What priors have to share before their figures compare."""
    own, about = load_config(folder), read_record(folder)
    made = read_cost(folder / "samples")["made_from"]
    return {
        "tokens": about.tokens_sha256[:8],
        "loop.steps": f"{own.loop.steps:,}",
        "loop.batch_size": str(own.loop.batch_size),
        "seed": str(own.seed),
        "samples": f"{made['num']:,}",
        "samples.seed": str(made["options"]["seed"]),
    }


def load_config(folder: Path) -> PriorRun:
    return config.load(PriorRun, folder / "config.yaml")


def columns_of(rows: Sequence[Row]) -> dict[str, list[str]]:
    """Head -> a cell for each row."""

    def cells(start: str, end: str = "") -> list[str]:
        return [_cell(row.figure(start, end)) for row in rows]

    return {
        "prior": [row.name for row in rows],
        "parameters, M": [f"{row.parameters / 1e6:.2f}" for row in rows],
        "nats per token ↓": [_likelihood(row) for row in rows],
        "FD to held-out ↓": cells("FD", " to held-out"),
        "precision ↑": cells("precision", "]"),
        "recall ↑": cells("recall", "]"),
        "class agreement, % ↑": cells("class agreement"),
        "guidance": [number(row.facts["made_from"]["options"]["guidance"]) for row in rows],
        "s per image ↓": [number(row.facts["seconds_per_image"]) for row in rows],
    }


def markdown(
    rows: Sequence[Row], table: Sequence[str], notes: Sequence[str], pictures: Sequence[Picture]
) -> str:
    common = ", ".join(f"{field} {value}" for field, value in conditions_of(rows[0].folder).items())
    one = rows[0]
    beside = [
        f"{text} {_cell(figure)}"
        for text, figure in (
            ("the tokenizer's own reconstructions have a distance of", one.figure("rFD")),
            ("real train to real held-out images", one.figure("FD", " of real images")),
            (
                "the judge recognises of real held-out images, in percent,",
                one.figure("classifier accuracy"),
            ),
        )
        if figure
    ]
    lines = [
        "# Priors compared",
        "",
        f"Trained alike ({common}) on the same tokens. For scale: {'; '.join(beside)}. Likelihoods are over "
        f"{one.likelihood.settings['n']:,} held-out images, exact or an upper bound, as marked.",
        "",
        *(f"> {note}\n" for note in notes),
        *table,
        "",
        f"Every figure with its settings is in [{NAME}.json]({NAME}.json).",
    ]
    for picture in pictures:
        lines += ["", f"![{picture.name}](images/{picture.name})", "", picture.caption]
    lines += ["", "## Settings that differ", ""]
    lines += [
        f"- **{row.name}**: {text}"
        for row, text in zip(rows, own_settings([row.config for row in rows]))
    ]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> list[Picture]:
    names = [row.name for row in rows]
    seconds = [row.facts["seconds_per_image"] for row in rows]
    distances = [_distance(row) for row in rows]
    grid = Picture(
        f"{NAME}-samples.png",
        "The first samples of each prior, the same classes in each row.",
        _grid(rows),
    )
    if not all(map(math.isfinite, distances)):
        return [grid]
    plot = named_points(names, seconds, distances, "seconds per image", "FD to held-out images")
    return [
        Picture(
            f"{NAME}-seconds.svg", "In-domain Fréchet distance against seconds per image.", plot
        ),
        grid,
    ]


def _grid(rows: Sequence[Row]) -> bytes:
    """The first samples of each class, a row for each prior."""
    shown = []
    for row in rows:
        arrays = row.generation.arrays
        labels = arrays.get("sample_labels", np.arange(len(arrays["samples"])))
        first = [
            np.flatnonzero(labels == label)[:PER_CLASS] for label in dict.fromkeys(labels.tolist())
        ]
        shown.append(arrays["samples"][np.concatenate(first)[:SHOWN]])
    return labelled_grid([row.name for row in rows], shown)


def _likelihood(row: Row) -> str:
    figure = row.figure("NLL")
    return f"{number(figure.value)} ({figure.settings['kind']})" if figure else "none"


def _distance(row: Row) -> float:
    """Infinite where there were too few images for it."""
    figure = row.figure("FD", " to held-out")
    return figure.value if figure else math.inf


def _cell(figure: Measurement | None) -> str:
    return number(figure.value) if figure else ""


def _parameters(folder: Path) -> int:
    """Of the published weights, without buffers that are no parameters: what the checkpoint's file
    holds in floats."""
    from safetensors import safe_open

    with safe_open(weights_path(folder), "np") as weights:
        shapes = [weights.get_slice(name).get_shape() for name in weights.keys()]
    return int(sum(np.prod(shape) for shape in shapes))
