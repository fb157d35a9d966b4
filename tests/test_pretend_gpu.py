"""What users do on a GPU runs on a pretended one (tests/pretend.py), with what the CPU gives."""

from __future__ import annotations

import dataclasses

import numpy as np
import processes
import pytest
import torch
from pretend import DeviceMismatch, pretended_gpu
from pretended_ranks import ADVERSARY_AT_ONCE, gan
from test_cache import save_images
from test_reliability_kill import NETWORKS
from test_torch_compile import OPTIMIZER, assert_same, images, tokenizer_turns, trained
from tiny import MODELS, QUANTIZER_SIZES, command, save_encoder
from torch._subclasses.fake_tensor import FakeTensorMode
from toy import leaves
from toy_pipeline import tiny_extractor

from eval.extractors.in_domain import train_extractor
from generate.images import _load_models
from priors import PRIORS
from priors.backbone import BackboneConfig
from priors.families.absorbing import SAMPLERS as ABSORBING
from priors.families.masked import SAMPLERS as MASKED
from priors.interface import SampleOptions
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.cache import TokenCache
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.discriminators.dino import DinoConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.interface import CodeLayout
from tokenizer.quantizers import QUANTIZERS
from training import distributed, philox, randomness
from training.checkpoint import Run
from training.loop import Batch, Phase

SIZES = {"channels": 8, "residual_blocks": 1, "residual_channels": 4}
RESNET = {"channels": 8, "multipliers": (1, 2), "blocks": 1}
LAYOUT = CodeLayout(((1, 2), (2, 4)), (5, 9))
BACKBONE = BackboneConfig(dim=16, depth=1, heads=2, dropout=0.1)
AUTOENCODERS = ("vqvae", "vqvae2", "vqrae", "resnet")
FAMILIES = [
    family for family in MODELS if family not in ("siglip", "siglip2", "internvl")
]  # those are composite


def test_a_planted_fault_is_found():
    with pretended_gpu() as waits:
        here = torch.ones(3, device=distributed.device())
        with pytest.raises(DeviceMismatch):
            here + torch.ones(3)
        with pytest.raises(TypeError):
            here.numpy()
        with pytest.raises(DeviceMismatch):
            torch.rand(3, device=here.device, generator=torch.Generator())
        assert not waits and bool(here[0] > 0) and sum(waits.values()) == 1
        values = (here.requires_grad_() * 2).sum()
        values.backward()
        assert here.grad.cpu().tolist() == [2, 2, 2] and here.grad.device.type == "gpu"
    with (
        FakeTensorMode(),
        torch.device("cuda"),
    ):  # of torch, which would go to a driver if a GPU stayed here
        assert torch.tensor(1.0).device.type == "cuda"


