"""Sharing: what comes back is the same to the last bit, nothing tells of the maker's machine,
damage is one line."""

from __future__ import annotations

import dataclasses
import json
import shutil
import sys

import huggingface_hub
import pytest
import torch
import yaml
from tiny import save_encoder

import tokenizer
from tokenizer import sharing
from tokenizer.autoencoder import VQRAEConfig, VQVAEConfig
from tokenizer.data.dataset import DataConfig
from tokenizer.decoders.conv import ConvDecoderConfig
from tokenizer.decoders.vit import ViTDecoderConfig
from tokenizer.encoders.conv import ConvEncoderConfig
from tokenizer.encoders.foundation import FoundationConfig
from tokenizer.objective import ObjectiveConfig
from tokenizer.quantizers.vector import VectorConfig
from tokenizer.run import TokenizerRun
from tokenizer.shared_folder import portable
from tokenizer.vqrae import VQRAE, load_vqrae, push_vqrae, save_vqrae
from training.checkpoint import weights_hash, weights_path, write_weights
from training.config import to_yaml
from training.errors import UserError

IMAGES = torch.rand(3, 3, 16, 16, generator=torch.Generator().manual_seed(1)) * 2 - 1


def a_run(folder, model, **changes):
    """A finished run with random weights, as training leaves it."""
    config = TokenizerRun(
        name=folder.name,
        root=str(folder.parent),
        model=model,
        data=DataConfig(source=str(folder.parent / "pictures"), image_size=16),
    )
    config = dataclasses.replace(config, **changes)
    torch.manual_seed(0)
    autoencoder = model.build(16)
    folder.mkdir(parents=True)
    (folder / "config.yaml").write_text(to_yaml(config))
    (folder / "log.jsonl").write_text(
        '{"step": 900, "autoencoder.mse": 0.5}\n{"step": 1000, "held_out.psnr": 21.5}\n'
    )
    write_weights(weights_path(folder), autoencoder.state_dict(), {"step": "1000"})
    if hasattr(autoencoder.encoder, "save_architecture"):
        autoencoder.encoder.save_architecture(folder / "weights" / "encoder")
    return folder


@pytest.fixture
def conv(tmp_path):
    model = VQVAEConfig(
        encoder=ConvEncoderConfig(channels=8, residual_channels=4),
        quantizer=VectorConfig(num_codes=16, code_dim=4, init="normal"),
        decoder=ConvDecoderConfig(channels=8, residual_channels=4),
    )
    return a_run(tmp_path / "made" / "conv", model)


@pytest.fixture
def vqrae(tmp_path):
    model = VQRAEConfig(
        encoder=FoundationConfig(
            name=save_encoder(tmp_path / "made" / "encoder", "dinov2"), frozen=False
        ),
        quantizer=VectorConfig(num_codes=16, code_dim=8, init="normal"),
        decoder=ViTDecoderConfig(dim=16, depth=1, heads=2),
    )
    objective = ObjectiveConfig(perceptual=1.0, lpips_weights=str(tmp_path / "made" / "trunk.pth"))
    return a_run(
        tmp_path / "made" / "vqrae",
        model,
        objective=objective,
        start_from=str(tmp_path / "made" / "stage1"),
    )


def report_of(run, **changes):
    """A record as eval writes it."""
    measured = {
        "name": "PSNR",
        "value": 23.88156,
        "unit": "dB",
        "higher_is_better": True,
        "n": 10000,
        "split": "held-out",
        "settings": {"data": {}, "batch_size": 100, "mean": "over images"},
        "subject": {},
        "details": {},
        "interval": [23.8354, 23.9276],
        "settings_hash": "0",
    }
    endless = measured | {
        "name": "best",
        "value": "inf",
        "interval": None,
        "higher_is_better": None,
        "unit": "",
    }
    settings = {"data": {"source": "pictures", "split": "held_out", "image_size": 16}, "n": 10000}
    settings |= {"tokenizer_sha256": weights_hash(run)} | changes
    return {
        "kind": "reconstruction",
        "settings": settings,
        "measurements": [measured, endless],
        "notes": ["Not FID."],
    }


@pytest.mark.parametrize("kind", ["conv", "vqrae"])
def test_codes_and_images_come_back_to_the_bit(kind, tmp_path, request):
    """With the maker's whole folder gone."""
    run = request.getfixturevalue(kind)
    before = tokenizer.load(run)
    codes = before.encode(IMAGES)
    images = before.decode(codes)
    out = sharing.save_pretrained(run, tmp_path / "shared")
    shutil.rmtree(run.parent)
    after = sharing.from_pretrained(out)
    assert torch.equal(after.encode(IMAGES), codes) and torch.equal(after.decode(codes), images)
    assert len(codes.unique()) > 1 and not after.training


