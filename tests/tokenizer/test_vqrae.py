"""The interface that users of RAE and VQRAE know, by what its documentation says."""

from __future__ import annotations

import copy
import json
import pickle

import pytest
import torch
from tiny import save_encoder

from tokenizer import VQRAE
from tokenizer.latents import LatentNormaliser
from tokenizer.rae import decoder_config
from tokenizer.vqrae import CodebookUsage
from training.errors import UserError

TINY_DECODER = {
    "decoder_hidden_size": 16,
    "decoder_num_hidden_layers": 1,
    "decoder_num_attention_heads": 2,
    "decoder_intermediate_size": 32,
}


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    root = tmp_path_factory.mktemp("vqrae")
    save_encoder(root / "mae")
    (root / "decoder").mkdir()
    (root / "decoder" / "config.json").write_text(json.dumps(TINY_DECODER))
    torch.save(
        {"mean": torch.randn(16, 4, 4), "var": 0.5 + torch.rand(16, 4, 4)}, root / "statistics.pt"
    )
    return root


def model(folder, **arguments):
    torch.manual_seed(0)
    defaults = {
        "encoder_cls": "MAEwNorm",
        "encoder_config_path": str(folder / "mae"),
        "encoder_input_size": 16,
        "decoder_config_path": str(folder / "decoder"),
        "decoder_patch_size": 4,
        "num_embeddings": 20,
        "codebook_dim": 48,
    }
    return VQRAE(**{**defaults, **arguments})


def images(batch=3, size=16, seed=0):
    return torch.rand(batch, 3, size, size, generator=torch.Generator().manual_seed(seed))


VARIANTS = {
    "plain": {},
    "ema": {"use_simvq": False},
    "no projection": {"use_projection": False},
    "statistics": {"normalization_stat_path": "statistics.pt"},
    "quantized first": {
        "normalization_stat_path": "statistics.pt",
        "quantize_before_reshape": True,
    },
    "larger patches": {"decoder_patch_size": 6},
}


@pytest.fixture(params=VARIANTS)
def variant(request, folder):
    arguments = dict(VARIANTS[request.param])
    if "normalization_stat_path" in arguments:
        arguments["normalization_stat_path"] = str(folder / "statistics.pt")
    return model(folder, **arguments).eval()


def test_forward_is_decode_of_encode(variant):
    size = 4 * variant.autoencoder.encoder.stride
    with torch.no_grad():
        latents = variant.encode(images())
        assert latents.shape == (3, 16, 4, 4)
        assert torch.equal(variant(images()), variant.decode(latents))
        assert variant.decode(latents).shape == (3, 3, size, size)


def test_indices_are_the_latents(variant):
    indices = variant.encode_to_indices(images())
    assert indices.shape == (3, 4, 4) and indices.dtype == torch.int64 and int(indices.max()) < 20
    with torch.no_grad():
        expected = variant.decode(variant.encode(images()))
    torch.testing.assert_close(variant.decode_from_indices(indices), expected)
    torch.testing.assert_close(variant.decode_from_indices(indices.flatten(1)), expected)
    with pytest.raises(ValueError, match="outside"):
        variant.decode_from_indices(indices + 20)


def test_images_of_any_size_are_resized_for_the_encoder(folder):
    found = model(folder).eval().encode_to_indices(images(size=40))
    assert found.shape == (3, 4, 4)


def test_tokens_where_no_grid_is_asked_for(folder):
    plain, tokens = model(folder).eval(), model(folder, reshape_to_2d=False).eval()
    with torch.no_grad():
        latents = tokens.encode(images())
        assert torch.equal(latents, plain.encode(images()).flatten(2).transpose(1, 2))
        assert torch.equal(tokens.decode(latents), plain(images()))
    assert torch.equal(
        tokens.encode_to_indices(images()), plain.encode_to_indices(images()).flatten(1)
    )
    with pytest.raises(ValueError, match="15 tokens are no square grid"):
        tokens.decode(latents[:, :15])


