"""What users train on a GPU runs on a pretended one (tests/pretend.py), with what the CPU gives."""

from __future__ import annotations

import pytest
import torch
from pretend import DeviceMismatch, pretended_gpu
from test_torch_compile import (
    ADVERSARY,
    LAYOUT,
    OPTIMIZER,
    PRIORS,
    SIZES,
    assert_same,
    conv,
    images,
    tokenizer_turns,
    trained,
)
from tiny import QUANTIZER_SIZES
from torch._subclasses.fake_tensor import FakeTensorMode

from priors.interface import SampleOptions
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.quantizers import QUANTIZERS
from training import distributed, philox
from training.loop import Batch, Turn

SAMPLERS = {
    "autoregressive": ("raster",),
    "masked": ("confidence", "halton"),
    "absorbing": ("ancestral", "first_hitting", "remasking"),
    "uniform": ("plug_in",),
    "pixelcnn": ("",),
}


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
    with FakeTensorMode(), torch.device("cuda"):  # of torch, which would go to a driver if a GPU stayed here
        assert torch.tensor(1.0).device.type == "cuda"


def test_random_numbers_are_those_of_the_cpu():
    ids, first = torch.tensor([5, -3, 2**62]), torch.tensor([3, 0, 2**40 + 1])
    expected = [make(3, ids, 2, 67, first) for make in (philox.words, philox.uniform, philox.short_uniform)]
    drawn = distributed.draw((1, 2), torch.arange(5), (3,))
    noise = distributed.normal((1, 2), torch.arange(5), (3,))
    with pretended_gpu() as waits:
        there = ids.to(distributed.device(), non_blocking=True), first.to(distributed.device(), non_blocking=True)
        makes = (philox.words, philox.uniform, philox.short_uniform)
        made = [make(3, there[0], 2, 67, there[1]) for make in makes]
        positions = torch.arange(5, device=distributed.device())
        made += [distributed.draw((1, 2), positions, (3,)), distributed.normal((1, 2), positions, (3,))]
        assert not waits, waits
        assert all(part.device.type == "gpu" for part in made)
        made = [part.cpu() for part in made]
    for ours, theirs in zip(made, [*expected, drawn, noise], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=1e-6, atol=0)


def tokenizer_of(kind):
    if kind == "vqvae2":
        level = QUANTIZERS["vector"](num_codes=20, code_dim=8)
        return VQVAE2Config(encoder=ConvEncoderConfig(**SIZES), top=level, bottom=level,
                            decoder=ConvDecoderConfig(**SIZES), channels=8, residual_blocks=1)  # fmt: skip
    return conv(kind=kind, **QUANTIZER_SIZES[kind])


def tokenized(folder, kind):
    """Calibrated, trained with an adversary, saved; its state, and what it encodes and decodes."""
    module, turns = tokenizer_turns(tokenizer_of(kind), **ADVERSARY)
    module.to(distributed.device())
    if module.starts_from_data:
        module.calibrate([batch.tensors["images"] for batch in images(9, 1)], 0)
    state = trained(folder, module, turns, images, compile_=False)
    module.eval()
    with torch.no_grad():
        codes = module.encode(images(5, 1)[0]["images"].to(distributed.device()))
        pictures = module.decode(codes)
    assert codes.device.type == pictures.device.type == distributed.device().type
    return {name: value.cpu() for name, value in state.items()} | {"codes": codes.cpu(), "pictures": pictures.cpu()}


@pytest.mark.parametrize("kind", [*QUANTIZERS, "vqvae2"])
def test_every_tokenizer(kind, tmp_path):
    with pretended_gpu():
        there = tokenized(tmp_path / "gpu", kind)
    here = tokenized(tmp_path / "cpu", kind)
    assert torch.equal(there["codes"], here["codes"])
    assert_same(there, here, 1e-4)


def learned(folder, kind):
    torch.manual_seed(0)
    prior = PRIORS[kind].build(LAYOUT, 3)

    def loss(batch, step):
        shape = (LAYOUT.length + 2,)
        uniform = distributed.draw((7, step), batch.positions, shape, torch.float64)
        return prior.loss(batch["codes"], batch["labels"], uniform)

    def codes(step, accumulate):
        drawn = torch.randint(5, (4, LAYOUT.length), generator=torch.Generator().manual_seed(step))
        return [Batch({"codes": drawn, "labels": torch.arange(4) % 3}, torch.arange(4))]

    turns = [Turn("prior", prior, loss, OPTIMIZER, after_step=getattr(prior, "update", None))]
    made = trained(folder, prior, turns, codes, compile_=False)
    prior.eval()
    device = distributed.device()
    batch = codes(7, 1)[0].to(device)
    with torch.no_grad():
        made["nats"] = prior.nll(batch["codes"], batch["labels"]).nats
        for sampler in SAMPLERS[kind]:
            options = SampleOptions(seed=3, sampler=sampler, guidance=2.0, top_k=4)
            ids = torch.arange(3, device=device)
            made[f"samples {sampler}"] = prior.sample(batch["labels"][:3], options, ids)
    assert all(value.device.type == device.type for value in made.values())
    return {name: value.cpu() for name, value in made.items()}


@pytest.mark.parametrize("kind", PRIORS)
def test_every_prior(kind, tmp_path):
    """Training, likelihood, and samples by each of its samplers, which are the CPU's."""
    with pretended_gpu():
        there = learned(tmp_path / "gpu", kind)
    here = learned(tmp_path / "cpu", kind)
    assert_same(there, here, 1e-4)
    for name in here:
        if name.startswith("samples"):
            assert torch.equal(there[name], here[name]), name
