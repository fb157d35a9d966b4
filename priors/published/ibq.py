"""TencentARC/SEED-Voken: the autoregressive model on IBQ's codes."""

from __future__ import annotations

import torch

from priors.networks.llama import LlamaConfig
from priors.published.llamagen import block_names, settings
from priors.published.outputs import autoregressive_outputs
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior, square
from priors.published.taming import within
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Evidence, Shapes, count, has
from training.errors import UserError

DIM_HEAD = 64  # of the authors' sizes


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    inner = within(shapes, "tok_emb.weight")
    num_codes, width = shapes[f"{inner}head.weight"]
    if (
        f"{inner}shared_ada_lin.1.weight" in shapes
        or f"{inner}embedding_projection.fc1.weight" in shapes
    ):
        raise UserError(
            f"{hyper.path}: shared_aln and use_pretrained_codebook, which no published file has, "
            "are not known here"
        )
    heads = hyper.number("n_head") or width // DIM_HEAD
    length = hyper.needed("block_size", why="how many codes an image has, which no tensor tells")
    rows = shapes[f"{inner}class_emb.embedding_table.weight"][0]
    prior = LlamaConfig(
        **settings(shapes, hyper, width, f"{inner}blocks.0", heads),
        depth=count(shapes, f"{inner}blocks.{{}}."),
        conditioning="adaln",
    )
    names = block_names(prior.depth, f"{inner}blocks")
    names |= {
        f"backbone.blocks.{number}.modulation": f"{inner}blocks.{number}.ada_lin.1"
        for number in range(prior.depth)
    }
    names |= {
        "backbone.tokens": f"{inner}tok_emb",
        "backbone.classes": f"{inner}class_emb.embedding_table",
        "backbone.norm": f"{inner}head_nm.rmsnorm",
        "backbone.modulation": f"{inner}head_nm.ada_lin.1",
        "backbone.heads.0": f"{inner}head",
    }
    layout = CodeLayout((square(length),), (num_codes,))
    return PriorArchitecture(prior, layout, rows - 1, names)


def outputs(prior, case: Outputs) -> dict:
    nobody = torch.tensor([prior.num_classes])
    return autoregressive_outputs(prior, case) | {"unconditional_label": nobody}


def recognises(evidence: Evidence) -> bool:
    return any(
        has(
            f"{inner}tok_emb.weight",
            rf"{inner}class_emb\.embedding_table\.weight",
            rf"{inner}blocks\.0\.attention\.wqkv\.weight",
            f"{inner}head_nm.*",
        )(evidence)
        for inner in ("", r"transformer\.")
    )


def _files() -> tuple[PublishedPrior, ...]:
    known = (
        ("B", "342M, 1024 wide, 16 layers, 16 heads", "2.88", "254.73", 2.25, 1.1),
        ("L", "649M, 1280 wide, 20 layers, 20 heads", "2.45", "267.48", 2.0, 1.0),
        ("XL", "1.1B, 1536 wide, 24 layers, 24 heads", "2.14", "278.99", 2.35, 1.15),
        ("XXL", "2.1B, 1920 wide, 30 layers, 30 heads", "2.05", "286.73", 2.85, 1.2),
    )
    return tuple(
        PublishedPrior(
            f"ibq-ar-{size.lower()}",
            f"TencentARC/IBQ-AR-{size}",
            f"AR_256_{size}.ckpt",
            f"{about}, 16 x 16 of 16384, 1000 classes",
            f"gFID {fid}, IS {score} (ImageNet at 256 px)",
            hyperparameters={"block_size": 256},
            tokenizer="ibq-16384",
            sampling={"guidance": guidance, "temperature": temperature},
        )
        for size, about, fid, score, guidance, temperature in known
    )


IBQ_GPT = PriorPeer(
    kind="ibq-gpt",
    title="IBQ's autoregressive model (TencentARC/SEED-Voken)",
    licence="Apache-2.0",
    recognises=recognises,
    architecture=architecture,
    outputs=outputs,
    recipe="raster order, constant guidance of 2.25 (B), 2.0 (L), 2.35 (XL), 2.85 (XXL) at "
    "temperature 1.1, 1.0, 1.15, 1.2; all codes",
    sampling={"guidance": 2.25, "temperature": 1.1},
    ignored=(r"(.*\.)?freqs_cis", r"(.*\.)?causal_mask", r"(.*\.)?kv_cache\..*", r"loss\..*"),
    quirks=(
        "LlamaGen's network, where the class besides sets gate, scale and shift of every branch, in "
        "this order, and scale and shift before the head",
        "a checkpoint holds its tokenizer, too",
    ),
    files=_files(),
)
