"""Laws of the causal networks of published priors: a cache changes nothing, likelihoods are exact,
a code depends on those before it."""

from __future__ import annotations

import dataclasses
import math

import pytest
import torch

from priors.interface import SampleOptions
from priors.networks.llama import LlamaConfig
from priors.networks.mingpt import MinGPTConfig
from priors.networks.rar import RARConfig
from tokenizer.interface import CodeLayout
from training.command import UserError

SIZES = {"dim": 16, "depth": 2, "heads": 2}
NETWORKS = {
    "llama": LlamaConfig(**SIZES),
    "llama of few keys": LlamaConfig(**SIZES, kv_heads=1, feedforward=8),
    "llama adaln": LlamaConfig(**SIZES, conditioning="adaln"),
    "mingpt": MinGPTConfig(**SIZES),
    "rar": RARConfig(**SIZES),
    "rar random": RARConfig(**SIZES, order="random"),
}
LAYOUTS = {
    "wide": CodeLayout(((2, 3),), (7,)),
    "two levels": CodeLayout(((1, 2), (2, 2)), (5, 9)),
}
KINDS = pytest.mark.parametrize("kind", NETWORKS)


def make(kind, layout, trained=True, num_classes=3, **settings):
    torch.manual_seed(0)
    prior = dataclasses.replace(NETWORKS[kind], **settings).build(layout, num_classes)
    if trained:
        for parameter in prior.parameters():
            if parameter.ndim > 1:
                torch.nn.init.normal_(parameter, std=0.4)
    return prior.eval()


def sequences(layout, count):
    generator = torch.Generator().manual_seed(1)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


@KINDS
@pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
def test_cached_decoding_gives_the_logits_of_the_full_pass(kind, layout):
    prior, codes, labels = make(kind, layout), sequences(layout, 3), torch.tensor([0, 2, 3])
    order = None
    if kind.startswith("rar"):
        keys = torch.rand(3, layout.length)
        order = torch.cat([s.start + keys[:, s].argsort(1) for s, _ in layout.spans()], 1)
    decoding = prior.backbone.decoding(labels, order=order)
    with torch.no_grad():
        whole = prior.backbone(codes, labels, order=order)
    placed = order if order is not None else torch.arange(layout.length).expand(3, -1)
    previous = None
    for slot in range(layout.length):
        found = decoding.step(slot, previous)
        position = placed[:, slot]
        level = 0 if slot < layout.lengths[0] else 1
        start = 0 if level == 0 else layout.lengths[0]
        expected = whole[level][torch.arange(3), position - start]
        torch.testing.assert_close(found, expected, atol=2e-5, rtol=0)
        previous = codes.gather(1, position[:, None])[:, 0]


@KINDS
def test_likelihoods_are_exact_and_uniform_before_training(kind):
    layout = CodeLayout(((1, 1), (1, 2)), (2, 3))
    codes = torch.cartesian_prod(torch.arange(2), torch.arange(3), torch.arange(3))
    labels = torch.ones(len(codes), dtype=torch.int64)
    found = make(kind, layout).nll(codes, labels)
    assert found.kind == "exact"
    assert float((-found.nats).exp().sum()) == pytest.approx(1, abs=1e-6)
    assert found.nats.std() > 1e-3
    plain = make(kind, layout, trained=False).nll(codes, labels).nats
    torch.testing.assert_close(plain, torch.full_like(plain, layout.bits * math.log(2)))


@KINDS
def test_samples_depend_on_seed_id_and_label_alone(kind):
    layout = LAYOUTS["wide"]
    prior, labels = make(kind, layout), torch.tensor([0, 1, 2, 3])
    options = SampleOptions(guidance=2.0, guidance_schedule="power_cosine", top_k=4, seed=5)
    whole = prior.sample(labels, options, torch.arange(4))
    layout.check(whole)
    assert torch.equal(prior.sample(labels[2:3], options, torch.tensor([2])), whole[2:3])
    known = torch.full_like(whole, -1)
    known[:, :2] = 1
    continued = prior.sample(labels, dataclasses.replace(options, sampler="raster"), labels, known)
    assert (continued[:, :2] == 1).all()
    known[:, 3] = 1
    with pytest.raises(UserError, match="continues a beginning"):
        prior.sample(labels, dataclasses.replace(options, sampler="raster"), labels, known)


@KINDS
def test_what_is_computed_again_and_gradients_are_the_same(kind):
    layout = LAYOUTS["two levels"]
    codes, labels, found = sequences(layout, 4), torch.tensor([0, 1, 2, 0]), []
    uniform = torch.rand(4, layout.length + 2, generator=torch.Generator().manual_seed(2))
    for again in (False, True):
        prior = make(kind, layout, gradient_checkpointing=again, dropout=0.0).train()
        prior.loss(codes, labels, uniform).total.backward()
        assert all(parameter.grad is not None for parameter in prior.parameters())
        found.append([parameter.grad for parameter in prior.parameters()])
    for first, second in zip(*found):
        torch.testing.assert_close(first, second)


@pytest.mark.parametrize(
    ("config", "settings", "line"),
    [
        (LlamaConfig, {"dim": 12, "heads": 2}, "multiple of 4"),
        (LlamaConfig, {"kv_heads": 3}, "must divide"),
        (LlamaConfig, {"conditioning": "none"}, "is not one of"),
        (LlamaConfig, {"norm_eps": 0.0}, "above 0"),
        (MinGPTConfig, {"dim": 9, "heads": 2}, "multiple of heads"),
        (MinGPTConfig, {"positions": -1}, "positions=-1"),
        (RARConfig, {"order": "spiral"}, "is not one of"),
        (RARConfig, {"depth": 0}, "depth=0"),
    ],
)
def test_settings_that_cannot_be_are_refused(config, settings, line):
    with pytest.raises(ValueError, match=line):
        config(**settings)


def test_tables_that_are_too_short_are_refused():
    layout = LAYOUTS["wide"]
    for config in (MinGPTConfig(positions=5), RARConfig(positions=7), RARConfig(steps=6)):
        with pytest.raises(ValueError, match=r"prior\.(positions|steps)="):
            config.build(layout, 3)
    for config in NETWORKS.values():
        with pytest.raises(UserError, match="no codes of other levels"):
            config.build(layout, 3, given=layout)


def test_classes_may_be_more_than_codes():
    layout = LAYOUTS["wide"]
    prior = make("mingpt", layout, num_classes=20)
    assert prior.nll(sequences(layout, 2), torch.tensor([19, 20])).nats.isfinite().all()
