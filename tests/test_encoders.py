"""Encoders: pretrained transformers give their patches in raster order, and nothing hostile or wrong loads."""

from __future__ import annotations

import json
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from tiny import MEAN, STD, save_encoder

from tokenizer.encoders import ENCODERS
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FAMILIES, FoundationConfig
from tokenizer.encoders.pretrain import MAEConfig, initialise
from training.command import UserError


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family."""
    root = tmp_path_factory.mktemp("encoders")
    return {model_type: save_encoder(root / model_type, model_type) for model_type in FAMILIES}


@pytest.fixture(params=FAMILIES)
def folder(request, folders):
    return folders[request.param]


def load(name, **options):
    return FoundationConfig(name=str(name), **options).build(16).eval()


def images(batch=2, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def expected_tokens(folder, pixels):
    """What transformers' own class makes of normalised pixels."""
    import transformers

    model_type = json.loads((folder / "config.json").read_text())["model_type"]
    model_class = getattr(transformers, FAMILIES[model_type].model_class)
    model = model_class.from_pretrained(folder, **FAMILIES[model_type].load_arguments).eval()
    arguments = {"noise": torch.arange(16.0).expand(len(pixels), -1)} if model_type == "vit_mae" else {}
    with torch.no_grad():
        return model(pixels, **arguments).last_hidden_state


# every encoder of the table


def test_every_encoder_says_its_stride_and_channels(folders):
    for kind, config in ENCODERS.items():
        encoder = (config(name=folders["vit"]) if kind == "foundation" else config(channels=16)).build(16)
        for size in (16, 24):
            features = encoder(images(size=size))
            assert features.shape == (2, encoder.channels, size // encoder.stride, size // encoder.stride), kind


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_conv_encoder_reduces_by_its_stride(stride):
    encoder = ConvEncoderConfig(channels=8, stride=stride, residual_blocks=1, residual_channels=4).build(16)
    assert encoder(images()).shape == (2, 8, 16 // stride, 16 // stride)


@pytest.mark.parametrize("stride", [0, 1, 3, 6])
def test_conv_encoder_refuses_other_strides(stride):
    with pytest.raises(ValueError, match=f"encoder.stride={stride} must be a power of two"):
        ConvEncoderConfig(stride=stride)


# pretrained transformers


def test_features_are_those_of_transformers_without_prefix_tokens(folder):
    given = images()
    normalised = ((given + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[:, None, None]
    tokens = expected_tokens(Path(folder), normalised)[:, -16:]
    features = load(folder)(given)
    assert features.shape == (2, 16, 4, 4)
    torch.testing.assert_close(features.flatten(2).transpose(1, 2), tokens)


def test_patches_come_in_raster_order(folder):
    encoder, plain = load(folder), images(batch=1)
    before = encoder(plain)
    for row, column in ((0, 0), (1, 2), (3, 0), (2, 3)):
        changed = plain.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        moved = (encoder(changed) - before).square().sum(1)[0]
        assert divmod(int(moved.argmax()), 4) == (row, column)


def test_features_are_the_same_each_time(folder):
    encoder = load(folder, frozen=False).train()
    torch.testing.assert_close(encoder(images()), encoder(images()), atol=0, rtol=0)


def test_other_sizes_interpolate_positions(folder):
    assert load(folder)(images(size=24)).shape == (2, 16, 6, 6)
    assert load(folder)(torch.rand(1, 3, 16, 32)).shape == (1, 16, 4, 8)


def test_a_frozen_encoder_stays_in_evaluation_and_without_gradients(folder):
    encoder = load(folder, frozen=True).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images().requires_grad_()).requires_grad


def test_an_unfrozen_encoder_learns_wherever_it_can(folder):
    encoder = load(folder, frozen=False).train()
    assert all(module.training for module in encoder.modules())
    encoder(images()).square().sum().backward()
    unused = [name for name, p in encoder.model.named_parameters() if p.requires_grad and p.grad is None]
    assert unused == []


def test_architecture_alone_takes_the_weights(folder, tmp_path):
    trained = load(folder)
    trained.save_architecture(tmp_path / "encoder")
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == ["config.json", "preprocessor_config.json"]
    empty = FoundationConfig(name="gone/for-good").build(16, saved=tmp_path).eval()
    assert not torch.equal(empty(images()), trained(images()))
    empty.load_state_dict(trained.state_dict())
    assert torch.equal(empty(images()), trained(images()))


# bad names and folders


@pytest.mark.parametrize("name", ["./nope", "nope", "/nope/model", "runs/a/encoder/model", "owner/nope"])
def test_a_name_that_leads_nowhere_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(name)
    message = str(caught.value)
    assert f"model.encoder.name={name}" in message and "give the path of" in message and "\n" not in message


def broken(folders, tmp_path, change):
    """A copy of a good folder after `change(copy)`, and the error that loading it gives."""
    copy = tmp_path / "model"
    shutil.copytree(folders["vit"], copy)
    change(copy)
    with pytest.raises(UserError) as caught:
        load(copy)
    message = str(caught.value)
    assert str(copy) in message and "\n" not in message
    return message


def edit(**changes):
    def change(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **changes}))

    return change


def cut(folder):
    weights = folder / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-100])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda folder: (folder / "model.safetensors").unlink(), "model.safetensors"),
        (lambda folder: (folder / "config.json").write_text("{"), "config.json"),
        (lambda folder: (folder / "config.json").unlink(), "damaged"),
        (lambda folder: (folder / "preprocessor_config.json").unlink(), "image processor"),
        (lambda folder: (folder / "preprocessor_config.json").write_text("{}"), "image_mean"),
        (cut, "damaged"),
        (edit(model_type="bert"), "'bert' is not one of vit_mae"),
        (edit(intermediate_size=48), "its weights lack"),
        (edit(num_hidden_layers=3), "its weights lack"),
    ],
)
def test_a_broken_folder_is_one_line(folders, tmp_path, change, words):
    assert words in broken(folders, tmp_path, change)


