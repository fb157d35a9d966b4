"""Published priors: equal to their authors' code, loaded from any file, written back to the same
bits."""

from __future__ import annotations

import json
import pickle
import shutil

import pytest
import torch
from golden import golden
from safetensors.torch import load_file, save_file
from test_published_files import archive, hand_written, old_file, payloads
from tiny_priors import CLASSES, CODES, HEADS, LENGTH, TINY, expected_logits

import priors
from priors.interface import SampleOptions
from priors.published.__main__ import main
from priors.published.check import check
from priors.published.imports import export_prior, import_prior
from priors.published.load import from_pretrained
from priors.published.outputs import autoregressive_outputs
from priors.published.table import PEERS
from tokenizer.published.check import told
from tokenizer.published.load import published_state
from tokenizer.published.table import PEERS as TOKENIZERS
from tokenizer.published.table import published_files
from training.command import run_command
from training.errors import UserError

# golden case -> (kind, what no shape tells)
CASES = {
    "llamagen-gpt": ("llamagen-gpt", "n_head"),
    "rar": ("rar", None),
    "taming-mingpt": ("taming-mingpt", "n_head"),
}
KINDS = pytest.mark.parametrize("kind", TINY)


def write(folder, kind, change=None, suffix="safetensors", envelope=None):
    """A tiny prior's folder."""
    tensors, config = TINY[kind]()
    tensors = {k: v for k, v in (tensors | (change or {})).items() if v is not None}
    folder.mkdir(exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    file = folder / f"model.{suffix}"
    if suffix == "safetensors":
        save_file(tensors, file)
    else:
        torch.save(tensors if envelope is None else envelope(tensors), file)
    return file


def same_bits(found, expected):
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        assert found[name].dtype == tensor.dtype and torch.equal(found[name], tensor), name


def sequences(count=3):
    generator = torch.Generator().manual_seed(1)
    codes = torch.randint(CODES, (count, LENGTH), generator=generator)
    return codes, torch.arange(count) % CLASSES


# Their authors' code


@pytest.mark.parametrize("case", CASES)
def test_a_peer_gives_what_its_authors_code_gives(case):
    differences, computed = check(golden(case))
    assert all(each.within for each in differences), told(differences)
    assert "logits.conditional" in computed


@pytest.mark.parametrize("case", CASES)
def test_a_kind_is_recognised_without_its_configuration(case, tmp_path):
    shutil.copy(golden(case) / "weights.safetensors", tmp_path / "x.safetensors")
    kind, needed = CASES[case]
    if needed:
        with pytest.raises(UserError, match=rf"no configuration says {needed}\b.*config=FILE"):
            from_pretrained(tmp_path / "x.safetensors")
    config = golden(case) / "config.json" if needed else None
    assert from_pretrained(tmp_path / "x.safetensors", config=config).published.peer.kind == kind


@pytest.mark.parametrize("case", CASES)
def test_under_published_names_it_is_the_file(case):
    same_bits(
        published_state(from_pretrained(golden(case))),
        load_file(golden(case) / "weights.safetensors"),
    )


@pytest.mark.parametrize("case", CASES)
def test_the_oracle_of_tiny_priors_is_their_authors_code(case):
    tensors = load_file(golden(case) / "weights.safetensors")
    values = load_file(golden(case) / "case.safetensors")
    for codes, label, expected in zip(
        values["tokens"], values["labels"], values["logits.conditional"]
    ):
        side = round(len(codes) ** 0.5)
        found = expected_logits(CASES[case][0], tensors, codes, label, heads=4, side=side)
        torch.testing.assert_close(found.float(), expected, atol=1e-4, rtol=0)


@KINDS
def test_logits_are_those_of_the_definition(kind, tmp_path):
    write(tmp_path, kind)
    prior, (codes, labels) = from_pretrained(tmp_path), sequences()
    tensors = TINY[kind]()[0]
    if prior.unconditional:
        labels[-1] = prior.num_classes
    names = ("logits.conditional", "logits.incremental", "nll.conditional", "logits.permuted")
    orders = torch.stack([torch.randperm(LENGTH) for _ in codes])
    asked = names if kind == "rar" else names[:3]
    case = {"tokens": codes, "labels": labels, "orders": orders} | dict.fromkeys(asked)
    made = autoregressive_outputs(prior, case)
    for row, (own, label) in enumerate(zip(codes, labels)):
        expected = expected_logits(kind, tensors, own, label)
        nats = -expected.log_softmax(-1).gather(1, own[:, None]).sum()
        for name in names[:2]:
            torch.testing.assert_close(made[name][row].double(), expected, atol=1e-4, rtol=0)
        torch.testing.assert_close(made["nll.conditional"][row], nats, atol=1e-4, rtol=0)
        if kind == "rar":
            expected = expected_logits(kind, tensors, own, label, orders[row])
            torch.testing.assert_close(
                made["logits.permuted"][row].double(), expected, atol=1e-4, rtol=0
            )


# Files


@KINDS
def test_a_round_trip_keeps_the_bits(kind, tmp_path):
    file = write(tmp_path / "theirs", kind)
    prior = from_pretrained(tmp_path / "theirs")
    folder = import_prior(tmp_path / "theirs", tmp_path / "run" / "prior")
    ours = priors.load(folder)
    same_bits(ours.state_dict(), prior.state_dict())
    codes, labels = sequences()
    assert torch.equal(ours.nll(codes, labels).nats, prior.nll(codes, labels).nats)
    options = SampleOptions(seed=3)
    ids = torch.arange(3)
    assert torch.equal(ours.sample(labels, options, ids), prior.sample(labels, options, ids))
    out = export_prior(folder, tmp_path / "theirs", tmp_path / "out.safetensors")
    same_bits(load_file(out), load_file(file))


@pytest.mark.parametrize("kind", [kind for kind in TINY if kind != "rar"])
def test_an_export_of_the_same_tensors_and_another_function_is_refused(kind, tmp_path):
    """A prior trained here with heads of another width has the tensors of the published one (but
    RAR's, whose norms of queries are as wide as its heads)."""
    write(tmp_path / "theirs", kind)
    folder = import_prior(tmp_path / "theirs", tmp_path / "run" / "prior")
    settings = (folder / "config.yaml").read_text()
    assert settings.count(f"heads: {HEADS}") == 1
    (folder / "config.yaml").write_text(settings.replace(f"heads: {HEADS}", "heads: 1"))
    with pytest.raises(UserError, match=rf"prior\.heads=1 \({HEADS} there\)"):
        export_prior(folder, tmp_path / "theirs", tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()


@KINDS
@pytest.mark.parametrize(
    ("suffix", "envelope"),
    [
        ("pt", lambda tensors: tensors),
        ("pt", lambda tensors: {"model": tensors, "steps": 3}),
        ("bin", lambda tensors: {"module": tensors}),
        ("ckpt", lambda tensors: {"state_dict": {f"module.{n}": t for n, t in tensors.items()}}),
        ("pt", lambda tensors: {"model": {f"_orig_mod.{n}": t for n, t in tensors.items()}}),
        (
            "ckpt",
            lambda tensors: {
                "state_dict": tensors
                | {"first_stage_model.encoder.conv_in.weight": torch.ones(2, 3, 3, 3)}
                | {"cond_stage_model.x": torch.ones(1)}
            },
        ),
    ],
)
def test_envelopes_are_taken_off(kind, suffix, envelope, tmp_path):
    write(tmp_path / "plain", kind)
    write(tmp_path / "wrapped", kind, suffix=suffix, envelope=envelope)
    found = from_pretrained(tmp_path / "wrapped")
    same_bits(found.state_dict(), from_pretrained(tmp_path / "plain").state_dict())
    if suffix == "ckpt":  # and what stands beside the model is written again
        saved = envelope(TINY[kind]()[0])["state_dict"]
        same_bits(published_state(found), saved)


@KINDS
@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_files_of_half_precision_load_and_come_back(kind, dtype, tmp_path):
    halves = {name: tensor.to(dtype) for name, tensor in TINY[kind]()[0].items()}
    write(tmp_path, kind, halves)
    prior = from_pretrained(tmp_path)
    assert all(parameter.dtype == torch.float32 for parameter in prior.parameters())
    same_bits(published_state(prior), halves)


@KINDS
def test_what_is_missing_left_over_or_of_another_shape_is_named(kind, tmp_path):
    tensors = TINY[kind]()[0]
    name = max(n for n in tensors if "1.a" in n and n.endswith(("proj.weight", "wo.weight")))
    for change, line in (
        ({name: None}, rf"as {kind} it lacks {name}: is it whole"),
        ({name: tensors[name][:-1]}, rf"{name} is \(15, 16\), and \(16, 16\) is expected"),
        ({"stranger.weight": torch.ones(2)}, r"has no place for stranger\.weight"),
        ({name: tensors[name].long()}, rf"{name} is torch\.int64"),
    ):
        write(tmp_path, kind, change)
        with pytest.raises(UserError, match=line) as error:
            from_pretrained(tmp_path, as_=kind)
        assert "\n" not in str(error.value) and str(tmp_path) in str(error.value)
        with pytest.raises(UserError):
            from_pretrained(tmp_path)


@KINDS
def test_another_kind_is_refused(kind, tmp_path):
    write(tmp_path, kind)
    for other in [each for each in PEERS if each != kind]:
        with pytest.raises(UserError, match=rf"{other}|no configuration says"):
            from_pretrained(tmp_path, as_=other)
    with pytest.raises(UserError, match=r"is no published kind .* did you mean rar\?"):
        from_pretrained(tmp_path, as_="rarr")
    save_file({"a": torch.ones(1)}, tmp_path / "model.safetensors")
    with pytest.raises(UserError, match=r"of no kind that is known here: say which .* rar"):
        from_pretrained(tmp_path)


@KINDS
@pytest.mark.parametrize("suffix", ["safetensors", "pt"])
def test_a_truncated_file_is_one_line(kind, suffix, tmp_path):
    file = write(tmp_path, kind, suffix=suffix)
    whole = file.read_bytes()
    for share in (0, 0.1, 0.9):
        file.write_bytes(whole[: int(len(whole) * share)])
        with pytest.raises(UserError, match=r"model\.\w+: ") as error:
            from_pretrained(tmp_path, as_=kind)
        assert "\n" not in str(error.value)


def test_nothing_in_a_hostile_file_runs(tmp_path):
    mark, place = tmp_path / "ran", tmp_path / "x"
    write(place, "rar", suffix="pt")
    pickles = [pickle.dumps({"model": {"a": each}}, 2) for each in payloads(mark)]
    for data in pickles + hand_written(mark):
        for whole in (archive(data), old_file(data), data):
            (place / "model.pt").write_bytes(whole)
            with pytest.raises(UserError):
                from_pretrained(place, as_="rar")
        assert not mark.exists()
    assert len(pickles) >= 20


# Names


def test_every_peer_is_described():
    names = [file.name for peer in (*PEERS.values(), *TOKENIZERS.values()) for file in peer.files]
    assert len(set(names)) == len(names)
    for peer in PEERS.values():
        assert peer.title and peer.licence and peer.quirks and peer.recipe, peer.kind
        for file in peer.files:
            SampleOptions(**file.sampling)
            assert file.tokenizer in published_files() or " " in file.tokenizer, file.name


def test_a_published_file_samples_as_its_authors_do(tmp_path, monkeypatch):
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path))
    file = write(tmp_path / "rar-l", "rar", suffix="bin")
    file.rename(tmp_path / "rar-l" / "rar_l.bin")
    sampling = from_pretrained("published:rar-l").config.sampling
    assert (sampling.guidance, sampling.guidance_power) == (15.5, 2.5)
    assert (sampling.guidance_schedule, sampling.temperature) == ("power_cosine", 1.02)
    folder = import_prior(tmp_path / "rar-l" / "rar_l.bin", tmp_path / "run" / "prior")
    assert priors.record.read_record(folder).sampling == sampling


