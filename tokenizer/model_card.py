"""The card of a shared tokenizer, as the Hugging Face Hub shows it: what it is, how to load it, its
run's last figures and its report's."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from tokenizer.interface import CodeLayout
from tokenizer.run import TokenizerRun
from tokenizer.shared_folder import HUB_NAME
from training.checkpoint import weights_hash
from training.errors import UserError
from training.words import dump

USAGE = """```python
from tokenizer.sharing import from_pretrained

tokenizer = from_pretrained("owner/name")  # or this folder
codes = tokenizer.encode(images)  # (B, 3, H, W) in [-1, 1] -> (B, N) int64
images = tokenizer.decode(codes)
```"""
LICENCE = (
    "`license: other` stands above until whoever shares these weights names one. Weights that "
    "began as a pretrained "
    "encoder's, and data, have licences of their own."
)


def card_of_run(
    config: TokenizerRun, layout: CodeLayout, folder: Path, record: dict[str, Any] | None
) -> str:
    source, loop = config.data.source, config.loop
    encoder = getattr(config.model.encoder, "name", None)
    grids = ", ".join(
        f"{' x '.join(map(str, grid))} of {k}" for grid, k in zip(layout.grids, layout.num_codes)
    )
    name = f" on {encoder}" if encoder and HUB_NAME.fullmatch(encoder) else ""
    lines = [
        f"A {config.model.kind} tokenizer{name}: images of {config.data.image_size} px to "
        f"{layout.length} discrete "
        f"codes ({grids}), {layout.bits:.0f} bits, and back.",
        "",
        USAGE,
        "",
        "## Training",
        "",
        f"{loop.steps} steps of {loop.batch_size} images of {source.removeprefix('hub:')} "
        "(training split, "
        f"augmentation: {config.data.augment}). config.yaml has every setting; weights are an "
        "exponential average.",
        "",
        *_last_figures(folder),
        "## Figures",
        "",
        *(
            _measurements(record)
            if record
            else ["No report was made of these weights (`python -m eval.run`)."]
        ),
        "",
        "## Licence",
        "",
        LICENCE,
        "",
        f"SHA-256 of weights/model.safetensors: {weights_hash(folder)}",
    ]
    return front_matter([config.model.kind], encoder, source) + titled(config.name, lines)


def front_matter(tags: list[str], encoder: str | None, source: str | None) -> str:
    """The metadata that the Hub reads."""
    fields: dict[str, Any] = {
        "library_name": "tessera",
        "license": "other",
        "tags": ["tessera", "image-tokenizer", "vector-quantization", *tags],
    }
    if encoder and HUB_NAME.fullmatch(encoder):
        fields["base_model"] = encoder
    if source and source.startswith("hub:"):
        fields["datasets"] = [source.removeprefix("hub:")]
    return f"---\n{dump(fields)}---\n"


def titled(title: str, lines: list[str]) -> str:
    return "\n".join(["", f"# {title}", "", *lines]) + "\n"


def find_report(folder: Path, report: str | Path | None) -> dict[str, Any] | None:
    """The record of reconstruction of these very weights: the one given, the run's, or its
    pipeline's."""
    if report is not None:
        record = _read_report(Path(report))
        if record is None:
            raise UserError(f"{report}: there is no such report: run `python -m eval.run` first")
        if record["settings"]["tokenizer_sha256"] != weights_hash(folder):
            raise UserError(
                f"{report}: measured on other weights than {folder}'s: run `python -m eval.run` "
                "again"
            )
        return record
    records = (
        _read_report(place / "report" / "reconstruction.json") for place in (folder, folder.parent)
    )
    mine = (r for r in records if r and r["settings"]["tokenizer_sha256"] == weights_hash(folder))
    return next(mine, None)


def _read_report(file: Path) -> dict[str, Any] | None:
    """The record that eval wrote, or None where there is no such file."""
    if not file.is_file():
        return None
    try:
        record = json.loads(file.read_text())
        record["settings"]["tokenizer_sha256"], record["measurements"], record["notes"]
        return record
    except (ValueError, KeyError, TypeError):
        raise UserError(
            f"{file}: damaged, or no record of a reconstruction: run `python -m eval.run` again"
        ) from None


def _last_figures(folder: Path) -> list[str]:
    """The log's last value of everything, where there is a log."""
    figures: dict[str, float] = {}
    try:
        for line in (folder / "log.jsonl").read_text().splitlines():
            figures |= json.loads(line)
    except (OSError, ValueError):
        return []
    step = figures.pop("step", None)
    shown = [
        f"{name} {value:.4g}" for name, value in sorted(figures.items()) if isinstance(value, float)
    ]
    return [f"At step {step}: {', '.join(shown)}.", ""] if shown else []


def _measurements(record: dict[str, Any]) -> list[str]:
    """A table with everything that a figure needs to be one."""
    data = record["settings"]["data"]
    rows = ["| figure | value | 95 % | N | images | how |", "|---|---|---|---|---|---|"]
    for each in record["measurements"]:
        arrow = {True: " ↑", False: " ↓", None: ""}[each["higher_is_better"]]
        value = f"{float(each['value']):.4g} {each['unit']}".strip()
        interval = (
            ""
            if not each["interval"]
            else " – ".join(f"{float(end):.4g}" for end in each["interval"])
        )
        how = ", ".join(
            f"{k} {v}" for k, v in each["settings"].items() if k not in ("data", "batch_size")
        )
        rows.append(
            f"| {each['name']}{arrow} | {value} | {interval} | {each['n']} | {each['split']} | "
            f"{how} |"
        )
    about = (
        f"Of {data['source']} ({data['split']}, {data['image_size']} px), by `python -m eval.run`."
    )
    return [about, "", *rows, *([""] if record["notes"] else []), *record["notes"]]
