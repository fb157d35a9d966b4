"""Published priors in use: samples through the tokenizer that belongs to them, likelihoods and
edits, and others that begin with them."""

from __future__ import annotations

import dataclasses
import json
import math

import numpy as np
import pytest
import torch
from PIL import Image
from test_published_imports import tiny_taming
from tiny import command
from tiny_priors import CLASSES, CODES, LENGTH, TINY

import priors
import tokenizer
from priors.interface import SampleOptions
from priors.networks.llama import LlamaConfig
from priors.networks.rar import RARConfig
from priors.published.imports import import_prior
from priors.record import read_record
from priors.starting import begin_with
from priors.train import PriorRun
from tokenizer.interface import CodeLayout
from training.command import UserError
from training.config import load

PIXELS = 4  # of a tiny VQGAN that halves them: 2 x 2 codes
CONFIG = {"model": {"params": {"ddconfig": {"resolution": PIXELS}}}}


@pytest.fixture
def place(tmp_path, monkeypatch):
    """The folder of files fetched by hand, where the command runs."""
    monkeypatch.setenv("TESSERA_PUBLISHED", str(tmp_path / "fetched"))
    monkeypatch.chdir(tmp_path)
    return tmp_path / "fetched"


def put_tokenizer(place, name, file, codes=CODES):
    folder = place / name
    folder.mkdir(parents=True)
    torch.save({"state_dict": tiny_taming(codes=codes)}, folder / file)
    (folder / "config.json").write_text(json.dumps(CONFIG))


def put_prior(place, name, file, kind, more=None):
    tensors, config = TINY[kind]()
    (place / name).mkdir(parents=True)
    torch.save({"state_dict": tensors | (more or {})}, place / name / file)
    (place / name / "config.json").write_text(json.dumps(config))


def samples(folder):
    record = json.loads((folder / "samples.json").read_text())
    with np.load(folder / "samples.npz") as arrays:
        return record, arrays["arr_0"], arrays["codes"]


def test_a_published_prior_samples_through_its_tokenizer(place, capsys):
    """taming's, whose tokenizer is another file."""
    put_prior(place, "taming-cin", "cin_transformer.ckpt", "taming-mingpt")
    put_tokenizer(place, "taming-vqgan-f16-16384", "last.ckpt")
    assert command("generate.sample", "published:taming-cin", "--num", 4, "--top-k", 3) == 0
    record, images, codes = samples(place.parent / "runs" / "taming-cin" / "samples")
    assert images.shape == (4, PIXELS, PIXELS, 3) and codes.shape == (4, LENGTH)
    assert record["made_from"]["options"]["top_k"] == 3
    assert "samples as its authors do: top-k 973" in capsys.readouterr().out
    prior = priors.load(place.parent / "runs" / "taming-cin" / "prior")
    options = SampleOptions(top_k=3)
    ids = torch.arange(4)
    assert torch.equal(prior.sample(ids % CLASSES, options, ids), torch.from_numpy(codes))


def test_a_checkpoint_with_both_stages_needs_no_other_file(place):
    """IBQ's, whose configuration has one within the other."""
    first = {
        f"first_stage_model.{name}": tensor for name, tensor in tiny_taming(codes=CODES).items()
    }
    put_prior(place, "mine", "both.ckpt", "ibq-gpt", first)
    config = TINY["ibq-gpt"]()[1]
    stage = {"target": "src.IBQ.models.ibqgan.IBQ", "params": {"n_embed": CODES}}
    config["init_args"]["first_stage_config"] = stage
    (place / "mine" / "config.json").write_text(json.dumps(config))
    out = place.parent / "out"
    assert command("generate.sample", place / "mine" / "both.ckpt", "--num", 2, "--out", out) == 0
    record, images, _ = samples(out)
    assert images.shape == (2, PIXELS, PIXELS, 3)
    assert record["made_from"]["options"]["guidance"] == 2.25
    made = tokenizer.load(place.parent / "runs" / "both" / "tokenizer")
    assert made.config.model.quantizer.kind == "ibq"


def test_a_tokenizer_that_is_not_at_hand_or_does_not_fit_is_one_line(place, capsys):
    put_prior(place, "taming-cin", "cin_transformer.ckpt", "taming-mingpt")
    assert command("generate.sample", "published:taming-cin", "--num", 2) == 2
    said = capsys.readouterr()
    assert "taming-vqgan-f16-16384" in said.out and "last.ckpt at" in said.out
    assert said.err.count("\n") == 1 and "import the prior again with --tokenizer RUN" in said.err
    put_tokenizer(place, "taming-vqgan-f16-16384", "last.ckpt", codes=CODES + 1)
    assert command("generate.sample", "published:taming-cin", "--num", 2) == 2
    assert "its codes are 2 x 2 of 9, and the prior is of 2 x 2 of 8" in capsys.readouterr().err


