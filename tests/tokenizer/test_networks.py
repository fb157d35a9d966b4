"""Laws of the encoder and decoder networks: shapes, places, sizes, and agreement with published
ones."""

from __future__ import annotations

import dataclasses
import types

import pytest
import torch
from torch import nn
from torch.testing import assert_close

from tokenizer.decoders import DECODERS
from tokenizer.decoders.conv import ConvDecoder, ConvDecoderConfig
from tokenizer.decoders.magvit import MagvitDecoderConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.decoders.vit import PRESETS, ViTDecoderConfig, sin_cos_positions
from tokenizer.encoders.conv import ConvEncoder, ConvEncoderConfig
from tokenizer.encoders.magvit import MagvitEncoderConfig
from tokenizer.encoders.resnet import Attention, ResNetEncoderConfig, group_norm
from tokenizer.hierarchical import VQVAE2Config
from training.config import from_dict, to_dict

SMALL = {
    "conv": {"channels": 8, "residual_blocks": 1, "residual_channels": 4},
    "resnet": {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1},
    "magvit": {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1},
    "patch_vit": {"channels": 16, "depth": 2, "heads": 2, "hidden": 24},
    "dvae": {"channels": 8, "groups": 3, "blocks": 1},
    "vit": {"dim": 16, "depth": 2, "heads": 2},
}
GRIDS = [kind for kind in DECODERS if kind != "titok"]  # whose codes have places
RESNETS = [((1, 2, 2), 1, 4), ((1, 2), 2, 4), ((2,), 4, 4), ((1,), 1, 1), ((1, 1, 2, 2, 4), 1, 16)]


def small_decoder(kind, **settings):
    torch.manual_seed(0)
    return DECODERS[kind](**SMALL[kind], **settings).build(5, 4, (4, 4), nn.Identity())


def parameters(*modules):
    return sum(parameter.numel() for module in modules for parameter in module.parameters())


# every decoder


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("grid", [(4, 4), (2, 3), (7, 2)])
def test_decoders_take_grids_of_any_shape(kind, grid):
    assert small_decoder(kind)(torch.randn(2, 5, *grid)).shape == (2, 3, 4 * grid[0], 4 * grid[1])


@pytest.mark.parametrize("kind", GRIDS)
def test_gradients_reach_all_of_a_decoder(kind):
    decoder = small_decoder(kind)
    decoder(torch.randn(3, 5, 4, 4)).square().sum().backward()
    for name, parameter in decoder.named_parameters():
        if not name.endswith("key.bias"):  # softmax does not see it
            assert parameter.grad.abs().sum() > 0, name
    assert any(decoder.last_layer is parameter for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", GRIDS)
@pytest.mark.parametrize("place", [(1, 4), (3, 2)])
def test_a_code_moves_what_is_around_its_own_place(kind, place):
    decoder = small_decoder(kind).eval()
    plain = torch.randn(32, 5, 5, 7)
    changed = plain.clone()
    changed[:, :, place[0], place[1]] *= -3
    moved = (decoder(changed) - decoder(plain)).square().sum((0, 1))
    for side, share in ((0, moved.sum(1)), (1, moved.sum(0))):
        pixels = torch.arange(len(share)) + 0.5
        assert abs((share @ pixels / share.sum()) / 4 - 0.5 - place[side]) < 1, (
            "codes from the place, on average"
        )


# MaskGIT and MAGVIT-v2


@pytest.mark.parametrize("downsampling", ["average", "conv", "centred"])
@pytest.mark.parametrize(
    ("shortcut", "upsampling", "adaptive"),
    [("input", "nearest", False), ("output", "channels", True)],
)
def test_magvit_networks_halve_and_double(downsampling, shortcut, upsampling, adaptive):
    torch.manual_seed(0)
    sizes = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 2, "shortcut": shortcut}
    encoder = MagvitEncoderConfig(**sizes, downsampling=downsampling, out_channels=6).build(16)
    decoder = MagvitDecoderConfig(**sizes, upsampling=upsampling, adaptive=adaptive).build(
        6, 4, (4, 4), encoder
    )
    features = encoder(torch.randn(2, 3, 24, 16))
    assert features.shape == (2, 6, 6, 4) and decoder(features).shape == (2, 3, 24, 16)
    decoder(features).square().sum().backward()
    for network in (encoder, decoder):
        assert all(parameter.grad.abs().sum() > 0 for parameter in network.parameters())


