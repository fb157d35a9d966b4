"""Laws of code layouts and of every autoencoder with every quantizer."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny import QUANTIZER_SIZES, save_encoder
from torch import nn

from tokenizer.decoders import DECODERS
from tokenizer.decoders.vit import ViTDecoderConfig, sin_cos_positions
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.interface import CodeLayout
from tokenizer.latents import LatentNormaliser
from tokenizer.objective import Objective, ObjectiveConfig
from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.codebook import to_rows
from tokenizer.quantizers.kmeans import kmeans
from tokenizer.run import AUTOENCODERS
from training.loop import Batch

DECODER_SIZES = {
    "conv": {"channels": 8, "residual_blocks": 1, "residual_channels": 4},
    "resnet": {"channels": 8, "multipliers": (1, 1, 1), "blocks": 1},
    "magvit": {"channels": 8, "multipliers": (1, 1, 1), "blocks": 1},
    "patch_vit": {"channels": 16, "depth": 2, "heads": 2, "hidden": 24},
    "dvae": {"channels": 8, "groups": 3, "blocks": 1},
    "vit": {"dim": 16, "depth": 2, "heads": 2},
}
CASES = list(itertools.product(AUTOENCODERS, QUANTIZERS))
SHAPES = [(16, 16), (16, 24), (24, 24), (32, 16)]


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def config_of(kind, quantizer, encoder_folder, frozen=True, decoder=None, **changes):
    """A tiny config of 16 px and 4 x 4 codes (and 2 x 2 above them)."""
    config = AUTOENCODERS[kind]()
    encoder = ConvEncoderConfig(channels=16, residual_blocks=1, residual_channels=4)
    if config.encoder.kind == "foundation":
        encoder = FoundationConfig(name=encoder_folder, frozen=frozen)
    decoder = decoder or config.decoder.kind
    parts = {"encoder": encoder, "decoder": DECODERS[decoder](**DECODER_SIZES[decoder])}
    made = QUANTIZERS[quantizer](**QUANTIZER_SIZES[quantizer])
    if kind == "vqvae2":
        parts |= {
            "top": made,
            "bottom": made,
            "channels": 16,
            "residual_blocks": 1,
            "residual_channels": 8,
        }
    else:
        parts["quantizer"] = made
    return dataclasses.replace(config, **{**parts, **changes})


def build(*arguments, **options):
    torch.manual_seed(0)
    return config_of(*arguments, **options).build(16)


def images(batch=6, size=(16, 16), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=CASES, ids="-".join)
def case(request, encoder_folder):
    return (*request.param, encoder_folder)


# code layouts

LEVELS = CodeLayout(((2, 2), (2, 3), (5,)), (4, 8, 2))


def test_a_layout_splits_and_joins():
    codes = torch.stack([torch.arange(15) % 2, torch.zeros(15, dtype=torch.int64)])
    top, bottom, line = LEVELS.split(codes)
    assert (top.shape, bottom.shape, line.shape) == ((2, 2, 2), (2, 2, 3), (2, 5))
    assert bottom[0].tolist() == [[0, 1, 0], [1, 0, 1]]
    assert torch.equal(LEVELS.join([top, bottom, line]), codes)


def test_a_layout_counts():
    assert LEVELS.lengths == (4, 6, 5) and LEVELS.length == 15
    assert LEVELS.bits == 4 * 2 + 6 * 3 + 5 * 1
    assert list(LEVELS.spans()) == [(slice(0, 4), 4), (slice(4, 10), 8), (slice(10, 15), 2)]
    assert CodeLayout([[2, 2], [2, 3], [5]], [4, 8, 2]) == LEVELS
    assert hash(CodeLayout([[2, 2], [2, 3], [5]], [4, 8, 2])) == hash(LEVELS)


@pytest.mark.parametrize(
    "wrong",
    [
        torch.zeros(2, 14, dtype=torch.int64),
        torch.zeros(15, dtype=torch.int64),
        torch.zeros(2, 15, dtype=torch.int32),
        torch.full((2, 15), -1),
        torch.full((2, 15), 2),  # fits the first two levels and not the third
    ],
)
def test_a_layout_refuses_other_codes(wrong):
    LEVELS.check(torch.ones(2, 15, dtype=torch.int64))
    LEVELS.check(torch.zeros(0, 15, dtype=torch.int64))
    with pytest.raises(ValueError, match="codes"):
        LEVELS.check(wrong)


# every autoencoder with every quantizer


@pytest.mark.parametrize("size", SHAPES, ids=str)
def test_decode_of_encode_is_forward(case, size):
    autoencoder, given = build(*case).eval(), images(size=size)
    with torch.no_grad():
        output = autoencoder(given)
    codes, layout = autoencoder.encode(given), autoencoder.layout_of(*size)
    layout.check(codes)
    assert torch.equal(codes, output.codes) and len(codes) == 6
    assert torch.equal(autoencoder.decode(codes, layout), output.images)
    assert output.images.shape == given.shape and output.features.shape == (
        6,
        16,
        size[0] // 4,
        size[1] // 4,
    )
    assert output.latents.shape == output.vectors.shape
    if size == (16, 16):
        assert layout == autoencoder.layout
        assert torch.equal(autoencoder.decode(codes), output.images)


def test_the_layout_is_the_quantizers(case):
    autoencoder = build(*case)
    sizes = autoencoder.quantizer.num_codes
    if case[0] == "vqvae2":
        grids = ((2, 2),) * len(sizes) + ((4, 4),) * len(sizes)
        assert autoencoder.layout == CodeLayout(grids, sizes * 2)
    else:
        assert autoencoder.layout == CodeLayout(((4, 4),) * len(sizes), sizes)


def test_state_dict_is_the_whole_tokenizer(case):
    first, second = build(*case).eval(), config_of(*case).build(16).eval()
    first.calibrate([images()], seed=0)
    second.load_state_dict(first.state_dict())
    codes = first.encode(images(seed=1))
    assert torch.equal(second.encode(images(seed=1)), codes)
    assert torch.equal(second.decode(codes), first.decode(codes))


def test_decode_refuses_codes_that_it_cannot_have_made(case):
    autoencoder = build(*case)
    with pytest.raises(ValueError, match=r"outside \[0, \d+\)"):
        autoencoder.decode(torch.full((1, autoencoder.layout.length), 60))
    with pytest.raises(ValueError, match=r"must be \(B, \d+\) int64"):
        autoencoder.decode(torch.zeros(1, 7, dtype=torch.int64))


def test_autocast_chooses_no_other_codes_for_the_same_features(case):
    autoencoder = build(*case).eval()
    autoencoder.calibrate([images()], seed=0)
    with torch.no_grad():
        features = autoencoder.encoder(images(seed=1))
        plain = choose(autoencoder, features)
        with torch.autocast("cpu", torch.bfloat16):
            assert torch.equal(choose(autoencoder, features), plain)


def choose(autoencoder, features):
    """Codes of features; of VQ-VAE-2 the top's, as if these were what the top encoder made."""
    if hasattr(autoencoder, "quantize"):
        return autoencoder.quantize(features)[1].codes
    return autoencoder._quantize_top(features).codes


