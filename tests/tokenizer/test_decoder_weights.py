"""Decoders trained elsewhere load by name and draw what their own code draws."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file
from torch import nn

from tokenizer.decoders.pretrained import load_decoder, load_statistics
from tokenizer.decoders.vit import ViTDecoderConfig
from training.errors import UserError

MEAN, STD = [0.4, 0.5, 0.6], [0.2, 0.3, 0.4]
SIZE = {"dim": 16, "depth": 2, "heads": 2, "mlp": 24}
GRID = (3, 3)


def ours(grid=GRID, in_channels=6, stride=4, **changes):
    return (
        ViTDecoderConfig(**{**SIZE, **changes})
        .build(in_channels, stride, grid, nn.Identity())
        .eval()
    )


class Reference:
    """A decoder as RAE has it, made of transformers' own MAE decoder: pixels in the encoder's
    normalisation."""

    def __init__(self):
        from transformers import ViTMAEConfig
        from transformers.models.vit_mae.modeling_vit_mae import ViTMAEDecoder

        torch.manual_seed(0)
        self.decoder = ViTMAEDecoder(
            ViTMAEConfig(
                hidden_size=6,
                patch_size=4,
                decoder_hidden_size=16,
                decoder_num_hidden_layers=2,
                decoder_num_attention_heads=2,
                decoder_intermediate_size=24,
                attn_implementation="eager",
            ),
            num_patches=9,
        ).eval()
        with torch.no_grad():
            for name, parameter in self.decoder.named_parameters():
                if name != "decoder_pos_embed":
                    parameter.normal_(std=0.3)
        self.before_class = torch.randn(6)  # what the class token would be embedded from

    def rae(self):
        """Its state dict under the names that RAE publishes."""
        names = {
            ".attention.q_proj.": ".attention.attention.query.",
            ".attention.k_proj.": ".attention.attention.key.",
            ".attention.v_proj.": ".attention.attention.value.",
            ".attention.o_proj.": ".attention.output.dense.",
            ".mlp.fc1.": ".intermediate.dense.",
            ".mlp.fc2.": ".output.dense.",
        }
        return {
            **renamed(self.decoder.state_dict(), names),
            "trainable_cls_token": self._class_token(),
        }

    @torch.no_grad()
    def images(self, vectors):
        """(B, 6, 3, 3) -> (B, 3, 12, 12) in [-1, 1]."""
        tokens = torch.cat(
            [self.before_class.expand(len(vectors), 1, -1), vectors.flatten(2).mT], 1
        )
        logits = self.decoder(tokens, torch.arange(9).expand(len(vectors), -1)).logits
        pixels = logits.reshape(-1, 3, 3, 4, 4, 3).permute(0, 5, 1, 3, 2, 4).reshape(-1, 3, 12, 12)
        pixels = pixels * torch.tensor(STD).view(3, 1, 1) + torch.tensor(MEAN).view(3, 1, 1)
        return pixels * 2 - 1

    def _class_token(self):
        return self.decoder.decoder_embed(self.before_class).detach().view(1, 1, -1)


def renamed(weights, names):
    out = {name: tensor.clone() for name, tensor in weights.items() if name != "mask_token"}
    for old, new in names.items():
        out = {name.replace(old, new): tensor for name, tensor in out.items()}
    return out


@pytest.fixture(scope="module")
def reference():
    return Reference()


def pt(folder, saved, name="model.pt"):
    torch.save(saved, folder / name)
    return folder / name


def as_safetensors(folder, weights):
    save_file(weights, folder / "a.safetensors")
    return folder


def as_training_checkpoint(folder, weights):
    worse = {f"module.decoder.{name}": torch.zeros_like(tensor) for name, tensor in weights.items()}
    average = {
        "encoder.scale": torch.ones(3),
        **{f"decoder.{name}": tensor for name, tensor in weights.items()},
    }
    return pt(folder, {"step": 3, "model": worse, "ema": average})


def as_diffusers(folder, weights):
    names = {
        ".attention.attention.query.": ".attention.to_q.",
        ".attention.attention.key.": ".attention.to_k.",
        ".attention.attention.value.": ".attention.to_v.",
        ".attention.output.dense.": ".attention.to_out.0.",
    }
    tensors = {
        **{f"decoder.{name}": tensor for name, tensor in renamed(weights, names).items()},
        "encoder.model.layernorm.scale": torch.zeros(6),
        "encoder_mean": torch.tensor(MEAN).view(1, 3, 1, 1),
        "encoder_std": torch.tensor(STD).view(1, 3, 1, 1),
        "_latents_mean": torch.zeros(1),
        "_latents_std": torch.ones(1),
    }
    save_file(tensors, folder / "diffusion_pytorch_model.safetensors")
    (folder / "config.json").write_text(json.dumps({"decoder_num_attention_heads": 2}))
    return folder


FORMS = {
    "RAE file": pt,
    "RAE folder": lambda folder, weights: pt(folder, weights).parent,
    "RAE safetensors": as_safetensors,
    "training checkpoint": as_training_checkpoint,
    "data-parallel": lambda folder, weights: pt(
        folder,
        {"state_dict": {f"module.decoder.{name}": tensor for name, tensor in weights.items()}},
    ),
    "diffusers": as_diffusers,
}


@pytest.mark.parametrize("form", FORMS)
def test_published_forms_draw_the_same_images(form, reference, tmp_path):
    path = FORMS[form](tmp_path, reference.rae())
    decoder, vectors = ours(), torch.randn(2, 6, *GRID)
    load_decoder(decoder, str(path), MEAN, STD)
    torch.testing.assert_close(decoder(vectors), reference.images(vectors), atol=1e-5, rtol=1e-5)


def test_a_file_that_states_its_normalisation_is_taken_at_its_word(reference, tmp_path):
    path = as_diffusers(tmp_path, reference.rae())
    stated, given = ours(), ours()
    load_decoder(stated, path, [0, 0, 0], [1, 1, 1])
    load_decoder(given, path, MEAN, STD)
    assert torch.equal(stated.decoder_pred.weight, given.decoder_pred.weight)
    assert torch.equal(stated.decoder_pred.bias, given.decoder_pred.bias)


def test_normalisation_is_folded_exactly(reference, tmp_path):
    path, vectors = pt(tmp_path, reference.rae()), torch.randn(2, 6, *GRID)
    raw, folded = ours(), ours()
    load_decoder(raw, path, [0.5] * 3, [0.5] * 3)  # 2 (x / 2 + 1 / 2) - 1 = x
    assert torch.equal(raw.decoder_pred.weight, reference.decoder.decoder_pred.weight)
    assert torch.equal(raw.decoder_pred.bias, reference.decoder.decoder_pred.bias)
    load_decoder(folded, path, MEAN, STD)
    mean, std = torch.tensor(MEAN).view(3, 1, 1), torch.tensor(STD).view(3, 1, 1)
    torch.testing.assert_close(
        folded(vectors), 2 * (raw(vectors) * std + mean) - 1, atol=1e-5, rtol=1e-5
    )


def test_positions_of_the_file_are_ours(reference):
    theirs = reference.decoder.decoder_pos_embed
    torch.testing.assert_close(ours().decoder_pos_embed, theirs, atol=1e-6, rtol=0)


@pytest.mark.parametrize("grid", [(4, 4), (2, 5)])
def test_other_grids_than_the_trained_one_keep_their_positions(grid, reference, tmp_path):
    path, vectors = pt(tmp_path, reference.rae()), torch.randn(2, 6, *GRID)
    decoder = ours(grid)
    own = decoder.decoder_pos_embed.clone()
    load_decoder(decoder, path, MEAN, STD)
    assert torch.equal(decoder.decoder_pos_embed, own)
    torch.testing.assert_close(decoder(vectors), reference.images(vectors), atol=1e-4, rtol=1e-4)


def test_half_precision_is_read_into_float32(reference, tmp_path):
    path = pt(tmp_path, {name: tensor.bfloat16() for name, tensor in reference.rae().items()})
    decoder = ours()
    load_decoder(decoder, path, MEAN, STD)
    assert all(parameter.dtype == torch.float32 for parameter in decoder.parameters())


@pytest.mark.parametrize(
    ("change", "decoder", "message"),
    [
        (lambda w: w.pop("decoder_norm.bias"), {}, r"decoder_norm\.bias is missing"),
        (lambda w: w.update({"mask_token": torch.zeros(1)}), {}, r"mask_token has no place here"),
        (lambda w: None, {"depth": 3}, r"decoder_layers\.2\.layernorm_before\.weight is missing"),
        (lambda w: None, {"depth": 1}, r"decoder_layers\.1\..* has no place here: decoder\.preset"),
        (
            lambda w: None,
            {"dim": 32},
            r"trainable_cls_token is \(1, 1, 16\), and \(1, 1, 32\) here",
        ),
        (
            lambda w: None,
            {"mlp": 20},
            r"intermediate\.dense\.weight is \(24, 16\), and \(20, 16\) here",
        ),
        (
            lambda w: None,
            {"in_channels": 5},
            r"decoder_embed\.weight is \(16, 6\), and \(16, 5\) here",
        ),
        (lambda w: None, {"stride": 2}, r"decoder_pred\.weight is \(48, 16\), and \(12, 16\) here"),
        (lambda w: w.pop("decoder_pred.weight"), {}, r"holds no decoder_pred\.weight"),
    ],
)
def test_misfits_are_named_and_nothing_is_written(change, decoder, message, reference, tmp_path):
    weights, decoder = reference.rae(), ours(**decoder)
    change(weights)
    before = {name: tensor.clone() for name, tensor in decoder.state_dict().items()}
    with pytest.raises(UserError, match=message) as error:
        load_decoder(decoder, pt(tmp_path, weights), MEAN, STD)
    assert "\n" not in str(error.value) and str(tmp_path / "model.pt") in str(error.value)
    assert all(torch.equal(tensor, before[name]) for name, tensor in decoder.state_dict().items())


def test_heads_are_checked_where_they_are_stated(reference, tmp_path):
    path = as_diffusers(tmp_path, reference.rae())
    with pytest.raises(
        UserError, match=r"config\.json: the decoder has 2 heads, and 4 here: set decoder\.heads=2"
    ):
        load_decoder(ours(heads=4), path, MEAN, STD)
    for damaged in ("{", "[]"):
        (path / "config.json").write_text(damaged)
        with pytest.raises(
            UserError, match=r"config\.json: it is not the JSON of a model's settings"
        ):
            load_decoder(ours(heads=2), path, MEAN, STD)


class Payload:
    def __reduce__(self):
        return (print, ("ran",))


@pytest.mark.parametrize(
    "make",
    [
        lambda path: path.write_bytes(b"no archive"),
        lambda path: path.write_bytes(b""),
        lambda path: torch.save({"decoder_pred.weight": Payload()}, path),
        lambda path: torch.save([1, 2], path),
    ],
)
def test_only_tensors_are_read(make, tmp_path, capsys):
    make(tmp_path / "model.pt")
    with pytest.raises(UserError, match=r"model\.pt: it (is damaged|holds a list)"):
        load_decoder(ours(), tmp_path / "model.pt", MEAN, STD)
    assert not capsys.readouterr().out


def test_a_path_must_say_which_file(reference, tmp_path):
    with pytest.raises(UserError, match=r"absent\.pt: there is no such file"):
        load_decoder(ours(), tmp_path / "absent.pt", MEAN, STD)
    with pytest.raises(
        UserError, match=r"one \.safetensors or \.pt file is expected there, and it has none"
    ):
        load_decoder(ours(), tmp_path, MEAN, STD)
    pt(tmp_path, reference.rae(), "a.pt")
    pt(tmp_path, reference.rae(), "b.pt")
    with pytest.raises(UserError, match=r"it has a\.pt, b\.pt: name one"):
        load_decoder(ours(), tmp_path, MEAN, STD)


# latent statistics


def test_statistics_are_read(tmp_path):
    mean, var = torch.randn(6, 3, 3), torch.rand(6, 3, 3)
    read_mean, read_var = load_statistics(
        pt(tmp_path, {"mean": mean.double(), "var": var, "count": 10})
    )
    assert read_mean.dtype == read_var.dtype == torch.float32
    torch.testing.assert_close(read_mean, mean)
    assert torch.equal(read_var, var)


@pytest.mark.parametrize(
    ("saved", "message"),
    [
        ({"mean": torch.zeros(2)}, "holds no tensor 'var'"),
        ({"mean": None, "var": torch.ones(2)}, "holds no tensor 'mean'"),
        ({"mean": torch.zeros(2), "var": torch.ones(3)}, "must be of one shape"),
        ({"mean": torch.zeros(2), "var": -torch.ones(2)}, "not negative"),
        ({"mean": torch.zeros(2) / 0, "var": torch.ones(2)}, "finite"),
    ],
)
def test_statistics_that_cannot_be_are_refused(saved, message, tmp_path):
    with pytest.raises(UserError, match=message):
        load_statistics(pt(tmp_path, saved))
