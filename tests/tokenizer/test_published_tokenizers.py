"""Published tokenizers: equal to their authors' code, loaded from any file, written back to the
same bits."""

from __future__ import annotations

import shutil

import pytest
import torch
from golden import golden
from safetensors.torch import load_file, save_file

from tokenizer.published.__main__ import main
from tokenizer.published.check import check, told
from tokenizer.published.load import from_pretrained, published_state
from tokenizer.published.table import PEERS
from training.command import run_command
from training.errors import UserError

CASES = {
    "taming-vqgan-f16": "taming",
    "taming-gumbel-f8": "taming-gumbel",
    "llamagen-vq": "llamagen",
    "ibq": "ibq",
    "diffusers-vqmodel": "diffusers",
    "maskgit-vqgan-f16": "maskgit",
    "open-magvit2-lfq": "open-magvit2",
    "rosinality-vqvae2": "rosinality",
    "bsq-vit": "bsq-vit",
    "titok-legacy": "titok",
    "dalle-dvae": "dalle",
    "rae-dinov2": "rae",
}
NEED_CONFIGURATION = {  # what the shapes do not tell
    "diffusers-vqmodel": "norm_num_groups",
    "bsq-vit": "heads",
    "titok-legacy": "heads",
    "rae-dinov2": "encoder_config_path",
}
WITH_CODES = [case for case in CASES if case != "rae-dinov2"]
THE_CASE = "taming-vqgan-f16"  # where one is enough


@pytest.mark.parametrize("case", CASES)
def test_a_peer_gives_what_its_authors_code_gives(case):
    differences, computed = check(golden(case))
    assert all(each.within for each in differences), told(differences)
    assert "reconstruction" in computed and len(differences) > 2


@pytest.mark.parametrize("case", CASES)
def test_a_kind_is_recognised_without_its_configuration(case, tmp_path):
    shutil.copy(golden(case) / "weights.safetensors", tmp_path / "model.safetensors")
    if case in NEED_CONFIGURATION:
        with pytest.raises(
            UserError, match=rf"no configuration says {NEED_CONFIGURATION[case]}\b.*config=FILE"
        ):
            from_pretrained(tmp_path / "model.safetensors")
    config = golden(case) / "config.json" if case in NEED_CONFIGURATION else None
    assert (
        from_pretrained(tmp_path / "model.safetensors", config=config).published.peer.kind
        == CASES[case]
    )


@pytest.mark.parametrize("case", CASES)
def test_under_published_names_it_is_the_file(case):
    expected = load_file(golden(case) / "weights.safetensors")
    found = published_state(from_pretrained(golden(case)))
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


@pytest.mark.parametrize("case", [case for case in WITH_CODES if case != "rosinality-vqvae2"])
def test_under_autocast_the_same_features_get_the_same_codes(case):
    folder = golden(case)
    model, expected = from_pretrained(folder), load_file(folder / "case.safetensors")
    with torch.no_grad():
        features = model.encoder(
            expected["images"] * 2 - 1 if PEERS[CASES[case]].unit_range else expected["images"]
        )
        with torch.autocast("cpu", torch.bfloat16):
            codes = model.quantize(features)[1].codes
    assert torch.equal(codes.reshape(expected["codes"].shape), expected["codes"])


@pytest.mark.parametrize("case", WITH_CODES)
def test_it_behaves_as_any_tokenizer(case):
    """Codes (B, N) and back, in [-1, 1], from the interface alone."""
    folder = golden(case)
    model, expected = from_pretrained(folder), load_file(folder / "case.safetensors")
    unit = PEERS[CASES[case]].unit_range
    images = expected["images"] * 2 - 1 if unit else expected["images"]
    codes = model.encode(images)
    layout = model.layout_of(*images.shape[2:])
    layout.check(codes)
    levels = [
        value for name, value in sorted(expected.items(), reverse=True) if name.startswith("codes")
    ]  # top first
    assert torch.equal(codes, torch.cat([level.flatten(1) for level in levels], 1))
    pictures = model.decode(codes, layout)
    pictures = (pictures + 1) / 2 if unit else pictures
    clamped = pictures.clamp(0, 1) if PEERS[CASES[case]].clamped else pictures
    assert (clamped - expected["reconstruction"]).abs().max() < 1e-4


