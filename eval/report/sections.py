"""Records as sections of the report: titles, captions, pictures, tables."""

from __future__ import annotations

import dataclasses
import math
import re
from collections.abc import Iterator, Sequence

import numpy as np

from eval.record import Record
from eval.report import rate_distortion
from eval.report.pictures import ERROR_TOP, Picture, labelled_grid, pair_strip, png
from eval.report.plots import bars, codebook_use, position_map, training_curves
from eval.report.stages import Stage
from eval.report.tables import interval_text, number
from eval.token_records import read_rate_distortion


@dataclasses.dataclass(frozen=True)
class Table:
    """Cells as text; columns named in `numbers` are ordered by value."""

    columns: dict[str, list[str]]
    numbers: tuple[str, ...] = ()

    def rows(self) -> Iterator[list[tuple[str, str]]]:
        """(column's name, text) of each row's cells."""
        for cells in zip(*self.columns.values()):
            yield list(zip(self.columns, cells))


@dataclasses.dataclass(frozen=True)
class Section:
    title: str
    text: str
    pictures: list[Picture]
    table: Table | None = None


def _reconstruction_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    arrays = record.arrays
    pictures = [
        _pairs(
            "reconstructions.png",
            f"Originals, reconstructions, and absolute error (white is {ERROR_TOP} levels of 255 or more); "
            "images that lie evenly in the split.",
            arrays["shown_originals"],
            arrays["shown_images"],
        )
    ]
    by = "LPIPS" if "best_lpips" in arrays else "PSNR"
    for which in ("best", "worst"):
        values = " ".join(f"{value:.1f}" for value in arrays[f"{which}_psnr"])
        caption = f"The {which} by {by}, {which} first. PSNR: {values} dB."
        if by == "LPIPS":
            caption += f" LPIPS: {' '.join(f'{value:.3f}' for value in arrays[f'{which}_lpips'])}."
        pictures.append(
            _pairs(f"{which}.png", caption, arrays[f"{which}_originals"], arrays[f"{which}_images"])
        )
    return [Section("Reconstructions", "Held-out images, never seen in training.", pictures)]


def _pairs(name: str, caption: str, originals: np.ndarray, images: np.ndarray) -> Picture:
    return Picture(name, caption, pair_strip(originals, images), pairs=len(originals))


def _codebook_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    arrays, plots = record.arrays, []
    levels = sum(name.startswith("histogram_") for name in arrays)
    for level in range(levels):
        counts, entropies = arrays[f"histogram_{level}"], arrays[f"position_entropy_{level}"]
        suffix, of_level = (f"-{level + 1}", f", level {level + 1}") if levels > 1 else ("", "")
        caption = f"Use of the {len(counts):,} codes, most used first{of_level}."
        plots.append(Picture(f"codebook{suffix}.svg", caption, codebook_use(counts)))
        caption = (
            f"Entropy over images of the code at each position{of_level}, in bits, of at most "
            f"{number(math.log2(len(counts)))} (Miller-Madow)."
        )
        plots.append(
            Picture(f"position-entropy{suffix}.svg", caption, position_map(entropies, "bits"))
        )
    return [
        Section(
            "Codebook",
            "Counted over the whole held-out split; the dashed line marks even use.",
            plots,
        )
    ]


def _rate_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    """A row for each tier; per image and per pixel are one figure in two units."""
    figures = {figure.name: figure for figure in record.measurements}
    tiers = [figure for figure in record.measurements if figure.unit == "bits/image"]
    per_pixel = [figures[tier.name.replace("rate, ", "rate per pixel, ", 1)] for tier in tiers]
    columns = {
        "rate": [tier.name.removeprefix("rate, ") for tier in tiers],
        "bits per image": [number(tier.value) for tier in tiers],
        "95 %": [interval_text(tier) for tier in tiers],
        "bits per pixel": [number(figure.value) for figure in per_pixel],
        "N": [f"{tier.n:,}" for tier in tiers],
        "how": [tier.settings["rate"] for tier in tiers],
    }
    text = "What the held-out codes cost. The first tiers are what no file reaches; files are decoded to the same codes."
    return [
        Section("Rate", text, [], Table(columns, ("bits per image", "95 %", "bits per pixel", "N")))
    ]


