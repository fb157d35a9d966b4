"""The sampler's laws: each item once per epoch, and batches that depend on (seed, step) alone."""

from __future__ import annotations

import itertools
import multiprocessing
import os
import signal
import time

import numpy as np
import pytest
import torch

from tokenizer.data import loader
from tokenizer.data.dataset import DataConfig, open_split
from tokenizer.data.loader import encipher, feed, keys_of_step
from training import distributed
from training.errors import UserError


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


def global_batches(monkeypatch, world, accumulate, batch_size=12, start=0, count=4, workers=0):
    """Keys (count, batch_size, 2) put together from every rank's micro-batches by their
    positions."""
    whole = torch.full((count, batch_size, 2), -1)
    monkeypatch.setattr(distributed, "world", lambda: world)
    for rank in range(world):
        monkeypatch.setattr(distributed, "rank", lambda rank=rank: rank)
        taken = steps(
            Keys(17), batch_size, start=start, count=count, accumulate=accumulate, workers=workers
        )
        for step, micro_batches in enumerate(taken):
            assert len(micro_batches) == accumulate
            for batch in micro_batches:
                assert (whole[step, batch.positions] == -1).all()
                whole[step, batch.positions] = batch["keys"]
    return whole


@pytest.mark.parametrize(("num_items", "batch_size"), [(10, 5), (10, 4), (7, 3), (3, 8), (1, 4)])
def test_each_item_once_per_epoch(num_items, batch_size):
    stream = [
        key for step in range(3 * num_items) for key in keys_of_step(num_items, batch_size, 5, step)
    ]
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


@pytest.mark.filterwarnings(
    "ignore:This DataLoader will create"
)  # more processes than a small machine has cores
@pytest.mark.parametrize("workers", range(4))
@pytest.mark.parametrize("world", [1, 2])
def test_resuming_gives_what_a_straight_run_gives(monkeypatch, world, workers):
    """From the middle of an epoch, whatever the processes before: each item once per epoch, in the
    same places."""
    straight = global_batches(monkeypatch, 1, 1, count=9)
    resumed = global_batches(monkeypatch, world, 1, start=5, count=4, workers=workers)
    assert torch.equal(resumed, straight[5:])
    stream = torch.cat([straight[:5], resumed]).reshape(-1, 2)
    for epoch in range(len(stream) // 17):
        assert sorted(stream[17 * epoch : 17 * (epoch + 1), 1].tolist()) == list(range(17))


# Sets that are too large for a table of their order


@pytest.mark.parametrize("num_items", [1, 2, 3, 4, 5, 16, 17, 1000, 4097])
def test_enciphering_is_a_permutation(num_items):
    for seed in range(3):
        found = encipher(np.arange(num_items), num_items, seed)
        assert sorted(found.tolist()) == list(range(num_items))
    # Any place by itself, in any company.
    places = np.random.default_rng(0).integers(num_items, size=50)
    assert np.array_equal(encipher(places, num_items, 2), found[places])


def test_enciphering_shuffles():
    """Where an item goes says nothing of its place, of its neighbour, of another epoch."""
    count = 100_000
    orders = [encipher(np.arange(count), count, seed) / count for seed in range(4)]
    for order in orders:
        assert abs(np.corrcoef(order, np.arange(count))[0, 1]) < 0.02
        assert abs(np.corrcoef(order[1:], order[:-1])[0, 1]) < 0.02
        assert np.abs(np.histogram(np.diff(order) % 1, 20)[0] / count - 0.05).max() < 0.005
        pieces = np.histogram2d(order, np.arange(count) / count, 10)[0]
        assert ((pieces - 1000) ** 2 / 1000).sum() < 150  # chi-square of 81 degrees of freedom
    assert np.abs(np.corrcoef(orders) - np.eye(4)).max() < 0.02


def test_each_item_of_a_large_set_once_per_epoch(monkeypatch):
    monkeypatch.setattr(loader, "LARGEST_TABLE", 10)
    monkeypatch.setattr(loader, "permutation", lambda *_: pytest.fail("made a table"))
    test_each_item_once_per_epoch(23, 7)
    test_resuming_gives_what_a_straight_run_gives(monkeypatch, 2, 0)


def test_a_step_of_a_very_large_set_costs_nothing_before_it():
    keys = keys_of_step(10**10, 512, 0, 10**6)
    assert len(set(keys)) == 512 and all(0 <= index < 10**10 for _, index in keys)


# Processes that read ahead


class SlowKeys(Keys):
    """Reading takes a while, so that processes are met alive."""

    def gather(self, keys):
        time.sleep(0.01)
        return super().gather(keys)


def readers():
    return [process for process in multiprocessing.active_children() if process.is_alive()]


def test_readers_leave_nothing_behind():
    def descriptors() -> int:
        return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0

    for again in range(6):
        stream = feed(Keys(17), 4, 0, workers=2)(0)
        next(stream)
        assert len(readers()) == 2
        stream.close()
        assert not readers()
        if not again:
            first = descriptors()  # with what multiprocessing opens once for itself
    deadline = time.monotonic() + 20  # its threads close their pipes a little later
    while descriptors() > first + 4 and time.monotonic() < deadline:
        time.sleep(0.1)
    assert descriptors() <= first + 4  # two pipes that it still has; five rounds of leaks were ten


def test_readers_leave_stopping_to_the_loop():
    """A launcher ends all processes of a job at once; the step in hand is still finished and
    saved."""
    stream = feed(SlowKeys(17), 4, 0, workers=2)(0)
    first = next(stream)
    for process in readers():
        os.kill(process.pid, signal.SIGTERM)
        os.kill(process.pid, signal.SIGINT)
    rest = list(itertools.islice(stream, 20))
    expected = steps(Keys(17), 4, count=21)
    for one, other in zip([first, *rest], expected, strict=True):
        assert torch.equal(one[0]["keys"], other[0]["keys"])
    stream.close()
    assert not readers()


def test_a_reader_that_dies_is_one_line():
    stream = feed(SlowKeys(17), 4, 0, workers=2)(0)
    next(stream)
    os.kill(readers()[0].pid, signal.SIGKILL)
    time.sleep(0.2)  # its end is signalled here, where it must not raise
    with pytest.raises(
        UserError, match=r"process that reads images ahead is gone .*lower loop\.workers"
    ) as error:
        list(itertools.islice(stream, 200))
    assert "\n" not in str(error.value)
    assert not readers()


def test_workers_change_nothing_not_even_the_global_generator():
    dataset = open_split(
        DataConfig(augment="flip_shift", image_size=16), "train", augment=True, seed=3
    )
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


@pytest.mark.parametrize("workers", [0, 1])
def test_other_errors_keep_their_traceback(workers):
    class Broken(Keys):
        def gather(self, keys):
            raise OSError("a fault of ours")

    with pytest.raises(OSError, match="a fault of ours"):
        steps(Broken(4), 2, count=1, workers=workers)


def test_uneven_shares_are_refused(monkeypatch):
    monkeypatch.setattr(distributed, "world", lambda: 2)
    with pytest.raises(
        UserError, match=r"batch_size=10 .* 2 processes .*accumulate=3.* multiple of 6"
    ):
        feed(Keys(17), 10, 0, accumulate=3)
    with pytest.raises(UserError, match="no items"):
        feed(Keys(0), 12, 0)
