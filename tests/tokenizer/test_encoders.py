"""Encoders: pretrained transformers give their patches in raster order, and nothing hostile or
wrong loads."""

from __future__ import annotations

import copy
import fnmatch
import json
import pickle
import re
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny import MEAN, MODELS, STD, save_encoder

from tokenizer.encoders import ENCODERS
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FAMILIES, KNOWN, FoundationConfig
from tokenizer.encoders.pretrain import MAEConfig, initialise
from training.errors import UserError

SIZES = {"native": (16, 16), "larger": (24, 24), "wide": (16, 32), "tall, as many patches": (32, 8)}
# Tokens before the patches, as the tiny models are made.
PREFIX = {
    "vit_mae": 1,
    "vit": 1,
    "dinov2": 1,
    "dinov2_with_registers": 4,
    "dinov3_vit": 3,
    "internvl": 1,
}


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """A tiny model of each family, and of each composite model that holds one."""
    root = tmp_path_factory.mktemp("encoders")
    return {model_type: save_encoder(root / model_type, model_type) for model_type in MODELS}


@pytest.fixture(params=MODELS)
def folder(request, folders):
    return folders[request.param]


def load(name, **options):
    return FoundationConfig(name=str(name), **options).build(16).eval()


def images(batch=2, size=(16, 16), seed=0):
    return torch.rand(batch, 3, *size, generator=torch.Generator().manual_seed(seed)) * 2 - 1


def transformers_features(folder, inputs, grid):
    """What transformers' own model, composite or not, makes of its processor's output: (B, C, h,
    w)."""
    import transformers

    model_type = Path(folder).name
    model = transformers.AutoModel.from_pretrained(
        folder, **({"mask_ratio": 0.0} if model_type == "vit_mae" else {})
    )
    model = model.eval()
    for part in ("vision_model", "vision_tower"):
        model = getattr(model, part, model)
    if model_type == "vit_mae":
        inputs = {
            **inputs,
            "noise": torch.arange(grid[0] * grid[1]).expand(len(inputs["pixel_values"]), -1),
        }
    if model_type in ("vit_mae", "vit", "siglip", "siglip_vision_model"):
        inputs = {**inputs, "interpolate_pos_encoding": True}
    with torch.no_grad():
        tokens = model(**inputs).last_hidden_state
    prefix = PREFIX.get(model_type.removesuffix("_vision"), 0)
    patches = tokens[:, prefix : prefix + grid[0] * grid[1]]
    if not model_type.startswith("siglip2"):  # which pads
        assert tokens.shape[1] == prefix + grid[0] * grid[1]
    return patches.transpose(1, 2).unflatten(2, grid)


# every encoder of the table


def test_every_encoder_says_its_stride_and_channels(folders):
    for kind, config in ENCODERS.items():
        if kind == "titok":  # a sequence without places
            continue
        sizes = {"heads": 2} if kind == "patch_vit" else {}
        encoder = (
            config(name=folders["vit"]) if kind == "foundation" else config(channels=16, **sizes)
        ).build(16)
        for rows, columns in ((4, 4), (6, 6), (4, 8)):
            features = encoder(images(size=(rows * encoder.stride, columns * encoder.stride)))
            assert features.shape == (2, encoder.channels, rows, columns), kind


