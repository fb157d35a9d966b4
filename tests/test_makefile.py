"""The Makefile says what it does, and does the stages in order with what it was given."""

from __future__ import annotations

import re
import subprocess
from pathlib import Path

PROJECT = Path(__file__).parents[1]


def make(*words: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(["make", *words], cwd=PROJECT, capture_output=True, text=True, check=False)


def test_help_has_a_line_for_every_target_and_variable():
    text = (PROJECT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {"config-exists"}
    variables = set(re.findall(r"^([A-Z]+) *\?=", text, re.M))
    shown = {line.split()[0] for line in make("help").stdout.splitlines() if line.startswith("  ")}
    assert shown == targets | variables


def test_demo_runs_every_stage_in_order():
    plan = make("-n", "demo", "DATA=some folder/of images", "RUN=out", "NPROC=2").stdout
    stages = re.findall(r"--nproc-per-node 2 -m (\S+)", plan)
    assert stages[0] == "tokenizer.encoders.pretrain"
    assert stages[-4:] == ["tokenizer.encode", "priors.train", "generate.sample", "eval.run"]
    assert plan.count('data.source="some folder/of images"') == 2 and 'root="out"' in plan


def test_fresh_concerns_the_named_stage():
    plan = make("-n", "prior", "FRESH=1").stdout
    assert [line for line in plan.splitlines() if "--fresh" in line] == [
        line for line in plan.splitlines() if "priors.train" in line
    ]


def test_unknown_configuration_is_one_line():
    done = make("-o", "setup", "tokens", "CONFIG=nope")
    assert done.returncode == 2
    assert "CONFIG=nope" in done.stderr and "digits" in done.stderr