# Files that are not what they should be


@pytest.mark.parametrize("case", CASES)
def test_what_is_missing_left_over_or_of_another_shape_is_named(case, tmp_path):
    whole = load_file(golden(case) / "weights.safetensors")
    whole = {name: tensor for name, tensor in whole.items() if not name.startswith("model_ema.")}
    whole = {name.removeprefix("module.module."): tensor for name, tensor in whole.items()}
    name = max(name for name in whole if name.startswith("dec") and name.endswith(("bias", "_1.b")))
    for file in ("config.json", "stat.pt", "encoder", "decoder"):
        if (golden(case) / file).exists():
            (tmp_path / file).symlink_to(golden(case) / file)
    for change, line in (
        ({name: None}, rf"lacks {name}: is it whole"),
        ({name: whole[name][:-1]}, rf"{name} is \(.*\), and \(.*\) is expected"),
        ({"stranger.weight": torch.ones(2)}, r"has no place for stranger\.weight"),
        ({name: whole[name].long()}, rf"{name} is torch\.int64"),
    ):
        changed = {key: value for key, value in (whole | change).items() if value is not None}
        save_file(changed, tmp_path / "model.safetensors")
        with pytest.raises(UserError, match=line) as error:
            from_pretrained(tmp_path, as_=CASES[case])
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)


def test_another_kind_is_refused():
    with pytest.raises(UserError, match=r"as taming-gumbel|it has no quantize\.embed"):
        from_pretrained(golden(THE_CASE), as_="taming-gumbel")
    with pytest.raises(UserError, match=r"tamin is no published kind .* did you mean taming\?"):
        from_pretrained(golden(THE_CASE), as_="tamin")


def test_tensors_of_no_known_kind_ask_for_it(tmp_path):
    save_file({"a": torch.ones(1)}, tmp_path / "a.safetensors")
    with pytest.raises(
        UserError, match=r"of no kind that is known here: say which with as_= .* taming"
    ):
        from_pretrained(tmp_path / "a.safetensors")


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_files_of_other_precision_load_and_come_back(dtype, tmp_path):
    whole = load_file(golden(THE_CASE) / "weights.safetensors")
    saved = {
        name: tensor.to(dtype) if tensor.is_floating_point() else tensor
        for name, tensor in whole.items()
    }
    torch.save({"state_dict": saved, "epoch": 1}, tmp_path / "x.ckpt")
    model = from_pretrained(tmp_path / "x.ckpt")
    assert all(parameter.dtype == torch.float32 for parameter in model.parameters())
    written = published_state(model)
    assert all(torch.equal(written[name], tensor) for name, tensor in saved.items())


# The command


def run(monkeypatch, capsys, *words):
    """(exit code, what was printed)."""
    monkeypatch.setattr("sys.argv", ["tokenizer.published", *map(str, words)])
    try:
        run_command(main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, "".join(capsys.readouterr())


def test_the_command_compares_and_writes(tmp_path, monkeypatch, capsys):
    folder = golden(THE_CASE)
    code, said = run(monkeypatch, capsys, "check", folder, "--out", tmp_path / "out.safetensors")
    assert code == 0 and "reconstruction" in said, said
    case, written = load_file(folder / "case.safetensors"), load_file(tmp_path / "out.safetensors")
    assert torch.equal(written["codes"], case["codes"]) and written.keys() <= case.keys()
    for name in ("config.json", "weights.safetensors"):
        shutil.copy(folder / name, tmp_path)
    case["features"][0, 0, 0, 0] += 1e-3
    save_file(case | {"wide.nothing": torch.ones(1)}, tmp_path / "case.safetensors")
    code, said = run(monkeypatch, capsys, "check", tmp_path)
    assert code == 1 and said.count("TOO FAR") == 2 and "not computed" in said
    code, said = run(monkeypatch, capsys, "check", tmp_path / "none")
    assert code == 2 and said.startswith("error: ") and "case.safetensors" in said