def loss_of(autoencoder):
    objective = Objective(ObjectiveConfig(), autoencoder, None)
    return objective.autoencoder_loss(Batch({"images": images()}, torch.arange(6)), 0).total


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_all_that_learns_and_nothing_else(case, frozen):
    if case[0] != "vqrae" and frozen:
        pytest.skip("nothing to freeze")
    autoencoder = build(*case, frozen=frozen).train()
    for name, parameter in autoencoder.named_parameters():
        if name.startswith("project_") and name.endswith("weight"):
            parameter.data *= 20  # latents of a size that meets several codes of any quantizer
    autoencoder.calibrate([images()], seed=0)
    loss_of(autoencoder.train()).backward()
    for name, parameter in autoencoder.named_parameters():
        if not parameter.requires_grad:
            assert parameter.grad is None, name
        elif "k_proj.bias" in name or "key.bias" in name:  # softmax does not see them
            assert parameter.grad is not None, name
        else:
            assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name
    learns = any(p.requires_grad for p in autoencoder.encoder.parameters())
    assert learns == (case[0] != "vqrae" or not frozen)


def test_a_training_step_moves_what_learns_and_nothing_frozen(case):
    autoencoder = build(*case).train()
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    trainable = {name: p for name, p in autoencoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.1)
    loss_of(autoencoder).backward()
    optimizer.step()
    autoencoder.update(0, True)
    moved = {n for n, t in autoencoder.state_dict().items() if not torch.equal(t, before[n])}
    statistics = {n for n in before if "quantizer." in n}
    assert set(trainable) <= moved | {n for n in trainable if n.endswith("bias")}
    assert moved <= set(trainable) | statistics
    assert not any(name.endswith("quantizer.frozen") for name in moved)
    assert any(name.endswith("usage") for name in moved)
    if case[0] == "vqrae":
        assert not any(module.training for module in autoencoder.encoder.modules())
        assert not any(name.startswith("encoder.") for name in moved)


