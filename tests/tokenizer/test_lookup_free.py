"""Laws and oracles of the quantizers without a learned L2 codebook: FSQ, LFQ and BSQ, IBQ,
Gumbel-softmax."""

from __future__ import annotations

import dataclasses
import itertools
import math

import pytest
import torch
import torch.nn.functional as F

from tokenizer.quantizers import ibq, search_on_cpu
from tokenizer.quantizers.codebook import to_rows
from tokenizer.quantizers.fsq import FSQConfig
from tokenizer.quantizers.gumbel import GumbelConfig
from tokenizer.quantizers.ibq import IBQConfig, SoftAssignment
from tokenizer.quantizers.lookup_free import (
    BSQConfig,
    LookupFreeConfig,
    entropy_of_mean,
    mean_joint_probabilities,
)
from training import config as configuration
from training import distributed, randomness

DIM = 4
CASES = {
    "fsq": FSQConfig(levels=(5, 4, 3, 8)),
    "lfq": LookupFreeConfig(bits=DIM, temperature=1.0),
    "bsq": BSQConfig(bits=DIM),
    "ibq": IBQConfig(num_codes=12, code_dim=DIM, entropy_temperature=1.0),
    "gumbel": GumbelConfig(num_codes=12, code_dim=DIM, anneal_steps=10),
    "gumbel-hard": GumbelConfig(num_codes=12, code_dim=DIM, anneal_steps=10, hard=True),
}


@pytest.fixture(params=CASES)
def config(request):
    return CASES[request.param]


def build(config, **changes):
    torch.manual_seed(0)
    return dataclasses.replace(config, **changes).build()


def features(seed=1, batch=6, dim=DIM, scale=1.0):
    return scale * torch.randn(batch, dim, 3, 2, generator=torch.Generator().manual_seed(seed))


def state(quantizer):
    return {name: tensor.clone() for name, tensor in quantizer.state_dict().items()}


def entropy(probabilities):
    return -(
        probabilities * probabilities.clamp(min=torch.finfo(probabilities.dtype).tiny).log()
    ).sum(-1)


def signs(bits):
    """All codes of `bits` channels in order, (2**bits, bits) of +-1."""
    return torch.tensor(list(itertools.product((-1.0, 1.0), repeat=bits)), dtype=torch.float64)


# laws of all


@pytest.mark.parametrize("mode", ["train", "eval"])
def test_lookup_gives_what_forward_gave(config, mode):
    quantizer = getattr(build(config), mode)()
    output = quantizer(features())
    assert output.codes.shape == (6, 1, 3, 2) and output.codes.dtype == torch.int64
    assert output.vectors.shape == (6, DIM, 3, 2) and output.vectors.dtype == torch.float32
    assert output.loss.shape == () and {"usage", "perplexity"} <= output.parts.keys()
    assert all(part.shape == () for part in output.parts.values())
    (num_codes,) = quantizer.num_codes
    assert (
        quantizer.dim == DIM
        and 0 <= int(output.codes.min())
        and int(output.codes.max()) < num_codes
    )
    mixtures = isinstance(config, GumbelConfig) and not config.hard and mode == "train"
    assert torch.equal(quantizer.lookup(output.codes), output.vectors) != mixtures


def test_every_code_has_a_vector_of_its_own(config):
    quantizer = build(config).eval()
    (num_codes,) = quantizer.num_codes
    rows = to_rows(quantizer.lookup(torch.arange(num_codes).view(1, 1, num_codes, 1)))
    assert len(rows.unique(dim=0)) == num_codes


def test_autocast_and_low_precision_change_nothing(config):
    quantizer = build(config).eval()
    given = features().bfloat16()
    plain = quantizer(given.float())
    with torch.autocast("cpu", torch.bfloat16):
        low = quantizer(given)
        assert torch.equal(quantizer.lookup(low.codes), plain.vectors)
    assert torch.equal(low.codes, plain.codes) and torch.equal(low.vectors, plain.vectors)
    assert torch.equal(low.loss, plain.loss)


