"""Low precision: who decides it, what stays in float64 under it, and that a GPU (a pretended one)
answers as a CPU."""

from __future__ import annotations

import collections
import dataclasses

import numpy as np
import pytest
import torch
from pretend import pretended_gpu
from test_cache import save_images, save_tokenizer
from test_pretend_gpu import SAMPLERS, tokenizer_of
from test_torch_compile import LAYOUT, PRIORS
from tiny import shake
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from toy import Rows, Toy, ToyRun, loop

from eval.pipeline import LowPrecision
from generate.drawing import Request, draw_samples
from priors.interface import SampleOptions
from tokenizer.data.loader import feed
from tokenizer.encode import TokensRun, encode_data
from tokenizer.interface import CodeLayout
from tokenizer.run import load
from training import distributed, precision
from training.checkpoint import Run
from training.errors import UserError
from training.loop import train
from training.precision import autocast, decide

aten = torch.ops.aten
PRODUCTS = {"mm", "addmm", "bmm", "baddbmm", "convolution", "mkldnn_rnn_layer", "linear"}
CHOICES = {"argmax", "searchsorted"}  # what a draw ends in


class Seen(TorchDispatchMode):
    """Of which types the numbers are that are multiplied, and those that draws are made from."""

    def __init__(self) -> None:
        super().__init__()
        self.products: collections.Counter[torch.dtype] = collections.Counter()
        self.choices: collections.Counter[torch.dtype] = collections.Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func._schema.name.partition("::")[2]
        kept = self.products if name in PRODUCTS else self.choices if name in CHOICES else None
        if kept is not None:
            floats = [
                leaf
                for leaf in tree_leaves(args)
                if isinstance(leaf, torch.Tensor) and leaf.is_floating_point()
            ]
            kept.update(tensor.dtype for tensor in floats)
        return func(*args, **(kwargs or {}))


def drawn(kind: str, asked: str) -> dict[str, torch.Tensor]:
    """Likelihoods and samples of a prior that is not trained."""
    torch.manual_seed(0)
    prior, device = PRIORS[kind].build(LAYOUT, 3), distributed.device()
    shake(prior)
    prior.to(device).eval()
    codes = torch.randint(5, (8, LAYOUT.length), generator=torch.Generator().manual_seed(1)).to(
        device
    )
    labels = (torch.arange(8) % 3).to(device)
    made = {}
    with autocast(asked, device):
        made["nats"] = prior.nll(codes, labels).nats
        for sampler in SAMPLERS[kind]:
            options = SampleOptions(
                seed=3, sampler=sampler, guidance=2.0, top_p=0.95, temperature=0.9, steps=4
            )
            made[sampler] = prior.sample(labels, options, torch.arange(8, device=device))
    return {name: value.cpu() for name, value in made.items()}


@pytest.mark.parametrize("kind", PRIORS)
def test_priors_multiply_in_bf16_and_draw_in_float64(kind):
    full = drawn(kind, "fp32")
    with Seen() as seen:
        low = drawn(kind, "bf16")
    assert seen.products[torch.bfloat16] > 0
    assert set(seen.choices) == {torch.float64}
    assert low["nats"].dtype == torch.float64 and not torch.equal(low["nats"], full["nats"])
    torch.testing.assert_close(low["nats"], full["nats"], rtol=0.02, atol=0)
    with pretended_gpu():
        there = drawn(kind, "bf16")
    torch.testing.assert_close(there["nats"], full["nats"], rtol=0.02, atol=0)
    for sampler in SAMPLERS[kind]:
        for made in (low, there):
            assert (made[sampler] == full[sampler]).float().mean() > 0.9


def encoded(kind: str, asked: str) -> dict[str, torch.Tensor]:
    torch.manual_seed(0)
    model, device = tokenizer_of(kind).build(16).eval(), distributed.device()
    pictures = torch.rand(16, 3, 16, 16) * 2 - 1
    model.calibrate([pictures], 0)
    model.to(device)
    quantizer = model.quantizer
    quantizer.register_forward_pre_hook(lambda _, given: kinds.append(given[0].dtype))
    kinds: list[torch.dtype] = []
    tokenizer = LowPrecision(model, asked)
    codes = tokenizer.encode(pictures.to(device))
    images = tokenizer.decode(codes)
    assert (
        set(kinds) == {torch.float32}
        and codes.dtype == torch.int64
        and codes.device.type == device.type
    )
    return {"codes": codes.cpu(), "images": images.cpu().float()}


