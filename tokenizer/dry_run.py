"""What a tokenizer's run would take, without weights, data or memory for it: everything is on the
meta device.

The losses are the objective's own, traced as training/estimate.py says; docs/scaling.md has the
method, and a measurement beside it. An encoder that another run of configs/ trains is built as that
run would build it.
"""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import io
import json
import tempfile
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.data.dataset import DataConfig, split_items
from tokenizer.data.source import EMBEDDED, open_listing
from tokenizer.data.tar_shards import expand_braces, is_pattern
from tokenizer.discriminators.dino import DinoDiscriminator
from tokenizer.encoders.foundation import FoundationConfig, quiet_transformers
from tokenizer.encoders.pretrain import PretrainRun
from tokenizer.interface import CodeLayout
from tokenizer.objective import Adversary, LeCam, Objective, ObjectiveConfig
from tokenizer.perceptual import TRUNKS, Perceptual
from tokenizer.quantizers.search_on_cpu import BUDGET
from tokenizer.run import TokenizerRun
from training import distributed
from training.checkpoint import weights_path
from training.errors import UserError
from training.estimate import (
    MIB,
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
from training.loop import Batch
from training.sharding import shareable_blocks
from training.tracing import Cost, cost, trace

ORDER = (
    "encoder",
    "normaliser",
    "top_encoder",
    "project_top",
    "top_quantizer",
    "top_decoder",
    "project_in",
    "quantizer",
    "upsample",
    "project_out",
    "decoder",
)


@dataclasses.dataclass(frozen=True)
class Part:
    """One network, in numbers."""

    name: str
    trainable: int
    frozen: int
    buffers: int


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would take."""

    config: TokenizerRun
    parts: list[Part]
    layout: CodeLayout
    networks: _Networks
    num_images: int | None  # to train on; None where the data are not at hand
    features: int | None  # bytes on disk of one image's stored features
    needs: list[str]  # what is not at hand, and where it belongs

    @functools.cached_property
    def estimate(self) -> Estimate:
        """Traces the losses, which takes seconds."""
        return _estimate(self.config, self.networks)


def dry_run(config: TokenizerRun) -> str:
    """The resolved configuration with the plan as comments."""
    return commented(config, _describe(config, plan(config)))


def plan(config: TokenizerRun) -> Plan:
    """Reads small files at most and leaves none. Raises UserError for what could not be trained
    either."""
    distributed.samples_each(config.loop.batch_size, config.loop.accumulate)
    with _encoders_at_hand(config) as (usable, saved):
        networks = _Networks(usable, saved)
    if config.loop.sharding == "full":
        shareable_blocks(networks.model)
    needs, (num_images, _) = _needs(config), num_training_images(config.data)
    model = networks.model
    children = dict(model.named_children())
    names = [name for name in ORDER if name in children] + [
        name for name in children if name not in ORDER
    ]
    modules = {name: children[name] for name in names}
    if networks.objective.discriminator is not None:
        modules["discriminator"] = networks.objective.discriminator
    parts = [_part(name, module) for name, module in (modules | networks.helpers()).items()]
    features = None
    if config.features is not None:
        features = config.features.bytes_per_image(model.encoder.channels, model.layout.grids[-1])
    whole = [part for part in parts if part.trainable + part.frozen + part.buffers]
    return Plan(config, whole, model.layout, networks, num_images, features, needs)


def _estimate(config: TokenizerRun, networks: _Networks) -> Estimate:
    objective, model, adversary = config.objective, networks.model, networks.objective.discriminator
    begins = objective.adversarial_start_step if adversary is not None else 0
    moves, learning = [Move(networks.autoencoder_cost(), begins)], {"autoencoder": model}
    if begins:
        moves.append(Move(networks.cost_before_adversary(moves[0].cost), 0, begins))
    if adversary is not None:
        moves.append(Move(networks.discriminator_cost(), objective.discriminator_start_step))
        learning["discriminator"] = adversary
    repeated, again = with_activations_again(config.model), None
    if repeated != config.model:
        with _encoders_at_hand(dataclasses.replace(config, model=repeated)) as (usable, saved):
            again = _Networks(usable, saved).autoencoder_cost()
    published = num_bytes(model.state_dict().values())
    states = sum(num_bytes(module.state_dict().values()) for module in learning.values())
    trainable = sum(num_trainable(module.parameters()) for module in learning.values())
    helpers = networks.helpers().items()
    return Estimate(
        loop=config.loop,
        precision=networks.precision,
        tokens=model.layout.length,
        networks={name: Network.of(module) for name, module in learning.items()},
        helpers={
            name: num_bytes([*module.parameters(), *module.buffers()]) for name, module in helpers
        },
        moves=moves,
        again=again,
        search=4 * (BUDGET + max(max(q.num_codes) * q.dim for q in _quantizers(model))),
        checkpoint=published + states + 8 * trainable,
        published=published,
    )


def autoencoder_of(config: TokenizerRun) -> nn.Module:
    """The autoencoder of a run, on the meta device."""
    with _encoders_at_hand(config) as (config, saved), torch.device("meta"):
        return config.model.build(config.data.image_size, saved, weights=False)


class _Networks:
    """All networks of a run on the meta device, and its losses."""

    def __init__(self, config: TokenizerRun, saved: Path | None) -> None:
        """Raises UserError for what does not fit together."""
        self.config, self.size = config, config.data.image_size
        self.precision = planned_precision(config.loop.precision)
        objective = config.objective
        try:
            with torch.device("meta"):
                self.model = config.model.build(self.size, saved, weights=False)
                network = (
                    objective.discriminator.build(self.size, weights=False)
                    if objective.adversarial > 0
                    else None
                )
                adversary = (
                    Adversary(network, LeCam() if objective.lecam > 0 else None)
                    if network
                    else None
                )
        except UserError:
            raise
        except ValueError as error:
            raise UserError(f"{config.root}/{config.name}: {error}") from None
        for module, optimizer in (
            (self.model, config.optimizer),
            (adversary, config.discriminator_optimizer),
        ):
            if module is not None:
                optimizer.build(module)  # finds prefixes of `rates` that name nothing
        teacher = None
        if objective.distillation > 0 and objective.distillation_target == "teacher":
            teacher = copy.deepcopy(self.model.encoder).eval().requires_grad_(False)
        self.objective = _Losses(objective, self.model, adversary, teacher)

    def autoencoder_cost(self) -> Cost:
        """While its adversary judges, where there is one."""
        with self._adversary_at_rest():
            loss = self._autoencoder_loss(self._late)
            return cost(loss, extremes(self.config.loop), self.precision, self.model, self._parts())

    def cost_before_adversary(self, late: Cost) -> Cost:
        """The difference to `late` is in proportion to the samples."""
        with self._adversary_at_rest():
            many = trace(
                self._autoencoder_loss(0),
                late.samples[1],
                self.precision,
                self.model,
                self._parts(),
            )
        return late.less(many)

    def discriminator_cost(self) -> Cost:
        adversary = self.objective.discriminator

        def loss(samples: int) -> Tensor:
            batch = self._batch(samples)
            batch.extras["reconstruction"] = torch.empty_like(batch["images"])
            total = self.objective.discriminator_loss(batch, self._late).total
            adversary.update(0, False)
            return total

        return cost(
            loss,
            extremes(self.config.loop),
            self.precision,
            adversary,
            {"discriminator": adversary},
        )

    def helpers(self) -> dict[str, nn.Module]:
        """What a run holds beside the modules that learn."""
        objective, helpers = self.objective, {}
        if objective.discriminator is not None and isinstance(
            objective.discriminator.network, DinoDiscriminator
        ):
            helpers["discriminator's trunk"] = objective.discriminator.network.trunk
        if objective.teacher is not None:
            helpers["teacher"] = objective.teacher
        if objective.perceptual is not None:
            helpers["LPIPS trunk"] = objective.perceptual.network.net
        return helpers

    @property
    def _late(self) -> int:
        """A step at which all terms of the loss have begun."""
        return (
            self.config.objective.adversarial_start_step
            + self.config.objective.adversarial_ramp_steps
            + 1
        )

    def _autoencoder_loss(self, step: int) -> Callable[[int], Tensor]:
        def loss(samples: int) -> Tensor:
            total = self.objective.autoencoder_loss(self._batch(samples), step).total
            self.model.update(0, False)
            return total

        return loss

    def _batch(self, samples: int) -> Batch:
        tensors = {"images": torch.empty(samples, 3, self.size, self.size, device="meta")}
        if self.config.features is not None:
            shape = (samples, self.model.encoder.channels, *self.model.layout.grids[-1])
            tensors["features"] = torch.empty(shape, device="meta")
        return Batch(tensors, torch.empty(samples, dtype=torch.int64, device="meta"))

    def _parts(self) -> dict[str, nn.Module]:
        helpers = {
            "LPIPS": self.objective.perceptual,
            "discriminator": self.objective.discriminator,
        }
        return dict(self.model.named_children()) | {
            name: part for name, part in helpers.items() if part is not None
        }

    @contextlib.contextmanager
    def _adversary_at_rest(self) -> Iterator[None]:
        """As between its phases."""
        adversary = self.objective.discriminator
        learning = (
            [p for p in adversary.parameters() if p.requires_grad] if adversary is not None else []
        )
        for parameter in learning:
            parameter.requires_grad_(False)
        try:
            yield
        finally:
            for parameter in learning:
                parameter.requires_grad_(True)


class _Losses(Objective):
    """The objective without draws and files, neither of which has a place on the meta device."""

    def __init__(
        self,
        config: ObjectiveConfig,
        autoencoder: nn.Module,
        adversary: nn.Module | None,
        teacher: nn.Module | None,
    ) -> None:
        self.config, self.autoencoder, self.discriminator, self.teacher = (
            config,
            autoencoder,
            adversary,
            teacher,
        )
        self.perceptual = _perceptual(config.lpips_net) if config.perceptual > 0 else None

    def _judge(self, images: Tensor, batch: Batch, step: int, stream: int) -> Tensor:
        return self.discriminator(images.float())

    def _noise(self, images: Tensor, positions: Tensor, step: int) -> Tensor | None:
        if self.autoencoder.noise_tau == 0:
            return None
        channels, grid = self.autoencoder.encoder.channels, self.autoencoder.layout.grids[-1]
        return images.new_empty(len(images), channels, *grid)


def _perceptual(net: str) -> Perceptual:
    """LPIPS without the weights of its trunk."""
    import lpips

    if net not in TRUNKS:
        raise UserError(f"objective.lpips_net={net} is not one of {', '.join(TRUNKS)}")
    perceptual = Perceptual.__new__(Perceptual)
    nn.Module.__init__(perceptual)
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        perceptual.network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return perceptual.to("meta").eval().requires_grad_(False)


@contextlib.contextmanager
def _encoders_at_hand(config: TokenizerRun) -> Iterator[tuple[TokenizerRun, Path | None]]:
    """The configuration, with an encoder that can be built now, and the folder of an earlier
    stage's architecture."""
    saved = Path(config.start_from) / "weights" if config.start_from else None
    encoder = config.model.encoder
    if saved is not None and (saved / "encoder").is_dir():
        yield config, saved
        return
    made = None
    if isinstance(encoder, FoundationConfig) and not Path(encoder.name).exists():
        made = made_by(PretrainRun, Path(encoder.name).parent)
    if made is None:
        yield config, None
        return
    with tempfile.TemporaryDirectory() as folder, quiet_transformers():
        with torch.device("meta"):
            made.mae.build(config.data.image_size).config.save_pretrained(folder)
        halves = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3}
        Path(folder, "preprocessor_config.json").write_text(json.dumps(halves))
        model = dataclasses.replace(config.model, encoder=dataclasses.replace(encoder, name=folder))
        yield dataclasses.replace(config, model=model), None


