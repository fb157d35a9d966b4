"""The training loop's laws: exact resume, turns that keep apart, accumulation, clipping, bad steps,
averages."""

from __future__ import annotations

import dataclasses
import itertools
import json
import math
import signal
from pathlib import Path

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.optim.optimizer import register_optimizer_step_pre_hook
from toy import LOOP, Generator, Rows, Toy, ToyRun, fingerprint, leaves, log_lines, loop, stop_at

from tokenizer.data.loader import feed
from training import distributed
from training.checkpoint import Run, load_weights
from training.ema import Ema
from training.errors import UserError
from training.log import Log, Meter
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.optim import OptimizerConfig
from training.precision import has_bf16
from training.signals import Interrupted

CONSTANT = OptimizerConfig(lr=0.1, warmup_steps=0, schedule="constant")


def copied(module: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def moved(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {
        name
        for name, tensor in module.state_dict().items()
        if not torch.equal(tensor, before[name])
    }


# Resume


@pytest.fixture(scope="module")
def straight(tmp_path_factory) -> Path:
    """A run that nothing disturbed."""
    folder = tmp_path_factory.mktemp("straight") / "run"
    Toy(ToyRun()).train(folder)
    return folder


@pytest.mark.parametrize("step", range(LOOP.steps - 1))
def test_a_run_stopped_at_any_step_resumes_bit_equal(tmp_path, straight, step):
    number = (signal.SIGTERM, signal.SIGINT)[step % 2]
    message = stop_at(tmp_path / "run", step, number)
    assert f"step {step + 1} " in message and "same command" in message
    assert Run(tmp_path / "run", None).latest()["step"] == step + 1
    Toy(ToyRun()).train(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(straight)


def test_a_run_stopped_at_every_step_resumes_bit_equal(tmp_path, straight):
    for step in range(LOOP.steps - 1):
        stop_at(tmp_path / "run", step, signal.SIGTERM)
    Toy(ToyRun()).train(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(straight)


def test_kill_9_at_file_boundaries_resumes_bit_equal(tmp_path):
    """Killed at every third touch of the run's files; nothing temporary stays behind."""
    done = processes.run(processes.TESTS / "toy.py", "kill", tmp_path, 3)
    assert done.returncode == 0, done.stderr
    outcome = json.loads(done.stdout)
    assert outcome["failed"] == {}, done.stderr
    assert outcome["points"] >= 15


def test_signal_handlers_are_put_back(tmp_path):
    before = signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)
    stop_at(tmp_path / "run", 1, signal.SIGTERM)
    assert (signal.getsignal(signal.SIGTERM), signal.getsignal(signal.SIGINT)) == before


def test_a_finished_run_says_so_and_changes_nothing(tmp_path, capsys):
    Toy(ToyRun()).train(tmp_path / "run")
    before, weights = fingerprint(tmp_path / "run"), load_weights(tmp_path / "run")
    capsys.readouterr()

    def no_batches(step):
        raise AssertionError("a finished run reads no data")

    averaged = Toy(ToyRun()).train(tmp_path / "run", no_batches)
    said = capsys.readouterr().out
    assert said.count("\n") == 1 and "finished at step 9" in said and "--fresh" in said
    assert fingerprint(tmp_path / "run") == before
    assert all(torch.equal(tensor, weights[name]) for name, tensor in averaged.state_dict().items())


def test_a_finished_run_publishes_weights_that_were_removed(tmp_path):
    Toy(ToyRun()).train(tmp_path / "run")
    path = tmp_path / "run" / "weights" / "model.safetensors"
    before = path.read_bytes()
    path.unlink()
    Toy(ToyRun()).train(tmp_path / "run")
    assert path.read_bytes() == before


def test_what_is_published_is_the_average(straight):
    state, weights = Run(straight, None).latest(), load_weights(straight)
    assert state["ema"].keys() == weights.keys()
    assert all(torch.equal(state["ema"][name], weights[name]) for name in weights)
    assert not torch.equal(weights["last.weight"], state["modules"]["generator"]["last.weight"])


def test_the_log_holds_means_of_each_window_once(straight):
    lines = log_lines(straight)
    assert [line["step"] for line in lines] == [3, 5, 6, 9, 9]
    assert all(math.isfinite(value) for line in lines for value in line.values())
    training = [line for line in lines if "generator.error" in line]
    assert [line["step"] for line in training] == [3, 6, 9]
    assert [line["step"] for line in lines if "held_out.mean" in line] == [5, 9]


# Turns


def test_each_turn_moves_its_own_module_only(tmp_path):
    toy = Toy(ToyRun(dropout=0.0, discriminator_start_step=0))
    halves = []

    def watch(name, module, other):
        inner = next(turn for turn in toy.turns if turn.name == name).loss

        def loss(batch, step):
            halves.append((name, copied(module), copied(other)))
            return inner(batch, step)

        return loss

    generator, discriminator = toy.generator, toy.discriminator
    toy.turns = [
        dataclasses.replace(toy.turns[0], loss=watch("generator", generator, discriminator)),
        dataclasses.replace(toy.turns[1], loss=watch("discriminator", discriminator, generator)),
    ]
    toy.train(tmp_path / "run")
    for (name, own, other), (_, own_after, other_after) in itertools.pairwise(halves):
        # After a turn the next one begins: what was "own" is then "other".
        trained = [key for key in own if not key.startswith(("frozen", "num", "mean", "picked"))]
        assert any(not torch.equal(own[key], other_after[key]) for key in trained), name
        assert all(torch.equal(other[key], own_after[key]) for key in other), name


def test_a_turn_leaves_no_gradient_in_another(tmp_path):
    """The discriminator's first step is the same whatever weight the adversary had before, also
    after a resume."""
    gradients = []
    for weight in (0.0, 1e6):
        toy = Toy(ToyRun(dropout=0.0, discriminator_start_step=0, loop=loop(steps=1, clip=1e9)))
        generator_loss, optimizer = toy.turns[0].loss, dataclasses.replace(CONSTANT, lr=0.0)

        def loss(batch, step, inner=generator_loss, weight=weight, toy=toy):
            made = inner(batch, step)
            return Loss(
                made.total + weight * toy.discriminator(toy.generator(batch["rows"])).mean(),
                made.parts,
            )

        toy.turns = [dataclasses.replace(turn, optimizer=optimizer) for turn in toy.turns]
        toy.turns[0] = dataclasses.replace(toy.turns[0], loss=loss)
        toy.train(tmp_path / f"run-{weight}")
        gradients.append(log_lines(tmp_path / f"run-{weight}")[0]["discriminator.gradient_norm"])
    assert gradients[0] == gradients[1] > 0


def test_a_turn_waits_for_its_start_step(tmp_path):
    toy = Toy(ToyRun(discriminator_start_step=4))
    before, seen = copied(toy.discriminator), []

    def after_step(step, taken):
        seen.append((step, taken))
        assert bool(moved(before, toy.discriminator))

    toy.turns[1] = dataclasses.replace(toy.turns[1], after_step=after_step)
    rates = []
    hook = register_optimizer_step_pre_hook(
        lambda optimizer, *_: rates.append(optimizer.param_groups[0]["lr"])
    )
    toy.train(tmp_path / "run")
    hook.remove()
    assert seen == [(step, True) for step in range(4, LOOP.steps)]
    own = [
        toy.config.optimizer.lr * toy.config.optimizer.factor(step, LOOP.steps - 4)
        for step in range(5)
    ]
    assert rates[5::2] == own  # its schedule begins there too


def test_frozen_parameters_stay(tmp_path):
    toy = Toy(ToyRun())
    before = copied(toy.generator)
    averaged = toy.train(tmp_path / "run")
    assert moved(before, toy.generator) == {
        "last.weight",
        "last.bias",
        "mean",
        "picked",
        "num_updates",
    }
    assert moved(before, averaged) == {"last.weight", "last.bias", "mean", "picked", "num_updates"}


# Gradients


class Quadratic(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(4, 4, dtype=torch.float64))

    def loss(self, batch: Batch, step: int) -> Loss:
        total = (batch["rows"] @ self.weight).square().mean()
        return Loss(total, {"total": total})


def train_quadratic(folder: Path, config: LoopConfig, loss=None, optimizer=CONSTANT) -> Quadratic:
    module = Quadratic()
    turn = Phase("quadratic", module, loss(module) if loss else module.loss, optimizer)
    batches = feed(Rows(), config.batch_size, 0, config.accumulate)
    train(config, Run.open(folder, config), [turn], batches, seed=0, published=module)
    return module


def test_accumulation_equals_the_big_batch(tmp_path):
    results = []
    for accumulate in (1, 2, 4):
        toy = Toy(ToyRun(dropout=0.0, loop=loop(accumulate=accumulate)))
        averaged = toy.train(tmp_path / f"run-{accumulate}")
        results.append({**leaves(averaged.state_dict()), **leaves(toy.discriminator.state_dict())})
    for other in results[1:]:
        for name, tensor in results[0].items():
            torch.testing.assert_close(tensor, other[name], rtol=0, atol=1e-12)


@pytest.mark.parametrize("clip", [1e-3, 1e3])
def test_gradients_are_clipped_to_a_norm(tmp_path, clip):
    norms, clipped = [], []

    def loss(module):
        module.weight.register_post_accumulate_grad_hook(
            lambda weight: norms.append(float(weight.grad.norm()))
        )
        return module.loss

    def before_step(optimizer, *arguments):
        clipped.append(float(optimizer.param_groups[0]["params"][0].grad.norm()))

    hook = register_optimizer_step_pre_hook(before_step)
    train_quadratic(tmp_path / "run", loop(steps=2, clip=clip), loss)
    hook.remove()
    assert clipped == pytest.approx([min(norm, clip) for norm in norms], rel=1e-4)
    logged = log_lines(tmp_path / "run")[0]["quadratic.gradient_norm"]
    assert logged == pytest.approx(sum(norms) / len(norms))  # before clipping


def broken_at(steps: set[int]):
    def of(module: Quadratic):
        def loss(batch: Batch, step: int) -> Loss:
            good = module.loss(batch, step)
            return Loss(good.total * float("nan"), good.parts) if step in steps else good

        return loss

    return of


def test_a_non_finite_step_moves_nothing(tmp_path):
    once = train_quadratic(tmp_path / "once", loop(steps=1))
    then_bad = train_quadratic(tmp_path / "bad", loop(steps=3), broken_at({1, 2}))
    assert torch.equal(once.weight, then_bad.weight)
    good, bad = Run(tmp_path / "once", None).latest(), Run(tmp_path / "bad", None).latest()
    for part in ("modules", "optimizers", "ema"):
        assert str(leaves(good[part])) == str(leaves(bad[part]))


def test_bad_steps_in_a_row_stop_the_run_and_keep_the_last_checkpoint(tmp_path):
    config = loop(steps=20, save_every=4, max_bad_steps=3)
    with pytest.raises(UserError, match=r"3 steps in a row .* step 9: .*optimizer\.lr"):
        train_quadratic(tmp_path / "run", config, broken_at({1, 2, 6, 7, 8}))
    assert (
        Run(tmp_path / "run", None).latest()["step"] == 8
    )  # whole: the bad steps before it moved nothing
    assert all(torch.isfinite(tensor).all() for tensor in load_weights(tmp_path / "run").values())


# Schedules, averages, meters


def test_learning_rate_schedule_known_values():
    cosine = OptimizerConfig(warmup_steps=4, final_lr_ratio=0.2)
    assert [cosine.factor(step, 104) for step in (0, 1, 3, 4, 54, 104, 200)] == pytest.approx(
        [0.25, 0.5, 1.0, 1.0, 0.6, 0.2, 0.2]
    )
    constant = OptimizerConfig(warmup_steps=2, schedule="constant")
    assert [constant.factor(step, 10) for step in (0, 1, 2, 9)] == [0.5, 1, 1, 1]
    assert OptimizerConfig(warmup_steps=0).factor(0, 10) == 1.0


def test_optimizer_groups_by_rate_and_decay():
    module = nn.Sequential(nn.Linear(2, 3), nn.Linear(3, 2))
    module[0].bias.requires_grad_(False)
    optimizer = OptimizerConfig(lr=1.0, weight_decay=0.5, rates={"1.": 0.25}).build(module)
    found = {
        (group["lr"], group["weight_decay"]): len(group["params"])
        for group in optimizer.param_groups
    }
    assert found == {(1.0, 0.5): 1, (0.25, 0.5): 1, (0.25, 0.0): 1}
    with pytest.raises(UserError, match=r"rates: encoder begins the name of no trainable"):
        OptimizerConfig(rates={"encoder": 1.0}).build(module)


def test_the_average_follows_parameters_and_buffers():
    source = Generator(0.0)
    ema = Ema(source, decay=0.5)
    assert (
        not any(parameter.requires_grad for parameter in ema.module.parameters())
        and not ema.module.training
    )
    start = copied(ema.module)
    with torch.no_grad():
        source.last.weight.add_(1.0)
        source.mean.fill_(2.0)
        source.num_updates.fill_(7)
    ema.update(step=0)  # decay (1 + 0) / (10 + 0) while that is less than 0.5
    torch.testing.assert_close(ema.module.last.weight, start["last.weight"] + 0.9)
    torch.testing.assert_close(ema.module.mean, torch.full((4,), 1.8))
    assert ema.module.num_updates == 7 and ema.module.num_updates.dtype == torch.int64
    ema.update(step=1000)
    torch.testing.assert_close(ema.module.mean, torch.full((4,), 1.9))
    assert torch.equal(ema.module.frozen.weight, source.frozen.weight)


def test_a_meter_gives_means_and_resumes():
    meter, resumed = Meter(), Meter()
    meter.add({"a": torch.tensor(1.0), "b": torch.tensor(5.0)})
    meter.add({"a": torch.tensor(2.0)})
    resumed.load_state_dict(meter.state_dict())
    for each in (meter, resumed):
        each.add({"a": torch.tensor(6.0)})
        assert each.read() == {"a": 3.0, "b": 5.0}
        assert each.read() == {}


def test_the_log_drops_lines_after_the_step_and_those_cut_short(tmp_path):
    log = Log(tmp_path, 0)
    for step in (1, 2, 3):
        log.write(step, {"a": float(step)})
    log.close()
    with open(tmp_path / "log.jsonl", "a") as file:
        file.write('{"step": 2, "a')
    Log(tmp_path, 2).close()
    assert [line["step"] for line in log_lines(tmp_path)] == [1, 2]


def test_tensorboard_sees_each_step_once_after_a_crash(tmp_path):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    for resumed, steps in ((0, (1, 2, 3)), (2, (3, 4))):
        log = Log(tmp_path, resumed)
        for step in steps:
            log.write(step, {"turn.loss": step + resumed / 2})
        log.close()
    events = EventAccumulator(str(tmp_path))
    events.Reload()
    assert [(event.step, event.value) for event in events.Scalars("turn/loss")] == [
        (1, 1),
        (2, 2),
        (3, 4),
        (4, 5),
    ]


@pytest.mark.parametrize(
    "wrong", [{"precision": "fp8"}, {"steps": 0}, {"accumulate": 0}, {"keep": 0}]
)
def test_a_loop_out_of_range_is_refused(wrong):
    with pytest.raises(ValueError, match=rf"loop\.{next(iter(wrong))}="):
        LoopConfig(**wrong)


def test_ranks_start_alike_by_tensors_of_their_device(tmp_path, monkeypatch):
    """NCCL takes nothing else: what makes every rank's modules equal comes after they are moved."""
    toy, met = Toy(ToyRun(loop=loop(steps=1))), []

    def equalise(module):
        met.append({tensor.device.type for tensor in module.state_dict().values()})
        if len(met) == len(toy.turns):
            raise Interrupted("seen", 2)

    monkeypatch.setattr(distributed, "equalise", equalise)
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    with pytest.raises(Interrupted):
        toy.train(tmp_path / "run")
    assert met == [{"meta"}, {"meta"}]


def test_a_collective_of_a_tensor_elsewhere_is_a_fault(monkeypatch):
    monkeypatch.setattr(distributed, "device", lambda: torch.device("meta"))
    monkeypatch.setattr(torch.distributed, "is_initialized", lambda: True)
    for collective in (distributed.sum_, distributed.broadcast_):
        with pytest.raises(AssertionError, match="a collective of a tensor on cpu"):
            collective(torch.zeros(2))


@pytest.mark.parametrize("own, low", [(True, True), (False, False)])
def test_bf16_only_where_a_gpu_has_its_own(monkeypatch, own, low):
    """Those before Ampere say that they support it, and emulate it."""
    monkeypatch.setattr(
        torch.cuda, "is_bf16_supported", lambda including_emulation=True: own or including_emulation
    )
    assert has_bf16(torch.device("cuda")) is low and not has_bf16(torch.device("cpu"))
