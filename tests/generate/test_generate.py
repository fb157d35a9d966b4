"""Training a small prior on made-up tokens and sampling from it: the commands' promises."""

from __future__ import annotations

import argparse
import dataclasses
import json

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from tiny import command

import tokenizer
from generate.classes import parse_classes
from generate.drawing import Request, draw_samples
from generate.images import class_grid, write_samples
from generate.sample import SAMPLING, add_sampling_options, find_prior, sampling_options
from generate.sample import main as sample_command
from generate.sweep import sample_all
from priors import load
from priors.interface import SampleOptions
from priors.record import read_record
from priors.run import PriorRun
from priors.train import train_prior
from tokenizer.cache import FORMAT, SPLITS, shard_file
from tokenizer.data.grid import image_grid
from tokenizer.interface import CodeLayout
from training.checkpoint import sha256, weights_hash
from training.command import run_command
from training.config import from_dict
from training.errors import UserError

LAYOUT = CodeLayout(((2, 2),), (4,))
NAMES = ["cat", "3", "T-shirt"]


class Painter:
    """A tokenizer whose code is a shade of grey."""

    layout = LAYOUT

    def decode(self, codes):
        return (codes.view(-1, 1, 2, 2).expand(-1, 3, -1, -1) / 1.5 - 1).float()


def make_root(root):
    """A root with a tokenizer's weights and a token cache of constant sequences: the code is the
    label."""
    (root / "tokenizer" / "weights").mkdir(parents=True)
    save_file({"w": torch.zeros(1)}, root / "tokenizer" / "weights" / "model.safetensors")
    tokens = root / "tokens"
    tokens.mkdir()
    labels = np.arange(30, dtype="<i4") % 3
    arrays = {
        "codes": np.broadcast_to(labels[:, None, None], (30, 2, 4)).astype("<u2"),
        "labels": labels,
        "ids": np.arange(30, dtype="<i8"),
    }
    splits = {}
    for split in SPLITS:
        files = {}
        for name, array in arrays.items():
            path = tokens / shard_file(split, 0, name)
            np.save(path, array)
            files[path.name] = {"bytes": path.stat().st_size, "sha256": sha256(path)}
        splits[split] = {"count": 30, "shards": [{"count": 30, "files": files}]}
    manifest = {
        "format": FORMAT,
        "plan_sha256": "",
        "tokenizer": {"folder": "../tokenizer", "weights_sha256": weights_hash(root / "tokenizer")},
        "layout": dataclasses.asdict(LAYOUT),
        "views": 2,
        "class_names": NAMES,
        "data": {},
        "splits": splits,
    }
    (tokens / "manifest.json").write_text(json.dumps(manifest))
    return root


def settings(root):
    raw = {
        "root": str(root),
        "prior": {"backbone": {"dim": 16, "depth": 1, "heads": 2, "dropout": 0.0}},
        "loop": {
            "steps": 60,
            "batch_size": 30,
            "save_every": 60,
            "preview_every": 30,
            "ema_decay": 0.9,
        },
        "optimizer": {"lr": 0.01, "warmup_steps": 5},
    }
    return from_dict(PriorRun, raw, "test")


@pytest.fixture(scope="module")
def root(tmp_path_factory):
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(tokenizer, "load", lambda folder: Painter(), raising=False)
        root = make_root(tmp_path_factory.mktemp("root"))
        train_prior(settings(root))
        yield root


def request(num=20, classes=(0, 1, 2), **options):
    return Request(num, classes, SampleOptions(**options))


def test_settings_that_cannot_be_trained_with_do_not_cost_the_prior_that_fresh_would_replace(root):
    before = {path: path.read_bytes() for path in (root / "prior").rglob("*") if path.is_file()}
    other = settings(root)
    with pytest.raises(UserError, match="cannot be shared evenly"):
        train_prior(
            dataclasses.replace(other, loop=dataclasses.replace(other.loop, accumulate=7)),
            fresh=True,
        )
    assert {
        path: path.read_bytes() for path in (root / "prior").rglob("*") if path.is_file()
    } == before


