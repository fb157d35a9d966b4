"""Estimates: operations by hand and as they really run, memory of states exactly, checkpoints by
their files."""

from __future__ import annotations

import dataclasses
import sys
from collections import Counter

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

from priors import PRIORS
from priors import dry_run as priors_dry_run
from priors import train as priors_train
from priors.run import PriorRun
from tokenizer import dry_run as tokenizer_dry_run
from tokenizer.autoencoder import VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.discriminators.patch import PatchConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.interface import CodeLayout
from tokenizer.objective import Objective, ObjectiveConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.run import TokenizerRun
from tokenizer.train import phases_of, train_tokenizer
from training import distributed
from training.checkpoint import weights_path
from training.config import load, to_dict
from training.ema import Ema
from training.errors import UserError
from training.estimate import (
    CONFIGS,
    GIB,
    Accelerator,
    Estimate,
    Move,
    Network,
    made_by,
    planned_precision,
    with_activations_again,
)
from training.loop import Batch, LoopConfig, Phase
from training.phase import PhaseRunner
from training.tracing import Cost, Count, cost, trace


def meta(build):
    with torch.device("meta"):
        return build()


def of(module, *shape, precision="fp32", learns_before=True, samples=1):
    """The count of a module's mean, on inputs (samples, *shape)."""

    def loss(samples):
        return (
            module(torch.empty(samples, *shape, device="meta", requires_grad=learns_before))
            .float()
            .mean()
        )

    return trace(loss, samples, precision, module, {})


def test_products_and_convolutions_by_hand():
    linear = meta(lambda: nn.Linear(7, 5))
    product = 2 * 3 * 11 * 7 * 5
    found = of(linear, 11, 7, samples=3)
    assert (found.forward, found.backward) == ({"fp32": product}, {"fp32": 2 * product})
    assert of(linear, 11, 7, samples=3, learns_before=False).backward == {
        "fp32": product
    }  # of the weight alone
    assert of(linear, 11, 7, samples=3, precision="bf16").forward == {"bf16": product}

    convolution = meta(lambda: nn.Conv2d(3, 8, 3, stride=2, padding=1))
    whole = 2 * 8 * 3 * 9 * 10 * 6
    found = of(convolution, 3, 20, 12)
    assert (found.forward, found.backward) == ({"tf32": whole}, {"tf32": 2 * whole})
    frozen = meta(
        lambda: nn.Sequential(nn.Conv2d(3, 8, 1).requires_grad_(False), nn.Conv2d(8, 2, 1))
    )
    first, second = 2 * 3 * 8 * 16, 2 * 8 * 2 * 16
    found = of(frozen, 3, 4, 4, learns_before=False)
    assert (found.forward["tf32"], found.backward["tf32"]) == (first + second, second)


@pytest.mark.parametrize("again", [False, True])
def test_a_vision_transformer_by_hand(again):
    dim, depth, mlp, tokens = 16, 3, 40, 1 + 4 * 4
    config = ViTDecoderConfig(dim=dim, depth=depth, heads=2, mlp=mlp, gradient_checkpointing=again)
    decoder = meta(lambda: config.build(8, 4, (4, 4), None))
    layers = depth * (2 * tokens * (4 * dim * dim + 2 * dim * mlp) + 4 * tokens * tokens * dim)
    ends = 2 * 16 * 8 * dim + 2 * tokens * dim * 48
    for precision, rate in (("fp32", "fp32"), ("bf16", "bf16")):
        found = of(decoder, 8, 4, 4, precision=precision)
        assert found.forward == {rate: layers + ends}
        repeated = found.backward[rate] - 2 * (layers + ends)
        # What runs again stops at the last tensor that the backward pass needs: at the last
        # product's input.
        assert 0.7 * layers < repeated <= layers if again else repeated == 0


