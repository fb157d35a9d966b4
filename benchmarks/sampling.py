"""Sampling speed: the decode engine beside x-transformers' cached `generate`, and MaskGIT beside
it.

    python -m benchmarks.sampling [engine|guidance|families ...]     all three, on the GPU where there is one

Results go to RESULTS.md beside this file. Networks are random: only time is measured.
"""

from __future__ import annotations

import copy
import sys
import warnings
from collections.abc import Callable
from typing import Any

import torch

from benchmarks.measure import keep, median, ratio, run_parts, seconds, table
from priors.backbone import Backbone, BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.masked import MaskedConfig
from priors.interface import Prior, SampleOptions
from tokenizer.interface import CodeLayout

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
LAYOUT, NUM_CLASSES = CodeLayout(((16, 16),), (1024,)), 10
SIZES = [(64, 12, 4, 1), (768, 12, 12, 16)]  # dim, depth, heads, batch
LARGE = [(768, 12, 12, 128), (1024, 20, 16, 128)]  # on a GPU: 94 M and 275 M parameters
BATCHES = [1, 4, 16, 64]


def x_transformers_of(backbone: Backbone) -> Any:
    """A causal backbone of one level, learned positions and a prefix as x-transformers' own model
    of its weights.

    Its sequence is [num_codes + label, code 0, code 1, ...]; the class enters every slot by
    `sum_embeds`.
    """
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from x_transformers import Decoder, TransformerWrapper

    attention, dim = backbone.blocks[0].attention, backbone.tokens.embedding_dim
    decoder = Decoder(
        dim=dim,
        depth=len(backbone.blocks),
        heads=attention.heads,
        use_rmsnorm=True,
        attn_dim_head=dim // attention.heads,
        attn_flash=True,
        attn_qk_rmsnorm=True,
        ff_mult=3,
        ff_glu=True,
        ff_swish=True,
        ff_no_bias=True,
    )
    (num_codes,), length = backbone.layout.num_codes, backbone.layout.length
    model = TransformerWrapper(
        num_tokens=num_codes + backbone.num_classes + 1,
        max_seq_len=length,
        attn_layers=decoder,
        to_logits=copy.deepcopy(backbone.heads[0]),
    )
    with torch.no_grad():
        model.token_emb.emb.weight.copy_(
            torch.cat([backbone.tokens.weight[:num_codes], backbone.classes.weight])
        )
        model.pos_emb.emb.weight.copy_(backbone.slots(None)[0][0] / model.pos_emb.scale)
    for index, block in enumerate(backbone.blocks):
        parts = (block.attention_norm, block.attention), (block.feedforward_norm, block.feedforward)
        for (norms, branch, _), (norm, module) in zip(
            decoder.layers[2 * index : 2 * index + 2], parts
        ):
            norms[0].load_state_dict(norm.state_dict())
            branch.load_state_dict(module.state_dict())
    decoder.final_norm.load_state_dict(backbone.norm.state_dict())
    return model.eval()


def causal(dim: int, depth: int, heads: int) -> Backbone:
    config = BackboneConfig(
        dim, depth, heads, dropout=0.0, positions="learned", conditioning="prefix"
    )
    return config.build(LAYOUT, NUM_CLASSES, causal=True).to(DEVICE).eval()


@torch.no_grad()
def draw_ours(backbone: Backbone, batch: int) -> None:
    """Codes of a batch by multinomial draws, as x-transformers makes them."""
    decoding, previous = (
        backbone.decoding(torch.zeros(batch, dtype=torch.int64, device=DEVICE)),
        None,
    )
    for slot in range(LAYOUT.length):
        logits = decoding.step(slot, previous)
        previous = torch.multinomial(logits.softmax(-1), 1)[:, 0]


def draw_theirs(wrapper: Any, batch: int) -> None:
    prompt = torch.full((batch, 1), LAYOUT.num_codes[0], device=DEVICE)
    wrapper.generate(
        prompt,
        LAYOUT.length,
        temperature=1.0,
        cache_kv=True,
        filter_logits_fn=lambda logits: logits,
    )


def engine() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

    lines = []
    for dim, depth, heads, batch in LARGE if DEVICE == "cuda" else SIZES:
        backbone = causal(dim, depth, heads)
        wrapper = AutoregressiveWrapper(x_transformers_of(backbone)).to(DEVICE)
        with torch.autocast(DEVICE, torch.bfloat16, enabled=DEVICE == "cuda"):
            rivals = {
                "ours": lambda network=backbone, n=batch: draw_ours(network, n),
                "theirs": lambda network=wrapper, n=batch: draw_theirs(network, n),
            }
            taken = seconds(rivals, 3)
        rates = [f"{batch / median(taken[name]):.3f}" for name in ("ours", "theirs")]
        lines.append(
            [f"dim {dim}, depth {depth}, batch {batch}", *rates, ratio(taken, "theirs", "ours")]
        )
    head = [
        "256 codes, the same weights",
        "ours, images/s",
        "x-transformers' generate, images/s",
        "ours / theirs",
    ]
    keep("Sampling: decode engine", "python -m benchmarks.sampling engine", table(head, lines))


def sampler(prior: Prior, batch: int, options: SampleOptions) -> Callable[[], object]:
    ids = torch.arange(batch, device=DEVICE)
    return lambda: prior.sample(ids % NUM_CLASSES, options, ids)


def autoregressive(dim: int, depth: int, heads: int) -> Prior:
    backbone = BackboneConfig(dim, depth, heads, dropout=0.0)
    return AutoregressiveConfig(backbone=backbone).build(LAYOUT, NUM_CLASSES).to(DEVICE).eval()


def guidance() -> None:
    lines = []
    for dim, depth, heads, batch in SIZES:
        prior = autoregressive(dim, depth, heads)
        rivals = {
            "guided": sampler(prior, batch, SampleOptions(guidance=2.0)),
            "twice": sampler(prior, 2 * batch, SampleOptions()),
        }
        taken = seconds(rivals, 3)
        figures = [f"{median(taken[name]):.2f}" for name in rivals]
        lines.append(
            [f"dim {dim}, depth {depth}, batch {batch}", *figures, ratio(taken, "guided", "twice")]
        )
    head = ["256 codes", "guided, s", "twice the batch, s", "guided / twice"]
    keep("Sampling: guidance", "python -m benchmarks.sampling guidance", table(head, lines))


def families() -> None:
    dim, depth, heads = 64, 12, 4
    raster = autoregressive(dim, depth, heads)
    masked = MaskedConfig(backbone=BackboneConfig(dim, depth, heads, dropout=0.0)).build(
        LAYOUT, NUM_CLASSES
    )
    masked = masked.to(DEVICE).eval()
    lines = []
    for batch in BATCHES:
        rivals = {
            "autoregressive": sampler(raster, batch, SampleOptions()),
            "masked": sampler(masked, batch, SampleOptions(steps=8)),
        }
        taken = seconds(rivals, 3)
        rates = [f"{batch / median(taken[name]):.2f}" for name in rivals]
        lines.append([str(batch), *rates, ratio(taken, "autoregressive", "masked")])
    head = [
        f"batch (dim {dim}, depth {depth})",
        "autoregressive, images/s",
        "MaskGIT, 8 steps, images/s",
        "MaskGIT / AR",
    ]
    keep(
        "Sampling: MaskGIT and autoregressive",
        "python -m benchmarks.sampling families",
        table(head, lines),
    )


PARTS = {"engine": engine, "guidance": guidance, "families": families}


if __name__ == "__main__":
    run_parts(PARTS, sys.argv[1:])