def test_gradients_are_the_same_under_autocast(config):
    quantizer, gradients = build(config).train(), []
    for low in (False, True):
        quantizer.zero_grad()
        given = features().requires_grad_()
        torch.manual_seed(3)
        with torch.autocast("cpu", torch.bfloat16, enabled=low):
            output = quantizer(given)
        (output.vectors.square().sum() + output.loss).backward()
        gradients.append([given.grad] + [parameter.grad for parameter in quantizer.parameters()])
    assert all(torch.equal(*pair) for pair in zip(*gradients))


def test_gradients_reach_the_features_and_all_that_learns(config):
    quantizer = build(config).train()
    given = features().requires_grad_()
    output = quantizer(given)
    ((output.vectors + 2).square().sum() + output.loss).backward()
    assert given.grad.isfinite().all() and given.grad.abs().min() > 0
    for name, parameter in quantizer.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.abs().sum() > 0, name


def test_the_size_of_chunks_changes_nothing(config, monkeypatch):
    results = []
    for budget in (search_on_cpu.BUDGET, 1, 100):
        monkeypatch.setattr(search_on_cpu, "BUDGET", budget)
        quantizer, given = build(config).train(), features().requires_grad_()
        torch.manual_seed(3)
        output = quantizer(given)
        (output.vectors.square().sum() + output.loss).backward()
        results.append(
            [output.vectors, output.loss, given.grad, *(p.grad for p in quantizer.parameters())]
        )
    for other in results[1:]:
        torch.testing.assert_close(other, results[0])


@pytest.mark.parametrize("kind", ["ibq", "gumbel"])
@pytest.mark.parametrize(("budget", "most"), [(1, 1), (60, 5), (search_on_cpu.BUDGET, 36)])
def test_chunks_are_as_long_as_the_budget_allows(kind, budget, most, monkeypatch):
    """Of 36 rows with 12 products each: at least a row at once, and each row once."""
    monkeypatch.setattr(search_on_cpu, "BUDGET", budget)
    quantizer, given = build(CASES[kind]).train(), features()
    if kind == "ibq":
        parts = ibq._parts(to_rows(given), quantizer.codebook)
        lengths = [len(to_rows(given)[part]) for part in parts]
    else:
        lengths, choose = [], quantizer._choose
        monkeypatch.setattr(
            quantizer, "_choose", lambda rows, keys: lengths.append(len(rows)) or choose(rows, keys)
        )
        quantizer(given)
    assert sum(lengths) == 36 and max(lengths) == most and len(lengths) == math.ceil(36 / most)


def test_update_adds_up_micro_batches_and_a_skipped_step_leaves_no_trace(config):
    whole, parts = build(config).train(), build(config).train()
    before = state(whole)
    whole(features(seed=5))
    whole.update(0, False)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(whole).items())
    given = features(batch=8)
    for quantizer, batches in ((whole, [given]), (parts, given.split(2))):
        if isinstance(config, GumbelConfig):
            quantizer.eval()  # no noise: the same codes
            codes = [quantizer(batch).codes for batch in batches]
            quantizer.statistics.gather(torch.cat(codes))
        else:
            for batch in batches:
                quantizer(batch)
        quantizer.update(1, True)
    assert float(whole.statistics.usage.sum()) == 48
    assert all(
        torch.equal(tensor, parts.state_dict()[name]) for name, tensor in state(whole).items()
    )


def test_evaluation_gathers_nothing(config):
    quantizer = build(config).eval()
    assert "batch_entropy" not in quantizer(features()).parts  # nor does it wait for other ranks
    assert not quantizer.statistics.counts.any()


def test_state_goes_on_where_it_stopped(config):
    first, second = build(config).train(), build(config).train()
    for step in range(3):
        first(features(seed=step))
        first.update(step, True)
    second.load_state_dict(state(first))
    outputs = []
    for quantizer in (first, second):
        torch.manual_seed(9)
        outputs.append(quantizer(features(seed=9)))
        quantizer.update(3, True)
    assert torch.equal(outputs[0].vectors, outputs[1].vectors)
    assert all(
        torch.equal(tensor, second.state_dict()[name]) for name, tensor in state(first).items()
    )


