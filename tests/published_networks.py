"""Published tokenizers restated in plain torch under their authors' names, for cases of any size.

Nothing here is of the code under test: each class follows its authors' description, and what it
computes is what an import has to compute.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors.torch import save_file
from torch import Tensor, nn


def holder(**children: nn.Module) -> nn.Module:
    """A module that only names others."""
    made = nn.Module()
    for name, child in children.items():
        made.add_module(name, child)
    return made


def each(made) -> nn.ModuleList:
    return nn.ModuleList(list(made))


def norm(channels: int, groups: int = 32) -> nn.GroupNorm:
    return nn.GroupNorm(groups, channels, eps=1e-6)


class Block(nn.Module):
    """Norm, SiLU, 3x3, twice."""

    def __init__(self, start, end, *, groups=32, bias=True, name="nin_shortcut", of_output=False):
        super().__init__()
        self.norm1, self.norm2 = norm(start, groups), norm(end, groups)
        self.conv1 = nn.Conv2d(start, end, 3, padding=1, bias=bias)
        self.conv2 = nn.Conv2d(end, end, 3, padding=1, bias=bias)
        self.name, self.of_output = name if start != end else None, of_output
        if self.name:
            self.add_module(name, nn.Conv2d(end if of_output else start, end, 1, bias=bias))

    def forward(self, x):
        hidden = self.conv1(F.silu(self.norm1(x)))
        hidden = self.conv2(F.silu(self.norm2(hidden)))
        if self.name:
            x = getattr(self, self.name)(hidden if self.of_output else x)
        return x + hidden


class Attention(nn.Module):
    """One head over all places; `names` of norm, query, key, value and last map."""

    TAMING = ("norm", "q", "k", "v", "proj_out")

    def __init__(self, channels, *, groups=32, names=TAMING, linear=False):
        super().__init__()
        self.names = names
        self.add_module(names[0], norm(channels, groups))
        for name in names[1:]:
            made = nn.Linear(channels, channels) if linear else nn.Conv2d(channels, channels, 1)
            if "." in name:  # diffusers keeps the last map in a list
                self.add_module(name.split(".")[0], each([made]))
            else:
                self.add_module(name, made)

    def part(self, number, x):
        """(B, N, C) through one of the maps."""
        made = self.get_submodule(self.names[number])
        return F.linear(x, made.weight.flatten(1), made.bias)

    def forward(self, x):
        rows = self.get_submodule(self.names[0])(x).flatten(2).transpose(1, 2)
        query, key, value = (self.part(number, rows) for number in (1, 2, 3))
        weights = (query @ key.transpose(1, 2) * x.shape[1] ** -0.5).softmax(-1)
        return x + self.part(4, weights @ value).transpose(1, 2).reshape(x.shape)


def halve(conv, x):
    return conv(F.pad(x, (0, 1, 0, 1)))


def double(conv, x):
    return conv(F.interpolate(x, scale_factor=2.0, mode="nearest"))


def nearest(features, book):
    """(B, D, h, w) -> (B, h, w) codes and (B, D, h, w) rows, in float64."""
    rows = features.movedim(1, -1)
    codes = torch.cdist(rows.flatten(0, -2).double(), book.double()).argmin(1)
    return codes.view(rows.shape[:-1]), book[codes].view(rows.shape).movedim(-1, 1)


class Published(nn.Module):
    """What every tokenizer below has: `features`, `quantizer` and `pixels`."""

    def features(self, images: Tensor) -> Tensor: ...  # images in its authors' range

    def search(self, features: Tensor) -> tuple[Tensor, Tensor]: ...  # codes, what decoders get

    def lookup(self, codes: Tensor) -> Tensor: ...

    def pixels(self, vectors: Tensor) -> Tensor: ...


# taming's networks under three projects' names


class Taming(Published):
    """`hyper`: ddconfig with embed_dim and n_embed, by taming's names. `how`: which search."""

    def __init__(self, hyper, how="l2"):
        super().__init__()
        ch, mult, blocks = hyper["ch"], hyper["ch_mult"], hyper["num_res_blocks"]
        z, dim, levels = hyper["z_channels"], hyper["embed_dim"], len(hyper["ch_mult"])
        attended = [hyper["resolution"] // 2**k in hyper["attn_resolutions"] for k in range(levels)]
        self.how, middle = how, hyper.get("attn_type") != "none"
        widths = [ch * each for each in mult]

        def mid(width):
            parts = {"block_1": Block(width, width), "block_2": Block(width, width)}
            return holder(**parts, **({"attn_1": Attention(width)} if middle else {}))

        def level(start, width, count, attention):
            made = each(Block(width if k else start, width) for k in range(count))
            return holder(
                block=made, attn=each(Attention(width) for _ in range(count if attention else 0))
            )

        down, up, width = [], [], ch
        for k in range(levels):
            down.append(level(width, widths[k], blocks, attended[k]))
            width = widths[k]
            if k < levels - 1:
                conv = nn.Conv2d(width, width, 3, 2)
                down[k].add_module("downsample", holder(conv=conv))
        self.encoder = holder(
            conv_in=nn.Conv2d(3, ch, 3, padding=1),
            down=each(down),
            mid=mid(width),
            norm_out=norm(width),
            conv_out=nn.Conv2d(width, z, 3, padding=1),
        )
        self.decoder = holder(conv_in=nn.Conv2d(z, width, 3, padding=1), mid=mid(width))
        for k in reversed(range(levels)):
            made = level(width, widths[k], blocks + 1, attended[k])
            width = widths[k]
            if k:
                made.add_module("upsample", holder(conv=nn.Conv2d(width, width, 3, padding=1)))
            up.insert(0, made)
        self.decoder.up, self.decoder.norm_out = each(up), norm(width)
        self.decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)
        self.quantize = holder(embedding=nn.Embedding(hyper["n_embed"], dim))

    @staticmethod
    def _middle(mid, x):
        x = mid.block_1(x)
        return mid.block_2(mid.attn_1(x) if hasattr(mid, "attn_1") else x)

    @staticmethod
    def _level(level, x):
        for number, block in enumerate(level.block):
            x = block(x)
            x = level.attn[number](x) if len(level.attn) else x
        return x

    def features(self, images):
        net, x = self.encoder, self.encoder.conv_in(images)
        for level in net.down:
            x = self._level(level, x)
            x = halve(level.downsample.conv, x) if hasattr(level, "downsample") else x
        x = net.conv_out(F.silu(net.norm_out(self._middle(net.mid, x))))
        return self.quant_conv(x)

    def search(self, features):
        book = self.quantize.embedding.weight
        if self.how == "product":
            codes = torch.einsum("bchw,kc->bhwk", features.double(), book.double()).argmax(-1)
            return codes, book[codes].movedim(-1, 1)
        return nearest(features, book)

    def lookup(self, codes):
        return self.quantize.embedding.weight[codes].movedim(-1, 1)

    def pixels(self, vectors):
        net = self.decoder
        x = self._middle(net.mid, net.conv_in(self.post_quant_conv(vectors)))
        for level in reversed(net.up):
            x = self._level(level, x)
            x = double(level.upsample.conv, x) if hasattr(level, "upsample") else x
        return net.conv_out(F.silu(net.norm_out(x)))


