"""Published tokenizers as folders of this project: the same bits there and back, tokens, names, the
page."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
import torch
from golden import golden
from PIL import Image
from safetensors.torch import load_file, save_file
from test_published_tokenizers import WITH_CODES, run

import tokenizer as tessera
from eval.quantizers import find_runs
from eval.run import options, parse
from priors.published.page import page
from tokenizer.cache import TokenCache
from tokenizer.encode import encode_published
from tokenizer.published.imports import export_tokenizer, folder_of, import_tokenizer
from tokenizer.published.load import from_pretrained, published_state
from tokenizer.published.table import PEERS, published_files
from training.errors import UserError

TINY = "bsq-vit"  # the smallest network


def tiny_taming(groups=32, codes=16, dim=4):
    """A VQGAN's tensors under taming's names, written down by hand: two levels, one block each."""
    torch.manual_seed(0)
    width, tensors = groups, {}

    def conv(name, start, end, kernel):
        tensors[f"{name}.weight"] = (
            torch.randn(end, start, kernel, kernel) * (start * kernel**2) ** -0.5
        )
        tensors[f"{name}.bias"] = torch.randn(end) * 0.1

    def norm(name):
        tensors[f"{name}.weight"], tensors[f"{name}.bias"] = (
            1 + 0.1 * torch.randn(width),
            0.1 * torch.randn(width),
        )

    def block(name):
        norm(f"{name}.norm1"), norm(f"{name}.norm2")
        conv(f"{name}.conv1", width, width, 3), conv(f"{name}.conv2", width, width, 3)

    def attention(name):
        norm(f"{name}.norm")
        for part in ("q", "k", "v", "proj_out"):
            conv(f"{name}.{part}", width, width, 1)

    for side, trunk, blocks in (("encoder", "down", 1), ("decoder", "up", 2)):
        conv(f"{side}.conv_in", 3 if side == "encoder" else dim, width, 3)
        for level in range(2):
            for number in range(blocks):
                block(f"{side}.{trunk}.{level}.block.{number}")
        conv(f"{side}.{trunk}.{int(side == 'decoder')}.{trunk}sample.conv", width, width, 3)
        (
            block(f"{side}.mid.block_1"),
            block(f"{side}.mid.block_2"),
            attention(f"{side}.mid.attn_1"),
            norm(f"{side}.norm_out"),
        )
        conv(f"{side}.conv_out", width, dim if side == "encoder" else 3, 3)
    conv("quant_conv", dim, dim, 1), conv("post_quant_conv", dim, dim, 1)
    tensors["quantize.embedding.weight"] = torch.randn(codes, dim)
    return tensors


def maskbit_names(tensors, coarsest_first):
    """A MaskGIT-VQGAN under the names of MaskBit's repository."""
    levels = 1 + max(int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up."))
    renamed = {}
    for name, tensor in tensors.items():
        found = re.fullmatch(r"decoder\.up\.(\d+)\.(.*)", name)
        if found and coarsest_first:
            name = f"decoder.up.{levels - 1 - int(found[1])}.{found[2]}"
        renamed[name.replace(".block.", ".res_blocks.").replace(".mid.", ".mid.res_blocks.")] = (
            tensor
        )
    return renamed


# There and back


def test_a_file_that_is_made_here_loads_by_its_names(tmp_path):
    tensors = tiny_taming()
    torch.save({"state_dict": tensors, "epoch": 3}, tmp_path / "last.ckpt")
    model = from_pretrained(tmp_path / "last.ckpt", image_size=8)
    assert model.published.peer.kind == "taming" and model.config.data.image_size == 8
    found = published_state(model)
    assert found.keys() == tensors.keys() and all(
        torch.equal(found[name], tensors[name]) for name in tensors
    )
    images = torch.rand(2, 3, 8, 8) * 2 - 1
    latents, quantized = model.quantize(model.encoder(images))
    rows = latents.movedim(1, -1).flatten(0, 2)
    nearest = torch.cdist(rows.double(), tensors["quantize.embedding.weight"].double()).argmin(1)
    assert torch.equal(quantized.codes.flatten(), nearest)
    assert torch.equal(
        tessera.from_pretrained(tmp_path / "last.ckpt", image_size=8).encode(images),
        model.encode(images),
    )


def test_an_import_is_a_tokenizer_of_ours_to_the_bit(tmp_path):
    save_file(tiny_taming(), tmp_path / "model.safetensors")
    folder = import_tokenizer(
        tmp_path / "model.safetensors", tmp_path / "run", {"source": "digits", "image_size": "8"}
    )
    ours, theirs = (
        tessera.load(folder),
        from_pretrained(tmp_path / "model.safetensors", image_size=8),
    )
    assert ours.state_dict().keys() == theirs.state_dict().keys()
    assert all(
        torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items()
    )
    assert ours.config.data.source == "digits" and ours.layout == theirs.layout
    assert "Licence" in (folder / "README.md").read_text()
    assert tessera.from_pretrained(folder).layout == ours.layout
    export_tokenizer(folder, tmp_path / "model.safetensors", tmp_path / "back.safetensors")
    back = load_file(tmp_path / "back.safetensors")
    assert all(torch.equal(back[name], tensor) for name, tensor in tiny_taming().items())


@pytest.mark.parametrize("case", WITH_CODES)
def test_imports_of_every_kind_are_the_same_to_the_bit(case, tmp_path):
    theirs = from_pretrained(golden(case))
    ours = tessera.load(import_tokenizer(golden(case), tmp_path / "run"))
    assert ours.state_dict().keys() == theirs.state_dict().keys() and ours.layout == theirs.layout
    assert all(
        torch.equal(tensor, theirs.state_dict()[name]) for name, tensor in ours.state_dict().items()
    )


@pytest.mark.parametrize("coarsest_first", [True, False])
def test_maskbits_names_are_the_same_network(coarsest_first, tmp_path):
    folder = golden("maskgit-vqgan-f16")
    renamed = maskbit_names(load_file(folder / "weights.safetensors"), coarsest_first)
    save_file(renamed, tmp_path / "model.safetensors")
    model, case = (
        from_pretrained(tmp_path / "model.safetensors"),
        load_file(folder / "case.safetensors"),
    )
    assert model.published.peer.kind == "maskbit"
    images = case["images"] * 2 - 1
    codes = model.encode(images)
    assert torch.equal(codes, case["codes"].flatten(1))
    pictures = (model.decode(codes, model.layout_of(*images.shape[2:])) + 1) / 2
    assert (pictures - case["reconstruction"]).abs().max() < 1e-4
    bits = {name: tensor for name, tensor in renamed.items() if name != "quantize.embedding.weight"}
    bits |= {
        "encoder.conv_out.weight": torch.randn(5, 64, 1, 1),
        "encoder.conv_out.bias": torch.randn(5),
    }
    bits["decoder.conv_in.weight"] = renamed["decoder.conv_in.weight"][:, :5].contiguous()
    bits |= {
        "quantize.bits_to_indices": 2 ** torch.arange(5),
        "quantize.codebook": torch.ones(32, 5),
    }
    save_file(bits, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path / "model.safetensors")
    latents, quantized = model.quantize(model.encoder(images))
    assert torch.equal(
        quantized.codes[:, 0], ((latents > 0) * 2 ** torch.arange(5)[:, None, None]).sum(1)
    )


def test_simvq_is_open_magvit2s_network_with_a_moved_codebook(tmp_path):
    whole = load_file(golden("open-magvit2-lfq") / "weights.safetensors")
    tensors = {
        n: t
        for n, t in whole.items()
        if not n.startswith(("model_ema.", "loss.", "decoder.adaptive."))
    }
    torch.manual_seed(0)
    book, weight, bias = torch.randn(20, 6), torch.randn(6, 6), torch.randn(6)
    tensors |= {"quantize.embedding.weight": book}
    tensors |= {"quantize.embedding_proj.weight": weight, "quantize.embedding_proj.bias": bias}
    save_file(tensors, tmp_path / "model.safetensors")
    model = from_pretrained(tmp_path / "model.safetensors")
    assert model.published.peer.kind == "simvq"
    latents, quantized = model.quantize(model.encoder(torch.rand(2, 3, 16, 16)))
    rows, moved = latents.movedim(1, -1).flatten(0, 2).double(), (book @ weight.T + bias).double()
    assert torch.equal(quantized.codes.flatten(), torch.cdist(rows, moved).argmin(1))


def test_configurations_tell_variants(tmp_path):
    """SEED-Voken's VQModel has IBQ's names and module; with l2_normalize codes are searched by
    direction alone."""
    tensors = tiny_taming()
    save_file(tensors, tmp_path / "model.safetensors")
    book, images = tensors["quantize.embedding.weight"].double(), torch.rand(2, 3, 8, 8)
    found = {}
    for target in ("src.IBQ.models.ibqgan.VQModel", "src.IBQ.models.ibqgan.IBQ"):
        for unit in (False, True):
            config = {"class_path": target, "init_args": {"n_embed": 16, "l2_normalize": unit}}
            model = from_pretrained(tmp_path, config=config)
            latents, quantized = model.quantize(model.encoder(images))
            rows = latents.movedim(1, -1).flatten(0, 2).double()
            vectors = quantized.vectors.movedim(1, -1).flatten(0, 2).double()
            unit_book = book / book.norm(dim=1, keepdim=True)
            by_target = (
                torch.cdist(rows, book).argmin(1)
                if target.endswith("VQModel")
                else (rows @ book.T).argmax(1)
            )
            expected = (rows @ unit_book.T).argmax(1) if unit else by_target
            assert torch.equal(quantized.codes.flatten(), expected)
            kept = unit_book if unit and target.endswith("IBQ") else book
            assert (vectors - kept[expected]).abs().max() < 1e-6
            assert torch.equal(model.quantizer.lookup(quantized.codes), quantized.vectors)
            found[target, unit] = model.published.peer.kind
    assert list(found.values()) == ["taming", "taming", "ibq", "ibq"]
    with pytest.raises(
        UserError, match="it is of 17 codes, and the weights have 16: give their own"
    ):
        from_pretrained(tmp_path, config={"n_embed": 17})


def test_tokens_of_a_published_tokenizer(tmp_path):
    for label in ("a", "b"):
        for number in range(5):
            (tmp_path / "images" / label).mkdir(parents=True, exist_ok=True)
            picture = torch.randint(256, (32, 32, 3), dtype=torch.uint8).numpy()
            Image.fromarray(picture).save(tmp_path / "images" / label / f"{number}.png")
    words = [f"data.source={tmp_path / 'images'}", f"root={tmp_path}"]
    encode_published(f"published:{golden(TINY)}", words)
    tokens = TokenCache.open(tmp_path / "tokens")
    tokens.check_tokenizer()
    assert tokens.layout == from_pretrained(golden(TINY)).layout
    encode_published(f"published:{golden(TINY)}", words)  # is up to date
    with pytest.raises(UserError, match=r"data\.source: which images are to be encoded"):
        encode_published(f"published:{golden(TINY)}", [])


def test_evaluation_of_a_published_tokenizer(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    save_file(tiny_taming(), tmp_path / "tiny.safetensors")
    monkeypatch.setattr(
        "sys.argv", ["x", "reconstruction", "published:tiny.safetensors", "--data", "digits"]
    )
    assert options(parse()).run == Path("runs/tiny") and Path("runs/tiny/config.yaml").is_file()
    assert folder_of("published:tiny.safetensors", None) == Path("runs/tiny"), "as it was imported"
    with pytest.raises(UserError, match="name them with --data"):
        folder_of("published:other.safetensors", None)
    monkeypatch.setattr("sys.argv", ["x", "reconstruction", "runs/tiny", "--data", "digits"])
    with pytest.raises(UserError, match="--data digits: runs/tiny says itself"):
        options(parse())


# Names


def test_files_that_were_fetched_by_hand_are_found(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path))
    place = tmp_path / "taming-vqgan-f16-1024" / "last.ckpt"
    with pytest.raises(UserError, match=f"put its last.ckpt at {place}"):
        from_pretrained("published:taming-vqgan-f16-1024")
    place.parent.mkdir()
    torch.save({"state_dict": tiny_taming()}, place)
    assert from_pretrained("published:taming-vqgan-f16-1024").published.path == place


def test_a_hub_that_is_away_says_where_a_file_may_lie(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path))
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", True)
    for name, file in (
        ("published:llamagen-vq-ds16", None),
        ("FoundationVision/LlamaGen", "vq_ds16_c2i.pt"),
    ):
        with pytest.raises(
            UserError,
            match=r"FoundationVision/LlamaGen: the Hub gave no vq_ds16_c2i\.pt .* put that file at",
        ):
            tessera.from_pretrained(name, file=file)


