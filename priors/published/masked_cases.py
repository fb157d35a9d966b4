"""What a case holds of a prior that predicts masked codes: ids with masks, and logits of all."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor


def masked_outputs(
    case: Mapping[str, Tensor],
    num_classes: int,
    mask_id: int,
    logits: Callable[[Tensor, Tensor], Tensor],
) -> dict[str, Tensor]:
    """`input_ids`: tokens with `mask_id` where `masked`; `logits.conditional`, `.unconditional` of
    them.

    `logits` takes ids with -1 for the mask, in the case's shape, and labels (B,).
    """
    if "tokens" in case and "masked" in case:
        ids = case["tokens"].masked_fill(case["masked"], mask_id)
    elif "input_ids" in case:
        ids = case["input_ids"]
    else:
        return {}
    made, codes = {"input_ids": ids}, torch.where(ids == mask_id, -1, ids)
    if "labels" in case:
        labels = case["labels"]
        made["logits.conditional"] = logits(codes, labels)
        made["logits.unconditional"] = logits(codes, torch.full_like(labels, num_classes))
    return made
