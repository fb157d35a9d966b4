"""Quantizers, one file each. A quantizer is listed here, and contract tests run over the list.

QUANTIZERS is what configurations choose from; the classes are the same quantizers for anybody's own
model, `from tokenizer.quantizers import SimVQ` (standalone.py).
"""

from tokenizer.quantizers.fsq import FSQConfig
from tokenizer.quantizers.gumbel import GumbelConfig
from tokenizer.quantizers.ibq import IBQConfig
from tokenizer.quantizers.lookup_free import BSQConfig, LookupFreeConfig
from tokenizer.quantizers.product import ProductConfig
from tokenizer.quantizers.residual import ResidualConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.standalone import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    VQ,
    GumbelVQ,
    ProductVQ,
    Quantize,
    ResidualVQ,
    SimVQ,
)
from tokenizer.quantizers.vector import VectorConfig

__all__ = [
    "BSQ",
    "FSQ",
    "IBQ",
    "LFQ",
    "QUANTIZERS",
    "VQ",
    "GumbelVQ",
    "ProductVQ",
    "Quantize",
    "ResidualVQ",
    "SimVQ",
]

QUANTIZERS = {
    "vector": VectorConfig,
    "simvq": SimVQConfig,
    "residual": ResidualConfig,
    "product": ProductConfig,
    "gumbel": GumbelConfig,
    "fsq": FSQConfig,
    "lookup_free": LookupFreeConfig,
    "bsq": BSQConfig,
    "ibq": IBQConfig,
}
