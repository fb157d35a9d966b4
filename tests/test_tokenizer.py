"""Laws of code layouts, autoencoders, decoders and discriminators."""

from __future__ import annotations

import dataclasses
import itertools

import pytest
import torch
from tiny import save_encoder

from tokenizer.autoencoder import LatentNormaliser
from tokenizer.decoders import DECODERS
from tokenizer.decoders.vit import sin_cos_positions
from tokenizer.discriminators import DISCRIMINATORS
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.interface import CodeLayout
from tokenizer.objective import Objective, ObjectiveConfig
from tokenizer.quantizers import QUANTIZERS
from tokenizer.run import AUTOENCODERS
from training.loop import Batch

DECODER_SIZES = {
    "conv": {"channels": 8, "residual_blocks": 1, "residual_channels": 4},
    "vit": {"dim": 16, "depth": 2, "heads": 2},
}
CASES = list(itertools.product(AUTOENCODERS, QUANTIZERS, (16, 6)))


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"))


def config_of(kind, quantizer, code_dim, encoder_folder, frozen=True, decoder=None):
    """A tiny config of 16 px and 4 x 4 codes; a code_dim of 16 needs no projections."""
    config = AUTOENCODERS[kind]()
    encoder = ConvEncoderConfig(channels=16, residual_blocks=1, residual_channels=4)
    if config.encoder.kind == "foundation":
        encoder = FoundationConfig(name=encoder_folder, frozen=frozen)
    decoder = decoder or config.decoder.kind
    return dataclasses.replace(
        config,
        encoder=encoder,
        quantizer=QUANTIZERS[quantizer](num_codes=20, code_dim=code_dim),
        decoder=DECODERS[decoder](**DECODER_SIZES[decoder]),
    )


def build(*arguments, **options):
    torch.manual_seed(0)
    return config_of(*arguments, **options).build(16)