def test_all_that_are_at_hand_are_imported(tmp_path, monkeypatch, capsys):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path / "hand"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    code, said = run(monkeypatch, capsys, "import-all", tmp_path / "runs", "--data", "digits")
    assert code == 2 and "no published tokenizer is at hand: put files at" in said
    for name in ("taming-vqgan-f16-1024", "mine"):
        (tmp_path / "hand" / name).mkdir(parents=True)
        save_file(tiny_taming(), tmp_path / "hand" / name / "model.safetensors")
    code, said = run(
        monkeypatch, capsys, "import-all", tmp_path / "runs", "--data", "digits", "--image-size", 8
    )
    assert code == 0 and [path.name for path in find_runs(tmp_path / "runs")] == [
        "mine",
        "taming-vqgan-f16-1024",
    ]


def test_tokenizers_of_several_sizes_are_compared_at_the_one_that_most_are_of(
    tmp_path, monkeypatch, capsys
):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path / "hand"))
    monkeypatch.setattr("huggingface_hub.try_to_load_from_cache", lambda *_: None)
    for name, size in (("a", 32), ("b", 16), ("c", 16)):
        (tmp_path / "hand" / name).mkdir(parents=True)
        save_file(tiny_taming(), tmp_path / "hand" / name / "model.safetensors")
        (tmp_path / "hand" / name / "config.json").write_text(json.dumps({"resolution": size}))
    code, said = run(monkeypatch, capsys, "import-all", tmp_path / "runs", "--data", "digits")
    assert code == 0 and "a: of 32 px, used at 16 px" in said
    sizes = [tessera.load(each).config.data.image_size for each in find_runs(tmp_path / "runs")]
    assert sizes == [16, 16, 16]


