"""CompVis/taming-transformers: VQGAN and its Gumbel variant; and the VQ first stages of latent
diffusion."""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Evidence, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.resnet_names import ATTENTION, BLOCK, resnet_names
from tokenizer.quantizers.gumbel import GumbelConfig
from tokenizer.quantizers.vector import VectorConfig

GROUPS = 32  # of every group norm
RESOLUTION = 256  # pixels, where no configuration says another size: any is taken


def naming(side: str, part: str, level: int, number: int) -> str:
    """taming's names: of a level both ways, the finest is 0."""
    trunk = "down" if side == "encoder" else "up"
    return {
        "block": f"{side}.{trunk}.{level}.block.{number}",
        "attention": f"{side}.{trunk}.{level}.attn.{number}",
        "sample": f"{side}.{trunk}.{level}.{trunk}sample",
        "middle_block": f"{side}.mid.block_{number + 1}",
        "middle_attention": f"{side}.mid.attn_1",
    }.get(part, f"{side}.{part}")


def networks(shapes: Shapes) -> tuple[ResNetEncoderConfig, ResNetDecoderConfig]:
    """taming's encoder and decoder, from the shapes of their tensors alone."""
    channels = shapes["encoder.conv_in.weight"][0]
    settings = {}
    for side, trunk in (("encoder", "down"), ("decoder", "up")):
        levels = range(count(shapes, f"{side}.{trunk}.{{}}."))
        widths = [shapes[f"{side}.{trunk}.{level}.block.0.conv1.weight"][0] for level in levels]
        settings[side] = {
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "blocks": count(shapes, f"{side}.{trunk}.0.block.{{}}.") - (side == "decoder"),
            "attention": f"{side}.mid.attn_1.q.weight" in shapes,
            "attention_levels": tuple(
                k for k in levels if f"{side}.{trunk}.{k}.attn.0.q.weight" in shapes
            ),
            "groups": GROUPS,
        }
    encoder = ResNetEncoderConfig(
        **settings["encoder"], out_channels=shapes["encoder.conv_out.weight"][0]
    )
    return encoder, ResNetDecoderConfig(**settings["decoder"])


def autoencoder(
    shapes: Shapes, hyper: Hyperparameters, quantizer, quantizer_names: dict[str, str]
) -> Architecture:
    """A quantizer between taming's networks, with a projection on each side."""
    encoder, decoder = networks(shapes)
    names = resnet_names(encoder, decoder, naming, BLOCK, ATTENTION)
    names |= {"project_in": "quant_conv", "project_out": "post_quant_conv", **quantizer_names}
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder, projections=True)
    size = hyper.number("ddconfig", "resolution") or hyper.number("resolution") or RESOLUTION
    return Architecture(model, size, names)


def vqgan(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    num_codes, dim = shapes["quantize.embedding.weight"]
    metric = "angle" if hyper.flag("l2_normalize") else "l2"
    quantizer = VectorConfig(
        num_codes=num_codes, code_dim=dim, codebook="gradient", metric=metric, init="uniform"
    )
    return autoencoder(
        shapes, hyper, quantizer, {"quantizer.codebook": "quantize.embedding.weight"}
    )


def gumbel(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    num_codes, dim = shapes["quantize.embed.weight"]
    kl = float(hyper.find("kl_weight") or 5e-4)
    quantizer = GumbelConfig(num_codes=num_codes, code_dim=dim, kl=kl)
    names = {"quantizer.codebook": "quantize.embed.weight", "quantizer.logits": "quantize.proj"}
    return autoencoder(shapes, hyper, quantizer, names)


def logits(model: nn.Module, latents: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """Of every code at every place, (B, K, h, w)."""
    return {"logits": model.quantizer.logits(latents.movedim(1, -1)).movedim(-1, 1)}


NETWORKS = (
    "encoder.conv_in.weight",
    r"encoder\.down\.0\.block\.0\.norm1\.weight",
    r"decoder\.up\.0\.block\.0\..*",
)
PLAIN = has(
    *NETWORKS,
    "quantize.embedding.weight",
    r"encoder\.mid\.block_1\..*",
    without=(r"quantize\.embedding_proj\..*", "quantize.codebook_used"),
)


def is_ibq(evidence: Evidence) -> bool:
    """IBQ's files have the names of taming's: its configuration tells, or that it has averages."""
    if evidence.target:
        return evidence.target.rpartition(".")[2].lower() == "ibq"
    return evidence.shadowed


LEFTOVERS = (r"loss\..*", r"model_ema\.(decay|num_updates)")
HEIBOX = "https://heibox.uni-heidelberg.de (CompVis/taming-transformers, README)"
QUIRKS = (
    "1x1 projections stand on both sides of the quantizer, also where widths agree",
    "every group norm has 32 groups",
    "SEED-Voken's VQModel with `l2_normalize` searches unit vectors, and gives the decoder the "
    "row as it is stored",
    "checkpoints are Lightning's and hold more than tensors; `loss.*` is left over from training",
)
TAMING = Peer(
    kind="taming",
    title="VQGAN (CompVis/taming-transformers); "
    "VQ first stages of latent diffusion (CompVis/latent-diffusion)",
    licence="MIT (code); weights unstated",
    recognises=lambda evidence: PLAIN(evidence) and not is_ibq(evidence),
    architecture=vqgan,
    ignored=LEFTOVERS,
    quirks=QUIRKS,
    files=(
        PublishedFile(
            "taming-vqgan-f16-1024",
            HEIBOX,
            "last.ckpt",
            "f16, 1024 codes of 256; vqgan_imagenet_f16_1024",
            "rFID 10.54 (train) / 7.94 (val), torch-fidelity; MaskBit's README: rFID 7.96, PSNR "
            "20.18, SSIM 0.52",
        ),
        PublishedFile(
            "taming-vqgan-f16-16384",
            HEIBOX,
            "last.ckpt",
            "f16, 16384 codes of 256; vqgan_imagenet_f16_16384",
            "rFID 7.41 (train) / 4.98 (val), torch-fidelity",
        ),
        PublishedFile(
            "ldm-vq-f8", HEIBOX, "model.ckpt", "f8, 16384 codes of 4; OpenImages", "rFID 1.14 (val)"
        ),
        PublishedFile(
            "ldm-vq-f8-n256",
            HEIBOX,
            "model.ckpt",
            "f8, 256 codes of 4; OpenImages",
            "rFID 1.49 (val)",
        ),
        PublishedFile("ldm-vq-f16", HEIBOX, "model.ckpt", "f16, 16384 codes of 8; OpenImages"),
    ),
)
GUMBEL = Peer(
    kind="taming-gumbel",
    title="Gumbel VQGAN (CompVis/taming-transformers)",
    licence="MIT (code); weights unstated",
    recognises=has(*NETWORKS, "quantize.embed.weight", "quantize.proj.weight"),
    architecture=gumbel,
    ignored=LEFTOVERS,
    quirks=(
        *QUIRKS,
        "the authors draw codes at random in evaluation, too (hard samples at temperature 1), and "
        "their figures are "
        "of those; here the code is the largest logit",
    ),
    files=(
        PublishedFile(
            "taming-gumbel-f8",
            HEIBOX,
            "last.ckpt",
            "f8, 8192 codes of 256; vqgan_gumbel_f8, OpenImages",
            "rFID 3.24 (train) / 1.49 (val), torch-fidelity, of codes drawn at random",
        ),
    ),
    outputs=logits,
)
