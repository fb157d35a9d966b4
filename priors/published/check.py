"""A published prior against a case: inputs, and what its authors' code makes of them.

A case is a folder with the weights under published names, the configuration (config.json) and
case.safetensors: `tokens`, `labels` and what is computed of them (`logits.conditional`,
`logits.unconditional`, `logits.incremental`, which are the cached decoding's, `nll.conditional`,
ids, ...), further ones with their own prefix (`wide.tokens`), and under `raw.` what the weights
give that are no averages. Which names a kind has is its peer's to say.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor, nn

from priors.families.autoregressive import AutoregressivePrior
from tokenizer.published.check import RAW, Difference, difference, fitted, read_case

INPUTS = ("tokens", "labels", "masked", "orders")  # the first names the group


@torch.no_grad()
def check(folder: Path, kind: str | None = None) -> tuple[list[Difference], dict[str, Tensor]]:
    """All that a case holds against what is computed here, and the latter under the case's names.

    Raises UserError when the folder holds no case, or its weights cannot be loaded.
    """
    from priors.published.load import from_pretrained  # whose peers need this file's functions

    case = read_case(folder)
    load = functools.cache(lambda averaged: from_pretrained(folder, as_=kind, averaged=averaged))
    computed: dict[str, Tensor] = {}
    for prefix in prefixes(case):
        prior = load(RAW not in prefix.split("."))
        given = {
            name.removeprefix(prefix): value
            for name, value in case.items()
            if name.startswith(prefix)
        }
        plain = {name: value for name, value in case.items() if name in INPUTS}
        made = prior.published.peer.outputs(prior, plain | given)
        computed |= {f"{prefix}{name}": value for name, value in made.items()}
    found = {
        name: fitted(computed[name], tuple(case[name].shape)) for name in case if name in computed
    }
    asked = [name for name in case if name.rpartition(".")[2] not in INPUTS]
    return [difference(name, case[name], found.get(name)) for name in asked], found


def prefixes(case: Mapping[str, Tensor]) -> Iterator[str]:
    """What stands before the names of each group of tensors: "", "wide.", "raw.", ..."""
    yield ""
    seen = {""}
    for name in case:
        for what in ("tokens", "labels", "logits"):
            before, found, _ = f".{name}".partition(f".{what}")
            if found and before and f"{before[1:]}." not in seen:
                seen.add(f"{before[1:]}.")
                yield f"{before[1:]}."


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
