"""The objective and its discriminators: known answers, who gets a gradient, randomness that belongs
to samples."""

from __future__ import annotations

import copy
import dataclasses
import json
import math
import types

import pytest
import torch
import torch.nn.functional as F
from tiny import MEAN, STD, save_encoder
from torch import nn

from tokenizer.autoencoder import Reconstruction, VQVAEConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.discriminators import DISCRIMINATORS
from tokenizer.discriminators.augment import NUM_DRAWS, color, cut_out, diff_augment, translate
from tokenizer.discriminators.dino import DinoConfig
from tokenizer.discriminators.patch import PatchConfig, group_norm
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FAMILIES
from tokenizer.objective import (
    GANS,
    LeCam,
    Objective,
    ObjectiveConfig,
    distillation_loss,
    feature_noise,
)
from tokenizer.quantizers.vector import VectorConfig
from training import distributed, randomness
from training.checkpoint import Run
from training.errors import UserError
from training.log import CLOCKS
from training.loop import Batch, LoopConfig, Phase, train
from training.optim import OptimizerConfig

SMALL = PatchConfig(channels=8, layers=1)


@pytest.fixture(scope="module")
def encoder_folder(tmp_path_factory):
    return save_encoder(tmp_path_factory.mktemp("encoder"), "vit")


