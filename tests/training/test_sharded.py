"""Sharded (FSDP2), compiled and checkpointed training is plain training: the same weights, files
and figures."""

from __future__ import annotations

import dataclasses
import functools
import json
import os
import signal
import sys
from pathlib import Path
from typing import Any

import processes
import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from toy import OPTIMIZER, fingerprint, leaves, log_lines, loop

from priors.backbone import BackboneConfig, cross_entropy
from tokenizer.data.loader import feed
from tokenizer.interface import CodeLayout
from training import distributed, randomness
from training.checkpoint import FREE_KEYS, Run, load_weights
from training.errors import UserError
from training.loop import Batch, LoopConfig, Loss, Phase, train
from training.optim import OptimizerConfig
from training.phase import PhaseRunner
from training.sharding import blocks_of, is_shared, local
from training.signals import Interrupted

WIDTH = 6  # rows do not divide by two processes in the blocks' first layers
SHARDED = loop(sharding="full", accumulate=2)


@dataclasses.dataclass(frozen=True)
class NetworkRun:
    loop: LoopConfig = SHARDED
    optimizer: OptimizerConfig = OPTIMIZER
    gradient_checkpointing: bool = False
    faulty: bool = False


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.norm, self.dropout = nn.LayerNorm(WIDTH), randomness.Dropout(0.2)
        self.layers = nn.Sequential(nn.Linear(WIDTH, 9), nn.GELU(), nn.Linear(9, WIDTH))

    def forward(self, features: Tensor) -> Tensor:
        return features + self.dropout(self.layers(self.norm(features)))


class Network(nn.Module):
    """As transformers are built: a stem, blocks of which the first is frozen, a head; and a buffer
    that follows."""

    def __init__(self, gradient_checkpointing: bool) -> None:
        super().__init__()
        self.gradient_checkpointing = gradient_checkpointing
        self.stem, self.head = nn.Linear(4, WIDTH), nn.Linear(WIDTH, 4)
        self.blocks = nn.ModuleList(Block() for _ in range(3))
        self.blocks[0].requires_grad_(False)
        self.register_buffer("mean", torch.zeros(4))
        self.seen: list[Tensor] = []

    def forward(self, rows: Tensor) -> Tensor:
        features = self.stem(rows)
        for block in self.blocks:
            again = self.gradient_checkpointing and torch.is_grad_enabled()
            features = (
                checkpoint(block, features, use_reentrant=False) if again else block(features)
            )
        self.seen.append(features.detach()[:, :4])
        return self.head(features)

    def update(self, step: int, taken: bool) -> None:
        seen, self.seen = torch.cat(self.seen), []
        if taken:
            self.mean.lerp_(distributed.mean_(seen.mean(0)), 0.5)


class Rows:
    rows = torch.randn((20, 4), generator=torch.Generator().manual_seed(1), dtype=torch.float64)

    def __len__(self) -> int:
        return len(self.rows)

    def gather(self, keys: list[tuple[int, int]]) -> dict[str, Tensor]:
        return {"rows": self.rows[[index for _, index in keys]]}


class Training:
    """A network, and a critic that is not published and so stays whole."""

    def __init__(self, config: NetworkRun) -> None:
        torch.manual_seed(0)
        self.config = config
        self.network = Network(config.gradient_checkpointing).double()
        self.critic = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 1)).double()
        self.shown: list[list[str]] = []

    def network_loss(self, batch: Batch, step: int) -> Loss:
        made = self.network(batch["rows"])
        batch.extras["made"] = made.detach()
        error = (made - batch["rows"].roll(1, 1)).square().mean()
        return Loss(error - 0.1 * self.critic(made).mean(), {"error": error})

    def critic_loss(self, batch: Batch, step: int) -> Loss:
        total = (self.critic(batch.extras["made"]) - self.critic(batch["rows"])).mean()
        return Loss(total, {"gap": total})

    def measure(self, averaged: nn.Module) -> dict[str, float]:
        self.shown.append(
            [name for name, tensor in averaged.state_dict().items() if is_shared(tensor)]
        )
        return {"error": float((averaged(Rows.rows) - Rows.rows).square().mean())}

    def train(self, folder: Path, stop_at: int | None = None) -> nn.Module:
        def network_loss(batch: Batch, step: int) -> Loss:
            if step == stop_at and distributed.rank() == distributed.world() - 1:
                os.kill(os.getpid(), signal.SIGTERM)
            return self.network_loss(batch, step)

        turns = [
            Phase(
                "network",
                self.network,
                network_loss,
                self.config.optimizer,
                after_step=self.network.update,
            ),
            Phase("critic", self.critic, self.critic_loss, self.config.optimizer),
        ]
        batches = feed(
            Rows(), self.config.loop.batch_size, seed=5, accumulate=self.config.loop.accumulate
        )
        run = Run.open(folder, self.config)
        return train(
            self.config.loop,
            run,
            turns,
            batches,
            seed=7,
            published=self.network,
            measure=self.measure,
        )


