"""valeoai/Halton-MaskGIT: its class-conditional transformer."""

from __future__ import annotations

from torch import Tensor

from priors.families.published_masked import HaltonConfig
from priors.networks.halton_maskgit import HaltonNetworkConfig
from priors.published.masked_cases import masked_outputs
from priors.published.peer import Outputs, PriorArchitecture, PriorPeer, PublishedPrior, square
from tokenizer.interface import CodeLayout
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Shapes, count, has
from training.command import UserError

BLOCK = {
    "modulation": "mlp.1",
    "attention_norm": "ln1",
    "query": "attn.wq",
    "key": "attn.wk",
    "value": "attn.wv",
    "out": "attn.wo",
    "feedforward_norm": "ln2",
    "gate": "ff.w1",
    "up": "ff.w3",
    "down": "ff.w2",
}
HEADS = {384: 6, 512: 6, 768: 12, 1024: 16, 1152: 16}  # of the authors' sizes, by width


def architecture(shapes: Shapes, hyper: Hyperparameters) -> PriorArchitecture:
    # One tensor with two names: files that hold tensors once may have either.
    tokens = "tok_emb" if "tok_emb.weight" in shapes else "head"
    rows, width = shapes[f"{tokens}.weight"]
    if "in_proj.weight" in shapes:
        raise UserError(
            f"{hyper.path}: it joins codes by twos (proj=2), which its authors' code cannot run: "
            "take a file with proj=1"
        )
    why = f"and its width of {width} is none of the authors' sizes"
    heads = hyper.number("heads") or HEADS.get(width) or hyper.needed("heads", why=why)
    dropout, label_dropout = hyper.find("dropout"), hyper.find("drop_label")
    network = HaltonNetworkConfig(
        dim=width,
        depth=count(shapes, "transformer.layers.{}."),
        heads=heads,
        feedforward=shapes["transformer.layers.0.ff.w1.weight"][0],
        registers=shapes.get("reg_tokens.weight", (0,))[0],
        dropout=0.1 if dropout is None else float(dropout),
    )
    prior = HaltonConfig(
        steps=hyper.number("step") or HaltonConfig.steps,
        label_dropout=0.1 if label_dropout is None else float(label_dropout),
        backbone=network,
    )
    names = {
        f"backbone.blocks.{number}.{our}": f"transformer.layers.{number}.{their}"
        for number in range(network.depth)
        for our, their in BLOCK.items()
    }
    names |= {
        "backbone.tokens": tokens,
        "backbone.classes": "cls_emb",
        "backbone.positions": "pos_emb.weight",
        "backbone.norm": "last_norm.norm_final",
        "backbone.modulation": "last_norm.mlp.1",
        "backbone.bias": "head.bias",
    }
    if network.registers:
        names["backbone.registers"] = "reg_tokens.weight"
    layout = CodeLayout((square(shapes["pos_emb.weight"][0]),), (rows - 1,))
    weight = hyper.find("cfg_w")
    sampling = None if weight is None else {"guidance": 1 + float(weight)}
    return PriorArchitecture(prior, layout, shapes["cls_emb.weight"][0] - 1, names, sampling)


def outputs(prior, case: Outputs) -> dict[str, Tensor]:
    network = prior.backbone

    def logits(codes: Tensor, labels: Tensor) -> Tensor:
        """Of the mask, too."""
        return network.logits(network.features(codes.flatten(1), labels), slice(None))

    return masked_outputs(case, prior.num_classes, network.mask_id, logits)


def _files() -> tuple[PublishedPrior, ...]:
    sizes = {
        "tiny": ("384 wide, 6 layers, 6 heads", 1.5),
        "small": ("512 wide, 12 layers, 6 heads of 85", 1.0),
        "base": ("768 wide, 12 layers, 12 heads", 0.7),
        "large": ("1024 wide, 24 layers, 16 heads", 0.5),
    }
    known = (
        ("tiny", 256, "10.2", 185),
        ("small", 256, "6.40", 255),
        ("base", 256, "4.17", 263),
        ("small", 384, "6.11", 241),
        ("base", 384, "4.15", 257),
        ("large", 384, "2.59", 281),
    )
    return tuple(
        PublishedPrior(
            f"halton-maskgit-{size}-{pixels}",
            "llvictorll/Halton-MaskGIT",
            f"ImageNet_{pixels}_{size}.pth",
            f"{sizes[size][0]}, {pixels // 16} x {pixels // 16} of 16384, 1000 classes",
            f"gFID {fid}, IS {inception} (ImageNet at {pixels} px, 50k, own evaluator; 32 steps, "
            f"cfg {sizes[size][1]}, which is guidance {1 + sizes[size][1]:g} here)",
            tokenizer="llamagen-vq-ds16",
            sampling={"guidance": 1 + sizes[size][1]},
        )
        for size, pixels, fid, inception in known
    )


HALTON = PriorPeer(
    kind="halton-maskgit",
    title="Halton-MaskGIT (valeoai/Halton-MaskGIT)",
    licence="MIT",
    recognises=has(
        "cls_emb.weight",
        "pos_emb.weight",
        "head.bias",
        r"transformer\.layers\.0\.attn\.wq\.weight",
        r"last_norm\.mlp\.1\.weight",
    ),
    architecture=architecture,
    outputs=outputs,
    recipe="32 steps in Halton order, rolled for each sample, with 1 - arccos; codes are drawn "
    "again in each step after their turn; constant guidance (2.5, 2, 1.7, 1.5 for T, S, B, L), "
    "temperature 1, all codes. Of a file of another name as L's",
    sampling={"guidance": 1.5},
    tied={"head.weight": "tok_emb.weight"},
    quirks=(
        "the mask has a logit, which is left out here and so never sampled",
        "the weights of the logits are the table of codes, saved twice; they have a bias",
        "queries and keys are normalised over all heads at once, without weights",
        "a register stands behind the codes",
        "heads are as wide as division leaves: of the small one 85 of 512 / 6",
        "checkpoints are of compiled modules and hold an optimizer",
    ),
    files=_files(),
)