def _quantizers(model: nn.Module) -> list[nn.Module]:
    return [getattr(model, name) for name in ("top_quantizer", "quantizer") if hasattr(model, name)]


def _part(name: str, module: nn.Module) -> Part:
    trainable = num_trainable(module.parameters())
    frozen = sum(parameter.numel() for parameter in module.parameters()) - trainable
    return Part(name, trainable, frozen, sum(buffer.numel() for buffer in module.buffers()))


def num_training_images(data: DataConfig) -> tuple[int | None, int | None]:
    """How many images and classes there are, where they are in this machine's folders; none is
    decoded."""
    if not _here(data.source):
        return None, None
    listing = open_listing(data.source, 0, data.choice)
    return len(split_items(listing, "train", data.held_out)), len(listing.class_names)


def _here(source: str) -> bool:
    sources = expand_braces(source) if is_pattern(source) else [source]
    return source in EMBEDDED or all(Path(each).expanduser().exists() for each in sources)


def _needs(config: TokenizerRun) -> list[str]:
    """What training would have to fetch, or the user to bring."""
    objective, model = config.objective, config.model
    needs = []
    if not _here(config.data.source):
        needs.append(f"images: data.source={config.data.source}")
    if config.start_from:
        if not weights_path(Path(config.start_from)).is_file():
            needs.append(f"a finished run: start_from={config.start_from}")
    elif isinstance(model.encoder, FoundationConfig) and not Path(model.encoder.name).is_dir():
        origin = (
            "a model of the Hub"
            if made_by(PretrainRun, Path(model.encoder.name).parent) is None
            else "an encoder"
        )
        needs.append(f"{origin}: model.encoder.name={model.encoder.name}")
    decoder = getattr(model.decoder, "weights", None)
    if decoder and not config.start_from and not Path(decoder).exists():
        needs.append(f"a trained decoder: model.decoder.weights={decoder}")
    if objective.perceptual > 0 and not Path(objective.lpips_weights).is_file():
        trunk = TRUNKS[objective.lpips_net]
        needs.append(f"torchvision's {trunk}: objective.lpips_weights={objective.lpips_weights}")
    trunk = getattr(objective.discriminator, "name", None)
    if objective.adversarial > 0 and trunk and not Path(trunk).is_dir():
        needs.append(f"a model of the Hub: objective.discriminator.name={trunk}")
    return needs


