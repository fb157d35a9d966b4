"""How close samples come to real images: Fréchet and kernel distances, Inception Score, manifolds,
memorisation, class agreement; most beside the same figure between real images, without which they
say little."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from eval.counts import Counts
from eval.extractors.in_domain import InDomain
from eval.extractors.interface import (
    Extraction,
    Extractor,
    FeatureRows,
    banner,
    figure_name,
)
from eval.metrics.cmmd import cmmd
from eval.metrics.frechet import Gaussian, frechet_infinity
from eval.metrics.inception_score import inception_score
from eval.metrics.kid import kernel_distance
from eval.metrics.memorisation import find_copying
from eval.metrics.moments import Moments
from eval.metrics.precision_recall import manifold
from eval.pipeline import Pipeline, load, pixels, share
from eval.reconstruction import measure_frechet, measure_reconstruction
from eval.record import Measurement, Origin, Record, share_interval
from eval.reference import read_reference
from eval.sample_facts import read_facts
from generate.images import FILES
from generate.npz import DAMAGES, IMAGES, LABELS, Rows, first_damage
from generate.shards import UNFINISHED
from training.atomic import is_settled
from training.checkpoint import sha256
from training.errors import UserError

MANIFOLD_LIMIT = 10_000  # images per side: the distances are a square table
IS_SPLITS = 10
TRUSTED_ACCURACY = 0.8  # of the in-domain classifier on real images; below it the report warns
SHOWN_CLASSES, SHOWN_PER_CLASS = 20, 12
NEIGHBOURS, DENSITY_NEIGHBOURS = 3, 5
KERNEL_SUBSETS, KERNEL_SUBSET_SIZE = (
    100,
    1000,
)  # of KID, as published; smaller sets give smaller subsets
INFINITY_POINTS = 15
SHOWN_NEAREST = 12  # samples beside their training neighbours
SETS = SAMPLES, HELD_OUT, TRAIN = "samples", "held-out images", "train images"  # as notes call them
SPACED = "train images, evenly spaced"


@dataclasses.dataclass(frozen=True)
class Samples:
    """What generate.sample wrote, or anyone in ADM's form."""

    images: np.ndarray | Rows  # (N, H, W, 3) uint8; of a file they are read when they are asked for
    labels: np.ndarray | None  # (N,) int64
    sha256: str
    made_from: dict[str, Any]  # of samples.json: hashes of prior and tokenizer, and the request

    @staticmethod
    def open(folder: Path, image_size: int) -> Samples:
        """Raises UserError for a missing or damaged file and for images of another size."""
        path = folder / FILES.arrays
        if folder.is_dir() and not is_settled(folder):
            raise UserError(
                f"{folder}: sampling was ended as it put its files in place: run the same command again"
            )
        if not path.is_file():
            begun = (folder / UNFINISHED).is_dir()
            remedy = (
                "unfinished: run the same command again"
                if begun
                else "no samples here: make them first"
            )
            raise UserError(f"{path}: {remedy} (python -m generate.sample)")
        facts = read_facts(folder)
        try:
            found = sha256(path)
            images, labels = Rows(path, IMAGES), None
            with contextlib.suppress(KeyError):
                labels = _whole_numbers(Rows(path, LABELS)[:])
            if facts.get("samples_sha256", found) != found:
                raise ValueError(f"its SHA-256 is not that in {FILES.record}")
            if "samples_sha256" not in facts and (damaged := first_damage(path)):
                raise ValueError(f"the checksum of {damaged} is another")
        except (*DAMAGES, TypeError) as error:
            raise UserError(f"{path}: damaged ({error}): sample again") from error
        if (
            images.dtype != np.uint8
            or images.shape[1:] != (image_size, image_size, 3)
            or not len(images)
        ):
            raise UserError(
                f"{path}: arr_0 is {images.dtype} {images.shape}, and the data needs uint8 "
                f"(N, {image_size}, {image_size}, 3): sample again from this run"
            )
        if labels is not None and labels.shape != images.shape[:1]:
            raise UserError(f"{path}: {len(images)} images and {len(labels)} labels: sample again")
        return Samples(images, labels, found, facts.get("made_from", {}))

    def load(self, ids: Tensor) -> Tensor:
        return torch.from_numpy(self.images[ids.numpy()]).permute(0, 3, 1, 2)

    def count(self, limit: int | None) -> int:
        """How many of them are measured."""
        return len(self.images) if limit is None else min(limit, len(self.images))