def test_guidance_of_rar_begins_at_one_and_is_behind_by_a_step(tmp_path, monkeypatch):
    """s of step k of N is of k / N."""
    write(tmp_path, "rar")
    prior, seen = from_pretrained(tmp_path), []
    plain = SampleOptions.guidance_at
    monkeypatch.setattr(
        SampleOptions, "guidance_at", lambda self, at: seen.append(at) or plain(self, at)
    )
    prior.sample(torch.tensor([0]), prior.config.sampling, torch.tensor([0]))
    assert seen == [0, 0.25, 0.5, 0.75] and plain(prior.config.sampling, 0.0) == 1


def test_a_prior_without_an_unconditional_class_says_so(tmp_path):
    write(tmp_path, "taming-mingpt")
    prior, ids = from_pretrained(tmp_path), torch.arange(1)
    for label, options in ((0, SampleOptions(guidance=2.0)), (CLASSES, SampleOptions())):
        with pytest.raises(UserError, match=r"knows no unconditional class"):
            prior.sample(torch.tensor([label]), options, ids)
    with pytest.raises(UserError, match=r"knows no unconditional class"):
        prior.nll(torch.zeros(1, LENGTH, dtype=torch.int64), torch.tensor([CLASSES]))


# The command


def run(monkeypatch, capsys, *words):
    """(exit code, what was printed)."""
    monkeypatch.setattr("sys.argv", ["priors.published", *map(str, words)])
    try:
        run_command(main)
        code = 0
    except SystemExit as error:
        code = error.code
    return code, "".join(capsys.readouterr())


