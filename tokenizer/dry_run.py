"""What a tokenizer's run would take, without weights, data or memory for it: the model is built on the meta device.

Memory per process, in bytes of the named tensors; neither what CUDA takes for itself nor fragmentation:

weights      4 per parameter and buffer, whether it learns or not
gradients    4 per trainable parameter
moments      8 per trainable parameter (AdamW)
average      4 per parameter and buffer of the tokenizer, whose moving average is kept
activations  what the backward pass of one micro-batch needs. A transformer layer of width d and MLP width m keeps
             8 d + 2 m values per token (normalised input, query, key, value, attended; normalised, hidden before and
             after its non-linearity, and the two residual streams), after Korthikanti et al. 2022
             (arXiv:2205.05198), section 4, without dropout and with attention that keeps no weights; under bf16 the
             residual streams stay in fp32 beside three copies of the normalised input. Layers that run again in the
             backward pass keep d, and one of them the rest. In convolutional parts a convolution keeps its input,
             and a norm its input and output, these in fp32; what attention does at their coarsest grid is left out.
             A quantizer keeps four tensors of the latents' size and two of its codebook's, in fp32, and one block
             of distances; LPIPS, in fp32, what its convolutions keep and two tensors of each layer that it
             compares. A frozen encoder keeps nothing. Under bf16 every weight that learns has a bf16 copy. The two
             turns of a step follow each other, and the larger one counts.
"""

from __future__ import annotations

import contextlib
import dataclasses
import io
import math
import warnings
from collections.abc import Iterable, Iterator
from pathlib import Path

import torch
from torch import Tensor, nn

from tokenizer.data.listings import EMBEDDED, open_listing
from tokenizer.data.sources import split_items
from tokenizer.decoders.vit import Size, ViTDecoder, mirrored
from tokenizer.discriminators.dino import DinoDiscriminator
from tokenizer.encoders.foundation import FoundationConfig, FoundationEncoder
from tokenizer.hierarchical import Hierarchical
from tokenizer.interface import CodeLayout
from tokenizer.perceptual import TRUNKS
from tokenizer.quantizers.search import BUDGET
from tokenizer.run import TokenizerRun
from training import distributed
from training.checkpoint import weights_path
from training.command import UserError
from training.config import to_yaml

MIB, GIB = 2**20, 2**30
ORDER = ("encoder", "normaliser", "top_encoder", "project_top", "top_quantizer", "top_decoder", "project_in",
         "quantizer", "upsample", "project_out", "decoder")  # fmt: skip


@dataclasses.dataclass(frozen=True)
class Part:
    """One network. Counts are of numbers, `weights` and `activations` of bytes."""

    name: str
    trainable: int
    frozen: int
    buffers: int
    weights: int
    averaged: bool = False
    activations: int = 0  # of one micro-batch


@dataclasses.dataclass(frozen=True)
class Plan:
    """What a run would take of one process."""

    parts: list[Part]
    layout: CodeLayout
    image_size: int
    precision: str  # "fp32" or "bf16"
    micro_batch: int
    checkpoint: int  # bytes
    published: int  # bytes of weights/model.safetensors
    discriminator_turn: int  # bytes of activations in it; 0 without a discriminator
    num_images: int | None  # to train on; None where the data are not at hand
    needs: list[str]  # what is not at hand, and where it belongs

    @property
    def memory(self) -> dict[str, int]:
        """Bytes by part, in the order of the module's docstring."""
        trainable = sum(part.trainable for part in self.parts)
        autoencoder_turn = sum(part.activations for part in self.parts)
        copies = 2 * trainable if self.precision == "bf16" else 0
        return {
            "weights": sum(part.weights for part in self.parts),
            "gradients": 4 * trainable,
            "moments": 8 * trainable,
            "average": sum(part.weights for part in self.parts if part.averaged),
            "activations": max(autoencoder_turn, self.discriminator_turn) + copies,
        }


def dry_run(config: TokenizerRun) -> str:
    """The resolved configuration as YAML with the plan as comments: by itself a configuration file again."""
    return to_yaml(config) + "\n" + "\n".join(f"# {line}".rstrip() for line in _describe(config, plan(config)))