def test_counts_lie_on_a_line():
    quantizer = SimVQConfig(num_codes=64, code_dim=8).build().to("meta")
    decoder = meta(
        lambda: ViTDecoderConfig(dim=16, depth=2, heads=2, mlp=32).build(8, 4, (4, 4), None)
    )

    def loss(samples):
        output = quantizer(torch.empty(samples, 8, 4, 4, device="meta", requires_grad=True))
        quantizer.update(0, False)
        return decoder(output.vectors).float().mean() + output.loss

    both = nn.ModuleList([quantizer, decoder])
    line = cost(loss, (5, 20), "bf16", both, {"quantizer": quantizer, "decoder": decoder})
    true = trace(loss, 10, "bf16", both, {"quantizer": quantizer, "decoder": decoder})
    found = line.at(10)
    assert (found.forward, found.backward, found.kept) == (true.forward, true.backward, true.kept)
    assert found.peak == pytest.approx(true.peak, rel=0.02)
    fixed = line.at(0).forward["fp32"]  # the codebook's map, whatever the number of samples
    assert fixed == 2 * 64 * 8 * 8


def kept_by_autograd(module, inputs, precision):
    """Bytes that a forward pass on the CPU leaves for the backward pass, without parameters and
    buffers."""
    own = {
        tensor.untyped_storage().data_ptr() for tensor in [*module.parameters(), *module.buffers()]
    }
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in own:
            kept[storage.data_ptr()] = (storage.nbytes(), tensor)
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        with torch.autocast("cpu", torch.bfloat16, enabled=precision == "bf16"):
            output = module(inputs).float().mean()
    assert output.requires_grad
    return sum(size for size, _ in kept.values())


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
def test_activations_are_what_autograd_keeps(precision):
    config = ViTDecoderConfig(dim=64, depth=4, heads=4)
    true = kept_by_autograd(config.build(16, 4, (8, 8), None), torch.randn(2, 16, 8, 8), precision)
    found = of(
        meta(lambda: config.build(16, 4, (8, 8), None)), 16, 8, 8, precision=precision, samples=2
    )
    assert true <= sum(found.kept.values()) < 1.08 * true  # input and output live, too
    assert found.peak > sum(found.kept.values())


def tokenizer_run(tmp_path, **changes):
    settings = {
        "name": "tokenizer",
        "root": str(tmp_path),
        "data": DataConfig(source="digits", image_size=16),
        "model": VQVAEConfig(
            encoder=ConvEncoderConfig(channels=64, residual_channels=32),
            quantizer=SimVQConfig(num_codes=64, code_dim=16),
            decoder=ConvDecoderConfig(channels=64, residual_channels=32),
        ),
        "objective": ObjectiveConfig(
            adversarial=0.5, discriminator=PatchConfig(channels=16, layers=2)
        ),
        "loop": LoopConfig(steps=2, batch_size=8, save_every=2, preview_every=2, precision="fp32"),
        "calibration_images": 128,
    }
    return TokenizerRun(**(settings | changes))


def test_the_operations_are_those_of_a_real_step(tmp_path):
    """Both turns of a GAN's step, with the gradients that weigh its adversary."""
    config = tokenizer_run(tmp_path)
    objective = Objective(config.objective, config.model.build(16), None)
    batch = Batch({"images": torch.randn(8, 3, 16, 16)}, torch.arange(8))

    def search(features, codebook, *_, **__):
        return 2 * features[0] * features[1] * codebook[0]

    total = 0
    for turn, other in zip(
        phases_of(config, objective), (objective.discriminator, objective.autoencoder)
    ):
        turn.module.train().requires_grad_(True)
        other.requires_grad_(False)
        mapping = {torch.ops.tessera.nearest: search}
        with FlopCounterMode(display=False, custom_mapping=mapping) as counter:
            turn.loss(batch, 1000).total.backward()
        total += counter.get_total_flops()
    estimate = tokenizer_dry_run.plan(config).estimate
    assert sum(estimate.flops(1, 1).values()) == total


def attention_by_products(
    query, key, value, attn_mask=None, dropout_p=0.0, is_causal=False, scale=None, **_
):
    """softmax(Q K^T / sqrt(d)) V of (..., N, d), with the two products written out."""
    scores = query @ key.transpose(-2, -1) * (scale or query.shape[-1] ** -0.5)
    if is_causal:
        attn_mask = torch.ones(scores.shape[-2:], dtype=torch.bool).tril()
    if attn_mask is not None:
        scores = (
            scores.masked_fill(~attn_mask, -torch.inf)
            if attn_mask.dtype == torch.bool
            else scores + attn_mask
        )
    return scores.softmax(-1) @ value