def images(batch=6, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def batch_of(count=6, first=0, **options):
    return Batch(
        {"images": images(**options)[first : first + count]}, torch.arange(first, first + count)
    )


class Plain(nn.Module):
    """An autoencoder reduced to what the objective asks of one: 16 px, 4 x 4 codes, 5 channels."""

    def __init__(self, noise_tau=0.0):
        super().__init__()
        torch.manual_seed(0)
        self.encoder = nn.Conv2d(3, 5, 4, 4)
        self.encoder.channels, self.encoder.stride = 5, 4
        self.decoder = nn.ConvTranspose2d(5, 3, 4, 4)
        self.noise_tau, self.noise = noise_tau, None
        self.layout = types.SimpleNamespace(grids=((2, 2), (4, 4)))

    @property
    def last_layer(self):
        return self.decoder.weight

    def forward(self, images, noise=None):
        self.noise = noise
        features = self.encoder(images)
        latents = features if noise is None else features + noise
        vectors = latents + (latents.round() - latents).detach()  # straight-through
        loss = 0.25 * (latents - latents.round()).square().mean()
        codes = torch.zeros(len(images), 16, dtype=torch.int64)
        return Reconstruction(
            self.decoder(vectors), features, latents, vectors, codes, loss, {"usage": loss.detach()}
        )


def objective_of(teacher=None, autoencoder=None, **settings):
    if settings.get("adversarial"):
        settings = {"discriminator": SMALL, **settings}
    torch.manual_seed(1)
    return Objective(ObjectiveConfig(**settings), autoencoder or Plain(), teacher)


# the terms


def test_the_total_is_the_weighted_sum_of_its_parts():
    objective = objective_of(l1=0.5, l2=2.0)
    loss = objective.autoencoder_loss(batch_of(), 0)
    output = objective.autoencoder(batch_of()["images"])
    error = output.images - batch_of()["images"]
    torch.testing.assert_close(loss.parts["mse"], error.square().mean())
    torch.testing.assert_close(loss.parts["l1"], error.abs().mean())
    torch.testing.assert_close(
        loss.total, 2 * loss.parts["mse"] + 0.5 * loss.parts["l1"] + output.loss
    )
    assert loss.parts["quantizer"] == output.loss and "usage" in loss.parts


def test_distillation_from_a_teacher_is_on_the_continuous_features():
    teacher = nn.Conv2d(3, 5, 4, 4)
    objective = objective_of(teacher, distillation=3.0)
    assert not any(p.requires_grad for p in teacher.parameters()) and not teacher.training
    loss = objective.autoencoder_loss(batch_of(), 0)
    features = objective.autoencoder.encoder(batch_of()["images"])
    expected = (features - teacher(batch_of()["images"])).square().mean()
    torch.testing.assert_close(loss.parts["distillation"], expected)
    plain = loss.parts["mse"] + loss.parts["quantizer"]
    torch.testing.assert_close(loss.total, plain + 3 * expected)
    (into_encoder,) = torch.autograd.grad(
        loss.parts["distillation"], objective.autoencoder.encoder.weight
    )
    torch.testing.assert_close(
        into_encoder, torch.autograd.grad(expected, objective.autoencoder.encoder.weight)[0]
    )


def test_a_teacher_that_equals_the_encoder_costs_nothing():
    autoencoder = Plain()
    objective = objective_of(copy.deepcopy(autoencoder.encoder), autoencoder, distillation=1.0)
    assert objective.autoencoder_loss(batch_of(), 0).parts["distillation"] == 0


def test_distillation_to_codes_needs_no_teacher():
    objective = objective_of(distillation=1.0, distillation_target="codes")
    loss = objective.autoencoder_loss(batch_of(), 0)
    output = objective.autoencoder(batch_of()["images"])
    torch.testing.assert_close(
        loss.parts["distillation"], (output.vectors - output.latents).square().mean()
    )


def test_distillation_loss_known_answer_and_gradient():
    features, target = (
        torch.tensor([[1.0, 2.0]], requires_grad=True),
        torch.tensor([[1.0, 5.0]], requires_grad=True),
    )
    loss = distillation_loss(features, target)
    loss.backward()
    assert loss == 4.5 and features.grad.tolist() == [[0.0, -3.0]] and target.grad is None
    assert distillation_loss(features.bfloat16(), target.bfloat16()).dtype == torch.float32


# noise on features


def test_noise_is_added_in_training_only():
    for tau, training, noisy in ((0.0, True, False), (0.8, False, False), (0.8, True, True)):
        objective = objective_of(autoencoder=Plain(tau).train(training))
        objective.autoencoder_loss(batch_of(), 3)
        assert (objective.autoencoder.noise is not None) == noisy
    assert objective.autoencoder.noise.shape == (6, 5, 4, 4)
    once = objective.autoencoder.noise
    objective.autoencoder_loss(batch_of(), 3)
    assert torch.equal(objective.autoencoder.noise, once)
    objective.autoencoder_loss(batch_of(), 4)
    assert not torch.equal(objective.autoencoder.noise, once)


def test_noise_has_a_deviation_of_its_own_for_each_sample_and_belongs_to_its_position():
    noise = feature_noise((0, 1), torch.arange(400), (10, 10, 10), 0.8)
    deviations = noise.flatten(1).std(1)
    assert deviations.max() < 0.8 * 1.1 and noise.mean().abs() < 0.01
    quartiles = deviations.quantile(torch.tensor([0.25, 0.5, 0.75]))
    torch.testing.assert_close(quartiles, torch.tensor([0.2, 0.4, 0.6]), atol=0.06, rtol=0)
    part = feature_noise((0, 1), torch.tensor([7, 300]), (10, 10, 10), 0.8)
    assert torch.equal(part, noise[[7, 300]])


# adversarial losses


def test_gan_losses_known_answers():
    real, fake = torch.tensor([2.0, 0.0]), torch.tensor([-3.0, 1.0])
    assert GANS["hinge"].discriminator(real, fake) == 0.5 * (0.5 + 1.0)
    assert GANS["hinge"].generator(fake) == 1.0
    zero = torch.zeros(3, 1, 2, 2)
    assert GANS["hinge"].discriminator(zero, zero) == 1.0
    for loss in (
        GANS["non_saturating"].discriminator(zero, zero),
        GANS["non_saturating"].generator(zero),
    ):
        torch.testing.assert_close(loss, torch.tensor(math.log(2)))
    # -log sigmoid(D(x)), -log(1 - sigmoid(D(G))), -log sigmoid(D(G))
    log = torch.nn.functional.logsigmoid
    expected = -0.5 * (log(real).mean() + (1 - fake.sigmoid()).log().mean())
    torch.testing.assert_close(GANS["non_saturating"].discriminator(real, fake), expected)
    torch.testing.assert_close(GANS["non_saturating"].generator(fake), -log(fake).mean())


@pytest.mark.parametrize("gan", GANS)
def test_each_side_is_rewarded_for_winning(gan):
    logits = torch.zeros(4, requires_grad=True)
    GANS[gan].generator(logits).backward()
    assert (logits.grad < 0).all()  # up
    real, fake = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
    GANS[gan].discriminator(real, fake).backward()
    assert (real.grad < 0).all() and (fake.grad > 0).all()


def test_adversarial_term_is_ramped_and_capped():
    objective = objective_of(
        adversarial=0.5, adversarial_start_step=10, adversarial_ramp_steps=4, adaptive_cap=0.25
    )
    batch = batch_of()
    assert [objective._ramp(step) for step in (0, 10, 12, 14, 99)] == [0, 0, 0.25, 0.5, 0.5]
    assert "adversarial" not in objective.autoencoder_loss(batch, 10).parts
    loss = objective.autoencoder_loss(batch, 12)
    parts = loss.parts
    assert 0 < parts["adaptive_weight"] <= 0.25 and not parts["adaptive_weight"].requires_grad
    expected = (
        parts["mse"] + parts["quantizer"] + 0.25 * parts["adaptive_weight"] * parts["adversarial"]
    )
    torch.testing.assert_close(loss.total, expected)


def test_the_adaptive_weight_is_the_ratio_of_gradients_at_the_last_layer():
    objective = objective_of(adversarial=1.0, adversarial_ramp_steps=1, adaptive_cap=1e6, l2=3.0)
    parts = objective.autoencoder_loss(batch_of(), 1).parts
    last = objective.autoencoder.last_layer
    norms = [
        torch.autograd.grad(parts[n], last, retain_graph=True)[0].norm()
        for n in ("mse", "adversarial")
    ]
    torch.testing.assert_close(parts["adaptive_weight"], 3 * norms[0] / (norms[1] + 1e-4))


def test_without_the_adaptive_weight_the_term_is_weighed_as_set():
    objective = objective_of(adversarial=0.5, adversarial_ramp_steps=1, adaptive=False)
    loss = objective.autoencoder_loss(batch_of(), 1)
    assert "adaptive_weight" not in loss.parts
    expected = loss.parts["mse"] + loss.parts["quantizer"] + 0.5 * loss.parts["adversarial"]
    torch.testing.assert_close(loss.total, expected)


def test_discriminator_figures():
    objective = objective_of(adversarial=1.0, gan="non_saturating")
    batch = batch_of()
    objective.autoencoder_loss(batch, 0)
    objective.discriminator.network = nn.Flatten()
    batch.tensors["images"], batch.extras["reconstruction"] = (
        torch.full((6, 3, 16, 16), 2.0),
        torch.ones(6, 3, 16, 16),
    )
    loss = objective.discriminator_loss(batch, 0)
    assert (loss.parts["real_logit"], loss.parts["fake_logit"], loss.parts["accuracy"]) == (
        2,
        1,
        0.5,
    )
    assert loss.parts["non_saturating"] == loss.total
    batch.tensors["images"][4:] = batch.extras["reconstruction"][:5] = -1.0
    loss = objective.discriminator_loss(batch, 0)
    assert float(loss.parts["accuracy"]) == pytest.approx((4 / 6 + 5 / 6) / 2)


@pytest.fixture(params=DISCRIMINATORS)
def discriminator_config(request, encoder_folder):
    return {"patch": SMALL, "dino": DinoConfig(name=encoder_folder, layers=(0, -1))}[request.param]


def test_each_turn_moves_its_own_module(discriminator_config):
    """As the loop does it: a turn's parameters take gradients in that turn alone."""
    objective = objective_of(
        adversarial=1.0,
        adversarial_ramp_steps=1,
        augment=1.0,
        lecam=0.1,
        discriminator=discriminator_config,
    )
    batch, judges = batch_of(), list(objective.discriminator.parameters())
    for parameter in judges:
        parameter.requires_grad_(False)
    loss = objective.autoencoder_loss(batch, 1)
    (alone,) = torch.autograd.grad(
        loss.parts["adversarial"], objective.autoencoder.last_layer, retain_graph=True
    )
    assert alone.abs().sum() > 0
    loss.total.backward()
    assert all(p.grad is None for p in judges)
    assert all(p.grad.abs().sum() > 0 for p in objective.autoencoder.parameters())
    for parameter in objective.autoencoder.parameters():
        parameter.grad = None
    for parameter in judges:
        parameter.requires_grad_(True)
    assert not batch.extras["reconstruction"].requires_grad
    objective.discriminator_loss(batch, 1).total.backward()
    assert all(p.grad is None for p in objective.autoencoder.parameters())
    assert all(p.grad is not None for p in judges)


def test_perception_needs_its_weights():
    with pytest.raises(
        ValueError, match=r"objective\.perceptual=1\.0 needs objective\.lpips_weights"
    ):
        ObjectiveConfig(perceptual=1.0)


def test_perception_that_cannot_work_is_one_line(tmp_path):
    import torchvision

    trunk = tmp_path / "trunk.pth"
    torch.save(torchvision.models.squeezenet1_1(weights=None).state_dict(), trunk)
    config = dict(perceptual=1.0, lpips_net="squeeze", lpips_weights=str(trunk))
    Objective(ObjectiveConfig(**config), tiny_autoencoder(32), None)
    with pytest.raises(
        UserError, match=r"^objective\.perceptual: LPIPS-squeeze leaves nothing of images of 8 px"
    ):
        Objective(ObjectiveConfig(**config), tiny_autoencoder(8), None)
    torch.save(torch.zeros(3), trunk)
    with pytest.raises(
        UserError,
        match=r"trunk\.pth: holds a Tensor, not a state dict of tensors: give squeezenet1_1",
    ):
        Objective(ObjectiveConfig(**config), tiny_autoencoder(32), None)


def test_nothing_but_a_squared_error_is_the_default():
    assert dataclasses.asdict(ObjectiveConfig()) == {
        "l1": 0.0,
        "l2": 1.0,
        "perceptual": 0.0,
        "lpips_net": "vgg",
        "lpips_weights": None,
        "distillation": 0.0,
        "distillation_target": "teacher",
        "adversarial": 0.0,
        "gan": "hinge",
        "adversarial_start_step": 0,
        "adversarial_ramp_steps": 500,
        "adaptive": True,
        "adaptive_cap": 1.0,
        "augment": 0.0,
        "lecam": 0.0,
        "lecam_start_step": 0,
        "discriminator_start_step": 0,
        "discriminator": {"kind": "patch", "channels": 64, "layers": 3},
    }


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"l1": -1.0}, r"objective\.l1=-1\.0 must not be negative"),
        ({"adversarial": math.nan}, r"objective\.adversarial=nan"),
        (
            {"gan": "wasserstein"},
            r"objective\.gan='wasserstein' is not one of hinge, non_saturating",
        ),
        (
            {"distillation_target": "student"},
            r"objective\.distillation_target='student' is not one of teacher, codes",
        ),
        ({"augment": 1.5}, r"objective\.augment=1\.5 is a probability"),
        (
            {"adversarial": 0.1, "adversarial_start_step": 5, "discriminator_start_step": 6},
            r"objective\.discriminator_start_step=6 .* objective\.adversarial_start_step=5: .* no later",
        ),
    ],
)
def test_refused_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        ObjectiveConfig(**settings)


