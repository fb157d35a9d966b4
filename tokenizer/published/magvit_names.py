"""Our convolutional networks without attention under the names of the projects that publish such
networks."""

from __future__ import annotations

import math
from collections.abc import Callable

from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.published.peer import Shapes, count

# Of a module its name there, from (side, part, level, number): "encoder" or "decoder"; "block",
# "middle", "sample", "norm" or one of ENDS; the resolution (0 the finest), and the number among its
# like.
Naming = Callable[[str, str, int, int], str]
ENDS = ("conv_in", "norm_out", "conv_out")
BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "nin_shortcut",
}
GROUPS = 32  # of every group norm


def magvit_names(
    encoder: MagvitEncoderConfig, decoder: MagvitDecoderConfig, name: Naming
) -> dict[str, str]:
    """Our modules -> theirs."""
    names, place = _ends("encoder", encoder.blocks, name), 0
    inner = ".conv" if encoder.downsampling == "conv" else ""
    for level in range(len(encoder.multipliers)):
        for number in range(encoder.blocks):
            names |= _block(
                f"encoder.down.{place + number}", name("encoder", "block", level, number)
            )
        place += encoder.blocks + 1
        names[f"encoder.down.{place - 1}{inner}"] = name("encoder", "sample", level, 0)
    return names | magvit_decoder_names(decoder, name)


def magvit_decoder_names(decoder: MagvitDecoderConfig, name: Naming) -> dict[str, str]:
    """Our modules of a decoder -> theirs."""
    names = _ends("decoder", decoder.blocks, name)
    for place, level in enumerate(reversed(range(len(decoder.multipliers)))):
        for number in range(decoder.blocks):
            names |= _block(f"decoder.up.{place}.{number}", name("decoder", "block", level, number))
        names[f"decoder.up.{place}.{decoder.blocks}.conv"] = name("decoder", "sample", level, 0)
        names[f"decoder.norms.{place}.scale"] = name("decoder", "norm", level, 0) + ".gamma"
        names[f"decoder.norms.{place}.shift"] = name("decoder", "norm", level, 0) + ".beta"
    return names


def _ends(side: str, blocks: int, name: Naming) -> dict[str, str]:
    names = {f"{side}.{part}": name(side, part, 0, 0) for part in ENDS}
    for number in range(blocks):
        names |= _block(f"{side}.middle.{number}", name(side, "middle", 0, number))
    return names


def _block(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.{part}": f"{theirs}.{their}" for part, their in BLOCK.items()}


def sizes(shapes: Shapes, side: str, levels: int, name: Naming) -> dict:
    """What a network's shapes tell of it: channels, multipliers, blocks and groups."""
    block = name(side, "block", 0, 0).removesuffix("0")
    widths = [shapes[name(side, "block", level, 0) + ".conv1.weight"][0] for level in range(levels)]
    stem = shapes.get("encoder.conv_in.weight")  # not of a decoder alone
    channels = stem[0] if stem else math.gcd(*widths)
    return {
        "channels": channels,
        "multipliers": tuple(width // channels for width in widths),
        "blocks": count(shapes, block + "{}."),
        "groups": GROUPS,
    }