def test_training_writes_what_generation_needs(root):
    run = root / "prior"
    record = read_record(run)
    assert record.layout == LAYOUT and record.class_names == NAMES
    assert record.tokenizer_folder(run) == (root / "tokenizer").resolve()
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    held_out = [
        line["held_out.nats_per_token"] for line in lines if "held_out.nats_per_token" in line
    ]
    assert len(held_out) == 2 and held_out[-1] < min(held_out[0], 0.5)
    assert (run / "previews" / "step-00000060.png").is_file()
    assert find_prior(root) == find_prior(run) == run


def test_samples_are_of_their_class_and_do_not_depend_on_the_batch_size(root):
    prior = load(root / "prior")
    whole = draw_samples(prior, Painter(), request(), 20)
    assert whole.labels.tolist() == [i % 3 for i in range(20)]
    assert (whole.codes == whole.labels[:, None]).all(1).mean() > 0.8
    assert whole.images.shape == (20, 2, 2, 3) and whole.images.dtype == np.uint8
    assert (whole.images[..., 0].reshape(20, 4) == whole.codes * 85).all()
    for batch_size in (1, 7, 64):
        again = draw_samples(prior, Painter(), request(), batch_size)
        assert (again.images == whole.images).all() and (again.codes == whole.codes).all()
    fewer = draw_samples(prior, Painter(), request(num=5), 7)
    assert (fewer.images == whole.images[:5]).all()
    assert (
        class_grid(whole, 3).size
        == class_grid(draw_samples(prior, Painter(), request(18), 7), 3).size
    )


def test_output_is_whole_current_and_ours_only(root, tmp_path, capsys):
    run, out = root / "prior", tmp_path / "samples"
    wanted = dataclasses.replace(request(), png=True)
    write_samples(run, read_record(run), wanted, out, 8)
    arrays = np.load(out / "samples.npz")
    assert arrays["arr_0"].shape == (20, 2, 2, 3) and arrays["arr_0"].dtype == np.uint8
    assert arrays["arr_1"].dtype == np.int64 and arrays["codes"].shape == (20, 4)
    assert (out / "grid.png").is_file() and (out / "000002-T-shirt.png").is_file()
    assert json.loads((out / "samples.json").read_text())["made_from"]["options"]["seed"] == 0
    made = (out / "samples.npz").stat().st_mtime_ns
    capsys.readouterr()
    write_samples(run, read_record(run), wanted, out, 5)
    assert "current" in capsys.readouterr().out and (out / "samples.npz").stat().st_mtime_ns == made
    pictures = {name: (out / name).read_bytes() for name in ("grid.png", "000002-T-shirt.png")}
    for name in pictures:
        (out / name).unlink()
    write_samples(run, read_record(run), wanted, out, 5)
    assert "drawn again: 000002-T-shirt.png, grid.png" in capsys.readouterr().out
    assert {name: (out / name).read_bytes() for name in pictures} == pictures
    assert (out / "samples.npz").stat().st_mtime_ns == made
    write_samples(run, read_record(run), request(num=4, seed=1), out, 8)
    assert (
        len(np.load(out / "samples.npz")["arr_1"]) == 4
        and not (out / "000002-T-shirt.png").exists()
    )

    (tmp_path / "other").mkdir()
    (tmp_path / "other" / "thesis.txt").write_text("precious")
    with pytest.raises(UserError, match="--out"):
        write_samples(run, read_record(run), request(), tmp_path / "other", 8)
    assert (tmp_path / "other" / "thesis.txt").read_text() == "precious"