def test_a_tokenizer_of_ones_own(place, capsys):
    """RAR's, with one that is named; and editing, and an image's likelihood, on it."""
    put_prior(place, "rar-b", "rar_b.bin", "rar")
    put_tokenizer(place, "vqgan", "last.ckpt")
    assert command("tokenizer.published.__main__", "import", place / "vqgan", "runs/vqgan") == 0
    words = (
        "priors.published.__main__",
        "import",
        "rar-b",
        "runs/r/prior",
        "--tokenizer",
        "runs/vqgan",
    )
    assert command(*words) == 0
    assert command("generate.sample", "runs/r", "--num", 2) == 0
    assert samples(place.parent / "runs" / "r" / "samples")[0]["made_from"]["options"] == {
        **dataclasses.asdict(SampleOptions()),
        **{"guidance": 16.0, "guidance_schedule": "power_cosine", "guidance_power": 2.75},
    }
    Image.new("RGB", (PIXELS, PIXELS), (200, 100, 0)).save("picture.png")
    words = ("generate.inpaint", "runs/r", "picture.png", "--box", "2,0,2,4", "--dilate", 0)
    assert command(*words, "--classes", "1", "--num", 2) == 0, capsys.readouterr().err
    assert (place.parent / "runs" / "r" / "edits" / "grid.png").is_file()


# Training on


def imported(place, kind="rar"):
    put_prior(place, "theirs", "model.ckpt", kind)
    return import_prior(place / "theirs", place.parent / "runs" / "theirs" / "prior")


def test_a_published_prior_is_what_another_begins_with(place):
    folder = imported(place)
    config = load(PriorRun, folder / "config.yaml")
    assert isinstance(config.prior, RARConfig) and config.sampling.guidance == 16
    theirs = priors.load(folder)
    mine = config.prior.build(theirs.layout, CLASSES)
    begin_with(mine, folder)
    for name, tensor in theirs.state_dict().items():
        assert torch.equal(mine.state_dict()[name], tensor)


@pytest.mark.parametrize("kind", ["rar", "llamagen-gpt"])
def test_other_classes_begin_anew(place, kind, capsys):
    folder = imported(place, kind)
    theirs = priors.load(folder)
    config = load(PriorRun, folder / "config.yaml").prior
    mine = config.build(theirs.layout, CLASSES + 2)
    begin_with(mine, folder)
    assert "knows 3 classes, and there are 5" in capsys.readouterr().out
    codes = torch.zeros(2, LENGTH, dtype=torch.int64)
    found = mine.eval().nll(codes, torch.tensor([CLASSES + 2, 0])).nats
    expected = theirs.nll(codes, torch.tensor([CLASSES, 0])).nats
    assert found[0] == expected[0] and found[1] != expected[1]  # of no class, of a new one


def test_a_beginning_that_does_not_fit_is_one_line(place):
    folder = imported(place)
    layout = CodeLayout(((2, 2),), (CODES,))
    for config, own, line in (
        (LlamaConfig(), layout, r"`prior` must be the same in both runs"),
        (
            RARConfig(dim=16, depth=2, heads=2),
            layout,
            r"is \(.*\) there and \(.*\) by these settings",
        ),
        (RARConfig(), CodeLayout(((2, 2),), (9,)), r"encode the images with its own tokenizer"),
    ):
        with pytest.raises(UserError, match=line):
            begin_with(config.build(own, CLASSES), folder)
    with pytest.raises(UserError, match=r"there is no such file"):
        begin_with(RARConfig().build(layout, CLASSES), place)


def test_training_begins_with_it(place):
    """On tokens of its tokenizer: encode, cache, train; the first loss is the published prior's."""
    put_prior(place, "taming-cin", "cin_transformer.ckpt", "taming-mingpt")
    put_tokenizer(place, "taming-vqgan-f16-16384", "last.ckpt")
    for number in range(24):
        folder = place.parent / "images" / f"class{number % 3}"
        folder.mkdir(parents=True, exist_ok=True)
        colour = tuple(torch.randint(256, (3,)).tolist())
        Image.new("RGB", (PIXELS, PIXELS), colour).save(folder / f"{number}.png")
    assert (
        command("priors.published.__main__", "import", "taming-cin", "runs/taming-cin/prior") == 0
    )
    folder = place.parent / "runs" / "taming-cin"
    vqgan = folder / "taming-vqgan-f16-16384"
    words = ["tokenizer.encode", "runs/tokens.yaml", f"tokenizer={vqgan}", "root=runs/mine"]
    (place.parent / "runs" / "tokens.yaml").write_text("name: tokens\n")
    assert command(*words, "source=images") == 0
    loop = ("loop.steps=2", "loop.batch_size=8", "loop.log_every=1", "loop.preview_every=9")
    words = ["priors.train", folder / "prior" / "config.yaml", "name=prior", "root=runs/mine"]
    begin = ["tokens=runs/mine/tokens", f"start_from={folder / 'prior'}", "prior.dropout=0"]
    assert command(*words, *begin, *loop) == 0
    run = place.parent / "runs" / "mine" / "prior"
    assert read_record(run).sampling.top_k == 973
    lines = [json.loads(line) for line in (run / "log.jsonl").read_text().splitlines()]
    # One that begins anew gives every code the same chance.
    nats = lines[0]["prior.nats_per_token"]
    assert abs(nats - math.log(CODES)) > 0.1, lines
