"""Masked priors with the networks and recipes of Halton-MaskGIT, TiTok and MaskBit."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from priors.families.masked import MaskedPrior
from priors.families.published_masked import (
    HaltonConfig,
    HaltonPrior,
    MaskBitConfig,
    TiTokConfig,
    split_digits,
)
from priors.interface import SampleOptions
from priors.networks.bert import MaskBitNetworkConfig, TiTokNetworkConfig, grouped
from priors.networks.halton_maskgit import HaltonNetworkConfig
from tokenizer.interface import CodeLayout
from training.errors import UserError

LAYOUT, NUM_CLASSES = CodeLayout(((2, 4),), (16,)), 3
CONFIGS = {
    "halton_maskgit": HaltonConfig(backbone=HaltonNetworkConfig(12, 2, 5, 16)),
    "titok": TiTokConfig(backbone=TiTokNetworkConfig(12, 2, 3, 16)),
    "titok with long skips": TiTokConfig(
        backbone=TiTokNetworkConfig(12, 5, 3, 16, long_skips=True)
    ),
    "maskbit": MaskBitConfig(backbone=MaskBitNetworkConfig(12, 2, 3, 16)),
    "maskbit with norms before": MaskBitConfig(
        backbone=MaskBitNetworkConfig(12, 2, 3, 16, prenorm=True)
    ),
}
KINDS = pytest.mark.parametrize("kind", CONFIGS)


def build(kind, layout=LAYOUT):
    """A small prior that says something."""
    torch.manual_seed(0)
    prior = CONFIGS[kind].build(layout, NUM_CLASSES)
    for parameter in prior.parameters():
        torch.nn.init.normal_(parameter, std=0.5)
    return prior.eval()


@KINDS
def test_known_codes_stay_and_samples_are_their_own(kind):
    prior, ids = build(kind), torch.tensor([0, 1, 2, 3])
    known = torch.full((4, LAYOUT.length), -1)
    known[:, ::3] = torch.arange(4)[:, None]
    for steps in (0, 1, 3):
        options = SampleOptions(guidance=2.0, guidance_schedule="linear", steps=steps, seed=5)
        codes = prior.sample(ids % 3, options, ids, known)
        LAYOUT.check(codes)
        assert torch.equal(codes[:, ::3], known[:, ::3])
        again = prior.sample(ids[[2]] % 3, options, ids[[2]], known[[2]])
        assert torch.equal(again, codes[[2]])


@KINDS
def test_every_weight_has_a_gradient(kind):
    prior = build(kind).train()
    codes = torch.randint(16, (64, 8), generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(64, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    prior.loss(codes, torch.arange(64) % 3, uniform).total.backward()
    for name, parameter in prior.named_parameters():
        assert parameter.grad is not None and parameter.grad.any(), name


@KINDS
def test_blocks_that_run_again_give_the_same_gradients(kind):
    codes = torch.randint(16, (8, 8), generator=torch.Generator().manual_seed(1))
    uniform = torch.rand(8, 10, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    gradients = []
    for again in (False, True):
        prior = build(kind)
        for module in prior.modules():
            if hasattr(module, "gradient_checkpointing"):
                module.gradient_checkpointing = again
        prior.loss(codes, torch.arange(8) % 3, uniform).total.backward()
        gradients.append({name: each.grad for name, each in prior.named_parameters()})
    torch.testing.assert_close(*gradients)


@KINDS
def test_codes_of_other_grids_are_refused(kind):
    with pytest.raises(UserError, match=f"prior.kind={kind.split()[0]} has no place for codes"):
        CONFIGS[kind].build(LAYOUT, NUM_CLASSES, given=LAYOUT)


@pytest.mark.parametrize("kind", ["halton_maskgit", "titok"])
def test_levels_have_codes_of_their_own(kind):
    """Of two levels, the second's logits are of its own codes, and its codes are others."""
    layout = CodeLayout(((2,), (2, 2)), (3, 5))
    network = build(kind, layout).backbone
    codes, label = torch.tensor([[0, 1, 2, 0, 0, 1]]), torch.tensor([1])
    first, second = network(codes, label)
    assert first.shape == (1, 2, 3) and second.shape == (1, 4, 5)
    plain = build(kind, CodeLayout(((6,),), (8,))).backbone
    plain.load_state_dict(network.state_dict())
    whole = plain(codes + torch.tensor([0, 0, 3, 3, 3, 3]), label)[0]
    torch.testing.assert_close(first, whole[:, :2, :3])
    torch.testing.assert_close(second, whole[:, 2:, 3:])


def test_the_mask_is_never_sampled():
    prior, ids = build("halton_maskgit"), torch.arange(50)
    with torch.no_grad():
        prior.backbone.bias[-1] = 1e4
    LAYOUT.check(prior.sample(ids % 3, SampleOptions(), ids))