@pytest.mark.parametrize("stride", [2, 4, 8])
def test_conv_encoder_reduces_by_its_stride(stride):
    encoder = ConvEncoderConfig(
        channels=8, stride=stride, residual_blocks=1, residual_channels=4
    ).build(16)
    assert encoder(images()).shape == (2, 8, 16 // stride, 16 // stride)


@pytest.mark.parametrize("stride", [0, 1, 3, 6])
def test_conv_encoder_refuses_other_strides(stride):
    with pytest.raises(ValueError, match=f"encoder.stride={stride} must be a power of two"):
        ConvEncoderConfig(stride=stride)


# pretrained transformers


def test_there_is_a_tiny_model_of_every_family():
    assert set(FAMILIES) <= set(MODELS)


@pytest.mark.parametrize("size", SIZES.values(), ids=SIZES)
def test_features_are_those_of_transformers_own_pipeline(folder, size):
    """The same uint8 images through the model's own image processor and class."""
    from transformers import AutoImageProcessor

    pixels = torch.randint(
        256, (3, 3, *size), dtype=torch.uint8, generator=torch.Generator().manual_seed(1)
    )
    inputs = AutoImageProcessor.from_pretrained(folder)(list(pixels), return_tensors="pt")
    grid = (size[0] // 4, size[1] // 4)
    expected = transformers_features(folder, dict(inputs), grid)
    encoder = load(folder)
    assert (encoder.channels, encoder.stride) == (16, 4)
    torch.testing.assert_close(encoder(pixels / 127.5 - 1), expected, atol=1e-5, rtol=0)


def test_features_are_those_of_transformers_model(folder):
    given = images()
    normalised = ((given + 1) / 2 - torch.tensor(MEAN)[:, None, None]) / torch.tensor(STD)[
        :, None, None
    ]
    inputs = {"pixel_values": normalised}
    if Path(folder).name.startswith("siglip2"):
        patches = torch.nn.functional.unfold(normalised, 4, stride=4).transpose(
            1, 2
        )  # (B, N, channel row column)
        patches = patches.unflatten(2, (3, 16)).transpose(2, 3).flatten(2)
        shapes = torch.full((2, 2), 4)
        inputs = {
            "pixel_values": patches,
            "pixel_attention_mask": torch.ones(2, 16),
            "spatial_shapes": shapes,
        }
    expected = transformers_features(folder, inputs, (4, 4))
    torch.testing.assert_close(load(folder)(given), expected, atol=1e-6, rtol=1e-6)


def test_patches_come_in_raster_order(folder):
    encoder, plain = load(folder), images(batch=1, size=(16, 24))
    before = encoder(plain)
    for row, column in ((0, 0), (1, 2), (3, 0), (2, 5)):
        changed = plain.clone()
        changed[:, :, 4 * row : 4 * row + 4, 4 * column : 4 * column + 4] *= -1
        moved = (encoder(changed) - before).square().sum(1)[0]
        assert divmod(int(moved.argmax()), 6) == (row, column)


def test_an_image_of_broken_patches_is_refused(folder):
    with pytest.raises(ValueError, match="18 x 16 pixels do not divide into patches of 4"):
        load(folder)(images(size=(18, 16)))


def test_training_adds_no_randomness(folder, tmp_path):
    """Not even when the model's config asks for it."""
    shutil.copytree(folder, tmp_path / "model")
    config = json.loads((tmp_path / "model/config.json").read_text())
    vision = config.get("vision_config", config)
    vision.update(
        {
            key: 0.5
            for key in vision
            if "dropout" in key or key.startswith(("drop_path", "mask_ratio"))
        }
    )
    if "pos_embed_rescale" in vision:
        vision.update(pos_embed_rescale=2.0, pos_embed_jitter=2.0, pos_embed_shift=0.5)
    (tmp_path / "model/config.json").write_text(json.dumps(config))
    encoder, expected = load(tmp_path / "model", frozen=False), load(folder)(images())
    torch.testing.assert_close(encoder.train()(images()), expected, atol=0, rtol=0)


# frozen, learning


def test_a_frozen_encoder_stays_in_evaluation_and_without_gradients(folder):
    encoder = load(folder, frozen=True).train()
    assert not any(module.training for module in encoder.modules())
    assert not any(parameter.requires_grad for parameter in encoder.parameters())
    assert not encoder(images().requires_grad_()).requires_grad


@pytest.mark.parametrize("final_norm", ["affine", "plain"])
def test_every_parameter_of_an_unfrozen_encoder_learns(folder, final_norm):
    encoder = load(folder, frozen=False, final_norm=final_norm).train()
    assert all(module.training for module in encoder.modules())
    features = encoder(images(size=(16, 24)))
    (
        features * torch.randn(features.shape, generator=torch.Generator().manual_seed(0))
    ).sum().backward()
    assert [
        name for name, p in encoder.named_parameters() if p.grad is None or not p.grad.any()
    ] == []


def test_set_frozen_switches_the_stage(folder):
    encoder = load(folder, frozen=True).train()
    encoder.set_frozen(False)
    assert not encoder.frozen and all(module.training for module in encoder.modules())
    encoder(images()).square().sum().backward()
    assert all(parameter.grad is not None for parameter in encoder.parameters())
    encoder.set_frozen(True)
    assert encoder.frozen and not any(module.training for module in encoder.modules())
    assert not encoder(images()).requires_grad
    encoder.eval().set_frozen(False)
    assert not any(module.training for module in encoder.modules())


def test_gradient_checkpointing_computes_twice_and_changes_nothing(folder):
    gradients, calls = [], []
    for checkpointing in (False, True):
        encoder = load(folder, frozen=False, gradient_checkpointing=checkpointing).train()
        name, norm = next(
            (n, m)
            for n, m in encoder.model.named_modules()
            if re.fullmatch(r".*layers?\.1\.\w*norm\w*", n)
        )
        count = []
        norm.register_forward_hook(lambda *_, count=count: count.append(1))
        encoder(images()).square().sum().backward()
        gradients.append({name: parameter.grad for name, parameter in encoder.named_parameters()})
        calls.append(len(count))
    assert calls == [1, 2]
    for name, gradient in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], gradient)