class LlamaGen(Published):
    """`hyper`: LlamaGen's ModelArgs with ch and num_res_blocks."""

    def __init__(self, hyper):
        super().__init__()
        ch, blocks, z = hyper["ch"], hyper["num_res_blocks"], hyper["z_channels"]
        self.unit = hyper["codebook_l2_norm"]

        def stack(start, width, count, last):
            made = each(Block(width if k else start, width) for k in range(count))
            return holder(res=made, attn=each(Attention(width) for _ in range(count * last)))

        def mid(width):
            return each([Block(width, width), Attention(width), Block(width, width)])

        mult, width, down = hyper["encoder_ch_mult"], ch, []
        for k, factor in enumerate(mult):
            last = k == len(mult) - 1
            down.append(stack(width, ch * factor, blocks, last))
            width = ch * factor
            if not last:
                down[k].downsample = holder(conv=nn.Conv2d(width, width, 3, 2))
        self.encoder = holder(
            conv_in=nn.Conv2d(3, ch, 3, padding=1),
            conv_blocks=each(down),
            mid=mid(width),
            norm_out=norm(width),
            conv_out=nn.Conv2d(width, z, 3, padding=1),
        )
        mult, up = hyper["decoder_ch_mult"], []
        width = ch * mult[-1]
        self.decoder = holder(conv_in=nn.Conv2d(z, width, 3, padding=1), mid=mid(width))
        for k in reversed(range(len(mult))):
            up.append(stack(width, ch * mult[k], blocks + 1, k == len(mult) - 1))
            width = ch * mult[k]
            if k:
                up[-1].upsample = holder(conv=nn.Conv2d(width, width, 3, padding=1))
        self.decoder.conv_blocks, self.decoder.norm_out = each(up), norm(width)
        self.decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        dim = hyper["codebook_embed_dim"]
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)
        self.quantize = holder(embedding=nn.Embedding(hyper["codebook_size"], dim))
        self.quantize.register_buffer("codebook_used", torch.zeros(9))

    @staticmethod
    def _level(level, x):
        for number, block in enumerate(level.res):
            x = block(x)
            x = level.attn[number](x) if len(level.attn) else x
        return x

    def features(self, images):
        net, x = self.encoder, self.encoder.conv_in(images)
        for level in net.conv_blocks:
            x = self._level(level, x)
            x = halve(level.downsample.conv, x) if hasattr(level, "downsample") else x
        for layer in net.mid:
            x = layer(x)
        return self.quant_conv(net.conv_out(F.silu(net.norm_out(x))))

    @property
    def book(self):
        book = self.quantize.embedding.weight
        return F.normalize(book, dim=1) if self.unit else book

    def search(self, features):
        return nearest(F.normalize(features, dim=1) if self.unit else features, self.book)

    def lookup(self, codes):
        return self.book[codes].movedim(-1, 1)

    def pixels(self, vectors):
        net = self.decoder
        x = net.conv_in(self.post_quant_conv(vectors))
        for layer in net.mid:
            x = layer(x)
        for level in net.conv_blocks:
            x = self._level(level, x)
            x = double(level.upsample.conv, x) if hasattr(level, "upsample") else x
        return net.conv_out(F.silu(net.norm_out(x)))


