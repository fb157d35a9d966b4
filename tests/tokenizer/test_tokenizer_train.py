"""Training from images to a tokenizer: pretraining, stage 1, stage 2, and going on where a run
stopped."""

from __future__ import annotations

import dataclasses
import json
import shutil

import pytest
import torch
from PIL import Image

import tokenizer
from tokenizer import train as train_module
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.discriminators.patch import PatchConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.encoders.pretrain import MAEConfig, PretrainRun, pretrain
from tokenizer.objective import ObjectiveConfig
from tokenizer.quantizers.simvq import SimVQConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun, load
from tokenizer.train import teacher_of, train_tokenizer
from training.checkpoint import Run, load_weights, sha256
from training.errors import UserError
from training.log import CLOCKS
from training.loop import LoopConfig
from training.optim import OptimizerConfig
from training.signals import Interrupted

SIZE = 16
DATA = DataConfig(source="digits", image_size=SIZE, augment="shift")
LOOP = LoopConfig(steps=8, batch_size=8, ema_decay=0.9, log_every=1, save_every=4, preview_every=8)
FAST = OptimizerConfig(lr=2e-3, warmup_steps=2)
MAE = MAEConfig(
    patch_size=4, dim=16, depth=2, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
)
DECODER = ViTDecoderConfig(dim=16, depth=1, heads=2)


def pretraining(root, /, **changes):
    return dataclasses.replace(
        PretrainRun(name="encoder", root=str(root), data=DATA, mae=MAE, optimizer=FAST, loop=LOOP),
        **changes,
    )


def stage1(root, /, **changes):
    model = VQRAEConfig(
        encoder=FoundationConfig(name=str(root / "encoder" / "model")),
        quantizer=VectorConfig(num_codes=16, code_dim=8, restart="data", restart_below=0.1),
        decoder=DECODER,
    )
    config = TokenizerRun(
        name="stage1",
        root=str(root),
        data=DATA,
        model=model,
        optimizer=FAST,
        loop=LOOP,
        calibration_images=64,
    )
    return dataclasses.replace(config, **changes)


def stage2(root, /, **changes):
    """All learns, held near the frozen teacher, with an adversary."""
    first = stage1(root)
    model = dataclasses.replace(
        first.model, encoder=dataclasses.replace(first.model.encoder, frozen=False)
    )
    objective = ObjectiveConfig(
        distillation=0.5,
        adversarial=0.1,
        adversarial_start_step=1,
        adversarial_ramp_steps=2,
        discriminator=PatchConfig(channels=8, layers=1),
    )
    config = dataclasses.replace(
        first,
        name="stage2",
        start_from=str(root / "stage1"),
        model=model,
        objective=objective,
        discriminator_optimizer=FAST,
        optimizer=dataclasses.replace(FAST, rates={"encoder": 5e-4}),
    )
    return dataclasses.replace(config, **changes)


def vqvae(root, /, **changes):
    model = VQVAEConfig(
        encoder=ConvEncoderConfig(channels=16, residual_blocks=1, residual_channels=4),
        quantizer=SimVQConfig(
            num_codes=16,
            code_dim=8,
            init="kmeans",
            restart="data",
            restart_below=0.1,
            restart_every=3,
        ),
        decoder=ConvDecoderConfig(channels=16, residual_blocks=1, residual_channels=4),
    )
    return dataclasses.replace(stage1(root, name="vqvae", model=model), **changes)


STAGES = {"stage1": stage1, "stage2": stage2, "vqvae": vqvae}


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    """Pretraining, both stages and a VQ-VAE, each trained without a stop."""
    root = tmp_path_factory.mktemp("runs")
    pretrain(pretraining(root))
    for config in STAGES.values():
        train_tokenizer(config(root))
    return root


def images(count=4, size=SIZE):
    return torch.rand(count, 3, size, size, generator=torch.Generator().manual_seed(0)) * 2 - 1


def figures(run_folder):
    """{step: {name: value}} of a log, without the clock's."""
    steps = {}
    for line in (run_folder / "log.jsonl").read_text().splitlines():
        values = json.loads(line)
        for clock in CLOCKS:
            values.pop(clock, None)
        steps.setdefault(values.pop("step"), {}).update(values)
    return steps


