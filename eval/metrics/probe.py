"""Linear probes: how well a linear classifier tells classes from features (Alain & Bengio 2016,
arXiv:1610.01644).

Multinomial logistic regression on one row per image: the mean of a tokenizer's continuous features
over positions, the same of its quantized vectors, the histogram of its codes. Beside them stand
what they came from, the pretrained encoder, and what needs no training: the same architecture at
random, and the image itself, made small.
"""

from __future__ import annotations

import dataclasses
import warnings
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from eval.pipeline import Pipeline
from eval.record import Measurement, Origin, Record, share_interval
from tokenizer.data.dataset import Images
from tokenizer.data.transforms import to_float
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.interface import CodeLayout
from tokenizer.run import load as load_tokenizer
from training import distributed
from training.errors import UserError
from training.log import Progress
from training.precision import autocast

if TYPE_CHECKING:
    import sklearn.pipeline
    from scipy.sparse import csr_matrix

    Rows = np.ndarray | csr_matrix  # (n, D) float

STRENGTHS = (1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0, 10.0)  # C, the inverse of the L2 penalty
ITERATIONS = 500
FIFTH = 0.2  # of the train split, on which C is chosen
SEED = 0
PIXELS = 16  # the side that images are averaged down to
PRETRAINED = "pretrained encoder"
TRAINED = (
    "continuous features",
    "quantized features",
    "code histograms",
)  # what may lose what the encoder knew


@dataclasses.dataclass(frozen=True)
class Probe:
    """A fitted probe's answers on held-out rows."""

    predictions: np.ndarray  # (m,) int64
    details: dict[
        str, Any
    ]  # the C chosen, the accuracy of each on the chosen fifth, the solver's iterations


def measure_probe(pipeline: Pipeline) -> Record:
    """The record of a tokenizer's probes: the kept one when it is current, else measured and kept.

    Raises UserError where the data has no classes, or --encoder is not what the tokenizer began
    with.
    """
    options, splits = pipeline.options, (pipeline.train, pipeline.held_out)
    if pipeline.train.num_classes < 2:
        raise UserError(
            f"{pipeline.train.name}: a probe needs labels of two or more classes: give the images classes"
        )
    places = [pipeline.places(split) for split in splits]
    train_labels, labels = (split.labels[chosen].numpy() for split, chosen in zip(splits, places))
    views = Views(pipeline.tokenizer_folder, options.encoder)
    protocol = {
        "data": [split.identity() for split in splits],
        "train_n": len(places[0]),
        "batch_size": options.batch_size,
        "classifier": "multinomial logistic regression, L2, on standardised rows",
        "chosen_from": {"C": list(STRENGTHS), "share_of_train": FIFTH, "seed": SEED},
        "iterations": ITERATIONS,
        **pipeline.how,
    }
    subject = {"tokenizer_sha256": pipeline.tokenizer_hash} | views.subject
    settings = {**protocol, **subject, "n": len(labels), "pixels": PIXELS}
    kept = Record.load(pipeline.report_folder, "probe", settings)
    if kept and not options.fresh:
        return kept

    train, held_out = (read_rows(views, pipeline, split) for split in splits)
    split = (
        "held-out"
        if len(labels) == len(pipeline.held_out)
        else f"held-out, {len(labels)} of {len(splits[1])}"
    )
    origin = Origin(split, protocol, subject)
    measurements: list[Measurement] = []
    arrays = {"labels": labels}
    progress = Progress("probes", len(train))
    for name in train:
        if distributed.is_main():
            progress.show(len(measurements), name)
        found = fit_probe(train[name], train_labels, held_out[name])
        hits = int((found.predictions == labels).sum())
        measurements.append(
            origin.measure(
                f"probe accuracy, {name}",
                100 * hits / len(labels),
                "%",
                True,
                len(labels),
                interval=share_interval(hits, len(labels)),
                details=found.details,
                dimension=train[name].shape[1],
            )
        )
        arrays[f"predictions, {name}"] = found.predictions
    record = Record("probe", settings, [*measurements, *kept_shares(measurements, origin)], arrays)
    if not views.pretrained:
        record.notes.append(
            "The pretrained encoder's probe is left out: it was not given (--encoder)."
        )
    return pipeline.keep(record)


def kept_shares(measurements: list[Measurement], origin: Origin) -> list[Measurement]:
    """How much of the pretrained encoder's accuracy is left, in percent; nothing where that was not
    measured."""
    values = {figure.name.removeprefix("probe accuracy, "): figure for figure in measurements}
    if PRETRAINED not in values or not values[PRETRAINED].value:
        return []
    whole = values[PRETRAINED].value
    return [
        origin.measure(
            f"pretrained accuracy kept, {name}",
            100 * values[name].value / whole,
            "%",
            True,
            values[name].n,
        )
        for name in TRAINED
    ]


