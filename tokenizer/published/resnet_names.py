"""Our residual encoder and decoder of VQGAN under the names of the projects that publish such
networks."""

from __future__ import annotations

from collections.abc import Callable, Mapping

from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig, attention_levels

# Of a module its name there, from (side, part, level, number): "encoder" or "decoder", one of
# PARTS, the resolution (0 the finest), and the number among its like.
Naming = Callable[[str, str, int, int], str]
PARTS = (
    "conv_in",
    "block",
    "attention",
    "sample",
    "middle_block",
    "middle_attention",
    "norm_out",
    "conv_out",
)


def resnet_names(
    encoder: ResNetEncoderConfig,
    decoder: ResNetDecoderConfig,
    name: Naming,
    block: Mapping[str, str],
    attention: Mapping[str, str],
    sample: str = ".conv",
) -> dict[str, str]:
    """Our modules -> theirs. `block` and `attention` name their parts there, `sample` a convolution
    that resamples."""
    names: dict[str, str] = {}

    def add(ours: str, theirs: str, parts: Mapping[str, str]) -> None:
        names.update({f"{ours}.{part}": f"{theirs}.{their}" for part, their in parts.items()})

    for side, config, trunk in (("encoder", encoder, "down"), ("decoder", decoder, "up")):
        for part in ("conv_in", "norm_out", "conv_out"):
            names[f"{side}.{part}"] = name(side, part, 0, 0)
        levels, attended, place = list(range(len(config.multipliers))), attention_levels(config), 0
        last = (
            levels[-1] if side == "encoder" else 0
        )  # the level without a change of resolution after it
        for level in levels if side == "encoder" else reversed(levels):
            for number in range(config.blocks + (side == "decoder")):
                add(f"{side}.{trunk}.{place}", name(side, "block", level, number), block)
                place += 1
                if level in attended:
                    add(
                        f"{side}.{trunk}.{place}", name(side, "attention", level, number), attention
                    )
                    place += 1
            if level != last:
                names[f"{side}.{trunk}.{place}.conv"] = name(side, "sample", level, 0) + sample
                place += 1
        add(f"{side}.middle.0", name(side, "middle_block", 0, 0), block)
        add(f"{side}.middle.{1 + config.attention}", name(side, "middle_block", 0, 1), block)
        if config.attention:
            add(f"{side}.middle.1", name(side, "middle_attention", 0, 0), attention)
    return names


BLOCK = {
    "norm1": "norm1",
    "conv1": "conv1",
    "norm2": "norm2",
    "conv2": "conv2",
    "shortcut": "nin_shortcut",
}
ATTENTION = {"norm": "norm", "query": "q", "key": "k", "value": "v", "out": "proj_out"}
