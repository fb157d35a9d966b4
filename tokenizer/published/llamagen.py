"""FoundationVision/LlamaGen: its VQ tokenizers."""

from __future__ import annotations

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.resnet_names import ATTENTION, BLOCK, resnet_names
from tokenizer.published.taming import GROUPS, RESOLUTION
from tokenizer.quantizers.vector import VectorConfig


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    """Unit-length codes between taming's networks, whose levels the decoder numbers from the
    coarsest."""
    levels = count(shapes, "encoder.conv_blocks.{}.")
    channels = shapes["encoder.conv_in.weight"][0]

    def level_of(side: str, level: int) -> int:
        return level if side == "encoder" else levels - 1 - level

    def naming(side: str, part: str, level: int, number: int) -> str:
        block = f"{side}.conv_blocks.{level_of(side, level)}"
        return {
            "block": f"{block}.res.{number}",
            "attention": f"{block}.attn.{number}",
            "sample": f"{block}.{'down' if side == 'encoder' else 'up'}sample",
            "middle_block": f"{side}.mid.{2 * number}",
            "middle_attention": f"{side}.mid.1",
        }.get(part, f"{side}.{part}")

    def settings(side: str) -> dict:
        blocks = [f"{side}.conv_blocks.{level_of(side, level)}" for level in range(levels)]
        widths = [shapes[f"{block}.res.0.conv1.weight"][0] for block in blocks]
        return {
            "channels": channels,
            "multipliers": tuple(width // channels for width in widths),
            "blocks": count(shapes, f"{blocks[0]}.res.{{}}.") - (side == "decoder"),
            "attention_levels": tuple(
                k for k, block in enumerate(blocks) if f"{block}.attn.0.q.weight" in shapes
            ),
            "groups": GROUPS,
        }

    encoder = ResNetEncoderConfig(
        **settings("encoder"), out_channels=shapes["encoder.conv_out.weight"][0]
    )
    decoder = ResNetDecoderConfig(**settings("decoder"))
    num_codes, dim = shapes["quantize.embedding.weight"]
    l2_norm = hyper.flag("codebook_l2_norm")
    quantizer = VectorConfig(
        num_codes=num_codes,
        code_dim=dim,
        codebook="gradient",
        metric="l2" if l2_norm is False else "cosine",
        init="uniform",
    )
    names = resnet_names(encoder, decoder, naming, BLOCK, ATTENTION)
    names |= {
        "project_in": "quant_conv",
        "project_out": "post_quant_conv",
        "quantizer.codebook": "quantize.embedding.weight",
    }
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder, projections=True)
    return Architecture(model, hyper.number("image_size") or RESOLUTION, names)


LLAMAGEN = Peer(
    kind="llamagen",
    title="LlamaGen VQ (FoundationVision/LlamaGen)",
    licence="MIT",
    recognises=has(
        r"encoder\.conv_blocks\.0\.res\.0\.conv1\.weight",
        r"decoder\.conv_blocks\.0\..*",
        "quantize.embedding.weight",
    ),
    architecture=architecture,
    ignored=(r"quantize\.codebook_used", r"loss\..*"),
    quirks=(
        "features and codes are of unit length for the search, and the decoder gets the unit row; "
        "the stored codebook "
        "is not of unit length",
        "the decoder numbers its levels from the coarsest, taming's from the finest",
        "where a checkpoint holds `ema` and `model`, the authors evaluate `ema`",
        "`quantize.codebook_used` counts use in training and is ignored",
    ),
    files=(
        PublishedFile(
            "llamagen-vq-ds16",
            "FoundationVision/LlamaGen",
            "vq_ds16_c2i.pt",
            "f16, 16384 codes of 8",
            "rFID 2.19 at 256 px, 0.94 at 384 px scaled down, 0.70 at 512 px (ImageNet val, 50k); "
            "PSNR 20.79, SSIM "
            "0.675, usage 97 % (paper)",
        ),
        PublishedFile(
            "llamagen-vq-ds8",
            "FoundationVision/LlamaGen",
            "vq_ds8_c2i.pt",
            "f8, 16384 codes of 8",
            "rFID 0.59 at 256 px (ImageNet val, 50k)",
        ),
        PublishedFile(
            "llamagen-vq-ds16-t2i",
            "peizesun/llamagen_t2i",
            "vq_ds16_t2i.pt",
            "f16, 16384 codes of 8",
            "rFID 2.47, PSNR 20.65, SSIM 0.54 (ImageNet val at 256 px, measured by SEED-Voken)",
        ),
    ),
)
