"""Records of a tokenizer's codes: use of the codebook, what codes cost, and distortion against
picture formats."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

import priors
from eval.metrics.codebook import code_statistics, measure_codes
from eval.metrics.codec import TableModel
from eval.metrics.rate import Rates, find_rates
from eval.metrics.rate_distortion import Point, RateDistortion, compare, measure_point
from eval.pipeline import Pipeline
from eval.reconstruction import reconstruct
from eval.record import Measurement, Origin, Record
from priors.interface import Prior
from priors.record import is_prior, read_record
from tokenizer.data.dataset import Images
from tokenizer.data.transforms import to_float
from training import distributed
from training.checkpoint import weights_hash
from training.errors import UserError

TABLE_IMAGES = 10_000  # of the train split, for a table of a tokenizer without a token cache
SINGLE_FILES = 16  # images that become files of their own


def measure_codebook(pipeline: Pipeline) -> Record:
    """The record of the held-out codes: the kept one if current, else measured and kept."""
    held_out, places = pipeline.held_out, pipeline.places(pipeline.held_out)
    protocol = {
        "data": held_out.identity(),
        "batch_size": pipeline.options.batch_size,
        **pipeline.how_encoded,
    }
    subject = {"tokenizer_sha256": pipeline.tokenizer_hash}
    settings = {**protocol, **subject, "n": len(places)}
    kept = Record.load(pipeline.report_folder, "codebook", settings)
    if kept and not pipeline.options.fresh:
        return kept
    codes, layout = codes_of(pipeline, held_out, places).numpy(), layout_of(pipeline)
    figures = measure_codes(
        codes, layout, Origin(pipeline.split_name(held_out, places), protocol, subject)
    )
    arrays = {}
    for level, statistics in enumerate(code_statistics(codes, layout)):
        arrays[f"histogram_{level}"] = statistics.histogram
        arrays[f"position_entropy_{level}"] = statistics.position_entropy
    return pipeline.keep(Record("codebook", settings, figures, arrays))


def measure_rate(pipeline: Pipeline) -> Record:
    """The record of what held-out codes cost, in all tiers: the kept one if current, else measured
    and kept.

    A pipeline's prior takes part, or the one that --prior names; UserError when it learned other
    tokens.
    """
    held_out, places = pipeline.held_out, pipeline.places(pipeline.held_out)
    coder = Coder.open(pipeline)
    protocol = {
        "data": held_out.identity(),
        "batch_size": pipeline.options.batch_size,
        **pipeline.how_encoded,
    }
    settings = {**protocol, **coder.subject, "n": len(places), "single_files": SINGLE_FILES}
    kept = Record.load(pipeline.report_folder, "rate", settings)
    if kept and not pipeline.options.fresh:
        return kept
    rates = coder.rates(codes_of(pipeline, held_out, places), places, SINGLE_FILES)
    origin = Origin(pipeline.split_name(held_out, places), protocol, coder.subject)
    figures = rates.measurements(origin, held_out.image_size**2)
    return pipeline.keep(Record("rate", settings, figures, {}, rates.notes))


def measure_rate_distortion(pipeline: Pipeline) -> Record:
    """The record of the tokenizer beside JPEG, WebP and AVIF at its bits, on as many held-out
    images as the options say: the kept one if current, else measured and kept.

    The tokenizer's bits are those of a file for each image, coded by a table of the train split, or
    by the prior.
    """
    held_out, options = pipeline.held_out, pipeline.options
    places, coder = pipeline.places(held_out, options.rate_distortion), Coder.open(pipeline)
    lpips = pipeline.lpips
    named = {"lpips": lpips and [lpips.name, lpips.sha256]}
    settings = {
        "data": held_out.identity(),
        "n": len(places),
        **coder.subject,
        **named,
        **pipeline.how,
    }
    kept = Record.load(pipeline.report_folder, "rate_distortion", settings)
    if kept and not options.fresh:
        return kept
    batches = pipeline.read(held_out, places, "rate-distortion: tokens")
    parts = [reconstruct(pipeline.tokenizer, batch) for batch in batches]
    order = distributed.gather_parts([part.ids for part in parts]).argsort()
    codes, images, originals = (
        distributed.gather_parts([getattr(part, name) for part in parts])[order]
        for name in ("codes", "images", "references")
    )
    rates = coder.rates(codes, places, len(places))
    points = [
        measure_point(
            pipeline.folder.name,
            f"coded by {rate.settings['model']}",
            originals,
            images,
            rate.bits,
            8 * rate.details["payload_bytes"],
            lpips,
        )
        for rate in rates.found
        if rate.name.startswith("file per image")
    ]
    found = compare(originals, points, lpips)
    origin = Origin(
        pipeline.split_name(held_out, places), {"data": held_out.identity()}, coder.subject
    )
    arrays = {"found": np.array(json.dumps(found.to_dict()))}
    figures = [figure for point in points for figure in _traded(found, point, origin)]
    return pipeline.keep(
        Record("rate_distortion", settings, figures, arrays, [*rates.notes, *found.notes])
    )


def read_rate_distortion(record: Record) -> RateDistortion:
    """What the record was made from, for tables and plots."""
    fields = json.loads(str(record.arrays["found"]))
    points = [Point(**point) for point in fields["points"]]
    curves = {
        codec: [Point(**point) for point in curve] for codec, curve in fields["curves"].items()
    }
    return RateDistortion(
        **fields | {"points": points, "curves": curves, "size": tuple(fields["size"])}
    )


def _traded(found: RateDistortion, point: Point, origin: Origin) -> list[Measurement]:
    """Its bits, and its PSNR over each codec that has such bits, by whole files and without
    headers."""
    figures, n = [], found.num_images
    for counted, bare in (("whole files", False), ("without headers", True)):
        own, bits = (
            {"tokens": point.setting, "counted": counted},
            point.bare_bits if bare else point.bits,
        )
        name = f"rate of a file per image, {point.setting}, {counted}"
        figures.append(origin.measure(name, bits, "bits/pixel", None, n, **own))
        for codec in found.curves:
            if other := found.matched(point, codec, bare):
                name = f"PSNR over {codec}'s at the bits of files {point.setting}, {counted}"
                gain = point.psnr - other.psnr
                figures.append(
                    origin.measure(
                        name,
                        gain,
                        "dB",
                        True,
                        n,
                        details={"bits_per_pixel": bits},
                        codec=codec,
                        **own,
                    )
                )
    return figures


@dataclasses.dataclass(frozen=True)
class Coder:
    """What the codes of a pipeline are coded with."""

    pipeline: Pipeline
    prior_folder: Path | None
    subject: dict[str, Any]  # hashes of all that the bits depend on

    @staticmethod
    def open(pipeline: Pipeline) -> Coder:
        folder = pipeline.options.prior
        if folder is None and is_prior(pipeline.folder / "prior"):
            folder = pipeline.folder / "prior"
        subject = {
            "tokenizer_sha256": pipeline.tokenizer_hash,
            "table_images": len(_table_places(pipeline)),
        }
        subject["table_identity"] = pipeline.train.inventory.sha256
        if folder:
            made_by = read_record(folder).tokenizer_sha256
            if made_by != pipeline.tokenizer_hash:
                raise UserError(
                    f"{folder}: trained on codes of a tokenizer with weights {made_by[:8]}…, and {pipeline.folder} "
                    f"has {pipeline.tokenizer_hash[:8]}…: name a prior over these tokens with --prior"
                )
            subject["prior_sha256"] = weights_hash(folder)
        return Coder(pipeline, folder, subject)

    def rates(self, codes: Tensor, places: Tensor, num_single: int) -> Rates:
        """Of held-out images at these places, (n, N) int64 codes."""
        pipeline, layout = self.pipeline, layout_of(self.pipeline)
        prior: Prior | None = priors.load(self.prior_folder) if self.prior_folder else None
        labels = None
        if prior is not None and prior.num_classes:
            labels = torch.as_tensor(pipeline.held_out.labels)[places].long()
        table = TableModel.of_split(train_histograms(pipeline), layout)
        return find_rates(
            codes, layout, split_table=table, prior=prior, labels=labels, num_single=num_single
        )


@functools.lru_cache(maxsize=1)
def train_histograms(pipeline: Pipeline) -> list[np.ndarray]:
    """(K,) counts of the train split's codes, per level; kept, as a tokenizer alone has to encode
    for them."""
    codes = codes_of(pipeline, pipeline.train, _table_places(pipeline)).numpy()
    return [
        np.bincount(codes[:, span].ravel(), minlength=size)
        for span, size in layout_of(pipeline).spans()
    ]


def _table_places(pipeline: Pipeline) -> Tensor:
    """The train images that a table counts: all of a token cache, else as many as are worth
    encoding."""
    n = len(pipeline.train)
    return (
        torch.linspace(0, n - 1, min(n, TABLE_IMAGES)).long() if pipeline.alone else torch.arange(n)
    )


def layout_of(pipeline: Pipeline) -> Any:
    return pipeline.tokenizer.layout if pipeline.alone else pipeline.tokens.layout


def codes_of(pipeline: Pipeline, images: Images, places: Tensor) -> Tensor:
    """(n, N) int64 codes of a split's plain images at these places: the token cache's, or else
    encoded now."""
    if not pipeline.alone:
        return torch.from_numpy(
            pipeline.tokens.split(images.split).codes[places.tolist(), 0].astype(np.int64)
        )
    ids, parts = [], []
    for batch in pipeline.read(images, places, f"codes, {images.split}"):
        ids.append(batch.ids)
        parts.append(pipeline.tokenizer.encode(to_float(batch.images)).cpu())
    order = distributed.gather_parts(ids).argsort()
    return distributed.gather_parts(parts)[order]
