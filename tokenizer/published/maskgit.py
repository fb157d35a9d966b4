"""MaskGIT's VQGAN, as bytedance/1d-tokenizer publishes it, and MaskBit's tokenizers, which are
built alike."""

from __future__ import annotations

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.magvit_names import magvit_names, sizes
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.quantizers.lookup_free import LookupFreeConfig
from tokenizer.quantizers.vector import VectorConfig
from training.errors import UserError

RESOLUTION = 256  # pixels, where no configuration says another size: any is taken
UNIT = {"shortcut": "output", "unit_range": True}


def naming(side: str, part: str, level: int, number: int) -> str:
    """1d-tokenizer's and open-muse's names: of a level both ways, the finest is 0."""
    trunk = "down" if side == "encoder" else "up"
    return {
        "block": f"{side}.{trunk}.{level}.block.{number}",
        "sample": f"{side}.{trunk}.{level}.upsample_conv",
        "middle": f"{side}.mid.{number}",
    }.get(part, f"{side}.{part}")


def maskgit(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    levels = count(shapes, "encoder.down.{}.")
    encoder = MagvitEncoderConfig(
        **sizes(shapes, "encoder", levels, naming),
        **UNIT,
        out_channels=shapes["encoder.conv_out.weight"][0],
    )
    decoder = MagvitDecoderConfig(**sizes(shapes, "decoder", levels, naming), **UNIT)
    num_codes, dim = shapes["quantize.embedding.weight"]
    quantizer = VectorConfig(num_codes=num_codes, code_dim=dim, codebook="gradient", init="uniform")
    names = magvit_names(encoder, decoder, naming) | {
        "quantizer.codebook": "quantize.embedding.weight"
    }
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder)
    return Architecture(model, hyper.number("resolution") or RESOLUTION, names)


def maskbit(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    """Bits, or a codebook; two orders of the decoder's levels have been published."""
    levels = count(shapes, "encoder.down.{}.")
    finest_first = "decoder.up.0.upsample_conv.weight" not in shapes

    def naming(side: str, part: str, level: int, number: int) -> str:
        place = level if side == "encoder" or finest_first else levels - 1 - level
        trunk = f"{side}.{'down' if side == 'encoder' else 'up'}.{place}"
        return {
            "block": f"{trunk}.res_blocks.{number}",
            "sample": f"{trunk}.{'down_conv' if side == 'encoder' else 'upsample_conv'}",
            "middle": f"{side}.mid.res_blocks.{number}",
        }.get(part, f"{side}.{part}")

    downsampling = "conv" if "encoder.down.0.down_conv.weight" in shapes else "average"
    dim = shapes["encoder.conv_out.weight"][0]
    encoder = MagvitEncoderConfig(
        **sizes(shapes, "encoder", levels, naming),
        **UNIT,
        downsampling=downsampling,
        out_channels=dim,
    )
    decoder = MagvitDecoderConfig(**sizes(shapes, "decoder", levels, naming), **UNIT)
    names = magvit_names(encoder, decoder, naming)
    if "quantize.embedding.weight" in shapes:
        metric = "cosine" if hyper.flag("use_l2_normalisation") else "l2"
        num_codes = shapes["quantize.embedding.weight"][0]
        quantizer = VectorConfig(
            num_codes=num_codes, code_dim=dim, codebook="gradient", metric=metric, init="uniform"
        )
        names["quantizer.codebook"] = "quantize.embedding.weight"
    else:
        told = shapes.get("quantize.bits_to_indices", (dim,))[0]
        if told != dim:
            raise UserError(
                f"{hyper.path}: codes of {told} bits and features of {dim} channels do not go "
                "together"
            )
        quantizer = LookupFreeConfig(bits=dim, lowest_first=True)
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder)
    return Architecture(
        model,
        hyper.number("preprocessing", "resolution") or hyper.number("resolution") or RESOLUTION,
        names,
    )


SHORTCUT = (
    "where a block changes width, its 1x1 shortcut is of the block's own output, and the block's "
    "input is dropped: so "
    "the networks were trained"
)
RANGE = "images are in [0, 1] on both sides"
MASKGIT = Peer(
    kind="maskgit",
    title="MaskGIT-VQGAN (bytedance/1d-tokenizer, from open-muse)",
    licence="Apache-2.0",
    recognises=has(
        r"encoder\.down\.0\.block\.0\.conv1\.weight",
        r"encoder\.mid\.0\.conv1\.weight",
        "quantize.embedding.weight",
    ),
    architecture=maskgit,
    unit_range=True,
    quirks=(
        RANGE,
        SHORTCUT,
        "resolution is halved by averaging, without weights; there is no attention",
    ),
    files=(
        PublishedFile(
            "maskgit-vqgan",
            "fun-research/TiTok",
            "maskgit-vqgan-imagenet-f16-256.bin",
            "f16, 1024 codes of 256",
            "rFID 2.28 (MaskGIT's paper); MaskBit's README: rFID 1.96, IS 178.3, PSNR 18.6, SSIM "
            "0.47, usage 0.45 "
            "(ImageNet val at 256 px)",
        ),
    ),
)
MASKBIT = Peer(
    kind="maskbit",
    title="MaskBit tokenizers and VQGAN+ (markweberdev/maskbit)",
    licence="Apache-2.0",
    recognises=has(
        r"encoder\.down\.0\.res_blocks\.0\.conv1\.weight",
        r"decoder\.up\.0\.res_blocks\..*",
        "encoder.conv_out.weight",
    ),
    architecture=maskbit,
    ignored=(
        r"quantize\.bits_to_indices",
        r"quantize\.codebook",
        r"loss\..*",
        r"discriminator\..*",
    ),
    unit_range=True,
    quirks=(
        RANGE,
        SHORTCUT,
        "channel 0 is the lowest bit of a code",
        "two orders of the decoder's levels have been published; which one it is shows in where "
        "the 3x3 after "
        "upsampling stands",
    ),
    files=tuple(
        PublishedFile(
            f"maskbit-{bits}bit",
            f"markweber/maskbit_tokenizer_{bits}bit",
            "model.safetensors",
            f"f16, {bits} bits",
            config="config.json",
        )
        for bits in (10, 12, 14, 16, 18)
    ),
)