def test_magvit_networks_of_the_unit_range_are_those_of_other_images():
    sizes = {"channels": 8, "multipliers": (1, 1), "blocks": 1}
    plain, unit = (
        MagvitEncoderConfig(**sizes, unit_range=is_unit).build(8) for is_unit in (False, True)
    )
    unit.load_state_dict(plain.state_dict())
    images = torch.rand(2, 3, 8, 8)
    assert_close(unit(images * 2 - 1), plain(images), atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize(
    ("settings", "line"),
    [
        ({"blocks": 0}, "blocks=0 must be at least 1"),
        ({"multipliers": ()}, "must name a multiplier"),
        ({"shortcut": "none"}, "shortcut='none' is not one of input, output"),
        ({"groups": 5}, "groups=5 must divide all widths"),
    ],
)
def test_magvit_networks_that_cannot_be_are_refused(settings, line):
    for config in (MagvitEncoderConfig, MagvitDecoderConfig):
        with pytest.raises(ValueError, match=line):
            config(**settings)


def test_attention_may_stand_at_any_resolution():
    sizes = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1, "groups": 2}
    for attention, levels, expected in (
        (True, None, 2),
        (False, None, 0),
        (True, (), 1),
        (False, (0, 2), 2),
    ):
        config = ResNetEncoderConfig(**sizes, attention=attention, attention_levels=levels)
        encoder = config.build(16)
        assert sum(isinstance(module, Attention) for module in encoder.modules()) == expected
        assert {
            module.num_groups for module in encoder.modules() if isinstance(module, nn.GroupNorm)
        } == {2}
    with pytest.raises(ValueError, match=r"attention_levels=\[3\] must be of the 3"):
        ResNetEncoderConfig(**sizes, attention_levels=(3,))
    with pytest.raises(ValueError, match="groups=3 must divide all widths, and 8"):
        ResNetEncoderConfig(**{**sizes, "groups": 3})


# VQ-VAE


def test_conv_networks_are_the_published_ones():
    encoder = ConvEncoderConfig().build(32)
    decoder = ConvDecoderConfig().build(128, 4, (8, 8), encoder)
    residual = 2 * ((128 * 9 + 1) * 32 + (32 + 1) * 128)
    assert (
        parameters(encoder)
        == (3 * 16 + 1) * 64 + (64 * 16 + 1) * 128 + (128 * 9 + 1) * 128 + residual
    )
    assert (
        parameters(decoder) == (128 * 9 + 1) * 128 + residual + 128 * 16 * 64 + 64 + 64 * 16 * 3 + 3
    )


@pytest.mark.parametrize("stride", [2, 4, 8, 16])
def test_conv_networks_scale_to_larger_images(stride):
    encoder = ConvEncoderConfig(channels=8, stride=stride, residual_channels=4).build(256)
    features = encoder(torch.randn(2, 3, 6 * stride, 4 * stride))
    assert features.shape == (2, 8, 6, 4)
    decoder = ConvDecoderConfig(channels=8, residual_channels=4).build(8, stride, (6, 4), encoder)
    assert decoder(features).shape == (2, 3, 6 * stride, 4 * stride)


@pytest.mark.parametrize(
    ("activation", "layer"), [("relu", nn.ReLU()), ("gelu", nn.GELU("tanh")), ("silu", nn.SiLU())]
)
def test_conv_networks_have_the_activation_asked_for(activation, layer):
    encoder = ConvEncoderConfig(
        channels=8, stride=2, residual_channels=4, activation=activation
    ).build(16)
    decoder = ConvDecoderConfig(channels=8, residual_channels=4, activation=activation).build(
        8, 2, (8, 8), encoder
    )
    x = torch.randn(2, 3, 16, 16)
    expected = encoder.body(layer(encoder.down[0](x)))
    for _, wide, _, point in encoder.stack.blocks:
        expected = expected + point(layer(wide(layer(expected))))
    features = encoder(x)
    assert_close(features, layer(expected))
    hidden = decoder.body(features)
    for _, wide, _, point in decoder.stack.blocks:
        hidden = hidden + point(layer(wide(layer(hidden))))
    assert_close(decoder(features), decoder.up[0](layer(hidden)))


@pytest.mark.parametrize("config", [ConvEncoderConfig, ConvDecoderConfig, VQVAE2Config])
def test_an_unknown_activation_is_refused(config):
    with pytest.raises(ValueError, match=r"\.activation='swish' is not one of relu, gelu, silu"):
        config(activation="swish")