# LeCAM


def test_lecam_by_hand():
    lecam = LeCam(decay=0.5)
    real, fake = torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 0.0])
    assert lecam(real, fake) == 0  # no anchors yet
    lecam.update(taken=True)
    assert lecam.anchors.tolist() == [2.0, -0.5]
    # ((3 + .5)^2 + (1 + .5)^2) / 2 + ((2 + 1)^2 + (2 - 0)^2) / 2
    assert lecam(real, fake) == (12.25 + 2.25) / 2 + (9 + 4) / 2
    assert lecam(torch.tensor([-2.0]), torch.tensor([4.0])) == 0  # beyond the other side's anchor
    lecam.sums.zero_()
    lecam(torch.tensor([4.0]), torch.tensor([0.5]))
    lecam(torch.tensor([8.0]), torch.tensor([0.5]))  # another micro-batch
    lecam.update(taken=True)
    assert lecam.anchors.tolist() == [0.5 * 2 + 0.5 * 6, 0.0]


def test_lecam_averages_before_it_forgets():
    lecam = LeCam()
    assert lecam.decay == 0.999
    for value in (1.0, 2.0, 6.0):
        lecam(torch.tensor([value]), torch.tensor([-value]))
        lecam.update(taken=True)
    torch.testing.assert_close(lecam.anchors, torch.tensor([3.0, -3.0]))


