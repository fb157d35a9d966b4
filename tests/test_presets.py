"""The ImageNet presets and --dry-run: layouts, sizes by arithmetic, what is needed, and nothing
written."""

from __future__ import annotations

import dataclasses
import functools
import sys
from pathlib import Path

import pytest

from tokenizer import train as train_module
from tokenizer.autoencoder import VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import PRESETS, Size
from tokenizer.dry_run import dry_run, plan
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.quantizers import QUANTIZERS
from tokenizer.run import TokenizerRun
from training.checkpoint import Run
from training.config import load, to_dict
from training.errors import UserError
from training.loop import LoopConfig

ROOT = Path(__file__).parents[1]
FOLDER = ROOT / "configs" / "imagenet"
SIGLIP_L, SO400M = Size(1024, 24, 16, 4096), Size(1152, 27, 16, 4304)
# name: (grids, codes per level, the sizes of encoder and decoder where they are transformers,
# pixels per code)
EXPECTED = {
    "VQRAE-DINOv2-B": (((16, 16),), (16384,), PRESETS["B"], PRESETS["B"], 16),
    "VQRAE-DINOv2-B_decXL": (((16, 16),), (16384,), PRESETS["B"], PRESETS["XL"], 16),
    "VQRAE-SigLIP-L_Stage1": (((16, 16),), (16384,), SIGLIP_L, SIGLIP_L, 16),
    "VQRAE-SigLIP-L_Stage2": (((16, 16),), (16384,), SIGLIP_L, SIGLIP_L, 16),
    "VQRAE-SigLIP2-So400m_Stage1": (((16, 16),), (16384,), SO400M, SO400M, 16),
    "VQRAE-SigLIP2-So400m_Stage2": (((16, 16),), (16384,), SO400M, SO400M, 16),
    "VQRAE-InternViT-300M_Stage1": (((32, 32),), (16384,), SIGLIP_L, SIGLIP_L, 14),
    "VQRAE-InternViT-300M_Stage2": (((32, 32),), (16384,), SIGLIP_L, SIGLIP_L, 14),
    "VQGAN-f16": (((16, 16),), (16384,), None, None, 16),
    "VQ-VAE-2-256": (((32, 32), (64, 64)), (512, 512), None, None, 4),
}


def preset(name, overrides=()):
    return load(TokenizerRun, FOLDER / f"{name}.yaml", overrides)


def layers(size):
    """Parameters of a transformer's layers: four maps of attention, two of the MLP, two norms."""
    return size.depth * (
        4 * (size.dim**2 + size.dim) + 2 * size.dim * size.mlp + size.mlp + size.dim + 4 * size.dim
    )


@functools.cache
def planned(name):
    return plan(preset(name))


def parts_of(found):
    return {part.name: part for part in found.parts}


def test_every_preset_is_known_here():
    assert {path.stem for path in FOLDER.glob("VQ*.yaml")} == set(EXPECTED)


@pytest.mark.parametrize("name", EXPECTED)
def test_a_preset_is_what_it_says(name, tmp_path, monkeypatch):
    """Without weights, without data, in an empty folder that stays empty."""
    monkeypatch.chdir(tmp_path)
    config = preset(name)
    found = planned(name)
    grids, num_codes, encoder, decoder, stride = EXPECTED[name]
    assert (found.layout.grids, found.layout.num_codes) == (grids, num_codes)
    assert config.name == name and grids[-1][0] * stride == config.data.image_size
    assert config.loop.batch_size % (8 * config.loop.accumulate) == 0, (
        "eight processes share a step"
    )

    parts = parts_of(found)
    if encoder is not None:
        frozen = config.model.encoder.frozen
        counts = (parts["encoder"].frozen, parts["encoder"].trainable)
        assert (
            counts[not frozen] - layers(encoder) < 2.1e6 and counts[frozen] == 0
        )  # embeddings, positions, last norm
        assert counts[not frozen] > layers(encoder)
        assert parts["project_in"].trainable == encoder.dim * 1536 + 1536
        assert (
            parts["quantizer"].trainable == 1536**2 + 1536
            and parts["quantizer"].buffers > 16384 * 1536
        )
        ends = encoder.dim * decoder.dim + decoder.dim + (decoder.dim + 1) * 3 * stride**2
        assert (
            parts["decoder"].trainable == layers(decoder) + ends + 3 * decoder.dim
        )  # class token, last norm
    if config.start_from is not None:
        assert Path(config.start_from).name in EXPECTED
        assert config.model.encoder.frozen is False
        earlier = preset(Path(config.start_from).name).model
        assert dataclasses.replace(config.model, encoder=earlier.encoder) == earlier
    assert ("discriminator" in parts) == (config.objective.adversarial > 0)
    assert parts.get("teacher") is None or parts["teacher"].trainable == 0
    assert any("data.source" in need for need in found.needs)
    assert list(tmp_path.iterdir()) == []


def test_counts_that_are_published():
    b, xl = (parts_of(planned(name)) for name in ("VQRAE-DINOv2-B", "VQRAE-DINOv2-B_decXL"))
    assert round(b["encoder"].frozen / 1e6, 1) == 86.6
    assert round(xl["decoder"].trainable / 1e6) == 415
    assert b["LPIPS trunk"].frozen == 14_714_688  # VGG-16 without its classifier
    assert round(xl["discriminator's trunk"].frozen / 1e6, 1) == 21.7  # DINO-S/8


