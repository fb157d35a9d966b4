"""markweberdev/maskbit: its generator, LFQBert."""

from __future__ import annotations

from typing import Any

import torch
from einops import rearrange
from torch import Tensor

from priors.families.published_masked import MaskBitConfig
from priors.networks.bert import MaskBitNetworkConfig
from priors.published.masked_cases import masked_outputs
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior, square
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Shapes, count, has
from training.command import UserError

BLOCK = {
    "qkv.weight": "0.mha.in_proj_weight",
    "qkv.bias": "0.mha.in_proj_bias",
    "out.weight": "0.mha.out_proj.weight",
    "out.bias": "0.mha.out_proj.bias",
    "attention_norm.weight": "0.norm.weight",
    "attention_norm.bias": "0.norm.bias",
    "up.weight": "1.net.0.weight",
    "up.bias": "1.net.0.bias",
    "down.weight": "1.net.2.weight",
    "down.bias": "1.net.2.bias",
    "feedforward_norm.weight": "1.norm.weight",
    "feedforward_norm.bias": "1.norm.bias",
}
HEADS = {768: 8, 1024: 16}  # of the authors' sizes, by width
# Their recipes by the number of bits: noise on confidences, guidance as they write it, its power.
RECIPES = {
    10: (10.5, 6.4, 2.5),
    12: (8.2, 7.1, 3.0),
    14: (7.8, 7.1, 3.0),
    16: (7.5, 6.5, 2.5),
    18: (8.5, 5.7, 2.5),
}
ANNEALINGS = {"none": "constant", "linear": "linear", "cosine": "power_cosine"}


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    width, bits = shapes["input_proj.weight"]
    rows = shapes["prediction_layer.weight"][0]
    why = f"and its width of {width} is none of the authors' sizes"
    dropout = hyper.find("dropout")
    network = MaskBitNetworkConfig(
        dim=width,
        depth=count(shapes, "transformer.layers.{}."),
        heads=hyper.number("heads") or HEADS.get(width) or hyper.needed("heads", why=why),
        feedforward=shapes["transformer.layers.0.1.net.0.weight"][0],
        dropout=0.1 if dropout is None else float(dropout),
        splits=splits_of(shapes, hyper, bits, rows),
        prenorm="norm_after_transformer.weight" in shapes,
    )
    noise, scale, power = RECIPES.get(bits, RECIPES[14])
    told = hyper.find("randomize_temperature")
    label_dropout = hyper.find("class_label_dropout")
    prior = MaskBitConfig(
        steps=hyper.number("num_steps") or MaskBitConfig.steps,
        choice_temperature=noise if told is None else float(told),
        label_dropout=0.1 if label_dropout is None else float(label_dropout),
        backbone=network,
    )
    ours = "groups.backbone"
    names = {
        f"{ours}.blocks.{number}.{our}": f"transformer.layers.{number}.{their}"
        for number in range(network.depth)
        for our, their in BLOCK.items()
    }
    names |= {
        f"{ours}.classes": "class_emb",
        f"{ours}.project_in": "input_proj",
        f"{ours}.positions": "pos_emb",
        f"{ours}.norm_in": "first_layer.0",
        f"{ours}.project_out": "last_layer.0",
        f"{ours}.norm_out": "last_layer.2",
        f"{ours}.head": "prediction_layer",
    }
    if network.prenorm:
        names[f"{ours}.norm"] = "norm_after_transformer"
    layout = CodeLayout((square(shapes["pos_emb"][1] - 1),), (1 << bits,))
    sampling = sampling_of(hyper, scale, power)
    return PriorArchitecture(prior, layout, shapes["class_emb.weight"][0] - 1, names, sampling)