class Payload:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_pickles_and_remote_code_are_never_run(folders, tmp_path):
    def only_a_pickle(folder):
        (folder / "model.safetensors").unlink()
        (folder / "pytorch_model.bin").write_bytes(pickle.dumps({"weight": Payload(tmp_path / "pickled")}))

    broken(folders, tmp_path, only_a_pickle)
    shutil.rmtree(tmp_path / "model")

    def remote_code(folder):
        edit(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})(folder)
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")

    broken(folders, tmp_path, remote_code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


# pretraining's model


def test_pretraining_starts_from_the_positions_of_transformers():
    config = MAEConfig(patch_size=4, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2)
    model = config.build(16)
    embeddings = model.vit.embeddings
    ours = embeddings.position_embeddings.clone()
    embeddings.initialize_weights()  # transformers' own, which its constructor does not call
    torch.testing.assert_close(ours, embeddings.position_embeddings)
    assert not ours[0, 0].any() and len(ours[0].unique(dim=0)) == 17
    grid = ours[0, 1:].view(4, 4, 16)
    assert (grid[:, 2, :8] == grid[0, 2, :8]).all() and (grid[3, :, 8:] == grid[3, 0, 8:]).all()  # columns first
    decoder = model.decoder.decoder_pos_embed[0, 1:]
    assert len(decoder.unique(dim=0)) == 16
    assert embeddings.cls_token.any() and model.decoder.mask_token.any()


def test_pretraining_sees_where_patches_are():
    model = MAEConfig(patch_size=4, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2).build(16)
    initialise(model, 4)
    logits = model(torch.zeros(1, 3, 16, 16), noise=torch.rand(1, 16)).logits
    assert len(logits[0].detach().unique(dim=0)) == 16


@pytest.mark.parametrize("wrong", [{"dim": 30, "heads": 4}, {"dim": 6, "heads": 3}, {"decoder_dim": 10}])
def test_pretraining_refuses_sizes_that_do_not_divide(wrong):
    with pytest.raises(ValueError, match=r"mae\.\w+=\d+ must divide by"):
        MAEConfig(**wrong)


def test_pretraining_refuses_an_image_of_no_whole_number_of_patches():
    with pytest.raises(ValueError, match=r"data\.image_size=30 does not divide by mae\.patch_size=4: take 32"):
        MAEConfig(dim=16, depth=1, heads=2).build(30)