def test_lecam_draws_the_sides_together_and_a_skipped_step_leaves_no_trace():
    lecam = LeCam()
    real, fake = (
        torch.full((4,), 2.0, requires_grad=True),
        torch.full((4,), -2.0, requires_grad=True),
    )
    lecam(real, fake)
    lecam.update(taken=True)
    lecam(real, fake).backward()
    assert (real.grad > 0).all() and (fake.grad < 0).all()
    before = {name: value.clone() for name, value in lecam.named_buffers()}
    lecam(real * math.nan, fake)
    lecam.update(taken=False)
    assert all(
        torch.equal(before[name], value) for name, value in lecam.named_buffers() if name != "sums"
    )
    assert not lecam.sums.any() and set(lecam.state_dict()) == {"anchors", "num_updates"}


def test_lecam_starts_at_its_step():
    objective = objective_of(adversarial=1.0, lecam=0.5, lecam_start_step=2)
    for step in range(4):
        batch = batch_of()
        objective.autoencoder_loss(batch, step)
        loss = objective.discriminator_loss(batch, step)
        expected = loss.parts["hinge"] + (0.5 * loss.parts["lecam"] if step >= 2 else 0)
        torch.testing.assert_close(loss.total, expected)
        objective.discriminator.update(step, taken=True)
    assert loss.parts["lecam"] > 0 and objective.discriminator.lecam.num_updates == 4


# DiffAugment

HALF = torch.full((6, NUM_DRAWS), 0.5)


