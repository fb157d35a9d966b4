"""Tokens to files and back: identical, near the ideal length, and refused when anything is not as
it was."""

from __future__ import annotations

import copy
import math

import constriction
import numpy as np
import pytest
import torch

from eval.metrics.codec import (
    PriorModel,
    TableModel,
    TokenFile,
    _categorical,
    decode_tokens,
    encode_tokens,
    exponentials,
    masses,
)
from priors.backbone import BackboneConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.hierarchical import HierarchicalConfig
from priors.families.masked import MaskedConfig
from priors.families.pixelcnn import PixelCNNConfig
from tokenizer.interface import CodeLayout
from training.errors import UserError

SMALL = BackboneConfig(dim=16, depth=2, heads=2, dropout=0.0)
PRIORS = {
    "transformer": (AutoregressiveConfig(backbone=SMALL), CodeLayout(((3, 3),), (11,))),
    "two levels": (
        AutoregressiveConfig(backbone=SMALL, order="random"),
        CodeLayout(((1, 2), (2, 2)), (5, 300)),
    ),
    "pixelcnn": (PixelCNNConfig(channels=8, depth=2, kernel=3), CodeLayout(((3, 3),), (11,))),
    "hierarchical": (
        HierarchicalConfig(
            top=AutoregressiveConfig(backbone=SMALL),
            bottom=PixelCNNConfig(channels=8, depth=1, kernel=3),
        ),
        CodeLayout(((1, 2), (2, 4)), (5, 9)),
    ),
}
NUM_CLASSES = 3


def skewed(layout: CodeLayout, n: int, seed: int = 0) -> torch.Tensor:
    """Codes that use small numbers more."""
    generator = torch.Generator().manual_seed(seed)
    levels = [
        (torch.rand(n, m, generator=generator) ** 3 * k).long()
        for m, k in zip(layout.lengths, layout.num_codes)
    ]
    return torch.cat(levels, 1)


def make_prior(name: str):
    """A small prior whose weights say something, and (5, N) codes and labels."""
    config, layout = PRIORS[name]
    torch.manual_seed(0)
    prior = config.build(layout, NUM_CLASSES)
    for parameter in prior.parameters():
        if not parameter.any():  # the last layers, and biases
            torch.nn.init.normal_(parameter, std=0.3)
    return prior.eval(), skewed(layout, 5), torch.tensor([0, 1, 2, 3, 0])


@pytest.mark.parametrize("n", [0, 1, 2, 50])
@pytest.mark.parametrize(
    "layout",
    [
        CodeLayout(((4, 4),), (2,)),
        CodeLayout(((4, 4),), (1024,)),
        CodeLayout(((2, 2),), (65536,)),
        CodeLayout(((2, 2),), (200_000,)),
        CodeLayout(((32,),), (7,)),
        CodeLayout(((1, 2), (2, 4)), (5, 513)),
        CodeLayout(((2, 2),) * 4, (16,) * 4),
        CodeLayout(((2, 2), (2, 2)), (1, 3)),
    ],
    ids=str,
)
def test_tables_give_codes_back(layout, n):
    codes = skewed(layout, n)
    split = TableModel.of_split([np.arange(size) % 7 for size in layout.num_codes], layout)
    for model in (None, split):
        data = encode_tokens(codes, layout, model)
        found = decode_tokens(data, model)
        assert torch.equal(found.codes, codes) and found.codes.dtype == torch.int64
        assert found.layout == layout and found.labels is None
    assert torch.equal(decode_tokens(encode_tokens(codes, layout)).codes, codes), (
        "a file with its table is enough"
    )


@pytest.mark.parametrize("num_codes", [2, 5, 1024, 65536])
def test_payload_of_a_table_is_near_the_ideal(num_codes):
    layout = CodeLayout(((16, 16),), (num_codes,))
    codes = skewed(layout, 40)
    own, split = (
        TableModel.of_codes(codes, layout),
        TableModel.of_split([np.arange(num_codes)[::-1]], layout),
    )
    counts = torch.bincount(codes.flatten(), minlength=num_codes).double()
    shares = counts[counts > 0] / counts.sum()
    assert float(own.ideal_bits(codes).sum()) == pytest.approx(
        -float((shares * shares.log2()).sum()) * codes.numel()
    )
    for model in (own, split):
        for some in (codes, codes[:1]):
            payload = len(TokenFile.from_bytes(encode_tokens(some, layout, model)).payload)
            ideal = float(model.ideal_bits(some).sum()) / 8
            assert 0.98 * ideal - 1 <= payload <= 1.02 * ideal + 8


