"""The host is ahead of a GPU, a pretended one: no steady step waits for it, and what is not finite
is undone there."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from pretend import Pretended, pretended_gpu
from test_pretend_gpu import (
    BACKBONE,
    SAMPLERS,
    autoencoder_of,
    prior_of,
    prior_turns,
    sequences,
    tokenizer_of,
)
from test_torch_compile import ADVERSARY, OPTIMIZER, conv, images, tokenizer_turns
from tiny import save_encoder
from torch import nn
from toy import leaves, log_lines

from priors.families.autoregressive import AutoregressiveConfig
from tokenizer.discriminators.dino import DinoConfig
from tokenizer.quantizers import QUANTIZERS
from training import distributed, outcome, phase, philox
from training.checkpoint import Run
from training.errors import UserError
from training.log import Meter
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.outcome import Outcomes

STEADY = 2  # a step with all turns in it, that neither logs nor saves


@pytest.fixture(autouse=True)
def a_kernel_for_random_numbers(monkeypatch):
    """As CUDA has one: torch's integer operations are tested elsewhere, and take half of a step
    here."""

    def words(ids, seed, stream, count, first=None):
        return Pretended(
            philox._words(ids.held, seed, stream, count, None if first is None else first.held)
        )

    monkeypatch.setattr(philox, "in_torch", words)


class Seen(Exception):
    """The end of what is watched."""


def waits_of_a_steady_step(folder, module, turns, batches, waits):
    """(what, where) the host waits, with how often."""
    loop = LoopConfig(steps=100, batch_size=4, log_every=100)

    def stream(first):
        yield from (batches(step, 1) for step in range(first, STEADY))
        waits.clear()
        yield batches(STEADY, 1)
        raise Seen

    with pytest.raises(Seen):
        train(loop, Run.open(folder, loop), turns, stream, seed=3, published=module)
    return dict(waits)


@pytest.mark.parametrize("kind", [*QUANTIZERS, "vqvae2"])
def test_no_step_of_a_tokenizer_waits(kind, tmp_path):
    with pretended_gpu() as waits:
        module, turns = tokenizer_turns(tokenizer_of(kind), **ADVERSARY)
        assert waits_of_a_steady_step(tmp_path, module, turns, images, waits) == {}


@pytest.mark.parametrize("kind", SAMPLERS)
def test_no_step_of_a_prior_waits(kind, tmp_path):
    with pretended_gpu() as waits:
        assert (
            waits_of_a_steady_step(tmp_path, *prior_turns(prior_of(kind)), sequences, waits) == {}
        )


@pytest.mark.slow
def test_no_step_of_a_pretrained_encoder_and_discriminator_waits(tmp_path):
    """VQRAE's second stage: a teacher, noise, restarts, both trunks."""
    for family in ("dinov2", "vit"):
        (tmp_path / family).mkdir()
        save_encoder(tmp_path / family, family)
    judge = DinoConfig(name=str(tmp_path / "vit"), layers=(0, 1), kernel=3)
    model = autoencoder_of("vqrae", "simvq", tmp_path)
    restarts = dataclasses.replace(model.quantizer, restart="data", restart_every=1)
    with pretended_gpu() as waits:
        objective = {**ADVERSARY, "discriminator": judge, "distillation": 0.1}
        made = tokenizer_turns(dataclasses.replace(model, quantizer=restarts), **objective)
        assert waits_of_a_steady_step(tmp_path / "run", *made, images, waits) == {}


@contextlib.contextmanager
def a_twin():
    """Another rank, which has the very values that this one has."""

    def all_reduce(tensor, operation=dist.ReduceOp.SUM):
        assert tensor.device == distributed.device()
        if operation == dist.ReduceOp.SUM:
            tensor.mul_(2)

    class Engine(nn.Module):
        def __init__(self, module, **options):
            super().__init__()
            self.module = module

        def forward(self, *inputs):
            return self.module(*inputs)

    facts = {
        "is_initialized": lambda: True,
        "get_rank": lambda: 0,
        "get_world_size": lambda: 2,
        "barrier": lambda: 0,
        "all_reduce": all_reduce,
        "broadcast": lambda tensor, rank: None,
        "broadcast_object_list": lambda told, device: None,
    }
    with contextlib.ExitStack() as stack:
        for name, fact in facts.items():
            stack.enter_context(mock.patch.object(dist, name, fact))
        stack.enter_context(mock.patch.object(phase, "DistributedDataParallel", Engine))
        yield


def test_a_step_of_several_processes_waits_for_the_one_before_alone(tmp_path):
    """With an adversary, restarts from the data and all that is reduced over ranks."""
    model = conv(
        kind="vector", num_codes=20, code_dim=8, restart="data", restart_below=0.9, entropy=0.1
    )
    with pretended_gpu() as waits:
        made = tokenizer_turns(model, **ADVERSARY)
        with a_twin():
            found = waits_of_a_steady_step(tmp_path, *made, images, waits)
    assert [what for what, _ in found] == ["event"] and sum(found.values()) == 1


