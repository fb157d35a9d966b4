"""Laws of the transformer under the priors: what its logits see, where they stand, what its weights
are at first."""

from __future__ import annotations

import copy
import itertools
import math

import pytest
import torch

from benchmarks.sampling import x_transformers_of
from priors.backbone import (
    Backbone,
    BackboneConfig,
    _angles,
    _place_ids,
    check_settings,
    cross_entropy,
)
from tokenizer.interface import CodeLayout

ONE_LEVEL = CodeLayout(((2, 3),), (7,))
TWO_LEVELS = CodeLayout(((1, 2), (2, 4)), (5, 9))
GIVEN = CodeLayout(((2, 2),), (4,))
NUM_CLASSES = 3
OPTIONS = pytest.mark.parametrize(
    ("positions", "conditioning"),
    list(itertools.product(("rotary", "learned"), ("prefix", "adaln"))),
)
LAYOUTS = pytest.mark.parametrize(
    "layout", [ONE_LEVEL, TWO_LEVELS], ids=["one_level", "two_levels"]
)
CAUSAL = pytest.mark.parametrize("causal", [True, False], ids=["causal", "bidirectional"])


def make(
    layout: CodeLayout,
    *,
    causal: bool,
    given: CodeLayout | None = None,
    trained: bool = True,
    timed: bool = False,
    seed: int = 0,
    **settings,
) -> Backbone:
    """A small backbone in eval mode; `trained` stands for weights that say something, norms and
    biases too."""
    torch.manual_seed(seed)
    settings = {"dim": 32, "depth": 2, "heads": 2, **settings}
    backbone = (
        BackboneConfig(**settings)
        .build(layout, NUM_CLASSES, causal=causal, given=given, timed=timed)
        .eval()
    )
    if trained:
        for parameter in backbone.parameters():
            torch.nn.init.normal_(parameter, std=0.2)
    return backbone


def random_codes(layout: CodeLayout | None, count: int, seed: int = 1) -> torch.Tensor | None:
    if layout is None:
        return None
    generator = torch.Generator().manual_seed(seed)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


def random_order(layout: CodeLayout, count: int, seed: int = 2) -> torch.Tensor:
    """(B, N), a permutation within each level."""
    generator = torch.Generator().manual_seed(seed)
    keys = torch.rand(count, layout.length, generator=generator)
    return torch.cat([span.start + keys[:, span].argsort(1) for span, _ in layout.spans()], 1)


def per_position(logits: list[torch.Tensor]) -> list[torch.Tensor]:
    return [level[:, i] for level in logits for i in range(level.shape[1])]


def changes(backbone: Backbone, codes: torch.Tensor, other: torch.Tensor, **known) -> list[bool]:
    """Whether the logits of each position differ between two sequences of codes; exactly or
    clearly."""
    labels = torch.ones(1, dtype=torch.int64)
    pairs = zip(
        per_position(backbone(codes, labels, **known)),
        per_position(backbone(other, labels, **known)),
    )
    distances = [float((a - b).detach().abs().max()) for a, b in pairs]
    assert all(distance < 2e-6 or distance > 1e-5 for distance in distances)
    return [distance > 1e-5 for distance in distances]


@LAYOUTS
@CAUSAL
@OPTIONS
def test_every_code_is_equally_likely_before_training(positions, conditioning, causal, layout):
    backbone = make(
        layout, causal=causal, trained=False, positions=positions, conditioning=conditioning
    )
    codes = random_codes(layout, 4)
    logits = backbone(codes, torch.arange(4))
    assert [level.shape for level in logits] == [
        (4, n, k) for n, k in zip(layout.lengths, layout.num_codes)
    ]
    assert all(level.dtype == torch.float32 and not level.any() for level in logits)
    nats = cross_entropy(layout, logits, codes).sum(1)
    torch.testing.assert_close(nats, torch.full((4,), layout.bits * math.log(2)))


