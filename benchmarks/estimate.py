"""What --dry-run calculates beside what a real run takes on this machine's CPU: step, memory and
checkpoint.

    python -m benchmarks.estimate

Each configuration trains alone in a fresh process: memory is the largest resident size beyond that
before the networks were built, seconds the median step, and the peak that of fp32 products,
measured between the steps. Results go to RESULTS.md beside this file.
"""

from __future__ import annotations

import json
import statistics
import sys
import time

import torch
from torch import Tensor

from benchmarks.measure import in_fresh_process, keep, peak_mib, table
from priors import dry_run as priors_dry_run
from priors.run import PriorRun
from tokenizer import dry_run as tokenizer_dry_run
from tokenizer.objective import Objective
from tokenizer.run import TokenizerRun
from tokenizer.train import phases_of
from training.config import load
from training.ema import Ema
from training.estimate import MIB, this_cpu
from training.loop import Batch, Phase

FP32 = ["loop.precision=fp32"]
CASES = {  # name: (schema, file, overrides)
    "VQ-VAE, 32 px": (TokenizerRun, "configs/cifar10/tokenizer.yaml", ["loop.batch_size=64"]),
    "VQGAN, 64 px": (
        TokenizerRun,
        "configs/imagenet/VQGAN-f16.yaml",
        [
            "data.image_size=64",
            "loop.batch_size=4",
            "model.encoder.channels=64",
            "model.decoder.channels=64",
            "objective.perceptual=0",
        ],
    ),
    "autoregressive prior": (
        PriorRun,
        "configs/imagenet/prior-300M.yaml",
        [
            "prior.backbone.dim=384",
            "prior.backbone.depth=6",
            "prior.backbone.heads=6",
            "loop.batch_size=4",
            "tokens=/nowhere",
        ],
    ),
    "the same, activations again": (
        PriorRun,
        "configs/imagenet/prior-300M.yaml",
        [
            "prior.backbone.dim=384",
            "prior.backbone.depth=6",
            "prior.backbone.heads=6",
            "loop.batch_size=4",
            "tokens=/nowhere",
            "prior.backbone.gradient_checkpointing=true",
        ],
    ),
}
STEPS = 3


def measure(name: str) -> dict[str, float]:
    """One configuration, in this process."""
    schema, path, overrides = CASES[name]
    config = load(schema, path, [*overrides, *FP32])
    estimate = (
        (tokenizer_dry_run if schema is TokenizerRun else priors_dry_run).plan(config).estimate
    )
    memory = estimate.memory(1)
    this_cpu()
    before = peak_mib()
    phases, batch = _phases(config)
    optimizers = [phase.optimizer.build(phase.module) for phase in phases]
    average, seconds, peaks = Ema(phases[0].module, 0.999), [], []
    for step in range(STEPS + 1):
        peaks.append(this_cpu().fp32)
        started = time.perf_counter()
        for phase, optimizer in zip(phases, optimizers):
            for other in phases:
                other.module.requires_grad_(other is phase)
            phase.module.train()
            phase.loss(batch, 10**6).total.backward()
            optimizer.step()
            optimizer.zero_grad()
            if phase.after_step:
                phase.after_step(step, True)
        average.update(step)
        seconds.append(time.perf_counter() - started)
    taken, peak = statistics.median(seconds[1:]), statistics.median(peaks)
    flops = sum(estimate.flops(1, config.loop.steps - 1).values())
    return {
        "gflops": flops / 1e9,
        "seconds": taken,
        "peak": peak / 1e9,
        "share": flops / taken / peak,
        "calculated": sum(memory.values()) / MIB,
        "measured": peak_mib() - before,
    }


def _phases(config: TokenizerRun | PriorRun) -> tuple[list[Phase], Batch]:
    samples = config.loop.batch_size
    positions = torch.arange(samples)
    if isinstance(config, TokenizerRun):
        size = config.data.image_size
        objective = Objective(config.objective, config.model.build(size), None)
        return phases_of(config, objective), Batch(
            {"images": torch.rand(samples, 3, size, size) * 2 - 1}, positions
        )
    codes = priors_dry_run.codes_of(config)
    prior = config.prior.build(codes.layout, codes.num_classes)

    def loss(batch: Batch, step: int) -> Tensor:
        return prior.loss(batch["codes"], batch["codes"][:, 0] % codes.num_classes)

    drawn = torch.randint(min(codes.layout.num_codes), (samples, codes.layout.length))
    return [Phase("prior", prior, loss, config.optimizer)], Batch({"codes": drawn}, positions)


def main() -> None:
    if len(sys.argv) > 1:
        print(json.dumps(measure(sys.argv[1])))
        return
    rows = []
    for name in CASES:
        found = json.loads(in_fresh_process("benchmarks.estimate", name))
        rows.append(
            [
                name,
                f"{found['gflops']:.1f}",
                f"{found['seconds']:.2f}",
                f"{found['peak']:.0f}",
                f"{found['share']:.0%}",
                f"{found['calculated']:.0f}",
                f"{found['measured']:.0f}",
                f"{found['calculated'] / found['measured']:.2f}",
            ]
        )
    header = [
        "run",
        "GFLOP a step, calculated",
        "seconds a step",
        "peak of products, GFLOP/s",
        "share of that peak",
        "MiB, calculated",
        "MiB, measured",
        "calculated / measured",
    ]
    keep("Estimates", "python -m benchmarks.estimate", table(header, rows))


if __name__ == "__main__":
    main()
