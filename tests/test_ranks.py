"""What comes of a run does not depend on how many processes, or micro-batches, share its global
batch.

As a program it is what torchrun starts: one process group trains all toy runs, then encodes,
samples and measures.
"""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny import command, save_encoder
from torch import Tensor
from toy import leaves

from priors.backbone import BackboneConfig
from priors.families.absorbing import AbsorbingConfig
from priors.families.autoregressive import AutoregressiveConfig
from priors.families.hierarchical import HierarchicalConfig
from priors.families.masked import MaskedConfig
from priors.families.pixelcnn import PixelCNNConfig
from priors.families.uniform import UniformConfig
from priors.run import PriorRun
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.discriminators.patch import PatchConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.hierarchical import VQVAE2Config
from tokenizer.objective import ObjectiveConfig
from tokenizer.quantizers.gumbel import GumbelConfig
from tokenizer.quantizers.ibq import IBQConfig
from tokenizer.quantizers.lookup_free import BSQConfig, LookupFreeConfig
from tokenizer.quantizers.product import ProductConfig
from tokenizer.quantizers.residual import ResidualConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from training import distributed, loop
from training.checkpoint import Run
from training.loop import LoopConfig, Phase
from training.optim import OptimizerConfig

pytestmark = [
    pytest.mark.slow,
    pytest.mark.timeout(1200),
]  # five minutes of one core, for all tests together

STEPS, SIZE = 20, 16
WORLDS = {
    "one": (1, 1),
    "accumulated": (1, 2),
    "two": (2, 1),
    "four": (4, 1),
}  # processes, micro-batches of each
TOLERANCES = {torch.float32: 1e-5, torch.float64: 1e-12}
DATA = DataConfig(source="digits", image_size=SIZE, augment="shift")
OPTIMIZER = OptimizerConfig(lr=1e-3, warmup_steps=3, weight_decay=0.1)
CODES = {"num_codes": 16, "code_dim": 8}
SAMPLED = {
    "prior": "samples",
    "masked": "masked-samples",
}  # priors, and the folders of what is drawn from them
KEY_BIASES = ("key.bias", "k_proj.bias")  # what the decoder and transformers call them
RESTART = {"restart": "data", "restart_below": 0.5}


def conv(quantizer: Any) -> VQVAEConfig:
    sizes = {"channels": 16, "residual_blocks": 1, "residual_channels": 4}
    return VQVAEConfig(
        encoder=ConvEncoderConfig(**sizes), quantizer=quantizer, decoder=ConvDecoderConfig(**sizes)
    )


def vqrae(folder: Path, frozen: bool) -> VQRAEConfig:
    return VQRAEConfig(
        encoder=FoundationConfig(name=str(folder / "encoder"), frozen=frozen),
        quantizer=VectorConfig(**CODES, **RESTART),
        decoder=ViTDecoderConfig(dim=16, depth=1, heads=2, mlp=32, gradient_checkpointing=True),
        noise_tau=0.5,
    )


# Without the l1 term: its gradient is a sign, which the rounding of fp32 flips (in fp64 it changes
# nothing here).
ADVERSARY = ObjectiveConfig(
    distillation=0.5,
    adversarial=0.5,
    adversarial_start_step=4,
    adversarial_ramp_steps=8,
    adaptive_cap=10.0,
    discriminator_start_step=2,
    augment=0.7,
    lecam=0.1,
    discriminator=PatchConfig(channels=8, layers=1),
)


def tokenizers(folder: Path) -> dict[str, dict[str, Any]]:
    """By name, the model, and what else is asked of the run."""
    restarted = VectorConfig(**CODES, **RESTART, decay=0.8, commitment_warmup_steps=6)
    models = {
        "averaged, k-means, restart": conv(restarted),
        "averaged, split": conv(
            VectorConfig(**CODES, restart="split", restart_below=0.5, rotation=True)
        ),
        "cosine, entropy": conv(
            VectorConfig(
                **CODES, codebook="gradient", metric="cosine", entropy=0.1, entropy_temperature=0.1
            )
        ),
        "simvq": conv(SimVQConfig(**CODES, init="kmeans", **RESTART, restart_every=3)),
        "residual": conv(ResidualConfig(depth=3, quantizer_dropout=0.5, level=restarted)),
        "product": conv(ProductConfig(heads=2, level=dataclasses.replace(restarted, code_dim=4))),
        "gumbel": conv(GumbelConfig(**CODES)),
        "ibq": conv(IBQConfig(**CODES, init="kmeans", entropy_temperature=1.0)),
        "lfq": conv(LookupFreeConfig(bits=4, temperature=1.0)),
        "bsq": conv(BSQConfig(bits=4, entropy_boost_steps=10)),
        "vq-vae-2": VQVAE2Config(
            encoder=ConvEncoderConfig(16, residual_blocks=1, residual_channels=4),
            top=restarted,
            bottom=restarted,
            decoder=ConvDecoderConfig(16, residual_blocks=1, residual_channels=4),
            channels=16,
            residual_blocks=1,
            residual_channels=4,
        ),
    }
    stage2 = {
        "start_from": str(where(folder, "one", torch.float32) / "vqrae 1"),
        "objective": ADVERSARY,
    }
    return {
        "vqrae 1": {"model": vqrae(folder, True)},
        "vqrae 2, gan": {
            "model": vqrae(folder, False),
            "discriminator_optimizer": OPTIMIZER,
            **stage2,
        },
        **{name: {"model": model} for name, model in models.items()},
    }