@CAUSAL
@OPTIONS
def test_a_slot_has_unit_variance_before_training(positions, conditioning, causal):
    settings = {
        "positions": positions,
        "conditioning": conditioning,
        "dim": 256,
        "depth": 1,
        "heads": 4,
    }
    layout = CodeLayout(((16, 16),), (64,))
    backbone, seen = make(layout, causal=causal, trained=False, **settings), []
    backbone.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    backbone(random_codes(layout, 4), torch.arange(4))
    assert float(seen[0][:, 1:].detach().var()) == pytest.approx(1, abs=0.1)


@CAUSAL
def test_adaptive_blocks_are_the_identity_before_training(causal):
    backbone = make(
        TWO_LEVELS, causal=causal, given=GIVEN, trained=False, conditioning="adaln", dropout=0.0
    )
    seen = []
    backbone.dropout.register_forward_hook(lambda module, inputs, output: seen.append(output))
    backbone.norm.register_forward_pre_hook(lambda module, inputs: seen.append(inputs[0]))
    backbone(random_codes(TWO_LEVELS, 4), torch.arange(4), given=random_codes(GIVEN, 4))
    assert torch.equal(seen[0][:, -TWO_LEVELS.length :], seen[1])


@LAYOUTS
@pytest.mark.parametrize("ordered", [False, True], ids=["raster", "ordered"])
@OPTIONS
def test_causal_logits_see_the_codes_of_slots_before_and_no_other(
    positions, conditioning, ordered, layout
):
    backbone = make(layout, causal=True, positions=positions, conditioning=conditioning)
    codes, order = random_codes(layout, 1), random_order(layout, 1) if ordered else None
    turn = list(range(layout.length)) if order is None else order[0].tolist()
    for slot, position in enumerate(turn):
        other = codes.clone()
        other[0, position] = (other[0, position] + 1) % 4
        seen = changes(backbone, codes, other, order=order)
        assert [seen[later] for later in turn] == [False] * (slot + 1) + [True] * (
            layout.length - slot - 1
        )


@LAYOUTS
@OPTIONS
def test_bidirectional_logits_see_every_code_and_mask(positions, conditioning, layout):
    backbone = make(layout, causal=False, positions=positions, conditioning=conditioning)
    codes = random_codes(layout, 1)
    for position in range(layout.length):
        masked, other = codes.clone(), codes.clone()
        masked[0, position], other[0, position] = -1, (other[0, position] + 1) % 4
        assert all(changes(backbone, codes, other)) and all(changes(backbone, codes, masked))


@OPTIONS
def test_raster_is_an_order_like_any_other(positions, conditioning):
    backbone = make(TWO_LEVELS, causal=True, positions=positions, conditioning=conditioning)
    codes, labels = random_codes(TWO_LEVELS, 3), torch.arange(3)
    raster = torch.arange(TWO_LEVELS.length).expand(3, -1)
    for plain, ordered in zip(backbone(codes, labels), backbone(codes, labels, order=raster)):
        torch.testing.assert_close(ordered, plain)


@OPTIONS
def test_a_slot_knows_which_position_it_predicts_and_where_its_code_comes_from(
    positions, conditioning
):
    """Two orders that hold the same codes in a slot tell apart what is to come, and where the codes
    stand."""
    backbone = make(ONE_LEVEL, causal=True, positions=positions, conditioning=conditioning)
    codes, labels = torch.full((2, 6), 3), torch.zeros(2, dtype=torch.int64)
    first, second = backbone(
        codes, labels, order=torch.tensor([[0, 1, 2, 3, 4, 5], [5, 1, 2, 3, 4, 0]])
    )[0][:, 1]
    assert not torch.allclose(first, second, atol=1e-4)  # the code before is at 0, or at 5
    first, second = backbone(
        codes, labels, order=torch.tensor([[0, 1, 2, 3, 4, 5], [0, 5, 2, 3, 4, 1]])
    )[0]
    assert not torch.allclose(first[1], second[5], atol=1e-4)  # the target is 1, or 5


