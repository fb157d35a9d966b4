"""loop.compile: every tokenizer and prior trains as it does uncompiled, with all its turns, in few
graphs.

Through `aot_eager`, which traces forward and backward passes as for a GPU and takes seconds where
inductor takes minutes.
"""

from __future__ import annotations

import collections
import copy
import functools

import pytest
import torch
from tiny import QUANTIZER_SIZES, save_encoder
from torch import nn

from priors.backbone import BackboneConfig
from priors.families.absorbing import AbsorbingConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.hierarchical import HierarchicalConfig
from priors.families.masked import MaskedConfig
from priors.families.pixelcnn import PixelCNNConfig
from priors.families.uniform import UniformConfig
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.resnet import ResNetDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.discriminators.dino import DinoConfig
from tokenizer.discriminators.patch import PatchConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.encoders.resnet import ResNetEncoderConfig
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.interface import CodeLayout
from tokenizer.objective import Objective, ObjectiveConfig
from tokenizer.quantizers import QUANTIZERS
from tokenizer.train import phases_of
from training import randomness
from training.checkpoint import Run
from training.loop import Batch, LoopConfig, Phase, train
from training.optim import OptimizerConfig
from training.phase import units_of

SIZES = {"channels": 8, "residual_blocks": 2, "residual_channels": 4, "activation": "silu"}
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=1, schedule="constant")
LAYOUT = CodeLayout(((2, 2), (4, 4)), (5, 9))
BACKBONE = BackboneConfig(dim=16, depth=2, heads=2, dropout=0.1)
PRIORS = {
    "autoregressive": AutoregressiveConfig(backbone=BACKBONE),
    "masked": MaskedConfig(backbone=BACKBONE),
    "absorbing": AbsorbingConfig(backbone=BACKBONE),
    "uniform": UniformConfig(backbone=BACKBONE),
    "pixelcnn": PixelCNNConfig(channels=8, depth=1),
    "hierarchical": HierarchicalConfig(
        top=AutoregressiveConfig(backbone=BACKBONE), bottom=MaskedConfig(backbone=BACKBONE)
    ),
}
ADVERSARY = {
    "adversarial": 0.5,
    "adversarial_start_step": 1,
    "adversarial_ramp_steps": 1,
    "augment": 0.7,
    "lecam": 0.1,
    "discriminator": PatchConfig(channels=8, layers=1),
}


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


def tokenizer_turns(model, **objective):
    torch.manual_seed(0)
    autoencoder = model.build(16)
    teacher = copy.deepcopy(autoencoder.encoder) if objective.get("distillation") else None
    losses = Objective(ObjectiveConfig(**objective), autoencoder, teacher, seed=3)
    config = collections.namedtuple("Config", "optimizer discriminator_optimizer objective")
    return autoencoder, phases_of(config(OPTIMIZER, OPTIMIZER, losses.config), losses)


def images(step, accumulate):
    drawn = torch.rand(4, 3, 16, 16, generator=torch.Generator().manual_seed(step)) * 2 - 1
    parts = zip(drawn.chunk(accumulate), torch.arange(4).chunk(accumulate))
    return [Batch({"images": part}, positions) for part, positions in parts]


def trained(folder, module, turns, batches, *, compile_, accumulate=1, **options):
    """The state of every turn's module and of the average."""
    options = {"steps": 3, "log_every": 1, **options}
    loop = LoopConfig(batch_size=4, accumulate=accumulate, compile=compile_, **options)
    run = Run.open(folder, loop)
    stream = lambda step: (batches(at, accumulate) for at in range(step, 100))  # noqa: E731
    average = train(loop, run, turns, stream, seed=3, published=module)
    modules = {turn.name: turn.module for turn in turns} | {"average": average}
    return {
        f"{kind}.{name}": value
        for kind, each in modules.items()
        for name, value in each.state_dict().items()
    }


def compile_with(monkeypatch, backend):
    """The backend of all that is compiled from here on."""
    whole = nn.Module.compile
    monkeypatch.setattr(nn.Module, "compile", functools.partialmethod(whole, backend=backend))


def assert_same(ours, theirs, bound=2e-5):
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(value, theirs[name], rtol=1e-4, atol=bound, msg=name)


def conv(**quantizer):
    made = QUANTIZERS[quantizer.pop("kind")](**quantizer)
    return VQVAEConfig(
        encoder=ConvEncoderConfig(**SIZES), quantizer=made, decoder=ConvDecoderConfig(**SIZES)
    )