def test_the_command_compares_and_writes(tmp_path, monkeypatch, capsys):
    folder, kind = tmp_path / "case", "ibq-gpt"
    file = write(folder, kind)
    tensors, (codes, labels) = TINY[kind]()[0], sequences()
    rows = [expected_logits(kind, tensors, *each) for each in zip(codes, labels)]
    case = {"tokens": codes.reshape(3, 2, 2), "labels": labels}
    case["logits.conditional"] = torch.stack(rows).float()
    case["wide.tokens"], case["wide.labels"] = codes[1:].clone(), labels[1:].clone()
    case["wide.logits.incremental"] = case["logits.conditional"][1:].clone()
    save_file(case, folder / "case.safetensors")
    code, said = run(monkeypatch, capsys, "check", folder, "--out", tmp_path / "out.safetensors")
    assert code == 0, said
    written = load_file(tmp_path / "out.safetensors")
    assert written.keys() == {"logits.conditional", "wide.logits.incremental"}
    torch.save({"state_dict": tensors}, folder / "weights.pt")  # goes before others
    file.write_bytes(b"damaged")
    assert run(monkeypatch, capsys, "check", folder, "--as", kind)[0] == 0
    case["logits.conditional"][0, 0, 0] += 1e-3
    save_file(case | {"logits.stranger": torch.ones(1)}, folder / "case.safetensors")
    code, said = run(monkeypatch, capsys, "check", folder)
    assert code == 1 and said.count("TOO FAR") == 2 and "not computed" in said
    code, said = run(monkeypatch, capsys, "check", tmp_path / "none")
    assert code == 2 and said.startswith("error: ") and "case.safetensors" in said


def test_the_other_commands(tmp_path, monkeypatch, capsys):
    code, said = run(monkeypatch, capsys, "list")
    assert code == 0 and "rar-xxl" in said
    file = write(tmp_path / "theirs", "llamagen-gpt")
    out = tmp_path / "run" / "prior"
    code, said = run(monkeypatch, capsys, "import", tmp_path / "theirs", out)
    assert code == 0 and "samples as its authors do: guidance 2.0" in said
    assert "--tokenizer RUN" in said
    code, said = run(monkeypatch, capsys, "export", out, file, tmp_path / "y.safetensors")
    assert code == 0
    same_bits(load_file(tmp_path / "y.safetensors"), load_file(file))
    write(tmp_path / "other", "rar")
    code, said = run(monkeypatch, capsys, "export", out, tmp_path / "other", tmp_path / "z")
    assert code == 2 and "is not that of" in said
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").touch()
    code, said = run(monkeypatch, capsys, "import", tmp_path / "theirs", tmp_path / "mine")
    assert code == 2 and "holds files but no config.yaml" in said
