"""FoundationVision/LlamaGen: its class-conditional GPT."""

from __future__ import annotations

import torch

from priors.networks.llama import LlamaConfig
from priors.published.outputs import autoregressive_outputs
from priors.published.peer import (
    Outputs,
    PriorArchitecture,
    PriorPeer,
    PublishedPrior,
    square,
)
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Shapes, count, has
from training.errors import UserError

BLOCK = {
    "attention_norm": "attention_norm",
    "qkv": "attention.wqkv",
    "out": "attention.wo",
    "feedforward_norm": "ffn_norm",
    "gate": "feed_forward.w1",
    "up": "feed_forward.w3",
    "down": "feed_forward.w2",
}
HEADS = {768: 12, 1024: 16, 1280: 20, 1536: 24, 3200: 32}  # of the authors' sizes, by width


def block_names(depth: int, theirs: str) -> dict[str, str]:
    return {
        f"backbone.blocks.{number}.{our}": f"{theirs}.{number}.{their}"
        for number in range(depth)
        for our, their in BLOCK.items()
    }


def settings(shapes: Shapes, hyper: Hyperparameters, width: int, first: str, heads: int) -> dict:
    """What the shapes and the configuration say of Llama's blocks, the first of which is `first`."""
    dim_head = width // heads
    rows = shapes[f"{first}.attention.wqkv.weight"][0]
    kv_heads = (rows - width) // (2 * dim_head)
    return {
        "dim": width,
        "heads": heads,
        "kv_heads": 0 if kv_heads == heads else kv_heads,
        "feedforward": shapes[f"{first}.feed_forward.w1.weight"][0],
        "rotary_base": float(hyper.find("rope_base") or 10_000),
        "norm_eps": float(hyper.find("norm_eps") or 1e-5),
    }


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    num_codes, width = shapes["tok_embeddings.weight"]
    if "cls_embedding.uncond_embedding" in shapes:
        raise UserError(f"{hyper.path}: it is conditioned on text, and priors here on classes")
    why = f"and its width of {width} is none of the authors' sizes"
    heads = hyper.number("n_head") or HEADS.get(width) or hyper.needed("n_head", why=why)
    length = hyper.needed("block_size", why="how many codes an image has, which no tensor tells")
    rows = shapes["cls_embedding.embedding_table.weight"][0]
    told = hyper.number("num_classes")
    dropped = hyper.find("class_dropout_prob")
    share = float(dropped) if dropped is not None else 0.1
    if told is not None:  # what is beyond the classes is the unconditional one
        share = 0.0 if rows == told else (share or 0.1)
    prior = LlamaConfig(
        **settings(shapes, hyper, width, "layers.0", heads),
        depth=count(shapes, "layers.{}."),
        label_dropout=share,
    )
    names = block_names(prior.depth, "layers")
    names |= {"backbone.tokens": "tok_embeddings", "backbone.norm": "norm"}
    names |= {"backbone.classes": "cls_embedding.embedding_table", "backbone.heads.0": "output"}
    layout = CodeLayout((square(length),), (num_codes,))
    return PriorArchitecture(prior, layout, rows - (share > 0), names)


def outputs(prior, case: Outputs) -> dict:
    nobody = torch.tensor([prior.num_classes])
    return autoregressive_outputs(prior, case) | {"unconditional_label": nobody}


def _files() -> tuple[PublishedPrior, ...]:
    sizes = {
        "b": ("768 wide, 12 layers, 12 heads", 2.0),
        "l": ("1024 wide, 24 layers, 16 heads", 2.0),
        "xl": ("1280 wide, 36 layers, 20 heads", 1.75),
        "xxl": ("1536 wide, 48 layers, 24 heads", 1.75),
        "3b": ("3200 wide, 24 layers, 32 heads", 1.65),
    }
    known = (
        ("b", 256, "5.46"),
        ("b", 384, "6.09"),
        ("l", 256, "3.80"),
        ("l", 384, "3.07"),
        ("xl", 384, "2.62"),
        ("xxl", 384, "2.34"),
        ("3b", 384, "2.18"),
    )
    found = []
    for size, pixels, fid in known:
        about, guidance = sizes[size]
        side = pixels // 16
        found.append(
            PublishedPrior(
                f"llamagen-{size}-{pixels}",
                "FoundationVision/LlamaGen",
                f"c2i_{size.upper()}_{pixels}.pt",
                f"{about}, {side} x {side} of 16384, 1000 classes",
                f"gFID {fid} (ImageNet, 50k, scaled to 256 px; guidance {guidance})",
                hyperparameters={"block_size": side**2},
                tokenizer="llamagen-vq-ds16",
                sampling={"guidance": guidance},
            )
        )
    return tuple(found)


LLAMAGEN_GPT = PriorPeer(
    kind="llamagen-gpt",
    title="LlamaGen GPT, class-conditional (FoundationVision/LlamaGen)",
    licence="MIT",
    recognises=has(
        "tok_embeddings.weight",
        r"cls_embedding\..*",
        r"layers\.0\.attention\.wqkv\.weight",
        "output.weight",
    ),
    architecture=architecture,
    outputs=outputs,
    recipe="raster order, constant guidance (2.0 for B and L, 1.75 for XL and XXL, 1.65 for 3B), "
    "temperature 1, all codes",
    sampling={"guidance": 2.0},
    ignored=(r"(.*\.)?freqs_cis", r"(.*\.)?causal_mask", r"(.*\.)?kv_cache\..*"),
    quirks=(
        "the class slot has neither cosine nor sine: its query and key are zero",
        "a slot has the position of the code that it holds and does not know which it predicts",
        "how many codes an image has stands in no tensor: config.json's `block_size`, or the name",
        "the files of XXL and 3B have no envelope, the others `model`; DeepSpeed's have `module`",
        "files of text-to-image models (`t2i_*`) are conditioned on T5 and are refused",
    ),
    files=_files(),
)