def launch(folder: Path) -> None:
    """What each of two ranks does; `folder`/begun holds a run that one process stopped."""
    torch.set_num_threads(1)
    distributed.start()
    facts: dict[str, Any] = {}
    sharded = Training(NetworkRun())
    averaged = sharded.train(folder / "sharded")
    parameters = dict(sharded.network.named_parameters())
    facts["shared"] = sorted(name for name, parameter in parameters.items() if is_shared(parameter))
    facts["held"] = sum(local(parameter).numel() for parameter in parameters.values())
    facts["all"] = sum(parameter.numel() for parameter in parameters.values())
    facts["shown"] = sharded.shown
    facts["averaged"] = sum(parameter.numel() for parameter in averaged.parameters())
    again = Training(NetworkRun(gradient_checkpointing=True))
    again.train(folder / "again")
    try:
        Training(NetworkRun()).train(folder / "stopped", stop_at=4)
    except Interrupted as interrupted:
        facts["interrupted"] = [interrupted.code, str(interrupted)]
    Training(NetworkRun()).train(folder / "begun")
    (folder / f"rank-{distributed.rank()}.json").write_text(json.dumps(facts))
    distributed.finish()


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    """One process, nothing sharded."""
    folder = tmp_path_factory.mktemp("plain") / "run"
    Training(NetworkRun(loop(accumulate=2))).train(folder)
    return folder


