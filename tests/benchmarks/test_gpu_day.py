"""The GPU's day: parts that fail, hang or lack something do not stop the next ones, and what is
done stays done."""

from __future__ import annotations

import json
import sys
import time

import pytest

from benchmarks import gpu_day

SCRIPTS = {
    "search": "print('a result')",
    "prior": "print('Traceback'); raise ValueError('no such kernel | here')",
    "codes": "import sys; print('nothing is not installed'); sys.exit(3)",
    "tokenizer": "import os, sys, time; sys.stdout.flush(); os.fork(); time.sleep(600)",
}


@pytest.fixture
def parts(monkeypatch):
    """Parts that are scripts; the list of those that were started."""
    started = []

    def command_of(name, out, toy):
        started.append(name)
        return [sys.executable, "-S", "-c", SCRIPTS[name]]

    monkeypatch.setattr(gpu_day, "PARTS", {name: gpu_day.Part(None, 2) for name in SCRIPTS})
    monkeypatch.setattr(gpu_day, "command_of", command_of)
    return started


def test_every_part_has_its_turn_and_only_what_is_not_done_another(parts, tmp_path, monkeypatch):
    begun = time.monotonic()
    assert not gpu_day.run_all(tmp_path, toy=False)
    assert time.monotonic() - begun < 60 and parts == list(SCRIPTS)
    results = gpu_day.Results(tmp_path)
    assert [results.status(name) for name in SCRIPTS] == ["done", "failed", "lacking", "timed out"]
    table = (tmp_path / "table.md").read_text()
    assert "| prior | failed: ValueError: no such kernel / here |" in table
    assert "| codes | lacking: nothing is not installed |" in table
    assert "| tokenizer | timed out: after 2 s, see tokenizer.log |" in table

    parts.clear()
    for name in SCRIPTS:
        monkeypatch.setitem(SCRIPTS, name, "")
    assert gpu_day.run_all(tmp_path, toy=False)
    assert (
        parts == ["prior", "codes", "tokenizer"]
        and "failed" not in (tmp_path / "table.md").read_text()
    )


def test_no_part_begins_after_the_end(parts, tmp_path):
    assert not gpu_day.run_all(tmp_path, toy=False, limit=0)
    assert not parts and gpu_day.Results(tmp_path).status("search") == "not run"


def test_results_are_those_of_the_last_try_and_a_cut_line_is_none(tmp_path):
    results = gpu_day.Results(tmp_path)
    for line in (
        {"status": "begun"},
        gpu_day.found("rate", 1.0, "x", 2),
        {"status": "failed", "message": "?"},
    ):
        results.write("search", line)
    results.write("search", {"status": "begun"})
    results.write("search", gpu_day.found("rate", 3.0, "x", 2))
    with results.file.open("a") as file:
        file.write('{"part": "search", "sta')
    (_, line) = results.of("search")
    assert (line["value"], line["met"], results.status("search")) == (3.0, True, "begun")
    assert "| search | rate | 3 | x | >= 2 | yes |" in results.table()


def test_without_a_gpu_it_says_so(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["gpu_day", str(tmp_path / "out")])
    with pytest.raises(SystemExit, match="error: there is no GPU here"):
        gpu_day.main()
    assert not (tmp_path / "out").exists()


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_every_part_runs_at_toy_size(tmp_path, monkeypatch):
    monkeypatch.setattr(sys, "argv", ["gpu_day", str(tmp_path), "--toy"])
    gpu_day.main()
    lines = [json.loads(line) for line in (tmp_path / "results.jsonl").read_text().splitlines()]
    for name in gpu_day.PARTS:
        assert any(line["part"] == name and "value" in line for line in lines), name
    assert [line["value"] for line in lines if line.get("what") == "graph breaks"] == [0, 0]
    monkeypatch.setattr(gpu_day, "_run", None)  # nothing is left to run
    gpu_day.main()
