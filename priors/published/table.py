"""All published priors that are known here."""

from __future__ import annotations

from priors.published.halton import HALTON
from priors.published.ibq import IBQ_GPT
from priors.published.llamagen import LLAMAGEN_GPT
from priors.published.maskbit import MASKBIT_GENERATOR
from priors.published.peer import PriorPeer
from priors.published.rar import RAR
from priors.published.taming import TAMING_GPT
from priors.published.titok import TITOK_GENERATOR

PEERS: dict[str, PriorPeer] = {
    peer.kind: peer
    for peer in (
        LLAMAGEN_GPT,
        RAR,
        TAMING_GPT,
        IBQ_GPT,
        HALTON,
        TITOK_GENERATOR,
        MASKBIT_GENERATOR,
    )
}