def test_initialise_changes_only_what_was_asked_for(config):
    quantizer = build(config)
    before = state(quantizer)
    quantizer.initialise(torch.randn(100, DIM), seed=0)
    assert all(torch.equal(tensor, before[name]) for name, tensor in state(quantizer).items())


@pytest.mark.parametrize(
    ("kind", "wrong", "message"),
    [
        (FSQConfig, {"levels": (8, 2)}, "quantizer.levels"),
        (FSQConfig, {"levels": ()}, "quantizer.levels"),
        (FSQConfig, {"levels": (8, 1000)}, "quantizer.levels"),
        (FSQConfig, {"levels": (257, 256, 256)}, "fewer channels"),
        (LookupFreeConfig, {"bits": 25}, "quantizer.bits=25"),
        (LookupFreeConfig, {"bits": 0}, "quantizer.bits=0"),
        (LookupFreeConfig, {"temperature": 0.0}, "quantizer.temperature=0.0.*0.01 is usual"),
        (BSQConfig, {"temperature": 0.0}, "quantizer.temperature=0.0.*1.0 is usual"),
        (BSQConfig, {"bits": 0}, "quantizer.bits=0"),
        (BSQConfig, {"entropy_boost": 0.5}, "quantizer.entropy_boost=0.5"),
        (IBQConfig, {"init": "zeros"}, "normal, kmeans"),
        (IBQConfig, {"entropy_temperature": -1.0}, "quantizer.entropy_temperature=-1.0"),
        (IBQConfig, {"temperature": 0.0}, "quantizer.temperature=0.0"),
        (GumbelConfig, {"temperature_end": 2.0}, "quantizer.temperature_end=2.0"),
        (GumbelConfig, {"temperature_end": 0.0}, "quantizer.temperature_end=0.0"),
        (GumbelConfig, {"anneal_steps": 0}, "quantizer.anneal_steps=0"),
        (GumbelConfig, {"vector_dim": 0}, "quantizer.vector_dim=0"),
    ],
)
def test_values_out_of_range_are_refused(kind, wrong, message):
    with pytest.raises(ValueError, match=message):
        kind(**wrong)


def test_the_outermost_values_are_taken():
    for levels in ((3,), (999,), (256, 256, 256)):
        assert FSQConfig(levels=levels).levels == levels
    for kind, bits in itertools.product((LookupFreeConfig, BSQConfig), (1, 24)):
        assert kind(bits=bits).bits == bits
    assert GumbelConfig(temperature_end=1.0, anneal_steps=1).build().temperature == 1
    assert GumbelConfig(vector_dim=1).vector_dim == 1
    assert IBQConfig(temperature=1e-9, entropy_temperature=1e-9).temperature == 1e-9


@pytest.mark.parametrize(
    ("config", "raw"),
    [(FSQConfig, {"levels": [3, 4]}), (LookupFreeConfig, {"bits": 3}), (BSQConfig, {"bits": 3})],
)
def test_configurations_come_from_files(config, raw):
    quantizer = configuration.from_dict(config, raw, "a.yaml").build()
    assert quantizer.num_codes == (math.prod(raw.get("levels", [8])),)


# finite scalar quantization


@pytest.mark.parametrize(
    "levels", [(8, 5, 5, 5), (3,), (4, 4, 4), (7, 5, 9), (8, 6, 3, 5, 10), (16, 15, 999)]
)
def test_fsq_is_that_of_vector_quantize_pytorch(levels):
    theirs = pytest.importorskip("vector_quantize_pytorch").FSQ(list(levels))
    ours = FSQConfig(levels=levels).build()
    for scale in (0.1, 1.0, 10.0):
        given = features(batch=50, dim=len(levels), scale=scale).requires_grad_()
        output, (vectors, codes) = ours(given), theirs(given)
        assert torch.equal(output.codes[:, 0], codes.long())
        torch.testing.assert_close(output.vectors, vectors, atol=1e-6, rtol=0)
        weights = torch.randn_like(vectors)
        gradients = [
            torch.autograd.grad((made * weights).sum(), given)[0]
            for made in (output.vectors, vectors)
        ]
        torch.testing.assert_close(*gradients)