def priors_() -> dict[str, Any]:
    backbone = BackboneConfig(dim=16, depth=2, heads=2, dropout=0.1)
    families = {
        "autoregressive": AutoregressiveConfig(backbone=backbone, label_smoothing=0.1),
        "annealed": AutoregressiveConfig(
            order="annealed",
            anneal_start_step=2,
            anneal_end_step=15,
            backbone=dataclasses.replace(backbone, conditioning="adaln", positions="learned"),
        ),
        "masked": MaskedConfig(backbone=backbone),
        "absorbing": AbsorbingConfig(backbone=backbone),
        "uniform": UniformConfig(backbone=backbone),
        "hybrid": UniformConfig(
            backbone=backbone, mask_share=0.9, parameterisation="posterior", cross_entropy=0.5
        ),
        "pixelcnn": PixelCNNConfig(channels=8, depth=2, kernel=3, dropout=0.1),
    }
    return families | {
        "hierarchical": HierarchicalConfig(
            top=families["autoregressive"], bottom=families["masked"]
        )
    }


def where(folder: Path, world: str, dtype: torch.dtype) -> Path:
    return folder / world / str(dtype).removeprefix("torch.")


def configurations(folder: Path, world: str, dtype: torch.dtype) -> dict[str, Any]:
    """Every toy run."""
    settings = LoopConfig(
        steps=STEPS,
        batch_size=16,
        accumulate=WORLDS[world][1],
        log_every=STEPS,
        save_every=STEPS,
        preview_every=STEPS,
        precision="fp32",
        ema_decay=0.9,
    )
    common = {"root": str(where(folder, world, dtype)), "optimizer": OPTIMIZER, "loop": settings}
    runs: dict[str, Any] = {
        name: TokenizerRun(name=name, data=DATA, calibration_images=64, **common, **own)
        for name, own in tokenizers(folder).items()
    }
    for name, prior in priors_().items():
        runs[name] = PriorRun(name=name, tokens=str(folder / "tokens"), prior=prior, **common)
    return runs


# What the program does.


def train_all(folder: Path, world: str) -> None:
    """Every toy run in both precisions; how far the ranks' states are apart after each, in
    spread.json."""
    import priors.train
    import tokenizer.train

    spreads = {}
    for dtype in TOLERANCES:
        for name, config in configurations(folder, world, dtype).items():
            turns: list[Phase] = []
            with in_precision(dtype), pytest.MonkeyPatch.context() as patch:
                for module in (tokenizer.train, priors.train):
                    patch.setattr(module, "train", watched(turns))
                start = (
                    priors.train.train_prior
                    if isinstance(config, PriorRun)
                    else tokenizer.train.train_tokenizer
                )
                start(config)
            spreads[f"{name}, {dtype}"] = max(map(spread, turns))
    if distributed.is_main():
        (folder / world / "spread.json").write_text(json.dumps(spreads))


def watched(seen: list[Phase]) -> Any:
    """The training loop, which leaves its turns in `seen`, without pictures and held-out
    figures."""

    def train(
        config: LoopConfig, run: Run, turns: list[Phase], *rest: Any, **more: Any
    ) -> torch.nn.Module:
        seen.extend(turns)
        return loop.train(config, run, turns, *rest, **more | {"preview": None, "measure": None})

    return train


def spread(turn: Phase) -> float:
    """How far this turn's state on any rank is from that on rank 0."""
    apart = [
        (tensor - distributed.broadcast_(tensor.clone())).abs().max().double()
        for tensor in turn.module.state_dict().values()
        if tensor.numel()
    ]
    return float(distributed.gather_rows(torch.stack(apart)).max())


