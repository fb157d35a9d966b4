"""Our packed transformer blocks under the names that descend from CLIP's."""

from __future__ import annotations

BLOCK = {
    "norm1": "ln_1",
    "norm2": "ln_2",
    "out_proj": "attn.out_proj",
    "mlp_in": "mlp.c_fc",
    "mlp_out": "mlp.c_proj",
}


def transformer_names(ours: str, theirs: str, blocks: str, depth: int) -> dict[str, str]:
    """Of the transformer `ours` whose norms stand in the module `theirs`, and whose blocks are
    `blocks`.0, .1, ..."""
    names = {f"{ours}.norm_in": f"{theirs}.ln_pre", f"{ours}.norm_out": f"{theirs}.ln_post"}
    for number in range(depth):
        names |= {
            f"{ours}.blocks.{number}.{part}": f"{blocks}.{number}.{their}"
            for part, their in BLOCK.items()
        }
        for leaf in ("weight", "bias"):
            names[f"{ours}.blocks.{number}.in_proj.{leaf}"] = (
                f"{blocks}.{number}.attn.in_proj_{leaf}"
            )
    return names