@pytest.mark.parametrize("kind", PRIORS)
def test_the_operations_of_a_prior_are_those_of_a_real_step(kind, monkeypatch):
    layout = CodeLayout(((2, 2), (4, 4)), (16, 16) if kind == "maskbit" else (8, 16))
    prior = PRIORS[kind]().build(layout, 3)

    def loss(prior, samples, device):
        codes = torch.zeros(samples, layout.length, dtype=torch.int64, device=device)
        return prior.loss(
            codes, codes[:, 0], torch.rand(samples, layout.length + 2, device=device)
        ).total

    # Whether a torch counts its attention kernel of the CPU, and with what is computed again in its
    # backward pass, differs between versions; products are counted alike by all.
    monkeypatch.setattr(F, "scaled_dot_product_attention", attention_by_products)
    with FlopCounterMode(display=False) as counter:
        loss(prior.train(), 4, "cpu").backward()
    monkeypatch.undo()
    found = trace(lambda samples: loss(prior, samples, "meta"), 4, "fp32", prior.to("meta"), {})
    assert sum((found.forward + found.backward).values()) == counter.get_total_flops()


def test_states_take_what_the_estimate_says(tmp_path):
    config = tokenizer_run(tmp_path)
    memory = tokenizer_dry_run.plan(config).estimate.memory(1)
    objective = Objective(config.objective, config.model.build(16), None)
    gradients, moments = [], 0
    for turn in phases_of(config, objective):
        optimizer = turn.optimizer.build(turn.module)
        for parameter in turn.module.parameters():
            parameter.grad = torch.zeros_like(parameter)
        optimizer.step()
        gradients.append(sum(p.grad.nbytes for p in turn.module.parameters()))
        moments += sum(
            value.nbytes
            for state in optimizer.state.values()
            for value in state.values()
            if value.ndim
        )
    tensors = [*objective.autoencoder.parameters(), *objective.autoencoder.buffers()]
    average = Ema(objective.autoencoder, 0.9).module
    assert memory["autoencoder"] == sum(tensor.nbytes for tensor in tensors)
    assert memory["average"] == sum(
        tensor.nbytes for tensor in [*average.parameters(), *average.buffers()]
    )
    assert (memory["gradients"], memory["moments"]) == (max(gradients), moments)


def test_files_have_the_sizes_that_the_estimate_says(tmp_path):
    config = tokenizer_run(tmp_path)
    estimate = tokenizer_dry_run.plan(config).estimate
    train_tokenizer(config)
    folder = tmp_path / "tokenizer" / "checkpoints" / "step-00000002"
    saved = sum(path.stat().st_size for path in folder.iterdir())
    assert estimate.checkpoint == pytest.approx(saved, rel=0.02)
    assert estimate.published == pytest.approx(
        weights_path(tmp_path / "tokenizer").stat().st_size, rel=0.02
    )


def toy(**changes):
    """Ten operations a sample at each rate; 100 parameters that learn, 60 of them in blocks."""
    one = [
        Counter(bf16=5, tf32=5, fp32=5),
        Counter(bf16=5, tf32=5, fp32=5),
        Counter(),
        1000.0,
        False,
    ]
    two = [
        Counter(bf16=10, tf32=10, fp32=10),
        Counter(bf16=10, tf32=10, fp32=10),
        Counter(),
        1900.0,
        False,
    ]
    settings = {
        "loop": LoopConfig(steps=100, batch_size=96, accumulate=2),
        "precision": "bf16",
        "tokens": 4,
        "networks": {"prior": Network(100, 440, 60, 240, 80)},
        "helpers": {"teacher": 7},
        "moves": [Move(Cost((1, 2), Count(*one), Count(*two)))],
        "again": None,
        "search": 3,
        "checkpoint": 1,
        "published": 1,
    }
    return Estimate(**(settings | changes))