def _whole_numbers(labels: np.ndarray) -> np.ndarray:
    """(N,) int64. Raises ValueError for what would be cut to be one."""
    if labels.dtype.kind not in "iu" and not (
        labels.dtype.kind == "f" and (labels == labels.round()).all()
    ):
        raise ValueError(f"{LABELS} is {labels.dtype}, and class numbers are whole")
    return labels.astype(np.int64)


def measure_generation(
    pipeline: Pipeline, folder: Path | None = None, kind: str = "generation"
) -> Record:
    """The record of RUN/samples, or of another `folder` and `kind`: the kept one if current, else
    measured and kept."""
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
        "n": samples.count(options.num),
        "data": [split.identity() for split in (pipeline.train, pipeline.held_out)],
        "data_n": [len(pipeline.places(split)) for split in (pipeline.train, pipeline.held_out)],
        "extractors": [extractor.settings for extractor in pipeline.extractors],
        "clip": pipeline.clip and pipeline.clip.settings,
        "reference_sha256": _hash_reference(options.reference),
        "batch_size": options.batch_size,
        "reconstruction": reconstruction.hash,
    }
    kept = Record.load(pipeline.report_folder, kind, settings)
    if kept and not options.fresh:
        return kept

    protocol = {"batch_size": options.batch_size}
    subject: dict[str, Any] = {"samples_sha256": samples.sha256}
    subject |= {
        name: value for name, value in samples.made_from.items() if name.endswith("_sha256")
    }
    if "options" in samples.made_from:
        subject["seed"] = samples.made_from["options"]["seed"]
    origins = Origins(
        samples=Origin("samples", protocol | {"data": pipeline.held_out.identity()}, subject),
        held_out=Origin("held-out", protocol | {"data": pipeline.held_out.identity()}, {}),
        train=Origin("train", protocol | {"data": pipeline.train.identity()}, {}),
    )
    measurements: list[Measurement] = []
    drawn: dict[str, Extraction] = {}
    notes = [line for line in map(banner, pipeline.extractors) if line]
    arrays = _sample_pictures(samples, settings["n"], pipeline.tokens.num_classes)
    counts = Counts(dict(zip(SETS, (settings["n"], *reversed(settings["data_n"])))))
    for extractor in pipeline.extractors:
        seen = _extract(pipeline, extractor, samples, settings["n"])
        counts.sets[SPACED] = len(seen.train.features)
        drawn[extractor.name] = seen.samples
        measurements += _distances(extractor, seen, origins, counts)
        measurements += _kernel_distances(extractor, seen, origins, counts)
        measurements += [
            m for m in reconstruction.measurements if m.name == figure_name("rFD", extractor)
        ]
        if getattr(extractor, "task", "classes") == "rotation":
            notes.append(
                f"The score of class probabilities is left out: {extractor.name} knows no classes."
            )
        elif seen.samples.probabilities.shape[1]:
            measurements += _scores(extractor, seen, origins, counts)
        measurements += _manifolds(extractor, seen, origins, counts)
        if extractor is pipeline.in_domain:
            agreement = _agreement(pipeline, seen, samples, origins)
            measurements += agreement.measurements
            arrays |= agreement.arrays
            notes += agreement.notes
            if counts.suffice("nearer to train than held-out images", SAMPLES, HELD_OUT):
                copying = _copying(pipeline, seen, samples, origins)
                measurements += copying.measurements
                arrays |= copying.arrays
    if pipeline.clip:
        measurements += _clip_distances(pipeline, samples, settings["n"], origins, counts)
    if options.reference and counts.suffice("a Fréchet distance", SAMPLES):
        features = drawn[pipeline.judge.name].features
        measurements.append(_to_reference(pipeline, options.reference, features, origins.samples))
    record = Record(kind, settings, measurements, arrays, notes + counts.notes)
    return pipeline.keep(record)


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
    train_features: Tensor | None  # of the whole split, by the in-domain extractor alone