@pytest.mark.timeout(1800)  # of the second
@pytest.mark.parametrize("backend", ["aot_eager", pytest.param("inductor", marks=pytest.mark.slow)])
def test_an_adversary_with_adaptive_weight(tmp_path, monkeypatch, backend):
    """Gradients of two losses at the last layer, through a compiled decoder, before the step's
    own."""
    compile_with(monkeypatch, backend)
    model = conv(kind="vector", num_codes=20, code_dim=8)
    plain, compiled = (
        trained(tmp_path / str(on), *tokenizer_turns(model, **ADVERSARY), images, compile_=on)
        for on in (False, True)
    )
    assert sum(torch._dynamo.utils.counters["graph_break"].values()) == 0
    assert_same(compiled, plain)


def autoencoder_of(kind, folder):
    """By the kind of its quantizer, or of the autoencoder."""
    level = QUANTIZERS["vector"](num_codes=20, code_dim=8)
    if kind == "vqvae2":
        return VQVAE2Config(
            encoder=ConvEncoderConfig(**SIZES),
            top=level,
            bottom=level,
            decoder=ConvDecoderConfig(**SIZES),
            channels=8,
            residual_blocks=1,
        )
    if kind == "vqrae":
        folder.mkdir()
        encoder = FoundationConfig(name=save_encoder(folder, "dinov2"), frozen=False)
        decoder = ViTDecoderConfig(dim=16, depth=2, heads=2, mlp=32)
        return VQRAEConfig(
            encoder=encoder, quantizer=level, decoder=decoder, normalise=False, noise_tau=0.5
        )
    if kind == "resnet":
        sizes = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 1}
        encoder = ResNetEncoderConfig(**sizes, out_channels=8)
        return VQVAEConfig(encoder=encoder, quantizer=level, decoder=ResNetDecoderConfig(**sizes))
    return conv(kind=kind, **QUANTIZER_SIZES[kind])


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("kind", [*QUANTIZERS, "vqvae2", "vqrae", "resnet"])
def test_every_tokenizer(kind, tmp_path, monkeypatch):
    """With its discriminator, in two micro-batches; the whole forward is few graphs."""
    compile_with(monkeypatch, "aot_eager")
    model, objective = autoencoder_of(kind, tmp_path / "encoder"), ADVERSARY
    if kind == "vqrae":
        judge = DinoConfig(name=model.encoder.name, layers=(0, 1), kernel=3)
        objective = ADVERSARY | {"discriminator": judge, "distillation": 0.1}
    plain, compiled = (
        trained(
            tmp_path / str(on),
            *tokenizer_turns(model, **objective),
            images,
            compile_=on,
            accumulate=2,
        )
        for on in (False, True)
    )
    breaks = torch._dynamo.utils.counters["graph_break"]
    assert sum(breaks.values()) == 0, breaks
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_same(compiled, plain)


@pytest.mark.parametrize(
    "kind",
    [kind if kind == "masked" else pytest.param(kind, marks=pytest.mark.slow) for kind in PRIORS],
)
def test_every_prior(kind, tmp_path, monkeypatch):
    """Dropout and label dropout included; blocks that are alike are compiled once."""
    compile_with(monkeypatch, "aot_eager")

    def made():
        torch.manual_seed(0)
        prior = PRIORS[kind].build(LAYOUT, 3)

        def loss(batch, step):
            shape = (LAYOUT.length + 2,)
            uniform = randomness.draw((7, step), batch.positions, shape, torch.float64)
            return prior.loss(batch["codes"], batch["labels"], uniform)

        return prior, [
            Phase("prior", prior, loss, OPTIMIZER, after_step=getattr(prior, "update", None))
        ]

    def codes(step, accumulate):
        generator = torch.Generator().manual_seed(step)
        drawn = torch.randint(5, (4, LAYOUT.length), generator=generator)
        return [Batch({"codes": drawn, "labels": torch.arange(4) % 3}, torch.arange(4))]

    plain = trained(tmp_path / "plain", *made(), codes, compile_=False)
    torch._dynamo.utils.counters.clear()
    compiled = trained(tmp_path / "compiled", *made(), codes, compile_=True)
    counters = torch._dynamo.utils.counters
    assert sum(counters["graph_break"].values()) == 0, counters["graph_break"]
    assert counters["stats"]["unique_graphs"] > 0, "nothing was compiled"
    assert_same(compiled, plain)


def test_units_are_transformer_blocks_or_the_whole():
    for kind, config in PRIORS.items():
        prior = config.build(LAYOUT, 3)
        units = units_of(prior)
        assert (units == [prior]) is False or kind == "pixelcnn", kind
    model = conv(kind="vector", num_codes=20, code_dim=8).build(16)
    assert units_of(model) == [model]