def test_an_export_loads_alone(tmp_path):
    like = tmp_path / "like"
    like.mkdir()
    save_file(tiny_taming(), like / "model.safetensors")
    (like / "config.json").write_text(json.dumps({"ddconfig": {"resolution": 16}}))
    folder = import_tokenizer(like, tmp_path / "run")
    out = export_tokenizer(folder, like, tmp_path / "new" / "folder" / "x.safetensors")
    assert from_pretrained(out).config.data.image_size == 16


def test_an_export_of_the_same_tensors_and_another_function_is_refused(tmp_path):
    """A tokenizer trained here with group norms of 8 groups has the tensors of one with 32."""
    save_file(tiny_taming(), tmp_path / "x.safetensors")
    folder = import_tokenizer(tmp_path / "x.safetensors", tmp_path / "run", {"image_size": 8})
    settings = (folder / "config.yaml").read_text()
    assert settings.count("groups: 32") == 2
    (folder / "config.yaml").write_text(settings.replace("groups: 32", "groups: 8"))
    with pytest.raises(UserError, match=r"decoder\.groups=8 \(32 there\)"):
        export_tokenizer(folder, tmp_path / "x.safetensors", tmp_path / "y.safetensors")
    assert not (tmp_path / "y.safetensors").exists()


def test_names_that_are_none_say_so():
    with pytest.raises(
        UserError, match=r"nothing-here: there is no such file or folder, and no published file"
    ):
        from_pretrained("published:nothing-here")
    with pytest.raises(
        UserError, match=r"of a repository of the Hub name the file, such as file='vq_ds16_c2i\.pt'"
    ):
        from_pretrained("FoundationVision/LlamaGen")


