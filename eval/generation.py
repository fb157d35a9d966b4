"""How close samples come to real images: Fréchet distances, Inception Score, manifolds, class agreement; each
beside the same figure between real images, without which it says little."""

from __future__ import annotations

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.extractors import Extraction, Extractor, FeatureRows, InDomain, banner, figure_name
from eval.frechet import Gaussian
from eval.inception_score import inception_score
from eval.manifold import manifold
from eval.moments import Moments
from eval.pipeline import Pipeline, share
from eval.reconstruction import measure_frechet, measure_reconstruction
from eval.record import Measurement, Origin, Record, share_interval
from training import distributed
from training.checkpoint import sha256
from training.command import UserError

MANIFOLD_LIMIT = 10_000  # images per side: the distances are a square table
IS_SPLITS = 10
TRUSTED_ACCURACY = 0.8  # of the in-domain classifier on real images; below it the report warns
SHOWN_CLASSES, SHOWN_PER_CLASS = 20, 12
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5


@dataclasses.dataclass(frozen=True)
class Samples:
    """What generate.sample wrote."""

    images: np.ndarray  # (N, H, W, 3) uint8
    labels: np.ndarray | None  # (N,) int64
    sha256: str
    made_from: dict[str, Any]  # of samples.json: hashes of prior and tokenizer, and the request

    @staticmethod
    def open(folder: Path, image_size: int) -> Samples:
        """Raises UserError for a missing or damaged file and for images of another size."""
        path = folder / "samples.npz"
        if not path.is_file():
            raise UserError(f"{path}: no samples here: make them first (python -m generate.sample)")
        try:
            with np.load(path) as stored:
                images = stored["arr_0"]
                labels = stored["arr_1"].astype(np.int64) if "arr_1" in stored.files else None
            about = folder / "samples.json"
            made_from = json.loads(about.read_text())["made_from"] if about.is_file() else {}
        except Exception as error:
            raise UserError(f"{path}: damaged ({error}): sample again") from error
        if images.dtype != np.uint8 or images.shape[1:] != (image_size, image_size, 3):
            raise UserError(
                f"{path}: arr_0 is {images.dtype} {images.shape}, and the data needs uint8 "
                f"(N, {image_size}, {image_size}, 3): sample again from this run"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise UserError(f"{path}: {len(images)} images and {len(labels)} labels: sample again")
        return Samples(images, labels, sha256(path), made_from)

    def load(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.images[ids.numpy()]).permute(0, 3, 1, 2)


def measure_generation(pipeline: Pipeline, folder: Path | None = None, kind: str = "generation") -> Record:
    """The record of RUN/samples, or of another `folder` and `kind`: the kept one if current, else measured and kept."""
    options = pipeline.options
    folder = folder or pipeline.folder / "samples"
    samples = Samples.open(folder, pipeline.held_out.image_size)
    maker = samples.made_from.get("tokenizer_sha256", pipeline.tokenizer_hash)
    if maker != pipeline.tokenizer_hash:
        raise UserError(
            f"{folder}: decoded by a tokenizer with weights {maker[:8]}…, and they are "
            f"now {pipeline.tokenizer_hash[:8]}…: sample again"
        )
    reconstruction = measure_reconstruction(pipeline)
    settings = {
        "samples_sha256": samples.sha256,
        "samples": samples.made_from,
        "n": len(samples.images[: options.num]),
        "data": [split.identity() for split in (pipeline.train, pipeline.held_out)],
        "data_n": [len(pipeline.places(split)) for split in (pipeline.train, pipeline.held_out)],
        "extractors": [extractor.settings for extractor in pipeline.extractors],
        "batch_size": options.batch_size,
        "reconstruction": reconstruction.hash,
    }
    kept = Record.load(pipeline.report_folder, kind, settings)
    if kept and not options.fresh:
        return kept

    protocol = {"batch_size": options.batch_size}
    subject: dict[str, Any] = {"samples_sha256": samples.sha256}
    subject |= {name: value for name, value in samples.made_from.items() if name.endswith("_sha256")}
    if "options" in samples.made_from:
        subject["seed"] = samples.made_from["options"]["seed"]
    origins = Origins(
        samples=Origin("samples", protocol | {"data": pipeline.held_out.identity()}, subject),
        held_out=Origin("held-out", protocol | {"data": pipeline.held_out.identity()}, {}),
        train=Origin("train", protocol | {"data": pipeline.train.identity()}, {}),
    )
    measurements: list[Measurement] = []
    notes = [line for line in map(banner, pipeline.extractors) if line]
    arrays = _sample_pictures(samples, settings["n"], pipeline.tokens.num_classes)
    for extractor in pipeline.extractors:
        seen = _extract(pipeline, extractor, samples, settings["n"])
        measurements += _distances(extractor, seen, origins)
        measurements += [m for m in reconstruction.measurements if m.name == figure_name("rFD", extractor)]
        if getattr(extractor, "task", "classes") == "rotation":
            notes.append(f"The score of class probabilities is left out: {extractor.name} knows no classes.")
        else:
            measurements += _scores(extractor, seen, origins)
        measurements += _manifolds(extractor, seen, origins)
        if extractor is pipeline.in_domain:
            agreement = _agreement(pipeline, seen, samples, origins)
            measurements += agreement.measurements
            arrays |= agreement.arrays
            notes += agreement.notes
    record = Record(kind, settings, measurements, arrays, notes)
    if distributed.is_main():
        record.save(pipeline.report_folder)
    return record


@dataclasses.dataclass(frozen=True)
class Origins:
    """Figures of samples stand beside the same figures of real images."""

    samples: Origin
    held_out: Origin
    train: Origin


@dataclasses.dataclass(frozen=True)
class Real:
    """One extractor's view of real images."""

    held_out: Extraction
    train: Extraction  # evenly spaced, about as many as the held-out images
    train_moments: Moments  # of the whole split


@dataclasses.dataclass(frozen=True)
class Seen(Real):
    """And of samples."""

    samples: Extraction


def _extract(pipeline: Pipeline, extractor: Extractor, samples: Samples, n: int) -> Seen:
    drawn = FeatureRows(extractor)
    for batch in share(torch.arange(n), pipeline.options.batch_size, samples.load, f"samples, {extractor.name}"):
        drawn.update(batch)
    return Seen(**vars(_extract_real(pipeline, extractor)), samples=drawn.gathered())


@functools.lru_cache(maxsize=2)
def _extract_real(pipeline: Pipeline, extractor: Extractor) -> Real:
    """Kept, because several sets of samples may be measured against the same images."""
    held_out, train, name = FeatureRows(extractor), FeatureRows(extractor), extractor.name
    for batch in pipeline.batches(pipeline.held_out, f"held-out images, {name}"):
        held_out.update(batch)
    moments = Moments.empty(extractor.dim)
    stride = max(1, len(pipeline.train) // len(pipeline.held_out))
    for batch in pipeline.batches(pipeline.train, f"train images, {name}"):
        extraction = extractor(batch.images)
        moments.update(extraction.features)
        kept = batch.ids % stride == 0
        train.add(batch.ids[kept], Extraction(extraction.features[kept], extraction.probabilities[kept]))
    return Real(held_out.gathered(), train.gathered(), moments.reduced())


def _distances(extractor: Extractor, seen: Seen, origins: Origins) -> list[Measurement]:
    name, rows = figure_name("FD", extractor), seen.samples.features
    real = seen.held_out.features
    train, held_out = Gaussian.of_moments(seen.train_moments), Gaussian.of_features(real)
    to_train = {"reference": "train split", "reference_n": seen.train_moments.count}
    to_held_out = {"reference": "held-out split", "reference_n": len(real)}
    return [
        measure_frechet(origins.samples, f"{name} to held-out", extractor, rows, held_out, **to_held_out),
        measure_frechet(origins.samples, f"{name} to train", extractor, rows, train, **to_train),
        measure_frechet(origins.held_out, f"{name} of real images", extractor, real, train, **to_train),
    ]


def _scores(extractor: Extractor, seen: Seen, origins: Origins) -> list[Measurement]:
    found = []
    for suffix, origin, rows in (
        ("", origins.samples, seen.samples.probabilities),
        (" of real images", origins.held_out, seen.held_out.probabilities),
    ):
        score = inception_score(rows, min(IS_SPLITS, len(rows)))
        settings = extractor.settings | {"classes": rows.shape[1], "splits": score.splits, "shuffle_seed": 2020}
        details = {"deviation": score.deviation}
        name = figure_name("IS", extractor) + suffix
        found.append(origin.measure(name, score.mean, "", True, len(rows), details=details, **settings))
    return found


def _manifolds(extractor: Extractor, seen: Seen, origins: Origins) -> list[Measurement]:
    real = _spread(seen.held_out.features)
    found = []
    for suffix, origin, rows in (
        ("", origins.samples, seen.samples.features[:MANIFOLD_LIMIT]),
        (" of real images", origins.train, _spread(seen.train.features)),
    ):
        if min(len(rows), len(real)) <= DENSITY_NEIGHBOURS:
            continue
        settings = extractor.settings | {"reference": "held-out split", "reference_n": len(real)}
        figures = dataclasses.asdict(manifold(rows, real, NEIGHBOURS, DENSITY_NEIGHBOURS))
        for figure, value in figures.items():
            k = NEIGHBOURS if figure in ("precision", "recall") else DENSITY_NEIGHBOURS
            name = figure_name(figure, extractor) + suffix
            found.append(origin.measure(name, value, "", True, len(rows), k=k, **settings))
    return found


def _spread(rows: Tensor) -> Tensor:
    """At most MANIFOLD_LIMIT rows that lie evenly: real images may come sorted by class."""
    return rows[torch.linspace(0, len(rows) - 1, min(len(rows), MANIFOLD_LIMIT)).long()]


@dataclasses.dataclass(frozen=True)
class Agreement:
    measurements: list[Measurement]
    arrays: dict[str, np.ndarray]
    notes: list[str]


def _agreement(pipeline: Pipeline, seen: Seen, samples: Samples, origins: Origins) -> Agreement:
    """Share of samples whose label the in-domain classifier recognises, and of real held-out images."""
    classifier: InDomain = pipeline.in_domain
    if classifier.task != "classes":
        return Agreement([], {}, ["Class agreement is left out: the data has fewer than two classes."])
    real_labels = pipeline.held_out.labels[pipeline.places(pipeline.held_out)]
    real = _recognised(seen.held_out, real_labels)
    found = [_share(origins.held_out, "classifier accuracy on real images", real, classifier)]
    if samples.labels is None:
        return Agreement(found, {}, ["Class agreement is left out: samples.npz has no labels (arr_1)."])
    labels = torch.from_numpy(samples.labels[: len(seen.samples.features)])
    if not bool(((labels >= 0) & (labels < classifier.num_classes)).all()):
        return Agreement(found, {}, ["Class agreement is left out: the samples are unconditional."])
    hits = _recognised(seen.samples, labels)
    totals = labels.bincount(minlength=classifier.num_classes)
    right = labels[hits].bincount(minlength=classifier.num_classes)
    per_class = {
        name: round(100 * int(good) / int(total), 2)
        for name, good, total in zip(pipeline.tokens.class_names, right, totals)
        if total
    }
    found.insert(0, _share(origins.samples, "class agreement", hits, classifier, per_class=per_class))
    notes, accuracy = [], float(real.double().mean())
    if accuracy < TRUSTED_ACCURACY:
        notes.append(
            f"{classifier.name} recognises only {100 * accuracy:.0f} % of real held-out images: class agreement and "
            "the distances by its features say little here."
        )
    return Agreement(found, {"agreement_right": right.numpy(), "agreement_total": totals.numpy()}, notes)


def _recognised(extraction: Extraction, labels: Tensor) -> Tensor:
    return extraction.probabilities.argmax(1) == labels


def _share(origin: Origin, name: str, hits: Tensor, classifier: InDomain, **details: Any) -> Measurement:
    count, n = int(hits.sum()), len(hits)
    interval = share_interval(count, n)
    return origin.measure(
        name, 100 * count / n, "%", True, n, interval=interval, details=details, **classifier.settings
    )


def _sample_pictures(samples: Samples, n: int, num_classes: int) -> dict[str, np.ndarray]:
    """The first samples of each class; unlabelled ones in order."""
    if samples.labels is None:
        chosen = np.arange(min(n, SHOWN_PER_CLASS * 5))
        return {"samples": samples.images[chosen]}
    labels = samples.labels[:n]
    shown = [label for label in range(num_classes + 1) if (labels == label).any()][:SHOWN_CLASSES]
    chosen = np.concatenate([np.flatnonzero(labels == label)[:SHOWN_PER_CLASS] for label in shown])
    return {"samples": samples.images[chosen], "sample_labels": labels[chosen]}