@LAYOUTS
@CAUSAL
@OPTIONS
def test_every_position_sees_every_given_code(positions, conditioning, causal, layout):
    backbone = make(
        layout, causal=causal, given=GIVEN, positions=positions, conditioning=conditioning
    )
    codes, labels, given = (
        random_codes(layout, 1),
        torch.ones(1, dtype=torch.int64),
        random_codes(GIVEN, 1),
    )
    plain = per_position(backbone(codes, labels, given=given))
    for position in range(GIVEN.length):
        other = given.clone()
        other[0, position] = (other[0, position] + 1) % 4
        moved = per_position(backbone(codes, labels, given=other))
        assert all(float((a - b).detach().abs().max()) > 1e-5 for a, b in zip(plain, moved))
    with pytest.raises(AssertionError, match="given"):
        backbone(codes, labels)


@CAUSAL
@OPTIONS
def test_the_class_matters_and_rows_of_a_batch_do_not_meet(positions, conditioning, causal):
    backbone = make(
        TWO_LEVELS, causal=causal, given=GIVEN, positions=positions, conditioning=conditioning
    )
    codes, given = random_codes(TWO_LEVELS, 1).expand(4, -1), random_codes(GIVEN, 1).expand(4, -1)
    whole = torch.cat(
        [level.flatten(1) for level in backbone(codes, torch.arange(4), given=given)], 1
    )
    assert (
        float(torch.pdist(whole.detach()).min()) > 1e-3
    )  # the unconditional label is one more class
    alone = backbone(codes[2:3], torch.tensor([2]), given=given[2:3])
    torch.testing.assert_close(
        torch.cat([level.flatten(1) for level in alone], 1), whole[2:3], atol=1e-5, rtol=0
    )


@CAUSAL
@OPTIONS
def test_every_weight_learns(positions, conditioning, causal):
    backbone = make(
        TWO_LEVELS, causal=causal, given=GIVEN, positions=positions, conditioning=conditioning
    ).train()
    codes = random_codes(TWO_LEVELS, 8)
    known = codes if causal else codes.masked_fill(torch.arange(TWO_LEVELS.length) % 2 == 0, -1)
    logits = backbone(known, torch.arange(8) % 4, given=random_codes(GIVEN, 8))
    cross_entropy(TWO_LEVELS, logits, codes).mean().backward()
    assert [
        name
        for name, weight in backbone.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ] == []


@pytest.mark.parametrize("conditioning", ["prefix", "adaln"])
def test_every_weight_of_a_timed_backbone_learns_and_rows_have_their_own_time(conditioning):
    backbone = make(TWO_LEVELS, causal=False, conditioning=conditioning, timed=True).train()
    codes, times = random_codes(TWO_LEVELS, 8), torch.linspace(0, 1, 8)
    known = codes.masked_fill(torch.arange(TWO_LEVELS.length) % 2 == 0, -1)
    cross_entropy(
        TWO_LEVELS, backbone(known, torch.arange(8) % 4, time=times), codes
    ).mean().backward()
    assert [
        name
        for name, weight in backbone.named_parameters()
        if weight.grad is None or not weight.grad.any()
    ] == []
    same, labels = known[:1].expand(8, -1), torch.ones(8, dtype=torch.int64)
    with torch.no_grad():
        whole = backbone.eval()(same, labels, time=times)[1].flatten(1)
        alone = backbone(same[:1], labels[:1], time=times[3:4])[1].flatten(1)
    assert float(torch.pdist(whole).min()) > 1e-3
    torch.testing.assert_close(whole[3:4], alone, atol=1e-5, rtol=0)
    with pytest.raises(AssertionError, match="time"):
        backbone(known, torch.arange(8) % 4)
    width = 32 if conditioning == "adaln" else 8
    assert backbone.blocks[0].modulation.weight.shape == (6 * 32, width)