def test_random_numbers_are_those_of_the_cpu():
    ids, first = torch.tensor([5, -3, 2**62]), torch.tensor([3, 0, 2**40 + 1])
    expected = [
        make(3, ids, 2, 67, first) for make in (philox.words, philox.uniform, philox.short_uniform)
    ]
    drawn = randomness.draw((1, 2), torch.arange(5), (3,))
    noise = randomness.normal((1, 2), torch.arange(5), (3,))
    with pretended_gpu() as waits:
        there = (
            ids.to(distributed.device(), non_blocking=True),
            first.to(distributed.device(), non_blocking=True),
        )
        makes = (philox.words, philox.uniform, philox.short_uniform)
        made = [make(3, there[0], 2, 67, there[1]) for make in makes]
        positions = torch.arange(5, device=distributed.device())
        made += [
            randomness.draw((1, 2), positions, (3,)),
            randomness.normal((1, 2), positions, (3,)),
        ]
        assert not waits, waits
        assert all(part.device.type == "gpu" for part in made)
        made = [part.cpu() for part in made]
    for ours, theirs in zip(made, [*expected, drawn, noise], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


@pytest.fixture(scope="module")
def encoders(tmp_path_factory):
    """Folders of tiny foundation encoders, by family."""
    root = tmp_path_factory.mktemp("encoders")
    for family in FAMILIES:
        (root / family).mkdir()
        save_encoder(root / family, family)
    return root


def autoencoder_of(kind, quantizer, encoders):
    made = QUANTIZERS[quantizer](**QUANTIZER_SIZES[quantizer])
    if kind == "vqvae2":
        return VQVAE2Config(
            encoder=ConvEncoderConfig(**SIZES),
            top=made,
            bottom=made,
            decoder=ConvDecoderConfig(**SIZES),
            channels=8,
            residual_blocks=1,
        )
    if kind == "vqrae":
        return VQRAEConfig(
            encoder=FoundationConfig(name=str(encoders / "dinov2"), frozen=False),
            quantizer=made,
            decoder=ViTDecoderConfig(dim=16, depth=1, heads=2, mlp=16),
            denormalise=True,
            noise_tau=0.5,
        )
    if kind == "resnet":
        encoder = ResNetEncoderConfig(**RESNET, out_channels=8)
        return VQVAEConfig(encoder=encoder, quantizer=made, decoder=ResNetDecoderConfig(**RESNET))
    return VQVAEConfig(
        encoder=ConvEncoderConfig(**SIZES), quantizer=made, decoder=ConvDecoderConfig(**SIZES)
    )


def tokenizer_of(kind):
    """By its quantizer's kind, or vqvae2."""
    return (
        autoencoder_of("vqvae2", "vector", None)
        if kind == "vqvae2"
        else autoencoder_of("vqvae", kind, None)
    )


def tokenized(folder, model, steps=1, **objective):
    """Calibrated, trained, averaged, saved: that state, and what it encodes and decodes."""
    module, turns = tokenizer_turns(model, **objective)
    module.to(distributed.device())
    if module.starts_from_data:
        module.calibrate([batch.tensors["images"] for batch in images(9, 1)], 0)
    state = trained(folder, module, turns, images, compile_=False, steps=steps)
    module.eval()
    with torch.no_grad():
        codes = module.encode(images(5, 1)[0]["images"].to(distributed.device()))
        pictures = module.decode(codes)
    made = state | {"codes": codes, "pictures": pictures}
    assert all(value.device.type == distributed.device().type for value in made.values())
    return {name: value.cpu() for name, value in made.items()}


CHEAP = [("vqvae2", "vector"), *(("vqvae", quantizer) for quantizer in QUANTIZERS)]
DEAR = [
    (kind, quantizer)
    for kind in AUTOENCODERS
    for quantizer in QUANTIZERS
    if (kind, quantizer) not in CHEAP
]


@pytest.mark.parametrize(
    ("kind", "quantizer"), [*CHEAP, *(pytest.param(*pair, marks=pytest.mark.slow) for pair in DEAR)]
)
def test_every_tokenizer(kind, quantizer, tmp_path, encoders):
    model = autoencoder_of(kind, quantizer, encoders)
    with pretended_gpu():
        there = tokenized(tmp_path / "gpu", model)
    here = tokenized(tmp_path / "cpu", model)
    assert torch.equal(there["codes"], here["codes"])
    # Of a gradient that is rounding alone, as before a norm or of the bias of keys, AdamW makes a
    # step of full length.
    assert_same(there, here, 2.1 * OPTIMIZER.lr if kind in ("resnet", "vqrae") else 1e-4)


def test_stage_two_with_a_projected_discriminator(tmp_path, encoders):
    """A teacher, noise, LeCAM, DiffAugment, the adaptive weight, and a trunk that is no part of any
    state."""
    model = autoencoder_of("vqrae", "simvq", encoders)
    judge = DinoConfig(name=str(encoders / "vit"), layers=(0, 1), kernel=3)
    objective = {**ADVERSARY_AT_ONCE, "discriminator": judge, "augment": 1.0, "distillation": 0.1}
    with pretended_gpu():
        there = tokenized(tmp_path / "gpu", model, 2, **objective)
    here = tokenized(tmp_path / "cpu", model, 2, **objective)
    of_keys = [
        name for name in here if name.endswith("key.bias")
    ]  # whose gradient is rounding alone, as above
    for name in of_keys:
        torch.testing.assert_close(
            there.pop(name), here.pop(name), rtol=0, atol=2 * 2.1 * OPTIMIZER.lr
        )
    assert_same(there, here, 1e-4)


@pytest.mark.parametrize("family", FAMILIES)
def test_every_foundation_encoder(family, encoders):
    def run():
        encoder = (
            FoundationConfig(name=str(encoders / family), frozen=False)
            .build(16)
            .to(distributed.device())
        )
        pictures = images(3, 1)[0]["images"].to(distributed.device())
        features = encoder(pictures)
        features.square().mean().backward()
        found = {"features": features} | {
            n: p.grad for n, p in encoder.named_parameters() if p.grad is not None
        }
        return {name: value.detach().cpu() for name, value in found.items()}

    with pretended_gpu():
        there = run()
    assert_same(there, run(), 1e-5)


def prior_of(kind):
    if kind == "pixelcnn":
        return PRIORS[kind](channels=8, depth=1)
    if kind in ("llama", "mingpt", "rar"):
        return PRIORS[kind](dim=32, depth=2, heads=2)
    if kind == "hierarchical":
        return PRIORS[kind](top=prior_of("autoregressive"), bottom=prior_of("masked"))
    if kind == "posterior":
        return PRIORS["uniform"](parameterisation="posterior", backbone=BACKBONE, steps=2)
    if kind in PUBLISHED:
        own = dataclasses.replace(PRIORS[kind]().backbone, dim=16, depth=2, heads=2, feedforward=16)
        return PRIORS[kind](backbone=own, steps=2)
    return PRIORS[kind](backbone=BACKBONE, **({} if kind == "autoregressive" else {"steps": 2}))


PUBLISHED = ("halton_maskgit", "titok", "maskbit")  # with networks of their own
SAMPLERS = {
    "autoregressive": ("raster",),
    "masked": tuple(MASKED),
    "absorbing": tuple(ABSORBING),
    "uniform": ("plug_in",),
    "posterior": ("mixture",),
    "pixelcnn": ("",),
    "llama": ("",),
    "mingpt": ("",),
    "rar": ("",),
    "hierarchical": ("",),
    "halton_maskgit": ("",),
    "titok": ("",),
    "maskbit": ("",),
}


def sequences(step, accumulate):
    drawn = torch.randint(5, (4, LAYOUT.length), generator=torch.Generator().manual_seed(step))
    return [Batch({"codes": drawn, "labels": torch.arange(4) % 3}, torch.arange(4))]


def prior_turns(config):
    torch.manual_seed(0)
    layout = CodeLayout(LAYOUT.grids, (16, 16)) if config.kind == "maskbit" else LAYOUT
    prior = config.build(layout, 3)

    def loss(batch, step):
        shape = (LAYOUT.length + 2,)
        uniform = randomness.draw((7, step), batch.positions, shape, torch.float64)
        return prior.loss(batch["codes"], batch["labels"], uniform)

    return prior, [
        Phase("prior", prior, loss, OPTIMIZER, after_step=getattr(prior, "update", None))
    ]


def learned(folder, kind):
    prior, turns = prior_turns(prior_of(kind))
    made = trained(folder, prior, turns, sequences, compile_=False, steps=1)
    prior.eval()
    device = distributed.device()
    batch = sequences(7, 1)[0].to(device)
    with torch.no_grad():
        made["nats"] = prior.nll(batch["codes"], batch["labels"]).nats
        for sampler in SAMPLERS[kind]:
            options = SampleOptions(seed=3, sampler=sampler, guidance=2.0, top_k=4)
            ids = torch.arange(2, device=device)
            made[f"samples {sampler}"] = prior.sample(batch["labels"][:2], options, ids)
    assert all(value.device.type == device.type for value in made.values())
    return {name: value.cpu() for name, value in made.items()}


def test_no_prior_is_left_out():
    assert SAMPLERS.keys() >= PRIORS.keys()


@pytest.mark.parametrize(
    "kind",
    [
        pytest.param(kind, marks=[pytest.mark.slow] * (kind in ("posterior", "hierarchical")))
        for kind in SAMPLERS
    ],
)
def test_every_prior(kind, tmp_path):
    """Training, likelihood, and samples by each of its samplers, which are the CPU's."""
    with pretended_gpu():
        there = learned(tmp_path / "gpu", kind)
    here = learned(tmp_path / "cpu", kind)
    assert_same(there, here, 1e-4)
    for name in here:
        if name.startswith("samples"):
            assert torch.equal(there[name], here[name]), name


class Killed(Exception):
    pass


@pytest.mark.parametrize("kind", ["tokenizer", pytest.param("prior", marks=pytest.mark.slow)])
def test_a_run_that_was_ended_goes_on_to_the_same_bits(kind, tmp_path):
    """Networks, optimizers, averages, codebook statistics and LeCAM's averages; after a
    checkpoint."""

    def run(folder, batches):
        if kind == "tokenizer":
            module, turns = tokenizer_turns(
                autoencoder_of("vqvae", "vector", None), **ADVERSARY_AT_ONCE
            )
            batch_of = images
        else:
            (module, turns), batch_of = prior_turns(prior_of("masked")), sequences
        trained(folder, module, turns, batches(batch_of), compile_=False, steps=2, save_every=1)
        return leaves(Run(folder, None).latest())

    def ends(batch_of):
        def batches(step, accumulate):
            if step == 1:
                raise Killed
            return batch_of(step, accumulate)

        return batches

    with pretended_gpu():
        straight = run(tmp_path / "straight", lambda batch_of: batch_of)
        with pytest.raises(Killed):
            run(tmp_path / "ended", ends)
        assert Run(tmp_path / "ended", None).latest()["step"] == 1
        ended = run(tmp_path / "ended", lambda batch_of: batch_of)
    assert ended.keys() == straight.keys()
    for name, value in straight.items():
        assert (
            torch.equal(ended[name], value)
            if isinstance(value, torch.Tensor)
            else ended[name] == value
        ), name


def test_a_pipeline_from_images_to_the_report(tmp_path):
    """By the commands. From the same weights the CPU gives the same tokens and samples."""
    save_images(tmp_path / "images")
    root = tmp_path / "run"
    root.mkdir()
    (root / "tokenizer.yaml").write_text(
        f"root: {root}\n{NETWORKS.rstrip()[:-1]}, source: {tmp_path / 'images'}}}\n"
    )
    (root / "tokens.yaml").write_text(f"root: {root}\n")
    (root / "prior.yaml").write_text(f"root: {root}\n")
    data = DataConfig(source=str(tmp_path / "images"), image_size=8, augment="shift")
    extractor = tiny_extractor()
    loop = dataclasses.replace(extractor.loop, steps=2, batch_size=8)
    few = ["loop.steps=1", "loop.batch_size=4", "loop.preview_every=1"]
    prior = [
        "prior.kind=masked",
        "prior.steps=2",
        "prior.backbone.dim=16",
        "prior.backbone.depth=1",
        "prior.backbone.heads=2",
        *few,
    ]
    train_extractor(dataclasses.replace(extractor, data=data, loop=loop), root / "extractor")
    with pretended_gpu():
        assert (
            command("tokenizer.train", root / "tokenizer.yaml", "objective.adversarial=0", *few)
            == 0
        )
        assert command("tokenizer.encode", root / "tokens.yaml") == 0
        assert command("priors.train", root / "prior.yaml", *prior) == 0
        assert command("generate.sample", root, "--num", 4, "--batch-size", 2) == 0
        assert command("eval.run", "report", root) == 0
    _load_models.cache_clear()  # those are on the GPU
    assert (root / "report" / "report.html").is_file()
    assert command("tokenizer.encode", root / "tokens.yaml", "name=again") == 0
    ours, theirs = (TokenCache.open(root / name).split("train") for name in ("tokens", "again"))
    assert np.array_equal(ours.codes[:], theirs.codes[:])
    assert (
        command("generate.sample", root, "--num", 4, "--batch-size", 2, "--out", root / "more") == 0
    )
    with (
        np.load(root / "samples" / "samples.npz") as ours,
        np.load(root / "more" / "samples.npz") as theirs,
    ):
        assert np.array_equal(ours["codes"], theirs["codes"])
        assert np.abs(ours["arr_0"].astype(int) - theirs["arr_0"]).max() <= 1


def test_two_ranks_train_as_one_does(tmp_path):
    """In a process group that takes tensors of the GPU alone: a discriminator, DDP, averages,
    statistics."""
    done = processes.run(processes.TESTS / "pretended_ranks.py", tmp_path)
    assert done.returncode == 0, done.stderr[-3000:]
    ranks = [torch.load(tmp_path / f"rank-{rank}.pt") for rank in (0, 1)]
    assert [found["on main"] for found in ranks] == [["of 0", "of 1"], []]
    for found in ranks:
        assert found["refused"] and found["sum"] == [3, 3] and found["broadcast"] == [1, 1]
        assert found["rows"] == [0, 1, 1] and found["parts"] == [0, 1]
        assert found["largest"] == 1 and found["main"] == "rank 0"
    one = gan(tmp_path / "alone")
    for found in ranks:
        assert_same(found["state"], one, 1e-5)