def test_fsq_levels_and_digits_are_known():
    quantizer = FSQConfig(levels=(4, 3)).build()
    ends = quantizer(
        torch.tensor([[-9.0, -9.0], [9.0, 9.0], [0.0, 0.0], [9.0, -9.0]])[:, :, None, None]
    )
    assert ends.codes.flatten().tolist() == [0, 11, 2 + 4 * 1, 3]
    assert ends.vectors.flatten(1).tolist() == [[-1, -1], [0.5, 1], [0, 0], [0.5, -1]]
    assert float(ends.loss) == 0


# lookup-free quantization


@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("bits", [1, 3, 10])
def test_codes_are_those_of_vector_quantize_pytorch(bits, spherical):
    theirs = (
        pytest.importorskip("vector_quantize_pytorch").LFQ(dim=bits, spherical=spherical).eval()
    )
    ours = LookupFreeConfig(bits=bits, spherical=spherical).build()
    given = features(dim=bits, batch=50)
    output, expected = ours(given), theirs(given)
    assert torch.equal(output.codes[:, 0], expected.indices.long())
    torch.testing.assert_close(output.vectors, expected.quantized, atol=1e-6, rtol=0)


@pytest.mark.parametrize("temperature", [4.0, 0.5, 0.01])
@pytest.mark.parametrize("spherical", [False, True])
@pytest.mark.parametrize("bits", [1, 2, 5, 8])
def test_entropies_and_their_gradients_are_those_of_all_codes(bits, spherical, temperature):
    config = LookupFreeConfig(
        bits=bits, spherical=spherical, temperature=temperature, commitment=0.0, entropy=1.0
    )
    given = features(dim=bits, scale=0.3).requires_grad_()
    output = dataclasses.replace(config, diversity=0.7).build()(given)
    (gradient,) = torch.autograd.grad(output.loss, given)

    rows = to_rows(given.double())
    rows = F.normalize(rows, dim=1) if spherical else rows
    book = signs(bits) * (bits**-0.5 if spherical else 1)
    q = (-(rows[:, None] - book).square().sum(-1) / temperature).softmax(1)
    sample, mean = entropy(q).mean(), q.mean(0)
    if spherical:  # of each bit alone
        ones = mean @ (book > 0).double()
        batch = entropy(torch.stack([ones, 1 - ones], dim=1)).sum()
    else:
        batch = entropy(mean)
    torch.testing.assert_close(
        output.parts["sample_entropy"].double(), sample, atol=1e-5, rtol=1e-5
    )
    torch.testing.assert_close(output.parts["batch_entropy"].double(), batch, atol=1e-5, rtol=1e-5)
    (expected,) = torch.autograd.grad(sample - 0.7 * batch, given)
    torch.testing.assert_close(gradient, expected, atol=1e-5, rtol=1e-4)


def test_joint_probabilities_are_indexed_by_code():
    logits = torch.randn(7, 5)
    joint = mean_joint_probabilities(logits)
    for code in (0, 1, 16, 21, 31):
        bits = torch.tensor([code >> place & 1 for place in (4, 3, 2, 1, 0)])
        expected = torch.where(bits > 0, logits.sigmoid(), (-logits).sigmoid()).prod(1).mean()
        torch.testing.assert_close(joint[code], expected)
    assert float(joint.sum()) == pytest.approx(1)


def test_independent_bits_bound_the_joint_entropy():
    logits = torch.randn(50, 1) + 0.1 * torch.randn(50, 6)  # bits that go together
    ones = logits.sigmoid().mean(0)
    apart = entropy(torch.stack([ones, 1 - ones], dim=1)).sum()
    assert float(entropy_of_mean(mean_joint_probabilities(logits))) < float(apart)


@pytest.mark.parametrize("bits", [17, 20])
def test_large_codebooks_are_exact(bits):
    """Positions at corners that are all different: each is certain, and the batch has log N
    nats."""
    quantizer = LookupFreeConfig(bits=bits).build()
    corners = torch.randint(2**bits, (64,), generator=torch.Generator().manual_seed(0)).unique()
    output = quantizer(quantizer.lookup(corners[:, None, None, None]))
    assert torch.equal(output.codes.flatten(), corners)
    assert float(output.parts["sample_entropy"]) == pytest.approx(0, abs=1e-6)
    assert float(output.parts["batch_entropy"]) == pytest.approx(math.log(len(corners)), abs=1e-4)


