"""`python -m eval.sweep FOLDER`: quality against seconds of what generate.sweep sampled, as a table
and a Pareto plot.

Every measured combination is a line of FOLDER/sweep.jsonl, under a hash of all that its figures
depend on; a line is never measured again.
"""

from __future__ import annotations

import dataclasses
import functools
import json
import os
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

import torch

from eval.counts import LEAST
from eval.extractors.interface import Extraction, FeatureRows, banner, figure_name
from eval.generation import Samples
from eval.interface import Batch
from eval.metrics.frechet import Gaussian
from eval.metrics.front import pareto
from eval.pipeline import Options, Pipeline, share
from eval.reconstruction import measure_frechet
from eval.record import Measurement, Origin, share_interval
from eval.report.tables import columns_of, interval_text, markdown_table, number, value_text
from eval.sample_facts import REMEDY, read_cost
from generate.sample import check_counts
from generate.sweep import LINES, PLAN, PLOT, TABLE, claim
from priors.interface import SampleOptions
from training.checkpoint import digest, replace_file
from training.command import Parser, run_command
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Combination:
    """One setting of the options and what it is worth."""

    options: dict[str, Any]
    seconds: float  # per image
    measurements: list[
        Measurement
    ]  # a Fréchet distance first, then class agreement where there are classes

    @property
    def distance(self) -> float:
        return self.measurements[0].value


class Judge:
    """Measures samples against the held-out split of a pipeline."""

    def __init__(self, pipeline: Pipeline) -> None:
        self.pipeline, self.extractor = pipeline, pipeline.in_domain
        self.protocol = {
            "data": pipeline.held_out.identity(),
            "batch_size": pipeline.options.batch_size,
        }

    def key(self, samples: Samples) -> str:
        """What the figures of these samples depend on, and their cost."""
        return digest([samples.made_from, samples.sha256, self.protocol, self.extractor.settings])

    def measure(self, samples: Samples) -> list[Measurement]:
        """The in-domain distance to held-out images, and class agreement where the samples have
        classes."""
        places = torch.arange(len(samples.images))
        seen = self._see(share(places, self.pipeline.options.batch_size, samples.load, "samples"))
        origin = Origin(
            "samples", self.protocol, {"samples_sha256": samples.sha256, **samples.made_from}
        )
        settings = {"reference": "held-out split", "reference_n": len(self.pipeline.held_out)}
        name = figure_name("FD", self.extractor) + " to held-out"
        found = [
            measure_frechet(origin, name, self.extractor, seen.features, self.target, **settings)
        ]
        labels = torch.from_numpy(samples.labels)
        if self.extractor.task == "classes" and int(labels.max()) < self.extractor.num_classes:
            hits, n = int((seen.probabilities.argmax(1) == labels).sum()), len(labels)
            interval, settings = share_interval(hits, n), self.extractor.settings
            found.append(
                origin.measure(
                    "class agreement", 100 * hits / n, "%", True, n, interval=interval, **settings
                )
            )
        return found

    @functools.cached_property
    def target(self) -> Gaussian:
        """The held-out images' features, taken once, and only if there is something to measure."""
        n, least = len(self.pipeline.places(self.pipeline.held_out)), LEAST["a Fréchet distance"]
        if n < least:
            raise UserError(
                f"{self.pipeline.held_out.name}: N = {n} held-out images is too few for a distance to them"
            )
        held_out = self.pipeline.batches(self.pipeline.held_out, "held-out images")
        return Gaussian.of_features(self._see(held_out).features)

    def _see(self, batches: Iterable[Batch]) -> Extraction:
        rows = FeatureRows(self.extractor)
        for batch in batches:
            rows.update(batch)
        return rows.gathered()


def measure_sweep(folder: Path, judge: Judge, names: Sequence[str]) -> list[Combination]:
    """The named combinations of a sweep's folder; what has no line in sweep.jsonl yet is measured
    and gets one."""
    lines = _read_lines(folder / LINES)
    found = []
    for name in names:
        samples = Samples.open(folder / name, judge.pipeline.held_out.image_size)
        facts, key = read_cost(folder / name), judge.key(samples)
        options = facts["made_from"]["options"]
        if key not in lines:
            made = {"key": key, "folder": name, "options": options}
            made |= {each: facts[each] for each in ("seconds_per_image", "batch_size", "device")}
            lines[key] = made | {"measurements": [m.to_dict() for m in judge.measure(samples)]}
            text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines.values())
            replace_file(folder / LINES, text.encode())
        line = lines[key]
        figures = [Measurement.from_dict(fields) for fields in line["measurements"]]
        found.append(Combination(options, line["seconds_per_image"], figures))
    return found


def table(found: Sequence[Combination], varied: Sequence[str]) -> str:
    """Markdown, best distance first; the Pareto front is marked."""
    front = pareto([(each.seconds, each.distance) for each in found])
    header = [*varied, *(m.name for m in found[0].measurements[:1]), "95 %"]
    header += [m.name for m in found[0].measurements[1:]] + ["N", "s per image", "front"]
    rows = []
    for index in sorted(range(len(found)), key=lambda each: found[each].distance):
        each = found[index]
        distance, *others = each.measurements
        cells = [str(each.options[key]) for key in varied] + [
            value_text(distance),
            interval_text(distance),
        ]
        cells += [value_text(other) for other in others] + [f"{distance.n:,}", number(each.seconds)]
        rows.append([*cells, "★" if index in front else ""])
    return "\n".join(markdown_table(columns_of(header, rows)))


