"""TencentARC/SEED-Voken's Open-MAGVIT2, and SimVQ (youngsheen/SimVQ) on the same networks."""

from __future__ import annotations

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.ibq import AVERAGES
from tokenizer.published.magvit_names import magvit_names, sizes
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.taming import LEFTOVERS
from tokenizer.quantizers.lookup_free import LookupFreeConfig
from tokenizer.quantizers.simvq import SimVQConfig

RESOLUTION = 256  # pixels, where no configuration says another size: any is taken


def naming(side: str, part: str, level: int, number: int) -> str:
    """Of a level both ways, the finest is 0."""
    trunk = "down" if side == "encoder" else "up"
    sample = "downsample" if side == "encoder" else "upsample.conv1"
    return {
        "block": f"{side}.{trunk}.{level}.block.{number}",
        "sample": f"{side}.{trunk}.{level}.{sample}",
        "middle": f"{side}.mid_block.{number}",
        "norm": f"{side}.adaptive.{level}",
    }.get(part, f"{side}.{part}")


def autoencoder(
    shapes: Shapes, hyper: Hyperparameters, quantizer, quantizer_names: dict[str, str]
) -> Architecture:
    levels = count(shapes, "encoder.down.{}.")
    encoder = MagvitEncoderConfig(
        **sizes(shapes, "encoder", levels, naming),
        downsampling="centred",
        out_channels=shapes["encoder.conv_out.weight"][0],
    )
    decoder = MagvitDecoderConfig(
        **sizes(shapes, "decoder", levels, naming),
        upsampling="channels",
        adaptive="decoder.adaptive.0.gamma.weight" in shapes,
    )
    names = magvit_names(encoder, decoder, naming) | quantizer_names
    model = VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder)
    size = hyper.number("ddconfig", "resolution") or hyper.number("resolution") or RESOLUTION
    return Architecture(model, size, names)


def magvit2(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    bits = shapes["encoder.conv_out.weight"][0]
    return autoencoder(shapes, hyper, LookupFreeConfig(bits=bits, lowest_first=True), {})


def simvq(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    num_codes, dim = shapes["quantize.embedding.weight"]
    names = {
        "quantizer.frozen": "quantize.embedding.weight",
        "quantizer.transform": "quantize.embedding_proj",
    }
    return autoencoder(shapes, hyper, SimVQConfig(num_codes=num_codes, code_dim=dim), names)


NETWORKS = (
    "encoder.conv_in.weight",
    r"encoder\.mid_block\.0\.conv1\.weight",
    r"decoder\.up\.0\.block\.0\..*",
)
MAGVIT2 = Peer(
    kind="open-magvit2",
    title="Open-MAGVIT2 (TencentARC/SEED-Voken)",
    licence="Apache-2.0",
    recognises=has(*NETWORKS, without=("quantize.embedding.weight",)),
    architecture=magvit2,
    ignored=(*LEFTOVERS, r"quantize\..*"),
    quirks=(
        "channel 0 is the lowest bit of a code",
        AVERAGES,
        "convolutions that halve the resolution are padded on all sides",
        "upsampling is by channels that become pixels, the place in the 2x2 changing slowest",
        "before each of the decoder's levels a group norm takes scale and shift from the codes' "
        "deviation and mean",
    ),
    files=(
        PublishedFile(
            "open-magvit2-256",
            "TencentARC/Open-MAGVIT2-Tokenizer-256-resolution",
            "imagenet_256_L.ckpt",
            "f16, 18 bits, 4 blocks a level",
            "rFID 1.17, PSNR 21.90, usage 100 % (ImageNet val at 256 px)",
        ),
        PublishedFile(
            "open-magvit2-128",
            "TencentARC/Open-MAGVIT2-Tokenizer-128-resolution",
            "imagenet_128_L.ckpt",
            "f8, 18 bits, 4 blocks a level",
            "rFID 1.18, PSNR 25.08 (ImageNet val at 128 px)",
        ),
        PublishedFile(
            "open-magvit2-pretrain-16384",
            "TencentARC/Open-MAGVIT2-Tokenizer-16384-Pretrain",
            "pretrain256_16384.ckpt",
            "f16, 14 bits",
            "rFID 2.55, PSNR 22.21, SSIM 0.62 (ImageNet val at 256 px)",
        ),
        PublishedFile(
            "open-magvit2-pretrain-262144",
            "TencentARC/Open-MAGVIT2-Tokenizer-262144-Pretrain",
            "pretrain256_262144.ckpt",
            "f16, 18 bits",
            "rFID 1.67, PSNR 22.70, SSIM 0.64 (ImageNet val at 256 px)",
        ),
    ),
)
SIMVQ = Peer(
    kind="simvq",
    title="SimVQ (youngsheen/SimVQ)",
    licence="MIT (code); weights unstated",
    recognises=has(*NETWORKS, "quantize.embedding.weight", "quantize.embedding_proj.weight"),
    architecture=simvq,
    ignored=LEFTOVERS,
    quirks=(
        "the networks are Open-MAGVIT2's without adaptive group norms",
        "codes are rows of a frozen table times a learned linear map, both of which the file holds; the authors' "
        "`get_codebook_entry` leaves the map out, their networks do not",
        AVERAGES,
    ),
    files=(
        PublishedFile(
            "simvq-262144",
            "zyx123/SimVQ",
            "vq_log/simvq_262k/epoch=49-step=250250.ckpt",
            "f8, 262144 codes of 128",
            "rFID 1.99, LPIPS 0.11, PSNR 24.68, SSIM 0.803, usage 100 % (ImageNet val at 128 px)",
        ),
    ),
)