def test_the_mean_over_ranks_is_that_of_one_batch(monkeypatch):
    """The entropy is the whole batch's, and gradients averaged over ranks are its gradients."""
    logits = torch.randn(12, 3)
    whole = logits.clone().requires_grad_()
    value = entropy_of_mean(mean_joint_probabilities(whole))
    value.backward()
    mean = mean_joint_probabilities(logits)
    monkeypatch.setattr(distributed, "mean_", lambda tensor: tensor.copy_(mean))
    for rank in range(3):
        own = logits[4 * rank : 4 * rank + 4].clone().requires_grad_()
        ours = entropy_of_mean(mean_joint_probabilities(own))
        ours.backward()
        torch.testing.assert_close(ours, value)
        torch.testing.assert_close(own.grad / 3, whole.grad[4 * rank : 4 * rank + 4])


def authors_bsq(z, step):
    """The authors' quantizer and the weight that their loss gives it, (N, d) float64: vectors,
    their loss.

    With the settings of their configurations: commitment 0, both entropies 1, inverse temperature
    1, bit by bit.
    """
    d = z.shape[1]
    z = z / z.norm(dim=1, keepdim=True)
    signs = torch.where(z > 0, 1.0, -1.0).double()
    vectors = (z + (signs - z).detach()) / d**0.5
    ones = 1 / (1 + (-4 * z / d**0.5).exp())
    p = torch.stack([1 - ones, ones], dim=-1)
    sample, batch = (-(p * p.log()).sum((1, 2)).mean(), -(p.mean(0) * p.mean(0).log()).sum())
    rate = min(2000, step) / 2000
    return vectors, 0.1 * (rate + 3 * (1 - rate)) * (sample - batch)


@pytest.mark.parametrize("step", [0, 1, 500, 1999, 2000, 2001, 9000])
def test_bsq_is_that_of_its_authors(step):
    quantizer, given = BSQConfig(bits=9).build().train(), features(dim=9).requires_grad_()
    if step:
        quantizer(features(dim=9))
        quantizer.update(step - 1, True)
    output = quantizer(given)
    vectors, loss = authors_bsq(to_rows(given.double()), step)
    torch.testing.assert_close(to_rows(output.vectors).double(), vectors, atol=1e-6, rtol=0)
    torch.testing.assert_close(output.loss.double(), loss, atol=1e-6, rtol=1e-5)
    weights = torch.randn(36, 9)
    (ours,) = torch.autograd.grad((to_rows(output.vectors) * weights).sum() + output.loss, given)
    (theirs,) = torch.autograd.grad((vectors * weights).sum() + loss, given)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)


def test_the_boost_of_entropies_is_kept_and_a_skipped_step_leaves_it():
    quantizer, again = (
        BSQConfig(bits=3, entropy_boost=2.0, entropy_boost_steps=4).build().train() for _ in "ab"
    )
    seen = []
    for step in range(6):
        seen.append(float(quantizer.boost))
        quantizer.update(step, False)
        assert float(quantizer.boost) == seen[-1]
        quantizer.update(step, True)
        again.load_state_dict(quantizer.state_dict())
        assert torch.equal(again.boost, quantizer.boost)
    assert seen == [2.0, 1.75, 1.5, 1.25, 1.0, 1.0]
    once = BSQConfig(bits=3, entropy_boost=2.0, entropy_boost_steps=1).build()
    once.update(0, True)
    assert float(once.boost) == 1
    constant = [
        BSQConfig(bits=3, entropy_boost=1.0),
        BSQConfig(bits=3, entropy_boost_steps=0),
        LookupFreeConfig(bits=3),
    ]
    for quantizer in (config.build() for config in constant):
        quantizer.update(0, True)
        assert float(quantizer.boost) == 1 and "boost" not in quantizer.state_dict()