def test_latents_are_normalised_by_the_statistics(folder):
    path = str(folder / "statistics.pt")
    saved = torch.load(path, weights_only=True)
    first = model(folder, normalization_stat_path=path, quantize_before_reshape=True).eval()
    raw = model(folder, quantize_before_reshape=True).eval()
    with torch.no_grad():
        expected = (raw.encode(images()) - saved["mean"]) / (saved["var"] + 1e-5).sqrt()
        torch.testing.assert_close(first.encode(images()), expected)
        torch.testing.assert_close(first(images()), raw(images()), atol=1e-4, rtol=1e-4)
    assert isinstance(
        model(folder, normalization_stat_path=path).autoencoder.normaliser, LatentNormaliser
    )


def test_noise_is_added_in_training_alone(folder):
    noisy = model(folder, noise_tau=5.0, use_simvq=False)
    with torch.no_grad():
        assert not torch.equal(noisy.train().encode(images()), noisy.encode(images()))
        assert torch.equal(noisy.eval().encode(images()), noisy.encode(images()))
        assert torch.equal(
            noisy.train().encode_to_indices(images()), noisy.eval().encode_to_indices(images())
        )


@pytest.mark.parametrize("use_simvq", [True, False])
def test_both_stages_train(folder, use_simvq):
    vqrae = model(folder, use_simvq=use_simvq, noise_tau=0.0).train()
    for stage in (1, 2):
        vqrae.set_stage(stage)
        vqrae.zero_grad()
        (vqrae(images()).square().mean() + vqrae.last_vq_loss).backward()
        encoder = [p.grad is not None for p in vqrae.autoencoder.encoder.parameters()]
        assert all(encoder) if stage == 2 else not any(encoder)
        for name, parameter in vqrae.named_parameters():
            assert parameter.grad is not None or name.startswith("autoencoder.encoder."), name
    with pytest.raises(ValueError, match="stage 0"):
        vqrae.set_stage(0)


def test_usage_counts_what_training_met(folder):
    vqrae = model(folder, use_simvq=False, noise_tau=0.0).train()
    usage = vqrae.get_codebook_usage()
    assert (usage, usage.perplexity, usage.num_codes) == (0.0, 1.0, 20)
    met = vqrae.encode_to_indices(images()).unique()
    vqrae(images())
    vqrae.update()
    usage = vqrae.get_codebook_usage()
    assert usage == pytest.approx(len(met) / 20) and 1 < usage.perplexity <= len(met) + 1e-3
    before = vqrae.autoencoder.quantizer.codebook.clone()
    vqrae(images())
    vqrae(images())  # applies what the call before gathered
    assert not torch.equal(vqrae.autoencoder.quantizer.codebook, before)


def test_usage_is_a_number_that_knows_more(folder):
    usage = CodebookUsage(0.6543, perplexity=12.5, num_codes=20)
    assert (
        isinstance(usage, float)
        and f"{usage * 100:.1f}%" == f"{usage:.1%}" == "65.4%"
        and usage > 0.5
    )
    assert json.loads(json.dumps({"usage": usage})) == {"usage": 0.6543} and round(usage, 2) == 0.65
    assert torch.tensor(usage) == torch.tensor(0.6543) and sum([usage, usage]) / 2 == usage
    for again in (copy.deepcopy(usage), pickle.loads(pickle.dumps(usage))):
        assert (again, again.perplexity, again.num_codes) == (0.6543, 12.5, 20)