def test_header_is_short_and_the_table_little():
    layout = CodeLayout(((16, 16),), (1024,))
    codes = skewed(layout, 500)
    data = encode_tokens(codes, layout)
    file = TokenFile.from_bytes(data)
    assert len(data) - len(file.payload) - len(file.table) < 48
    assert len(file.table) < 2 * 1024
    alone = encode_tokens(codes[:1], layout, TableModel.of_split([np.ones(1024)], layout))
    assert len(alone) - len(TokenFile.from_bytes(alone).payload) < 40
    assert (
        len(data)
        <= 1.02 * float(TableModel.of_codes(codes, layout).ideal_bits(codes).sum()) / 8 + 48
    )


def test_a_split_shares_out_mass_as_krichevsky_and_trofimov():
    layout = CodeLayout(((2,),), (3,))
    bits = TableModel.of_split([np.array([7, 0, 1])], layout).ideal_bits(
        torch.tensor([[0, 1], [2, 2]])
    )
    assert bits.tolist() == pytest.approx(
        [-math.log2(7.5 / 9.5 * 0.5 / 9.5), -2 * math.log2(1.5 / 9.5)]
    )


@pytest.mark.parametrize("labelled", [True, False])
@pytest.mark.parametrize("name", PRIORS)
def test_priors_give_codes_and_labels_back(name, labelled):
    prior, codes, labels = make_prior(name)
    labels = labels if labelled else None
    model = PriorModel(prior, batch_size=2)
    data = encode_tokens(codes, prior.layout, model, labels)
    found = decode_tokens(data, PriorModel(prior))  # the batch size is the file's
    assert torch.equal(found.codes, codes)
    assert found.labels is None if labels is None else torch.equal(found.labels, labels)
    assert encode_tokens(codes[:0], prior.layout, model, None if labels is None else labels[:0])

    conditions = torch.full((5,), NUM_CLASSES) if labels is None else labels
    ideal = prior.nll(codes, conditions).nats / math.log(2) + (
        2 if labelled else 0
    )  # log2(classes + none)
    torch.testing.assert_close(model.ideal_bits(codes, labels), ideal)
    payload = len(TokenFile.from_bytes(data).payload)
    assert float(ideal.sum()) / 8 - 1 <= payload <= 1.02 * float(ideal.sum()) / 8 + 8


def test_weights_of_a_prior_do_not_depend_on_batch_or_mode():
    """In float64 and rounded: bit for bit what any batch size gives."""
    prior, codes, labels = make_prior("transformer")
    backbone = PriorModel(prior.train()).stages[0].backbone

    def weights(rows: slice) -> np.ndarray:
        decoding, previous, found = backbone.decoding(labels[rows]), None, []
        for slot in range(prior.layout.length):
            found.append(exponentials(decoding.step(slot, previous).numpy()))
            previous = codes[rows, slot]
        return np.stack(found)

    together = weights(slice(None))
    apart = np.concatenate([weights(slice(i, i + 1)) for i in range(5)], axis=1)
    assert np.array_equal(together, apart)
    full = exponentials(backbone(codes, labels)[0].detach().numpy())
    assert np.array_equal(together.swapaxes(0, 1), full), "slot by slot and all at once"
    assert prior.training and next(prior.parameters()).dtype == torch.float32, (
        "the caller's prior is left alone"
    )


@pytest.mark.parametrize("kind", ["table", "split", "prior"])
def test_every_damaged_byte_and_every_cut_is_refused(kind):
    prior, codes, labels = make_prior("transformer")
    split = TableModel.of_split([np.ones(11)], prior.layout)
    model = {"table": None, "split": split, "prior": PriorModel(prior)}[kind]
    data = encode_tokens(codes, prior.layout, model, labels if kind == "prior" else None)
    for place in range(len(data)):
        for flipped in (1, 128, 255):
            damaged = data[:place] + bytes([data[place] ^ flipped]) + data[place + 1 :]
            with pytest.raises(UserError, match=r"^x\.tokens: ") as error:
                decode_tokens(damaged, model, "x.tokens")
            assert "\n" not in str(error.value)
        with pytest.raises(UserError, match=r"damaged or cut short|no token file|of version"):
            decode_tokens(data[:place], model, "x.tokens")
    with pytest.raises(UserError, match="damaged or cut short"):
        decode_tokens(data + b"\0", model)