class Diffusers(Published):
    """`hyper`: VQModel's config.json. `old`: attention's names before version 0.17."""

    def __init__(self, hyper, old=False):
        super().__init__()
        widths, blocks = hyper["block_out_channels"], hyper["layers_per_block"]
        z, groups = hyper["latent_channels"], hyper["norm_num_groups"]
        names = (
            ("query", "key", "value", "proj_attn") if old else ("to_q", "to_k", "to_v", "to_out.0")
        )
        kept = {"groups": groups, "name": "conv_shortcut"}

        def attention(width):
            return Attention(width, groups=groups, names=("group_norm", *names), linear=True)

        def stack(start, width, count, kind):
            made = each(Block(width if k else start, width, **kept) for k in range(count))
            attended = [attention(width) for _ in range(count)] if kind.startswith("Attn") else []
            return holder(resnets=made, **({"attentions": each(attended)} if attended else {}))

        def middle(width):
            made = each(Block(width, width, **kept) for _ in range(2))
            attended = hyper["mid_block_add_attention"]
            return holder(
                resnets=made, **({"attentions": each([attention(width)])} if attended else {})
            )

        width, down, up = widths[0], [], []
        for k, kind in enumerate(hyper["down_block_types"]):
            down.append(stack(width, widths[k], blocks, kind))
            width = widths[k]
            if k < len(widths) - 1:
                down[k].downsamplers = each([holder(conv=nn.Conv2d(width, width, 3, 2))])
        self.encoder = holder(
            conv_in=nn.Conv2d(3, widths[0], 3, padding=1),
            down_blocks=each(down),
            mid_block=middle(width),
            conv_norm_out=norm(width, groups),
            conv_out=nn.Conv2d(width, z, 3, padding=1),
        )
        for k, kind in enumerate(hyper["up_block_types"]):
            own = widths[len(widths) - 1 - k]
            up.append(stack(width, own, blocks + 1, kind))
            width = own
            if k < len(widths) - 1:
                up[k].upsamplers = each([holder(conv=nn.Conv2d(width, width, 3, padding=1))])
        self.decoder = holder(
            conv_in=nn.Conv2d(z, widths[-1], 3, padding=1),
            mid_block=middle(widths[-1]),
            up_blocks=each(up),
            conv_norm_out=norm(width, groups),
            conv_out=nn.Conv2d(width, 3, 3, padding=1),
        )
        dim = hyper["vq_embed_dim"] or z
        self.quant_conv, self.post_quant_conv = nn.Conv2d(z, dim, 1), nn.Conv2d(dim, z, 1)
        self.quantize = holder(embedding=nn.Embedding(hyper["num_vq_embeddings"], dim))

    @staticmethod
    def _stack(level, x):
        for number, block in enumerate(level.resnets):
            x = block(x)
            x = level.attentions[number](x) if hasattr(level, "attentions") else x
        return x

    @staticmethod
    def _middle(mid, x):
        x = mid.resnets[0](x)
        return mid.resnets[1](mid.attentions[0](x) if hasattr(mid, "attentions") else x)

    def features(self, images):
        net, x = self.encoder, self.encoder.conv_in(images)
        for level in net.down_blocks:
            x = self._stack(level, x)
            x = halve(level.downsamplers[0].conv, x) if hasattr(level, "downsamplers") else x
        x = self._middle(net.mid_block, x)
        return self.quant_conv(net.conv_out(F.silu(net.conv_norm_out(x))))

    search, lookup, how = Taming.search, Taming.lookup, "l2"

    def pixels(self, vectors):
        net = self.decoder
        x = self._middle(net.mid_block, net.conv_in(self.post_quant_conv(vectors)))
        for level in net.up_blocks:
            x = self._stack(level, x)
            x = double(level.upsamplers[0].conv, x) if hasattr(level, "upsamplers") else x
        return net.conv_out(F.silu(net.conv_norm_out(x)))


