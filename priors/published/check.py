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
from torch import Tensor

from priors.published.load import from_pretrained
from tokenizer.published.check import RAW, Difference, compared, read_case

INPUTS = ("tokens", "labels", "masked", "orders")  # the first names the group


@torch.no_grad()
def check(folder: Path, kind: str | None = None) -> tuple[list[Difference], dict[str, Tensor]]:
    """All that a case holds against what is computed here, and the latter under the case's names.

    Raises UserError when the folder holds no case, or its weights cannot be loaded.
    """
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
    return compared(case, computed, lambda name: name.rpartition(".")[2] in INPUTS)


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
