"""What a prior's run would take, without tokens, weights or memory for it: everything is on the
meta device.

The loss is the prior's own, traced as training/estimate.py says. The layout of the codes is the
token cache's; where there is none yet, that of the tokenizer which the configurations in configs/
say will make it.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Iterator
from pathlib import Path

import torch
from torch import Tensor

from priors.run import PriorRun
from tokenizer.interface import CodeLayout
from training import distributed
from training.estimate import (
    Estimate,
    Move,
    Network,
    commented,
    extremes,
    made_by,
    num_bytes,
    num_trainable,
    planned_precision,
    with_activations_again,
)
from training.sharding import shareable_blocks
from training.tracing import Cost, WeightsOnMeta, cost

ASSUMED = CodeLayout(((16, 16),), (16384,))  # of tokens that nothing tells about
ASSUMED_CLASSES = 1000


@dataclasses.dataclass(frozen=True)
class Codes:
    """What a prior is to learn from."""

    layout: CodeLayout
    num_classes: int
    num_images: int | None  # to train on; None where they are not at hand
    origin: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would take."""

    codes: Codes
    trainable: dict[str, int]  # parameters by part
    estimate: Estimate


def dry_run(config: PriorRun) -> str:
    """The resolved configuration with the plan as comments."""
    return commented(config, _describe(config, plan(config)))


def plan(config: PriorRun) -> Plan:
    """Reads small files at most and writes none. Raises UserError for what could not be trained
    either."""
    distributed.samples_each(config.loop.batch_size, config.loop.accumulate)
    codes = codes_of(config)
    precision = planned_precision(config.loop.precision)
    repeated = with_activations_again(config.prior)
    with WeightsOnMeta():
        prior, other = (
            each.build(codes.layout, codes.num_classes).to("meta")
            for each in (config.prior, repeated)
        )
    if config.loop.sharding == "full":
        shareable_blocks(prior)
    config.optimizer.build(prior)  # finds prefixes of `rates` that name nothing

    def cost_of(module: torch.nn.Module) -> Cost:
        return cost(
            lambda samples: _loss(module, samples), extremes(config.loop), precision, module, {}
        )

    trainable, state = num_trainable(prior.parameters()), num_bytes(prior.state_dict().values())
    estimate = Estimate(
        loop=config.loop,
        precision=precision,
        tokens=codes.layout.length,
        networks={"prior": Network.of(prior)},
        helpers={},
        moves=[Move(cost_of(prior))],
        again=cost_of(other) if repeated != config.prior else None,
        search=0,
        checkpoint=2 * state + 8 * trainable,
        published=state,
    )
    parts = {name: num_trainable(child.parameters()) for name, child in _leaves(prior)}
    return Plan(codes, parts, estimate)


def codes_of(config: PriorRun) -> Codes:
    """Of the token cache; else of the tokenizer that would make it; else what is usual on
    ImageNet."""
    from tokenizer.cache import TokenCache
    from tokenizer.dry_run import autoencoder_of, num_training_images
    from tokenizer.encode import TokensRun
    from tokenizer.run import TokenizerRun, load_config

    folder = Path(config.tokens)
    if (folder / "manifest.json").is_file():
        cache = TokenCache.open(folder)
        return Codes(
            cache.layout, len(cache.class_names), len(cache.split("train").codes), str(folder)
        )
    tokens = made_by(TokensRun, folder)
    if tokens is not None:
        run = Path(tokens.tokenizer)
        made = load_config(run) if (run / "config.yaml").is_file() else made_by(TokenizerRun, run)
        if made is not None:
            data = (
                made.data
                if tokens.source is None
                else dataclasses.replace(made.data, source=tokens.source)
            )
            num_images, num_classes = num_training_images(data)
            origin = f"{folder} of {made.root}/{made.name}, which are not at hand"
            if num_classes is None:
                origin += f"; {ASSUMED_CLASSES} classes are assumed"
            return Codes(
                autoencoder_of(made).layout, num_classes or ASSUMED_CLASSES, num_images, origin
            )
    return Codes(
        ASSUMED,
        ASSUMED_CLASSES,
        None,
        f"assumed: nothing in configs/ makes {folder}; give tokens=FOLDER",
    )


def _loss(prior: torch.nn.Module, samples: int) -> Tensor:
    """Of so many sequences on the meta device."""
    length = prior.layout.length
    codes = torch.empty(samples, length, dtype=torch.int64, device="meta")
    uniform = torch.empty(samples, length + 2, device="meta")
    return prior.loss(codes, codes[:, 0], uniform).total


def _leaves(prior: torch.nn.Module) -> Iterator[tuple[str, torch.nn.Module]]:
    """Its parts, through those that have but one."""
    for name, child in prior.named_children():
        if name in ("backbone", "groups", "top", "bottom"):
            yield from (
                (f"{name} {inner}" if name in ("top", "bottom") else inner, part)
                for inner, part in _leaves(child)
            )
        else:
            yield name, child


def _describe(config: PriorRun, plan: Plan) -> Iterator[str]:
    layout, estimate = plan.codes.layout, plan.estimate
    yield f"{config.root}/{config.name}: a dry run; nothing was written."
    yield ""
    yield f"{'part':<22}{'trainable':>15}"
    for name, count in plan.trainable.items():
        if count:
            yield f"{name:<22}{count:>15,}"
    yield f"{'all':<22}{estimate.networks['prior'].trainable:>15,}"
    yield ""
    yield f"codes: {layout.length} per image ({layout.text}), {plan.codes.num_classes} classes"
    yield (
        f"  from {plan.codes.origin}"
        if not plan.codes.origin.startswith("assumed")
        else f"  {plan.codes.origin}"
    )
    yield from estimate.describe(plan.codes.num_images)
    yield estimate.disk()