def test_finished_run_says_so_and_changes_are_refused(root, tmp_path, capsys):
    train_prior(settings(root))
    assert "finished" in capsys.readouterr().out
    published = root / "prior" / "weights" / "model.safetensors"
    whole = published.read_bytes()
    published.write_bytes(whole[:-5] + bytes([whole[-5] ^ 1]) + whole[-4:])
    train_prior(settings(root))
    assert (
        "damaged: it is written again" in capsys.readouterr().out
        and published.read_bytes() == whole
    )
    manifest = root / "tokens" / "manifest.json"
    weights = root / "tokenizer" / "weights" / "model.safetensors"
    kept = manifest.read_bytes(), weights.read_bytes()
    try:
        manifest.write_bytes(kept[0] + b"\n")
        with pytest.raises(UserError, match="--fresh"):
            train_prior(settings(root))
        save_file({"w": torch.ones(1)}, weights)
        with pytest.raises(UserError, match="make the tokens again"):
            write_samples(
                root / "prior", read_record(root / "prior"), request(), tmp_path / "out", 8
            )
        assert not (tmp_path / "out").exists()
    finally:
        manifest.write_bytes(kept[0])
        weights.write_bytes(kept[1])


def test_classes_by_name_number_and_range():
    names = ["zero", "one", "2", "T-shirt", "four"]
    assert parse_classes("", names) == (0, 1, 2, 3, 4)
    assert parse_classes("four, t-shirt,0-1,0", names) == (0, 1, 3, 4)
    with pytest.raises(UserError, match="did you mean 'four'"):
        parse_classes("fuor", names)
    for wrong in ("5", "3-7", "3-1", "@5", "@3-9"):
        with pytest.raises(UserError, match="0 to 4"):
            parse_classes(wrong, names)


@pytest.mark.parametrize(
    ("text", "names", "wanted"),
    [
        ("2-3", ["0", "1", "2", "3"], {2, 3}),  # of digits names and numbers agree
        ("2,3", ["0", "1", "2", "3"], {2, 3}),
        ("3-4", ["1", "2", "a", "3", "4"], {3, 4}),
        ('"2","3"', ["1", "2", "3", "4"], {1, 2}),
        ("@2-3", ["1", "2", "3", "4"], {2, 3}),
        ("5-6", ["5", "6", "a"], {0, 1}),  # no such numbers: the names alone
        ("01-03", ["01", "02", "03", "04"], {0, 1, 2}),
        ("Cat", ["cat", "Cat"], {1}),
        ("cat", ["cat", "Cat"], {0}),
        ("DOG", ["cat", "dog"], {1}),
        ('"tench, Tinca tinca",goldfish', ["tench, Tinca tinca", "goldfish"], {0, 1}),
        (' "say ""hi""" , b', ['say "hi"', "b"], {0, 1}),
        ('"@1"', ["a", "b", "@1"], {2}),
        ('"2-3"', ["2-3", "b", "c", "d"], {0}),
        ("@2-3", ["2-3", "b", "c", "d"], {2, 3}),
        ("caf\u00e9", ["cafe\u0301"], {0}),  # accents composed or not
        ('" spaced "', [" spaced ", "spaced"], {0}),
        ("spaced", [" spaced ", "spaced"], {1}),
    ],
)
def test_one_rule_reads_every_item(text, names, wanted):
    assert set(parse_classes(text, names)) == wanted


