"""What tokens cost, in four tiers: fixed-length codes, unigram entropy, a prior's cross-entropy,
and real files.

The first three are what no file reaches. Only figures of one tier compare.
"""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import torch
from torch import Tensor

from eval.metrics.codec import CodeModel, PriorModel, TableModel, TokenFile, encode_tokens
from eval.record import Measurement, Origin, mean_interval
from eval.report.tables import number
from priors.interface import Prior
from tokenizer.interface import CodeLayout
from training.errors import UserError


@dataclasses.dataclass(frozen=True)
class Rate:
    """One tier, as mean over n images."""

    name: str
    bits: float  # per image
    n: int
    settings: dict[str, Any]  # how it was counted
    details: dict[str, Any] = dataclasses.field(default_factory=dict)
    interval: tuple[float, float] | None = None  # 95 %, over images

    def measurements(self, origin: Origin, num_pixels: int) -> list[Measurement]:
        """Per image and per pixel."""
        found = []
        for suffix, unit, share in (
            ("", "bits/image", 1),
            (" per pixel", "bits/pixel", num_pixels),
        ):
            interval = self.interval and (self.interval[0] / share, self.interval[1] / share)
            own = {"details": self.details, "interval": interval, **self.settings}
            found.append(
                origin.measure(
                    f"rate{suffix}, {self.name}", self.bits / share, unit, None, self.n, **own
                )
            )
        return found


@dataclasses.dataclass(frozen=True)
class Rates:
    found: list[Rate]
    notes: list[str]  # what is left out, and why

    def measurements(self, origin: Origin, num_pixels: int) -> list[Measurement]:
        return [
            measurement
            for rate in self.found
            for measurement in rate.measurements(origin, num_pixels)
        ]

    def table(self, num_pixels: int) -> str:
        """Markdown."""
        rows = [
            "| rate | bits per image | 95 % | bits per pixel | N | |",
            "|---|--:|--:|--:|--:|---|",
        ]
        for rate in self.found:
            interval = " … ".join(map(number, rate.interval or ()))
            cells = [
                rate.name,
                number(rate.bits),
                interval,
                number(rate.bits / num_pixels),
                f"{rate.n:,}",
            ]
            rows.append("| " + " | ".join([*cells, rate.settings["rate"]]) + " |")
        return "\n".join(rows)


def find_rates(
    codes: Tensor,
    layout: CodeLayout,
    *,
    split_table: TableModel | None = None,
    prior: Prior | None = None,
    labels: Tensor | None = None,
    batch_size: int = 64,
    num_single: int = 16,
) -> Rates:
    """All tiers of (n, N) int64 codes; `num_single` images that lie evenly among them become files
    of their own.

    `split_table` is the train split's (eval.metrics.codec.TableModel.of_split); a prior conditions on the
    (n,) labels. Raises ValueError without codes, and UserError where a model is of another layout.
    """
    if not len(codes):
        raise ValueError("there are no codes: a rate is a mean over images")
    n, notes, table = len(codes), [], TableModel.of_codes(codes, layout)
    entropy = float(table.ideal_bits(codes).mean())
    found = [
        Rate("fixed", layout.bits, n, {"rate": "tokens x log2 K"}),
        Rate(
            "unigram entropy",
            entropy,
            n,
            {"rate": "plug-in entropy per level, of these codes themselves"},
        ),
    ]
    files = [("a table in it", None, None)]
    if split_table:
        bits = split_table.ideal_bits(codes)
        how = {"rate": "-log2 p of another split's table", "table_sha256": split_table.sha256}
        found.append(
            Rate("unigram cross-entropy", float(bits.mean()), n, how, interval=mean_interval(bits))
        )
        files.append(("another split's table", split_table, None))
    if prior is not None:
        rate = _prior_rate(codes, prior, labels, batch_size)
        if rate:
            found.append(rate)
        else:
            notes.append("The prior's cross-entropy is left out: its loss is no likelihood.")
        try:
            files.append(("the prior", PriorModel(prior, batch_size), labels))
        except UserError as error:
            notes.append(f"Files coded by the prior are left out: {error}.")
    for name, model, with_labels in files:
        found.append(_one_file(name, codes, layout, model, with_labels))
        if num_single and model:  # a table of one image's own codes is larger than they are
            found.append(_single_files(name, codes, layout, model, with_labels, num_single))
    return Rates(found, notes)


def _prior_rate(codes: Tensor, prior: Prior, labels: Tensor | None, batch_size: int) -> Rate | None:
    conditions = torch.full((len(codes),), prior.num_classes) if labels is None else labels
    device = next(prior.parameters()).device
    parts, kind = [], "none"
    for some, given in zip(codes.split(batch_size), conditions.split(batch_size)):
        likelihood = prior.nll(some.to(device), given.to(device))
        kind = likelihood.kind
        if kind == "none":
            return None
        parts.append(likelihood.nats.cpu() / math.log(2))
    bits = torch.cat(parts)
    what = "-log2 p" if kind == "exact" else "upper bound of -log2 p"
    given = "no label" if labels is None else "the class label, which is not counted"
    how = {"rate": f"{what} of the prior, given {given}", "likelihood": kind}
    return Rate(
        "prior cross-entropy", float(bits.mean()), len(bits), how, interval=mean_interval(bits)
    )


def _one_file(
    name: str, codes: Tensor, layout: CodeLayout, model: CodeModel | None, labels: Tensor | None
) -> Rate:
    data, n = encode_tokens(codes, layout, model, labels), len(codes)
    payload = len(TokenFile.from_bytes(data).payload)
    ideal = (model or TableModel.of_codes(codes, layout)).ideal_bits(codes, labels)
    sizes = {"bytes": len(data), "payload_bytes": payload, "ideal_bytes": float(ideal.sum()) / 8}
    how = {
        "rate": f"one file of all images, decoded to the same codes; {_counted(labels)}",
        "model": name,
    }
    return Rate(f"file, coded by {name}", 8 * len(data) / n, n, how, sizes)


def _single_files(
    name: str,
    codes: Tensor,
    layout: CodeLayout,
    model: CodeModel,
    labels: Tensor | None,
    num_single: int,
) -> Rate:
    places = torch.linspace(0, len(codes) - 1, min(num_single, len(codes))).long()
    alone = places[:, None].unbind()  # (1,) each
    files = [
        encode_tokens(codes[i], layout, model, None if labels is None else labels[i]) for i in alone
    ]
    bits = torch.tensor([8 * len(data) for data in files], dtype=torch.float64)
    payload = sum(len(TokenFile.from_bytes(data).payload) for data in files) / len(files)
    how = {
        "rate": f"a file for each image, decoded to the same codes; {_counted(labels)}",
        "model": name,
    }
    details = {"payload_bytes": payload, "bytes": float(bits.mean()) / 8}
    return Rate(
        f"file per image, coded by {name}",
        float(bits.mean()),
        len(bits),
        how,
        details,
        mean_interval(bits),
    )


def _counted(labels: Tensor | None) -> str:
    return "with header" if labels is None else "with header and class labels"
