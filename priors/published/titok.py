"""bytedance/1d-tokenizer: TiTok's generators, BERT and U-ViT."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from priors.families.published_masked import TiTokConfig
from priors.networks.bert import TiTokNetworkConfig
from priors.published.masked_cases import masked_outputs
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Evidence, Shapes, count, has
from training.command import UserError

BERT_BLOCK = {
    "query": "attention.self.query",
    "key": "attention.self.key",
    "value": "attention.self.value",
    "out": "attention.output.dense",
    "attention_norm": "attention.output.LayerNorm",
    "up": "intermediate.dense",
    "down": "output.dense",
    "feedforward_norm": "output.LayerNorm",
}
UVIT_BLOCK = {
    "attention_norm": "norm1",
    "qkv": "attn.qkv",
    "out": "attn.proj",
    "feedforward_norm": "norm2",
    "up": "mlp.fc1",
    "down": "mlp.fc2",
}
HEADS = {768: 16, 1024: 16}  # of the authors' sizes, by width
# Their recipes by the number of tokens; guidance as they write it.
RECIPES = {
    32: {
        "num_steps": 8,
        "randomize_temperature": 9.5,
        "guidance_scale": 4.5,
        "guidance_decay": "linear",
    },
    64: {
        "num_steps": 8,
        "randomize_temperature": 11.0,
        "guidance_scale": 3.0,
        "guidance_decay": "linear",
    },
    128: {
        "num_steps": 64,
        "randomize_temperature": 2.8,
        "guidance_scale": 6.9,
        "guidance_decay": "power-cosine",
    },
}
DECAYS = {"constant": "constant", "linear": "linear", "power-cosine": "power_cosine"}
POWER = 3.0  # of power-cosine, where nothing says another


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    skips = "model.lm_head.weight" not in shapes
    prefix = "" if skips else "model."
    table = "embeddings.weight" if skips else "model.embeddings.word_embeddings.weight"
    places = "pos_embed" if skips else "model.embeddings.position_embeddings.weight"
    first = "mid_block.mlp.fc1" if skips else "model.encoder.layer.0.intermediate.dense"
    num_codes, width = shapes[f"{prefix}lm_head.weight"]
    half = count(shapes, "in_blocks.{}.")
    length = shapes[places][-2] - 1
    why = f"and its width of {width} is none of the authors' sizes"
    dropout = hyper.find("dropout")
    network = TiTokNetworkConfig(
        dim=width,
        depth=2 * half + 1 if skips else count(shapes, "model.encoder.layer.{}."),
        heads=hyper.number("num_attention_heads")
        or HEADS.get(width)
        or hyper.needed("num_attention_heads", why=why),
        feedforward=shapes[f"{first}.weight"][0],
        dropout=0.1 if dropout is None else float(dropout),
        long_skips=skips,
    )
    recipe = recipe_of(hyper, length)
    label_dropout = hyper.find("class_label_dropout")
    prior = TiTokConfig(
        steps=recipe["num_steps"],
        choice_temperature=float(recipe["randomize_temperature"]),
        label_dropout=0.1 if label_dropout is None else float(label_dropout),
        backbone=network,
    )
    names = {"backbone.head": f"{prefix}lm_head", "backbone.positions": places}
    names["backbone.tokens.weight"] = table
    if skips:
        names |= {"backbone.norm": "norm"} | uvit_names(half)
    else:
        names |= {
            "backbone.types": "model.embeddings.token_type_embeddings.weight",
            "backbone.norm_in": "model.embeddings.LayerNorm",
        }
        names |= block_names(range(network.depth), "model.encoder.layer.{}", BERT_BLOCK)
    num_classes = shapes[table][0] - num_codes - 2
    layout = CodeLayout(((1, length),), (num_codes,))
    return PriorArchitecture(prior, layout, num_classes, names, sampling_of(recipe, hyper))


def block_names(numbers: range, theirs: str, block: dict[str, str], start: int = 0) -> dict:
    return {
        f"backbone.blocks.{start + number}.{our}": f"{theirs.format(number)}.{their}"
        for number in numbers
        for our, their in block.items()
    }


def uvit_names(half: int) -> dict[str, str]:
    return {
        **block_names(range(half), "in_blocks.{}", UVIT_BLOCK),
        **block_names(range(1), "mid_block", UVIT_BLOCK, half),
        **block_names(
            range(half), "out_blocks.{}", {**UVIT_BLOCK, "skip": "skip_linear"}, half + 1
        ),
    }


def recipe_of(hyper: Hyperparameters, length: int) -> dict[str, Any]:
    """What a configuration says, and for the rest what its authors take for so many tokens."""
    usual = RECIPES.get(length, RECIPES[32])
    told = {name: hyper.find(name) for name in usual}
    return usual | {name: value for name, value in told.items() if value is not None}


def sampling_of(recipe: dict[str, Any], hyper: Hyperparameters) -> dict[str, Any]:
    """Theirs is c + g (c - u), but u + g (c - u) of power-cosine."""
    decay, scale = recipe["guidance_decay"], float(recipe["guidance_scale"])
    if decay not in DECAYS:
        raise UserError(
            f"{hyper.path}: guidance_decay={decay!r} is not known here: it is one of "
            f"{', '.join(DECAYS)}"
        )
    if decay != "power-cosine":
        return {"guidance": 1 + scale, "guidance_schedule": DECAYS[decay]}
    power = float(hyper.find("guidance_scale_pow") or POWER)
    return {"guidance": scale, "guidance_schedule": DECAYS[decay], "guidance_power": power}


def outputs(prior, case: Outputs) -> dict[str, Tensor]:
    network = prior.backbone

    def logits(codes: Tensor, labels: Tensor) -> Tensor:
        return torch.cat(network(codes.flatten(1), labels), 1)

    return masked_outputs(case, prior.num_classes, network.mask_id, logits)


_bert = has("model.embeddings.word_embeddings.weight", "model.lm_head.weight")
_uvit = has("embeddings.weight", "pos_embed", r"mid_block\.attn\.qkv\.weight", "lm_head.weight")


def recognises(evidence: Evidence) -> bool:
    return _bert(evidence) or _uvit(evidence)


def _files() -> tuple[PublishedPrior, ...]:
    known = (
        ("l32", 32, "768 wide, 24 layers, 16 heads", "2.77"),
        ("b64", 64, "U-ViT", "2.48"),
        ("s128", 128, "U-ViT, 1024 wide, 20 layers, 16 heads", "1.97"),
    )
    return tuple(
        PublishedPrior(
            f"titok-{name}-generator",
            f"yucornetto/generator_titok_{name}_imagenet",
            "model.safetensors",
            f"{about}, {tokens} of 4096, 1000 classes",
            f"gFID {fid} (ImageNet at 256 px, 50k, ADM's evaluator; as sampled here)",
            config="config.json",
            tokenizer=f"titok-{name}",
        )
        for name, tokens, about, fid in known
    )


TITOK_GENERATOR = PriorPeer(
    kind="titok-generator",
    title="TiTok's generators (bytedance/1d-tokenizer)",
    licence="Apache-2.0",
    recognises=recognises,
    architecture=architecture,
    outputs=outputs,
    recipe="codes under Gumbel noise that fades with the steps, the last the likeliest; softmax "
    "temperatures from 1.3 to 0.5; the most confident logits are kept, 1 - arccos of them; noise, "
    "steps and guidance of config.json, else by the number of tokens: of 32 noise 9.5, 8 steps, "
    "guidance linear to 5.5; of 64 noise 11, 8 steps, linear to 4; of 128 noise 2.8, 64 steps, a "
    "power-cosine to 6.9. A step's guidance is by the steps before it, so that the first has none",
    ignored=(r"(model\.)?embeddings\.position_ids",),
    quirks=(
        "one table has codes, the mask, classes and the unconditional class; the class stands "
        "first",
        "there are two generations: BERT of transformers (`model.*`), whose norms come after "
        "branches, and U-ViT (`in_blocks.*`), whose first half's features join the second half",
        "guidance is written c + g (c - u), which is s = 1 + g here, but for power-cosine, where "
        "s = g",
        "`position_ids` stands in files of some versions of transformers and is ignored",
    ),
    files=_files(),
)