def uniform_of(batch=6, seed=3):
    return randomness.draw((seed,), torch.arange(batch), (NUM_DRAWS,))


@pytest.mark.parametrize("shape", [(16, 16), (17, 9), (1, 1)])
def test_augmentation_keeps_shapes_and_passes_gradients(shape):
    given = torch.randn(6, 3, *shape, requires_grad=True)
    augmented = diff_augment(given, uniform_of(), 1.0)
    assert augmented.shape == given.shape
    augmented.square().sum().backward()
    assert torch.isfinite(given.grad).all() and (shape == (1, 1) or given.grad.abs().sum() > 0)


def test_augmentation_of_probability_zero_is_the_identity_and_of_one_spares_none():
    given, uniform = images(64), uniform_of(64)
    assert torch.equal(diff_augment(given, uniform, 0.0), given)
    changed = (diff_augment(given, uniform, 1.0) != given).flatten(1).any(1)
    assert changed.all()
    changed = (diff_augment(given, uniform, 0.2) != given).flatten(1).any(1).float().mean()
    assert 0.3 < changed < 0.7  # 1 - 0.8^3 = 0.49


def test_colour_known_answers():
    given = images()
    torch.testing.assert_close(color(given, HALF[:, :3]), given)
    brighter = color(given, torch.tensor([1.0, 0.5, 0.5]).expand(6, 3))
    torch.testing.assert_close(brighter, given + 0.5)
    grey = color(given, torch.tensor([0.5, 0.0, 0.5]).expand(6, 3))
    torch.testing.assert_close(grey, given.mean(1, keepdim=True).expand_as(given))
    flat = color(given, torch.tensor([0.5, 0.5, 0.0]).expand(6, 3))
    torch.testing.assert_close(flat.var((1, 2, 3)), 0.25 * given.var((1, 2, 3)))
    torch.testing.assert_close(flat.mean((1, 2, 3)), given.mean((1, 2, 3)))


def test_translation_known_answers():
    given = images()
    assert torch.equal(translate(given, HALF[:, :2]), given)
    moved = translate(
        given, torch.tensor([0.0, 0.999]).expand(6, 2)
    )  # two up, two to the right: 16 / 8
    assert torch.equal(moved[:, :, :14, 2:], given[:, :, 2:, :14])
    assert not moved[:, :, 14:].any() and not moved[..., :2].any()
    draws = torch.stack([torch.arange(50) / 50, torch.full((50,), 0.5)], 1)
    shifts = (
        translate(torch.arange(16.0).view(1, 1, 16, 1).expand(50, 3, 16, 16) + 1, draws)[:, 0, 8, 8]
        - 9
    )
    assert (
        shifts.unique().tolist() == [-2, -1, 0, 1, 2] and (shifts == 0).sum() == 10
    )  # equally often


def test_cutout_known_answers():
    ones = torch.ones(6, 3, 16, 16)
    hole = cut_out(ones, HALF[:, :2])
    assert not hole[:, :, 4:12, 4:12].any() and hole.sum() == 6 * 3 * (256 - 64)
    corner = cut_out(ones, torch.zeros(6, 2))
    assert not corner[:, :, :4, :4].any() and corner.sum() == 6 * 3 * (256 - 16)
    assert cut_out(torch.ones(6, 3, 9, 4), HALF[:, :2]).sum() == 6 * 3 * (36 - 5 * 2)


def test_augmentation_belongs_to_samples_of_the_global_batch():
    """The judge of a step sees the same pictures however the batch is split, and others in every
    pass and step."""
    objective = objective_of(adversarial=1.0, augment=1.0)
    objective.discriminator.network = nn.Identity()
    whole = objective._judge(batch_of()["images"], batch_of(), 5, 1)
    halves = [
        objective._judge(half["images"], half, 5, 1) for half in (batch_of(3), batch_of(3, 3))
    ]
    assert torch.equal(torch.cat(halves), whole)
    assert torch.equal(objective._judge(batch_of()["images"], batch_of(), 5, 1), whole)
    for step, stream in ((6, 1), (5, 2)):
        assert not torch.equal(
            objective._judge(batch_of()["images"], batch_of(), step, stream), whole
        )
    objective.seed = 1
    assert not torch.equal(objective._judge(batch_of()["images"], batch_of(), 5, 1), whole)


# discriminators


def test_discriminators_judge_patches_one_image_at_a_time(discriminator_config):
    discriminator = discriminator_config.build(16).eval()
    logits = discriminator(images())
    assert logits.shape[0] == 6 and logits.ndim == 4 and logits.isfinite().all()
    torch.testing.assert_close(discriminator(images()[:1]), logits[:1])
    discriminator.train()(images()).square().sum().backward()
    assert all(p.grad.abs().sum() > 0 for p in discriminator.parameters())


