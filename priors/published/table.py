"""All published priors that are known here."""

from __future__ import annotations

from priors.published.llamagen import LLAMAGEN_GPT
from priors.published.peer import PriorPeer

PEERS: dict[str, PriorPeer] = {peer.kind: peer for peer in (LLAMAGEN_GPT,)}
