"""bytedance/1d-tokenizer: RAR."""

from __future__ import annotations

import torch

from priors.networks.rar import RARConfig
from priors.published.outputs import autoregressive_outputs
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior, square
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Shapes, count, has
from training.errors import UserError

BLOCK = {
    "attention_norm": "norm1",
    "qkv": "attn.qkv",
    "query_norm": "attn.q_norm",
    "key_norm": "attn.k_norm",
    "out": "attn.proj",
    "feedforward_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
    "modulation": "adaLN_modulation.1",
}
SPARE = 1024  # rows of the tables of positions beyond the number of codes


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    num_codes, width = shapes["lm_head.weight"]
    dim_head = shapes["blocks.0.attn.q_norm.weight"][0]
    positions, steps = shapes["pos_embed"][1], shapes["timesteps_embeddings"][1]
    length = hyper.number("image_seq_len") or positions - SPARE
    if length < 1:
        raise UserError(
            f"{hyper.path}: no configuration says image_seq_len, and the {positions} positions are "
            f"not {SPARE} more than an image's codes, as the authors' are: give one that does"
        )
    prior = RARConfig(
        dim=width,
        depth=count(shapes, "blocks.{}."),
        heads=width // dim_head,
        feedforward=shapes["blocks.0.mlp.fc1.weight"][0],
        positions=positions,
        steps=steps,
        dropout=float(hyper.find("dropout") or 0.1),
        label_dropout=float(hyper.find("class_label_dropout") or 0.1),
    )
    names = {
        f"backbone.blocks.{number}.{our}": f"blocks.{number}.{their}"
        for number in range(prior.depth)
        for our, their in BLOCK.items()
    }
    names |= {
        "backbone.tokens": "embeddings",
        "backbone.start": "cls_token",
        "backbone.positions": "pos_embed",
        "backbone.targets": "target_aware_pos_embed",
        "backbone.steps": "timesteps_embeddings",
        "backbone.modulation": "adaln_before_head.adaLN_modulation.1",
        "backbone.heads.0": "lm_head",
    }
    num_classes = shapes["embeddings.weight"][0] - num_codes - 2
    layout = CodeLayout((square(length),), (num_codes,))
    return PriorArchitecture(prior, layout, num_classes, names)


def outputs(prior, case: Outputs) -> dict:
    first = prior.backbone.first_class
    made = {"unconditional_id": torch.tensor([first + prior.num_classes])}
    if "labels" in case:
        made["condition_ids"] = case["labels"] + first
    return made | autoregressive_outputs(prior, case)


def _files() -> tuple[PublishedPrior, ...]:
    known = (
        ("b", "768 wide, 24 layers, 16 heads", "1.95", 16.0, 2.75, 1.0),
        ("l", "1024 wide, 24 layers, 16 heads", "1.70", 15.5, 2.5, 1.02),
        ("xl", "1280 wide, 32 layers, 16 heads", "1.50", 6.9, 1.5, 1.02),
        ("xxl", "1408 wide, 40 layers, 16 heads", "1.48", 8.0, 1.2, 1.02),
    )
    return tuple(
        PublishedPrior(
            f"rar-{size}",
            "yucornetto/RAR",
            f"rar_{size}.bin",
            f"{about}, 16 x 16 of 1024, 1000 classes",
            f"gFID {fid} (ImageNet at 256 px, 50k, ADM's evaluator; as sampled here)",
            tokenizer="maskgit-vqgan",
            sampling={
                "guidance": guidance,
                "guidance_schedule": "power_cosine",
                "guidance_power": power,
                "temperature": temperature,
            },
        )
        for size, about, fid, guidance, power, temperature in known
    )


RAR = PriorPeer(
    kind="rar",
    title="RAR (bytedance/1d-tokenizer)",
    licence="Apache-2.0",
    recognises=has(
        "cls_token",
        "target_aware_pos_embed",
        "timesteps_embeddings",
        r"blocks\.0\.attn\.qkv\.weight",
    ),
    architecture=architecture,
    outputs=outputs,
    recipe="raster order; guidance rises by a power-cosine from 1 at the first code, for B to 16 "
    "with power 2.75; temperature 1 (B) or 1.02; all codes. Of a file of another name as B's",
    sampling={"guidance": 16.0, "guidance_schedule": "power_cosine", "guidance_power": 2.75},
    ignored=("attn_mask",),
    quirks=(
        "a learned token and the class begin the sequence, at positions 0 and 1; codes are at 2 on",
        "each slot has the position of the code that it predicts besides, from a second table",
        "norms are modulated by the class and the slot; the last takes scale and shift, in this "
        "order, blocks shift, scale and gate",
        "one table has codes, a mask, classes and the unconditional class",
        "tables of positions have 1024 rows more than codes, that of slots 100",
    ),
    files=_files(),
)