@pytest.mark.parametrize("choice", [{}, {"use_simvq": True}, {"use_simvq": False}])
def test_what_users_of_the_interface_write(folder, choice, tmp_path, capsys):
    """Line by line as their scripts have it, with the small sizes of a test."""
    vqrae = VQRAE(
        encoder_cls="MAEwNorm",
        encoder_config_path=str(folder / "mae"),
        encoder_input_size=16,
        encoder_params={},
        decoder_config_path=str(folder / "decoder"),
        decoder_patch_size=4,
        pretrained_decoder_path=None,
        noise_tau=0.0,
        reshape_to_2d=True,
        normalization_stat_path=str(folder / "statistics.pt"),
        eps=1e-5,
        num_embeddings=20,
        commitment_cost=0.25,
        vq_decay=0.99,
        vq_epsilon=1e-5,
        quantize_before_reshape=False,
        use_projection=True,
        freeze_encoder=True,
        codebook_dim=48,
        **choice,
    ).to("cpu")
    x = images()
    optimizer = torch.optim.AdamW([p for p in vqrae.parameters() if p.requires_grad], lr=1e-3)

    vqrae.train()
    before = [p.detach().clone() for p in vqrae.parameters() if p.requires_grad]
    x_rec = vqrae(x)
    loss = (x_rec - x).abs().mean() + vqrae.last_vq_loss
    optimizer.zero_grad()
    loss.backward()
    optimizer.step()
    assert x_rec.shape == x.shape and loss.isfinite() and vqrae.last_vq_loss.ndim == 0
    assert any(
        not torch.equal(*pair)
        for pair in zip(before, (p for p in vqrae.parameters() if p.requires_grad))
    )
    vqrae(x)  # the codebook's statistics of a step are applied by the next
    usage = vqrae.get_codebook_usage()
    print(f"Codebook usage: {usage * 100:.1f}%")
    assert (
        0 < usage <= 1 and capsys.readouterr().out == f"Codebook usage: {100 * float(usage):.1f}%\n"
    )

    vqrae.set_stage(2)
    assert all(p.requires_grad for p in vqrae.autoencoder.encoder.parameters())
    optimizer = torch.optim.AdamW(vqrae.parameters(), lr=1e-5)
    z_quant = vqrae.encode(x)
    z_cont = torch.randn_like(z_quant)
    distill = vqrae.compute_distillation_loss(z_cont, z_quant)
    (distill + vqrae.last_vq_loss).backward()
    optimizer.step()
    assert any(p.grad is not None for p in vqrae.autoencoder.encoder.parameters())

    vqrae.eval()
    with torch.no_grad():
        z = vqrae.encode(x)
        x_rec = vqrae.decode(z)
        indices = vqrae.encode_to_indices(x)
        x_from_indices = vqrae.decode_from_indices(indices)
    assert (z.shape, x_rec.shape, indices.shape) == ((3, 16, 4, 4), x.shape, (3, 4, 4))
    assert indices.dtype == torch.int64 and 0 <= int(indices.min()) and int(indices.max()) < 20
    torch.testing.assert_close(x_from_indices, x_rec)

    torch.save(vqrae.state_dict(), tmp_path / "vqrae.pt")
    again = model(folder, normalization_stat_path=str(folder / "statistics.pt"), **choice).eval()
    again.load_state_dict(torch.load(tmp_path / "vqrae.pt", weights_only=True))
    assert torch.equal(again.encode_to_indices(x), indices)
    assert torch.equal(again.decode_from_indices(indices), x_from_indices)


def test_the_notes_distillation_moves_quantized_features_alone(folder):
    vqrae = model(folder)
    continuous, quantized = (torch.randn(2, 16, 4, 4, requires_grad=True) for _ in range(2))
    loss = vqrae.compute_distillation_loss(continuous, quantized)
    torch.testing.assert_close(loss, (continuous - quantized).square().mean())
    loss.backward()
    assert continuous.grad is None and quantized.grad is not None


def test_what_does_not_fit_is_refused(folder):
    with pytest.raises(ValueError, match="encoder_cls='Clip' is not one of Dinov2withNorm"):
        model(folder, encoder_cls="Clip")
    with pytest.raises(ValueError, match=r"encoder_cls=SigLIP2wNorm does not go with .*'vit_mae'"):
        model(folder, encoder_cls="SigLIP2wNorm")
    with pytest.raises(UserError, match="decoder_config_path=nowhere: there is no such file"):
        model(folder, decoder_config_path="nowhere")


def test_decoder_names_are_presets():
    assert (
        decoder_config("vit_mae-base").preset == "B"
        and decoder_config("configs/decoder/ViTXL").preset == "XL"
    )


@pytest.mark.parametrize("name", VARIANTS)
def test_a_saved_one_is_the_same(name, folder, tmp_path):
    arguments = dict(VARIANTS[name])
    if "normalization_stat_path" in arguments:
        arguments["normalization_stat_path"] = str(folder / "statistics.pt")
    first = model(folder, **arguments).eval()
    first.save_pretrained(tmp_path / "shared")
    second = VQRAE.from_pretrained(tmp_path / "shared")
    indices = first.encode_to_indices(images())
    assert torch.equal(second.encode_to_indices(images()), indices)
    assert torch.equal(second.decode_from_indices(indices), first.decode_from_indices(indices))
