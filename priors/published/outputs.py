"""What a published autoregressive prior gives for a case of priors.published.check."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor, nn

from priors.families.autoregressive import AutoregressivePrior


def autoregressive_outputs(
    prior: AutoregressivePrior, case: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """Of a prior over one grid: logits (B, N, K) in the order of prediction, and likelihoods."""
    if "tokens" not in case or "labels" not in case:
        return {}
    codes, labels = case["tokens"].flatten(1), case["labels"]
    nobody, network = torch.full_like(labels, prior.num_classes), prior.backbone
    makers = {
        "logits.conditional": lambda: logits(network, codes, labels),
        "logits.unconditional": lambda: logits(network, codes, nobody),
        "logits.incremental": lambda: incremental(network, codes, labels),
        "logits.permuted": lambda: permuted(network, codes, labels, case["orders"]),
        "nll.conditional": lambda: prior.nll(codes, labels).nats,
        "nll.unconditional": lambda: prior.nll(codes, nobody).nats,
    }
    return {name: make() for name, make in makers.items() if name in case}


def logits(network: nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
    return torch.cat(network(codes, labels), 1)


def permuted(network: nn.Module, codes: Tensor, labels: Tensor, orders: Tensor) -> Tensor:
    """In the order of prediction."""
    made = torch.cat(network(codes, labels, order=orders), 1)
    return made.gather(1, orders[..., None].expand_as(made))


def incremental(network: nn.Module, codes: Tensor, labels: Tensor) -> Tensor:
    """The same from cached decoding, slot by slot."""
    decoding, previous = network.decoding(labels), [None, *codes.unbind(1)]
    steps = [decoding.step(slot, previous[slot]) for slot in range(codes.shape[1])]
    return torch.stack(steps, 1)
