"""Quantizers against vector-quantize-pytorch, step by step from the same start."""

from __future__ import annotations

import pytest
import torch
import vector_quantize_pytorch as reference
from vector_quantize_pytorch.vector_quantize_pytorch import rotate_to

from tokenizer.quantizers.codebook import rotate, to_rows
from tokenizer.quantizers.residual import ResidualConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig

STEPS, CODES, DIM = 25, 64, 8


def images(step, batch=16):
    """Features (B, D, 4, 4) that drift and have a few modes, so that codes move and fall out of
    use."""
    generator = torch.Generator().manual_seed(step)
    modes = 2 * torch.randn(10, DIM, generator=torch.Generator().manual_seed(99))
    rows = modes[torch.randint(10, (batch, 4, 4), generator=generator)] + 0.02 * step
    return (rows + 0.3 * torch.randn(batch, 4, 4, DIM, generator=generator)).movedim(-1, 1)


def tokens(grid):
    """(B, D, H, W) -> (B, H * W, D), as the reference takes them."""
    return grid.flatten(2).movedim(1, 2)


@pytest.mark.parametrize("metric", ["l2", "cosine"])
@pytest.mark.parametrize("decay", [0.8, 0.99])
def test_moving_average_codebook(metric, decay):
    torch.manual_seed(0)
    ours = VectorConfig(
        num_codes=CODES,
        code_dim=DIM,
        metric=metric,
        decay=decay,
        epsilon=1e-5,
        init="normal",
        commitment=0.25,
    ).build()
    theirs = reference.VectorQuantize(
        DIM,
        CODES,
        decay=decay,
        eps=1e-5,
        commitment_weight=0.25,
        use_cosine_sim=metric == "cosine",
        rotation_trick=False,
    )
    theirs.codebook = ours.codebook
    theirs._codebook.embed_avg.copy_(ours.codebook[None])
    ours.train(), theirs.train()
    used = set()
    for step in range(STEPS):
        given, same = images(step).requires_grad_(), images(step).requires_grad_()
        output = ours(given)
        vectors, codes, loss = theirs(tokens(same))
        assert torch.equal(output.codes.flatten(1), codes), step
        torch.testing.assert_close(tokens(output.vectors), vectors)
        torch.testing.assert_close(output.loss, loss.squeeze())
        (output.vectors.sin().sum() + output.loss).backward()
        (vectors.sin().sum() + loss.sum()).backward()
        torch.testing.assert_close(given.grad, same.grad)
        ours.update(step, True)
        torch.testing.assert_close(ours.codebook, theirs.codebook, atol=1e-5, rtol=0)
        torch.testing.assert_close(
            ours.mean_counts, theirs._codebook.cluster_size[0], atol=1e-5, rtol=1e-5
        )
        used |= set(codes.flatten().tolist())
    assert len(used) > 8
    final = ours.eval()(images(STEPS))
    assert torch.equal(final.codes.flatten(1), theirs.eval()(tokens(images(STEPS)))[1])


@pytest.mark.parametrize("rotation", [False, True])
def test_simvq(rotation):
    torch.manual_seed(0)
    ours = (
        SimVQConfig(num_codes=CODES, code_dim=DIM, commitment=0.25, rotation=rotation)
        .build()
        .train()
    )
    theirs = reference.SimVQ(
        DIM,
        CODES,
        rotation_trick=rotation,
        input_to_quantize_commit_loss_weight=0.25,
        channel_first=True,
        # as the authors have it; the library's own has no bias
        codebook_transform=torch.nn.Linear(DIM, DIM),
    ).train()
    theirs.frozen_codebook.copy_(ours.frozen)
    theirs.code_transform.load_state_dict(ours.transform.state_dict())
    optimizers = [torch.optim.Adam(each.parameters(), lr=0.02) for each in (ours, theirs)]
    start = ours.transform.weight.detach().clone()
    for step in range(STEPS):
        given, same = images(step).requires_grad_(), images(step).requires_grad_()
        output = ours(given)
        vectors, codes, loss = theirs(same)
        assert torch.equal(output.codes.squeeze(1), codes), step
        torch.testing.assert_close(output.vectors, vectors, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(output.loss, loss, atol=1e-5, rtol=1e-5)
        for optimizer, total in zip(
            optimizers, (output.vectors.sin().sum() + output.loss, vectors.sin().sum() + loss)
        ):
            optimizer.zero_grad()
            total.backward()
            optimizer.step()
        ours.update(step, True)
        torch.testing.assert_close(given.grad, same.grad, atol=1e-5, rtol=1e-5)
        for mine, other in zip(ours.parameters(), theirs.parameters(), strict=True):
            torch.testing.assert_close(mine.grad, other.grad, atol=1e-5, rtol=1e-5)
            torch.testing.assert_close(mine, other, atol=1e-5, rtol=0)
    assert (ours.transform.weight - start).abs().max() > 0.1


@pytest.mark.parametrize("shared", [False, True])
def test_residual_codes_and_sums(shared):
    torch.manual_seed(0)
    level = VectorConfig(num_codes=CODES, code_dim=DIM)
    ours = ResidualConfig(depth=4, shared=shared, level=level).build().eval()
    ours.initialise(to_rows(images(0, batch=64)), seed=0)
    theirs = reference.ResidualVQ(
        dim=DIM, num_quantizers=4, codebook_size=CODES, shared_codebook=shared, rotation_trick=False
    ).eval()
    for index, layer in enumerate(theirs.layers):
        layer.codebook = ours.levels[0 if shared else index].codebook
    for step in range(5):
        output = ours(images(step))
        vectors, codes, _ = theirs(tokens(images(step)))
        assert torch.equal(output.codes.flatten(2).movedim(1, 2), codes)
        torch.testing.assert_close(tokens(output.vectors), vectors)
        assert len(output.codes[:, 3].unique()) > 4


def test_rotation_trick():
    rows, same = (
        torch.randn(100, DIM, generator=torch.Generator().manual_seed(1), requires_grad=True)
        for _ in "ab"
    )
    vectors, gradient = torch.randn(100, DIM), torch.randn(100, DIM)
    ours, theirs = rotate(rows, vectors), rotate_to(same, vectors)
    torch.testing.assert_close(ours, theirs, atol=1e-5, rtol=1e-4)
    ours.backward(gradient)
    theirs.backward(gradient)
    torch.testing.assert_close(rows.grad, same.grad, atol=1e-4, rtol=1e-4)
