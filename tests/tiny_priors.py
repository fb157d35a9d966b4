"""Tiny published priors under their authors' names, with random weights, and what each computes,
written down once more from its definition in float64: an oracle where no case is at hand."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F

WIDTH, HEADS, HIDDEN, BLOCKS, CODES, CLASSES, SIDE = 16, 2, 24, 2, 8, 3, 2
LENGTH = SIDE**2


def drawn(shapes):
    generator = torch.Generator().manual_seed(5)
    return {
        name: torch.randn(shape, generator=generator) * (0.3 if len(shape) > 1 else 0.5)
        for name, shape in shapes.items()
    }


def llama_shapes(blocks):
    shapes = {}
    for number in range(BLOCKS):
        block = f"{blocks}.{number}"
        shapes |= {
            f"{block}.attention.wqkv.weight": (3 * WIDTH, WIDTH),
            f"{block}.attention.wo.weight": (WIDTH, WIDTH),
            f"{block}.feed_forward.w1.weight": (HIDDEN, WIDTH),
            f"{block}.feed_forward.w2.weight": (WIDTH, HIDDEN),
            f"{block}.feed_forward.w3.weight": (HIDDEN, WIDTH),
            f"{block}.attention_norm.weight": (WIDTH,),
            f"{block}.ffn_norm.weight": (WIDTH,),
        }
    return shapes


def linear(shapes, name, rows, columns):
    shapes[f"{name}.weight"], shapes[f"{name}.bias"] = (rows, columns), (rows,)


def llamagen():
    shapes = llama_shapes("layers") | {
        "tok_embeddings.weight": (CODES, WIDTH),
        "cls_embedding.embedding_table.weight": (CLASSES + 1, WIDTH),
        "norm.weight": (WIDTH,),
        "output.weight": (CODES, WIDTH),
    }
    return drawn(shapes), {"n_head": HEADS, "block_size": LENGTH, "num_classes": CLASSES}


def ibq():
    shapes = llama_shapes("transformer.blocks") | {
        "transformer.tok_emb.weight": (CODES, WIDTH),
        "transformer.class_emb.embedding_table.weight": (CLASSES + 1, WIDTH),
        "transformer.head_nm.rmsnorm.weight": (WIDTH,),
        "transformer.head.weight": (CODES, WIDTH),
    }
    linear(shapes, "transformer.head_nm.ada_lin.1", 2 * WIDTH, WIDTH)
    for number in range(BLOCKS):
        linear(shapes, f"transformer.blocks.{number}.ada_lin.1", 6 * WIDTH, WIDTH)
    params = {"n_head": HEADS, "block_size": LENGTH, "vocab_size": CODES}
    return drawn(shapes), {"init_args": {"transformer_config": {"params": params}}}


def taming():
    shapes = {
        "transformer.tok_emb.weight": (CODES, WIDTH),
        "transformer.pos_emb": (1, LENGTH, WIDTH),
        "transformer.head.weight": (CODES, WIDTH),
    }
    norms = ["ln_f", *(f"blocks.{n}.{norm}" for n in range(BLOCKS) for norm in ("ln1", "ln2"))]
    for norm in norms:
        shapes |= {f"transformer.{norm}.{leaf}": (WIDTH,) for leaf in ("weight", "bias")}
    for number in range(BLOCKS):
        block = f"transformer.blocks.{number}"
        for side in ("query", "key", "value", "proj"):
            linear(shapes, f"{block}.attn.{side}", WIDTH, WIDTH)
        linear(shapes, f"{block}.mlp.0", HIDDEN, WIDTH)
        linear(shapes, f"{block}.mlp.2", WIDTH, HIDDEN)
    masks = {f"transformer.blocks.{n}.attn.mask": torch.ones(1, 1, 4, 4) for n in range(BLOCKS)}
    gpt = {"params": {"n_head": HEADS, "block_size": LENGTH, "vocab_size": CODES}}
    stage = {"params": {"n_classes": CLASSES}}
    config = {"params": {"transformer_config": gpt, "cond_stage_config": stage}}
    return drawn(shapes) | masks, config


def rar():
    shapes = {
        "cls_token": (1, 1, WIDTH),
        "embeddings.weight": (CODES + CLASSES + 2, WIDTH),
        "pos_embed": (1, LENGTH + 1024, WIDTH),
        "target_aware_pos_embed": (1, LENGTH + 1024, WIDTH),
        "timesteps_embeddings": (1, LENGTH + 100, WIDTH),
    }
    linear(shapes, "adaln_before_head.adaLN_modulation.1", 2 * WIDTH, WIDTH)
    linear(shapes, "lm_head", CODES, WIDTH)
    for number in range(BLOCKS):
        block = f"blocks.{number}"
        linear(shapes, f"{block}.attn.qkv", 3 * WIDTH, WIDTH)
        linear(shapes, f"{block}.attn.proj", WIDTH, WIDTH)
        linear(shapes, f"{block}.mlp.fc1", HIDDEN, WIDTH)
        linear(shapes, f"{block}.mlp.fc2", WIDTH, HIDDEN)
        linear(shapes, f"{block}.adaLN_modulation.1", 6 * WIDTH, WIDTH)
        for norm, width in (("norm1", WIDTH), ("norm2", WIDTH)):
            shapes |= {f"{block}.{norm}.{leaf}": (width,) for leaf in ("weight", "bias")}
        for norm in ("q_norm", "k_norm"):
            names = (f"{block}.attn.{norm}.{leaf}" for leaf in ("weight", "bias"))
            shapes |= {name: (WIDTH // HEADS,) for name in names}
    return drawn(shapes), {"model": {"generator": {"image_seq_len": LENGTH}}}


TINY = {"llamagen-gpt": llamagen, "rar": rar, "taming-mingpt": taming, "ibq-gpt": ibq}


# What they compute


def attention(queries, keys, values):
    """(n, heads, d) each; a slot sees itself and those before it."""
    scores = torch.einsum("ihd,jhd->hij", queries, keys) / math.sqrt(queries.shape[-1])
    later = torch.ones(scores.shape[1:], dtype=torch.bool).triu(1)
    weights = scores.masked_fill(later, -torch.inf).softmax(-1)
    return torch.einsum("hij,jhd->ihd", weights, values).flatten(1)


def rms(rows, gain):
    return rows / (rows.square().mean(-1, keepdim=True) + 1e-5).sqrt() * gain


def llama_logits(t, inner, names, heads, side, codes, label):
    """LlamaGen's; with `ada_lin` IBQ's."""
    tokens, classes, blocks, norm, head = names
    label_row = t[f"{inner}{classes}.weight"][label]
    rows = torch.cat([label_row[None], t[f"{inner}{tokens}.weight"][codes[:-1]]])
    width = rows.shape[1]
    quarter = width // heads // 4
    frequencies = 10_000.0 ** (-torch.arange(quarter, dtype=torch.float64) / quarter)
    places = torch.arange(len(codes) - 1)
    angles = torch.cat(
        [torch.outer(places // side, frequencies), torch.outer(places % side, frequencies)], 1
    )
    turns = torch.cat([torch.zeros_like(angles[:1]), torch.exp(1j * angles)])[:, None]

    def turned(rows):
        pairs = torch.view_as_complex(rows.unflatten(-1, (-1, 2)).contiguous())
        return torch.view_as_real(pairs * turns).flatten(-2)

    for number in range(sum(name.endswith("wqkv.weight") for name in t)):
        block = f"{inner}{blocks}.{number}"
        adaptive = f"{block}.ada_lin.1.weight" in t
        parts = [1.0, 1.0, 0.0, 0.0, 0.0, 0.0]
        if adaptive:
            made = t[f"{block}.ada_lin.1.weight"] @ F.silu(label_row)
            parts = (made + t[f"{block}.ada_lin.1.bias"]).chunk(6)
        seen = rms(rows, t[f"{block}.attention_norm.weight"]) * (1 + parts[2]) + parts[4]
        projected = (seen @ t[f"{block}.attention.wqkv.weight"].T).unflatten(-1, (3, heads, -1))
        queries, keys, values = projected.unbind(1)
        attended = attention(turned(queries), turned(keys), values)
        rows = rows + parts[0] * (attended @ t[f"{block}.attention.wo.weight"].T)
        seen = rms(rows, t[f"{block}.ffn_norm.weight"]) * (1 + parts[3]) + parts[5]
        gate = F.silu(seen @ t[f"{block}.feed_forward.w1.weight"].T)
        up = seen @ t[f"{block}.feed_forward.w3.weight"].T
        rows = rows + parts[1] * ((gate * up) @ t[f"{block}.feed_forward.w2.weight"].T)
    rows = rms(rows, t[f"{inner}{norm}.weight"])
    if f"{inner}head_nm.ada_lin.1.weight" in t:
        made = t[f"{inner}head_nm.ada_lin.1.weight"] @ F.silu(label_row)
        scale, shift = (made + t[f"{inner}head_nm.ada_lin.1.bias"]).chunk(2)
        rows = rows * (1 + scale) + shift
    return rows @ t[f"{inner}{head}.weight"].T


def affine(t, name, rows):
    return rows @ t[f"{name}.weight"].T + t[f"{name}.bias"]


def layer_norm(t, name, rows, eps):
    return F.layer_norm(rows, rows.shape[-1:], t[f"{name}.weight"], t[f"{name}.bias"], eps)


def taming_logits(t, heads, codes, label):
    sequence = torch.cat([label[None], codes[:-1]])
    rows = t["transformer.tok_emb.weight"][sequence] + t["transformer.pos_emb"][0, : len(sequence)]
    for number in range(sum(name.endswith("attn.query.weight") for name in t)):
        block = f"transformer.blocks.{number}"
        seen = layer_norm(t, f"{block}.ln1", rows, 1e-5)
        sides = [affine(t, f"{block}.attn.{side}", seen) for side in ("query", "key", "value")]
        attended = attention(*(side.unflatten(-1, (heads, -1)) for side in sides))
        rows = rows + affine(t, f"{block}.attn.proj", attended)
        hidden = F.gelu(affine(t, f"{block}.mlp.0", layer_norm(t, f"{block}.ln2", rows, 1e-5)))
        rows = rows + affine(t, f"{block}.mlp.2", hidden)
    rows = layer_norm(t, "transformer.ln_f", rows, 1e-5)
    return rows @ t["transformer.head.weight"].T


def rar_logits(t, heads, codes, label, order):
    """In the order of prediction."""
    first_class = len(t["lm_head.bias"]) + 1
    label_row = t["embeddings.weight"][first_class + label]
    places, targets = t["pos_embed"][0], t["target_aware_pos_embed"][0]
    rows = torch.stack(
        [
            t["cls_token"][0, 0] + places[0],
            label_row + places[1] + targets[2 + order[0]],
            *(
                t["embeddings.weight"][codes[order[i]]]
                + places[2 + order[i]]
                + targets[2 + order[i + 1]]
                for i in range(len(order) - 1)
            ),
        ]
    )
    condition = F.silu(label_row + t["timesteps_embeddings"][0, : len(rows)])
    for number in range(sum(name.endswith("attn.qkv.weight") for name in t)):
        block = f"blocks.{number}"
        parts = affine(t, f"{block}.adaLN_modulation.1", condition).chunk(6, 1)
        seen = layer_norm(t, f"{block}.norm1", rows, 1e-6) * (1 + parts[1]) + parts[0]
        sides = affine(t, f"{block}.attn.qkv", seen).unflatten(-1, (3, heads, -1)).unbind(1)
        queries = layer_norm(t, f"{block}.attn.q_norm", sides[0], 1e-6)
        keys = layer_norm(t, f"{block}.attn.k_norm", sides[1], 1e-6)
        attended = attention(queries, keys, sides[2])
        rows = rows + parts[2] * affine(t, f"{block}.attn.proj", attended)
        seen = layer_norm(t, f"{block}.norm2", rows, 1e-6) * (1 + parts[4]) + parts[3]
        hidden = F.gelu(affine(t, f"{block}.mlp.fc1", seen))
        rows = rows + parts[5] * affine(t, f"{block}.mlp.fc2", hidden)
    scale, shift = affine(t, "adaln_before_head.adaLN_modulation.1", condition).chunk(2, 1)
    rows = F.layer_norm(rows, rows.shape[-1:], eps=1e-6) * (1 + scale) + shift
    return affine(t, "lm_head", rows)[1:]


def expected_logits(kind, tensors, codes, label, order=None, heads=HEADS, side=SIDE):
    """(N, K) float64 of one sequence (N,) under one label ()."""
    t = {name: tensor.double() for name, tensor in tensors.items()}
    if kind == "rar":
        return rar_logits(
            t, heads, codes, label, torch.arange(len(codes)) if order is None else order
        )
    if kind == "taming-mingpt":
        return taming_logits(t, heads, codes, label)
    names = ("tok_embeddings", "cls_embedding.embedding_table", "layers", "norm", "output")
    if kind == "ibq-gpt":
        names = ("tok_emb", "class_emb.embedding_table", "blocks", "head_nm.rmsnorm", "head")
    inner = "transformer." if kind == "ibq-gpt" else ""
    return llama_logits(t, inner, names, heads, side, codes, label)
