"""What Python code of others calls: samples of a trained prior as a tensor."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from generate.images import load_models
from generate.sample import find_prior
from priors.record import read_record
from tokenizer.data.transforms import to_uint8
from training import distributed
from training.errors import UserError


def sample_images(
    run: str | Path,
    labels: Sequence[int | str] | Tensor,
    *,
    batch_size: int = 50,
    first_id: int = 0,
    **settings: Any,
) -> Tensor:
    """Images of a trained prior, (len(labels), 3, H, W) uint8 on the CPU.

    `run` is a prior's folder or a pipeline's root; `labels` are class numbers or names, and the
    number of classes stands for none. `settings` are fields of SampleOptions (guidance,
    temperature, top_k, steps, seed, …), by default those that the prior was trained with. Image i
    depends on the seed, on first_id + i and on its label alone.

    Raises UserError where there is no prior, its tokenizer has changed, or a value is out of range.
    """
    folder = find_prior(Path(run).expanduser())
    record = read_record(folder)
    known = {field.name for field in dataclasses.fields(record.sampling)}
    if unknown := sorted(settings.keys() - known):
        raise UserError(f"{unknown[0]} is no setting of sampling: {', '.join(sorted(known))}")
    options = dataclasses.replace(record.sampling, **settings)
    numbers = _numbers(labels, record.class_names)
    prior, decoder = load_models(folder, record)
    device, images = distributed.device(), []
    for start in range(0, len(numbers), batch_size):
        part = torch.tensor(numbers[start : start + batch_size], device=device)
        ids = torch.arange(start, start + len(part), device=device) + first_id
        with torch.no_grad():
            images.append(to_uint8(decoder.decode(prior.sample(part, options, ids))).cpu())
    return torch.cat(images)


def _numbers(labels: Sequence[int | str] | Tensor, names: list[str]) -> list[int]:
    given = labels.tolist() if isinstance(labels, Tensor) else list(labels)
    found = [names.index(each) if each in names else each for each in given]
    for number in found:
        if not isinstance(number, int) or not 0 <= number <= len(names):
            raise UserError(
                f"label {number!r} is no class: give a number from 0 to {len(names)} (none of them), "
                f"or one of {', '.join(names[:10])}"
            )
    if not found:
        raise UserError("labels: there are none")
    return found
