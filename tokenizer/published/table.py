"""All published tokenizers that are known here."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from typing import Any

from tokenizer.published.bsq_vit import BSQ_VIT
from tokenizer.published.dalle import DALLE
from tokenizer.published.diffusers import DIFFUSERS
from tokenizer.published.files import Hyperparameters, Weights
from tokenizer.published.ibq import IBQ
from tokenizer.published.llamagen import LLAMAGEN
from tokenizer.published.maskgit import MASKBIT, MASKGIT
from tokenizer.published.peer import Evidence, Peer, PublishedFile
from tokenizer.published.rae import RAE_PEER
from tokenizer.published.rosinality import ROSINALITY
from tokenizer.published.seed_voken import MAGVIT2, SIMVQ
from tokenizer.published.taming import GUMBEL, TAMING
from tokenizer.published.titok import TITOK
from training.errors import UserError

PEERS: dict[str, Peer] = {
    peer.kind: peer
    for peer in (
        TAMING,
        GUMBEL,
        LLAMAGEN,
        IBQ,
        MAGVIT2,
        SIMVQ,
        MASKGIT,
        MASKBIT,
        TITOK,
        BSQ_VIT,
        DIFFUSERS,
        ROSINALITY,
        DALLE,
        RAE_PEER,
    )
}
TARGETS = (
    "target",
    "class_path",
    "_class_name",
    "_target_",
)  # keys of a class in the configurations of others


def peer_of(
    weights: Weights,
    hyper: Hyperparameters,
    kind: str | None = None,
    peers: Mapping[str, Any] = PEERS,
) -> Any:
    """Of which kind of `peers` a file is. Raises UserError where it is of none, or of several."""
    if kind is not None:
        if kind not in peers:
            near = difflib.get_close_matches(kind, peers, 1)
            hint = f"did you mean {near[0]}?" if near else f"it is one of {', '.join(peers)}"
            raise UserError(f"{kind} is no published kind that is known here: {hint}")
        return peers[kind]
    target = next((str(found) for key in TARGETS if (found := hyper.find(key)) is not None), "")
    evidence = Evidence(weights.shapes, target, weights.shadowed)
    found = [peer for peer in peers.values() if peer.recognises(evidence)]
    if len(found) == 1:
        return found[0]
    kinds = ", ".join(peer.kind for peer in found or peers.values())
    which = (
        "it may be of several kinds" if found else "its tensors are of no kind that is known here"
    )
    raise UserError(
        f"{weights.path}: {which}: say which with as_= (on the command line --as), one of {kinds}"
    )


def published_files(peers: Mapping[str, Any] = PEERS) -> dict[str, tuple[Any, PublishedFile]]:
    """All files that are known by name, with their peers."""
    return {file.name: (peer, file) for peer in peers.values() for file in peer.files}
