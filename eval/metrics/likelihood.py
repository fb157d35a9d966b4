"""What held-out codes cost a prior: negative log-likelihood, exact or a bound, and never another
loss."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch

import priors
from eval.pipeline import Pipeline
from eval.record import Measurement, Origin, Record, mean_interval
from priors.record import read_record
from training import distributed
from training.checkpoint import weights_hash
from training.errors import UserError
from training.log import Progress
from training.precision import autocast

NATS_PER_BIT = float(np.log(2))


def measure_likelihood(pipeline: Pipeline, folder: Path, kind: str = "likelihood") -> Record:
    """The record of a prior's run: the kept one if current, else measured on held-out codes and
    kept.

    In nats per token, bits per pixel (of height x width) and bits per image. Raises UserError for a
    prior that was trained on other tokens than the pipeline's.
    """
    about, options = read_record(folder), pipeline.options
    if about.tokenizer_sha256 != pipeline.tokenizer_hash:
        raise UserError(
            f"{folder}: trained on codes of a tokenizer with weights {about.tokenizer_sha256[:8]}…, and "
            f"{pipeline.folder} has {pipeline.tokenizer_hash[:8]}…: train the prior on these tokens"
        )
    split, places = pipeline.tokens.split("held_out"), pipeline.places(pipeline.held_out)
    settings = {
        "prior_sha256": weights_hash(folder),
        "tokens_sha256": about.tokens_sha256,
        "data": pipeline.held_out.identity(),
        "n": len(places),
        "batch_size": options.batch_size,
        **pipeline.how,
    }
    kept = Record.load(pipeline.report_folder, kind, settings)
    if kept and not options.fresh:
        return kept
    prior, device = priors.load(folder), distributed.device()
    parts = places.split(options.batch_size)
    progress, nats, label = Progress(f"{folder.name}: likelihood", len(places)), [], "none"
    for index, own in enumerate(parts[distributed.rank() :: distributed.world()]):
        codes = torch.from_numpy(np.asarray(split.codes[own.tolist(), 0]).astype(np.int64)).to(
            device
        )
        labels = torch.as_tensor(split.labels)[own].to(device)
        with autocast(
            pipeline.precision, device
        ):  # of the network; its logits become probabilities in float64
            found = prior.nll(codes, labels)
        nats.append(torch.stack([own.double(), found.nats.cpu()], 1))
        label = found.kind
        if distributed.is_main():
            progress.show(
                min(len(places), (index + 1) * options.batch_size * distributed.world()), ""
            )
    rows = distributed.gather_parts(nats)
    values = rows[rows[:, 0].argsort(), 1]
    subject = {
        "prior_sha256": settings["prior_sha256"],
        "tokenizer_sha256": pipeline.tokenizer_hash,
    }
    how = {"data": pipeline.held_out.identity(), "kind": label, **pipeline.how}
    origin = Origin("held-out", how, subject)
    record = Record(
        kind, settings, figures(values, origin, label, prior.layout.length, pipeline), {}
    )
    return pipeline.keep(record)


def figures(
    nats: torch.Tensor, origin: Origin, label: str, length: int, pipeline: Pipeline
) -> list[Measurement]:
    """(N,) nats per image -> the same in three units; nothing where the loss is no likelihood."""
    if label == "none":
        return []
    found = []
    size = pipeline.held_out.image_size
    for name, unit, scale in (
        ("NLL", "nats/token", 1 / length),
        ("rate, prior", "bits/image", 1 / NATS_PER_BIT),
        ("rate, prior", "bits/pixel", 1 / NATS_PER_BIT / size**2),
    ):
        values = nats * scale
        name = f"{name} ({label}), {unit}"
        mean, interval = float(values.mean()), mean_interval(values)
        found.append(
            origin.measure(
                name, mean, unit, False, len(values), interval=interval, tokens_per_image=length
            )
        )
    return found