def test_another_model_is_refused():
    prior, codes, labels = make_prior("transformer")
    layout, model = prior.layout, PriorModel(prior)
    data = encode_tokens(codes, layout, model, labels)
    other = copy.deepcopy(prior)
    with torch.no_grad():
        next(other.parameters()).view(-1)[0] += 1e-3
    tables = [TableModel.of_split([np.full(11, count)], layout) for count in (1, 2)]
    for wrong in (PriorModel(other), tables[0]):
        with pytest.raises(
            UserError, match=f"was coded by the prior {model.sha256[:16]}…, not {wrong.kind}"
        ):
            decode_tokens(data, wrong)
    with pytest.raises(UserError, match="give that model"):
        decode_tokens(data)
    with pytest.raises(UserError, match="was coded by the split"):
        decode_tokens(encode_tokens(codes, layout, tables[0]), tables[1])
    with pytest.raises(UserError, match="cannot be coded by a model of"):
        encode_tokens(skewed(CodeLayout(((9,),), (11,)), 2), CodeLayout(((9,),), (11,)), model)
    with pytest.raises(ValueError, match="labels"):
        encode_tokens(codes, layout, None, labels)
    with pytest.raises(UserError, match="MaskedPrior gives no code"):
        PriorModel(MaskedConfig(backbone=SMALL).build(layout, NUM_CLASSES))


def test_probabilities_that_differ_are_found_out():
    """A machine whose kernels give other numbers for the same weights."""
    prior, codes, labels = make_prior("transformer")
    model = PriorModel(prior)
    data = encode_tokens(codes, prior.layout, model, labels)
    with torch.no_grad():
        for parameter in model.stages[0].parameters():
            parameter *= 1.01
    with pytest.raises(UserError, match="decodes to other codes than were encoded"):
        decode_tokens(data, model)


@pytest.mark.parametrize("shape", [(2,), (40, 3), (7, 1000), (3, 1 << 18)])
def test_masses_share_out_everything(shape):
    generator = np.random.default_rng(0)
    weights = (2.0 ** (32 * generator.random(shape))).astype(np.int64) * (
        generator.random(shape) < 0.7
    )
    weights[..., -1] = 1 << 32
    found = masses(weights)
    assert found.min() >= 1 and (found.sum(-1) == 1 << 24).all()
    ideal = weights / weights.sum(-1, keepdims=True)
    worst = 1 / (1 - shape[-1] / 2**24)
    assert (found / 2**24 * worst >= ideal * (1 - 1e-12)).all()


def test_exponentials_are_those_of_rounded_logits():
    logits = np.random.default_rng(0).normal(0, 8, (20, 50)).astype(np.float32)
    found = exponentials(logits)
    assert (found.max(-1) == 1 << 32).all()
    exact = np.exp(logits - logits.max(-1, keepdims=True).astype(np.float64)) * 2**32
    assert np.abs(found - exact).max() <= 2**32 / 1024
    large = exact > 2**12
    assert np.abs(found / exact - 1)[large].max() < 1 / 1024 + 2**-12
    assert np.array_equal(exponentials(logits + np.float32(3)), found) or np.allclose(
        exponentials(logits + np.float32(3)), found, rtol=2 / 1024, atol=1
    )
    assert exponentials(np.array([[0.0, -1000.0]])).tolist() == [[1 << 32, 0]]


def test_the_coder_takes_the_masses_as_they_are():
    """Symbol i owns the numbers from sum(masses before i) on: seen in where decoding changes from
    one to the next."""
    weights = np.array([0, 5, 1 << 30, 0, 3, 77])
    starts = masses(weights).cumsum()
    share = (2**64 - 1) >> 24  # of the coder's first interval, one unit of mass
    for symbol, end in enumerate(starts[:-1].tolist()):
        for number, expected in ((end * share - 1, symbol), (end * share, symbol + 1)):
            words = np.array([number >> 32, number & 0xFFFFFFFF], np.uint32)
            for table in (weights, weights[None]):
                model, *each = _categorical(table)
                decoder = constriction.stream.queue.RangeDecoder(words)
                assert decoder.decode(model, *(each or [1])).tolist() == [expected]
