"""TF32, deterministic algorithms, the layout of convolutions: one place sets them, for a GPU, as
each stage needs."""

from __future__ import annotations

import contextlib
import os
import re

import pytest
import torch
from pretend import pretended_gpu
from test_architecture import MODULES, ROOT
from test_torch_compile import OPTIMIZER, conv, images, tokenizer_turns
from test_waits import state_after, tensors
from torch import nn

from tokenizer.decoders.vit import Size, ViTDecoder
from tokenizer.discriminators.patch import PatchConfig
from training import distributed
from training.algorithms import lay_out
from training.checkpoint import Run
from training.errors import UserError
from training.loop import Batch, LoopConfig, Loss, Phase, train

CUDNN = torch.backends.cudnn
SETTINGS = re.compile(
    r"allow_tf32|cudnn\.(benchmark|deterministic)|use_deterministic|set_float32_matmul|channels_last"
)


@pytest.fixture(autouse=True)
def as_it_was(monkeypatch):
    kept = settings()
    CUDNN.allow_tf32 = torch.backends.cuda.matmul.allow_tf32 = True
    monkeypatch.delenv("CUBLAS_WORKSPACE_CONFIG", raising=False)
    yield
    torch.backends.cuda.matmul.allow_tf32, CUDNN.allow_tf32 = kept["products"], kept["convolutions"]


def settings():
    return {
        "products": torch.backends.cuda.matmul.allow_tf32,
        "convolutions": CUDNN.allow_tf32,
        "tried": CUDNN.benchmark,
        "deterministic": (CUDNN.deterministic, torch.are_deterministic_algorithms_enabled()),
        "workspace": os.environ.get("CUBLAS_WORKSPACE_CONFIG"),
    }


def found_while_training(folder, loss=None, **loop):
    """The settings of each step, and of a preview."""
    seen, module = [], nn.Linear(2, 1)
    config = LoopConfig(steps=2, batch_size=4, **loop)

    def looked(batch, step):
        seen.append(settings())
        return Loss((module(batch["rows"]) if loss is None else loss(module)).square().mean(), {})

    def stream(step):
        return ([Batch({"rows": torch.ones(4, 2)}, torch.arange(4))] for _ in range(step, 100))

    preview = lambda averaged, path, step: seen.append(settings())  # noqa: E731
    turns = [Phase("linear", module, looked, OPTIMIZER)]
    train(
        config, Run.open(folder, config), turns, stream, seed=0, published=module, preview=preview
    )
    assert len(seen) == 3
    return seen


def test_every_command_begins_without_tf32(tmp_path):
    distributed.start()
    before = settings()
    assert (before["products"], before["convolutions"], before["tried"]) == (False, False, False)
    with pretended_gpu():
        for found in found_while_training(tmp_path / "gpu"):
            assert found == {**before, "convolutions": True, "tried": True}
    assert settings() == before
    for found in found_while_training(tmp_path / "cpu", deterministic=True):
        assert found == before


def test_a_deterministic_run_says_what_it_costs(tmp_path, capsys):
    distributed.start()
    before = settings()
    with pretended_gpu():
        for found in found_while_training(tmp_path, deterministic=True):
            assert (
                found["deterministic"] == (True, True)
                and not found["tried"]
                and not found["products"]
            )
            assert found["workspace"] == ":4096:8"
    said = [line for line in capsys.readouterr().out.splitlines() if "loop.deterministic" in line]
    assert len(said) == 1 and "same bits" in said[0] and "slower" in said[0]
    assert settings() == {**before, "workspace": ":4096:8"}


def test_what_has_no_deterministic_algorithm_is_one_line(tmp_path):
    """In torch's own words; of an error that is another the traceback stays."""

    def without(module):
        return module.weight.clone().put_(
            torch.tensor([0], device=module.weight.device), module.weight[0, :1]
        )

    def broken(module):
        raise RuntimeError("another")

    with pretended_gpu():
        found_while_training(tmp_path / "as it is", without)
        with pytest.raises(
            UserError, match=r"loop\.deterministic: put_.* no deterministic algorithm.*false"
        ):
            found_while_training(tmp_path / "one", without, deterministic=True)
        with pytest.raises(RuntimeError, match="another"):
            found_while_training(tmp_path / "two", broken, deterministic=True)
    assert not torch.are_deterministic_algorithms_enabled()


def test_nothing_else_sets_them():
    found = {str(path) for path in MODULES if SETTINGS.search((ROOT / path).read_text())}
    assert found == {"training/algorithms.py"}


def is_last(module):
    weights = [
        part.weight
        for part in module.modules()
        if isinstance(part, nn.Conv2d) and min(part.weight.shape) > 1
    ]
    return [weight.is_contiguous(memory_format=torch.channels_last) for weight in weights]


def test_only_convolutions_without_group_norms_are_laid_out_anew():
    gpu, cpu = torch.device("cuda"), torch.device("cpu")
    autoencoder = conv(kind="fsq", levels=(5, 4, 3)).build(16)
    assert not any(is_last(lay_out(autoencoder, cpu))) and all(is_last(lay_out(autoencoder, gpu)))
    assert not any(is_last(lay_out(PatchConfig(channels=16, layers=2).build(16), gpu)))
    transformer = ViTDecoder(4, 4, (4, 4), Size(dim=8, depth=1, heads=2, mlp=16))
    embedding = nn.Conv2d(3, 4, 2, 2)
    lay_out(nn.ModuleList([transformer, embedding]), gpu)
    assert not any(is_last(embedding))


@pytest.mark.parametrize("first", ["cpu", "gpu"])
def test_convolutions_go_on_on_another_device(first, tmp_path):
    """The optimizer's moments lie in memory as their parameters do, wherever the checkpoint was
    written."""

    def trained(folder, steps, on_gpu):
        with pretended_gpu() if on_gpu else contextlib.nullcontext():
            module, turns = tokenizer_turns(conv(kind="fsq", levels=(5, 4, 3)))
            state = tensors(state_after(folder, steps, module, turns, images))
            assert all(last == on_gpu for last in is_last(module))
        return state

    straight = trained(tmp_path / "straight", 3, on_gpu=False)
    trained(tmp_path / "run", 1, on_gpu=first == "gpu")
    resumed = trained(tmp_path / "run", 3, on_gpu=first == "cpu")
    for name, value in straight.items():
        torch.testing.assert_close(resumed[name], value, rtol=1e-4, atol=2e-5, msg=name)