def test_discriminators_bear_low_precision(discriminator_config):
    objective = objective_of(
        adversarial=1.0, lecam=0.1, augment=0.5, discriminator=discriminator_config
    )
    batch = batch_of()
    with torch.autocast("cpu", torch.bfloat16):
        total = objective.autoencoder_loss(batch, 600).total
        judged = objective.discriminator_loss(batch, 600)
    assert total.isfinite() and judged.total.isfinite() and judged.total.dtype == torch.float32
    (total + judged.total).backward()
    assert all(p.grad.isfinite().all() for p in objective.discriminator.parameters())


@pytest.mark.parametrize("channels", [1, 2, 3, 5, 6, 9, 64])
@pytest.mark.parametrize("layers", [1, 2, 3])
def test_patch_discriminators_of_any_width(channels, layers):
    discriminator = PatchConfig(channels=channels, layers=layers).build(32)
    assert discriminator(images(2, 32)).shape[:2] == (2, 1)


def test_group_norms_divide():
    for channels in range(1, 200):
        norm = group_norm(channels)
        assert channels % norm.num_groups == 0 and (
            norm.num_groups == 1 or channels // norm.num_groups >= 4
        )
    assert group_norm(384).num_groups == 32


@pytest.mark.parametrize("size", range(4, 40))
def test_patch_layers_fit_what_is_left_of_the_image(size):
    for layers in (1, 2, 3, 4, 5):
        config = PatchConfig(channels=4, layers=layers)
        try:
            discriminator = config.build(size)
        except UserError as error:
            most = int(str(error).rpartition(" ")[2])
            assert (
                most < layers
                and PatchConfig(channels=4, layers=most).build(size)(images(1, size)).numel() > 0
            )
        else:
            assert discriminator(images(1, size)).numel() > 0


def test_refused_patch_settings():
    with pytest.raises(
        ValueError, match=r"objective\.discriminator\.channels=0 must be at least 1"
    ):
        PatchConfig(channels=0)
    with pytest.raises(
        UserError,
        match=r"objective\.discriminator\.layers=3 leaves nothing of images of 8 px: take 2",
    ):
        PatchConfig().build(8)
    with pytest.raises(UserError, match=r"images of 2 px: it needs images of at least 4 px"):
        PatchConfig().build(2)


def raes_logits(images, discriminator, depths):
    """RAE's DinoDisc, equation by equation, on these weights: (B, 5 * N) of a trunk `vit` of 16
    px."""
    model = discriminator.trunk.model
    x = F.interpolate(images, size=(16, 16), mode="bilinear", align_corners=False)
    x = model.embeddings(
        (x * 0.5 + 0.5 - torch.tensor(MEAN).view(3, 1, 1)) / torch.tensor(STD).view(3, 1, 1)
    )
    activations = []
    for index, layer in enumerate(
        model.layers if hasattr(model, "layers") else model.encoder.layer
    ):
        x = layer(x)
        x = x[0] if isinstance(x, tuple) else x
        if index in depths:
            activations.append(x[:, 1:].transpose(1, 2))
    activations.append(
        x[:, 1:].transpose(1, 2)
    )  # theirs is the first; the class token is in none, nor the last norm

    def convolve(x, convolution):
        width = convolution.weight.shape[2] // 2
        return F.conv1d(
            F.pad(x, (width, width), mode="circular"), convolution.weight, convolution.bias
        )

    def block(x, parts):
        x = convolve(x, parts[0])
        x = (x - x.mean(2, keepdim=True)) / (x.var(2, keepdim=True, unbiased=False) + 1e-6).sqrt()
        x = x * parts[1].weight[:, None] + parts[1].bias[:, None]
        return torch.where(x > 0, x, 0.2 * x)

    logits = []
    for head, x in zip(discriminator.heads, activations, strict=True):
        x = block(x, head.enter)
        logits.append(convolve((block(x, head.mix) + x) / math.sqrt(2), head.leave).flatten(1))
    return torch.cat(logits, 1)


@pytest.mark.parametrize("size", [16, 20, 32])
def test_the_dino_discriminator_is_raes(size, tmp_path):
    discriminator = DinoConfig(name=save_encoder(tmp_path, "vit"), layers=(0, 1)).build(size)
    with torch.no_grad():
        for parameter in discriminator.parameters():
            parameter += 0.3 * torch.randn_like(parameter)
    given, same = images(3, size).requires_grad_(), images(3, size).requires_grad_()
    ours, theirs = discriminator(given), raes_logits(same, discriminator, {0, 1})
    torch.testing.assert_close(ours.flatten(1), theirs, atol=1e-5, rtol=1e-4)
    ours.square().sum().backward()
    theirs.square().sum().backward()
    torch.testing.assert_close(given.grad, same.grad, atol=1e-4, rtol=1e-3)