def plot(found: Sequence[Combination], varied: Sequence[str], path: Path) -> None:
    """Every combination by seconds per image, against each of its figures; the Pareto front of the
    distance joined."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, NullFormatter

    num_panels = len(found[0].measurements)
    figure = Figure(figsize=(6.4 * num_panels, 4.8), layout="constrained")
    figure.suptitle(
        f"{', '.join(varied)} on the front of seconds and distance" if varied else "", fontsize=9
    )
    seconds = [each.seconds for each in found]
    front = pareto([(each.seconds, each.distance) for each in found])
    for panel, axes in enumerate(figure.subplots(1, num_panels, squeeze=False)[0]):
        figures = [each.measurements[panel] for each in found]
        values = [each.value for each in figures]
        for place, measured in zip(seconds, figures):
            if measured.interval:
                axes.plot([place, place], measured.interval, color="0.85", linewidth=1, zorder=1)
        axes.scatter(seconds, values, color="0.55", s=18, zorder=2)
        along = [seconds[index] for index in front], [values[index] for index in front]
        axes.plot(*along, color="C0", marker="o", markersize=5, linewidth=1.2, zorder=3)
        for index in front:
            text = ", ".join(str(found[index].options[key]) for key in varied)
            point = seconds[index], values[index]
            axes.annotate(
                text, point, xytext=(5, 5), textcoords="offset points", fontsize=8, zorder=4
            )
        axes.set_xlabel("seconds per image")
        axes.set_ylabel(" ".join(filter(None, (figures[0].name, figures[0].unit))))
        if max(seconds) > 3 * min(seconds):
            axes.set_xscale("log")
            axes.xaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
            axes.xaxis.set_major_formatter("{x:g}")
            axes.xaxis.set_minor_formatter(NullFormatter())
        axes.margins(0.12)
        axes.grid(True, color="0.92")
    FigureCanvasAgg(figure).print_png(path)


def _read_lines(path: Path) -> dict[str, dict[str, Any]]:
    """Lines by key; a last one that was cut short is measured again. Raises UserError when the file
    is damaged."""
    if not path.is_file():
        return {}
    *whole, rest = path.read_bytes().split(b"\n")
    if rest:
        print(f"warning: {path}: its last line was cut short: it is measured again", flush=True)
    try:
        lines = [json.loads(line) for line in whole]
        for line in lines:  # as they are used
            (
                [Measurement.from_dict(fields) for fields in line["measurements"]],
                line["measurements"][0],
            )
            float(line["seconds_per_image"])
        return {line["key"]: line for line in lines}
    except (ValueError, LookupError, TypeError, AttributeError, RecursionError):
        raise UserError(f"{path}: damaged: remove it, and the samples are measured again") from None


def _read_plan(folder: Path) -> dict[str, Any]:
    path = folder / PLAN
    try:
        plan = json.loads(path.read_bytes())
        _check_plan(plan)
        return plan
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        raise UserError(
            f"{path}: no finished sweep is here: make one first (python -m generate.sweep)"
        ) from None


def _check_plan(plan: Any) -> None:
    """Raise ValueError, KeyError or TypeError unless a plan has the form that generate.sweep
    writes."""
    known = {field.name for field in dataclasses.fields(SampleOptions)}
    if not isinstance(plan["pipeline"], str) or not plan["combinations"]:
        raise ValueError
    for key in ("varied", "combinations"):
        if not isinstance(plan[key], list) or not all(isinstance(each, str) for each in plan[key]):
            raise ValueError
    if not known.issuperset(plan["varied"]):
        raise ValueError


def main() -> None:
    parser = Parser(
        prog="python -m eval.sweep",
        description="Measure what generate.sweep sampled; plot the front.",
    )
    parser.add_argument("folder", type=Path, help="the output folder of generate.sweep")
    parser.add_argument(
        "--extractor", type=Path, metavar="RUN", help="in-domain extractor (that of the pipeline)"
    )
    parser.add_argument("--batch-size", type=int, default=100)
    arguments = parser.parse_args()
    check_counts(arguments, "batch_size")
    plan = _read_plan(arguments.folder)

    claim(arguments.folder)
    run = Path(os.path.normpath(arguments.folder.resolve() / plan["pipeline"]))
    judge = Judge(
        Pipeline(Options(run, extractor=arguments.extractor, batch_size=arguments.batch_size))
    )
    found = measure_sweep(arguments.folder, judge, plan["combinations"])
    if any(not each.options.keys() >= set(plan["varied"]) for each in found):
        raise UserError(
            f"{arguments.folder}: samples.json of some samples lacks {', '.join(plan['varied'])}: {REMEDY}"
        )
    text = f"{table(found, plan['varied'])}\n\n{banner(judge.extractor)}"
    replace_file(arguments.folder / TABLE, f"{text}\n".encode())
    plot(found, plan["varied"], arguments.folder / PLOT)
    print(f"{text}\n{arguments.folder / TABLE}, {arguments.folder / PLOT}", flush=True)


if __name__ == "__main__":
    run_command(main)