# MaskGIT's and MAGVIT-v2's networks: 3x3 convolutions of blocks without biases


class MaskBit(Published):
    """MaskBit's ConvVQModel, bits or a codebook; `legacy`: levels of the decoder in one place as
    the encoder's. `names`: "maskbit", or "maskgit" for 1d-tokenizer's."""

    def __init__(self, hyper, legacy=False, names="maskbit"):
        super().__init__()
        ch, mult, blocks = hyper["hidden_channels"], hyper["channel_mult"], hyper["num_res_blocks"]
        dim, self.conv = hyper["token_size"], hyper.get("sample_with_conv", False)
        self.names, self.legacy, self.hyper = names, legacy or names == "maskgit", hyper
        kept = {"bias": False, "of_output": True}

        def stack(start, width, count):
            made = each(Block(width if k else start, width, **kept) for k in range(count))
            return holder(**{"block" if names == "maskgit" else "res_blocks": made})

        def middle(width, count):
            made = stack(width, width, count)
            return made.block if names == "maskgit" else made

        width, down, up = ch, [], []
        for k, factor in enumerate(mult):
            down.append(stack(width, ch * factor, blocks))
            width = ch * factor
            if k < len(mult) - 1 and self.conv:
                down[k].down_conv = nn.Conv2d(width, width, 3, 2)
        self.encoder = holder(
            conv_in=nn.Conv2d(3, ch, 3, padding=1, bias=False),
            down=each(down),
            mid=middle(width, blocks),
            norm_out=norm(width),
            conv_out=nn.Conv2d(width, dim, 1),
        )
        count = hyper.get("num_res_blocks_decoder", blocks)
        self.decoder = holder(conv_in=nn.Conv2d(dim, width, 3, padding=1), mid=middle(width, count))
        for k in reversed(range(len(mult))):
            up.append(stack(width, ch * mult[k], count))
            width = ch * mult[k]
            if k:
                up[-1].upsample_conv = nn.Conv2d(width, width, 3, padding=1)
        self.decoder.up = each(reversed(up) if self.legacy else up)
        self.decoder.norm_out = norm(width)
        self.decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        if hyper.get("quantizer_type") == "lookup-free":
            self.quantize = nn.Module()
            places = 2 ** torch.arange(dim, dtype=torch.int32)
            self.quantize.register_buffer("bits_to_indices", places.int())
            bits = (torch.arange(2**dim)[:, None] & places) != 0
            self.quantize.register_buffer("codebook", bits.float() * 2 - 1)
        else:
            self.quantize = holder(embedding=nn.Embedding(hyper["codebook_size"], dim))

    def _run(self, stack, x):
        for block in getattr(stack, "res_blocks", None) or getattr(stack, "block", stack):
            x = block(x)
        return x

    def features(self, images):
        net, x = self.encoder, self.encoder.conv_in(images)
        for number, level in enumerate(net.down):
            x = self._run(level, x)
            if number < len(net.down) - 1:
                x = halve(level.down_conv, x) if self.conv else F.avg_pool2d(x, 2)
        return net.conv_out(F.silu(net.norm_out(self._run(net.mid, x))))

    @property
    def book(self):
        if not hasattr(self.quantize, "embedding"):
            return self.quantize.codebook
        book = self.quantize.embedding.weight
        return F.normalize(book, dim=1) if self.hyper.get("use_l2_normalisation") else book

    def search(self, features):
        if hasattr(self.quantize, "embedding"):
            unit = self.hyper.get("use_l2_normalisation")
            return nearest(F.normalize(features, dim=1) if unit else features, self.book)
        codes = ((features > 0) * self.quantize.bits_to_indices[:, None, None]).sum(1)
        return codes, torch.where(features > 0, 1.0, -1.0)

    def lookup(self, codes):
        return self.book[codes].movedim(-1, 1)

    def pixels(self, vectors):
        net = self.decoder
        x = self._run(net.mid, net.conv_in(vectors))
        for level in reversed(net.up) if self.legacy else net.up:
            x = self._run(level, x)
            x = double(level.upsample_conv, x) if hasattr(level, "upsample_conv") else x
        return net.conv_out(F.silu(net.norm_out(x)))