def _describe(config: TokenizerRun, plan: Plan) -> Iterator[str]:
    layout, estimate = plan.layout, plan.estimate
    yield f"{config.root}/{config.name}: a dry run; nothing was written."
    yield ""
    yield f"{'part':<22}{'trainable':>15}{'frozen':>15}{'buffers':>15}"
    for part in plan.parts:
        yield f"{part.name:<22}{part.trainable:>15,}{part.frozen:>15,}{part.buffers:>15,}"
    total = [
        sum(getattr(part, kind) for part in plan.parts)
        for kind in ("trainable", "frozen", "buffers")
    ]
    yield f"{'all':<22}{total[0]:>15,}{total[1]:>15,}{total[2]:>15,}"
    yield ""
    yield (
        f"codes: {layout.length} per image ({layout.text}), {layout.bits:.0f} bits, "
        f"{plan.config.data.image_size} px"
    )
    yield from estimate.describe(plan.num_images)
    activations = estimate.moves[0].cost.of_each.kept
    shares = ", ".join(
        f"{name} {size / MIB:.3g}"
        for name, size in activations.items()
        if size >= 0.01 * sum(activations.values())
    )
    yield f"activations kept per image, MiB: {shares}"
    stored = (
        f", stored features of {plan.features / MIB:.3g} an image"
        if plan.features is not None
        else ""
    )
    yield estimate.disk() + stored
    for need in plan.needs:
        yield f"needs: {need}"