@pytest.mark.parametrize("late", [False, True])
def test_all_processes_stop_at_the_same_step(monkeypatch, late):
    """Whichever is asked, and whenever: at once on CPUs, on GPUs a step later."""
    numbers, meeting, stopped = [0, 0], threading.Barrier(2), [0, 0]
    rank = threading.local()

    class Here:
        def __init__(self, tensor):
            self.values = tensor.tolist

    def largest_(tensor):
        numbers[rank.number] = int(tensor)
        meeting.wait(10)
        tensor.fill_(max(numbers))
        meeting.wait(10)
        return tensor

    monkeypatch.setattr(outcome, "Reading", Here)
    monkeypatch.setattr(distributed, "world", lambda: 2)
    monkeypatch.setattr(distributed, "largest_", largest_)
    monkeypatch.setattr(distributed, "largest", lambda number: int(largest_(torch.tensor(number))))

    def run(number, asked_at):
        rank.number, outcomes = number, Outcomes(torch.device("cpu"), 3)
        outcomes.at_once = not late
        for step in range(1, 20):
            if outcomes.agree(15 if step >= asked_at else 0, now=step % 6 == 0):
                stopped[number] = step
                return

    for asked_at in (4, 5, 6):
        threads = [
            threading.Thread(target=run, args=(number, at))
            for number, at in enumerate((99, asked_at))
        ]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        expected = min(asked_at + 1, 6) if late else asked_at
        assert stopped == [expected] * 2


# Steps that are not finite


def spoil(turns, name, steps):
    """The phase's loss is NaN, with its gradients, in these steps."""

    whole = {each.name: each.loss for each in turns}[name]

    def loss(batch, step):
        made = whole(batch, step)
        return Loss(made.total * (float("nan") if step in steps else 1.0), made.parts)

    return [dataclasses.replace(each, loss=loss) if each.name == name else each for each in turns]


def state_after(folder, steps, module, turns, batches):
    loop = LoopConfig(steps=steps, batch_size=4, log_every=1, save_every=100, ema_decay=0.9)
    stream = lambda step: (batches(at, 1) for at in range(step, 100))  # noqa: E731
    train(loop, Run.open(folder, OPTIMIZER), turns, stream, seed=3, published=module)
    state = Run(folder, None).latest()
    return leaves({part: state[part] for part in ("modules", "optimizers", "ema")})


def tensors(state):
    return {name: value for name, value in state.items() if isinstance(value, torch.Tensor)}


RESTARTED = {"num_codes": 20, "code_dim": 8, "restart_below": 0.99}  # at every step
MODELS = {
    "averaged codes from the data": {
        "kind": "vector",
        "restart": "data",
        **RESTARTED,
        "decay": 0.5,
        "commitment_warmup_steps": 9,
    },
    "learned codes, split": {
        "kind": "vector",
        "codebook": "gradient",
        "restart": "split",
        "decay": 0.5,
        **RESTARTED,
    },
    "frozen codes": {"kind": "simvq", "restart": "data", "restart_every": 1, **RESTARTED},
    "a temperature": {"kind": "gumbel", "num_codes": 20, "code_dim": 8, "anneal_steps": 9},
}


DEAR = ("frozen codes", "a temperature")


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] * (name in DEAR)) for name in MODELS]
)
def test_a_step_that_is_not_finite_leaves_no_trace(name, tmp_path):
    """To the bit: codebooks that follow averages and are restarted, schedules, LeCAM's anchors,
    both averages."""

    def made(*spoilt: Phase):
        adversary = ADVERSARY if "averaged" in name else {}
        module, turns = tokenizer_turns(conv(**MODELS[name]), **adversary)
        for each in spoilt:
            turns = spoil(turns, each.name, {2})
        return module, turns, images

    with pretended_gpu():
        good = state_after(tmp_path / "good", 2, *made())
        module, turns, batches = made(*made()[1])
        bad = state_after(tmp_path / "bad", 3, module, turns, batches)
        restarted = getattr(module.quantizer, "changed", None)
        assert restarted is None or bool(restarted.any()), "the test is of none"
    good, bad = tensors(good), tensors(bad)
    assert good.keys() == bad.keys() and any(
        "num_updates" in each or "usage" in each for each in good
    )
    assert [each for each in good if not torch.equal(good[each], bad[each])] == []


