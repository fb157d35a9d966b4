"""A prior that begins with the weights of another one, trained here or published."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor, nn

from priors.record import read_record
from training import distributed
from training.checkpoint import load_weights
from training.errors import UserError


def begin_with(prior: nn.Module, run_folder: Path) -> None:
    """Fill a new prior with a finished run's weights.

    The classes may be others than there: then those of this prior begin anew, and the unconditional
    one is taken over. Raises UserError, naming what, where anything else differs.
    """
    record, weights, own = read_record(run_folder), load_weights(run_folder), prior.state_dict()
    if record.layout.num_codes != prior.layout.num_codes:
        raise UserError(
            f"{run_folder}: it is of {record.layout.text}, and these tokens are {prior.layout.text}: "
            "encode the images with its own tokenizer"
        )
    for name in sorted(weights.keys() ^ own.keys()):
        lacking = "these settings have no" if name in weights else "has no"
        raise UserError(
            f"{run_folder}: {lacking} {name}: `prior` must be the same in both runs (kind, sizes, …)"
        )
    more, anew = prior.num_classes - record.num_classes, []
    for name, tensor in weights.items():
        if tensor.shape == own[name].shape:
            continue
        wanted = (tensor.shape[0] + more, *tensor.shape[1:]) if tensor.ndim == 2 else None
        if not more or wanted != tuple(own[name].shape):
            raise UserError(
                f"{run_folder}: {name} is {tuple(tensor.shape)} there and {tuple(own[name].shape)} "
                "by these settings and tokens: `prior` and the grid of codes must be the same"
            )
        weights[name] = with_other_classes(tensor, own[name], record.num_classes)
        anew.append(name)
    prior.load_state_dict(weights)
    if anew and distributed.is_main():
        print(
            f"{run_folder}: it knows {record.num_classes} classes, and there are "
            f"{prior.num_classes}: they begin anew ({', '.join(anew)})",
            flush=True,
        )


def with_other_classes(table: Tensor, fresh: Tensor, num_classes: int) -> Tensor:
    """A table (rows, dim) whose last rows are so many classes and the unconditional one, with the
    classes of `fresh`."""
    before = max(0, len(table) - num_classes - 1)
    return torch.cat([table[:before], fresh[before:-1].to(table), table[-1:]])