def _rate_distortion_sections(record: Record, class_names: Sequence[str]) -> list[Section]:
    measured = read_rate_distortion(record)
    content, caption = rate_distortion.plot(measured), rate_distortion.caption(measured)
    picture = Picture("rate-distortion.png", caption, content, smooth=True)
    rows = [figure for figure in record.measurements if "codec" in figure.settings]
    columns = {
        "at the bits of": [
            f"files {figure.settings['tokens']}, {figure.settings['counted']}" for figure in rows
        ],
        "bits per pixel": [number(figure.details["bits_per_pixel"]) for figure in rows],
        "codec": [figure.settings["codec"] for figure in rows],
        "PSNR over the codec's, dB": [number(figure.value) for figure in rows],
    }
    numbers = ("bits per pixel", "PSNR over the codec's, dB")
    text = "The tokenizer beside picture formats at the same bits; a codec without such bits has no row."
    return [
        Section("Rate and distortion", text, [picture], Table(columns, numbers) if rows else None)
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
        names = [
            class_names[label] if label < len(class_names) else "unconditional" for label in shown
        ]
        grid, caption = (
            labelled_grid(names, rows),
            f"One class per row: {', '.join(names)}. Not chosen.",
        )
    found = [
        Section(
            "Samples", "Drawn from the prior and decoded.", [Picture("samples.png", caption, grid)]
        )
    ]
    if "nearest_samples" in arrays:
        found.append(_memorisation(record))
    if "agreement_total" in arrays:
        total, right = arrays["agreement_total"], arrays["agreement_right"]
        shares = [(class_names[i], 100 * right[i] / total[i]) for i in np.flatnonzero(total)[:50]]
        picture = Picture(
            "agreement.svg",
            "Share of each class's samples that the classifier recognises.",
            bars(shares),
        )
        found.append(
            Section(
                "Class agreement", "By the in-domain classifier, trained on real images.", [picture]
            )
        )
    return found


def _memorisation(record: Record) -> Section:
    arrays = record.arrays
    rows = [arrays["nearest_samples"], *arrays["nearest_train"]]
    names = ["sample", "nearest", "second", "third"][: len(rows)]
    shown = " ".join(f"{value:.0f}" for value in arrays["nearest_percentiles"])
    caption = (
        "The samples that lie nearest to a training image, and the training images nearest to each. Percentiles of "
        f"their distances among those of held-out images: {shown}."
    )
    counts = np.histogram(arrays["percentiles"], bins=10, range=(0, 100))[0]
    shares = [
        (f"{10 * i} to {10 * i + 10} %", 100 * count / max(1, counts.sum()))
        for i, count in enumerate(counts.tolist())
    ]
    text = (
        "Distance of every sample to its nearest training image in the in-domain extractor's features, beside the same "
        "distances of held-out real images. Samples that copy fill the lowest percentiles; of real images each tenth "
        "of the percentiles holds a tenth. Guidance, too, draws samples towards the training images."
    )
    pictures = [
        Picture("nearest.png", caption, labelled_grid(names, rows)),
        Picture(
            "percentiles.svg",
            "Share of the samples by percentile of the distance.",
            bars(shares),
        ),
    ]
    return Section("Nearest training images", text, pictures)


SECTIONS = {
    "reconstruction": _reconstruction_sections,
    "codebook": _codebook_sections,
    "rate": _rate_sections,
    "rate_distortion": _rate_distortion_sections,
    "likelihood": lambda record, class_names: [],  # figures alone
    "generation": _generation_sections,
}


def curves_section(stages: Sequence[Stage]) -> Section:
    pictures = []
    for place, stage in enumerate(stages, start=1):
        if stage.curves:
            name = re.sub(r"[^\w.-]+", "_", stage.name, flags=re.ASCII)[:100]
            name, content = f"training-{place}-{name}.svg", training_curves(stage.curves)
            pictures.append(Picture(name, "", content, heading=stage.name))
    return Section("Training", "Every run's log over steps, oldest run first.", pictures)
