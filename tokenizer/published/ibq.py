"""TencentARC/SEED-Voken: IBQ, taming's networks with a codebook that is searched by inner
product."""

from __future__ import annotations

from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes
from tokenizer.published.taming import LEFTOVERS, PLAIN, autoencoder, is_ibq
from tokenizer.quantizers.ibq import IBQConfig
from tokenizer.quantizers.vector import VectorConfig


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    num_codes, dim = shapes["quantize.embedding.weight"]
    quantizer = IBQConfig(num_codes=num_codes, code_dim=dim)
    if hyper.flag(
        "l2_normalize"
    ):  # the largest inner product of unit vectors is the nearest of them
        quantizer = VectorConfig(
            num_codes=num_codes, code_dim=dim, codebook="gradient", metric="cosine", init="normal"
        )
    return autoencoder(
        shapes, hyper, quantizer, {"quantizer.codebook": "quantize.embedding.weight"}
    )


AVERAGES = (
    "the authors evaluate with averaged weights, which stand in the same file as `model_ema.*` "
    "under names without "
    "dots; a third to a half of the codes of the weights as trained are others"
)
IBQ = Peer(
    kind="ibq",
    title="IBQ (TencentARC/SEED-Voken)",
    licence="Apache-2.0",
    recognises=lambda evidence: PLAIN(evidence) and is_ibq(evidence),
    architecture=architecture,
    ignored=LEFTOVERS,
    quirks=(
        "the code is the row with the largest inner product, not the nearest one: its files have "
        "the names of "
        "taming's, and are told from them by their averages or their configuration",
        AVERAGES,
    ),
    files=tuple(
        PublishedFile(
            f"ibq-{codes}",
            f"TencentARC/IBQ-Tokenizer-{codes}",
            f"imagenet256_{codes}.ckpt",
            f"f16, {codes} codes of 256, 4 blocks a level",
            f"rFID {rfid}, LPIPS {lpips}, usage {usage} % (ImageNet val at 256 px)",
        )
        for codes, rfid, lpips, usage in (
            (1024, "2.24", "0.2580", 99),
            (8192, "1.87", "0.2437", 98),
            (16384, "1.37", "0.2235", 96),
            (262144, "1.00", "0.2030", 84),
        )
    ),
)
