"""Laws of decoding slot by slot: its logits are the backbone's, whatever the options, and so are
its samples."""

from __future__ import annotations

import contextlib
import copy
import gc
import itertools
import weakref
from unittest import mock

import pytest
import torch
from test_backbone import (
    GIVEN,
    LAYOUTS,
    NUM_CLASSES,
    ONE_LEVEL,
    OPTIONS,
    TWO_LEVELS,
    make,
    per_position,
    random_codes,
    random_order,
    x_transformers_of,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from priors.decoding import engine, packed
from priors.decoding.engine import CHUNK, Decoding
from priors.sampling.noise import categorical, gumbel
from tokenizer.interface import CodeLayout

ORDERED = pytest.mark.parametrize("ordered", [False, True], ids=["raster", "ordered"])
KNOWN = pytest.mark.parametrize("given", [None, GIVEN], ids=["alone", "given"])
LABELS = torch.tensor([0, 1, 2, 3, 0])  # 3 is the unconditional one
LONG = CodeLayout(((9, 11),), (6,))  # longer than a chunk


def decoded(backbone, codes, labels, order=None, given=None, **how) -> list[torch.Tensor]:
    """Logits of each slot, (B, num_codes) of its level, when the slots before it hold `codes`."""
    decoding, previous, logits = (
        Decoding(backbone, labels, order=order, given=given, **how),
        None,
        [],
    )
    for slot in range(backbone.layout.length):
        logits.append(decoding.step(slot, previous))
        previous = (
            codes[:, slot] if order is None else codes.gather(1, order[:, slot : slot + 1])[:, 0]
        )
    return logits


def assert_agreement(backbone, device="cpu", ordered=False, **how) -> None:
    """Logits of every slot within 1e-4 of those of the whole sequence."""
    layout, labels = backbone.layout, LABELS.to(device)
    codes, known = random_codes(layout, 5).to(device), random_codes(backbone.given, 5)
    known = None if known is None else known.to(device)
    order = random_order(layout, 5).to(device) if ordered else None
    with torch.no_grad():
        full = per_position(backbone(codes, labels, order=order, given=known))
    turn = torch.arange(layout.length).expand(5, -1) if order is None else order
    for slot, logits in enumerate(decoded(backbone, codes, labels, order, known, **how)):
        expected = torch.stack(
            [full[position][row] for row, position in enumerate(turn[:, slot].tolist())]
        )
        assert logits.dtype == torch.float32
        torch.testing.assert_close(logits, expected, atol=1e-4, rtol=0)
    assert float(expected.std()) > 0.1


@LAYOUTS
@KNOWN
@ORDERED
@OPTIONS
@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_decoding_equals_full_logits(static, positions, conditioning, ordered, given, layout):
    backbone = make(
        layout, causal=True, given=given, positions=positions, conditioning=conditioning
    )
    assert_agreement(backbone, ordered=ordered, static=static)


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
@pytest.mark.parametrize(
    "settings", [{"heads": 1}, {"heads": 8}, {"dim": 30, "heads": 2, "positions": "learned"}]
)
def test_decoding_of_many_slots_and_heads_of_any_size(settings, static):
    assert LONG.length > CHUNK
    assert_agreement(make(LONG, causal=True, given=GIVEN, **settings), static=static)


@OPTIONS
def test_decoding_with_large_matrices_in_the_processors_own_layout(
    positions, conditioning, monkeypatch
):
    monkeypatch.setattr(packed, "LARGE", 0)
    backbone = make(
        TWO_LEVELS, causal=True, given=GIVEN, positions=positions, conditioning=conditioning
    )
    matrices = packed.pack(backbone, LABELS, len(LABELS)).blocks[0]
    assert matrices.up.reordered == torch.backends.mkldnn.is_available()
    assert not packed.pack(backbone, LABELS, packed.FEW + 1).blocks[0].up.reordered
    assert_agreement(backbone)


@ORDERED
def test_samples_are_those_of_full_logits(ordered):
    backbone = make(TWO_LEVELS, causal=True, conditioning="adaln")
    labels, ids, length = torch.arange(64) % 4, torch.arange(64), TWO_LEVELS.length
    order = random_order(TWO_LEVELS, 64) if ordered else torch.arange(length).expand(64, -1)

    def sample(logits_at) -> torch.Tensor:
        codes = torch.full((64, length), -1)
        for slot in range(length):
            logits = logits_at(slot, codes).double()
            drawn = categorical(logits, gumbel(3, ids, slot, logits.shape[1:]))
            codes.scatter_(1, order[:, slot : slot + 1], drawn[:, None])
        return codes

    @torch.no_grad()
    def whole(slot: int, codes: torch.Tensor) -> torch.Tensor:
        span, logits = next(
            (span, level)
            for (span, _), level in zip(TWO_LEVELS.spans(), backbone(codes, labels, order=order))
            if slot < span.stop
        )
        return logits[torch.arange(64), order[:, slot] - span.start]

    decoding = backbone.decoding(labels, order=order if ordered else None)

    def stepwise(slot: int, codes: torch.Tensor) -> torch.Tensor:
        return decoding.step(
            slot, codes.gather(1, order[:, slot - 1 : slot])[:, 0] if slot else None
        )

    drawn = sample(whole)
    assert torch.equal(sample(stepwise), drawn) and len(drawn.unique(dim=0)) > 40


def test_greedy_codes_are_those_that_x_transformers_generates_with_its_cache():
    from x_transformers.autoregressive_wrapper import AutoregressiveWrapper

    layout = CodeLayout(((4, 5),), (11,))
    backbone = make(layout, causal=True, positions="learned", depth=3, heads=4)
    labels, codes, previous = torch.arange(16) % 4, [], None
    decoding = backbone.decoding(labels)
    for slot in range(layout.length):
        previous = decoding.step(slot, previous).argmax(-1)
        codes.append(previous)
    theirs = AutoregressiveWrapper(x_transformers_of(backbone)).generate(
        11 + labels[:, None],
        layout.length,
        temperature=0.0,
        cache_kv=True,
        sum_embeds=backbone.classes(labels)[:, None].detach(),
    )
    assert torch.equal(torch.stack(codes, 1), theirs) and len(theirs.unique()) > 3


@OPTIONS
def test_guidance_is_one_batch(positions, conditioning):
    backbone = make(ONE_LEVEL, causal=True, positions=positions, conditioning=conditioning)
    codes, unconditional = random_codes(ONE_LEVEL, 5), torch.full((5,), NUM_CLASSES)
    both = decoded(backbone, codes.repeat(2, 1), torch.cat([LABELS, unconditional]))
    apart = [decoded(backbone, codes, labels) for labels in (LABELS, unconditional)]
    for slot in range(ONE_LEVEL.length):
        torch.testing.assert_close(
            both[slot], torch.cat([side[slot] for side in apart]), atol=1e-5, rtol=0
        )


@pytest.mark.parametrize("static", [False, True], ids=["growing", "static"])
def test_the_cache_stays_where_it_is_and_a_row_is_written_once(static):
    backbone, codes = make(ONE_LEVEL, causal=True, given=GIVEN), random_codes(ONE_LEVEL, 5)
    decoding, previous = (
        Decoding(backbone, LABELS, given=random_codes(GIVEN, 5), static=static),
        None,
    )
    addresses = [part.data_ptr() for pair in decoding.cache for part in pair]
    for slot in range(ONE_LEVEL.length):
        before = [part.clone() for pair in decoding.cache for part in pair]
        decoding.step(slot, previous)
        previous = codes[:, slot]
        for old, new in zip(before, itertools.chain(*decoding.cache)):
            written = (old != new).any(-1).any(0).any(0)
            assert written.nonzero().flatten().tolist() == [GIVEN.length + slot]
    assert addresses == [part.data_ptr() for pair in decoding.cache for part in pair]


def test_slots_come_in_order():
    decoding = make(ONE_LEVEL, causal=True).decoding(LABELS)
    decoding.step(0, None)
    with pytest.raises(AssertionError, match="slot 1 is next"):
        decoding.step(2, LABELS)
    with pytest.raises(AssertionError, match="causal"):
        make(ONE_LEVEL, causal=False).decoding(LABELS)


def test_weights_are_read_when_decoding_begins_and_are_left_as_they_were():
    backbone, codes = make(TWO_LEVELS, causal=True).train(), random_codes(TWO_LEVELS, 5)
    addresses = {weight.data_ptr() for weight in backbone.parameters()}
    assert not addresses & {
        part.data_ptr() for part in Decoding(backbone, LABELS).weights.tensors()
    }
    state = {name: value.clone() for name, value in backbone.state_dict().items()}
    first = decoded(backbone, codes, LABELS)
    assert backbone.training and all(
        torch.equal(value, state[name]) for name, value in backbone.state_dict().items()
    )
    assert all(
        torch.equal(a, b) for a, b in zip(first, decoded(backbone, codes, LABELS))
    )  # no dropout
    with torch.no_grad():
        backbone.blocks[0].attention.to_v.weight.mul_(2)
    assert not torch.allclose(first[0], decoded(backbone, codes, LABELS)[0])


def test_no_rows_give_no_rows():
    logits = decoded(make(ONE_LEVEL, causal=True), random_codes(ONE_LEVEL, 0), LABELS[:0])
    assert [level.shape for level in logits] == [(0, 7)] * 6


@OPTIONS
def test_autocast_sets_the_precision(positions, conditioning):
    backbone = make(
        TWO_LEVELS, causal=True, given=GIVEN, positions=positions, conditioning=conditioning
    )
    codes, known = random_codes(TWO_LEVELS, 5), random_codes(GIVEN, 5)
    exact = decoded(backbone, codes, LABELS, given=known)
    with torch.autocast("cpu", torch.bfloat16):
        assert Decoding(backbone, LABELS, given=known).cache[0][0].dtype == torch.bfloat16
        low = decoded(backbone, codes, LABELS, given=known)
    for a, b in zip(exact, low):
        assert b.dtype == torch.float32 and 0 < float((a - b).abs().max()) < 0.15


class Tape(TorchDispatchMode):
    """A CUDA graph that is not there: the operations of a step, repeated on the tensors that they
    had, into those that they made. It knows no more of Python than a graph does."""

    def __init__(self) -> None:
        super().__init__()
        self.calls = []

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        made = func(*args, **(kwargs or {}))
        self.calls.append((func, args, kwargs or {}, made))
        return made

    @torch.no_grad()
    def replay(self) -> None:
        for func, args, kwargs, made in self.calls:
            for old, new in zip(tree_leaves(made), tree_leaves(func(*args, **kwargs))):
                if isinstance(old, torch.Tensor) and old.data_ptr() != new.data_ptr():
                    old.copy_(new)


@pytest.fixture
def captured(monkeypatch) -> list[Tape]:
    """The graphs, in the order of their capture."""
    tapes = []

    def capture(step, pool):
        step()
        with Tape() as tape:
            result = step()
        tapes.append(tape)
        return lambda: tape.replay() or result

    monkeypatch.setattr(engine, "capture", capture)
    return tapes


@ORDERED
@KNOWN
@OPTIONS
def test_graphs_are_captured_once_and_serve_later_batches(
    captured, positions, conditioning, given, ordered
):
    """Batches differ in labels, orders, given codes, and the last in the network's weights, too."""
    backbone = make(LONG, causal=True, given=given, positions=positions, conditioning=conditioning)
    for batch in range(3):
        torch.manual_seed(batch)
        if batch == 2:
            with torch.no_grad():
                for weight in backbone.parameters():
                    weight.add_(0.05 * torch.randn_like(weight))
        labels, codes, known = torch.randint(4, (5,)), random_codes(LONG, 5), random_codes(given, 5)
        order = random_order(LONG, 5) if ordered else None
        kept = [weight.clone() for weight in backbone.parameters()]
        with torch.no_grad():
            full = per_position(backbone(codes, labels, order=order, given=known))
        found = torch.stack(decoded(backbone, codes, labels, order, known, static=True), 1)
        expected = torch.stack(full, 1)
        if ordered:
            expected = expected.gather(1, order[..., None].expand_as(expected))
        torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)
        assert all(torch.equal(*pair) for pair in zip(kept, backbone.parameters()))
        assert len(captured) == -(-(LONG.length + (given.length if given else 0)) // CHUNK) == 2


def test_a_batch_that_was_not_finite_leaves_nothing_to_the_next(captured):
    backbone, codes = make(ONE_LEVEL, causal=True), random_codes(ONE_LEVEL, 5)
    expected = decoded(backbone, codes, LABELS)
    with torch.no_grad():
        weight = backbone.blocks[0].attention.to_v.weight
        kept = weight.clone()
        weight.fill_(torch.nan)
        assert decoded(backbone, codes, LABELS, static=True)[-1].isnan().all()
        weight.copy_(kept)
    for ours, theirs in zip(decoded(backbone, codes, LABELS, static=True), expected):
        torch.testing.assert_close(ours, theirs, atol=1e-4, rtol=0)


def test_two_shapes_stay_and_the_least_recently_used_goes(captured):
    backbone = make(ONE_LEVEL, causal=True)

    def captures(batch: int) -> int:
        before = len(captured)
        decoded(
            backbone,
            random_codes(ONE_LEVEL, batch),
            torch.zeros(batch, dtype=torch.int64),
            static=True,
        )
        return len(captured) - before

    assert engine.KEPT == 2
    assert [captures(batch) for batch in (3, 4, 3, 4, 3, 5, 3, 5, 4)] == [1, 1, 0, 0, 0, 1, 0, 0, 1]
    with torch.autocast("cpu", torch.bfloat16):
        assert captures(4) == 1
    engine.forget(torch.nn.Sequential(backbone))
    assert captures(4) == 1 and len(engine._statics[backbone]) == 1
    assert captures(4) == 0


def test_what_is_kept_goes_with_the_backbone_and_belongs_to_one_batch_at_a_time(captured):
    backbone, other = make(ONE_LEVEL, causal=True), make(ONE_LEVEL, causal=True)
    first, second = Decoding(backbone, LABELS, static=True), Decoding(other, LABELS, static=True)
    first.step(0, None), second.step(0, None)
    Decoding(backbone, LABELS, static=True)
    with pytest.raises(AssertionError, match="another batch has begun"):
        first.step(1, LABELS)
    second.step(1, LABELS)
    copy.deepcopy(backbone)
    gone = weakref.ref(next(iter(engine._statics[other].values())))
    del other, second
    gc.collect()
    assert gone() is None and backbone in engine._statics


def test_a_capture_lets_other_threads_allocate(monkeypatch):
    """What is asked of torch.cuda, which is not there."""
    asked, steps = [], []

    class Graph:
        def replay(self):
            asked.append("replay")

    @contextlib.contextmanager
    def graph(graph, **settings):
        asked.append((type(graph), settings))
        yield

    cuda = mock.MagicMock(CUDAGraph=Graph, graph=graph)
    monkeypatch.setattr(torch, "cuda", cuda)
    replay = engine.capture(lambda: steps.append(1) or len(steps), "pool")
    assert (
        asked == [(Graph, {"pool": "pool", "capture_error_mode": "thread_local"})]
        and len(steps) == 2
    )
    assert [replay(), replay()] == [2, 2] and asked[1:] == ["replay", "replay"] and len(steps) == 2


@pytest.mark.gpu
@KNOWN
@ORDERED
@OPTIONS
def test_replayed_graphs_equal_full_logits(positions, conditioning, ordered, given):
    for layout in (TWO_LEVELS, LONG):
        backbone = make(
            layout, causal=True, given=given, positions=positions, conditioning=conditioning
        )
        backbone.to("cuda")
        for _ in range(2):  # the second batch meets the graphs of the first
            assert_agreement(backbone, "cuda", ordered=ordered)