def assert_same_run(folder, other):
    """Weights, optimizers, discriminator and log are equal to the last bit."""
    assert sha256(folder / "weights" / "model.safetensors") == sha256(
        other / "weights" / "model.safetensors"
    )
    last = "checkpoints/step-00000008/state.pt"
    one, two = (torch.load(path / last, weights_only=True) for path in (folder, other))
    assert_equal(one, two)
    assert figures(folder) == figures(other)


def assert_equal(one, two):
    assert type(one) is type(two)
    if isinstance(one, torch.Tensor):
        assert torch.equal(one, two)
    elif isinstance(one, dict):
        assert one.keys() == two.keys()
        for key in one:
            assert_equal(one[key], two[key])
    elif isinstance(one, list | tuple):
        assert len(one) == len(two)
        for left, right in zip(one, two):
            assert_equal(left, right)
    else:
        assert one == two


# what a run leaves


def test_a_run_folder_holds_a_tokenizer(root):
    for name, config in STAGES.items():
        folder = root / name
        trained = tokenizer.load(folder)
        assert trained.config == config(root)
        assert not trained.training and not any(p.requires_grad for p in trained.parameters())
        codes = trained.encode(images())
        assert torch.equal(trained.decode(codes), trained(images()).images)
        assert Image.open(folder / "previews" / "step-00000008.png").size[0] > 0
        assert figures(folder)[8]["held_out.psnr"] > 5
        assert set(figures(folder)) == set(range(1, 9))


def test_the_pretrained_encoder_is_one_of_transformers(root):
    import transformers

    config = transformers.AutoConfig.from_pretrained(root / "encoder" / "model")
    assert config.model_type == "vit_mae" and config.image_size == SIZE
    encoder = FoundationConfig(name=str(root / "encoder" / "model")).build(SIZE)
    published = load_weights(root / "encoder")
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(tensor, published[f"vit.{name}"]), name
    given = images()
    torch.testing.assert_close(((given + 1) / 2 - encoder.mean) / encoder.std, given)


def test_learning_moves_the_loss(root):
    for name in ("encoder", *STAGES):
        log = figures(root / name)
        part = "mae.mse" if name == "encoder" else "autoencoder.mse"
        assert log[8][part] < log[1][part], name


def test_a_frozen_encoder_is_published_as_it_came(root):
    encoder = FoundationConfig(name=str(root / "encoder" / "model")).build(SIZE)
    first, second = (load_weights(root / name) for name in ("stage1", "stage2"))
    moved = []
    for name, tensor in encoder.model.state_dict().items():
        assert torch.equal(first[f"encoder.model.{name}"], tensor), name
        moved.append(not torch.equal(second[f"encoder.model.{name}"], tensor))
    assert any(moved)


def test_the_teacher_is_the_pretrained_encoder_after_any_stages(root, tmp_path):
    """The second stage learned, a third was frozen again, and a fourth distils."""
    second = stage2(root)
    frozen = dataclasses.replace(
        second.model, encoder=dataclasses.replace(second.model.encoder, frozen=True)
    )
    third = dataclasses.replace(
        stage1(root, name="stage3"),
        root=str(tmp_path),
        start_from=str(root / "stage2"),
        model=frozen,
    )
    train_tokenizer(dataclasses.replace(third, loop=dataclasses.replace(third.loop, steps=1)))
    fourth = stage2(root, start_from=str(tmp_path / "stage3"))
    learned = load(tmp_path / "stage3")
    teacher = teacher_of(fourth, learned)
    pretrained = load(root / "stage1").encoder.state_dict()
    assert all(
        torch.equal(tensor, pretrained[name]) for name, tensor in teacher.state_dict().items()
    )
    assert not all(
        torch.equal(tensor, pretrained[name])
        for name, tensor in learned.encoder.state_dict().items()
    )


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (vqvae, "keeps features near a pretrained encoder's, and model.encoder.kind=conv has none"),
        (stage1, "holds what model.encoder.frozen=true holds already"),
    ],
)
def test_distillation_without_a_pretrained_encoder_that_learns_is_refused(tmp_path, make, message):
    with pytest.raises(ValueError, match=message):
        make(tmp_path, objective=ObjectiveConfig(distillation=0.5))