@pytest.mark.parametrize("kind", ["conv", "vqrae"])
def test_nothing_tells_of_the_makers_machine(kind, tmp_path, request):
    run = request.getfixturevalue(kind)
    out = sharing.save_pretrained(run, tmp_path / "shared")
    files = {path.relative_to(out).as_posix(): path for path in out.rglob("*") if path.is_file()}
    encoder = (
        {"weights/encoder/config.json", "weights/encoder/preprocessor_config.json"}
        if kind == "vqrae"
        else set()
    )
    assert (
        set(files)
        == {"config.yaml", "manifest.json", "README.md", "weights/model.safetensors"} | encoder
    )
    for path in files.values():
        assert str(tmp_path).encode() not in path.read_bytes(), path
    assert weights_hash(out) == weights_hash(run)
    again = sharing.save_pretrained(out, tmp_path / "again")  # a shared folder can be shared
    assert (again / "config.yaml").read_text() == files["config.yaml"].read_text()


def test_names_of_the_hub_are_kept():
    assert portable("google/siglip2-so400m-patch16-256") == "google/siglip2-so400m-patch16-256"
    assert portable({"a": ["hub:a/b"], "b": "/x/y.pth", "c": "../y", "d": "~/z"})["b"] == "y.pth"
    assert portable("hub:a/b") == "hub:a/b" and portable("~/z") == "z"


def card_of(out):
    """(metadata, text)."""
    _, front, text = (out / "README.md").read_text().split("---\n", 2)
    return yaml.safe_load(front), text


def test_the_card_is_filled_from_run_and_report(conv, tmp_path):
    (conv.parent / "report").mkdir()
    (conv.parent / "report" / "reconstruction.json").write_text(json.dumps(report_of(conv)))
    front, text = card_of(sharing.save_pretrained(conv, tmp_path / "shared"))
    assert (
        front["library_name"] == "tessera"
        and front["license"] == "other"
        and "vqvae" in front["tags"]
    )
    assert "16 discrete codes (4 x 4 of 16), 64 bits" in text
    assert "At step 1000" in text and "held_out.psnr 21.5" in text
    assert "| PSNR ↑ | 23.88 dB | 23.84 – 23.93 | 10000 | held-out | mean over images |" in text
    assert "| best | inf |" in text and "Not FID." in text
    assert weights_hash(conv) in text


def test_reports_of_other_weights_are_not_taken(conv, tmp_path):
    (conv / "report").mkdir()
    file = conv / "report" / "reconstruction.json"
    file.write_text(json.dumps(report_of(conv, tokenizer_sha256="0" * 64)))
    _, text = card_of(sharing.save_pretrained(conv, tmp_path / "shared"))
    assert "PSNR" not in text and "No report" in text
    with pytest.raises(UserError, match="other weights"):
        sharing.save_pretrained(conv, tmp_path / "shared", report=file)
    with pytest.raises(UserError, match=r"no such report"):
        sharing.save_pretrained(conv, tmp_path / "shared", report=tmp_path / "none.json")
    file.write_text("{")
    with pytest.raises(UserError, match="damaged"):
        sharing.save_pretrained(conv, tmp_path / "shared", report=file)