@contextlib.contextmanager
def in_precision(dtype: torch.dtype) -> Iterator[None]:
    """In float64 whatever asks for float32 gets float64: what is left is the order of sums."""
    from tokenizer.data.dataset import Images

    def doubled(function: Any) -> Any:
        return functools.wraps(function)(lambda *given, **more: function(*given, **more).double())

    def gather(images: Any, keys: Any, plain: Any = Images.gather) -> dict[str, Tensor]:
        return {
            name: t.double() if t.is_floating_point() else t
            for name, t in plain(images, keys).items()
        }

    with pytest.MonkeyPatch.context() as patch:
        if dtype == torch.float64:
            torch.set_default_dtype(dtype)
            patch.setattr(Tensor, "float", Tensor.double)
            patch.setattr(Images, "gather", gather)
            for config in (VQVAEConfig, VQVAE2Config, VQRAEConfig):
                patch.setattr(config, "build", doubled(config.build))
        yield
    torch.set_default_dtype(torch.float32)


def run_pipeline(folder: Path, world: str) -> None:
    """Tokens, samples and figures in this world's own pipeline; its networks are those that one
    process trained."""
    from toy_pipeline import tiny_extractor

    from eval.extractors.in_domain import train_extractor
    from priors.train import train_prior
    from tokenizer import encode

    root, source = folder / world / "pipeline", folder / "one" / "pipeline"
    if world == "one":
        trained = where(folder, "one", torch.float32)
        shutil.copytree(trained / "averaged, k-means, restart", root / "tokenizer")
    elif distributed.is_main():
        for name in ("tokenizer", *SAMPLED, "extractor"):
            shutil.copytree(source / name, root / name)
    distributed.barrier()
    encode.IMAGES_PER_SHARD = 250
    encode.encode_data(encode.TokensRun(root=str(root), tokenizer=str(root / "tokenizer"), views=2))
    if world == "one":
        backbone = BackboneConfig(dim=16, depth=1, heads=2)
        for name, prior in (
            ("prior", AutoregressiveConfig(backbone=backbone)),
            ("masked", MaskedConfig(backbone=backbone)),
        ):
            settings = LoopConfig(steps=STEPS, batch_size=32, preview_every=STEPS)
            train_prior(
                PriorRun(
                    name=name,
                    root=str(root),
                    tokens=str(root / "tokens"),
                    prior=prior,
                    loop=settings,
                )
            )
        train_extractor(tiny_extractor(), root / "extractor")
    for name, out in SAMPLED.items():
        assert (
            command(
                "generate.sample", root / name, "--out", root / out, "--num", 50, "--batch-size", 16
            )
            == 0
        )
    assert command("eval.run", "report", root, "--num", 120, "--batch-size", 32) == 0


def main(folder: Path) -> None:
    import tokenizer.train

    torch.set_num_threads(1)
    distributed.start()
    finish, distributed.finish = (
        distributed.finish,
        distributed.barrier,
    )  # commands would leave the group
    tokenizer.train.open_split = functools.cache(tokenizer.train.open_split)
    for world, (processes, accumulate) in WORLDS.items():
        if processes == distributed.world():
            train_all(folder, world)
            if accumulate == 1:
                run_pipeline(folder, world)
    finish()


# What the tests see.


def launch(folder: Path, processes: int) -> None:
    root, words = Path(__file__).parents[1], [__file__, str(folder)]
    if processes > 1:
        words = [
            "-m",
            "torch.distributed.run",
            "--standalone",
            "--nproc-per-node",
            str(processes),
            *words,
        ]
    environment = os.environ | {
        "OMP_NUM_THREADS": "1",
        "CUDA_VISIBLE_DEVICES": "",
    }
    done = subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=root, env=environment
    )
    assert done.returncode == 0, done.stderr


def prepare(folder: Path) -> Path:
    """An encoder, and tokens on two grids."""
    from tokenizer import encode
    from tokenizer.interface import CodeLayout
    from training.checkpoint import write_weights
    from training.config import to_yaml

    class Grey(torch.nn.Module):
        """Mean greys of 8x8 and of 4x4 blocks, in 7 and in 13 levels.

        No number of tokens in a batch is a multiple of these, so that no code is met just as often
        as a fresh prior expects: of a gradient that is 0 but for rounding AdamW would make a step
        of its full length.
        """

        layout = CodeLayout(grids=((2, 2), (4, 4)), num_codes=(7, 13))

        def encode(self, images: Tensor) -> Tensor:
            greys = [
                torch.nn.functional.avg_pool2d(images.mean(1), side).flatten(1) for side in (8, 4)
            ]
            return torch.cat(
                [((g + 1) / 2 * (n - 1)).round().long() for g, n in zip(greys, (7, 13))], 1
            )

    save_encoder(folder / "encoder", "dinov2")
    write_weights(folder / "grey" / "weights" / "model.safetensors", {"none": torch.zeros(1)}, {})
    (folder / "grey" / "config.yaml").write_text(to_yaml(TokenizerRun(data=DATA)))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(encode, "load", lambda _: Grey())
        encode.encode_data(encode.TokensRun(root=str(folder), tokenizer=str(folder / "grey")))
    return folder


