"""bytedance/1d-tokenizer: TiTok, of both generations."""

from __future__ import annotations

import math

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.decoders.titok import TiTokDecoderConfig
from tokenizer.encoders.titok import TiTokEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.magvit_names import magvit_decoder_names, sizes
from tokenizer.published.maskgit import UNIT, naming
from tokenizer.published.peer import Architecture, Peer, PublishedFile, Shapes, count, has
from tokenizer.published.transformer_names import transformer_names
from tokenizer.quantizers.vector import VectorConfig
from training.errors import UserError

HEADS = {512: 8, 768: 12, 1024: 16}  # of the authors' sizes, by width


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    if "quantize.embedding.weight" not in shapes:
        raise UserError(
            f"{hyper.path}: a TiTok without a codebook (quantize_mode: vae) is continuous and has no codes"
        )
    if "decoder.text_guidance_proj.weight" in shapes:
        raise UserError(f"{hyper.path}: a TA-TiTok needs a text to decode, and there is none here")
    legacy = "decoder.ffn.2.weight" in shapes
    mixes = "pixel_quantize.embedding.weight" in shapes
    if legacy and not mixes:
        raise UserError(
            f"{hyper.path}: a TiTok of the first stage predicts MaskGIT-VQGAN's codes and has no "
            "pixels"
        )

    def transformer(side: str) -> dict:
        width = shapes[f"{side}.positional_embedding"][1]
        depth = count(shapes, f"{side}.transformer.{{}}.")
        why = f"and its width of {width} is none of the authors' sizes"
        return {
            "channels": width,
            "depth": depth,
            "heads": hyper.heads_of(width, depth)
            or HEADS.get(width)
            or hyper.needed("heads", why=why),
            "mlp": shapes[f"{side}.transformer.0.mlp.c_fc.weight"][0],
        }

    patch = shapes["encoder.patch_embed.weight"][2]
    size = patch * math.isqrt(shapes["encoder.positional_embedding"][0] - 1)
    num_codes, dim = shapes["quantize.embedding.weight"]
    encoder = TiTokEncoderConfig(
        **transformer("encoder"),
        num_tokens=shapes["latent_tokens"][0],
        patch=patch,
        unit_range=True,
        scrambled=legacy,
        out_channels=dim,
    )
    names = {
        "encoder.embed": "encoder.patch_embed",
        "encoder.head": "encoder.conv_out",
        "encoder.latents": "latent_tokens",
        "decoder.embed": "decoder.decoder_embed",
        "decoder.mask": "decoder.mask_token",
        "quantizer.codebook": "quantize.embedding.weight",
    }
    settings = transformer("decoder")
    if mixes:
        names |= {"decoder.head.0": "decoder.ffn.0", "decoder.head.2": "decoder.ffn.2"}
        names["decoder.codebook"] = "pixel_quantize.embedding.weight"
        num_pixel_codes, pixel_code_dim = shapes["pixel_quantize.embedding.weight"]
        pixels, inner = _pixels(
            {n.removeprefix("pixel_"): s for n, s in shapes.items() if n.startswith("pixel_")}
        )
        names |= {
            f"decoder.pixels.{o.removeprefix('decoder.')}": f"pixel_{t}" for o, t in inner.items()
        }
        decoder = TiTokDecoderConfig(
            **settings,
            patch=2 ** (len(pixels.multipliers) - 1),
            unit_range=True,
            pixels=pixels,
            num_pixel_codes=num_pixel_codes,
            pixel_code_dim=pixel_code_dim,
        )
    else:
        names |= {"decoder.head": "decoder.ffn.0", "decoder.pixels": "decoder.conv_out"}
        decoder_patch = math.isqrt(shapes["decoder.ffn.0.weight"][0] // 3)
        decoder = TiTokDecoderConfig(**settings, patch=decoder_patch, unit_range=True)
    for side, depth in (("encoder", encoder.depth), ("decoder", decoder.depth)):
        names |= transformer_names(f"{side}.transformer", side, f"{side}.transformer", depth)
        names[f"{side}.class_token"] = f"{side}.class_embedding"
        names[f"{side}.positions"] = f"{side}.positional_embedding"
        names[f"{side}.latent_positions"] = f"{side}.latent_token_positional_embedding"
    unit_length = hyper.flag("use_l2_norm")
    quantizer = VectorConfig(
        num_codes=num_codes,
        code_dim=dim,
        codebook="gradient",
        init="uniform",
        metric="cosine" if (legacy if unit_length is None else unit_length) else "l2",
    )
    return Architecture(
        VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder), size, names
    )


def _pixels(shapes: Shapes) -> tuple[MagvitDecoderConfig, dict[str, str]]:
    """MaskGIT-VQGAN's decoder, and its names."""
    levels = count(shapes, "decoder.up.{}.")
    config = MagvitDecoderConfig(**sizes(shapes, "decoder", levels, naming), **UNIT)
    return config, magvit_decoder_names(config, naming)


def _files() -> tuple[PublishedFile, ...]:
    first = "4096 codes of 12 of unit length, first generation"
    second = "8192 codes of 64"
    known = (
        ("l32", 32, first, "2.21"),
        ("b64", 64, first, "1.70"),
        ("s128", 128, first, "1.71"),
        ("bl64_vq8k", 64, second, "2.06"),
        ("bl128_vq8k", 128, second, "1.49"),
        ("sl256_vq8k", 256, second, "1.03"),
    )
    return tuple(
        PublishedFile(
            f"titok-{name.replace('_', '-')}",
            f"yucornetto/tokenizer_titok_{name}_imagenet",
            "model.safetensors",
            f"{tokens} tokens, {about}",
            f"rFID {rfid} (ImageNet val at 256 px)",
            config="config.json",
        )
        for name, tokens, about, rfid in known
    )


TITOK = Peer(
    kind="titok",
    title="TiTok (bytedance/1d-tokenizer)",
    licence="Apache-2.0",
    recognises=has(
        "latent_tokens",
        "encoder.patch_embed.weight",
        "decoder.mask_token",
    ),
    architecture=architecture,
    unit_range=True,
    quirks=(
        "images are in [0, 1], square, and of the size trained on; codes have no grid",
        "in the first generation (L-32, B-64, S-128) tokens and channels are mixed up before the "
        "last projection, and "
        "the decoder mixes MaskGIT-VQGAN's codes, which that one's decoder turns into pixels",
        "`*_vae_*` files are continuous and no tokenizers; TA-TiTok needs a text to decode",
    ),
    files=_files(),
)