class Counting(nn.Module):
    """In its n-th call it is sure of code n, for all positions."""

    layout = CodeLayout(((4, 4),), (9,))

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, codes, labels, *, given=None):
        logits = torch.full((*codes.shape, 9), -1e9)
        logits[..., self.calls] = 0.0
        self.calls += 1
        return [logits]


@pytest.mark.parametrize("family", [MaskedPrior, HaltonPrior])
def test_codes_are_drawn_again_after_their_turn(family):
    """By its authors' sampler; ours keeps each code as it is drawn first."""
    known = torch.full((1, 16), -1)
    known[0, 3] = 8
    prior = family(Counting(), 2, sampler="halton", steps=4)
    codes = prior.sample(torch.tensor([0]), SampleOptions(), torch.tensor([7]), known)
    last = family is HaltonPrior
    assert sorted(set(codes[0].tolist())) == ([3, 8] if last else [0, 1, 2, 3, 8])
    assert codes[0, 3] == 8 and (codes == 8).sum() == 1


def test_bits_are_split_into_groups_and_back():
    prior = build("maskbit")
    codes = torch.arange(16).view(2, 8)
    groups = prior.split(codes)
    assert groups[0].tolist() == [0, 1, 2, 3] * 2 + [0] * 4 + [1] * 4  # low bits first
    assert torch.equal(prior.join(groups), codes)
    unknown = prior.split(torch.tensor([[5, -1, 6, 7, 8, 9, 10, 11]]))
    assert (unknown < 0).nonzero()[:, 1].tolist() == [1, 9]


def test_what_is_hidden_from_maskbit_does_not_show():
    """A masked group is zeros between the others' -1 and 1."""
    network, label = build("maskbit").groups.backbone, torch.tensor([1])
    taken = []
    network.project_in.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    groups = torch.tensor([[0, 1, 2, 3, -1, 1, 2, 3, 3, -1, 1, 0, -1, 1, 2, 3]])
    network(groups, label)
    assert taken[0][0, :5].tolist() == [
        [-1, -1, 1, 1],
        [1, -1, 0, 0],
        [-1, 1, 1, -1],
        [1, 1, -1, -1],
        [0, 0, 0, 0],
    ]


@pytest.mark.parametrize(("bits", "splits"), [(5, 2), (2, 4)])
def test_bits_that_cannot_be_grouped_are_refused(bits, splits):
    with pytest.raises(UserError, match=f"in {splits} groups of equal size"):
        grouped(CodeLayout(((2, 2),), (1 << bits,)), splits)
    with pytest.raises(UserError, match="it needs 2\\^b codes"):
        grouped(CodeLayout(((2, 2),), (12,)), splits)


def test_the_loss_of_bits_is_of_all_groups_alike():
    """MaskBit's: the mean cross-entropy of all groups, masked or not."""
    prior, codes = build("maskbit"), torch.randint(16, (5, 8))
    prior.groups.label_smoothing, prior.groups.label_dropout, labels = 0.0, 0.0, torch.arange(5) % 3
    uniform = torch.rand(5, 10, dtype=torch.float64)
    taken = []
    prior.groups.backbone.register_forward_pre_hook(lambda _, given: taken.append(given[0]))
    loss = prior.loss(codes, labels, uniform)
    logits = torch.cat(prior.groups.backbone(taken[0], labels), 1)
    expected = F.cross_entropy(logits.flatten(0, 1), prior.split(codes).flatten())
    torch.testing.assert_close(loss.total, expected)
    masked = taken[0] < 0
    shares = torch.arccos(uniform[:, 1]) * 2 / torch.pi
    assert masked.sum(1).tolist() == (shares * 16).ceil().clamp(1, 16).int().tolist()
    assert not torch.equal(masked[:, :8], masked[:, 8:])  # groups of a code each by themselves


def test_likelihoods_of_bits_are_those_of_codes():
    """Of a network that knows nothing, each code has all its bits."""
    prior = build("maskbit")
    nn.init.zeros_(prior.groups.backbone.head.weight)
    nn.init.zeros_(prior.groups.backbone.head.bias)
    found = prior.nll(torch.randint(16, (3, 8)), torch.tensor([0, 1, 3]))
    expected = torch.full((3,), 8 * torch.tensor(16.0).log().item(), dtype=torch.float64)
    assert found.kind == "bound"
    torch.testing.assert_close(found.nats, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_digits_make_independent_numbers(dtype):
    uniform = torch.rand(20_000, generator=torch.Generator().manual_seed(0), dtype=dtype)
    parts = torch.stack(split_digits(uniform, 2)).double()
    assert parts.min() >= 0 and parts.max() < 1
    counts = torch.histogramdd(parts.T.contiguous(), bins=[4, 4], range=[0.0, 1.0, 0.0, 1.0]).hist
    assert ((counts - 1250).abs() < 5 * 1250**0.5).all()