def test_stages_differ_where_the_papers_say():
    paper, notes = (
        preset(f"VQRAE-{name}_Stage1").objective for name in ("SigLIP2-So400m", "SigLIP-L")
    )
    assert paper.adversarial == 0 and notes.adversarial > 0
    paper, notes = (
        preset(f"VQRAE-{name}_Stage2").objective for name in ("SigLIP2-So400m", "SigLIP-L")
    )
    assert (paper.distillation_target, notes.distillation_target) == ("teacher", "codes")
    assert (
        paper.adversarial == 0.1
        and paper.adversarial_start_step == 50000
        and notes.adversarial == 0
    )
    assert preset("VQRAE-SigLIP2-So400m_Stage2").optimizer.rates == {"encoder": 1e-5}


def run_main(monkeypatch, *words):
    monkeypatch.setattr(sys, "argv", ["tokenizer.train", *map(str, words)])
    train_module.main()


def test_the_command_prints_a_configuration_and_writes_nothing(tmp_path, monkeypatch, capsys):
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    run_main(monkeypatch, FOLDER / "VQ-VAE-2-256.yaml", "loop.steps=7", "--dry-run")
    printed = capsys.readouterr().out
    assert list((tmp_path / "here").iterdir()) == []
    assert "codes: 5120 per image (32 x 32 of 512, 64 x 64 of 512), 46080 bits" in printed
    assert "needs: images: data.source=hub:ILSVRC/imagenet-1k" in printed
    (tmp_path / "printed.yaml").write_text(printed)  # by itself the same configuration
    assert to_dict(load(TokenizerRun, tmp_path / "printed.yaml")) == to_dict(
        preset("VQ-VAE-2-256", ["loop.steps=7"])
    )


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["loop.batch_sise=3"], "batch_size"),
        (["loop.batch_size=7", "loop.accumulate=2"], "loop.batch_size=7"),
        (["data.image_size=250"], "data.image_size=250"),
        (["model.quantizer.code_dim=8", "optimizer.rates={nothing: 1.0}"], "nothing"),
        (["objective.perceptual=1", "objective.lpips_weights=x", "objective.lpips_net=vvg"], "vvg"),
    ],
)
def test_wrong_settings_are_one_line(overrides, words, monkeypatch):
    monkeypatch.setattr(Run, "open", None)  # nothing gets as far
    with pytest.raises(UserError, match=words) as caught:
        run_main(monkeypatch, FOLDER / "VQGAN-f16.yaml", *overrides, "--dry-run")
    assert "\n" not in str(caught.value)


def small(quantizer=None, **changes):
    model = VQVAEConfig(
        encoder=ConvEncoderConfig(channels=16, residual_channels=8),
        quantizer=quantizer or QUANTIZERS["vector"](num_codes=32, code_dim=8),
        decoder=ConvDecoderConfig(channels=16, residual_channels=8),
    )
    loop = LoopConfig(steps=10, batch_size=16)
    return dataclasses.replace(
        TokenizerRun(data=DataConfig(source="digits", image_size=16), model=model, loop=loop),
        **changes,
    )


def test_data_at_hand_is_counted_in_epochs():
    found = plan(small())
    assert found.num_images == 1438 and found.needs == []  # four fifths of 1797
    assert "0.1 epochs of 1,438" in dry_run(small())


@pytest.mark.parametrize("kind", QUANTIZERS)
def test_every_quantizer_has_a_plan_that_its_model_agrees_with(kind):
    config = small(QUANTIZERS[kind]())
    found, model = plan(config), config.model.build(16)
    assert found.layout == model.layout
    counted = sum(part.trainable for part in found.parts)
    assert counted == sum(p.numel() for p in model.parameters() if p.requires_grad)
    held = sum(t.numel() * t.element_size() for t in [*model.parameters(), *model.buffers()])
    memory = found.estimate.memory(1)
    assert memory["autoencoder"] == memory["average"] == held
    assert memory["moments"] == 2 * memory["gradients"] == 8 * counted


def test_micro_batches_share_activations():
    whole, halved = (
        plan(small(loop=LoopConfig(batch_size=16, accumulate=n))).estimate.memory(1) for n in (1, 2)
    )
    assert halved["activations"] < 0.7 * whole["activations"]
    assert {k: v for k, v in halved.items() if k != "activations"} == {
        k: v for k, v in whole.items() if k != "activations"
    }


def test_stored_features_spare_the_encoder():
    overrides = ["objective.perceptual=0", "loop.batch_size=64", "model.decoder.preset=B"]
    images, stored = (
        preset("VQRAE-DINOv2-B_decXL", [*overrides, "objective.adversarial=0", *more])
        for more in ([], ["features.views=2"])
    )
    images, stored = plan(images), plan(stored)
    tokens, size = 1 + 4 + 256, PRESETS["B"]
    encoder = size.depth * (
        2 * tokens * (4 * size.dim**2 + 2 * size.dim * size.mlp) + 4 * tokens**2 * size.dim
    )
    patches = 2 * 256 * 3 * 14 * 14 * size.dim
    spared = sum(images.estimate.flops(1, 0).values()) - sum(stored.estimate.flops(1, 0).values())
    assert spared == 64 * (encoder + patches)
    assert (images.features, stored.features) == (None, 2 * 256 * 768 * 2)