@dataclasses.dataclass(frozen=True)
class Seen(Real):
    """And of samples."""

    samples: Extraction


def _extract(pipeline: Pipeline, extractor: Extractor, samples: Samples, n: int) -> Seen:
    drawn = FeatureRows(extractor)
    for batch in share(
        torch.arange(n), pipeline.options.batch_size, samples.load, f"samples, {extractor.name}"
    ):
        drawn.update(batch)
    return Seen(**vars(_extract_real(pipeline, extractor)), samples=drawn.gathered())


@functools.lru_cache(maxsize=2)
def _extract_real(pipeline: Pipeline, extractor: Extractor) -> Real:
    """Kept, because several sets of samples may be measured against the same images."""
    held_out, train, whole, name = *(FeatureRows(extractor) for _ in range(3)), extractor.name
    for batch in pipeline.batches(pipeline.held_out, f"held-out images, {name}"):
        held_out.update(batch)
    moments = Moments.empty(extractor.dim)
    stride = max(1, len(pipeline.train) // len(pipeline.held_out))
    for batch in pipeline.batches(pipeline.train, f"train images, {name}"):
        extraction = extractor(batch.images)
        moments.update(extraction.features)
        kept = batch.ids % stride == 0
        train.add(
            batch.ids[kept], Extraction(extraction.features[kept], extraction.probabilities[kept])
        )
        if isinstance(extractor, InDomain):
            whole.add(batch.ids, extraction)
    features = whole.gathered().features if isinstance(extractor, InDomain) else None
    return Real(held_out.gathered(), train.gathered(), moments.reduced(), features)


def _distances(
    extractor: Extractor, seen: Seen, origins: Origins, counts: Counts
) -> list[Measurement]:
    name, rows, real = figure_name("FD", extractor), seen.samples.features, seen.held_out.features
    to_train = {"reference": "train split", "reference_n": seen.train_moments.count}
    to_held_out = {"reference": "held-out split", "reference_n": len(real)}
    found = []
    if counts.suffice("a Fréchet distance", SAMPLES, HELD_OUT):
        target = Gaussian.of_features(real)
        found.append(
            measure_frechet(
                origins.samples, f"{name} to held-out", extractor, rows, target, **to_held_out
            )
        )
    train = (
        Gaussian.of_moments(seen.train_moments)
        if counts.suffice("a Fréchet distance", TRAIN)
        else None
    )
    if train and counts.suffice("a Fréchet distance", SAMPLES):
        found.append(
            measure_frechet(origins.samples, f"{name} to train", extractor, rows, train, **to_train)
        )
    if train and counts.suffice("a distance at endless N", SAMPLES):
        least = len(rows) // 10
        line = frechet_infinity(rows, train, INFINITY_POINTS, least)
        how = (
            to_train
            | extractor.settings
            | {"points": INFINITY_POINTS, "least": least, "draw_seed": 0}
        )
        details = {
            "slope": line.slope,
            "counts": list(line.counts),
            "distances": list(line.distances),
        }
        endless = f"{figure_name('FD∞', extractor)} to train"
        found.append(
            origins.samples.measure(
                endless, line.value, "", False, len(rows), details=details, **how
            )
        )
    if train and counts.suffice("a Fréchet distance", HELD_OUT):
        found.append(
            measure_frechet(
                origins.held_out, f"{name} of real images", extractor, real, train, **to_train
            )
        )
    return found


def _kernel_distances(
    extractor: Extractor, seen: Seen, origins: Origins, counts: Counts
) -> list[Measurement]:
    real, found = seen.held_out.features, []
    for suffix, origin, rows, count in (
        (" to held-out", origins.samples, seen.samples.features, SAMPLES),
        (" of real images", origins.train, seen.train.features, SPACED),
    ):
        if not counts.suffice("a kernel distance", count, HELD_OUT):
            continue
        least = min(len(rows), len(real))
        size = KERNEL_SUBSET_SIZE if least >= KERNEL_SUBSET_SIZE else least // 2
        distance = kernel_distance(rows, real, KERNEL_SUBSETS, size)
        how = extractor.settings | {
            "reference": "held-out split",
            "reference_n": len(real),
            "kernel": "(xy/D + 1)^3",
        }
        how |= {"subsets": distance.subsets, "subset_size": distance.subset_size, "draw_seed": 2020}
        details = {"deviation_over_subsets": distance.deviation}
        name = figure_name("KD", extractor) + suffix
        found.append(
            origin.measure(name, distance.mean, "", False, len(rows), details=details, **how)
        )
    return found


def _clip_distances(
    pipeline: Pipeline, samples: Samples, n: int, origins: Origins, counts: Counts
) -> list[Measurement]:
    """CMMD, of samples and of real images."""
    extractor, held_out, train, drawn = (
        pipeline.clip,
        *(FeatureRows(pipeline.clip) for _ in range(3)),
    )
    for rows, batches in (
        (held_out, pipeline.batches(pipeline.held_out, "held-out images, clip")),
        (train, pipeline.batches(pipeline.train, "train images, clip")),
        (drawn, share(torch.arange(n), pipeline.options.batch_size, samples.load, "samples, clip")),
    ):
        for batch in batches:
            rows.update(batch)
    real, found = held_out.gathered().features, []
    for suffix, origin, rows, count in (
        ("", origins.samples, drawn, SAMPLES),
        (" of real images", origins.train, train, TRAIN),
    ):
        if not counts.suffice("CMMD", count, HELD_OUT):
            continue
        features = rows.gathered().features
        how = extractor.settings | {"reference": "held-out split", "reference_n": len(real)}
        name = figure_name("MMD", extractor) + suffix
        found.append(origin.measure(name, cmmd(features, real), "", False, len(features), **how))
    return found


def _hash_reference(path: Path | None) -> str | None:
    if path is not None and not path.is_file():
        raise UserError(
            f"--reference {path}: no such file: give an ADM reference, or make one: eval.run reference-stats"
        )
    return path and sha256(path)


def _to_reference(pipeline: Pipeline, path: Path, features: Tensor, origin: Origin) -> Measurement:
    """The distance of samples' features by `pipeline.judge` to a file's statistics."""
    extractor = pipeline.judge
    reference = read_reference(
        path, extractor, pipeline.options.batch_size, pipeline.held_out.image_size
    )
    own = Origin(origin.split, {"batch_size": pipeline.options.batch_size}, origin.subject)
    name = f"{figure_name('FD', extractor)} to {path.name}"
    return measure_frechet(own, name, extractor, features, reference.gaussian, **reference.settings)


def _scores(
    extractor: Extractor, seen: Seen, origins: Origins, counts: Counts
) -> list[Measurement]:
    found = []
    for suffix, origin, rows, count in (
        ("", origins.samples, seen.samples.probabilities, SAMPLES),
        (" of real images", origins.held_out, seen.held_out.probabilities, HELD_OUT),
    ):
        if not counts.suffice("a score of class probabilities", count):
            continue
        score = inception_score(rows, IS_SPLITS)
        settings = extractor.settings | {
            "classes": rows.shape[1],
            "splits": score.splits,
            "shuffle_seed": 2020,
        }
        details = {"deviation": score.deviation}
        name = figure_name("IS", extractor) + suffix
        found.append(
            origin.measure(name, score.mean, "", True, len(rows), details=details, **settings)
        )
    return found


def _manifolds(
    extractor: Extractor, seen: Seen, origins: Origins, counts: Counts
) -> list[Measurement]:
    real = _spread(seen.held_out.features)
    found = []
    for suffix, origin, rows, count in (
        ("", origins.samples, seen.samples.features[:MANIFOLD_LIMIT], SAMPLES),
        (" of real images", origins.train, _spread(seen.train.features), SPACED),
    ):
        if not counts.suffice("precision, recall, density and coverage", count, HELD_OUT):
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
class Part:
    """Of a record."""

    measurements: list[Measurement]
    arrays: dict[str, np.ndarray]
    notes: list[str]


def _copying(pipeline: Pipeline, seen: Seen, samples: Samples, origins: Origins) -> Part:
    """Samples against their nearest training images, and the pictures of those that lie nearest."""
    extractor, places = pipeline.in_domain, pipeline.places(pipeline.train)
    found = find_copying(seen.samples.features, seen.held_out.features, seen.train_features)
    n = len(seen.samples.features)
    how = extractor.settings | {
        "train_n": len(places),
        "beside": "held-out images",
        "beside_n": len(seen.held_out.features),
    }
    name = figure_name("nearer to train than held-out images", extractor)
    figure = origins.samples.measure(
        name, found.nearer, "%", False, n, interval=found.interval, **how
    )
    closest = found.distances[:, 0].argsort(stable=True)[:SHOWN_NEAREST]
    neighbours = [
        pixels(load(pipeline.train, places[column])) for column in found.neighbours[closest].T
    ]
    arrays = {
        "nearest_samples": samples.images[closest.numpy()],
        "nearest_train": np.stack(neighbours),
        "nearest_percentiles": found.percentiles[closest].numpy(),
        "percentiles": found.percentiles.numpy(),
    }
    return Part([figure], arrays, [])


def _agreement(pipeline: Pipeline, seen: Seen, samples: Samples, origins: Origins) -> Part:
    """Share of samples whose label the in-domain classifier recognises, and of real held-out
    images."""
    classifier: InDomain = pipeline.in_domain
    if classifier.task != "classes":
        return Part([], {}, ["Class agreement is left out: the data has fewer than two classes."])
    real_labels = pipeline.held_out.labels[pipeline.places(pipeline.held_out)]
    real = _recognised(seen.held_out, real_labels)
    found = [_share(origins.held_out, "classifier accuracy on real images", real, classifier)]
    if samples.labels is None:
        return Part(found, {}, ["Class agreement is left out: samples.npz has no labels (arr_1)."])
    labels = torch.from_numpy(samples.labels[: len(seen.samples.features)])
    if not bool(((labels >= 0) & (labels < classifier.num_classes)).all()):
        return Part(found, {}, ["Class agreement is left out: the samples are unconditional."])
    hits = _recognised(seen.samples, labels)
    totals = labels.bincount(minlength=classifier.num_classes)
    right = labels[hits].bincount(minlength=classifier.num_classes)
    per_class = {
        name: round(100 * int(good) / int(total), 2)
        for name, good, total in zip(pipeline.tokens.class_names, right, totals)
        if total
    }
    found.insert(
        0, _share(origins.samples, "class agreement", hits, classifier, per_class=per_class)
    )
    notes, accuracy = [], float(real.double().mean())
    if accuracy < TRUSTED_ACCURACY:
        notes.append(
            f"{classifier.name} recognises only {100 * accuracy:.0f} % of real held-out images: class agreement and "
            "the distances by its features say little here."
        )
    return Part(found, {"agreement_right": right.numpy(), "agreement_total": totals.numpy()}, notes)


def _recognised(extraction: Extraction, labels: Tensor) -> Tensor:
    return extraction.probabilities.argmax(1) == labels


def _share(
    origin: Origin, name: str, hits: Tensor, classifier: InDomain, **details: Any
) -> Measurement:
    count, n = int(hits.sum()), len(hits)
    interval = share_interval(count, n)
    return origin.measure(
        name,
        100 * count / n,
        "%",
        True,
        n,
        interval=interval,
        details=details,
        **classifier.settings,
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
