"""The sampler's laws: each item once per epoch, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import itertools

import pytest
import torch

from tokenizer.data.sampler import feed, keys_of_step
from tokenizer.data.sources import DataConfig, open_split
from training import distributed
from training.command import UserError


class Keys:
    """A data set whose items are their own keys."""

    def __init__(self, count: int):
        self.count = count

    def __len__(self) -> int:
        return self.count

    def gather(self, keys):
        return {"keys": torch.tensor(keys)}


def steps(dataset, batch_size, seed=0, start=0, count=4, **options):
    return list(itertools.islice(feed(dataset, batch_size, seed, **options)(start), count))


def global_batches(monkeypatch, world, accumulate, batch_size=12, count=4):
    """Keys (count, batch_size, 2) put together from every rank's micro-batches by their positions."""
    whole = torch.full((count, batch_size, 2), -1)
    monkeypatch.setattr(distributed, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        for step, micro_batches in enumerate(steps(Keys(17), batch_size, accumulate=accumulate, count=count)):
            assert len(micro_batches) == accumulate
            for batch in micro_batches:
                assert (whole[step, batch.positions] == -1).all()
                whole[step, batch.positions] = batch["keys"]
    return whole


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 4)])
def test_each_item_once_per_epoch(num_items, batch_size):
    stream = [key for step in range(3 * num_items) for key in keys_of_step(num_items, batch_size, 5, step)]
    for epoch in range(len(stream) // num_items):
        part = stream[epoch * num_items : (epoch + 1) * num_items]
        assert {key[0] for key in part} == {epoch}
        assert sorted(key[1] for key in part) == list(range(num_items))


def test_order_depends_on_seed_and_epoch():
    first, second = keys_of_step(50, 50, 0, 0), keys_of_step(50, 50, 0, 1)
    assert first == keys_of_step(50, 50, 0, 0)
    assert [index for _, index in first] != [index for _, index in second]
    assert first != keys_of_step(50, 50, 1, 0)
    # The stream is the same whatever it is cut into.
    assert first + second == [key for step in range(10) for key in keys_of_step(50, 10, 0, step)]


@pytest.mark.parametrize(("world", "accumulate"), [(1, 3), (2, 1), (2, 3), (4, 1)])
def test_ranks_and_accumulation_tile_the_same_global_batch(monkeypatch, world, accumulate):
    alone = global_batches(monkeypatch, 1, 1)
    assert torch.equal(alone[2], torch.tensor(keys_of_step(17, 12, 0, 2)))
    assert torch.equal(global_batches(monkeypatch, world, accumulate), alone)


def test_ranks_take_contiguous_shares(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    (micro_batches,) = steps(Keys(17), 12, accumulate=2, count=1)
    assert [batch.positions.tolist() for batch in micro_batches] == [[6, 7, 8], [9, 10, 11]]


def test_resuming_continues_the_stream():
    straight = steps(Keys(17), 4, count=9)
    resumed = steps(Keys(17), 4, start=5, count=4)
    for one, other in zip(straight[5:], resumed, strict=True):
        assert torch.equal(one[0]["keys"], other[0]["keys"])


def test_workers_change_nothing_not_even_the_global_generator():
    dataset = open_split(DataConfig(augment="flip_shift", image_size=16), "train", augment=True, seed=3)
    torch.manual_seed(0)
    state = torch.get_rng_state()
    alone = steps(dataset, 8, seed=1, start=178, count=3, accumulate=2)  # crosses an epoch
    helped = steps(dataset, 8, seed=1, start=178, count=3, accumulate=2, workers=2)
    assert torch.equal(torch.get_rng_state(), state)
    for one, other in zip(itertools.chain(*alone), itertools.chain(*helped), strict=True):
        assert torch.equal(one.positions, other.positions)
        assert all(torch.equal(one[name], other[name]) for name in ("images", "labels", "ids"))


@pytest.mark.parametrize("workers", [0, 1])
def test_user_errors_pass_through_workers_as_one_line(workers):
    class Broken(Keys):
        def gather(self, keys):
            raise UserError("a line for people")

    with pytest.raises(UserError, match=r"^a line for people$"):
        steps(Broken(4), 2, count=1, workers=workers)


def test_uneven_shares_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(UserError, match=r"batch_size=10 .* 2 processes .*accumulate=3.* multiple of 6"):
        feed(Keys(17), 10, 0, accumulate=3)
    with pytest.raises(UserError, match="no items"):
        feed(Keys(0), 12, 0)