def images(batch=6, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


@pytest.fixture(params=CASES, ids=lambda case: "-".join(map(str, case)))
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


# autoencoders


def test_decode_of_encode_is_forward(case):
    autoencoder, given = build(*case).eval(), images()
    with torch.no_grad():
        output = autoencoder(given)
    codes = autoencoder.encode(given)
    assert autoencoder.layout == CodeLayout(((4, 4),), (20,))
    assert codes.shape == (6, 16) and codes.dtype == torch.int64
    autoencoder.layout.check(codes)
    (grid,) = autoencoder.layout.split(codes)
    assert torch.equal(autoencoder.quantizer.lookup(grid), output.quantized.vectors)
    assert torch.equal(autoencoder.decode(codes), output.images)
    assert output.images.shape == given.shape and output.features.shape == (6, 16, 4, 4)


def test_state_dict_is_the_whole_tokenizer(case):
    first, second = build(*case).eval(), config_of(*case).build(16).eval()
    first.calibrate([images()], seed=0)
    second.load_state_dict(first.state_dict())
    codes = first.encode(images(seed=1))
    assert torch.equal(second.encode(images(seed=1)), codes)
    assert torch.equal(second.decode(codes), first.decode(codes))


def test_decode_refuses_codes_that_it_cannot_have_made(case):
    with pytest.raises(ValueError, match=r"outside \[0, 20\)"):
        build(*case).decode(torch.full((1, 16), 20))
    with pytest.raises(ValueError, match=r"must be \(B, 16\) int64"):
        build(*case).decode(torch.zeros(1, 17, dtype=torch.int64))


def loss_of(autoencoder):
    objective = Objective(ObjectiveConfig(), autoencoder, None)
    return objective.autoencoder_loss(Batch({"images": images()}, torch.arange(6)), 0).total


@pytest.mark.parametrize("frozen", [True, False])
def test_gradients_reach_all_that_learns_and_nothing_else(case, frozen):
    autoencoder = build(*case, frozen=frozen).train()
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
    assert learns == (case[0] == "vqvae" or not frozen)


def test_a_training_step_moves_what_learns_and_nothing_frozen(case):
    autoencoder = build(*case).train()
    before = {name: tensor.clone() for name, tensor in autoencoder.state_dict().items()}
    trainable = {name: p for name, p in autoencoder.named_parameters() if p.requires_grad}
    optimizer = torch.optim.AdamW(trainable.values(), lr=1e-2, weight_decay=0.1)
    loss_of(autoencoder).backward()
    optimizer.step()
    autoencoder.quantizer.update(0, True)
    moved = {n for n, t in autoencoder.state_dict().items() if not torch.equal(t, before[n])}
    statistics = {n for n in before if n.startswith("quantizer.")}
    assert set(trainable) <= moved | {n for n in trainable if n.endswith("bias")}
    assert moved <= set(trainable) | statistics
    assert "quantizer.frozen" not in moved
    if case[0] == "vqrae":
        assert not any(module.training for module in autoencoder.encoder.modules())
        assert not any(name.startswith("encoder.") for name in moved)


def test_calibration_normalises_and_starts_the_codebook(encoder_folder):
    autoencoder = build("vqrae", "vector", 16, encoder_folder)
    batches = [images(seed=seed, batch=32) for seed in range(3)]
    autoencoder.calibrate(batches, seed=0)
    features = torch.cat([autoencoder.encoder(batch) for batch in batches])
    normal = autoencoder.normaliser(features)
    torch.testing.assert_close(normal.mean(0), torch.zeros(16, 4, 4), atol=1e-4, rtol=0)
    torch.testing.assert_close(normal.var((0, 2, 3), correction=0), torch.ones(16), atol=1e-2, rtol=0)
    assert len(autoencoder.encode(torch.cat(batches)).unique()) == 20


def test_normaliser_takes_other_grids():
    normaliser = LatentNormaliser(3, (4, 4))
    features = 5 + torch.randn(20, 3, 4, 4)
    normaliser.measure(features)
    assert normaliser(5 + torch.randn(2, 3, 6, 6)).abs().mean() < 2


@pytest.mark.parametrize(("kind", "decoder"), [("vqvae", "vit"), ("vqrae", "conv")])
def test_any_encoder_goes_with_any_decoder(kind, decoder, encoder_folder):
    autoencoder, given = build(kind, "vector", 16, encoder_folder, decoder=decoder).eval(), images()
    assert torch.equal(autoencoder.decode(autoencoder.encode(given)), autoencoder(given).images)


@pytest.mark.parametrize("kind", AUTOENCODERS)
def test_an_image_of_no_whole_number_of_patches_is_refused(kind, encoder_folder):
    with pytest.raises(ValueError, match=r"data.image_size=30 does not divide by the encoder's 4 .*: 32 would"):
        config_of(kind, "vector", 16, encoder_folder).build(30)


# decoders and discriminators


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_make_images_of_any_grid(kind):
    decoder = DECODERS[kind](**DECODER_SIZES[kind]).build(5, 4, (4, 4))
    for grid in ((4, 4), (2, 3), (6, 6)):
        assert decoder(torch.randn(2, 5, *grid)).shape == (2, 3, 4 * grid[0], 4 * grid[1])
    decoder(torch.randn(2, 5, 4, 4)).square().sum().backward()
    assert all(parameter.grad is not None for parameter in decoder.parameters())
    assert any(decoder.last_layer is parameter for parameter in decoder.parameters())


@pytest.mark.parametrize("kind", DECODERS)
def test_decoders_put_each_code_in_its_place(kind):
    torch.manual_seed(0)
    decoder = DECODERS[kind](**DECODER_SIZES[kind]).build(5, 4, (4, 4)).eval()
    plain = torch.randn(64, 5, 4, 4)
    changed = plain.clone()
    changed[:, :, 1, 2] *= -3
    moved = (decoder(changed) - decoder(plain)).abs().sum((0, 1))
    patches = moved.unflatten(0, (4, 4)).unflatten(2, (4, 4)).sum((1, 3))
    assert divmod(int(patches.argmax()), 4) == (1, 2)


def test_refused_decoder_settings():
    with pytest.raises(ValueError, match=r"decoder.kind=conv .* 14 pixels"):
        DECODERS["conv"]().build(8, 14, (2, 2))
    with pytest.raises(ValueError, match=r"decoder.dim=30 must divide"):
        DECODERS["vit"](dim=30, heads=4)


def test_positions_tell_places_apart():
    positions = sin_cos_positions((3, 5), 16)
    assert positions.shape == (1, 16, 16) and not positions[0, 0].any()
    assert len(positions[0].unique(dim=0)) == 16
    assert positions[0, 1].tolist() == [0] * 4 + [1] * 4 + [0] * 4 + [1] * 4


@pytest.mark.parametrize("kind", DISCRIMINATORS)
def test_discriminators_judge_patches_one_image_at_a_time(kind):
    discriminator = DISCRIMINATORS[kind](channels=8).build()
    given = images(size=32)
    logits = discriminator(given)
    assert logits.shape[:2] == (6, 1) and logits.ndim == 4
    torch.testing.assert_close(discriminator(given[:1]), logits[:1])
    logits.square().sum().backward()
    assert all(parameter.grad.abs().sum() > 0 for parameter in discriminator.parameters())


# the objective


def objective_of(encoder_folder, **settings):
    autoencoder = build("vqvae", "vector", 16, encoder_folder)
    return Objective(ObjectiveConfig(**settings), autoencoder, None), Batch({"images": images()}, torch.arange(6))


def test_adversarial_term_is_ramped_and_capped(encoder_folder):
    objective, batch = objective_of(
        encoder_folder,
        adversarial=0.5, adversarial_start_step=10, adversarial_ramp_steps=4, adaptive_cap=0.25,
        discriminator=DISCRIMINATORS["patch"](channels=8, layers=1),
    )  # fmt: skip
    assert [objective._ramp(step) for step in (0, 10, 12, 14, 99)] == [0, 0, 0.25, 0.5, 0.5]
    assert "adversarial" not in objective.autoencoder_loss(batch, 10).parts
    loss = objective.autoencoder_loss(batch, 12)
    parts = loss.parts
    assert 0 < parts["adaptive_weight"] <= 0.25
    expected = parts["mse"] + parts["quantizer"] + 0.25 * parts["adaptive_weight"] * parts["adversarial"]
    torch.testing.assert_close(loss.total, expected)
    assert not batch.extras["reconstruction"].requires_grad
    hinge = objective.discriminator_loss(batch, 12)
    hinge.total.backward()
    assert all(p.grad is None for p in objective.autoencoder.parameters())


def test_perception_needs_its_weights():
    with pytest.raises(ValueError, match=r"objective\.perceptual=1\.0 needs objective\.lpips_weights"):
        ObjectiveConfig(perceptual=1.0)