class Views:
    """What is probed: images (B, 3, H, W) in [-1, 1] -> rows by name, (B, D) float32; codes (B, N)
    int64."""

    def __init__(self, folder: Path, encoder: str | None = None) -> None:
        """`folder` is the tokenizer's run, `encoder` names the pretrained encoder that it began
        with."""
        tokenizer = load_tokenizer(folder)
        self.layout: CodeLayout = tokenizer.layout
        model, size = tokenizer.config.model, tokenizer.config.data.image_size
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(SEED)
            self.random = _ready(model.build(size, folder / "weights").encoder)
        self.pretrained: nn.Module | None = None
        self.subject: dict[str, str] = {}
        if encoder is not None:
            if not isinstance(model.encoder, FoundationConfig):
                raise UserError(
                    f"--encoder: {folder} began with no pretrained encoder: leave the option out"
                )
            self.pretrained = _ready(
                dataclasses.replace(model.encoder, name=encoder, frozen=True).build(size)
            )
            if _shapes(self.pretrained) != _shapes(tokenizer.encoder):
                raise UserError(
                    f"--encoder {encoder}: {folder} began with one of other dimensions: name that one"
                )
            self.subject["encoder_sha256"] = self.pretrained.fingerprint()
        tokenizer.decoder = (
            nn.Identity()
        )  # what it would be given comes out, and nothing is decoded
        self.tokenizer = tokenizer
        pretrained = [PRETRAINED] if self.pretrained else []
        self.names = (*TRAINED[:2], "random encoder", *pretrained, "pixels", TRAINED[2])

    @torch.no_grad()
    def __call__(self, images: Tensor) -> dict[str, Tensor]:
        made = self.tokenizer(images)
        maps = {
            TRAINED[0]: made.features,
            TRAINED[1]: made.images,
            "random encoder": self.random(images),
        }
        if self.pretrained:
            maps[PRETRAINED] = self.pretrained(images)
        rows = {name: features.float().mean((2, 3)) for name, features in maps.items()}
        return rows | {
            "pixels": F.adaptive_avg_pool2d(images, PIXELS).flatten(1),
            TRAINED[2]: made.codes,
        }


def _ready(encoder: nn.Module) -> nn.Module:
    return encoder.to(distributed.device()).eval().requires_grad_(False)


def _shapes(module: nn.Module) -> dict[str, torch.Size]:
    return {name: tensor.shape for name, tensor in module.state_dict().items()}


def read_rows(views: Views, pipeline: Pipeline, images: Images) -> dict[str, Rows]:
    """One pass over a split: every view's rows, in order of place and over ranks."""
    parts: dict[str, list[Tensor]] = {
        name: [] for name in ("ids", *views.names)
    }  # a rank may have no batch
    for batch in pipeline.batches(images, f"features, {images.split}"):
        with autocast(pipeline.precision, batch.images.device):
            found = views(to_float(batch.images))
        for name, rows in ({"ids": batch.ids} | found).items():
            parts[name].append(rows.cpu())
    gathered = {name: distributed.gather_parts(rows) for name, rows in parts.items()}
    order = gathered.pop("ids").argsort()
    found: dict[str, Rows] = {name: rows[order].numpy() for name, rows in gathered.items()}
    return found | {TRAINED[2]: histograms(found[TRAINED[2]], views.layout)}


def histograms(codes: np.ndarray, layout: CodeLayout) -> csr_matrix:
    """(n, N) codes -> (n, sum of K), the square root of each code's share of its level."""
    from scipy.sparse import csr_matrix

    starts, shares, first = np.empty(layout.length, np.int64), np.empty(layout.length), 0
    for span, size in layout.spans():
        starts[span], shares[span] = first, 1 / (span.stop - span.start)
        first += size
    n, length = codes.shape
    columns, data = (codes + starts).ravel(), np.tile(shares, n)
    found = csr_matrix((data, columns, np.arange(n + 1) * length), (n, first))
    found.sum_duplicates()
    return found.sqrt()


def fit_probe(train: Rows, labels: np.ndarray, held_out: Rows) -> Probe:
    """Choose C on a fifth of the train rows, fit on all of them, and classify the held-out ones.

    Raises UserError when no class, or only one, has two rows.
    """
    chosen = stratified(labels, FIFTH, SEED)
    if len(np.unique(labels[chosen])) < 2:
        raise UserError(
            "a probe needs two train images of each of two classes or more: raise --num"
        )
    accuracies: dict[float, float] = {}
    for strength in STRENGTHS:
        fitted = fit(train[~chosen], labels[~chosen], strength)
        accuracies[strength] = 100 * float((fitted.predict(train[chosen]) == labels[chosen]).mean())
        if max([*accuracies.values()][-2:]) < max(accuracies.values()):
            break  # twice below the best: weaker penalties overfit, and take the longest
    strength = max(accuracies, key=accuracies.__getitem__)  # of equals the strongest penalty
    fitted = fit(train, labels, strength)
    iterations = int(fitted[-1].n_iter_.max())
    by_strength = {f"{each:g}": round(accuracy, 2) for each, accuracy in accuracies.items()}
    details = {"C": strength, "accuracy_by_C": by_strength, "iterations": iterations}
    return Probe(fitted.predict(held_out), details | {"converged": iterations < ITERATIONS})


def fit(rows: Rows, labels: np.ndarray, strength: float) -> sklearn.pipeline.Pipeline:
    """Standardise by the statistics of these rows, then minimise the penalised cross-entropy.

    Sparse rows are scaled alone: the intercept, which is not penalised, makes up for their mean.
    """
    from scipy.sparse import issparse
    from sklearn.exceptions import ConvergenceWarning
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    scaler = StandardScaler(with_mean=not issparse(rows))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", ConvergenceWarning)  # noted in the details
        return make_pipeline(scaler, LogisticRegression(C=strength, max_iter=ITERATIONS)).fit(
            rows, labels
        )


def stratified(labels: np.ndarray, share: float, seed: int) -> np.ndarray:
    """(n,) bool: a share of each class at random, at least one of each that has two."""
    generator = np.random.default_rng(seed)
    chosen = np.zeros(len(labels), bool)
    for label in np.unique(labels):
        members = generator.permutation(np.flatnonzero(labels == label))
        chosen[members[: min(len(members) - 1, max(1, round(share * len(members))))]] = True
    return chosen