def test_a_plain_final_norm_leaves_mean_0_and_variance_1(folder):
    plain = load(folder, final_norm="plain")
    features = plain(images(size=(16, 24)))
    torch.testing.assert_close(features.mean(1), torch.zeros(2, 4, 6), atol=1e-5, rtol=0)
    torch.testing.assert_close(
        features.var(1, correction=0), torch.ones(2, 4, 6), atol=1e-3, rtol=0
    )
    affine = load(folder)
    norm = getattr(affine.model, affine.family.final_norm)
    if isinstance(norm, torch.nn.LayerNorm):  # InternViT has none
        scale, shift = (value[:, None, None] for value in (norm.weight, norm.bias))
        torch.testing.assert_close(
            features * scale + shift, affine(images(size=(16, 24))), atol=1e-5, rtol=1e-5
        )


def test_internvit_that_ends_in_a_norm_keeps_it(tmp_path):
    folder = save_encoder(tmp_path / "internvl_vision", "internvl_vision", use_mean_pooling=False)
    affine, plain = load(folder), load(folder, final_norm="plain")
    scale, shift = (
        value[:, None, None]
        for value in (affine.model.layernorm.weight, affine.model.layernorm.bias)
    )
    torch.testing.assert_close(
        plain(images()) * scale + shift, affine(images()), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("wrong", ["none", "", "Plain"])
def test_another_final_norm_is_refused(wrong):
    with pytest.raises(ValueError, match=r"encoder\.final_norm='\w*' must be 'affine' or 'plain'"):
        FoundationConfig(final_norm=wrong)


# which weights are read


@pytest.mark.parametrize("final_norm", ["affine", "plain"])
def test_architecture_alone_takes_the_weights(folder, tmp_path, final_norm):
    trained = load(folder, final_norm=final_norm)
    trained.save_architecture(tmp_path / "encoder")
    assert sorted(p.name for p in (tmp_path / "encoder").iterdir()) == [
        "config.json",
        "preprocessor_config.json",
    ]
    empty = (
        FoundationConfig(name="gone/for-good", final_norm=final_norm)
        .build(16, saved=tmp_path)
        .eval()
    )
    assert not torch.equal(empty(images()), trained(images()))
    empty.load_state_dict(trained.state_dict())
    assert torch.equal(empty(images()), trained(images()))
    assert empty.fingerprint() == trained.fingerprint()


def test_a_copy_is_the_same(folder):
    encoder = load(folder)
    assert torch.equal(copy.deepcopy(encoder)(images()), encoder(images()))


def test_a_composite_model_gives_its_vision_part_alone(folders):
    for whole, part in (
        ("siglip", "_vision_model"),
        ("siglip2", "_vision_model"),
        ("internvl", "_vision"),
    ):
        names = [
            {name for name, _ in load(folders[key]).named_parameters()}
            for key in (whole, whole + part)
        ]
        assert names[0] == names[1]


@pytest.mark.parametrize("prefix", ["vision_tower.", "model.vision_tower."])
def test_internvl_is_read_under_the_names_of_every_release(folders, tmp_path, prefix):
    shutil.copytree(folders["internvl"], tmp_path / "model")
    weights = load_file(tmp_path / "model/model.safetensors")
    renamed = {
        re.sub(r"^(model\.)?vision_tower\.", prefix, key): value for key, value in weights.items()
    }
    assert any(key.startswith(prefix) for key in renamed)
    save_file(renamed, tmp_path / "model/model.safetensors", {"format": "pt"})
    assert torch.equal(load(tmp_path / "model")(images()), load(folders["internvl"])(images()))


def test_no_weights_are_read_unless_asked(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "model")
    (tmp_path / "model/model.safetensors").unlink()
    bare = FoundationConfig(name=str(tmp_path / "model")).build(16, weights=False)
    shapes = [
        {name: value.shape for name, value in e.state_dict().items()} for e in (bare, load(folder))
    ]
    assert shapes[0] == shapes[1]


# Millions of parameters as published, without what an encoder lacks: mask tokens, poolers, heads of
# classification.
PUBLISHED = {
    "facebook/dinov2-base": 86.6,
    "facebook/dinov2-with-registers-base": 86.6,
    "facebook/dinov3-vitb16-pretrain-lvd1689m": 85.7,
    "google/siglip-large-patch16-256": 316.0,
    "google/siglip2-so400m-patch16-256": 427.9,
    "google/siglip2-so400m-patch16-512": 428.8,
    "OpenGVLab/InternVL3-1B-hf": 304.0,
    "facebook/vit-mae-base": 85.8,
    "google/vit-base-patch16-224": 85.8,
    "facebook/dino-vits8": 21.7,
}


@pytest.mark.parametrize("name", KNOWN)
def test_known_models_have_their_published_size(name, monkeypatch):
    from transformers.models.siglip.modeling_siglip import SiglipMultiheadAttentionPoolingHead

    monkeypatch.setattr("huggingface_hub.snapshot_download", None)
    with torch.device("meta"):
        encoder = FoundationConfig(name=name).build(256, weights=False)
        parts = [encoder.model]
        if "siglip" in name:  # published with its pooling head
            parts.append(SiglipMultiheadAttentionPoolingHead(encoder.model.config))
        side = 32 * encoder.stride
        assert encoder(torch.zeros(1, 3, side, side)).shape == (1, encoder.channels, 32, 32)
    assert all(value.is_meta for value in encoder.state_dict().values())
    count = sum(parameter.numel() for part in parts for parameter in part.parameters())
    assert round(count / 1e6, 1) == PUBLISHED[name]


def test_images_are_resized_to_what_the_model_is_to_see(folders):
    plain = FoundationConfig(name=str(folders["vit"])).build(16)
    encoder = FoundationConfig(name=str(folders["vit"]), input_size=16).build(24)
    assert encoder.stride == 6 and encoder.patch == 4
    given = images(size=(24, 24))
    seen = torch.nn.functional.interpolate(given, (16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(encoder(given), plain(seen))
    assert encoder(images(size=(24, 24))[:, :, :12]).shape == (
        2,
        16,
        2,
        4,
    )  # half as high: the same pixels per feature
    assert torch.equal(encoder(images(size=(40, 40)), (4, 4)), plain(images(size=(40, 40)), (4, 4)))
    for size, image_size in ((14, 24), (16, 30), (2, 24)):
        with pytest.raises(
            ValueError,
            match=f"data.image_size={image_size} with encoder.input_size={size}: the input",
        ):
            FoundationConfig(name=str(folders["vit"]), input_size=size).build(image_size)


def test_an_unknown_name_without_weights_is_one_line():
    with pytest.raises(UserError) as caught:
        FoundationConfig(name="owner/other").build(16, weights=False)
    message = str(caught.value)
    assert (
        "model.encoder.name=owner/other: only these are known without weights: facebook/dinov2-base"
        in message
    )
    assert "or give a folder" in message and "\n" not in message


def test_a_hub_model_is_fetched_once_without_pickles(folders, monkeypatch):
    asked = []

    def fetch(name, revision, allow_patterns):
        asked.append((name, revision))
        assert not any(fnmatch.fnmatch("pytorch_model.bin", pattern) for pattern in allow_patterns)
        for file in (
            "config.json",
            "preprocessor_config.json",
            "model.safetensors",
            "model-00001-of-00002.safetensors",
        ):
            assert any(fnmatch.fnmatch(file, pattern) for pattern in allow_patterns)
        return folders["dinov2"]

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    assert torch.equal(
        load("owner/name", revision="v1")(images()), load(folders["dinov2"])(images())
    )
    assert asked == [("owner/name", "v1")]


def test_a_hub_that_is_away_is_asked_once_and_told_in_one_line(monkeypatch):
    asked = []

    def fetch(*_, **__):
        asked.append(1)
        raise RuntimeError("proxy says no\nand more")

    monkeypatch.setattr("huggingface_hub.snapshot_download", fetch)
    with pytest.raises(
        UserError, match=r"owner/name is no folder here.*\(proxy says no\): give the path of a down"
    ) as caught:
        load("owner/name")
    assert asked == [1] and "\n" not in str(caught.value)


# bad names and folders


@pytest.mark.parametrize(
    "name", ["./nope", "nope", "/nope/model", "runs/a/encoder/model", "owner/nope"]
)
def test_a_name_that_leads_nowhere_is_one_line(name, monkeypatch, tmp_path):
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        load(name)
    message = str(caught.value)
    assert (
        f"model.encoder.name={name}" in message
        and "give the path of" in message
        and "\n" not in message
    )


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
        (folder / "pytorch_model.bin").write_bytes(
            pickle.dumps({"weight": Payload(tmp_path / "pickled")})
        )

    broken(folders, tmp_path, only_a_pickle)
    shutil.rmtree(tmp_path / "model")

    def remote_code(folder):
        edit(model_type="mine", auto_map={"AutoConfig": "mine.Mine", "AutoModel": "mine.Mine"})(
            folder
        )
        (folder / "mine.py").write_text(f"open({str(tmp_path / 'executed')!r}, 'w')\n")

    broken(folders, tmp_path, remote_code)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["model"]


# pretraining's model


def test_pretraining_starts_from_the_positions_of_transformers():
    config = MAEConfig(
        patch_size=4, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
    )
    model = config.build(16)
    embeddings = model.vit.embeddings
    ours = embeddings.position_embeddings.clone()
    embeddings.initialize_weights()  # transformers' own, which its constructor does not call
    torch.testing.assert_close(ours, embeddings.position_embeddings)
    assert not ours[0, 0].any() and len(ours[0].unique(dim=0)) == 17
    grid = ours[0, 1:].view(4, 4, 16)
    assert (grid[:, 2, :8] == grid[0, 2, :8]).all() and (
        grid[3, :, 8:] == grid[3, 0, 8:]
    ).all()  # columns first
    decoder = model.decoder.decoder_pos_embed[0, 1:]
    assert len(decoder.unique(dim=0)) == 16
    assert embeddings.cls_token.any() and model.decoder.mask_token.any()


def test_pretraining_sees_where_patches_are():
    model = MAEConfig(
        patch_size=4, dim=16, depth=1, heads=2, decoder_dim=8, decoder_depth=1, decoder_heads=2
    ).build(16)
    initialise(model, 4)
    logits = model(torch.zeros(1, 3, 16, 16), noise=torch.rand(1, 16)).logits
    assert len(logits[0].detach().unique(dim=0)) == 16


@pytest.mark.parametrize(
    "wrong", [{"dim": 30, "heads": 4}, {"dim": 6, "heads": 3}, {"decoder_dim": 10}]
)
def test_pretraining_refuses_sizes_that_do_not_divide(wrong):
    with pytest.raises(ValueError, match=r"mae\.\w+=\d+ must divide by"):
        MAEConfig(**wrong)


def test_pretraining_refuses_an_image_of_no_whole_number_of_patches():
    with pytest.raises(
        ValueError, match=r"data\.image_size=30 does not divide by mae\.patch_size=4: take 32"
    ):
        MAEConfig(dim=16, depth=1, heads=2).build(30)