@pytest.mark.parametrize("family", FAMILIES)
def test_a_trunk_of_any_family(family, tmp_path):
    sized = family != "siglip2_vision_model"
    config = DinoConfig(name=save_encoder(tmp_path, family), layers=(0, 1), resize=sized)
    if not sized:
        with pytest.raises(
            UserError, match=r"no size of its own: set objective\.discriminator\.resize=false"
        ):
            dataclasses.replace(config, resize=True).build(16)
    discriminator = config.build(16)
    given = images().requires_grad_()
    assert discriminator(given).shape == (6, 3, 4, 4)
    discriminator(given).sum().backward()
    assert given.grad.abs().sum() > 0


def test_the_trunk_is_frozen_and_no_part_of_the_state(encoder_folder):
    discriminator = DinoConfig(name=encoder_folder, layers=(0,)).build(16)
    trunk = discriminator.trunk
    names = [*discriminator.state_dict(), *(n for n, _ in discriminator.named_parameters())]
    assert all(name.startswith("heads.") for name in names)
    discriminator.train().requires_grad_(True)
    assert not any(module.training for module in trunk.modules())
    before = trunk.fingerprint()
    discriminator(images()).square().sum().backward()
    torch.optim.SGD(discriminator.parameters(), lr=1.0).step()
    assert trunk.fingerprint() == before
    assert all(p.grad is None and not p.requires_grad for p in trunk.parameters())


def test_the_trunk_follows_to_other_places_and_copies(encoder_folder):
    discriminator = DinoConfig(name=encoder_folder, layers=(0,)).build(16).eval()
    expected = discriminator(images())
    double = copy.deepcopy(discriminator).double()(images().double())
    torch.testing.assert_close(double, expected.double(), atol=1e-5, rtol=1e-4)
    assert discriminator.to("meta").trunk.mean.device.type == "meta"


def test_heads_load_from_their_state(encoder_folder):
    config = DinoConfig(name=encoder_folder, layers=(0, 1))
    first, second = config.build(16), config.build(16)
    first.update()  # spectral norms move their estimates
    second.load_state_dict(first.state_dict())
    assert torch.equal(first.eval()(images()), second.eval()(images()))


def test_spectral_norms_bound_the_heads(encoder_folder):
    discriminator = DinoConfig(name=encoder_folder, layers=(0,)).build(16)
    for _ in range(30):
        discriminator.update()
    for module in discriminator.modules():
        if isinstance(module, nn.Conv1d):
            norm = torch.linalg.matrix_norm(module.weight.flatten(1), 2)
            torch.testing.assert_close(norm, torch.ones(()), atol=0.05, rtol=0)


def test_images_are_resized_to_the_trunk_unless_asked_not_to(encoder_folder):
    resized = DinoConfig(name=encoder_folder, layers=(0, 1))
    plain = dataclasses.replace(resized, resize=False)
    assert plain.build(32)(images(2, 32)).shape == (2, 3, 8, 8)
    assert resized.build(32)(images(2, 32)).shape == (2, 3, 4, 4)
    assert resized.build(30)(images(2, 30)).shape == (2, 3, 4, 4)


def test_refused_trunks(encoder_folder):
    with pytest.raises(ValueError, match=r"objective\.discriminator\.kernel=8 must be odd"):
        DinoConfig(kernel=8)
    with pytest.raises(ValueError, match=r"objective\.discriminator\.layers=\[\]"):
        DinoConfig(layers=())
    with pytest.raises(
        UserError, match=r"layers=\[2, 5, 8, 11\] are not all .* trunk that has 2: take \[0, 1\]"
    ):
        DinoConfig(name=encoder_folder).build(16)
    with pytest.raises(UserError, match=r"layers=\[1, -1\] are not all different"):
        DinoConfig(name=encoder_folder, layers=(1, -1)).build(16)
    with pytest.raises(
        UserError, match=r"images of 30 px .* patches of 4 px: set objective\.discriminator\.resize"
    ):
        DinoConfig(name=encoder_folder, layers=(0,), resize=False).build(30)
    with pytest.raises(UserError, match=r"kernel=13 is too wide for 4 patches"):
        DinoConfig(name=encoder_folder, layers=(0,), resize=False, kernel=13).build(8)
    with pytest.raises(
        UserError,
        match=r"images of 4 px are one patch .* set objective\.discriminator\.resize=true",
    ):
        DinoConfig(name=encoder_folder, layers=(0,), resize=False).build(4)
    with pytest.raises(
        UserError, match=r"^objective\.discriminator\.name=\./nowhere: there is no such folder"
    ):
        DinoConfig(name="./nowhere").build(16)


