"""rosinality/vq-vae-2-pytorch: VQ-VAE-2's two levels."""

from __future__ import annotations

from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, Place, PublishedFile, Shapes, has
from tokenizer.quantizers.vector import VectorConfig

RESOLUTION = 256  # pixels, where no configuration says another size: any is taken


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    channels, blocks = shapes["enc_b.blocks.4.weight"][0], _blocks(shapes, "enc_b", 5)
    sizes = {
        "residual_blocks": blocks,
        "residual_channels": shapes["enc_b.blocks.5.conv.1.weight"][0],
    }
    decay = float(hyper.find("decay") or 0.99)

    def quantizer(name: str) -> VectorConfig:
        dim, num_codes = shapes[f"{name}.embed"]
        return VectorConfig(num_codes=num_codes, code_dim=dim, decay=decay)

    names: dict[str, str | Place] = {
        "project_top": "quantize_conv_t",
        "project_in": "quantize_conv_b",
        "upsample": "upsample_t",
    }
    for ours, theirs in (("top_quantizer", "quantize_t"), ("quantizer", "quantize_b")):
        names[f"{ours}.codebook"] = Place(f"{theirs}.embed", transposed=True)
        names[f"{ours}.mean_sums"] = Place(f"{theirs}.embed_avg", transposed=True)
        names[f"{ours}.mean_counts"] = Place(f"{theirs}.cluster_size")
    # Numbers in `blocks` count activations and residual blocks.
    for ours, theirs, halvings in (("encoder", "enc_b", 2), ("top_encoder", "enc_t", 1)):
        names |= {f"{ours}.down.{k}": f"{theirs}.blocks.{2 * k}" for k in range(halvings)}
        names[f"{ours}.body"] = f"{theirs}.blocks.{2 * halvings}"
        names |= _stack(ours, theirs, 2 * halvings + 1, blocks)
    for ours, theirs, doublings in (("decoder", "dec", 2), ("top_decoder", "dec_t", 1)):
        names[f"{ours}.body"] = f"{theirs}.blocks.0"
        names |= _stack(ours, theirs, 1, blocks)
        names |= {
            f"{ours}.up.{k}": f"{theirs}.blocks.{blocks + 2 + 2 * k}" for k in range(doublings)
        }
    model = VQVAE2Config(
        encoder=ConvEncoderConfig(channels=channels, stride=4, **sizes),
        decoder=ConvDecoderConfig(channels=channels, **sizes),
        top=quantizer("quantize_t"),
        bottom=quantizer("quantize_b"),
        top_stride=2,
        channels=channels,
        narrow=True,
        **sizes,
    )
    return Architecture(model, hyper.number("size") or RESOLUTION, names)


def _blocks(shapes: Shapes, stack: str, first: int) -> int:
    number = 0
    while f"{stack}.blocks.{first + number}.conv.1.weight" in shapes:
        number += 1
    return number


def _stack(ours: str, theirs: str, first: int, blocks: int) -> dict[str, str]:
    return {
        f"{ours}.stack.blocks.{k}.{layer}": f"{theirs}.blocks.{first + k}.conv.{layer}"
        for k in range(blocks)
        for layer in (1, 3)
    }


ROSINALITY = Peer(
    kind="rosinality",
    title="VQ-VAE-2 (rosinality/vq-vae-2-pytorch)",
    licence="MIT",
    recognises=has(
        r"enc_b\.blocks\.0\.weight",
        r"quantize_t\.embed",
        r"quantize_b\.embed",
        r"upsample_t\.weight",
    ),
    architecture=architecture,
    quirks=(
        "codebooks are stored with a column for each code, beside their moving averages",
        "between the grids the networks are narrower than the paper's",
    ),
    files=(
        PublishedFile(
            "rosinality-vqvae2-ffhq",
            "https://github.com/rosinality/vq-vae-2-pytorch",
            "vqvae_560.pt",
            "FFHQ at 256 px: 32 x 32 and 64 x 64 of 512 codes of 64",
        ),
    ),
)