@pytest.mark.parametrize(
    ("text", "names", "remedy"),
    [
        ("1", ["b", "2", "1"], "@2 (1), @1 (2)"),  # the name or the number
        ("2-3", ["1", "2", "3", "4"], "@1 (2), @2 (3)"),
        ("2-3", ["2-3", "b", "c", "d"], '"2-3" in quotes, or @2-3'),
        ("CAT", ["cat", "Cat"], "@0 (cat), @1 (Cat)"),
        ("crane", ["crane", "maillot", "crane"], "@0 (crane), @2 (crane)"),
        ('"crane"', ["crane", "maillot", "crane"], "@0 (crane), @2 (crane)"),
        ("tench", ["goldfish", "tench, Tinca tinca"], """did you mean '"tench, Tinca tinca"'?"""),
        ('"cat"', ["dog", "Cat"], "did you mean 'Cat'?"),
        ('"cat', ["cat"], "a quote is not closed"),
        ('"cat"s', ["cat"], "a quote is not closed"),
        ("cat,,dog", ["cat", "dog"], "an item is empty"),
        ("cat,", ["cat", "dog"], "an item is empty"),
        ("@cat", ["cat"], "after @ comes a number"),
        ("99999999999999999999-99999999999999999999", ["a"], "0 to 0"),
        (
            "\u0663",
            ["a", "b", "c", "d"],
            "there is no such class",
        ),  # a digit three, but not an ASCII one
    ],
)
def test_what_can_be_read_in_several_ways_or_none_is_refused_with_the_remedy(text, names, remedy):
    with pytest.raises(UserError) as refused:
        parse_classes(text, names)
    assert remedy in str(refused.value) and "\n" not in str(refused.value)


def test_every_option_has_a_flag():
    default = SampleOptions(guidance=1.5, seed=4)
    assert list(SAMPLING) == [field.name for field in dataclasses.fields(SampleOptions)]
    parser = argparse.ArgumentParser()
    add_sampling_options(parser)
    assert sampling_options(parser.parse_args([]), default) == default
    words = [
        "--guidance-schedule",
        "power_cosine",
        "--guidance-power",
        "1.2",
        "--sampler",
        "raster",
        "--top-k",
        "3",
    ]
    wanted = {
        "guidance_schedule": "power_cosine",
        "guidance_power": 1.2,
        "sampler": "raster",
        "top_k": 3,
    }
    assert sampling_options(parser.parse_args(words), default) == dataclasses.replace(
        default, **wanted
    )
    with pytest.raises(
        UserError, match="guidance-schedule is late: it must be one of constant, linear"
    ):
        sampling_options(parser.parse_args(["--guidance-schedule", "late"]), default)


def test_a_wrong_sampler_is_one_line_that_names_the_priors(root, tmp_path, capsys):
    assert (
        command(
            "generate.sample", root, "--sampler", "rastre", "--out", tmp_path / "out", "--num", 3
        )
        == 2
    )
    error = capsys.readouterr().err
    assert (
        error.count("\n") == 1 and "'rastre'" in error and "raster" in error.replace("rastre", "")
    )
    assert not (tmp_path / "out").exists()


def test_unconditional_samples_are_of_no_class(root, tmp_path):
    out = tmp_path / "out"
    assert (
        command("generate.sample", root, "--unconditional", "--num", 4, "--png", "--out", out) == 0
    )
    assert np.load(out / "samples.npz")["arr_1"].tolist() == [3] * 4
    assert (out / "000003-unconditional.png").is_file()
    assert (
        command("generate.sample", root, "--unconditional", "--classes", "cat", "--out", out) == 2
    )


def test_a_long_label_is_cut_in_the_names_of_files(root, tmp_path):
    record = dataclasses.replace(
        read_record(root / "prior"), class_names=["a" * 300, "ä" * 300, "c/\ud800"]
    )
    write_samples(
        root / "prior", record, dataclasses.replace(request(num=3), png=True), tmp_path / "out", 8
    )
    names = sorted(path.name for path in (tmp_path / "out").glob("0*.png"))
    assert [name[:9] for name in names] == ["000000-aa", "000001-ää", "000002-c_"]
    assert all(150 < len(name.encode()) <= 255 for name in names[:2])


def test_seconds_leave_the_first_of_several_batches_out(monkeypatch):
    class Warming:
        def sample(self, labels, options, ids, known=None):
            clock[0] += 100 if ids[0] == 0 else 6
            return torch.zeros(len(ids), 4, dtype=torch.int64)

    clock = [0.0]
    monkeypatch.setattr("time.monotonic", lambda: clock[0])
    assert draw_samples(Warming(), Painter(), request(num=7), 3).seconds_per_image == 2
    assert draw_samples(Warming(), Painter(), request(num=3), 4).seconds_per_image == 25