# in the loop


def tiny_autoencoder(image_size=16):
    torch.manual_seed(0)
    sizes = {"channels": 8, "residual_blocks": 1, "residual_channels": 4}
    return VQVAEConfig(
        encoder=ConvEncoderConfig(**sizes),
        quantizer=VectorConfig(num_codes=20, code_dim=8),
        decoder=ConvDecoderConfig(**sizes),
    ).build(image_size)


def run_steps(folder, steps, discriminator, accumulate=2):
    """Train to `steps` as tokenizer/train.py does, resuming, on this rank's share; the newest
    checkpoint's state."""
    autoencoder = tiny_autoencoder()
    config = ObjectiveConfig(
        adversarial=0.5,
        adversarial_start_step=1,
        adversarial_ramp_steps=1,
        augment=0.7,
        lecam=0.1,
        gan="non_saturating",
        discriminator=discriminator,
    )
    torch.manual_seed(1)
    objective = Objective(config, autoencoder, None, seed=3)
    optimizer = OptimizerConfig(lr=1e-3, warmup_steps=1, schedule="constant")
    turns = [
        Phase(
            "autoencoder",
            autoencoder,
            objective.autoencoder_loss,
            optimizer,
            after_step=autoencoder.update,
        ),
        Phase(
            "discriminator",
            objective.discriminator,
            objective.discriminator_loss,
            optimizer,
            after_step=objective.discriminator.update,
        ),
    ]
    share = 6 // (accumulate * distributed.world())

    def batches(step):
        for at in range(step, 100):
            first = 6 * distributed.rank() // distributed.world()
            yield [batch_of(share, first + share * part, seed=at) for part in range(accumulate)]

    loop = LoopConfig(steps=steps, batch_size=6, accumulate=accumulate, log_every=1, save_every=2)
    run = Run.open(folder, config)
    train(loop, run, turns, batches, seed=3, published=autoencoder)
    return run.latest()


def test_training_resumes_to_the_last_bit(tmp_path, discriminator_config):
    straight = run_steps(tmp_path / "straight", 4, discriminator_config)["modules"]
    run_steps(tmp_path / "resumed", 2, discriminator_config)
    resumed = run_steps(tmp_path / "resumed", 4, discriminator_config)["modules"]
    assert straight["discriminator"]["lecam.num_updates"] == 4
    assert not any("trunk" in name for name in straight["discriminator"])
    for turn, state in straight.items():
        assert state.keys() == resumed[turn].keys()
        assert [
            name for name, value in state.items() if not torch.equal(value, resumed[turn][name])
        ] == []


def test_micro_batches_add_up_to_the_step(tmp_path, discriminator_config):
    whole, parts = (
        run_steps(tmp_path / str(count), 3, discriminator_config, accumulate=count)["modules"]
        for count in (1, 3)
    )
    for turn, state in whole.items():
        for name, value in state.items():
            torch.testing.assert_close(
                parts[turn][name], value, atol=1e-5, rtol=1e-4, msg=f"{turn} {name}"
            )


def run_rank(folder, rank):
    """One of two ranks, in a child process."""
    torch.distributed.init_process_group("gloo", f"file://{folder}/group", rank=rank, world_size=2)
    run_steps(folder / "two", 4, SMALL, accumulate=1)
    distributed.finish()


def test_two_ranks_train_as_one_does(tmp_path):
    children = [
        torch.multiprocessing.get_context("fork").Process(target=run_rank, args=(tmp_path, r))
        for r in (0, 1)
    ]
    for child in children:
        child.start()
    one = run_steps(tmp_path / "one", 4, SMALL, accumulate=1)
    for child in children:
        child.join(120)
    assert [child.exitcode for child in children] == [0, 0]
    two = Run(tmp_path / "two", None).latest()
    for turn, state in one["modules"].items():
        for name, value in state.items():
            torch.testing.assert_close(
                two["modules"][turn][name], value, atol=2e-4, rtol=1e-3, msg=name
            )
    figures = [
        json.loads(line)
        for name in ("one", "two")
        for line in (tmp_path / name / "log.jsonl").open()
    ]
    for alone, shared in zip(figures[:4], figures[4:], strict=True):
        for name in alone.keys() - set(CLOCKS):
            assert shared[name] == pytest.approx(alone[name], rel=2e-3, abs=1e-4), name
