"""A quantizer from a file outside the tree: trained by YAML, loaded when its module is named, and
held to the contract tests."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from tiny import command

from tokenizer.run import load
from tokenizer.sharing import from_pretrained, save_pretrained
from training import config as configuration
from training.errors import UserError
from training.plugins import import_plugins, take_words

ROOT = next(path for path in Path(__file__).parents if (path / "pyproject.toml").is_file())
MODULE = '''
"""Rounds each channel to a whole number in [-1, 1]: three values."""
import dataclasses

from tokenizer.quantizers import QUANTIZERS
from tokenizer.quantizers.fsq import FSQQuantizer


@dataclasses.dataclass(frozen=True)
class RoundingConfig:
    kind: str = "rounding"
    channels: int = 4

    def build(self):
        return FSQQuantizer((3,) * self.channels)


QUANTIZERS["rounding"] = RoundingConfig
'''
YAML = """
{plugins}
name: tokenizer
root: {root}
data: {{source: digits, image_size: 8}}
model:
  kind: vqvae
  encoder: {{kind: conv, channels: 8, residual_blocks: 1, residual_channels: 4}}
  decoder: {{kind: conv, channels: 8, residual_blocks: 1, residual_channels: 4}}
  quantizer: {{kind: rounding, channels: 4}}
loop: {{steps: 2, batch_size: 8, log_every: 1, save_every: 2, preview_every: 2}}
"""


@pytest.fixture
def clean(monkeypatch):
    """What a plugin does to the process goes again."""
    from tokenizer.quantizers import QUANTIZERS

    kinds, path, modules = dict(QUANTIZERS), list(sys.path), set(sys.modules)
    yield
    QUANTIZERS.clear()
    QUANTIZERS.update(kinds)
    sys.path[:] = path
    for name in set(sys.modules) - modules:
        if name.startswith("my_"):
            del sys.modules[name]


def forget(name: str) -> None:
    """As another process begins."""
    from tokenizer.quantizers import QUANTIZERS

    del sys.modules[name]
    QUANTIZERS.pop("rounding", None)


def test_a_quantizer_of_ones_own_trains_by_yaml_and_is_named_to_be_loaded(tmp_path, clean, capsys):
    (tmp_path / "my_rounding.py").write_text(MODULE)
    file = tmp_path / "mine.yaml"
    file.write_text(YAML.format(plugins="plugins: [my_rounding]", root=tmp_path))
    assert command("tokenizer.train", file) == 0, capsys.readouterr().err
    run = tmp_path / "tokenizer"
    assert "plugins:" in (run / "config.yaml").read_text()
    assert command("tokenizer.train", file) == 0  # the same run
    assert load(run).layout.num_codes == (81,)
    save_pretrained(run, tmp_path / "shared")
    forget("my_rounding")
    for folder in (run, tmp_path / "shared"):  # nothing of it is run unasked
        with pytest.raises(
            UserError, match=r"--plugin my_rounding \(in Python: import my_rounding"
        ):
            from_pretrained(folder)
    assert "my_rounding" not in sys.modules
    import_plugins(["my_rounding"], tmp_path)
    assert from_pretrained(tmp_path / "shared").layout.num_codes == (81,)


def test_a_plugin_is_named_on_the_command_line(tmp_path, clean, capsys, monkeypatch):
    (tmp_path / "my_rounding.py").write_text(MODULE)
    file = tmp_path / "mine.yaml"
    file.write_text(YAML.format(plugins="", root=tmp_path))
    assert command("tokenizer.train", file, "--dry-run") == 2
    assert "unknown kind 'rounding'" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert command("tokenizer.train", file, "--plugin", "my_rounding", "--dry-run") == 0
    capsys.readouterr()
    for words, told in (
        (["--plugin", "my_absent"], "my_absent: there is no such module"),
        (["--plugin", "./my_rounding.py"], "is no name of a module"),
        (["--plugin"], "is no name of a module"),
    ):
        assert command("tokenizer.train", file, *words) == 2
        shown = capsys.readouterr().err
        assert told in shown and shown.count("\n") == 1


def test_words_after_two_dashes_are_nobodys():
    assert take_words(["a", "--plugin", "b", "--plugin=c", "d"]) == (["a", "d"], ["b", "c"])
    assert take_words(["--", "--plugin", "b"]) == (["--", "--plugin", "b"], [])


def test_a_configuration_without_plugins_is_as_it_was():
    from tokenizer.run import TokenizerRun

    assert "plugins" not in configuration.to_dict(TokenizerRun())


def test_the_contract_tests_run_over_a_plugins_kind(tmp_path):
    """In another process, as somebody would who wrote it."""
    (tmp_path / "my_rounding.py").write_text(MODULE)
    contracts = next(ROOT.glob("tests/**/test_quantizers.py"))
    words = ["-m", "pytest", "-q", "-p", "no:cacheprovider", "--plugin", "my_rounding"]
    names = ["-k", "rounding", str(contracts)]
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{tmp_path}"}
    found = subprocess.run(
        [sys.executable, *words, *names], cwd=ROOT, env=environment, capture_output=True, text=True
    )
    passed = found.stdout.split(" [")[0].count(".")
    assert found.returncode == 0 and passed > 10, found.stdout[-2000:]
