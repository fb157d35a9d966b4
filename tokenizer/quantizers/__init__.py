"""Quantizers, one file each. A quantizer is listed here, and contract tests run over the list."""

from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig

QUANTIZERS = {"vector": VectorConfig, "simvq": SimVQConfig}
