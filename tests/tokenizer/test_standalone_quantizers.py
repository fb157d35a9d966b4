"""Quantizers within somebody else's model: shapes, training without this project's loop, loading."""

from __future__ import annotations

import warnings

import pytest
import torch

from tokenizer.quantizers import (
    BSQ,
    FSQ,
    IBQ,
    LFQ,
    QUANTIZERS,
    VQ,
    GumbelVQ,
    ProductVQ,
    Quantize,
    ResidualVQ,
    SimVQ,
    standalone,
)

FACES = {
    "vector": lambda **own: VQ(num_codes=12, dim=4, **own),
    "simvq": lambda **own: SimVQ(num_codes=12, dim=4, **own),
    "residual": lambda **own: ResidualVQ(num_codes=12, dim=4, depth=3, **own),
    "product": lambda **own: ProductVQ(num_codes=12, dim=4, heads=2, **own),
    "gumbel": lambda **own: GumbelVQ(num_codes=12, dim=4, **own),
    "fsq": lambda **own: FSQ(levels=(5, 4, 3, 3), **own),
    "lookup_free": lambda **own: LFQ(bits=4, **own),
    "bsq": lambda **own: BSQ(bits=4, **own),
    "ibq": lambda **own: IBQ(num_codes=12, dim=4, **own),
}
FEATURES = torch.randn(6, 4, 3, 5, generator=torch.Generator().manual_seed(0))


@pytest.fixture(params=FACES)
def make(request):
    torch.manual_seed(0)
    return FACES[request.param]


def test_every_kind_has_one():
    own = {kind for kind, each in QUANTIZERS.items() if each.__module__.startswith("tokenizer.")}
    assert FACES.keys() == own


def test_grids_and_tokens_get_the_same_codes(make):
    """(B, C, H, W) and (B, N, C), and what codes stand for is what was given."""
    quantizer = make().eval()
    tokens = FEATURES.flatten(2).transpose(1, 2)
    on_grid, of_tokens = quantizer(FEATURES), quantizer(tokens)
    assert on_grid.vectors.shape == FEATURES.shape and of_tokens.vectors.shape == tokens.shape
    levels = quantizer.num_codes if len(quantizer.num_codes) > 1 else ()
    assert on_grid.codes.shape == (6, *[len(levels)] * bool(levels), 3, 5)
    assert torch.equal(on_grid.codes.flatten(-2), of_tokens.codes)
    for out in (on_grid, of_tokens):
        assert torch.equal(quantizer.lookup(out.codes), out.vectors.detach())
        assert out.loss.ndim == 0


def test_it_is_the_quantizer_of_the_table(make):
    """In training, too: the same numbers as the module that this project's loop trains."""
    quantizer = make()
    plain = quantizer.quantizer
    if plain.starts_from_data:
        return
    torch.manual_seed(1)
    out = quantizer(FEATURES)
    plain.statistics.clear() if hasattr(plain, "statistics") else None
    torch.manual_seed(1)
    expected = plain(FEATURES)
    assert torch.equal(out.vectors, expected.vectors) and torch.equal(out.loss, expected.loss)


def test_gradients_reach_the_features(make):
    features = FEATURES.clone().requires_grad_()
    out = make()(features)
    (out.vectors.square().mean() + out.loss).backward()
    assert features.grad.isfinite().all() and features.grad.abs().sum() > 0


def test_features_of_another_width_are_named(make):
    with pytest.raises(ValueError, match=r"\(2, 9, 3, 3\).*dim=4"):
        make()(torch.zeros(2, 9, 3, 3))


def test_a_moving_average_learns_from_updates_alone():
    """Equation 6 of van den Oord et al. with decay 0: each code is the mean of its features."""
    quantizer = VQ(num_codes=2, dim=1, decay=0.0, epsilon=0.0, init="normal")
    quantizer.quantizer.codebook.copy_(torch.tensor([[-1.0], [1.0]]))
    features = torch.tensor([[[-3.0], [-2.0], [4.0]]])  # (1, 3, 1)
    quantizer(features)
    assert quantizer.quantizer.codebook.flatten().tolist() == [-1, 1]
    quantizer.update()
    assert quantizer.quantizer.codebook.flatten().tolist() == [-2.5, 4]
    quantizer(features * 2)
    quantizer.update(taken=False)
    assert quantizer.quantizer.codebook.flatten().tolist() == [-2.5, 4]


def test_updates_come_by_themselves_when_asked_and_before_evaluation():
    by_hand, asked = FACES["vector"](restart="data"), FACES["vector"](restart="data")
    asked.load_state_dict(by_hand.state_dict())
    asked.auto_update = True
    for scale in (1.0, 2.0, 0.5):
        by_hand(FEATURES * scale)
        by_hand.update()
        asked(FEATURES * scale)
    assert not torch.equal(asked.quantizer.codebook, by_hand.quantizer.codebook)
    asked.eval(), by_hand.eval()
    assert torch.equal(asked.quantizer.codebook, by_hand.quantizer.codebook)
    assert int(asked.steps) == int(by_hand.steps) == 3


def test_it_starts_from_the_first_features_once_and_loads_where_it_was(make):
    first, other = make(), make()
    for scale in (1.0, 3.0):
        torch.manual_seed(0)
        first(FEATURES * scale)
        first.update()
    other.load_state_dict(first.state_dict())
    for quantizer in (first, other):
        torch.manual_seed(2)
        quantizer(FEATURES * 2)
        quantizer.update()
    states = zip(first.state_dict().values(), other.state_dict().values())
    assert all(torch.equal(one, two) for one, two in states)
    assert bool(first.started) and int(first.steps) == 3
    assert torch.equal(first.eval()(FEATURES).codes, other.eval()(FEATURES).codes)


def test_a_forgotten_update_is_said_once(monkeypatch):
    monkeypatch.setattr(standalone, "FORGOTTEN", 3)
    quantizer = FACES["fsq"]()
    with pytest.warns(UserWarning, match=r"without FSQ\.update\(\)") as told:
        for _ in range(5):
            quantizer(FEATURES)
    assert len(told) == 1
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        for _ in range(5):
            quantizer(FEATURES)
            quantizer.update()


def test_settings_are_checked_as_in_a_yaml():
    with pytest.raises(
        ValueError, match=r"SimVQ: comitment: unknown key; did you mean commitment\?"
    ):
        SimVQ(num_codes=8, dim=4, comitment=1.0)
    with pytest.raises(ValueError, match="heads=3"):
        ProductVQ(dim=4, heads=3)
    quantizer = ResidualVQ(num_codes=8, dim=4, depth=2, shared=True, decay=0.5, seed=3)
    assert len(quantizer.quantizer.levels) == 1 and quantizer.quantizer.levels[0].decay == 0.5
    assert quantizer.seed == 3
    assert isinstance(Quantize(QUANTIZERS["fsq"]()), torch.nn.Module)