def test_memory_of_one_and_of_many():
    estimate = toy()
    alone = {
        "prior": 440,
        "teacher": 7,
        "gradients": 400,
        "moments": 800,
        "average": 440,
        "activations": 43300,
        "search": 3,
        "buckets": 0,
        "fetched": 0,
    }
    assert estimate.memory(1) == alone
    assert estimate.memory(8) == alone | {"activations": 5 * 900 + 1000, "buckets": 400}
    shared = estimate.memory(8, sharded=True)
    assert shared == alone | {
        "prior": 200 + 30,
        "gradients": 160 + 30,
        "moments": 320 + 60,
        "average": 200 + 30,
        "activations": 5500,
        "fetched": 240,
    }
    assert estimate.samples(64) is None
    assert (
        "loop.batch_size=96 cannot be shared by 64 GPUs x loop.accumulate=2: 128 could"
        in "\n".join(estimate.describe(None))
    )
    assert estimate.fitting(1, sum(alone.values())) == 2
    assert estimate.fitting(1, sum(alone.values()) - 1) == 4
    assert estimate.fitting(1, 0) is None


def test_time_of_turns_that_begin_late(monkeypatch):
    monkeypatch.setattr("training.estimate.UTILISATION", 0.5)
    move = toy().moves[0]
    estimate = toy(
        moves=[
            move,
            dataclasses.replace(move, start_step=40),
            dataclasses.replace(move, end_step=10),
        ]
    )
    accelerator = Accelerator("one", 10.0, 5.0, 1.0, 1.0)
    a_step = 96 * 10 * (1 / 10 + 1 / 5 + 1) / 0.5
    assert estimate.seconds(1, accelerator) == pytest.approx((100 + 60 + 10) * a_step)
    assert estimate.seconds(8, accelerator) == pytest.approx((100 + 60 + 10) * a_step / 8)


def test_several_micro_batches_of_a_gan_run_forward_twice(tmp_path):
    whole = tokenizer_dry_run.plan(tokenizer_run(tmp_path)).estimate
    count = whole.moves[0].cost.at(4)
    assert count.rehearsed and not whole.moves[-1].cost.few.rehearsed
    flops = whole.moves[0].flops(4, 2)["tf32"]
    assert flops == 2 * (2 * count.forward["tf32"] + count.backward["tf32"])


def test_configurations_find_what_makes_their_inputs(monkeypatch):
    tokens = made_by(TokenizerRun, "runs/digits/tokenizer-stage1")
    assert tokens.name == "tokenizer-stage1" and tokens.root == "runs/digits"
    assert made_by(TokenizerRun, "runs/nowhere/tokenizer-stage1") is None
    codes = priors_dry_run.codes_of(
        load(PriorRun, CONFIGS / "digits" / "prior.yaml", ["tokens=runs/digits/tokens"])
    )
    assert (codes.layout, codes.num_classes) == (CodeLayout(((5, 5),), (256,)), 10)
    unknown = priors_dry_run.codes_of(
        load(PriorRun, CONFIGS / "digits" / "prior.yaml", ["tokens=/nowhere"])
    )
    assert unknown.origin.startswith("assumed")


def test_a_prior_prints_its_configuration_and_writes_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path, change = str(CONFIGS / "priors" / "pixelcnn.yaml"), "prior.depth=1"
    monkeypatch.setattr(sys, "argv", ["priors.train", path, change, "tokens=/nowhere", "--dry-run"])
    priors_train.main()
    printed = capsys.readouterr().out
    assert list(tmp_path.iterdir()) == [] and "16 x 16 of 16384" in printed
    (tmp_path / "printed.yaml").write_text(printed)
    assert to_dict(load(PriorRun, tmp_path / "printed.yaml")) == to_dict(
        load(PriorRun, path, [change, "tokens=/nowhere"])
    )
    monkeypatch.setattr(sys, "argv", ["priors.train", path, "loop.accumulate=5", "--dry-run"])
    with pytest.raises(UserError, match=r"loop.batch_size=48"):
        priors_train.main()