def difference(one: Any, other: Any) -> float:
    """The largest of any element, relative above 1; infinite where what is no number differs."""
    if isinstance(one, Tensor):
        apart = (one.double() - other.double()).abs() / one.double().abs().clamp(min=1)
        return float(apart.max()) if one.numel() else 0.0
    return 0.0 if one == other else float("inf")


def differences(folder: Path, world: str, run: str, dtype: torch.dtype) -> dict[str, float]:
    """By name, of all that a run's last checkpoint holds, to that of one process.

    Without what the softmax takes no notice of, a bias that all keys have in common: its gradient
    is rounding alone.
    """
    states = [Run(where(folder, each, dtype) / run, None).latest() for each in ("one", world)]
    for state in states:
        del state["meter"]  # of what is logged: means over one rank's samples
    ours, theirs = map(leaves, states)
    assert ours.keys() == theirs.keys()
    return {
        name: difference(value, theirs[name])
        for name, value in ours.items()
        if not name.endswith(KEY_BIASES)
    }


def figures(folder: Path) -> dict[str, Any]:
    """Every number of a report's records: figures, their intervals and details, and the arrays
    behind them."""
    found: dict[str, Any] = {}
    for path in sorted(folder.glob("*.npz")):
        record = json.loads(path.with_suffix(".json").read_text())
        for number, fields in enumerate(record["measurements"]):
            found |= leaves(fields, f"{path.stem}/{number}/{fields['name']}")
        with np.load(path) as arrays:
            found |= {f"{path.stem}/{name}": arrays[name] for name in arrays.files}
    return found


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All worlds' runs."""
    folder = prepare(tmp_path_factory.mktemp("ranks"))
    for processes in (1, 2, 4):
        launch(folder, processes)
    return folder


OTHERS = [world for world in WORLDS if world != "one"]


@pytest.mark.parametrize("dtype", TOLERANCES, ids=["fp64", "fp32"])
@pytest.mark.parametrize("world", OTHERS)
def test_every_world_trains_as_one_process_does(
    folder: Path, world: str, dtype: torch.dtype
) -> None:
    """Networks, averaged networks, codebooks, their statistics and the optimizers, after 20
    steps."""
    runs = configurations(folder, world, dtype)
    assert len(runs) == 21
    worst = {}
    for run in runs:
        apart = differences(folder, world, run, dtype)
        name = max(apart, key=apart.__getitem__)
        worst[run] = apart[name]
        print(f"{world}, {dtype}, {run}: {apart[name]:.1e} ({name})")  # pytest -rP shows it
    assert [run for run, value in worst.items() if not value <= TOLERANCES[dtype]] == []


@pytest.mark.parametrize("world", OTHERS)
def test_ranks_hold_the_same_networks_and_codebooks(folder: Path, world: str) -> None:
    spreads = json.loads((folder / world / "spread.json").read_text())
    assert len(spreads) == 42 and set(spreads.values()) == {0.0}


@pytest.mark.parametrize("world", ["two", "four"])
def test_tokens_and_samples_are_the_same_bytes(folder: Path, world: str) -> None:
    one, other = (folder / each / "pipeline" for each in ("one", world))
    paths = [path.relative_to(one) for path in sorted((one / "tokens").glob("[!.]*"))]
    assert len(paths) == 3 * (6 + 2) + 1  # arrays of 6 and 2 shards, and the manifest
    paths += [Path(out) / name for out in SAMPLED.values() for name in ("samples.npz", "grid.png")]
    assert [
        path for path in paths if (one / path).read_bytes() != (other / path).read_bytes()
    ] == []


@pytest.mark.parametrize("world", ["two", "four"])
def test_figures_are_the_same(folder: Path, world: str) -> None:
    ours, theirs = (figures(folder / each / "pipeline" / "report") for each in ("one", world))
    assert ours.keys() == theirs.keys()
    assert sum(name.endswith("/value") for name in ours) > 20
    for name, value in ours.items():
        if isinstance(value, np.ndarray) and value.dtype.kind in "fiu":
            np.testing.assert_allclose(theirs[name], value, rtol=1e-12, atol=1e-12, err_msg=name)
        elif isinstance(value, float):
            assert theirs[name] == pytest.approx(value, rel=1e-12, abs=1e-12, nan_ok=True), name
        else:
            assert np.array_equal(theirs[name], value), name


if __name__ == "__main__":
    main(Path(sys.argv[1]))