@pytest.mark.parametrize(
    "spoilt", [pytest.param("autoencoder", marks=pytest.mark.slow), "discriminator"]
)
def test_after_steps_that_are_not_finite_all_is_as_on_the_cpu(spoilt, tmp_path):
    """Where one of two turns is skipped too, which keeps the average where it is."""
    states, logs = [], []
    for folder, device in (
        (tmp_path / "cpu", contextlib.nullcontext()),
        (tmp_path / "gpu", pretended_gpu()),
    ):
        with device:
            module, turns = tokenizer_turns(
                conv(**MODELS["averaged codes from the data"]), **ADVERSARY
            )
            states.append(
                tensors(state_after(folder, 4, module, spoil(turns, spoilt, {0, 2}), images))
            )
        logs.append(log_lines(folder))
    assert states[0].keys() == states[1].keys()
    for name, value in states[0].items():
        torch.testing.assert_close(states[1][name], value, rtol=1e-4, atol=1e-4, msg=name)
    assert [line.keys() for line in logs[0]] == [line.keys() for line in logs[1]]
    skipped = [line.get(f"{spoilt}.skipped") for line in logs[1]]
    assert skipped == [1, 0, 1, 0]
    assert [f"{spoilt}.gradient_norm" in line for line in logs[1]] == [
        each == 0 for each in skipped
    ]


def test_a_schedule_of_a_prior_stays_too(tmp_path):
    config = AutoregressiveConfig(
        backbone=dataclasses.replace(BACKBONE, positions="learned"),
        order="annealed",
        anneal_start_step=0,
        anneal_end_step=9,
    )
    for device in (contextlib.nullcontext, pretended_gpu):
        with device():
            prior, turns = prior_turns(config)
            state = state_after(
                tmp_path / device.__name__, 3, prior, spoil(turns, "prior", {2}), sequences
            )
        assert state["/modules/prior/next_step"] == 2


def test_bad_steps_in_a_row_end_a_run_on_a_gpu(tmp_path):
    """Though the host reads of it late, the line names the step, and no good checkpoint is lost."""
    loop = LoopConfig(steps=40, batch_size=4, log_every=100, save_every=2, max_bad_steps=3, keep=1)
    module = nn.Linear(1, 1)

    def loss(batch, step):
        return Loss(module(batch["rows"]).square().mean(), {})

    def stream(step):
        return ([Batch({"rows": torch.ones(4, 1)}, torch.arange(4))] for _ in range(step, 100))

    with (
        pretended_gpu(),
        pytest.raises(UserError, match=r"3 steps in a row .* step 9: .*step-00000008 is kept"),
    ):
        turns = spoil([Phase("linear", module, loss, OPTIMIZER)], "linear", {1, 2, *range(6, 40)})
        train(loop, Run.open(tmp_path, loop), turns, stream, seed=0, published=module)
    assert sorted(path.name for path in tmp_path.glob("checkpoints/step-*")) == [
        "step-00000006",
        "step-00000008",
    ]


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_a_run_goes_on_on_another_device(first, tmp_path):
    """Whose AdamW is another: fused on a GPU, with its count of steps there."""

    def goes_on(folder, steps, on_gpu):
        torch.manual_seed(0)
        module = nn.Linear(2, 1)

        def loss(batch, step):
            return Loss((module(batch["rows"]) - 1).square().mean(), {})

        rows = torch.arange(8.0).view(4, 2)
        with pretended_gpu() if on_gpu else contextlib.nullcontext():
            batches = lambda step, accumulate: [Batch({"rows": rows + step}, torch.arange(4))]  # noqa: E731
            return tensors(
                state_after(
                    folder, steps, module, [Phase("linear", module, loss, OPTIMIZER)], batches
                )
            )

    straight = goes_on(tmp_path / "straight", 4, on_gpu=False)
    goes_on(tmp_path / "run", 2, on_gpu=first == "gpu")
    resumed = goes_on(tmp_path / "run", 4, on_gpu=first == "cpu")
    assert straight.keys() == resumed.keys()
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-5, atol=1e-6, msg=name)


def test_a_meter_does_not_count_what_has_no_weight():
    meter, resumed = Meter(), Meter()
    for value, taken in ((1.0, 1.0), (0.0, 0.0), (3.0, 1.0)):
        meter.add(
            {"norm": torch.tensor(value), "other": torch.tensor(value)},
            torch.tensor(taken, dtype=torch.float64),
        )
        meter.add({"never": torch.tensor(0.0)}, torch.tensor(0.0))
    state = meter.state_dict()
    assert (
        state["counts"] == {"norm": 2.0, "other": 2.0}
        and state["sums"].keys() == state["counts"].keys()
    )
    resumed.load_state_dict(state)
    assert meter.read() == resumed.read() == {"norm": 2.0, "other": 2.0}


def test_a_gpu_is_what_waits_for_data(tmp_path):
    """Not the host, which is ahead of it: the share is between marks in what the GPU was given."""
    from training.loop import _Window

    with pretended_gpu() as waits:
        window = _Window(0, 4)
        for _ in range(3):
            with window.waiting():
                pass
        assert not waits
        begin, end = window.gaps[0]
        end.time = begin.time + 1.0
        window.started -= 10.0
        assert window.read(3)["data_wait"] == pytest.approx(0.1, abs=0.02)
        assert window.gaps == []
