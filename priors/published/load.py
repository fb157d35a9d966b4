"""Published priors as ours: found, recognised, built and filled (tokenizer.published.load)."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from torch import nn

from priors.interface import SampleOptions
from priors.published.peer import PriorPeer
from priors.published.table import PEERS
from tokenizer.published.files import Hyperparameters, Weights, open_weights
from tokenizer.published.load import PREFIX, filled, hyperparameters, locate
from tokenizer.published.peer import Place, places
from tokenizer.published.table import peer_of


@dataclasses.dataclass(frozen=True)
class Model:
    """What a loaded prior was built from."""

    prior: Any  # configuration of a kind in priors.PRIORS
    sampling: SampleOptions  # its authors'
    hyper: Hyperparameters


def from_pretrained(
    name_or_path: str | Path,
    file: str | None = None,
    revision: str | None = None,
    as_: str | None = None,
    config: str | Path | dict[str, Any] | None = None,
    *,
    averaged: bool = True,
) -> nn.Module:
    """A published prior in evaluation mode, as `priors.load` gives one of ours.

    name_or_path  published:NAME or NAME of docs/published.md, a file, a folder, or a repository of the Hub
    file          of a folder or a repository, where it has several
    as_           the kind, where it is not to be recognised
    config        the authors' configuration (JSON, YAML, or what such a file holds), where it is not beside the file
    averaged      False: where a file has weights twice, not their averages

    Its `.config` is a Model, with the authors' way to sample; `.published` says where it comes
    from. Raises UserError for what is not there, damaged, of no known kind, or not whole.
    """
    path, told, kind = locate(name_or_path, file, revision, PEERS)
    weights = open_weights(path, averaged=averaged, stage="second")
    hyper = hyperparameters(path, config, told)
    peer = peer_of(weights, hyper, as_ or kind, PEERS)
    name = str(name_or_path).removeprefix(PREFIX)
    known = peer.file_of(name) or peer.file_of(path.name)
    return load_weights(peer, weights, hyper, known.sampling if known else None)


def load_weights(
    peer: PriorPeer,
    weights: Weights,
    hyper: Hyperparameters,
    sampling: Mapping[str, Any] | None = None,
) -> nn.Module:
    """A file of a known kind as one of our modules, to be sampled as is known of the file, else as
    its configuration says, else as its kind is. Raises UserError, naming tensors, where it is not
    one."""

    def build() -> tuple[nn.Module, dict[str, Place], Model]:
        made = peer.architecture(weights.shapes, hyper)
        prior = made.prior.build(made.layout, made.num_classes)
        options = SampleOptions(**(sampling or made.sampling or peer.sampling))
        return prior, dict(places(prior, made.names)), Model(made.prior, options, hyper)

    return filled(peer, weights, hyper, build)