def test_damage_is_one_line(conv, tmp_path):
    out = sharing.save_pretrained(conv, tmp_path / "shared")
    weights = weights_path(out)
    whole = weights.read_bytes()
    weights.write_bytes(
        whole[:-1] + bytes([whole[-1] ^ 1])
    )  # one bit, which safetensors cannot see
    fails(out, r"model\.safetensors: not what manifest\.json says")
    weights.write_bytes(whole[: len(whole) // 2])
    fails(out, r"model\.safetensors: not what")
    weights.unlink()
    fails(out, r"model\.safetensors: missing")
    weights.write_bytes(whole)
    (out / "README.md").write_text("The card is its owner's.")
    sharing.from_pretrained(out)
    (out / "manifest.json").write_text("[]")
    fails(out, r"manifest\.json: damaged")
    (out / "manifest.json").unlink()  # as a run's folder, which has none
    weights.write_bytes(whole[:20])
    fails(out, "damaged")
    (out / "config.yaml").unlink()
    fails(out, "no config.yaml")


def fails(folder, words, load=sharing.from_pretrained):
    with pytest.raises(UserError, match=words) as caught:
        load(folder)
    assert "\n" not in str(caught.value)


def test_a_configuration_of_others_reads_no_file_of_this_machine(conv, tmp_path):
    """A saved one is whole: what it would include is ours, and would go into what it makes."""
    (tmp_path / "ours.yaml").write_text("seed: 7\n")
    saved = (conv / "config.yaml").read_text()
    (conv / "config.yaml").write_text(f"include: {tmp_path / 'ours.yaml'}\n{saved}")
    for make in (
        tokenizer.load,
        sharing.from_pretrained,
        lambda run: sharing.save_pretrained(run, tmp_path / "out"),
    ):
        with pytest.raises(UserError, match=r"config\.yaml: include: .*stands alone"):
            make(conv)


@pytest.mark.parametrize(
    "text",
    [
        "[" * 100_000,
        '{"files": {"a\\u0000": {"bytes": 1, "sha256": "0"}}}',
        '{"files": {"config.yaml": {"bytes": 1, "sha256": null}}}',
        '{"files": {"config.yaml": {"bytes": "1", "sha256": "0"}}}',
    ],
)
def test_a_manifest_that_is_none_is_one_line(conv, tmp_path, text):
    out = sharing.save_pretrained(conv, tmp_path / "shared")
    (out / "manifest.json").write_text(text)
    with pytest.raises(UserError, match=r"manifest\.json: damaged: download the folder again"):
        sharing.from_pretrained(out)


def test_only_shared_folders_are_replaced(conv, tmp_path):
    out = sharing.save_pretrained(conv, tmp_path / "shared")
    assert sharing.save_pretrained(conv, out) == out
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years")
    (tmp_path / "named_alike" / "weights").mkdir(parents=True)  # by names that ours have, too
    (tmp_path / "named_alike" / "weights" / "vgg16.pth").write_text("theirs")
    (tmp_path / "named_alike" / "manifest.json").write_text("{}")
    (tmp_path / "empty").mkdir()
    assert sharing.save_pretrained(conv, tmp_path / "empty").is_dir()
    for target in (tmp_path / "mine", tmp_path / "named_alike", conv, out / "README.md"):
        with pytest.raises(UserError, match="name a"):
            sharing.save_pretrained(conv, target)
    with pytest.raises(UserError, match="itself"):
        sharing.save_pretrained(out, out)
    assert (tmp_path / "named_alike" / "weights" / "vgg16.pth").read_text() == "theirs"
    assert (tmp_path / "mine" / "thesis.txt").read_text() == "years" and weights_path(
        conv
    ).is_file()


def test_what_others_put_into_a_shared_folder_stays(conv, tmp_path):
    (tmp_path / "disk").mkdir()
    out = tmp_path / "shared"
    out.symlink_to("disk")
    sharing.save_pretrained(conv, out)
    mine = (".gitattributes", ".git/config", "weights/old.safetensors", "notes.txt")
    for name in mine:
        (out / name).parent.mkdir(exist_ok=True)
        (out / name).write_text("mine")
    sharing.save_pretrained(conv, out)
    assert out.is_symlink() and all((out / name).read_text() == "mine" for name in mine)
    (out / "README.md").write_text("mine")  # a card is free to be edited
    with pytest.raises(UserError, match=r"README\.md: was edited"):
        sharing.save_pretrained(conv, out)
    assert (out / "README.md").read_text() == "mine" and sharing.from_pretrained(out)
    assert not [path.name for path in out.iterdir() if path.name.startswith(".tessera")]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["disk", "made", "shared"]


def test_what_is_no_tokenizer_is_one_line(tmp_path):
    fails(tmp_path / "nowhere" / "at" / "all", "no such folder")
    fails("just-a-name", "no name of the Hub")
    fails("owner/name", "the Hub gave no tokenizer")  # tests are offline
    fails(tmp_path, "no config.yaml")


def test_names_are_read_from_the_hub(conv, tmp_path, monkeypatch):
    out = sharing.save_pretrained(conv, tmp_path / "shared")
    asked = []

    def download(name, **keywords):
        asked.append((name, keywords["revision"], keywords["allow_patterns"]))
        return str(out)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", download)
    found = sharing.from_pretrained("owner/name", revision="v2")
    assert torch.equal(found.encode(IMAGES), tokenizer.load(conv).encode(IMAGES))
    assert asked[0][:2] == ("owner/name", "v2")
    assert not any(pattern.endswith((".bin", ".pt", ".py", "*")) for pattern in asked[0][2]), (
        "safetensors only"
    )


class Api:
    """Stands for the Hub's client."""

    calls: list

    def create_repo(self, repo_id, **keywords):
        self.calls.append(("create", repo_id, keywords))
        return f"https://hub/{repo_id}"

    def upload_folder(self, *, repo_id, folder_path, allow_patterns, **keywords):
        card = (folder_path / "README.md").read_text()
        self.calls.append(("upload", repo_id, sorted(p.name for p in folder_path.iterdir()), card))


def test_push_uploads_what_save_writes(conv, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    assert sharing.push_to_hub(conv, "owner/name") == "https://hub/owner/name"
    created, uploaded = Api.calls
    assert created == ("create", "owner/name", {"private": True, "exist_ok": True})
    assert uploaded[:3] == (
        "upload",
        "owner/name",
        ["README.md", "config.yaml", "manifest.json", "weights"],
    )

    monkeypatch.setattr(sys, "argv", ["sharing", "save", str(conv), str(tmp_path / "shared")])
    sharing.main()
    assert capsys.readouterr().out.strip() == str(tmp_path / "shared")
    (tmp_path / "shared" / "README.md").write_text("mine")
    monkeypatch.setattr(
        sys, "argv", ["sharing", "push", str(tmp_path / "shared"), "owner/name", "--public"]
    )
    sharing.main()
    assert Api.calls[2][2]["private"] is False and Api.calls[3][3] == "mine"

    with pytest.raises(UserError, match="owner/name"):
        sharing.push_to_hub(conv, "name")
    monkeypatch.setattr(Api, "create_repo", lambda *_, **__: 1 / 0)
    with pytest.raises(UserError, match=r"division by zero.*hf auth login"):
        sharing.push_to_hub(conv, "owner/name")


@pytest.fixture
def model(tmp_path):
    """A VQRAE with everything of its own: statistics, an unusual decoder, stage 2."""
    torch.manual_seed(3)
    (tmp_path / "made").mkdir(exist_ok=True)
    statistics = {"mean": torch.randn(16, 4, 4), "var": torch.rand(16, 4, 4) + 0.5}
    torch.save(statistics, tmp_path / "made" / "stat.pt")
    decoder = {
        "decoder_hidden_size": 16,
        "decoder_num_hidden_layers": 1,
        "decoder_num_attention_heads": 2,
    }
    (tmp_path / "made" / "decoder.json").write_text(
        json.dumps(decoder | {"decoder_intermediate_size": 24})
    )
    model = VQRAE(
        encoder_config_path=save_encoder(tmp_path / "made" / "encoder", "dinov2"),
        encoder_input_size=16,
        decoder_config_path=str(tmp_path / "made" / "decoder.json"),
        decoder_patch_size=4,
        normalization_stat_path=str(tmp_path / "made" / "stat.pt"),
        num_embeddings=16,
        codebook_dim=8,
        eps=1e-3,
    )
    model.set_stage(2)
    return model.eval()


def test_a_vqrae_comes_back_to_the_bit(model, tmp_path):
    images = (IMAGES + 1) / 2
    codes = model.encode_to_indices(images)
    latents, decoded = model.encode(images), model.decode_from_indices(codes)
    out = save_vqrae(model, tmp_path / "shared")
    shutil.rmtree(tmp_path / "made")
    for path in out.rglob("*"):
        assert path.is_dir() or str(tmp_path).encode() not in path.read_bytes(), path
    again = load_vqrae(out)
    assert torch.equal(again.encode_to_indices(images), codes) and len(codes.unique()) > 1
    assert torch.equal(again.encode(images), latents) and torch.equal(
        again.decode_from_indices(codes), decoded
    )
    assert again.autoencoder.encoder.frozen is False and not again.training
    save_vqrae(again, tmp_path / "again")
    assert weights_hash(tmp_path / "again") == weights_hash(out)


def test_a_damaged_vqrae_is_one_line(model, conv, tmp_path):
    out = save_vqrae(model, tmp_path / "shared")
    fails(conv, "no VQRAE", load_vqrae)
    described = json.loads((out / "config.json").read_text())
    (out / "config.json").write_text(json.dumps({"arguments": {"encoder_clas": 1}}))
    fails(out, "not what manifest", load_vqrae)
    (out / "manifest.json").unlink()
    fails(out, "encoder_clas", load_vqrae)
    described["arguments"]["codebook_dim"] = 9
    (out / "config.json").write_text(json.dumps(described))
    fails(out, "must be the same", load_vqrae)
    (out / "weights" / "encoder" / "config.json").unlink()
    fails(out, "missing", load_vqrae)


def test_a_vqrae_is_pushed(model, monkeypatch):
    monkeypatch.setattr(Api, "calls", [], raising=False)
    monkeypatch.setattr(huggingface_hub, "HfApi", Api)
    push_vqrae(model, "owner/name")
    assert Api.calls[1][2] == ["README.md", "config.json", "manifest.json", "weights"]
    assert "# name\n" in Api.calls[1][3] and "VQRAE.from_pretrained" in Api.calls[1][3]


def test_a_path_that_is_no_folder_any_more_is_not_published_as_a_name_of_the_hub(
    tmp_path, monkeypatch
):
    """The run may have been made elsewhere: encoders/mae was a folder there."""
    from huggingface_hub import constants

    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path))
    assert portable("encoders/mae") == "mae" and portable("a--b/c..d") == "c..d"
    downloaded = tmp_path / "models--someone--encoder"
    for name, text in (("refs/main", "c0ffee"), ("snapshots/c0ffee/config.json", "{}")):
        (downloaded / name).parent.mkdir(parents=True)
        (downloaded / name).write_text(text)
    assert portable("someone/encoder") == "someone/encoder"
