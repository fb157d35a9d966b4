"""Tokenizers side by side: the runs of a folder in one table, in plots, and in one grid of the same
images."""

from __future__ import annotations

import dataclasses
import re
import statistics
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from eval.compare import check_alike, own_settings
from eval.pipeline import Options, Pipeline
from eval.reconstruction import measure_reconstruction
from eval.record import Measurement, Record, dump_json, write_pages
from eval.report.pictures import Picture, labelled_grid
from eval.report.plots import codebook_bars, named_curves, named_points
from eval.report.stages import read_log
from eval.report.tables import ARROWS, markdown_table, number
from tokenizer.data.identity import noted
from tokenizer.run import TokenizerRun, load_config
from training import distributed, words
from training.checkpoint import weights_path
from training.config import to_dict
from training.errors import UserError

NAME = "quantizers"
MEASURED = r"PSNR$|SSIM$|LPIPS|rF"  # the record's own figures in the table


@dataclasses.dataclass(frozen=True)
class Trained:
    """A tokenizer's run as it lies in the folder, before anything is measured."""

    pipeline: Pipeline
    config: TokenizerRun
    conditions: dict[str, str]  # under which it was trained: what must not differ

    @staticmethod
    def read(options: Options, folder: Path) -> Trained:
        pipeline = Pipeline(dataclasses.replace(options, run=folder))
        config, held_out = load_config(folder), pipeline.held_out.identity()
        conditions = {
            "data.source": f"{held_out['source']} {_train_ids(folder)[:8]}".strip(),
            "data.held_out": f"{held_out['n']:,} images {held_out['ids_sha256'][:8]}",
            "data.image_size": str(config.data.image_size),
            "data.augment": config.data.augment,
            "loop.steps": f"{_weights_step(folder):,}",
            "loop.batch_size": str(config.loop.batch_size),
            "seed": str(config.seed),
        }
        return Trained(pipeline, config, conditions)

    @property
    def name(self) -> str:
        return self.pipeline.folder.name


@dataclasses.dataclass(frozen=True)
class Level:
    codes: int  # positions per image
    num_codes: int  # K
    perplexity: float
    usage: float  # percent of K


