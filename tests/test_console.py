"""The console command, and packages of other people under our names."""

from __future__ import annotations

import importlib
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from tessera.__main__ import COMMANDS, command, completion, parser_of

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "tokenizer", "priors", "generate", "eval")


def python(*words: str, folder: Path, path: str = str(ROOT)) -> subprocess.CompletedProcess:
    """Another process, in a folder that comes first where Python looks for modules."""
    environment = {**os.environ, "PYTHONPATH": path}
    return subprocess.run(
        [sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True
    )


@pytest.mark.parametrize("kind", ["file", "package"])
@pytest.mark.parametrize(("hidden", "asked"), [("training", "priors.train"), ("eval", "tokenizer")])
def test_a_package_of_ones_own_with_our_name_is_named(hidden, asked, kind, tmp_path):
    mine = tmp_path / hidden / "__init__.py" if kind == "package" else tmp_path / f"{hidden}.py"
    mine.parent.mkdir(exist_ok=True)
    mine.write_text("")
    imported = python("-c", f"import {asked}", folder=tmp_path)
    last = imported.stderr.strip().splitlines()[-1]
    assert imported.returncode == 1 and last.startswith(
        f"ImportError: Tessera's package '{hidden}'"
    )
    assert str(mine) in last and "rename" in last
    started = python("-m", asked, "--help", folder=tmp_path)
    assert started.returncode == 2 and started.stderr.count("\n") == 1, started.stderr
    assert str(mine) in started.stderr


def test_folders_of_that_name_that_are_not_found_first_are_nobodys_business(tmp_path):
    for name in PACKAGES:  # without __init__.py: Python goes on to ours
        (tmp_path / name).mkdir()
    assert python("-c", "import priors, eval", folder=tmp_path).returncode == 0


@pytest.mark.parametrize("name", COMMANDS)
def test_each_command_is_the_main_of_a_module(name):
    module, first, about = COMMANDS[name]
    assert callable(importlib.import_module(module).main) and about
    parser = parser_of(module, first)
    assert parser.prog.startswith("python -m ") and "usage" in parser.format_usage()


def tessera(monkeypatch, *words: str) -> int:
    monkeypatch.setattr(sys, "argv", ["tessera", *words])
    try:
        command()
        return 0
    except SystemExit as stop:
        return int(stop.code or 0)


def test_the_command_says_its_name_version_and_commands(monkeypatch, capsys):
    assert tessera(monkeypatch, "--version") == 0
    assert re.fullmatch(r"tessera \d+\.\d+\.\d+\n", capsys.readouterr().out)
    assert tessera(monkeypatch) == 0 and all(
        f"  {name} " in (text := capsys.readouterr().out) or f"  {name}" in text
        for name in ["train"]
    )
    assert tessera(monkeypatch, "smaple") == 2
    assert "did you mean sample?" in capsys.readouterr().err
    assert tessera(monkeypatch, "sample", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: tessera sample ")
    assert tessera(monkeypatch, "eval", "rate", "--help") == 0
    assert capsys.readouterr().out.startswith("usage: tessera eval rate ")
    assert tessera(monkeypatch, "train", "/nowhere.yaml") == 2
    assert "/nowhere.yaml" in capsys.readouterr().err


def test_bash_completes_commands_flags_and_choices(tmp_path):
    script = tmp_path / "completion.bash"
    script.write_text(completion("bash"))
    asked = {
        ("sa",): "sample",
        ("sample", "--guid"): "--guidance --guidance-schedule --guidance-power",
        ("eval", "like"): "likelihood",
        ("eval", "rate", "--rate"): "--rate-distortion",
    }
    for words, expected in asked.items():
        typed = " ".join(["tessera", *words])
        code = f"source {script}; COMP_WORDS=({typed}); COMP_CWORD={len(words)}; _tessera; "
        code += "echo ${COMPREPLY[@]}"
        shown = subprocess.run(["bash", "-c", code], capture_output=True, text=True)
        assert shown.stdout.split() == expected.split(), shown.stderr
    assert "bashcompinit" in completion("zsh")


def test_the_version_stands_in_one_place():
    import tomllib

    from tessera import __version__

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    assert project["tool"]["setuptools"]["dynamic"]["version"] == {"attr": "tessera.__version__"}
    assert f"version: {__version__}\n" in (ROOT / "CITATION.cff").read_text()
    assert f"## {__version__}" in (ROOT / "CHANGELOG.md").read_text()