def test_bits_pass_gradients_by_and_the_sphere_projects_them():
    given = features().requires_grad_()
    build(CASES["lfq"])(given).vectors.mul(3).sum().backward()
    assert torch.equal(given.grad, torch.full_like(given, 3))
    given.grad = None
    output = build(CASES["bsq"])(given)
    output.vectors.square().mul(torch.arange(4.0)[:, None, None]).sum().backward()
    torch.testing.assert_close(output.vectors.norm(dim=1), torch.ones(6, 3, 2))
    torch.testing.assert_close(
        (given.grad * given.detach()).sum(1), torch.zeros(6, 3, 2), atol=1e-6, rtol=0
    )


# index backpropagation


def ibq_by_hand(given, book, config):
    """The paper's equations with the whole one-hot, in float64: vectors, codes, loss."""
    rows = to_rows(given.double())
    logits = rows @ book.T
    p = (logits / config.temperature).softmax(1)
    codes = logits.argmax(1)
    hard = F.one_hot(codes, len(book)).double()
    vectors, chosen = (hard - p.detach() + p) @ book, hard @ book
    loss = F.mse_loss(vectors, rows) + config.commitment * F.mse_loss(rows, chosen.detach())
    loss = loss + config.attraction * F.mse_loss(chosen, rows.detach())
    q = (logits / config.entropy_temperature).softmax(1)
    return vectors, codes, loss + config.entropy * (entropy(q).mean() - entropy(q.mean(0)))


@pytest.mark.parametrize(
    "changes", [{}, {"entropy": 0.0}, {"temperature": 3.0, "attraction": 0.6, "entropy": 0.5}]
)
def test_ibq_is_the_papers_equations(monkeypatch, changes):
    monkeypatch.setattr(search_on_cpu, "BUDGET", 12 * 5)  # five rows at once
    config = dataclasses.replace(CASES["ibq"], **changes)
    quantizer, given = build(config), features().requires_grad_()
    book = quantizer.codebook.detach().double().requires_grad_()
    output = quantizer(given)
    vectors, codes, loss = ibq_by_hand(given, book, config)
    assert torch.equal(output.codes.flatten(), codes)
    torch.testing.assert_close(to_rows(output.vectors).double(), vectors)
    torch.testing.assert_close(output.loss.double(), loss)
    weights = torch.randn(36, DIM)
    ours = torch.autograd.grad(
        (to_rows(output.vectors) * weights).sum() + output.loss, [given, quantizer.codebook]
    )
    theirs = torch.autograd.grad((vectors * weights).sum() + loss, [given, book])
    for mine, expected in zip(ours, theirs):
        torch.testing.assert_close(mine.double(), expected.double(), atol=1e-5, rtol=1e-4)


def test_assignment_is_the_mean_of_all_rows():
    rows, book = torch.randn(30, DIM), torch.randn(9, DIM)
    q = (2 * rows @ book.T).softmax(1)
    sample, mean = SoftAssignment.apply(rows, book, 2.0)
    torch.testing.assert_close(sample, entropy(q).mean())
    torch.testing.assert_close(mean, q.mean(0))


def test_equal_products_go_to_the_lowest_index():
    quantizer = IBQConfig(num_codes=3, code_dim=2).build()
    with torch.no_grad():
        quantizer.codebook.copy_(torch.tensor([[0.0, 1.0], [1.0, 0.0], [1.0, 5.0]]))
    given = torch.tensor([[2.0, 0.0], [1.0, -1.0], [0.0, 0.0]])[:, :, None, None]
    assert quantizer(given).codes.flatten().tolist() == [1, 1, 0]


def test_ibq_starts_from_data_if_asked():
    quantizer = build(CASES["ibq"], init="kmeans")
    centres = 5 * torch.eye(12)[:, :3]
    rows = torch.cat([centres[:3]] * 40) + 0.01 * torch.randn(120, 3)
    mixing = torch.linalg.qr(torch.randn(DIM, 3)).Q
    quantizer.initialise(rows, seed=0, project=lambda rows: rows @ mixing.T)
    distances = torch.cdist(centres[:3] @ mixing.T, quantizer.codebook.detach())
    assert distances.min(1).values.max() < 0.05