def test_distillation_starts_at_zero_and_grows_as_the_encoder_moves(root):
    parts = [
        values["autoencoder.distillation"] for _, values in sorted(figures(root / "stage2").items())
    ]
    assert parts[0] == 0 and min(parts[1:]) > 0
    assert "autoencoder.distillation" not in figures(root / "stage1")[8]


def test_the_adversary_plays_from_its_step_on(root):
    log = figures(root / "stage2")
    assert "autoencoder.adversarial" not in log[2] and all(
        "autoencoder.adversarial" in log[s] for s in range(3, 9)
    )
    assert all("discriminator.hinge" in log[step] for step in range(1, 9))
    assert all(0 < log[step]["autoencoder.adaptive_weight"] <= 1 for step in range(3, 9))


def test_the_teacher_is_the_first_encoder_and_never_moves(root, tmp_path, monkeypatch):
    teachers = []

    class Watched(train_module.Objective):
        def __init__(self, config, autoencoder, teacher, seed):
            super().__init__(config, autoencoder, teacher, seed)
            teachers.append(teacher)

    monkeypatch.setattr(train_module, "Objective", Watched)
    train_tokenizer(stage2(root, root=str(tmp_path)))
    further = stage2(root, root=str(tmp_path), name="further", start_from=str(tmp_path / "stage2"))
    train_tokenizer(
        further
    )  # from an encoder that has learned: the teacher is still the pretrained one
    pretrained = load_weights(root / "stage1")
    for teacher in teachers:
        for name, tensor in teacher.state_dict().items():
            assert torch.equal(tensor, pretrained[f"encoder.{name}"]), name
        assert not teacher.training and not any(p.requires_grad for p in teacher.parameters())
    assert len(teachers) == 2


# going on


def stop_after(monkeypatch, step):
    """Let the process end, as if killed, when it has saved `step`."""
    save = Run.save

    def stopping(self, now, state, keep):
        save(self, now, state, keep)
        if now == step:
            raise KeyboardInterrupt

    monkeypatch.setattr(Run, "save", stopping)


@pytest.mark.parametrize("name", STAGES)
def test_a_stopped_run_goes_on_to_the_same_bits(root, tmp_path, name, monkeypatch):
    config = dataclasses.replace(STAGES[name](root), root=str(tmp_path))
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            train_tokenizer(config)
    assert not (tmp_path / name / "checkpoints" / "step-00000008").exists()
    train_tokenizer(config)
    assert_same_run(tmp_path / name, root / name)


def test_stopped_pretraining_goes_on_to_the_same_bits(root, tmp_path, monkeypatch):
    config = pretraining(tmp_path)
    with monkeypatch.context() as patch:
        stop_after(patch, 4)
        with pytest.raises((KeyboardInterrupt, Interrupted)):
            pretrain(config)
    assert not (tmp_path / "encoder" / "model").exists()
    pretrain(config)
    assert_same_run(tmp_path / "encoder", root / "encoder")
    assert sha256(tmp_path / "encoder/model/model.safetensors") == sha256(
        root / "encoder/model/model.safetensors"
    )


def test_a_run_goes_on_from_its_start_when_its_checkpoints_are_damaged(root, tmp_path, capsys):
    config = stage1(root, root=str(tmp_path))
    train_tokenizer(config)
    assert (
        f"{tmp_path / 'stage1'}: starting from the features of" in capsys.readouterr().out
    )  # it may take minutes
    for state in (tmp_path / "stage1" / "checkpoints").glob("*/state.pt"):
        state.write_bytes(b"")
    train_tokenizer(config)
    assert_same_run(tmp_path / "stage1", root / "stage1")


def test_a_finished_run_says_so_and_moves_nothing(root, capsys):
    before = sha256(root / "stage2" / "weights" / "model.safetensors")
    capsys.readouterr()
    train_tokenizer(stage2(root))
    assert "finished at step 8" in capsys.readouterr().out
    assert sha256(root / "stage2" / "weights" / "model.safetensors") == before