def test_the_preset_of_300_million_has_them():
    config = load(
        PriorRun,
        CONFIGS / "imagenet" / "prior-300M.yaml",
        ["tokens=/nowhere", "prior.backbone.depth=1"],
    )
    network = priors_dry_run.plan(config).estimate.networks["prior"]
    assert 3.0e8 < network.trainable + 19 * network.shared_trainable < 3.1e8
    again = with_activations_again(config.prior)
    assert (
        again.backbone.gradient_checkpointing and not config.prior.backbone.gradient_checkpointing
    )
    assert network.bytes < GIB and distributed.world() == 1


def convolutional(tmp_path, **loop):
    """A run without an adversary, which is soon traced."""
    config = tokenizer_run(tmp_path, objective=ObjectiveConfig())
    return dataclasses.replace(config, loop=dataclasses.replace(config.loop, **loop))


def test_a_dry_run_refuses_the_sharding_that_training_refuses(tmp_path):
    config = convolutional(tmp_path, sharding="full")
    turn = Phase("autoencoder", config.model.build(16), lambda batch, step: None, config.optimizer)
    with pytest.raises(UserError, match="no transformer blocks") as refused:
        PhaseRunner(
            turn, torch.device("cpu"), steps=1, clip=1.0, low=False, compiled=False, sharded=True
        )
    with pytest.raises(UserError) as planned:
        tokenizer_dry_run.dry_run(config)
    assert str(planned.value) == str(refused.value)


def test_what_would_be_refused_is_not_offered():
    few = Network(100, 440, 40, 160, 80, shareable=False)
    assert "8 shared" not in "\n".join(toy(networks={"prior": few}).describe(None))
    assert "8 shared" in "\n".join(toy().describe(None))
    assert not Network.of(meta(lambda: nn.Sequential(nn.Linear(9, 9)))).shareable


def test_precisions_are_planned_as_training_decides_them(tmp_path, monkeypatch):
    """The tables are of GPUs that have bf16; where this machine's only emulates it, of what it
    would train in."""
    words = ["tokens=/nowhere", "prior.backbone.depth=1", "prior.backbone.dim=16"]

    def planned() -> str:
        prior = priors_dry_run.plan(
            load(PriorRun, CONFIGS / "digits" / "prior.yaml", words)
        ).estimate
        tokens = tokenizer_dry_run.plan(convolutional(tmp_path, precision="auto"))
        assert prior.precision == tokens.networks.precision == planned_precision("auto")
        assert (prior.moves[0].cost.of_each.forward["bf16"] > 0) == (prior.precision == "bf16")
        return next(line for line in prior.describe(None) if line.startswith("precision: "))[11:]

    assert planned().startswith("bf16, as loop.precision=auto takes on GPUs that have it")
    monkeypatch.setattr(distributed, "device", lambda: torch.device("cuda", 0))
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: including_emulation
    )
    assert (
        planned()
        == "fp32, for this machine's GPU only emulates bf16 (loop.precision=bf16 asks for it)"
    )
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda including_emulation=True: True)
    assert [planned_precision(asked) for asked in ("auto", "bf16", "fp32")] == [
        "bf16",
        "bf16",
        "fp32",
    ]


@pytest.mark.slow
def test_every_configuration_has_an_estimate(tmp_path, monkeypatch):
    """Without weights and data, in an empty folder that stays empty."""
    monkeypatch.chdir(tmp_path)
    commands = {TokenizerRun: tokenizer_dry_run, PriorRun: priors_dry_run}
    known = 0
    for path in sorted(CONFIGS.rglob("*.yaml")):
        if path.stem in ("data", "base", "encoder", "tokens") or path == CONFIGS / "priors.yaml":
            continue
        schema = PriorRun if "prior" in str(path.relative_to(CONFIGS)) else TokenizerRun
        printed = commands[schema].dry_run(load(schema, path))
        assert "memory of a GPU" in printed and "hours to the end" in printed, path
        known += 1
    assert known > 30 and list(tmp_path.iterdir()) == []