def splits_of(shapes: Shapes, hyper: Hyperparameters, bits: int, rows: int) -> int:
    """Groups of bits: as many as the configuration says, or as give so many logits."""
    told = hyper.number("codebook_splits")
    if told is None and "bits_to_indices" in shapes:
        told = bits // shapes["bits_to_indices"][0]
    fitting = [n for n in range(1, bits + 1) if bits % n == 0 and n << bits // n == rows]
    if told in fitting:
        return told
    if told is not None or len(fitting) != 1:
        said = "does not say" if told is None else f"says {told}"
        raise UserError(
            f"{hyper.path}: it {said} how many groups (codebook_splits) its {bits} bits are in, "
            f"and its {rows} logits are of {' or '.join(map(str, fitting)) or 'none'}: give its own "
            "configuration"
        )
    return fitting[0]


def sampling_of(hyper: Hyperparameters, scale: float, power: float) -> dict[str, Any]:
    """Theirs is c + g (c - u)."""
    annealing = hyper.find("guidance_annealing") or "cosine"
    if annealing not in ANNEALINGS:
        raise UserError(
            f"{hyper.path}: guidance_annealing={annealing!r} is not known here: it is one of "
            f"{', '.join(ANNEALINGS)}"
        )
    told, told_power = hyper.find("guidance_scale"), hyper.find("scale_pow")
    return {
        "guidance": 1 + (scale if told is None else float(told)),
        "guidance_schedule": ANNEALINGS[annealing],
        "guidance_power": power if told_power is None else float(told_power),
    }


def outputs(prior, case: Outputs) -> dict[str, Tensor]:
    network = prior.groups.backbone

    def logits(codes: Tensor, labels: Tensor) -> Tensor:
        """(B, N, splits) -> (B, N, splits, codes of a group)"""
        made = torch.cat(network(rearrange(codes, "b n s -> b (s n)"), labels), 1)
        return rearrange(made, "b (s n) k -> b n s k", s=prior.splits)

    made = masked_outputs(case, prior.num_classes, 1 << prior.bits, logits)
    if "tokens" in case:
        made["codes"] = prior.join(rearrange(case["tokens"], "b n s -> b (s n)"))
    return made


def _files() -> tuple[PublishedPrior, ...]:
    def entry(bits: int, fid: str, steps: int = 64, noise: float = 0, scale: float = 0):
        usual_noise, usual_scale, power = RECIPES[bits]
        told = {"randomize_temperature": noise or usual_noise, "num_steps": steps}
        return PublishedPrior(
            f"maskbit-{bits}bit-generator" + (f"-{steps}steps" if steps != 64 else ""),
            f"markweber/maskbit_generator_{bits}bit",
            "model.safetensors",
            f"1024 wide, 24 layers, 16 heads, two groups, 16 x 16 of {bits} bits, 1000 classes",
            f"gFID {fid} (ImageNet at 256 px, 50k; {steps} steps, as sampled here)",
            hyperparameters=told,
            tokenizer=f"maskbit-{bits}bit",
            sampling={
                "guidance": 1 + (scale or usual_scale),
                "guidance_schedule": "power_cosine",
                "guidance_power": power,
            },
        )

    return (
        entry(10, "1.68"),
        entry(12, "1.65"),
        entry(14, "1.62"),
        entry(14, "1.56", 128, 9.0),
        entry(14, "1.52", 256, 10.3, 5.8),
        entry(16, "1.64"),
        entry(18, "1.67"),
    )


MASKBIT_GENERATOR = PriorPeer(
    kind="maskbit-generator",
    title="MaskBit's generators (markweberdev/maskbit)",
    licence="Apache-2.0",
    recognises=has(
        "class_emb.weight",
        "input_proj.weight",
        "prediction_layer.weight",
        r"transformer\.layers\.0\.0\.mha\.in_proj_weight",
    ),
    architecture=architecture,
    outputs=outputs,
    recipe="64 steps by confidence with noise that fades, 1 - arccos; guidance rises by a "
    "power-cosine of the steps before a step, from none at the first: by config.json, else by the "
    "number of bits (10: noise 10.5, guidance 7.4, power 2.5; 12: 8.2, 8.1, 3; 14: 7.8, 8.1, 3; "
    "16: 7.5, 7.5, 2.5; 18: 8.5, 6.7, 2.5)",
    ignored=("bits_to_indices",),
    quirks=(
        "it has no table of codes: it reads bits as -1 and 1, those of a masked group as 0",
        "a code is two groups of bits, the low ones first, each masked and drawn by itself",
        "the class stands last",
        "norms come after branches and have an eps of 1e-12",
        "guidance is written c + g (c - u), which is s = 1 + g here",
    ),
    files=_files(),
)