def plan(config: TokenizerRun) -> Plan:
    """Reads small files at most and writes nothing. Raises UserError for what could not be trained either."""
    world, loop, objective = distributed.world(), config.loop, config.objective
    micro_batch, rest = divmod(loop.batch_size, world * loop.accumulate)
    if rest or not micro_batch:
        raise UserError(
            f"loop.batch_size={loop.batch_size} cannot be shared evenly by {world} processes x loop.accumulate="
            f"{loop.accumulate}: make it a multiple of {world * loop.accumulate}"
        )
    saved = Path(config.start_from) / "weights" if config.start_from else None
    at_hand = saved is not None and (saved / "encoder").is_dir()
    size, precision = config.data.image_size, "fp32" if loop.precision == "fp32" else "bf16"
    try:
        with torch.device("meta"):
            model = config.model.build(size, saved if at_hand else None, weights=False)
            adversary = objective.discriminator.build(size, weights=False) if objective.adversarial > 0 else None
    except UserError:
        raise
    except ValueError as error:
        raise UserError(f"{config.root}/{config.name}: {error}") from None
    for module, optimizer in ((model, config.optimizer), (adversary, config.discriminator_optimizer)):
        if module is not None:
            optimizer.build(module)  # finds prefixes of `rates` that name nothing
    count = Activations(precision)
    kept = {name: micro_batch * number for name, number in _autoencoder_activations(model, size, count).items()}
    for name, quantizer in _quantizers(model):
        kept[name] = _quantizer_activations(quantizer, _grid(model, name), micro_batch)
    children = dict(model.named_children())
    names = [name for name in ORDER if name in children] + [name for name in children if name not in ORDER]
    parts = [_part(name, children[name], kept.get(name, 0), averaged=True) for name in names]
    networks, of_one_pass = [model], 0
    if adversary is not None:
        of_one_pass = micro_batch * count.of(adversary, (3, size, size))
        part = _part("discriminator", adversary, of_one_pass)
        if isinstance(adversary, DinoDiscriminator):
            trunk = _part("", adversary.trunk.requires_grad_(False))
            part = dataclasses.replace(part, frozen=part.frozen + trunk.frozen, weights=part.weights + trunk.weights)
        parts.append(part)
        networks.append(adversary)
    if objective.distillation > 0 and objective.distillation_target == "teacher":
        parts.append(_part("teacher", model.encoder.requires_grad_(False)))
    if objective.perceptual > 0:
        trunk = _perceptual(objective.lpips_net)
        parts.append(_part("LPIPS trunk", trunk, micro_batch * _perceptual_activations(trunk, size)))
    published = _bytes(model.state_dict().values())
    state = published + sum(_bytes(network.state_dict().values()) for network in networks)
    checkpoint = state + 8 * sum(part.trainable for part in parts)
    num_images, needs = _training_images(config), _needs(config)
    return Plan([part for part in parts if part.weights], model.layout, size, precision, micro_batch, checkpoint,
                published, 2 * of_one_pass, num_images, needs)  # fmt: skip