@pytest.fixture(scope="module")
def two_ranks(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("ranks")
    with pytest.raises(Interrupted):
        Training(NetworkRun(loop())).train(folder / "begun", stop_at=4)
    done = processes.torchrun(2, __file__, folder)
    assert done.returncode == 0, done.stderr
    return folder


def assert_same(folder: Path, other: Path, tolerance: float) -> None:
    """Whole checkpoints, weights and figures."""
    ours, theirs = (Run(each, None).latest() for each in (folder, other))
    ours.pop("meter"), theirs.pop("meter")
    ours, theirs = leaves(ours), leaves(theirs)
    assert ours.keys() == theirs.keys()
    for name, value in ours.items():
        torch.testing.assert_close(
            theirs[name], value, rtol=0, atol=tolerance, msg=lambda m, name=name: f"{name}: {m}"
        )
    weights = load_weights(other)
    assert all(torch.equal(tensor, theirs[f"/ema/{name}"]) for name, tensor in weights.items())
    for line, second in zip(log_lines(folder), log_lines(other), strict=True):
        assert line == pytest.approx(second, abs=max(tolerance, 1e-12))


def facts_of(folder: Path, rank: int) -> dict[str, Any]:
    return json.loads((folder / f"rank-{rank}.json").read_text())


def test_two_sharded_ranks_train_as_one_process_does(two_ranks, plain):
    assert_same(plain, two_ranks / "sharded", 1e-12)


def test_each_rank_holds_its_part_of_the_blocks(two_ranks):
    first, second = facts_of(two_ranks, 0), facts_of(two_ranks, 1)
    assert first["shared"] == second["shared"] and len(first["shared"]) == 18
    assert all(name.startswith("blocks.") for name in first["shared"])
    whole = sum(
        p.numel() for name, p in Network(False).named_parameters() if not name.startswith("blocks.")
    )
    assert first["held"] + second["held"] == first["all"] + whole
    assert second["held"] < 0.65 * first["all"]
    assert (
        second["averaged"] == second["held"] and first["averaged"] == first["all"]
    )  # rank 0's is for others to use
    assert (
        first["shown"] == [[], []] and second["shown"] == []
    )  # figures are of the whole average, on rank 0


def test_a_sharded_run_goes_on_in_one_process(two_ranks, plain):
    codes = [facts_of(two_ranks, rank)["interrupted"] for rank in (0, 1)]
    assert codes[0] == codes[1] and codes[0][0] == 75 and "step 5 " in codes[0][1]
    assert json.loads((two_ranks / "stopped" / "requeue").read_text())["step"] == 5
    Training(NetworkRun(loop())).train(two_ranks / "stopped")
    assert_same(plain, two_ranks / "stopped", 1e-12)
    assert not (two_ranks / "stopped" / "requeue").exists()


def test_one_processs_run_goes_on_sharded(two_ranks, plain):
    assert_same(plain, two_ranks / "begun", 1e-12)


def test_recomputing_blocks_changes_no_bit(two_ranks, plain, tmp_path):
    assert fingerprint(two_ranks / "again") == fingerprint(two_ranks / "sharded")
    Training(NetworkRun(loop(accumulate=2), gradient_checkpointing=True)).train(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(plain)


def test_a_prior_that_recomputes_its_blocks_learns_the_same():
    """Dropout included: its masks belong to samples."""
    layout, losses, gradients = CodeLayout(((4, 4),), (8,)), [], []
    for again in (False, True):
        torch.manual_seed(0)
        config = BackboneConfig(dim=16, depth=2, heads=2, dropout=0.5, gradient_checkpointing=again)
        backbone = config.build(layout, 3, causal=True).train()
        nn.init.normal_(backbone.heads[0].weight)
        randomness.number_streams(backbone)
        codes, labels = torch.arange(64).view(4, 16) % 8, torch.arange(4) % 3
        with randomness.samples((1, 2), torch.arange(4)):
            losses.append(cross_entropy(layout, backbone(codes, labels), codes).mean())
            losses[-1].backward()
        gradients.append([parameter.grad for parameter in backbone.parameters()])
        assert blocks_of(backbone) == list(backbone.blocks)
    assert torch.equal(*losses)
    assert all(map(torch.equal, *gradients))


def test_how_a_step_is_computed_may_change():
    assert {"accumulate", "sharding", "compile", "gradient_checkpointing"} <= FREE_KEYS


def test_blocks_hold_nothing_but_parameters():
    """What anything but the optimizer changes is no block: codebooks with their statistics,
    scalars, bare layers."""
    network = Network(False)
    assert blocks_of(network) == list(network.blocks)
    counting, scalar = Block(), Block()
    counting.register_buffer("usage", torch.zeros(3))
    scalar.temperature = nn.Parameter(torch.ones(()))
    for entry in (counting, scalar, nn.Linear(2, 2), nn.Embedding(2, 2)):
        assert blocks_of(nn.Sequential(nn.ModuleList([entry, entry]))) == []
    inner = nn.ModuleList([Block()])
    assert blocks_of(nn.ModuleList([nn.ModuleDict({"blocks": inner})])) == list(inner)


def test_one_process_needs_no_sharding(plain, tmp_path):
    Training(NetworkRun(SHARDED)).train(tmp_path / "run")
    assert fingerprint(tmp_path / "run") == fingerprint(plain)


@pytest.fixture
def traced(monkeypatch) -> list[type]:
    """What is compiled, by a backend that takes no compiler."""
    kinds, compile_module = [], nn.Module.compile

    def compile_(module: nn.Module, *arguments: Any, **options: Any) -> None:
        kinds.append(type(module))
        compile_module(module, backend="aot_eager")

    monkeypatch.setattr(nn.Module, "compile", compile_)
    yield kinds
    torch._dynamo.reset()


def test_compiled_blocks_train_as_plain_ones(plain, tmp_path, traced):
    training = Training(NetworkRun(loop(accumulate=2, compile=True)))
    names = list(training.network.state_dict())
    training.train(tmp_path / "run")
    assert traced == [Block] * 3 + [nn.Sequential]  # the critic has no blocks
    assert list(training.network.state_dict()) == names
    assert_same(plain, tmp_path / "run", 1e-12)


@pytest.mark.slow
def test_the_default_compiler_gives_the_same_to_rounding(plain, tmp_path):
    Training(NetworkRun(loop(accumulate=2, compile=True))).train(tmp_path / "run")
    assert_same(plain, tmp_path / "run", 1e-9)


def test_what_cannot_be_sharded_is_refused(monkeypatch):
    turn = Phase("critic", nn.Linear(2, 2), lambda batch, step: None, OPTIMIZER)
    make = functools.partial(
        PhaseRunner, turn, torch.device("cpu"), steps=1, clip=1.0, low=False, compiled=False
    )
    with pytest.raises(UserError, match=r"loop\.sharding=full: .* no transformer blocks"):
        make(sharded=True)


if __name__ == "__main__":
    launch(Path(sys.argv[1]))