@dataclasses.dataclass(frozen=True)
class Row:
    """A run with its figures."""

    trained: Trained
    record: Record
    levels: list[Level]
    seconds: float | None  # per training step, the median of the log
    curve: list[tuple[int, float]]  # (step, held-out PSNR)

    @staticmethod
    def measure(trained: Trained) -> Row:
        pipeline, folder = trained.pipeline, trained.pipeline.folder
        record = measure_reconstruction(pipeline, *pipeline.options.protocol)
        used, spread = (
            [figure for figure in record.measurements if figure.name.startswith(name)]
            for name in ("codebook usage", "perplexity")
        )
        levels = [
            Level(u.settings["tokens"] // u.n, u.settings["num_codes"], p.value, u.value)
            for u, p in zip(used, spread)
        ]
        log = read_log(folder)
        seconds = [value for _, value in log.get("seconds", [])]
        median = statistics.median(seconds) if seconds else None
        return Row(trained, record, levels, median, log.get("held_out.psnr", []))

    @property
    def name(self) -> str:
        return self.trained.name

    @property
    def figures(self) -> dict[str, Measurement]:
        return {figure.name: figure for figure in self.record.measurements}

    @property
    def bits(self) -> float:
        return self.figures["rate, fixed"].value

    @property
    def psnr(self) -> float:
        return self.figures["PSNR"].value

    @property
    def perplexity(self) -> float:
        return statistics.fmean(level.perplexity for level in self.levels)

    @property
    def perplexity_share(self) -> float:
        """Percent of K, the mean over levels."""
        return statistics.fmean(100 * level.perplexity / level.num_codes for level in self.levels)

    @property
    def usage(self) -> float:
        return statistics.fmean(level.usage for level in self.levels)

    @property
    def images_per_second(self) -> float | None:
        return self.seconds and self.trained.config.loop.batch_size / self.seconds

    def to_dict(self) -> dict[str, Any]:
        return {
            "name": self.name,
            "bits_per_image": self.bits,
            "codes_per_image": sum(level.codes for level in self.levels),
            "perplexity": self.perplexity,
            "perplexity_percent": self.perplexity_share,
            "usage_percent": self.usage,
            "levels": [dataclasses.asdict(level) for level in self.levels],
            "seconds_per_step": self.seconds,
            "images_per_second": self.images_per_second,
            "conditions": self.trained.conditions,
            "held_out_psnr": self.curve,
            "tokenizer_sha256": self.record.settings["tokenizer_sha256"],
            "figures": [figure.to_dict() for figure in self.record.measurements],
            "environment": self.record.environment,
            "config": to_dict(self.trained.config),
        }


def compare_quantizers(options: Options) -> None:
    """Write FOLDER/quantizers.md, quantizers.json and images/ over all tokenizers' runs in FOLDER.

    Reconstruction records that are missing or not current are measured. Raises UserError when there
    is no run, and when the runs were not trained alike, naming the first setting that differs and
    is not allowed to.
    """
    folders = find_runs(options.run)
    if not folders:
        raise UserError(
            f"{options.run}: no folder in it is a tokenizer's run (config.yaml and weights/): train one"
        )
    trained = [Trained.read(options, folder) for folder in folders]
    check_alike(
        {each.pipeline.folder: each.conditions for each in trained}, options.allow_differences
    )
    rows = sorted(map(Row.measure, trained), key=lambda row: (row.bits, row.name))
    if not distributed.is_main():
        return
    pictures = draw(rows)
    notes = list(dict.fromkeys(note for row in rows for note in row.record.notes))
    table = markdown_table(columns_of(rows, options.allow_differences))
    files = {f"images/{picture.name}": picture.content for picture in pictures}
    files[f"{NAME}.json"] = dump_json({"notes": notes, "runs": [row.to_dict() for row in rows]})
    files[f"{NAME}.md"] = markdown(rows, table, notes, pictures).encode()
    write_pages(options.run, files)
    print("\n".join([*notes, *table, f"{options.run / NAME}.md: written"]), flush=True)


def find_runs(folder: Path) -> list[Path]:
    """The subfolders that hold a tokenizer with weights; other runs, such as an extractor's, are
    passed over."""
    configs = sorted(folder.glob("*/config.yaml"))
    runs = [path.parent for path in configs if weights_path(path.parent).is_file()]
    return [run for run in runs if "model" in words.read(run / "config.yaml")]


def of_levels(counts: Iterable[int]) -> str:
    """ "512" of one level, "4 × 256" of equal ones, "64 + 256" of others."""
    counts = list(counts)
    if len(set(counts)) == 1:
        return f"{len(counts)} × {counts[0]:,}" if len(counts) > 1 else f"{counts[0]:,}"
    return " + ".join(f"{count:,}" for count in counts)


def columns_of(rows: Sequence[Row], shown: Sequence[str]) -> dict[str, list[str]]:
    """Head -> a cell for each row; `shown` are conditions that become columns."""
    found = {
        name: figure
        for row in rows
        for name, figure in row.figures.items()
        if re.match(MEASURED, name)
    }
    return {
        "quantizer": [row.name for row in rows],
        "codes per image": [of_levels(level.codes for level in row.levels) for row in rows],
        "K": [of_levels(level.num_codes for level in row.levels) for row in rows],
        "bits per image": [f"{row.bits:,.0f}" for row in rows],
        **{
            f"{name} {ARROWS[figure.higher_is_better]}": [
                _cell(row.figures.get(name)) for row in rows
            ]
            for name, figure in found.items()
        },
        "perplexity": [number(row.perplexity) for row in rows],
        "% of K": [f"{row.perplexity_share:.1f}" for row in rows],
        "usage, %": [f"{row.usage:.1f}" for row in rows],
        "steps": [
            "" if steps == "0" else steps
            for steps in (row.trained.conditions["loop.steps"] for row in rows)
        ],
        "s/step": [number(row.seconds) if row.seconds else "" for row in rows],
        "images/s": [number(row.images_per_second) if row.seconds else "" for row in rows],
        **{
            field: [row.trained.conditions[field] for row in rows]
            for field in shown
            if field != "loop.steps"
        },
    }


def markdown(
    rows: Sequence[Row], table: Sequence[str], notes: Sequence[str], pictures: Sequence[Picture]
) -> str:
    conditions = [row.trained.conditions for row in rows]
    # published by others, each trained in its own way, of which their files say nothing
    imported = any(each["loop.steps"] == "0" for each in conditions)
    common = [
        f"{field} {value}"
        for field, value in conditions[0].items()
        if all(c[field] == value for c in conditions)
        and (not imported or field in ("data.source", "data.held_out", "data.image_size"))
    ]
    made = "are measured alike" if imported else "were trained alike"
    images = " and ".join(dict.fromkeys(f"{row.figures['PSNR'].n:,}" for row in rows))
    lines = [
        "# Quantizers compared",
        "",
        f"Reconstructions of {images} held-out images by tokenizers that {made}: {', '.join(common)}. "
        "Perplexity and usage are counted over all those images; where an image has several levels of codes, they are "
        "means over the levels. Seconds per step are medians of each training log, on whatever machine wrote it.",
        "",
        *(f"> {note}\n" for note in notes),
        *table,
        "",
        f"Every figure with its settings, and every level, is in [{NAME}.json]({NAME}.json).",
    ]
    for picture in pictures:
        lines += ["", f"![{picture.name}](images/{picture.name})", "", picture.caption]
    lines += ["", "## Settings that differ", ""]
    lines += [
        f"- **{row.name}**: {text}"
        for row, text in zip(rows, own_settings([row.trained.config for row in rows]))
    ]
    return "\n".join(lines) + "\n"


def draw(rows: Sequence[Row]) -> list[Picture]:
    names = [row.name for row in rows]
    bits, psnr = [row.bits for row in rows], [row.psnr for row in rows]
    rates = named_points(names, bits, psnr, "bits per image", "PSNR, dB")
    bars = codebook_bars(names, [row.usage for row in rows], [row.perplexity_share for row in rows])
    curves = {row.name: row.curve for row in rows if row.curve}
    pictures = [
        Picture(
            f"{NAME}-rate.svg", "Held-out PSNR against bits per image at the fixed rate.", rates
        ),
        Picture(
            f"{NAME}-codebook.svg", "Codes in use and perplexity on the held-out images.", bars
        ),
    ]
    if curves:
        caption = "PSNR in training, of the few held-out images that a run watches."
        plot = named_curves(curves, "step", "held-out PSNR, dB")
        pictures.append(Picture(f"{NAME}-curves.svg", caption, plot))
    groups: dict[bytes, list[Row]] = {}  # one, unless runs on different images were allowed
    for row in rows:
        groups.setdefault(row.record.arrays["shown_originals"].tobytes(), []).append(row)
    for index, group in enumerate(groups.values(), start=1):
        shown = [
            group[0].record.arrays["shown_originals"],
            *(row.record.arrays["shown_images"] for row in group),
        ]
        pictures.append(
            Picture(
                f"{NAME}-reconstructions{f'-{index}' if len(groups) > 1 else ''}.png",
                "Held-out images that lie evenly in the split, and what each tokenizer makes of them.",
                labelled_grid(["original", *(row.name for row in group)], shown),
            )
        )
    return pictures


def _cell(figure: Measurement | None) -> str:
    return number(figure.value) if figure else ""


def _weights_step(run: Path) -> int:
    """The step that published weights are of."""
    from safetensors import safe_open

    with safe_open(weights_path(run), "np") as weights:
        return int((weights.metadata() or {}).get("step", 0))


def _train_ids(run: Path) -> str:
    """The identity of the train images that a run was made from; empty where it is not known."""
    return noted(run, "train") or ""
