"""The record of RUN/samples under published protocols: the same images, each one's figures, and why
they differ."""

from __future__ import annotations

import torch
from torch import Tensor

from eval.counts import Counts
from eval.extractors.fid_protocols import emulate
from eval.extractors.interface import banner, figure_name
from eval.generation import Samples
from eval.pipeline import Pipeline, load
from eval.record import Origin, Record
from training import distributed

SCORE = "a score of class probabilities"


def measure_protocols(pipeline: Pipeline) -> Record:
    """Against the train split, by the Inception where its weights are, else by the in-domain
    extractor."""
    options, train = pipeline.options, pipeline.train
    samples = Samples.open(pipeline.folder / "samples", train.image_size)
    extractor = pipeline.judge
    n, places = samples.count(options.num), pipeline.places(train)
    settings = {
        "samples_sha256": samples.sha256,
        "n": n,
        "data": train.identity(),
        "data_n": len(places),
        "extractor": extractor.settings,
        "batch_size": options.batch_size,
        "protocols": list(options.protocol),
    }
    kept = Record.load(pipeline.report_folder, "protocols", settings)
    if kept and not options.fresh:
        return kept

    def own(rows: Tensor) -> tuple[Tensor, ...]:
        return rows.split(options.batch_size)[distributed.rank() :: distributed.world()]

    counts = Counts({"samples": n, "train images": len(places)})
    enough = counts.suffice("a Fréchet distance", *counts.sets)
    found = emulate(
        options.protocol if enough else (),
        extractor,
        lambda: (samples.load(rows) for rows in own(torch.arange(n))),
        lambda: (load(train, rows) for rows in own(places)),
    )
    protocol = {"data": train.identity(), "batch_size": options.batch_size}
    origin = Origin("samples", protocol, {"samples_sha256": samples.sha256})
    measurements = []
    for figures in found:
        how = extractor.settings | {
            "protocol": figures.protocol,
            "reference_n": figures.reference_n,
        }
        details = {"why": figures.why}
        for figure, value, higher in (("FD", figures.distance, False), ("IS", figures.score, True)):
            if value is not None:
                name = f"{figure_name(figure, extractor)} as {figures.protocol}"
                measurements.append(
                    origin.measure(name, value, "", higher, figures.n, details=details, **how)
                )
    notes = [line for line in [banner(extractor)] if line]
    notes += [f"{figures.protocol}: {figures.why}." for figures in found]
    notes.append(
        "Samples are kept as uint8, so that how a protocol turns floats into uint8 does not show here."
    )
    if any(figures.score is not None for figures in found) and not counts.suffice(SCORE, "samples"):
        measurements = [
            figure
            for figure in measurements
            if not figure.name.startswith(figure_name("IS", extractor))
        ]
    record = Record("protocols", settings, measurements, {}, notes + counts.notes)
    return pipeline.keep(record)
