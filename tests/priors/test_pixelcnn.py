"""Laws of the gated PixelCNN: no code sees what comes after it, and code by code is all at once."""

from __future__ import annotations

import math

import pytest
import torch

from priors.families.pixelcnn import PixelCNNConfig
from tokenizer.interface import CodeLayout

NUM_CLASSES = 3
GIVEN = CodeLayout(((2, 2),), (4,))
LAYOUTS = {
    "one_grid": CodeLayout(((5, 4),), (6,)),
    "row": CodeLayout(((9,),), (6,)),
    "volume": CodeLayout(((2, 3, 3),), (6,)),
    "residual": CodeLayout(((3, 4),) * 2, (6, 5)),
    "two_grids": CodeLayout(((2, 3), (4, 6)), (5, 6)),
}
OVER_LAYOUTS = pytest.mark.parametrize("layout", LAYOUTS.values(), ids=LAYOUTS)
OVER_GIVEN = pytest.mark.parametrize("given", [None, GIVEN], ids=["alone", "given"])


def network(layout, given=None, **settings):
    torch.manual_seed(0)
    settings = {"channels": 8, "depth": 3, "kernel": 3, "dropout": 0.0, **settings}
    network = PixelCNNConfig(**settings).build(layout, NUM_CLASSES, given).backbone
    for level in network.levels:
        torch.nn.init.normal_(level.head[-1].weight)
    return network.double().eval()


def random_codes(layout, count):
    generator = torch.Generator().manual_seed(1)
    sizes = zip(layout.lengths, layout.num_codes)
    return torch.cat([torch.randint(k, (count, n), generator=generator) for n, k in sizes], 1)


@OVER_LAYOUTS
@OVER_GIVEN
@pytest.mark.parametrize("kernel", [3, 5])
def test_decoding_code_by_code_equals_all_at_once(kernel, given, layout):
    whole = network(layout, given, kernel=kernel)
    codes, labels = random_codes(layout, 3), torch.tensor([0, 2, NUM_CLASSES])
    context = None if given is None else random_codes(given, 3)
    with torch.no_grad():
        full = [
            level[:, i]
            for level in whole(codes, labels, given=context)
            for i in range(level.shape[1])
        ]
        decoding = whole.decoding(labels, given=context)
        for slot, expected in enumerate(full):
            logits = decoding.step(slot, codes[:, slot - 1] if slot else None)
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kernel", [3, 5])
def test_gradients_reach_what_comes_before_and_nothing_else(kernel):
    """Of a deep enough network every code before, also to the upper right, where plain masks are
    blind."""
    layout, rows, columns = LAYOUTS["one_grid"], 5, 4
    level = network(layout, kernel=kernel, depth=5).levels[0]
    labels, codes = torch.tensor([1]), random_codes(layout, 1)
    found = torch.zeros(rows * columns, rows * columns)
    for position in range(rows * columns):
        embedded = level.codes(codes).detach().requires_grad_(True)
        hook = level.codes.register_forward_hook(lambda module, inputs, output, leaf=embedded: leaf)
        level(codes, level.condition(labels, []))[0, position].sum().backward()
        hook.remove()
        found[position] = embedded.grad[0].abs().sum(-1)
    assert torch.equal(found > 0, torch.ones_like(found).tril(-1).bool())


@OVER_LAYOUTS
def test_a_changed_code_changes_only_what_comes_after(layout):
    whole, codes, labels = (
        network(layout, depth=5, kernel=5),
        random_codes(layout, 1),
        torch.tensor([1]),
    )
    before = whole(codes, labels)
    for position in range(layout.length):
        changed = codes.clone()
        changed[:, position] = (changed[:, position] + 1) % 5
        for old, new, (span, _) in zip(before, whole(changed, labels), layout.spans()):
            moved = (old - new)[0].abs().amax(1) > 0
            assert not moved[: max(0, position + 1 - span.start)].any()
            assert moved.any() or position + 1 >= span.stop


def test_classes_and_given_codes_are_seen_everywhere():
    layout = LAYOUTS["one_grid"]
    whole, codes, labels = network(layout, GIVEN), random_codes(layout, 1), torch.tensor([1])
    given = random_codes(GIVEN, 1)
    logits = whole(codes, labels, given=given)[0]
    assert ((logits - whole(codes, labels + 1, given=given)[0]).abs().amax(-1) > 0).all()
    changed = given.clone()
    changed[0, 3] = (changed[0, 3] + 1) % 4  # the lower right quarter of the grid
    moved = (logits - whole(codes, labels, given=changed)[0]).abs().amax(-1).view(5, 4) > 0
    assert moved[3:, 2:].all() and not moved[0, 0]


def test_a_gate_is_tanh_times_sigmoid():
    """Eq. 2 of the paper, on a layer whose branches give 0.5 and -2 everywhere: tanh(0.5) / (1 +
    e^2)."""
    layer = network(LAYOUTS["row"], channels=1).levels[0].layers[0]
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.zero_()
        for branch, out in ((layer.down, layer.down_out), (layer.right, layer.right_out)):
            branch.bias.copy_(torch.tensor([0.5, -2.0]))
            out.weight.fill_(1)
        inputs, nothing = torch.zeros(1, 1, 2, 3).double(), torch.zeros(1, 1, 1, 1).double()
        down = layer.vertical(inputs, nothing)
        right = layer.horizontal(
            torch.zeros(1, 1, 1, 4).double(), torch.zeros(1, 1, 1, 3).double(), nothing
        )
    expected = math.tanh(0.5) / (1 + math.exp(2))
    torch.testing.assert_close(down, torch.full_like(down, expected))
    torch.testing.assert_close(right, torch.full_like(right, expected))


@pytest.mark.parametrize(
    "wrong", [{"kernel": 4}, {"kernel": 1}, {"channels": 0}, {"depth": 0}, {"dropout": 1.0}]
)
def test_settings_are_checked(wrong):
    with pytest.raises(ValueError, match=next(iter(wrong))):
        PixelCNNConfig(**wrong)
