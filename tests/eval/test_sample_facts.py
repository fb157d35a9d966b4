"""samples.json that is damaged, cut short, or lacks what a comparison needs: one line that names
it, and a remedy that works."""

from __future__ import annotations

import json

import numpy as np
import pytest
from tiny import command

from eval.generation import Samples
from eval.sample_facts import read_cost, read_facts
from generate.images import FILES, is_current
from training.checkpoint import sha256
from training.errors import UserError

OPTIONS = {"seed": 0, "guidance": 1.0}
FACTS = {
    "made_from": {"num": 3, "options": OPTIONS, "tokenizer_sha256": "f"},
    "device": "cpu",
    "batch_size": 2,
}
FACTS |= {"seconds_per_image": 0.5}


def made(**changes):
    return FACTS | {"made_from": FACTS["made_from"] | changes}


def write(folder, facts, labels=(0, 1, 2)):
    images = np.zeros((3, 4, 4, 3), np.uint8)
    np.savez(folder / "samples.npz", arr_0=images, arr_1=np.array(labels))
    (folder / "samples.json").write_text(facts if isinstance(facts, str) else json.dumps(facts))
    return folder


DAMAGED = {
    "half": '{"made_from": {"num"',
    "null": "null",
    "a list": "[]",
    "deep": "[" * 100_000,
    "no section": FACTS | {"made_from": None},
    "a list of facts": FACTS | {"made_from": [1]},
    "no options": made(options=None),
    "no seed": made(options={}),
    "a hash that is a number": made(tokenizer_sha256=7),
    "a number that is text": made(num="many"),
}


@pytest.mark.parametrize("damage", DAMAGED)
def test_damaged_facts_are_one_line(damage, tmp_path):
    folder = write(tmp_path, DAMAGED[damage])
    for read in (read_facts, read_cost, lambda folder: Samples.open(folder, 4)):
        with pytest.raises(
            UserError, match=r"samples\.json: damaged .*: remove it, and sample again"
        ):
            read(folder)
    (folder / "samples.json").unlink()
    assert Samples.open(folder, 4).made_from == {} == read_facts(folder)


def test_a_folder_in_place_of_the_facts_is_one_line(tmp_path):
    (write(tmp_path, FACTS) / "samples.json").unlink()
    (tmp_path / "samples.json").mkdir()
    with pytest.raises(UserError, match="damaged"):
        Samples.open(tmp_path, 4)


@pytest.mark.parametrize("name", ["made_from", "seconds_per_image", "device", "batch_size"])
def test_a_comparison_says_what_it_lacks(name, tmp_path):
    write(tmp_path, {key: value for key, value in FACTS.items() if key != name})
    with pytest.raises(UserError, match=f"samples.json: has no {name}, which a comparison needs"):
        read_cost(tmp_path)
    assert read_cost(write(tmp_path, FACTS)) == FACTS


@pytest.mark.parametrize("seconds", ["fast", None, float("nan"), float("inf"), -1.0, True])
def test_seconds_are_a_time(seconds, tmp_path):
    with pytest.raises(UserError, match="seconds_per_image is"):
        read_cost(write(tmp_path, FACTS | {"seconds_per_image": seconds}))


def test_labels_are_whole_numbers(tmp_path):
    write(tmp_path, FACTS, [0.5, 1, 2])
    with pytest.raises(UserError, match="arr_1 is float64, and class numbers are whole"):
        Samples.open(tmp_path, 4)
    assert Samples.open(write(tmp_path, FACTS, [0.0, 1, 2]), 4).labels.tolist() == [0, 1, 2]


@pytest.mark.parametrize("hashed", [True, False])
def test_damaged_samples_are_not_current(hashed, tmp_path):
    """Else a report says "sample again", and sampling that there is nothing to do."""
    folder, path = write(tmp_path, FACTS), tmp_path / "samples.npz"
    if hashed:
        write(tmp_path, FACTS | {"samples_sha256": sha256(path)})
    assert is_current(folder, FILES, FACTS["made_from"]) and not is_current(folder, FILES, {})
    whole = path.read_bytes()
    for damaged in (whole[:100], whole[:300] + bytes([whole[300] ^ 1]) + whole[301:], b""):
        path.write_bytes(damaged)
        assert not is_current(folder, FILES, FACTS["made_from"])


PLAN = {"pipeline": "..", "varied": ["steps"], "combinations": ["0123"]}
PLANS = {
    "pipeline": [3],
    "varied": [None, ["warmth"], "steps"],
    "combinations": [[], "abc", [1], None],
}


@pytest.mark.parametrize(("key", "value"), [(key, value) for key in PLANS for value in PLANS[key]])
def test_a_damaged_plan_of_a_sweep_is_one_line(key, value, tmp_path, capsys):
    (tmp_path / "sweep.json").write_text(json.dumps(PLAN | {key: value}))
    assert command("eval.sweep", tmp_path) == 2
    assert "no finished sweep is here" in capsys.readouterr().err
    assert command("eval.sweep", tmp_path, "--batch-size", 0) == 2
    assert "at least 1 is needed" in capsys.readouterr().err
