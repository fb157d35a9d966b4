"""diffusers' VQModel: taming's VQGAN in other names, with a free number of groups."""

from __future__ import annotations

import math

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.resnet_names import resnet_names
from tokenizer.quantizers.vector import VectorConfig
from training.errors import UserError

BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "conv_shortcut",
}
ATTENTION = {
    "norm": "group_norm",
    "query": "to_q",
    "key": "to_k",
    "value": "to_v",
    "out": "to_out.0",
}
# What versions of diffusers before 0.17 called the parts of attention.
OLD_ATTENTION = ATTENTION | {"query": "query", "key": "key", "value": "value", "out": "proj_attn"}
RESOLUTION = 256


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    if (
        hyper.find("norm_type") not in (None, "group")
        or "decoder.conv_norm_out.norm_layer.weight" in shapes
    ):
        raise UserError(
            f"{hyper.path}: norm_type={hyper.find('norm_type')} (MoVQ) is not known here, only "
            "group norms"
        )
    if hyper.flag("lookup_from_codebook"):
        raise UserError(
            f"{hyper.path}: lookup_from_codebook=true is a variant of VQModel that is not known "
            "here"
        )
    if hyper.find("act_fn") not in (None, "silu", "swish"):
        raise UserError(f"{hyper.path}: act_fn={hyper.find('act_fn')} is not known here, only silu")
    groups = hyper.needed(
        "norm_num_groups", why="and shapes do not tell how many channels a group norm joins"
    )
    levels = count(shapes, "encoder.down_blocks.{}.")
    stem = shapes["encoder.conv_in.weight"][0]

    def settings(side: str) -> dict:
        trunk = "encoder.down_blocks" if side == "encoder" else "decoder.up_blocks"
        blocks = [f"{trunk}.{k if side == 'encoder' else levels - 1 - k}" for k in range(levels)]
        widths = [shapes[f"{block}.resnets.0.conv1.weight"][0] for block in blocks]
        channels = math.gcd(*widths)
        attended = [f"{block}.attentions.0.group_norm.weight" in shapes for block in blocks]
        return {
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "blocks": count(shapes, f"{blocks[0]}.resnets.{{}}.") - (side == "decoder"),
            "attention": f"{side}.mid_block.attentions.0.group_norm.weight" in shapes,
            "attention_levels": tuple(k for k, is_attended in enumerate(attended) if is_attended),
            "groups": groups,
        }

    def naming(side: str, part: str, level: int, number: int) -> str:
        trunk = (
            f"encoder.down_blocks.{level}"
            if side == "encoder"
            else f"decoder.up_blocks.{levels - 1 - level}"
        )
        return {
            "block": f"{trunk}.resnets.{number}",
            "attention": f"{trunk}.attentions.{number}",
            "sample": f"{trunk}.{'down' if side == 'encoder' else 'up'}samplers.0",
            "middle_block": f"{side}.mid_block.resnets.{number}",
            "middle_attention": f"{side}.mid_block.attentions.0",
            "norm_out": f"{side}.conv_norm_out",
        }.get(part, f"{side}.{part}")

    encoder = ResNetEncoderConfig(
        **settings("encoder"), stem=stem, out_channels=shapes["encoder.conv_out.weight"][0]
    )
    decoder = ResNetDecoderConfig(**settings("decoder"))
    num_codes, dim = shapes["quantize.embedding.weight"]
    quantizer = VectorConfig(num_codes=num_codes, code_dim=dim, codebook="gradient", init="uniform")
    is_old = any(name.endswith(".proj_attn.weight") for name in shapes)
    names = resnet_names(encoder, decoder, naming, BLOCK, OLD_ATTENTION if is_old else ATTENTION)
    names |= {
        "project_in": "quant_conv",
        "project_out": "post_quant_conv",
        "quantizer.codebook": "quantize.embedding.weight",
    }
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder, projections=True)
    size = hyper.number("sample_size") or RESOLUTION
    return Architecture(model, size, names)


DIFFUSERS = Peer(
    kind="diffusers",
    title="VQModel (huggingface/diffusers)",
    licence="Apache-2.0 (library); weights have their own",
    recognises=has(
        r"encoder\.down_blocks\.0\.resnets\.0\.conv1\.weight",
        r"decoder\.up_blocks\.0\..*",
        "quantize.embedding.weight",
    ),
    architecture=architecture,
    quirks=(
        "the number of groups is free, and stands in config.json alone",
        "the decoder numbers its levels from the coarsest",
        "attention is of linear maps, and has other names in files of old versions; both load",
        "`norm_type: spatial` (MoVQ) and `lookup_from_codebook` are other networks and are refused",
    ),
    files=(
        PublishedFile(
            "ldm-celebahq-256",
            "CompVis/ldm-celebahq-256",
            "vqvae/diffusion_pytorch_model.bin",
            "f4, 8192 codes of 3",
            config="vqvae/config.json",
        ),
        PublishedFile(
            "vq-diffusion-ithq",
            "microsoft/vq-diffusion-ithq",
            "vqvae/diffusion_pytorch_model.bin",
            "f8",
            config="vqvae/config.json",
        ),
        PublishedFile(
            "amused-256",
            "amused/amused-256",
            "vqvae/diffusion_pytorch_model.safetensors",
            "f16, no attention",
            config="vqvae/config.json",
        ),
    ),
)