@pytest.mark.parametrize("kind", ["vector", "residual", "lookup_free", "vqvae2"])
def test_tokenizers_multiply_in_bf16_and_quantize_in_fp32(kind):
    full = encoded(kind, "fp32")
    with Seen() as seen:
        low = encoded(kind, "bf16")
    assert seen.products[torch.bfloat16] > 0
    with pretended_gpu():
        there = encoded(kind, "bf16")
    for made in (low, there):
        assert (made["codes"] == full["codes"]).float().mean() > 0.9
        same = (made["codes"] == full["codes"]).all(1)
        torch.testing.assert_close(made["images"][same], full["images"][same], rtol=0, atol=0.03)


@pytest.mark.parametrize("own", [True, False])
def test_auto_is_bf16_where_a_gpu_has_it_and_says_where_it_has_not(monkeypatch, capsys, own):
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation
    )
    gpu, cpu = torch.device("cuda", 0), torch.device("cpu")
    assert decide("auto", gpu, "--precision", "samples") == ("bf16" if own else "fp32")
    said = "samples: fp32, as this GPU only emulates bf16 (--precision=bf16 asks for it)\n"
    assert capsys.readouterr().out == ("" if own else said)
    assert decide("auto", cpu, "--precision", "samples") == "fp32" and not capsys.readouterr().out
    assert [decide(asked, cpu) for asked in ("fp32", "bf16", "fp16")] == ["fp32", "bf16", "fp16"]
    with pytest.raises(UserError, match="--precision=fp8: choose one of auto, fp32, bf16, fp16"):
        decide("fp8", cpu, "--precision")


def test_auto_on_a_gpu_that_has_bf16(monkeypatch):
    """As on the CPU, where bf16 is asked for."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: device.type == "gpu")
    with pretended_gpu():
        assert decide("auto", distributed.device()) == "bf16"
        here = torch.nn.Linear(4, 4).to(distributed.device())
        with autocast(decide("auto", distributed.device()), distributed.device()):
            assert here(torch.ones(1, 4, device=distributed.device())).dtype == torch.bfloat16


def test_encoding_and_sampling_on_a_gpu_that_has_bf16(tmp_path, monkeypatch):
    """Nobody asks for anything: codes say so, and samples, drawn and decoded there, are those of
    the CPU's bf16."""
    monkeypatch.setattr(precision, "has_bf16", lambda device: device.type == "gpu")
    save_images(tmp_path / "images")
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "images")
    torch.manual_seed(0)
    prior, painter = (
        PRIORS["masked"].build(CodeLayout(((2, 2),), (16,)), 2),
        load(tmp_path / "tokenizer"),
    )
    shake(prior)
    wanted = Request(12, (0, 1), SampleOptions(steps=4), precision="bf16")
    expected = draw_samples(prior.eval(), painter, wanted, 5)
    with pretended_gpu():
        cache = encode_data(TokensRun(root=str(tmp_path), tokenizer=str(tmp_path / "tokenizer")))
        here = [network.to(distributed.device()) for network in (prior, painter)]
        wanted = dataclasses.replace(wanted, precision="auto").decided("samples")
        made = draw_samples(*here, wanted, 5)
    assert (
        cache.precision == "bf16" and cache.manifest["codes_unlike_fp32"]["train"]["images"] == 20
    )
    assert wanted.facts()["precision"] == "bf16" and (made.codes == expected.codes).mean() > 0.9
    same = (made.codes == expected.codes).all(1)
    assert np.abs(made.images[same].astype(int) - expected.images[same]).max() <= 2  # of 255


@pytest.mark.parametrize("asked", ["fp32", "bf16"])
def test_previews_and_held_out_figures_have_the_precision_of_the_run(tmp_path, asked):
    toy, seen = Toy(ToyRun(loop=loop(steps=1, precision=asked))), []

    def look(*_) -> dict[str, float]:
        seen.append(torch.is_autocast_enabled("cpu"))
        return {}

    train(
        toy.config.loop,
        Run.open(tmp_path / "run", toy.config),
        toy.turns,
        feed(Rows(), 8, seed=5),
        seed=7,
        published=toy.generator,
        preview=look,
        measure=look,
    )
    assert seen == [asked == "bf16"] * 2
