"""openai/DALL-E: its discrete VAE."""

from __future__ import annotations

from torch import Tensor, nn

from tokenizer.autoencoder import VQVAEConfig
from tokenizer.decoders.dvae import DVAEDecoderConfig
from tokenizer.encoders.dvae import DVAEEncoderConfig
from tokenizer.published.files import Hyperparameters
from tokenizer.published.peer import Architecture, Peer, Place, PublishedFile, Shapes, has
from tokenizer.published.taming import logits
from tokenizer.quantizers.gumbel import GumbelConfig

RESOLUTION = 256  # pixels, where no configuration says another size: any is taken


def architecture(shapes: Shapes, hyper: Hyperparameters) -> Architecture:
    def sizes(side: str) -> dict:
        groups = _last(shapes, f"{side}.blocks.group_{{}}.block_1.res_path.conv_1.w")
        # Of the group at full resolution: the encoder's first, the decoder's last.
        finest = 1 if side == "encoder" else groups
        return {
            "channels": shapes[f"{side}.blocks.group_{finest}.block_1.res_path.conv_4.w"][0],
            "groups": groups,
            "blocks": _last(shapes, f"{side}.blocks.group_1.block_{{}}.res_path.conv_1.w"),
            "margin": float(hyper.find("logit_laplace_eps") or 0.1),
        }

    encoder, decoder = DVAEEncoderConfig(**sizes("encoder")), DVAEDecoderConfig(**sizes("decoder"))
    num_codes, dim = shapes["encoder.blocks.output.conv.w"][:2]
    vector_dim = shapes["decoder.blocks.input.w"][0]
    names: dict[str, str | Place] = {
        **_parameters("encoder.conv_in", "encoder.blocks.input"),
        **_parameters("quantizer.logits", "encoder.blocks.output.conv"),
        **_parameters("decoder.conv_out", "decoder.blocks.output.conv"),
        "quantizer.codebook": Place("decoder.blocks.input.w", transposed=True),
        "decoder.shift": "decoder.blocks.input.b",
    }
    for side, config in (("encoder", encoder), ("decoder", decoder)):
        for group in range(config.groups):
            for block in range(config.blocks):
                ours = f"{side}.groups.{group}.{block}"
                theirs = f"{side}.blocks.group_{group + 1}.block_{block + 1}"
                names |= _parameters(f"{ours}.shortcut", f"{theirs}.id_path")
                for conv in range(4):
                    names |= _parameters(
                        f"{ours}.convs.{conv}", f"{theirs}.res_path.conv_{conv + 1}"
                    )
    quantizer = GumbelConfig(num_codes=num_codes, code_dim=dim, vector_dim=vector_dim)
    return Architecture(
        VQVAEConfig(encoder=encoder, quantizer=quantizer, decoder=decoder), RESOLUTION, names
    )


def _last(shapes: Shapes, pattern: str) -> int:
    """How many there are of names that are numbered from 1 on."""
    number = 0
    while pattern.format(number + 1) in shapes:
        number += 1
    return number


def _parameters(ours: str, theirs: str) -> dict[str, str]:
    return {f"{ours}.weight": f"{theirs}.w", f"{ours}.bias": f"{theirs}.b"}


def outputs(model: nn.Module, latents: Tensor, vectors: Tensor) -> dict[str, Tensor]:
    return logits(model, latents, vectors) | {"statistics": model.decoder.statistics(vectors)}


DALLE = Peer(
    kind="dalle",
    title="DALL-E's dVAE (openai/DALL-E)",
    licence="modified MIT",
    recognises=has(
        r"(encoder|decoder)\.blocks\.input\.w",
        "encoder.blocks.output.conv.w",
        "decoder.blocks.output.conv.w",
    ),
    architecture=architecture,
    outputs=outputs,
    unit_range=True,
    clamped=True,
    quirks=(
        "parameters are called `w` and `b`",
        "images are in [0, 1] and mapped to [0.1, 0.9]; what comes back is clamped",
        "the decoder's first convolution takes a one-hot: a column of it, and its bias, are a "
        "code's vector",
        "encoder.pkl and decoder.pkl are whole pickled modules, of which only tensors are read "
        "here: give the folder "
        "that holds both",
    ),
    files=(
        PublishedFile(
            "dalle-dvae",
            "https://cdn.openai.com/dall-e/",
            "encoder.pkl",
            "with decoder.pkl beside it: f8, 8192 codes, n_hid 256, n_init 128, 2 blocks a group",
            "rFID 33.88 (train) / 32.01 (val), taming's README",
        ),
    ),
)