def test_accumulation_gives_the_same_codebook_and_weights(root, tmp_path):
    loop = dataclasses.replace(LOOP, steps=3, accumulate=4)
    train_tokenizer(stage1(root, root=str(tmp_path), name="parts", loop=loop))
    train_tokenizer(
        stage1(root, root=str(tmp_path), name="whole", loop=dataclasses.replace(loop, accumulate=1))
    )
    parts, whole = (load_weights(tmp_path / name) for name in ("parts", "whole"))
    for name, tensor in whole.items():
        if not name.endswith("key.bias"):  # softmax does not see it: its gradient is rounding
            torch.testing.assert_close(parts[name], tensor, atol=1e-4, rtol=1e-3, msg=name)


def test_stage2_needs_only_stage1(root, tmp_path):
    shutil.copytree(root / "stage1", tmp_path / "stage1")
    gone = stage2(tmp_path)
    train_tokenizer(gone)  # tmp_path has no encoder
    weights, expected = load_weights(tmp_path / "stage2"), load_weights(root / "stage2")
    assert all(torch.equal(weights[name], tensor) for name, tensor in expected.items())


def test_an_encoder_of_another_image_size_is_interpolated(root, tmp_path):
    data = dataclasses.replace(DATA, image_size=24)
    train_tokenizer(stage1(root, name="large", data=data, loop=dataclasses.replace(LOOP, steps=1)))
    trained = tokenizer.load(root / "large")
    assert trained.layout.grids == ((6, 6),)
    assert torch.equal(
        trained.decode(trained.encode(images(size=24))), trained(images(size=24)).images
    )


# mistakes


def refused(config, run=train_tokenizer):
    with pytest.raises(UserError) as caught:
        run(config)
    message = str(caught.value)
    assert "\n" not in message
    return message


def test_an_image_size_that_does_not_divide_is_refused_and_mended(root, tmp_path):
    odd = dataclasses.replace(DATA, image_size=18)
    assert "data.image_size=18 does not divide by the encoder's 4" in refused(
        stage1(root, name="odd", data=odd)
    )
    message = refused(pretraining(tmp_path, data=odd), pretrain)
    assert "data.image_size=18 does not divide by mae.patch_size=4" in message
    short = dataclasses.replace(LOOP, steps=1)
    train_tokenizer(stage1(root, name="odd", loop=short))  # the name is still free
    pretrain(pretraining(tmp_path, loop=short))


def test_an_encoder_that_is_not_there_leaves_no_run(root, tmp_path):
    config = stage1(tmp_path)
    assert f"model.encoder.name={tmp_path}/encoder/model" in refused(config)
    assert not (tmp_path / "stage1").exists()


def test_weights_that_do_not_fit_are_named(root):
    base = stage2(root, name="misfit")
    quantizer = dataclasses.replace(base.model.quantizer, num_codes=32)
    message = refused(
        dataclasses.replace(base, model=dataclasses.replace(base.model, quantizer=quantizer))
    )
    assert str(root / "stage1") in message
    assert "quantizer.codebook is (16, 8) there and (32, 8) by these settings" in message
    simvq = SimVQConfig(num_codes=16, code_dim=8)
    message = refused(
        dataclasses.replace(base, model=dataclasses.replace(base.model, quantizer=simvq))
    )
    assert "quantizer.codebook" in message and "must be the same in both runs" in message
    assert not (root / "misfit").exists()


def test_a_run_to_start_from_that_is_not_there(root, tmp_path):
    message = refused(stage2(root, root=str(tmp_path), start_from=str(tmp_path / "nowhere")))
    assert str(tmp_path / "nowhere") in message


def test_a_folder_without_a_tokenizer_is_named(tmp_path):
    with pytest.raises(UserError, match="run `make tokenizer`"):
        tokenizer.load(tmp_path)


def test_few_images_are_enough(tmp_path):
    generator = torch.Generator().manual_seed(0)
    for name in ("a", "b"):
        (tmp_path / "images" / name).mkdir(parents=True)
        for index in range(5):
            pixels = torch.randint(256, (20, 20, 3), generator=generator, dtype=torch.uint8)
            Image.fromarray(pixels.numpy()).save(tmp_path / "images" / name / f"{index}.png")
    data = dataclasses.replace(DATA, source=str(tmp_path / "images"))
    short = dataclasses.replace(LOOP, steps=1)
    pretrain(pretraining(tmp_path, data=data, loop=short))
    train_tokenizer(stage1(tmp_path, data=data, loop=short))
    assert tokenizer.load(tmp_path / "stage1").encode(images()).shape == (4, 16)
