"""CompVis/taming-transformers: minGPT as VQGAN's prior, of a class or unconditional."""

from __future__ import annotations

import torch

from priors.networks.mingpt import MinGPTConfig
from priors.published.outputs import autoregressive_outputs, logits
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior, square
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Evidence, Shapes, count, has
from tokenizer.published.taming import HEIBOX
from training.command import UserError

BLOCK = {
    "attention_norm": "ln1",
    "queries": "attn.query",
    "keys": "attn.key",
    "values": "attn.value",
    "out": "attn.proj",
    "feedforward_norm": "ln2",
    "up": "mlp.0",
    "down": "mlp.2",
}
HEADS = {1536: 24}  # of the authors' sizes, by width


def within(shapes: Shapes, name: str) -> str:
    """The module that holds the transformer: as Net2NetTransformer has it, or none."""
    return "transformer." if f"transformer.{name}" in shapes else ""


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    inner = within(shapes, "tok_emb.weight")
    width = shapes[f"{inner}tok_emb.weight"][1]
    num_codes = shapes[f"{inner}head.weight"][0]
    positions = shapes[f"{inner}pos_emb"][1]
    why = f"and its width of {width} is none that it is known for"
    heads = hyper.number("n_head") or HEADS.get(width) or hyper.needed("n_head", why=why)
    # A class is a row of the codes' table, so how many there are is no shape. Without a class the
    # sequence begins with code 0.
    unconditional = hyper.flag("unconditional") or "SOSProvider" in str(
        hyper.find("cond_stage_config") or ""
    )
    why = "how many classes there are, which no tensor tells"
    num_classes = 1 if unconditional else hyper.number("cond_stage_config", "params", "n_classes")
    num_classes = num_classes or hyper.needed("n_classes", why=why)
    if hyper.number("n_unmasked"):
        raise UserError(
            f"{hyper.path}: n_unmasked={hyper.number('n_unmasked')}: it is conditioned on codes, and "
            "priors here on classes"
        )
    length = hyper.number("block_size") or positions
    prior = MinGPTConfig(
        dim=width,
        depth=count(shapes, f"{inner}blocks.{{}}."),
        heads=heads,
        feedforward=shapes[f"{inner}blocks.0.mlp.0.weight"][0],
        positions=positions,
        dropout=float(hyper.find("resid_pdrop") or 0.0),
        label_dropout=0.0,
    )
    names = {
        f"backbone.blocks.{number}.{our}": f"{inner}blocks.{number}.{their}"
        for number in range(prior.depth)
        for our, their in BLOCK.items()
    }
    names |= {
        "backbone.tokens": f"{inner}tok_emb",
        "backbone.positions": f"{inner}pos_emb",
        "backbone.norm": f"{inner}ln_f",
        "backbone.heads.0": f"{inner}head",
    }
    layout = CodeLayout((square(min(length, positions)),), (num_codes,))
    return PriorArchitecture(prior, layout, num_classes, names)


def outputs(prior, case: Outputs) -> dict:
    if "tokens" not in case:
        return {}
    if "labels" not in case:  # an unconditional model's: it begins with code 0
        case = {**case, "labels": torch.zeros(len(case["tokens"]), dtype=torch.int64)}
    made = autoregressive_outputs(prior, case)
    if prior.num_classes == 1:  # whose only class is what others call none
        plain = logits(prior.backbone, case["tokens"].flatten(1), case["labels"])
        made |= {"logits": plain, "logits.unconditional": plain}
    inputs = torch.cat([case["labels"][:, None], case["tokens"].flatten(1)[:, :-1]], 1)
    return made | {"inputs": inputs}


def recognises(evidence: Evidence) -> bool:
    return any(
        has(
            f"{inner}tok_emb.weight",
            f"{inner}pos_emb",
            rf"{inner}blocks\.0\.attn\.query\.weight",
            f"{inner}ln_f.weight",
        )(evidence)
        for inner in ("", r"transformer\.")
    )


CLASSES = {"cond_stage_config": {"params": {"n_classes": 1000}}}
TAMING_GPT = PriorPeer(
    kind="taming-mingpt",
    title="minGPT, VQGAN's prior (CompVis/taming-transformers)",
    licence="MIT (code); weights unstated",
    recognises=recognises,
    architecture=architecture,
    outputs=outputs,
    recipe="raster order, no guidance, temperature 1, the 973 likeliest codes; the better figures "
    "are of samples that a classifier chose (a, the share of them that stays)",
    sampling={"top_k": 973},
    ignored=(r"(.*\.)?attn\.mask", r"loss\..*"),
    quirks=(
        "the class is an entry of the codes' own table: class c and code c share a row",
        "there is no unconditional class, so guidance is refused",
        "a checkpoint holds its tokenizer, too, which samples are decoded with",
        "unconditional models begin with code 0, which is their one class here",
        "models of depth, segmentation or coordinates are conditioned on codes, and no priors here",
    ),
    files=(
        PublishedPrior(
            "taming-cin",
            HEIBOX,
            "cin_transformer.ckpt",
            "1536 wide, 48 layers, 24 heads, 16 x 16 of 16384, 1000 classes (sizes from memory)",
            "gFID 15.78 (k 973, a 1.0), 5.88 (k 973, a 0.05), 15.98 / 6.59 / 5.20 (k mixed, a 1.0 / "
            "0.05 / 0.005) (ImageNet at 256 px, torch-fidelity)",
            hyperparameters={"n_head": 24, **CLASSES},
            tokenizer="taming-vqgan-f16-16384",
            sampling={"top_k": 973},
        ),
        PublishedPrior(
            "taming-ffhq",
            HEIBOX,
            "ffhq_transformer.ckpt",
            "unconditional; sizes from its project.yaml",
            "gFID 9.6 (FFHQ at 256 px)",
            hyperparameters={"unconditional": True},
            config="",
            tokenizer="in the same file",
        ),
        PublishedPrior(
            "taming-celebahq",
            HEIBOX,
            "celebahq_transformer.ckpt",
            "unconditional; sizes from its project.yaml",
            "gFID 10.2 (CelebA-HQ at 256 px)",
            hyperparameters={"unconditional": True},
            tokenizer="in the same file",
        ),
    ),
)
