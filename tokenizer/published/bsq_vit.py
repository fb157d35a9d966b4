"""zhaoyue-zephyrus/bsq-vit: vision transformers with binary spherical quantization, or a
codebook."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.patch_vit import PatchViTDecoderConfig
from tokenizer.encoders.patch_vit import PatchViTEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.transformer_names import transformer_names
from tokenizer.quantizers.lookup_free import (
    COUNTED_BITS,
    BSQConfig,
    LookupFreeConfig,
    LookupFreeQuantizer,
)
from tokenizer.quantizers.vector import VectorConfig
from training.errors import UserError


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    if hyper.flag("logit_laplace"):
        raise UserError(
            f"{hyper.path}: logit_laplace=true is a variant of BSQ-ViT that is not known here"
        )
    patch = math.isqrt(shapes["encoder.conv1.weight"][1] // 3)
    side = math.isqrt(shapes["encoder.positional_embedding"][0])

    def sizes(name: str, section: str) -> dict:
        first = f"{name}.transformer.resblocks."
        heads = hyper.number(section, "heads") or hyper.number("vitconfig", "heads")
        return {
            "channels": shapes[f"{name}.positional_embedding"][1],
            "depth": count(shapes, first + "{}."),
            "heads": heads
            or hyper.needed("heads", why="and shapes do not tell the heads of attention"),
            "mlp": shapes[f"{first}0.mlp.c_fc.weight"][0],
        }

    dim = shapes["quant_embed.weight"][0]
    encoder = PatchViTEncoderConfig(**sizes("encoder", "vitconfig"), patch=patch, out_channels=dim)
    hidden = shapes.get("decoder.ffn.0.weight", (0,))[0]
    decoder = PatchViTDecoderConfig(**sizes("decoder", "dvitconfig"), hidden=hidden)
    names = {
        "encoder.embed": "encoder.conv1",
        "encoder.positions": "encoder.positional_embedding",
        "encoder.head": "quant_embed",
        "decoder.embed": "post_quant_embed",
        "decoder.positions": "decoder.positional_embedding",
        "decoder.hidden": "decoder.ffn.0",
        "decoder.to_pixels": "decoder.conv_out",
    }
    for config in (encoder, decoder):
        name = "encoder" if config is encoder else "decoder"
        names |= transformer_names(
            f"{name}.transformer", name, f"{name}.transformer.resblocks", config.depth
        )
    if "quantize.embedding.weight" in shapes:
        metric = "cosine" if hyper.flag("l2_norm") else "l2"
        num_codes = shapes["quantize.embedding.weight"][0]
        quantizer = VectorConfig(
            num_codes=num_codes, code_dim=dim, codebook="gradient", metric=metric
        )
        names["quantizer.codebook"] = "quantize.embedding.weight"
    elif hyper.flag("post_q_l2_norm") is False or (
        hyper.values and hyper.flag("post_q_l2_norm") is None
    ):
        quantizer = LookupFreeConfig(bits=dim, entropy=0.0 if dim > COUNTED_BITS else 0.1)
    else:
        quantizer = BSQConfig(bits=dim)
    return Architecture(
        VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder), side * patch, names
    )


def outputs(model: nn.Module, latents: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    """The authors' numbers of codes: sums in float32, which loses the lowest of more bits than it
    has. A case holds those; codes here are exact."""
    bits = latents.shape[1]
    if not isinstance(model.quantizer, LookupFreeQuantizer) or bits <= EXACT_BITS:
        return {}
    rows = latents.flatten(2).transpose(1, 2)
    rows = F.normalize(rows, dim=-1) if model.quantizer.spherical else rows
    signs = rows + (torch.where(rows > 0, 1.0, -1.0) - rows)
    basis = 2 ** torch.arange(bits - 1, -1, -1, device=rows.device)
    return {"codes": ((signs + 1) / 2 * basis).sum(-1).long()}


EXACT_BITS = 24  # of the whole numbers that float32 holds
SIZES = {"vitconfig": {"heads": 12}, "dvitconfig": {"heads": 12}, "post_q_l2_norm": True}
WHERE = "https://github.com/zhaoyue-zephyrus/bsq-vit (README)"
BSQ_VIT = Peer(
    kind="bsq-vit",
    title="BSQ-ViT (zhaoyue-zephyrus/bsq-vit)",
    licence="MIT",
    recognises=has(
        "encoder.conv1.weight",
        "quant_embed.weight",
        r"encoder\.transformer\.resblocks\.0\.ln_1\.weight",
    ),
    architecture=architecture,
    outputs=outputs,
    ignored=(r"quantize\.(group_)?basis",),
    quirks=(
        "patches are rows of (colour, row, column) through a linear map without bias",
        "channel 0 is the highest bit of a code; vectors are ±1/sqrt(bits)",
        "checkpoints hold `ema_state_dict` beside `state_dict`, and averages are what the better "
        "figures are of",
        "the authors clamp to [-1, 1]",
        "positions are learned: other sizes of images get interpolated ones, which the authors do "
        "not have",
        "of more than 24 bits the authors' numbers of codes are sums in float32, which lose the "
        "lowest bits; here they are exact. Such codes are encoded, cached and decoded, and "
        "reconstructions measured; no prior here has a logit for each, and `eval.run codebook` and "
        "`rate` do not count them",
    ),
    files=(
        PublishedFile(
            "bsq-vit-18bit",
            WHERE,
            "checkpoint.pt",
            "256 px, f8, 18 bits, 768 wide, 12 layers, 12 heads",
            "PSNR 24.79, SSIM .7319, LPIPS .0836, rFID 1.34; averages 24.80, .7314, .0820, 1.23 "
            "(ImageNet val)",
            hyperparameters=SIZES,
        ),
        PublishedFile(
            "bsq-vit-18bit-grouped",
            WHERE,
            "checkpoint.pt",
            "the same, trained with entropies of groups of bits",
            "PSNR 25.36, SSIM .7578, LPIPS .0761, rFID 1.14; averages 25.80, .7680, .0729, 1.30 "
            "(ImageNet val)",
            hyperparameters=SIZES,
        ),
        PublishedFile(
            "bsq-vit-36bit",
            WHERE,
            "checkpoint.pt",
            "the same, 36 bits",
            "PSNR 27.88, SSIM .8410, LPIPS .0432, rFID 0.41; averages 28.14, .8448, .0400, 0.45 "
            "(ImageNet val)",
            hyperparameters=SIZES,
        ),
    ),
)