def test_every_peer_is_described():
    assert len(published_files()) == sum(len(peer.files) for peer in PEERS.values()), (
        "names are unique"
    )
    for peer in PEERS.values():
        assert peer.title and peer.licence and peer.quirks, peer.kind


def test_the_page_is_current(tmp_path, monkeypatch, capsys):
    assert (Path(__file__).parents[2] / "docs" / "published.md").read_text() == page(), (
        "make it again: python -m priors.published page docs/published.md"
    )
    assert run(monkeypatch, capsys, "list")[0] == 0


def test_an_import_on_the_command_line(tmp_path, monkeypatch, capsys):
    save_file(tiny_taming(), tmp_path / "x.safetensors")
    code, said = run(
        monkeypatch,
        capsys,
        "import",
        tmp_path / "x.safetensors",
        tmp_path / "run",
        "--image-size",
        16,
    )
    assert code == 0 and str(tmp_path / "run") in said
    code, said = run(
        monkeypatch,
        capsys,
        "export",
        tmp_path / "run",
        tmp_path / "x.safetensors",
        tmp_path / "y.safetensors",
    )
    assert code == 0 and load_file(tmp_path / "y.safetensors").keys() == tiny_taming().keys()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    code, said = run(monkeypatch, capsys, "import", tmp_path / "x.safetensors", tmp_path / "mine")
    assert code == 2 and "thesis.txt" in said