def test_ibq_codes_that_were_not_chosen_learn():
    quantizer = build(CASES["ibq"], entropy=0.0, num_codes=64).train()
    output = quantizer(features(batch=1))
    output.vectors.square().sum().backward()
    never = torch.ones(64, dtype=torch.bool)
    never[output.codes.flatten()] = False
    assert never.sum() > 50 and quantizer.codebook.grad[never].abs().amax(1).min() > 0


# Gumbel-softmax


def test_gumbel_evaluates_without_noise():
    quantizer = build(CASES["gumbel"]).eval()
    given = features()
    first, second = quantizer(given), quantizer(given)
    assert torch.equal(first.vectors, second.vectors)
    logits = quantizer.logits(to_rows(given))
    assert torch.equal(first.codes.flatten(), logits.argmax(1))
    expected = math.log(12) - entropy(logits.softmax(1)).mean()
    torch.testing.assert_close(first.parts["kl"], expected)
    torch.testing.assert_close(first.loss, 5e-4 * expected)


def test_gumbel_samples_are_of_the_distribution():
    quantizer = build(CASES["gumbel"], num_codes=3).train()
    given = features(batch=1)[:, :, :1, :1].expand(20000, -1, -1, -1)
    codes = quantizer(given).codes.flatten()
    expected = quantizer.logits(given[0, :, 0, 0]).softmax(0)
    assert (codes.bincount(minlength=3) / len(codes) - expected).abs().max() < 0.02


@pytest.mark.parametrize("kind", ["gumbel", "gumbel-hard"])
def test_gumbel_is_torchs_gumbel_softmax(kind, monkeypatch):
    """With the same noise: equal vectors, and equal gradients to features and to every
    parameter."""
    quantizer, given = build(CASES[kind]).train(), features().requires_grad_()
    quantizer.temperature.fill_(0.5)
    torch.manual_seed(7)
    output = quantizer(given)
    torch.manual_seed(7)
    noise = -randomness.uniform(
        quantizer.stream.keys(len(given), given[0, 0].numel()), quantizer.num_codes[0]
    ).log()
    monkeypatch.setattr(torch.Tensor, "exponential_", lambda tensor: tensor.copy_(noise))
    weights = F.gumbel_softmax(
        quantizer.logits(to_rows(given)), tau=0.5, hard=kind == "gumbel-hard"
    )
    expected = weights @ quantizer.codebook
    torch.testing.assert_close(to_rows(output.vectors), expected)
    assert torch.equal(output.codes.flatten(), weights.argmax(1))
    leaves = [given, *quantizer.parameters()]
    torch.manual_seed(99)  # the noise of the backward pass is that of the forward pass all the same
    ours = torch.autograd.grad(to_rows(output.vectors).square().sum(), leaves)
    for mine, theirs in zip(ours, torch.autograd.grad(expected.square().sum(), leaves)):
        torch.testing.assert_close(mine, theirs, atol=1e-5, rtol=1e-4)


def test_gumbel_noise_follows_the_global_generator():
    quantizer, vectors = build(CASES["gumbel"]).train(), []
    for seed in (1, 1, 2):
        torch.manual_seed(seed)
        vectors.append(quantizer(features()).vectors)
    assert torch.equal(vectors[0], vectors[1]) and not torch.equal(vectors[0], vectors[2])


def test_temperature_falls_exponentially_and_stays():
    quantizer = (
        GumbelConfig(num_codes=4, code_dim=DIM, anneal_steps=4, temperature_end=0.0625)
        .build()
        .train()
    )
    seen = [float(quantizer.temperature)]
    for step in range(6):
        quantizer.update(step, True)
        seen.append(float(quantizer.temperature))
    assert seen == [1.0, 0.5, 0.25, 0.125, 0.0625, 0.0625, 0.0625]
    assert "temperature" in quantizer.state_dict()


def test_cold_samples_are_codes():
    quantizer = build(CASES["gumbel"]).train()
    quantizer.temperature.fill_(1e-4)
    output = quantizer(features())
    torch.testing.assert_close(output.vectors, quantizer.lookup(output.codes), atol=1e-4, rtol=0)