def test_no_prior_is_one_line(tmp_path):
    with pytest.raises(UserError, match="no trained prior"):
        find_prior(tmp_path)


def test_grid_places_images_in_reading_order():
    images = np.stack([np.full((2, 3, 3), shade, np.uint8) for shade in (10, 20, 30, 40, 50)])
    picture = np.asarray(image_grid(images, columns=2, scale=2))
    assert picture.shape == (2 + 3 * (4 + 2), 2 + 2 * (6 + 2), 3)
    assert picture[3, 3, 0] == 10 and picture[3, 11, 0] == 20 and picture[15, 3, 0] == 50
    assert (picture[:2] == 255).all() and picture[15, 11, 0] == 255


@pytest.mark.parametrize(
    ("words", "hint"),
    [
        (["run", "--guidence", "2"], "did you mean --guidance?"),
        (["run", "--num", "many"], "'many'; see --help"),
        ([], "the following arguments are required: run; see --help"),
    ],
)
def test_wrong_flags_are_one_line(words, hint, monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["generate.sample", *words])
    with pytest.raises(SystemExit) as stopped:
        run_command(sample_command)
    error = capsys.readouterr().err
    assert stopped.value.code == 2 and error.count("\n") == 1 and hint in error


def test_samples_of_another_precision_are_others(root, tmp_path, monkeypatch, capsys):
    run, out, low = root / "prior", tmp_path / "samples", []

    def decode(self, codes):
        low.append(torch.is_autocast_enabled("cpu"))
        return (codes.view(-1, 1, 2, 2).expand(-1, 3, -1, -1) / 1.5 - 1).float()

    monkeypatch.setattr(Painter, "decode", decode)

    def drawn(precision):
        low.clear()
        capsys.readouterr()
        write_samples(
            run, read_record(run), dataclasses.replace(request(), precision=precision), out, 20
        )
        facts = json.loads((out / "samples.json").read_text())
        said = "current" if "current" in capsys.readouterr().out else {*low}
        return said, facts["precision"], facts["made_from"].get("precision")

    assert drawn("bf16") == ({True}, "bf16", "bf16")
    for asked in ("bf16", "auto"):  # which would be fp32 here, and is content with what is there
        assert drawn(asked) == ("current", "bf16", "bf16")
    assert drawn("fp32") == (
        {False},
        "fp32",
        None,
    )  # known by what samples of earlier versions are known by
    assert drawn("auto") == ("current", "fp32", None)
    assert drawn("bf16") == ({True}, "bf16", "bf16")
    assert (
        command("generate.sample", root, "--precision", "fp8") == 2
        and "fp8" in capsys.readouterr().err
    )


@pytest.mark.parametrize("which", ["prior", "tokenizer"])
def test_numbers_that_fp16_cannot_hold_draw_nothing(root, tmp_path, which):
    prior, painter = load(root / "prior"), Painter()
    wanted = dataclasses.replace(request(), precision="fp16")
    assert len(draw_samples(prior, painter, wanted, 20).images) == 20
    with torch.no_grad():
        if which == "prior":
            prior.backbone.heads[0].weight *= 1e6
        else:
            painter.decode = lambda codes: torch.full((len(codes), 3, 2, 2), torch.inf)
    with pytest.raises(
        UserError, match=f"--precision fp16: numbers of the {which} overflow it: take bf16 or fp32"
    ):
        draw_samples(prior, painter, wanted, 20)


def test_a_sweep_finds_its_samples_on_any_machine(root, tmp_path, monkeypatch):
    names = []
    monkeypatch.setattr(
        "generate.images.write_samples", lambda *arguments: names.append(arguments[3].name)
    )
    for index, precision in enumerate(("auto", "fp32", "bf16")):
        wanted = dataclasses.replace(request(), precision=precision)
        sample_all(root / "prior", [wanted], [], tmp_path / f"{index}", 8)
    auto, full, low = names
    assert auto == full != low