def test_conv_networks_take_features_for_images():
    encoder, decoder = (
        ConvEncoder(8, 2, 1, 4, in_channels=7),
        ConvDecoder(8, 2, 6, 1, 4, out_channels=7),
    )
    features = torch.randn(2, 7, 6, 10)
    assert encoder(features).shape == (2, 8, 3, 5)
    assert decoder(encoder(features)).shape == features.shape


# VQGAN


@pytest.mark.parametrize(("multipliers", "patch", "stride"), RESNETS)
@pytest.mark.parametrize("attention", [True, False])
def test_resnets_halve_and_double(multipliers, patch, stride, attention):
    settings = {
        "channels": 8,
        "multipliers": multipliers,
        "blocks": 1,
        "patch": patch,
        "attention": attention,
    }
    encoder = ResNetEncoderConfig(**settings, out_channels=6).build(32)
    decoder = ResNetDecoderConfig(**settings).build(
        encoder.channels, encoder.stride, (2, 3), encoder
    )
    images = torch.rand(2, 3, 2 * stride, 3 * stride) * 2 - 1
    features = encoder(images)
    assert (encoder.channels, encoder.stride) == (6, stride)
    assert features.shape == (2, 6, 2, 3) and decoder(features).shape == images.shape
    (decoder(features) - images).square().sum().backward()
    for name, parameter in encoder.named_parameters():
        if not name.endswith("key.bias"):
            assert parameter.grad.abs().sum() > 0, name


def test_patches_spare_the_full_resolution():
    settings = {"channels": 8, "multipliers": (1, 2), "blocks": 1, "patch": 2}
    encoder = ResNetEncoderConfig(**settings).build(32)
    decoder = ResNetDecoderConfig(**settings).build(256, 4, (8, 8), encoder)
    sides = []
    for layer in [*encoder.modules(), *decoder.modules()]:
        if isinstance(layer, nn.Conv2d):
            layer.register_forward_hook(lambda layer, given, made: sides.append(made.shape[-1]))
    decoder(encoder(torch.randn(1, 3, 32, 32)))
    assert max(sides) == 16 and min(sides) == 8
    images = torch.zeros(1, 3, 32, 32)
    images[:, :, 6:8, 2:4] = 1
    changed = (
        (encoder.conv_in(images) - encoder.conv_in(torch.zeros_like(images))).abs().sum((0, 1))
    )
    assert changed.nonzero().tolist() == [[3, 1]], "each patch goes to its own place alone"


def published(modules):
    """Parameters of transformers' copy of LlamaGen's VQGAN in the order of their use."""
    for module in modules:
        if hasattr(module, "block"):  # a resolution
            for number, block in enumerate(module.block):
                yield from block.parameters()
                yield from module.attn[number].parameters() if len(module.attn) else ()
            for scale in ("downsample", "upsample"):
                yield from getattr(module, scale).parameters() if hasattr(module, scale) else ()
        else:
            yield from module.parameters()


def published_pair(**sizes):
    from transformers.models.janus.modeling_janus import (
        JanusVQVAEConfig,
        JanusVQVAEDecoder,
        JanusVQVAEEncoder,
    )

    config = JanusVQVAEConfig(**sizes)
    return JanusVQVAEEncoder(config), JanusVQVAEDecoder(config)


def test_resnets_compute_what_the_published_vqgan_does():
    sizes = {"channel_multiplier": (1, 2), "num_res_blocks": 1, "latent_channels": 16}
    their_encoder, their_decoder = published_pair(**sizes)
    encoder = ResNetEncoderConfig(multipliers=(1, 2), blocks=1, out_channels=16).build(16)
    decoder = ResNetDecoderConfig(multipliers=(1, 2), blocks=1).build(16, 2, (4, 3), encoder)
    for ours, theirs, levels in ((encoder, their_encoder, "down"), (decoder, their_decoder, "up")):
        between = [theirs.mid, *theirs.up] if levels == "up" else [*theirs.down, theirs.mid]
        order = list(published([theirs.conv_in, *between, theirs.norm_out, theirs.conv_out]))
        middle = [ours.middle, ours.up] if levels == "up" else [ours.down, ours.middle]
        own = [
            p
            for module in (ours.conv_in, *middle, ours.norm_out, ours.conv_out)
            for p in module.parameters()
        ]
        assert [p.shape for p in own] == [p.shape for p in order]
        with torch.no_grad():
            for to, source in zip(own, order):
                to.copy_(source.normal_(std=0.05) if source.ndim > 1 else source.uniform_(0.5, 1.5))
    images = torch.rand(2, 3, 8, 6) * 2 - 1
    features = encoder(images)
    torch.testing.assert_close(features, their_encoder(images), atol=1e-4, rtol=1e-4)
    torch.testing.assert_close(decoder(features), their_decoder(features), atol=1e-4, rtol=1e-4)