class Activations:
    """Bytes that the backward pass of one image needs, by the formulas above."""

    def __init__(self, precision: str) -> None:
        self.low = 2 if precision == "bf16" else 4

    def of(self, module: nn.Module, shape: tuple[int, ...]) -> int:
        """Of a module on the meta device that is given (1, *shape)."""
        if isinstance(module, FoundationEncoder):
            return self._of_encoder(module, shape)
        if isinstance(module, DinoDiscriminator):
            channels, tokens = module.trunk.channels, (module.size // module.trunk.stride) ** 2
            heads = sum(self.of(head, (channels, tokens)) for head in module.heads)
            return heads + self.of(module.trunk, (3, module.size, module.size))
        if isinstance(module, ViTDecoder):
            mlp = module.decoder_layers[0].intermediate["dense"].out_features
            size = Size(module.dim, len(module.decoder_layers), module.heads, mlp)
            return self._of_layers(size, 1 + math.prod(shape[1:]), module.gradient_checkpointing)
        return self._of_convolutions(module, shape)

    def _of_encoder(self, encoder: FoundationEncoder, shape: tuple[int, ...]) -> int:
        if encoder.frozen:
            return 0
        config = encoder.model.config
        prefix = getattr(config, "num_register_tokens", 0) + hasattr(encoder.model.embeddings, "cls_token")
        tokens = math.prod(side // encoder.stride for side in shape[1:]) + prefix
        again = any(getattr(module, "gradient_checkpointing", False) for module in encoder.model.modules())
        return self._of_layers(mirrored(encoder), tokens, again)

    def _of_layers(self, size: Size, tokens: int, again: bool) -> int:
        values = self.low * (8 * size.dim + 2 * size.mlp)
        if self.low == 2:
            values += 4 * 2 * size.dim
        return tokens * (values + 4 * size.depth * size.dim if again else size.depth * values)

    def _of_convolutions(self, module: nn.Module, shape: tuple[int, ...]) -> int:
        total, hooks = 0, []

        def keep(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            nonlocal total
            norm = isinstance(layer, NORMS)
            total += 4 * (inputs[0].numel() + output.numel()) if norm else self.low * inputs[0].numel()

        for layer in module.modules():
            if isinstance(layer, (*CONVOLUTIONS, *NORMS)):
                hooks.append(layer.register_forward_hook(keep))
        with torch.no_grad():
            module(torch.empty(1, *shape, device="meta"))
        for hook in hooks:
            hook.remove()
        return total


NORMS = (nn.GroupNorm,)
CONVOLUTIONS = (nn.Conv1d, nn.Conv2d, nn.ConvTranspose2d, nn.Linear)


def _autoencoder_activations(model: nn.Module, size: int, count: Activations) -> dict[str, int]:
    """Bytes of one image by the name of the child, for all but quantizers."""
    encoder, grid = model.encoder, model.layout.grids[-1]
    given = {"encoder": (3, size, size)}
    if isinstance(model, Hierarchical):
        top_grid, top, bottom = model.layout.grids[0], model.top_quantizer, model.quantizer
        given |= {
            "top_encoder": (encoder.channels, *grid),
            "project_top": (model.top_encoder.channels, *top_grid),
            "top_decoder": (top.dim, *top_grid),
            "upsample": (top.dim, *top_grid),
            "project_in": (model.top_decoder.out_channels + encoder.channels, *grid),
            "decoder": (top.dim + bottom.dim, *grid),
        }
    else:
        given |= {
            "project_in": (encoder.channels, *grid),
            "project_out": (model.quantizer.dim, *grid),
            "decoder": (encoder.channels, *grid),
        }
    return {name: count.of(getattr(model, name), shape) for name, shape in given.items()}


def _quantizers(model: nn.Module) -> list[tuple[str, nn.Module]]:
    names = ("top_quantizer", "quantizer") if isinstance(model, Hierarchical) else ("quantizer",)
    return [(name, getattr(model, name)) for name in names]


def _grid(model: nn.Module, name: str) -> tuple[int, ...]:
    return model.layout.grids[0] if name == "top_quantizer" else model.layout.grids[-1]


def _quantizer_activations(quantizer: nn.Module, grid: tuple[int, ...], micro_batch: int) -> int:
    rows = micro_batch * math.prod(grid)
    codebook = sum(quantizer.num_codes) * quantizer.dim
    distances = min(BUDGET, rows * max(quantizer.num_codes))
    return 4 * (4 * rows * quantizer.dim + 2 * codebook + distances)


def _perceptual(net: str) -> nn.Module:
    """LPIPS' convolutional trunk, (B, 3, H, W) -> its features."""
    import lpips

    if net not in TRUNKS:
        raise UserError(f"objective.lpips_net={net} is not one of {', '.join(TRUNKS)}")
    with torch.device("meta"), contextlib.redirect_stdout(io.StringIO()), warnings.catch_warnings():
        warnings.simplefilter("ignore")
        network = lpips.LPIPS(net=net, pretrained=False, pnet_rand=True, verbose=False)
    return network.net.eval().requires_grad_(False)


def _perceptual_activations(trunk: nn.Module, size: int) -> int:
    shape = (3, size, size)
    compared = trunk(torch.empty(1, *shape, device="meta"))
    return Activations("fp32").of(trunk, shape) + 2 * _bytes(compared)


def _part(name: str, module: nn.Module, activations: int = 0, averaged: bool = False) -> Part:
    parameters, buffers = list(module.parameters()), list(module.buffers())
    trainable = sum(p.numel() for p in parameters if p.requires_grad)
    frozen = sum(p.numel() for p in parameters) - trainable
    return Part(name, trainable, frozen, sum(b.numel() for b in buffers), _bytes([*parameters, *buffers]), averaged,
                activations)  # fmt: skip


def _bytes(tensors: Iterable[Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _training_images(config: TokenizerRun) -> int | None:
    """How many there are, where they are in this machine's folders; none of them is decoded."""
    source = config.data.source
    if not _here(source):
        return None
    listing = open_listing(source, 0)
    return len(split_items(listing, "train", config.data.held_out))


def _here(source: str) -> bool:
    return source in EMBEDDED or Path(source).expanduser().exists()


def _needs(config: TokenizerRun) -> list[str]:
    """What training would have to fetch, or the user to bring."""
    objective, model = config.objective, config.model
    found = []
    if not _here(config.data.source):
        found.append(f"images: data.source={config.data.source}")
    if config.start_from:
        if not weights_path(Path(config.start_from)).is_file():
            found.append(f"a finished run: start_from={config.start_from}")
    elif isinstance(model.encoder, FoundationConfig) and not Path(model.encoder.name).is_dir():
        found.append(f"a model of the Hub: model.encoder.name={model.encoder.name}")
    decoder = getattr(model.decoder, "weights", None)
    if decoder and not config.start_from and not Path(decoder).exists():
        found.append(f"a trained decoder: model.decoder.weights={decoder}")
    if objective.perceptual > 0 and not Path(objective.lpips_weights).is_file():
        trunk = TRUNKS[objective.lpips_net]
        found.append(f"torchvision's {trunk}: objective.lpips_weights={objective.lpips_weights}")
    trunk = getattr(objective.discriminator, "name", None)
    if objective.adversarial > 0 and trunk and not Path(trunk).is_dir():
        found.append(f"a model of the Hub: objective.discriminator.name={trunk}")
    return found


def _describe(config: TokenizerRun, plan: Plan) -> Iterator[str]:
    loop, layout = config.loop, plan.layout
    yield f"{config.root}/{config.name}: a dry run; nothing was written."
    yield ""
    yield f"{'part':<16}{'trainable':>15}{'frozen':>15}{'buffers':>15}"
    for part in plan.parts:
        yield f"{part.name:<16}{part.trainable:>15,}{part.frozen:>15,}{part.buffers:>15,}"
    total = [sum(getattr(part, kind) for part in plan.parts) for kind in ("trainable", "frozen", "buffers")]
    yield f"{'all':<16}{total[0]:>15,}{total[1]:>15,}{total[2]:>15,}"
    yield ""
    levels = ", ".join(f"{' x '.join(map(str, grid))} of {k}" for grid, k in zip(layout.grids, layout.num_codes))
    yield f"codes: {layout.length} per image ({levels}), {layout.bits:.0f} bits, {plan.image_size} px"
    yield ""
    memory = plan.memory
    yield "memory per process, GiB: " + ", ".join(f"{name} {size / GIB:.2f}" for name, size in memory.items())
    yield (
        f"  together {sum(memory.values()) / GIB:.1f}, where a step of {loop.batch_size} images is shared by "
        f"{distributed.world()} x loop.accumulate={loop.accumulate} micro-batches of {plan.micro_batch}"
    )
    per_image = {part.name: part.activations / plan.micro_batch / MIB for part in plan.parts}
    shares = ", ".join(f"{name} {size:.0f}" for name, size in per_image.items() if size >= 0.5)
    yield f"  activations per image, MiB: {shares}; more processes or loop.accumulate make micro-batches smaller"
    yield (
        f"  an estimate in {plan.precision}: for backward a ViT keeps 8 width + 2 MLP values per token and layer "
        "(arXiv:2205.05198), a convolution its input, a norm input and output; tokenizer/dry_run.py says all of it"
    )
    images = loop.steps * loop.batch_size
    yield f"images: {loop.batch_size} per step, {loop.steps} steps, {images:,} in all" + (
        f", {images / plan.num_images:.1f} epochs of {plan.num_images:,}" if plan.num_images else ""
    )
    yield f"disk, GiB: {loop.keep} checkpoints of {plan.checkpoint / GIB:.2f}, weights of {plan.published / GIB:.2f}"
    for need in plan.needs:
        yield f"needs: {need}"