class SimVQ(Published):
    """Open-MAGVIT2's first networks, as youngsheen/SimVQ has them, and its moved codebook."""

    def __init__(self, hyper, num_codes, adaptive=False):
        super().__init__()
        ch, mult, blocks, z = (
            hyper[name] for name in ("ch", "ch_mult", "num_res_blocks", "z_channels")
        )

        def stack(start, width):
            return each(Block(width if k else start, width, bias=False) for k in range(blocks))

        width, down, up = ch, [], []
        for k, factor in enumerate(mult):
            down.append(holder(block=stack(width, ch * factor)))
            width = ch * factor
            if k < len(mult) - 1:
                down[k].downsample = nn.Conv2d(width, width, 3, 2, padding=1)
        self.encoder = holder(
            conv_in=nn.Conv2d(3, ch, 3, padding=1, bias=False),
            down=each(down),
            mid_block=stack(width, width),
            norm_out=norm(width),
            conv_out=nn.Conv2d(width, z, 1),
        )
        self.decoder = holder(
            conv_in=nn.Conv2d(z, width, 3, padding=1), mid_block=stack(width, width)
        )
        for k in reversed(range(len(mult))):
            up.insert(0, holder(block=stack(width, ch * mult[k])))
            width = ch * mult[k]
            if k:
                up[0].upsample = holder(conv1=nn.Conv2d(width, 4 * width, 3, padding=1))
        self.decoder.up, self.decoder.norm_out = each(up), norm(width)
        self.decoder.conv_out = nn.Conv2d(width, 3, 3, padding=1)
        self.quantize = holder(embedding=nn.Embedding(num_codes, z), embedding_proj=nn.Linear(z, z))

    def features(self, images):
        net, x = self.encoder, self.encoder.conv_in(images)
        for level in net.down:
            for block in level.block:
                x = block(x)
            x = level.downsample(x) if hasattr(level, "downsample") else x
        for block in net.mid_block:
            x = block(x)
        return net.conv_out(F.silu(net.norm_out(x)))

    @property
    def book(self):
        return self.quantize.embedding_proj(self.quantize.embedding.weight)

    def search(self, features):
        return nearest(features, self.book)

    def lookup(self, codes):
        return self.book[codes].movedim(-1, 1)

    def pixels(self, vectors):
        net = self.decoder
        x = net.conv_in(vectors)
        for block in net.mid_block:
            x = block(x)
        for level in reversed(net.up):
            for block in level.block:
                x = block(x)
            if hasattr(level, "upsample"):
                x = level.upsample.conv1(x)
                batch, channels, height, width = x.shape
                x = x.view(batch, 2, 2, channels // 4, height, width).permute(0, 3, 4, 1, 5, 2)
                x = x.reshape(batch, channels // 4, 2 * height, 2 * width)
        return net.conv_out(F.silu(net.norm_out(x)))


# Transformers


class ClipBlock(nn.Module):
    def __init__(self, width, heads, mlp=4):
        super().__init__()
        self.ln_1, self.ln_2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)
        self.mlp = holder(
            c_fc=nn.Linear(width, int(width * mlp)), c_proj=nn.Linear(int(width * mlp), width)
        )

    def forward(self, x):  # (N, B, C)
        seen = self.ln_1(x)
        x = x + self.attn(seen, seen, seen, need_weights=False)[0]
        return x + self.mlp.c_proj(F.gelu(self.mlp.c_fc(self.ln_2(x))))


def through(net, blocks, x):
    """(B, N, C) through norm, blocks and norm."""
    x = net.ln_pre(x).transpose(0, 1)
    for block in blocks:
        x = block(x)
    return net.ln_post(x.transpose(0, 1))


class TiTok(Published):
    """The second generation (BL, SL): tokens in order, pixels at once. `sides`: width, layers and
    heads of encoder and decoder, which their authors name small, base and large."""

    def __init__(self, hyper, sides, size):
        super().__init__()
        tokens, dim = hyper["num_latent_tokens"], hyper["token_size"]
        self.unit, self.patches = hyper["use_l2_norm"], []
        for side, (width, layers, heads) in zip(("encoder", "decoder"), sides, strict=True):
            patch = hyper[f"vit_{side[:3]}_patch_size"]
            self.patches.append(patch)
            net = holder(
                ln_pre=nn.LayerNorm(width),
                transformer=each(ClipBlock(width, heads) for _ in range(layers)),
                ln_post=nn.LayerNorm(width),
            )
            for name, shape in (
                ("class_embedding", (1, width)),
                ("positional_embedding", ((size // patch) ** 2 + 1, width)),
                ("latent_token_positional_embedding", (tokens, width)),
            ):
                net.register_parameter(name, nn.Parameter(torch.randn(shape)))
            self.add_module(side, net)
        (width, *_), (wide, *_) = sides
        self.encoder.patch_embed = nn.Conv2d(3, width, self.patches[0], self.patches[0])
        self.encoder.conv_out = nn.Conv2d(width, dim, 1)
        self.decoder.decoder_embed = nn.Linear(dim, wide)
        self.decoder.mask_token = nn.Parameter(torch.randn(1, 1, wide))
        self.decoder.ffn = each([nn.Conv2d(wide, 3 * self.patches[1] ** 2, 1)])
        self.decoder.conv_out = nn.Conv2d(3, 3, 3, padding=1)
        self.latent_tokens = nn.Parameter(torch.randn(tokens, width))
        self.quantize = holder(embedding=nn.Embedding(hyper["codebook_size"], dim))

    def features(self, images):
        net, count = self.encoder, len(images)
        x = net.patch_embed(images).flatten(2).transpose(1, 2)
        x = torch.cat([net.class_embedding.expand(count, 1, -1), x], 1) + net.positional_embedding
        latents = self.latent_tokens + net.latent_token_positional_embedding
        x = through(net, net.transformer, torch.cat([x, latents.expand(count, -1, -1)], 1))
        x = x[:, -len(latents) :].transpose(1, 2)[..., None]  # (B, C, N, 1)
        return net.conv_out(x).transpose(2, 3)

    @property
    def book(self):
        book = self.quantize.embedding.weight
        return F.normalize(book, dim=1) if self.unit else book

    def search(self, features):
        codes, rows = nearest(F.normalize(features, dim=1) if self.unit else features, self.book)
        return codes[:, 0], rows

    def lookup(self, codes):
        return self.book[codes].transpose(1, 2)[:, :, None]

    def pixels(self, vectors):
        net, patch = self.decoder, self.patches[1]
        places = len(net.positional_embedding) - 1
        x = net.decoder_embed(vectors[:, :, 0].transpose(1, 2))
        x = x + net.latent_token_positional_embedding
        masks = torch.cat([net.class_embedding[None], net.mask_token.expand(1, places, -1)], 1)
        masks = (masks + net.positional_embedding).expand(len(x), -1, -1)
        x = through(net, net.transformer, torch.cat([masks, x], 1))[:, 1 : 1 + places]
        side = round(places**0.5)
        x = net.ffn[0](x.transpose(1, 2).reshape(len(x), -1, side, side))
        x = x.view(len(x), patch, patch, 3, side, side).permute(0, 3, 4, 1, 5, 2)
        return net.conv_out(x.reshape(len(x), 3, side * patch, side * patch))


class BSQ(Published):
    """VITBSQModel. `hyper`: its params; dvitconfig, as there, is vitconfig where it is absent."""

    def __init__(self, hyper):
        super().__init__()
        encoder, self.bits = hyper["vitconfig"], hyper["embed_dim"]
        decoder = hyper.get("dvitconfig", encoder)
        self.patch, self.scale = encoder["patch_size"], 1.0
        if hyper.get("post_q_l2_norm"):
            self.scale = self.bits**-0.5
        for name, config in (("encoder", encoder), ("decoder", decoder)):
            places = (config["image_size"] // config["patch_size"]) ** 2
            width, heads = config["width"], config["heads"]
            blocks = each(
                ClipBlock(width, heads, config["mlp_ratio"]) for _ in range(config["layers"])
            )
            net = holder(
                ln_pre=nn.LayerNorm(width),
                transformer=holder(resblocks=blocks),
                ln_post=nn.LayerNorm(width),
            )
            net.positional_embedding = nn.Parameter(torch.randn(places, width))
            self.add_module(name, net)
        values, width = 3 * self.patch**2, decoder["width"]
        self.encoder.conv1 = nn.Linear(values, encoder["width"], bias=False)
        if decoder.get("use_ffn_output", True):
            hidden = decoder.get("dim_ffn_output", 3072)
            self.decoder.ffn, width = nn.Sequential(nn.Linear(width, hidden), nn.Tanh()), hidden
        self.decoder.conv_out = nn.Linear(width, values)
        self.quant_embed = nn.Linear(encoder["width"], self.bits)
        self.post_quant_embed = nn.Linear(self.bits, decoder["width"])
        self.quantize = nn.Module()
        self.quantize.register_buffer("basis", 2 ** torch.arange(self.bits - 1, -1, -1))
        self.quantize.register_buffer("group_basis", torch.ones(1, dtype=torch.int64))

    def features(self, images):
        net, patch = self.encoder, self.patch
        rows = F.unfold(images, patch, stride=patch).transpose(1, 2)  # (colour, row, column)
        x = through(net, net.transformer.resblocks, net.conv1(rows) + net.positional_embedding)
        return self.quant_embed(x)

    def search(self, features):
        codes = ((features > 0).long() * self.quantize.basis).sum(-1)
        if self.bits > 24:  # a sum of floats, as the authors have it
            rows = F.normalize(features, dim=-1) if self.scale != 1 else features
            signs = rows + (torch.where(rows > 0, 1.0, -1.0) - rows)
            codes = ((signs + 1) / 2 * self.quantize.basis).sum(-1).long()
        side = round(codes.shape[1] ** 0.5)
        return codes.view(-1, side, side), torch.where(features > 0, self.scale, -self.scale)

    def lookup(self, codes):
        bits = codes.flatten(1)[..., None] // self.quantize.basis % 2
        return (bits * 2.0 - 1) * self.scale

    def pixels(self, vectors):
        net, patch = self.decoder, self.patch
        x = self.post_quant_embed(vectors) + net.positional_embedding
        x = through(net, net.transformer.resblocks, x)
        x = net.conv_out(net.ffn(x) if hasattr(net, "ffn") else x).transpose(1, 2)
        side = round(x.shape[2] ** 0.5) * patch
        return F.fold(x, (side, side), patch, stride=patch)


# Cases


def randomised(model: nn.Module, seed: int = 0) -> nn.Module:
    """All floating tensors random, norms about one, of eight bits, which half precision holds."""
    generator = torch.Generator().manual_seed(seed)
    for name, tensor in model.state_dict().items():
        if tensor.is_floating_point() and not name.endswith(("codebook_used", "quantize.codebook")):
            fan = tensor[0].numel() if tensor.ndim > 1 else 1
            scale = 1.0 if name.startswith("quantize") else (0.1 if tensor.ndim < 2 else fan**-0.5)
            drawn = torch.randn(tensor.shape, generator=generator) * scale
            is_scale = tensor.ndim == 1 and name.endswith("weight")
            tensor.copy_(((drawn + is_scale) * 64).round().clamp(-255, 255) / 64)
    return model.eval().requires_grad_(False)


@torch.no_grad()
def write_case(
    folder: Path,
    model: Published,
    config: dict,
    images: dict[str, Tensor],
    *,
    codes: dict[str, Tensor] | None = None,
    save: Callable[[dict[str, Tensor], Path], None] | None = None,
) -> Path:
    """A folder that `tokenizer.published check` takes: `images` by prefix, in its authors' range;
    `codes` by prefix, to be decoded. `save` writes the weights otherwise than as safetensors."""
    folder.mkdir(parents=True, exist_ok=True)
    state = {name: tensor.contiguous() for name, tensor in model.state_dict().items()}
    save(state, folder) if save else save_file(state, folder / "weights.safetensors")
    (folder / "config.json").write_text(json.dumps(config))
    case = {}
    for prefix, given in images.items():
        features = model.features(given)
        found, vectors = model.search(features)
        case |= {f"{prefix}images": given, f"{prefix}features": features, f"{prefix}codes": found}
        case |= {f"{prefix}quantized": vectors, f"{prefix}reconstruction": model.pixels(vectors)}
    for prefix, given in (codes or {}).items():
        vectors = model.lookup(given)
        case |= {f"{prefix}codes": given, f"{prefix}quantized": vectors}
        case |= {f"{prefix}reconstruction": model.pixels(vectors)}
    save_file({name: each.contiguous() for name, each in case.items()}, folder / "case.safetensors")
    return folder