def test_the_default_resnet_has_the_published_size():
    with torch.device("meta"):
        encoder = ResNetEncoderConfig().build(256)
        decoder = ResNetDecoderConfig().build(256, 16, (16, 16), encoder)
        their_encoder, their_decoder = published_pair()
    assert encoder.stride == 16
    assert parameters(encoder) == parameters(their_encoder) and parameters(decoder) == parameters(
        their_decoder
    )
    around = 256 * 8 + 8 + 8 * 256 + 256 + 16384 * 8  # two projections and the codebook
    assert round((parameters(encoder, decoder) + around) / 1e6) == 72  # LlamaGen's README: 72M


def test_groups_are_32_where_channels_suffice_and_never_of_one_channel():
    assert [group_norm(width).num_groups for width in (128, 256, 512)] == [32, 32, 32]
    for width in range(2, 200, 2):
        groups = group_norm(width).num_groups
        assert width % groups == 0 and groups <= 32 and (groups == 1 or width // groups >= 4)


@pytest.mark.parametrize(
    ("config", "settings", "message"),
    [
        (ResNetEncoderConfig, {"multipliers": ()}, r"encoder\.multipliers=\[\] must name"),
        (ResNetEncoderConfig, {"multipliers": (1, 0)}, r"encoder\.multipliers=\[1, 0\]"),
        (ResNetEncoderConfig, {"patch": 0}, r"encoder\.patch=0 must be at least 1"),
        (ResNetEncoderConfig, {"out_channels": 0}, r"encoder\.out_channels=0"),
        (ResNetDecoderConfig, {"blocks": 0}, r"decoder\.blocks=0"),
        (ViTDecoderConfig, {"preset": "XXL"}, r"decoder\.preset=XXL is none of B, L, XL, mirror"),
        (
            ViTDecoderConfig,
            {"preset": "L", "depth": 12},
            r"decoder\.preset=L and decoder\.depth=12 both",
        ),
        (
            ViTDecoderConfig,
            {"preset": "mirror", "mlp": 12},
            r"decoder\.preset=mirror and decoder\.mlp=12 both",
        ),
        (ViTDecoderConfig, {"dim": 30, "heads": 4}, r"decoder\.dim=30 must divide"),
        (ViTDecoderConfig, {"depth": 0}, r"at least 1: \(768, 0, 12, 3072\)"),
    ],
)
def test_sizes_that_cannot_be_are_refused(config, settings, message):
    with pytest.raises(ValueError, match=message):
        config(**settings)


def test_a_resnet_decoder_refuses_the_pixels_per_code_of_another_encoder():
    with pytest.raises(
        ValueError, match=r"multipliers=\[1, 1\] with decoder\.patch=2 make 4 pixels .* has 8"
    ):
        ResNetDecoderConfig(multipliers=(1, 1), patch=2).build(8, 8, (2, 2), nn.Identity())


def test_configs_come_from_yaml():
    encoder = from_dict(ResNetEncoderConfig, {"multipliers": [1, 2], "patch": 2}, "a.yaml").build(
        32
    )
    assert encoder.stride == 4
    for config in (
        ResNetDecoderConfig(multipliers=(1, 2)),
        ViTDecoderConfig(preset="XL"),
        ViTDecoderConfig(dim=24),
    ):
        again = from_dict(type(config), to_dict(config), "a.yaml")
        assert to_dict(again) == to_dict(config)


# ViT


@pytest.mark.parametrize(
    ("preset", "heads", "head_dim"), [("B", 12, 64), ("L", 16, 64), ("XL", 16, 72)]
)
def test_presets_have_the_sizes_of_rae(preset, heads, head_dim):
    size = PRESETS[preset]
    with torch.device("meta"):
        decoder = ViTDecoderConfig(preset=preset).build(768, 16, (16, 16), nn.Identity())
    layer = (
        4 * (size.dim + 1) * size.dim
        + (size.dim + 1) * size.mlp
        + (size.mlp + 1) * size.dim
        + 4 * size.dim
    )
    ends = (768 + 1) * size.dim + size.dim + 2 * size.dim + (size.dim + 1) * 768
    assert parameters(decoder) == size.depth * layer + ends
    assert (size.heads, size.dim // size.heads, len(decoder.decoder_layers)) == (
        heads,
        head_dim,
        size.depth,
    )


def test_without_preset_unsaid_sizes_are_those_of_b():
    with torch.device("meta"):
        plain = ViTDecoderConfig().build(8, 16, (4, 4), nn.Identity())
        preset = ViTDecoderConfig(preset="B").build(8, 16, (4, 4), nn.Identity())
        own = ViTDecoderConfig(dim=96, depth=4, heads=4).build(8, 4, (8, 8), nn.Identity())
    assert parameters(plain) == parameters(preset)
    assert own.decoder_layers[0].intermediate["dense"].weight.shape == (4 * 96, 96)


def encoder_of(name, **settings):
    import transformers

    config = getattr(transformers, name)(
        hidden_size=48, num_hidden_layers=3, num_attention_heads=4, **settings
    )
    return types.SimpleNamespace(model=types.SimpleNamespace(config=config))


@pytest.mark.parametrize(
    ("name", "settings"),
    [
        ("ViTConfig", {"intermediate_size": 96}),
        ("ViTMAEConfig", {"intermediate_size": 96}),
        ("SiglipVisionConfig", {"intermediate_size": 96}),
        ("Dinov2Config", {"mlp_ratio": 2}),
        ("Dinov2WithRegistersConfig", {"mlp_ratio": 2}),
        ("DINOv3ViTConfig", {"intermediate_size": 96}),
        ("InternVLVisionConfig", {"intermediate_size": 96}),
    ],
)
def test_mirror_takes_the_size_of_the_encoder(name, settings):
    decoder = ViTDecoderConfig(preset="mirror").build(48, 4, (2, 2), encoder_of(name, **settings))
    assert (
        decoder.dim == 48
        and len(decoder.decoder_layers) == 3
        and decoder.decoder_layers[0].heads == 4
    )
    assert decoder.decoder_layers[0].intermediate["dense"].weight.shape == (96, 48)


def test_mirror_needs_a_transformer():
    with pytest.raises(ValueError, match=r"decoder\.preset=mirror needs a vision transformer"):
        ViTDecoderConfig(preset="mirror").build(
            48, 4, (2, 2), ConvEncoderConfig(channels=8).build(16)
        )


def test_a_vit_decoder_treats_every_grid_as_if_built_for_it():
    square = small_decoder("vit")
    wide = ViTDecoderConfig(**SMALL["vit"]).build(5, 4, (2, 6), nn.Identity())
    weights = {
        name: tensor for name, tensor in square.state_dict().items() if name != "decoder_pos_embed"
    }
    wide.load_state_dict(weights, strict=False)
    for grid in ((4, 4), (2, 6), (6, 2)):
        vectors = torch.randn(2, 5, *grid)
        assert torch.equal(square(vectors), wide(vectors))
    # places are told apart by where they are, not by the grid around them
    near, far = (
        sin_cos_positions((2, 3), 16)[0, 1:].reshape(2, 3, 16),
        sin_cos_positions((5, 4), 16)[0, 1:],
    )
    assert torch.equal(near, far.reshape(5, 4, 16)[:2, :3])


def test_gradient_checkpointing_changes_no_number():
    plain = small_decoder("vit").train()
    again = small_decoder("vit", gradient_checkpointing=True).train()
    vectors = torch.randn(2, 5, 4, 4)
    stored = []
    for decoder in (plain, again):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(
            lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t
        ):
            images = decoder(vectors)
        images.square().sum().backward()
        stored.append(sum(kept))
    assert torch.equal(plain(vectors), again(vectors))
    for (name, first), second in zip(plain.named_parameters(), again.parameters()):
        torch.testing.assert_close(first.grad, second.grad, msg=name)
    assert stored[1] < stored[0] / 2


def test_configs_are_frozen():
    for config in (ResNetEncoderConfig(), ResNetDecoderConfig(), ViTDecoderConfig()):
        with pytest.raises(dataclasses.FrozenInstanceError):
            config.kind = "other"