@pytest.mark.parametrize("grids", [((4, 4), (8, 8)), ((2, 5), (2, 5)), ((16,),), ((2, 3, 4),)])
def test_places_are_distinct(grids):
    ids = _place_ids(CodeLayout(grids, (8,) * len(grids)))
    assert len(ids.unique(dim=0)) == len(ids) == sum(math.prod(grid) for grid in grids)


def test_rotary_angles_are_rows_and_columns_in_units_of_the_finest_grid():
    angles = _angles(CodeLayout(((2, 3), (4, 6)), (2, 2)), 8)
    fine, coarse = angles[6:].view(4, 6, 8), angles[:6].view(2, 3, 8)
    assert torch.equal(
        fine[..., 0], torch.arange(4.0)[:, None].expand(4, 6)
    )  # radians of the fastest pair: the row
    assert torch.equal(fine[..., 4], torch.arange(6.0).expand(4, 6))  # and the column
    assert torch.equal(angles[:, ::2], angles[:, 1::2])
    # pair t of n turns by 100^(-t / n), as in Heo et al.
    torch.testing.assert_close(fine[..., 2], 0.1 * fine[..., 0])
    means = fine.view(2, 2, 3, 2, 8).mean(
        (1, 3)
    )  # a coarse code stands amid the four fine ones under it
    torch.testing.assert_close(coarse, means)


def test_rotated_products_depend_on_displacement_alone():
    from x_transformers.x_transformers import apply_rotary_pos_emb

    angles = _angles(CodeLayout(((3, 5),), (2,)), 16)[None]
    query, key = torch.randn(2, 16, generator=torch.Generator().manual_seed(3))
    queries, keys = (
        apply_rotary_pos_emb(side.expand(1, 15, 16), angles)[0].view(3, 5, 16)
        for side in (query, key)
    )
    expected = queries[0, 0] @ keys[1, 2]
    torch.testing.assert_close(queries[1, 2] @ keys[2, 4], expected)
    assert not torch.isclose(queries[0, 0] @ keys[2, 1], expected, atol=1e-3)


def test_a_causal_backbone_computes_what_x_transformers_does_of_its_weights():
    layout = CodeLayout(((3, 5),), (11,))
    backbone = make(layout, causal=True, positions="learned", depth=3, heads=4)
    model, codes, labels = (
        x_transformers_of(backbone),
        random_codes(layout, 5),
        torch.tensor([0, 1, 2, 3, 0]),
    )
    sequence = torch.cat([11 + labels[:, None], codes[:, :-1]], 1)
    theirs = model(sequence, sum_embeds=backbone.classes(labels)[:, None])
    torch.testing.assert_close(backbone(codes, labels)[0], theirs, atol=1e-4, rtol=0)
    assert float(theirs.detach().std()) > 0.1


def test_a_backbone_copies():  # the loop averages a deep copy
    backbone = make(ONE_LEVEL, causal=True, given=GIVEN)
    assert list(copy.deepcopy(backbone).state_dict()) == list(backbone.state_dict())


@pytest.mark.parametrize(
    ("wrong", "named"),
    [
        ({"dim": 30}, "dim=30"),
        ({"depth": 0}, "depth=0"),
        ({"dim": 0}, "dim=0"),
        ({"heads": 0}, "heads=0"),
        ({"dropout": 1.5}, "prior.backbone.dropout=1.5"),
        (
            {"positions": "absolute"},
            "prior.backbone.positions='absolute' is not one of rotary, learned",
        ),
        ({"conditioning": "film"}, "prior.backbone.conditioning='film'"),
        ({"dim": 24}, "multiple of 4 for rotary"),
    ],
)
def test_config_errors_name_key_and_remedy(wrong, named):
    with pytest.raises(ValueError, match=named):
        BackboneConfig(**wrong)
    assert BackboneConfig(dim=24, positions="learned").dim == 24
    with pytest.raises(ValueError, match=r"prior\.label_dropout=1"):
        check_settings(label_dropout=1.0)
