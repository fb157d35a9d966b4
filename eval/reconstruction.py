"""How well a tokenizer keeps images: decode(encode(x)) over the whole held-out split."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from eval.counts import LEAST, Counts
from eval.extractors.fid_protocols import PROTOCOLS, Protocol
from eval.extractors.interface import Extractor, FeatureRows, banner, figure_name
from eval.extractors.weights import WEIGHTS
from eval.interface import Batch
from eval.metrics.codebook import CodebookUsage
from eval.metrics.frechet import Gaussian, frechet_distance, frechet_jackknife
from eval.metrics.image_similarity import Paired
from eval.pipeline import Pipeline, load, pixels
from eval.record import Measurement, Origin, Record
from tokenizer.data.transforms import to_float, to_uint8
from training import distributed

SHOWN, EXTREMES = 12, 8
JACKKNIFE_BLOCKS = 20


class PairedFrechet:
    """rFD: the distance between reconstructions and their own originals. The rows are paired, and
    so is the interval: an image leaves both sides."""

    def __init__(
        self, extractor: Extractor, origin: Origin, protocol: Protocol | None = None
    ) -> None:
        """`protocol`: whose resize both sides take; the extractor's own without one."""
        self.extractor, self.origin, self.protocol = extractor, origin, protocol
        self.images, self.references = FeatureRows(extractor), FeatureRows(extractor)

    def update(self, batch: Batch) -> None:
        for rows, images in ((self.images, batch.images), (self.references, batch.references)):
            if self.protocol is None:
                rows.add(batch.ids, self.extractor(images))
            else:
                resized = self.protocol.resize(images, self.extractor.input_size)
                rows.add(batch.ids, self.extractor.see(resized))

    def compute(self) -> dict[str, Measurement]:
        features, references = self.images.gathered().features, self.references.gathered().features
        if len(features) < LEAST["a Fréchet distance"]:
            return {}
        name = figure_name("rFD", self.extractor)
        return {name: measure_frechet(self.origin, name, self.extractor, features, references)}


def measure_frechet(
    origin: Origin,
    name: str,
    extractor: Extractor,
    features: Tensor,
    target: Gaussian | Tensor,
    **settings: object,
) -> Measurement:
    """A Fréchet distance with its jackknife interval, where there are rows enough for one."""
    paired = isinstance(target, Tensor)
    fixed = Gaussian.of_features(target) if paired else target
    value = frechet_distance(Gaussian.of_features(features), fixed)
    settings |= extractor.settings | {"features": features.shape[1]}
    interval, details = None, {}
    if len(features) >= 2 * JACKKNIFE_BLOCKS:
        found = frechet_jackknife(features, target, JACKKNIFE_BLOCKS)
        interval = (max(0.0, found.low), found.high)
        details = {
            "interval": f"jackknife, {JACKKNIFE_BLOCKS} blocks",
            "bias_corrected": found.corrected,
        }
    return origin.measure(
        name, value, "", False, len(features), interval=interval, details=details, **settings
    )


def measure_reconstruction(pipeline: Pipeline, followed: str | None = None) -> Record:
    """The record of a tokenizer: the kept one when it is current, else measured and kept.

    `followed`: one of PROTOCOLS, whose conventions the figures then follow and which they name: how
    originals are cut, how floats become uint8, and what the extractors are given.
    """
    emulated = PROTOCOLS[followed] if followed else None
    kind = f"reconstruction-{followed}" if followed else "reconstruction"
    held_out, options = (
        pipeline.held_out_as(emulated.crop) if emulated else pipeline.held_out,
        pipeline.options,
    )
    places = pipeline.places(held_out)
    n = len(places)
    protocol = {"data": held_out.identity(), "batch_size": options.batch_size, **pipeline.how}
    protocol |= {"protocol": followed} if followed else {}
    subject = {"tokenizer_sha256": pipeline.tokenizer_hash}
    settings = {
        **protocol,
        **subject,
        "n": n,
        "extractors": [extractor.settings for extractor in pipeline.extractors],
        "lpips": pipeline.lpips and [pipeline.lpips.name, pipeline.lpips.sha256],
    }
    kept = Record.load(pipeline.report_folder, kind, settings)
    if kept and not options.fresh:
        return kept

    model = pipeline.tokenizer
    split = pipeline.split_name(held_out, places)
    quantise = emulated.quantise if emulated else to_uint8
    origin = Origin(split, protocol | {"reference": "the encoder's input after uint8"}, subject)
    paired = Paired(origin, pipeline.lpips)
    codebook = CodebookUsage(model.layout, Origin(split, protocol, subject))
    distances = [PairedFrechet(extractor, origin, emulated) for extractor in pipeline.extractors]
    metrics = [paired, codebook, *distances]
    for originals in pipeline.batches(held_out, f"{pipeline.folder.name}: reconstruction"):
        batch = reconstruct(model, originals, quantise)
        for metric in metrics:
            metric.update(batch)
    measurements = [measurement for metric in metrics for measurement in metric.compute().values()]

    rows = paired.per_image()
    order = (-rows["lpips"] if "lpips" in rows else rows["psnr"]).argsort()  # worst first
    chosen = {
        "shown": torch.linspace(0, n - 1, min(SHOWN, n)).long(),
        "worst": order[:EXTREMES],
        "best": order.flip(0)[:EXTREMES],
    }
    arrays = {}
    for name, chosen_rows in chosen.items():
        originals = load(held_out, places[chosen_rows]).to(distributed.device())
        batch = reconstruct(model, Batch(originals, places[chosen_rows]), quantise)
        arrays |= {
            f"{name}_originals": pixels(batch.references),
            f"{name}_images": pixels(batch.images),
        }
        for figure in ("psnr", "lpips"):
            if figure in rows:
                arrays[f"{name}_{figure}"] = rows[figure][chosen_rows].numpy()
    notes = [line for line in map(banner, pipeline.extractors) if line]
    counts = Counts({pipeline.split_name(held_out, places): n})
    if not distances:
        notes.append("rFD is left out: no extractor was given (--extractor).")
    elif not counts.suffice("a Fréchet distance", *counts.sets):
        notes += counts.notes
    if "ssim" not in rows:
        notes.append(f"SSIM is left out: images of {held_out.image_size} px are below its window.")
    if not pipeline.lpips:
        small = f"images of {held_out.image_size} px are too small for its trunk"
        weights = WEIGHTS[f"lpips-{options.lpips_net}"]
        lacking = f"{weights.file} is missing ({weights.flag}; `python -m eval.doctor` says how to fetch it)"
        reason = small if weights.find(options.lpips_weights) else lacking
        notes.append(f"LPIPS is left out: {reason}.")
    notes += [f"As {followed}: {emulated.why}."] if emulated else []
    record = Record(kind, settings, measurements, arrays, notes)
    return pipeline.keep(record)


@torch.no_grad()
def reconstruct(
    model: object, originals: Batch, quantise: Callable[[Tensor], Tensor] = to_uint8
) -> Batch:
    """Originals -> their reconstructions with the codes in between; both sides uint8."""
    codes = model.encode(to_float(originals.images))
    images = quantise(model.decode(codes))
    return Batch(images, originals.ids, references=originals.images, codes=codes)