def test_every_autoencoder_logs_usage(case):
    autoencoder = build(*case).train()
    autoencoder(images())
    autoencoder.update(0, True)
    parts = autoencoder(images()).parts
    assert 0 < parts["usage"] <= 1 and parts["perplexity"] >= 1


# one by one


@pytest.mark.parametrize(
    "code_dim", [4, 16, 48]
)  # with projections, without, and with a search in fewer dimensions
def test_calibration_normalises_and_starts_the_codebook(encoder_folder, code_dim):
    config = config_of("vqrae", "vector", encoder_folder)
    autoencoder = dataclasses.replace(
        config, quantizer=dataclasses.replace(config.quantizer, code_dim=code_dim)
    ).build(16)
    assert isinstance(autoencoder.project_in, nn.Identity) == (code_dim == 16)
    batches = [images(seed=seed, batch=32) for seed in range(3)]
    autoencoder.calibrate(batches, seed=0)
    features = torch.cat([autoencoder.encoder(batch) for batch in batches])
    normal = autoencoder.normaliser(features)
    torch.testing.assert_close(normal.mean(0), torch.zeros(16, 4, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(
        normal.var((0, 2, 3), correction=0), torch.ones(16), atol=1e-2, rtol=0
    )
    torch.testing.assert_close(
        autoencoder.normaliser.inverse(normal), features, atol=1e-5, rtol=1e-5
    )
    assert len(autoencoder.encode(torch.cat(batches)).unique()) == 20


def test_codes_start_where_latents_are_though_the_projection_drops_channels(encoder_folder):
    """Centres of what is searched, not projected centres of what is not."""
    config = config_of("vqrae", "vector", encoder_folder)
    autoencoder = dataclasses.replace(
        config, quantizer=dataclasses.replace(config.quantizer, code_dim=3)
    ).build(16)
    given = images(batch=64)
    autoencoder.calibrate([given], seed=5)
    normal = autoencoder.normaliser(autoencoder.encoder(given))
    latents = to_rows(autoencoder.project_in(normal).detach())
    torch.testing.assert_close(
        autoencoder.quantizer.codebook, kmeans(latents, 20, 5), atol=1e-4, rtol=0
    )


@pytest.mark.parametrize("kind", ["vqrae", "vqvae", "vqvae2"])
@pytest.mark.parametrize("batches", [[24], [7, 17]])
def test_calibration_says_of_which_image_each_row_is(encoder_folder, kind, batches, monkeypatch):
    autoencoder, given = build(kind, "vector", encoder_folder), images(batch=24)
    asked = []
    for quantizer in [part for part in autoencoder.modules() if hasattr(part, "initialise")]:
        monkeypatch.setattr(
            quantizer, "initialise", lambda rows, *_, images: asked.append((rows, images))
        )
    autoencoder.calibrate(list(given.split(batches)), seed=0)
    for rows, of_image in asked:
        assert torch.equal(of_image, torch.arange(24).repeat_interleave(len(rows) // 24))
    assert len(asked) == (2 if kind == "vqvae2" else 1)


@pytest.mark.parametrize("kind", ["vqvae", "vqvae2"])
def test_calibration_reads_no_images_for_nothing(encoder_folder, kind):
    autoencoder = build(kind, "fsq", encoder_folder)
    assert (
        not autoencoder.starts_from_data and build(kind, "vector", encoder_folder).starts_from_data
    )
    autoencoder.encoder.register_forward_hook(lambda *_: pytest.fail("the encoder ran"))
    autoencoder.calibrate([images()], seed=0)


def test_weights_of_a_decoder_are_for_pretrained_encoders(encoder_folder):
    decoder, foundation = (
        ViTDecoderConfig(weights="decoder.safetensors"),
        FoundationConfig(name=encoder_folder),
    )
    for model, message in (
        (
            dict(kind="vqvae2", decoder=decoder),
            "model.kind=vqvae2 with encoder.kind=conv has none that they fit",
        ),
        (dict(kind="vqvae", decoder=decoder), "model.kind=vqvae with encoder.kind=conv has none"),
        (
            dict(kind="vqvae", encoder=foundation, decoder=decoder, normalise=True),
            "set model.normalise=false",
        ),
        (dict(kind="vqrae", encoder=foundation, decoder=decoder), "set model.denormalise=true"),
    ):
        with pytest.raises(ValueError, match=message):
            AUTOENCODERS[model["kind"]](**model)


def test_a_search_in_fewer_dimensions_finds_the_same_codes(encoder_folder):
    config = config_of("vqrae", "vector", encoder_folder)
    wide = (
        dataclasses.replace(config, quantizer=dataclasses.replace(config.quantizer, code_dim=48))
        .build(16)
        .eval()
    )
    wide.calibrate([images(batch=32)], seed=0)
    with torch.no_grad():
        features = wide.encoder(images(batch=64, seed=3))
        latents, quantized = wide.quantize(features)
        assert torch.equal(quantized.codes, wide.quantizer(latents).codes)


def test_denormalised_features_reach_the_decoder(encoder_folder):
    autoencoder = build("vqrae", "vector", encoder_folder, denormalise=True).eval()
    autoencoder.calibrate([images(batch=32)], seed=0)
    seen = []
    autoencoder.decoder.register_forward_pre_hook(lambda module, given: seen.append(given[0]))
    output = autoencoder(images())
    expected = autoencoder.normaliser.inverse(autoencoder.project_out(output.vectors))
    torch.testing.assert_close(seen[0], expected)
    with pytest.raises(ValueError, match=r"model.denormalise=true undoes"):
        config_of("vqrae", "vector", encoder_folder, denormalise=True, normalise=False)


def test_stages_switch_what_learns(encoder_folder):
    autoencoder = build("vqrae", "vector", encoder_folder).train()
    for stage in (2, 1):
        autoencoder.set_stage(stage)
        assert {p.requires_grad for p in autoencoder.encoder.parameters()} == {stage == 2}
        autoencoder.zero_grad()
        loss_of(autoencoder).backward()
        assert any(p.grad is not None for p in autoencoder.encoder.parameters()) == (stage == 2)
        assert autoencoder.decoder.last_layer.grad is not None
    with pytest.raises(ValueError, match="stage 3 is neither"):
        autoencoder.set_stage(3)
    with pytest.raises(ValueError, match="only pretrained encoders have stages"):
        build("vqvae", "vector", encoder_folder).set_stage(1)


def test_normaliser_takes_other_grids():
    normaliser = LatentNormaliser(3, (4, 4))
    features = 5 + torch.randn(20, 3, 4, 4)
    normaliser.load(features.mean(0), features.var((0, 2, 3))[:, None, None])
    others = 5 + torch.randn(2, 3, 6, 6)
    assert normaliser(others).abs().mean() < 2
    torch.testing.assert_close(normaliser.inverse(normaliser(others)), others)
    with pytest.raises(
        ValueError, match=r"latent statistics: mean is \(4, 1, 1\), features are \(3, 4, 4\)"
    ):
        normaliser.load(torch.zeros(4, 1, 1), torch.ones(3, 1, 1))


def test_calibration_is_the_same_however_images_come_and_normalises_what_it_saw(encoder_folder):
    given = images(24)
    whole, parts = (build("vqrae", "vector", encoder_folder) for _ in range(2))
    parts.load_state_dict(whole.state_dict())
    whole.calibrate([given], seed=0)
    parts.calibrate(list(given.split(7)), seed=0)
    features = whole.encoder(given)
    mean = features.mean(0)
    torch.testing.assert_close(whole.normaliser.mean, mean)
    spread = (features - mean).square().mean((0, 2, 3))[:, None, None]
    torch.testing.assert_close(whole.normaliser.var, spread.expand_as(mean))
    rows = to_rows(features)
    positions = torch.arange(len(rows)) % mean[0].numel()
    torch.testing.assert_close(
        whole.normaliser.of_rows(rows, positions), to_rows(whole.normaliser(features))
    )
    for name, tensor in whole.state_dict().items():
        torch.testing.assert_close(parts.state_dict()[name], tensor, atol=1e-4, rtol=1e-4, msg=name)


@pytest.mark.parametrize(
    ("kind", "decoder"), [("vqvae", "vit"), ("vqrae", "conv"), ("vqvae", "resnet")]
)
def test_any_encoder_goes_with_any_decoder(kind, decoder, encoder_folder):
    autoencoder, given = build(kind, "vector", encoder_folder, decoder=decoder).eval(), images()
    assert torch.equal(autoencoder.decode(autoencoder.encode(given)), autoencoder(given).images)


@pytest.mark.parametrize(
    ("kind", "pixels", "size"), [("vqvae", 4, 32), ("vqrae", 4, 32), ("vqvae2", 8, 32)]
)
def test_an_image_of_no_whole_number_of_patches_is_refused(kind, pixels, size, encoder_folder):
    message = rf"data.image_size=30 does not divide by the encoder's {pixels} .*: {size} would"
    with pytest.raises(ValueError, match=message):
        config_of(kind, "vector", encoder_folder).build(30)


def test_the_bottom_of_vqvae2_is_conditioned_on_the_top(encoder_folder):
    autoencoder, given = build("vqvae2", "vector", encoder_folder).eval(), images()
    autoencoder.calibrate([images(seed=1, batch=32)], seed=0)
    codes = autoencoder.encode(given)
    top, bottom = autoencoder.layout.split(codes)
    assert top.shape == (6, 2, 2) and bottom.shape == (6, 4, 4)
    other = autoencoder.layout.join([(top + 1) % 20, bottom])
    assert not torch.equal(autoencoder.decode(other), autoencoder.decode(codes))
    with torch.no_grad():
        features = autoencoder.encoder(given)
        plain = autoencoder._bottom_latents(torch.zeros(6, 8, 2, 2), features)
        assert not torch.allclose(autoencoder(given).latents, plain)


def test_refused_decoder_settings():
    with pytest.raises(ValueError, match=r"decoder.kind=conv .* 14 pixels"):
        DECODERS["conv"]().build(8, 14, (2, 2), nn.Identity())
    with pytest.raises(ValueError, match=r"decoder.dim=30 must divide"):
        DECODERS["vit"](dim=30, heads=4)


def test_positions_tell_places_apart():
    positions = sin_cos_positions((3, 5), 16)
    assert positions.shape == (1, 16, 16) and not positions[0, 0].any()
    assert len(positions[0].unique(dim=0)) == 16
    assert positions[0, 1].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


def test_perception_needs_its_weights():
    with pytest.raises(
        ValueError, match=r"objective\.perceptual=1\.0 needs objective\.lpips_weights"
    ):
        ObjectiveConfig(perceptual=1.0)
