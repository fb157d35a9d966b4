"""The Makefile says what it does, and does the stages in order with what it was given."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

PROJECT = Path(__file__).parents[1]
ALL = ["CONFIG", "DATA", "RUN", "NUM", "STEPS", "FRESH", "NPROC", "LPIPS", "OUT", "PYTHON", "PY"]


def make(
    *words: str, cwd: Path = PROJECT, environment: dict[str, str] | None = None
) -> subprocess.CompletedProcess[str]:
    kept = {
        name: value
        for name, value in os.environ.items()
        if name not in (*ALL, "MAKEFLAGS", "MAKELEVEL")
    }
    return subprocess.run(
        ["make", *words],
        cwd=cwd,
        capture_output=True,
        text=True,
        check=False,
        env=kept | (environment or {}),
    )


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A folder with the Makefile, configurations, and in Python's place a script that notes what it
    is called with."""
    (tmp_path / "Makefile").symlink_to(PROJECT / "Makefile")
    (tmp_path / "configs").symlink_to(PROJECT / "configs")
    (tmp_path / "stub").write_text('#!/bin/bash\nprintf "%s\\0" "$@" end >> calls\n')
    (tmp_path / "stub").chmod(0o755)
    return tmp_path


def calls(place: Path, *words: str, environment: dict[str, str] | None = None) -> list[list[str]]:
    """The words of each call of Python that `make WORDS` makes."""
    (place / "calls").unlink(missing_ok=True)
    done = make("-o", "setup", "PY=./stub", *words, cwd=place, environment=environment)
    assert done.returncode == 0, done.stderr
    found: list[list[str]] = [[]]
    for word in (place / "calls").read_bytes().decode().split("\0")[:-1]:
        if word == "end":
            found.append([])
        else:
            found[-1].append(word)
    return found[:-1]


def test_help_has_a_line_for_every_target_and_variable():
    text = (PROJECT / "Makefile").read_text()
    targets = set(re.search(r"^\.PHONY: (.*)$", text, re.M)[1].split()) - {
        "checked",
        "config-exists",
    }
    variables = set(re.findall(r"^([A-Z]+) *\?=", text, re.M))
    shown = {line.split()[0] for line in make("help").stdout.splitlines() if line.startswith("  ")}
    assert shown == targets | variables


def test_demo_runs_every_stage_in_order(place):
    (place / "net.pth").touch()
    made = calls(
        place, "demo", "DATA=some folder/of images", "RUN=out", "NPROC=2", "LPIPS=net.pth", "NUM=7"
    )
    launch = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "--"]
    assert all(call[: len(launch)] == launch for call in made)
    where, data = "root=out", "data.source=some folder/of images"
    assert [call[len(launch) :] for call in made] == [
        ["tokenizer.encoders.pretrain", "configs/digits/encoder.yaml", where, data],
        ["tokenizer.train", "configs/digits/tokenizer-stage1.yaml", where, data],
        ["tokenizer.train", "configs/digits/tokenizer-stage2.yaml", where, data],
        ["tokenizer.encode", "configs/digits/tokens.yaml", where],
        ["priors.train", "configs/digits/prior.yaml", where],
        ["generate.sample", "out", "--num", "7"],
        ["eval.run", "report", "out", "--lpips-net", "squeeze", "--lpips-weights", "net.pth"],
    ]


def test_one_process_needs_no_launcher(place):
    assert calls(place, "samples", "CONFIG=digits_vqvae/")[-1] == [
        "-m",
        "generate.sample",
        "runs/digits_vqvae",
        "--num",
        "500",
    ]
    assert [call[1] for call in calls(place, "demo", "CONFIG=digits_vqvae", "DATA=a/b")] == [
        "tokenizer.train",
        "tokenizer.encode",
        "priors.train",
        "generate.sample",
        "eval.run",
    ]
    assert calls(place, "report", "DATA=pictures/cats/")[-1][3] == "runs/digits-cats"


def test_the_launcher_takes_no_option_of_a_stage_for_its_own(place):
    """By torchrun's own parser: `--num` is the beginning of two of its options."""
    from torch.distributed.run import get_args_parser

    (place / "x").touch()
    for call in calls(place, "demo", "compare-priors", "NPROC=2", "STEPS=3", "LPIPS=x"):
        read = get_args_parser().parse_args(call[2:])
        assert read.module and read.nproc_per_node == "2"
        assert [read.training_script, *read.training_script_args] == call[call.index("--") + 1 :]


def test_the_job_script_puts_the_same_words_before_a_module():
    assert '-m -- "$module" "$@"' in (PROJECT / "docs" / "slurm" / "tessera.sbatch").read_text()


def test_fresh_concerns_the_named_stage(place):
    for goal, fresh in (
        ("prior", ["priors.train"]),
        ("tokens", ["tokenizer.encode"]),
        ("samples", []),
    ):
        made = calls(place, goal, "FRESH=1")
        assert [call[1] for call in made if "--fresh" in call] == fresh
    assert all(
        "--fresh" in call
        for call in calls(place, "demo", "FRESH=1")
        if call[1].endswith(("train", "encode"))
    )


def test_every_quantizer_is_trained_alike_before_they_are_compared(place):
    (place / "trunk.pth").touch()
    *trained, compared = calls(
        place, "compare-quantizers", "DATA=some images", "STEPS=7", "LPIPS=trunk.pth"
    )
    files = sorted(file.name for file in (PROJECT / "configs/cifar10/quantizers").glob("*.yaml"))
    assert [Path(call[2]).name for call in trained] == files and len(files) > 10
    words = ["root=runs/quantizers", "data.source=some images", "loop.steps=7"]
    assert all(call[:2] == ["-m", "tokenizer.train"] and call[3:] == words for call in trained)
    scores = ["--lpips-net", "squeeze", "--lpips-weights", "trunk.pth"]
    assert compared == ["-m", "eval.run", "quantizers", "runs/quantizers", *scores]
    *trained, _ = calls(place, "compare-quantizers", "DATA=some images", "RUN=out")
    assert all(call[3:] == ["root=out", "data.source=some images"] for call in trained)


@pytest.mark.parametrize("text", ["0", "no", "false", "off", ""])
def test_not_fresh_starts_nothing_over(place, text):
    assert not any("--fresh" in call for call in calls(place, "prior", f"FRESH={text}"))


def test_fresh_that_says_neither_is_refused(place):
    done = make("-o", "setup", "PY=./stub", "encoder", "CONFIG=digits", "FRESH=maybe", cwd=place)
    assert done.returncode == 2 and "FRESH=maybe: give 1 or 0" in done.stderr


@pytest.mark.parametrize("name", ["data", "run", "num", "config", "fresh"])
def test_a_variable_in_small_letters_is_refused(place, name):
    """It would take the place of the Makefile's own, where make expands what is given."""
    done = make(
        "-o",
        "setup",
        "PY=./stub",
        "tokenizer",
        "CONFIG=digits_vqvae",
        f"{name}=$(shell {HACK})",
        cwd=place,
    )
    assert done.returncode == 2 and f"{name}=: write {name.upper()}=" in done.stderr
    assert sorted(os.listdir(place)) == ["Makefile", "configs", "stub"]


@pytest.mark.parametrize(
    "config", ["", "..", "priors", "/elsewhere/digits_vqvae", "more/digits_vqvae"]
)
def test_a_configuration_without_a_tokenizer_trains_nothing(place, config):
    done = make("-o", "setup", "PY=./stub", "tokenizer", f"CONFIG={config}", cwd=place)
    assert done.returncode == 2 and done.stderr.startswith(f"error: CONFIG={config}: ")
    assert not (place / "calls").exists()


@pytest.mark.parametrize("config", ["digits_vqvae/", "./digits_vqvae", "configs/digits_vqvae"])
def test_a_configuration_may_be_named_by_its_path(place, config):
    (call,) = calls(place, "tokenizer", f"CONFIG={config}")
    assert call[2:] == ["configs/digits_vqvae/tokenizer.yaml", "root=runs/digits_vqvae"]


def test_a_folder_of_presets_names_them_and_takes_one(place):
    done = make("-o", "setup", "PY=./stub", "tokenizer", "CONFIG=imagenet", cwd=place)
    assert done.returncode == 2 and "CONFIG=configs/imagenet/VQGAN-f16.yaml" in done.stderr
    assert "tokens.yaml" not in done.stderr and not (place / "calls").exists()
    for config in ("imagenet/VQGAN-f16.yaml", "configs/imagenet/VQGAN-f16.yaml"):
        (call,) = calls(place, "tokenizer", f"CONFIG={config}")
        assert call[2:] == ["configs/imagenet/VQGAN-f16.yaml", "root=runs/imagenet"]
        (place / "calls").unlink()


def test_a_configuration_may_lie_anywhere(place):
    (place / "mine" / "cats").mkdir(parents=True)
    (place / "mine" / "cats" / "tokenizer.yaml").touch()
    (call,) = calls(place, "tokenizer", "CONFIG=mine/cats")
    assert call[2:] == ["mine/cats/tokenizer.yaml", "root=runs/cats"]


@pytest.mark.parametrize("goal", ["demo", "prior", "samples", "tokens"])
def test_what_a_configuration_lacks_is_said_before_its_first_stage(place, goal):
    (place / "mine" / "cats").mkdir(parents=True)
    (place / "mine" / "cats" / "tokenizer.yaml").touch()
    done = make("-o", "setup", "PY=./stub", goal, "CONFIG=mine/cats", cwd=place)
    assert done.returncode == 2 and "there is no mine/cats/tokens.yaml" in done.stderr
    assert not (place / "calls").exists()


HACK = "touch hacked"
HOSTILE = [
    "w/exp #2",
    f"`{HACK}`",
    f"$({HACK})",
    f"$(shell {HACK})",
    f"$$({HACK})",
    f"$$(shell {HACK})",
    "${HOME}",
    "$HOME",
    f'"; {HACK}; "',
    f"'; {HACK}; '",
    f"a; {HACK}",
    f"a | {HACK}",
    f"a & {HACK}",
    f"a\n{HACK}\n",
    "50%",
    'q"q',
    "it's",
    "a  b ",
    "back\\slash\\",
    "*",
    "?[a-z]",
    "{a,b}",
    "$@",
    "$(",
    "$",
    "$$",
    "~/runs",
    "a,b)",
    "!x",
    "é",
    "a=b",
    "a:b",
    "$(info x)",
    f"$(eval X:=$(shell {HACK}))",
    "<in",
    ">out",
]


@pytest.mark.parametrize("text", HOSTILE)
def test_what_is_given_arrives_as_it_is_and_runs_nothing(place, text):
    (place / text).parent.mkdir(parents=True, exist_ok=True)
    (place / text).touch()
    before = sorted([*os.listdir(place), "calls"])
    given = [f"{name}={text}" for name in ("DATA", "RUN", "LPIPS", "PYTHON")]
    # Where text begins with the home folder, that is a folder of this name.
    made = calls(
        place, "report", "CONFIG=digits_vqvae", *given, environment={"HOME": str(place / "~")}
    )
    where, data = f"root={text}", f"data.source={text}"
    assert [call[1:] for call in made] == [
        ["tokenizer.train", "configs/digits_vqvae/tokenizer.yaml", where, data],
        ["tokenizer.encode", "configs/digits_vqvae/tokens.yaml", where],
        ["priors.train", "configs/digits_vqvae/prior.yaml", where],
        ["generate.sample", text, "--num", "500"],
        ["eval.run", "report", text, "--lpips-net", "squeeze", "--lpips-weights", text],
    ]
    make("-o", "setup", "config-exists", "help", f"CONFIG={text}", *given, cwd=place)
    assert sorted(os.listdir(place)) == before


NO_NUMBERS = ["abc", "0", "-1", "1.5", "1e3", "12x", "7 8", "", "9999999999", "--png", *HOSTILE]
WRONG = [
    (name, text)
    for name in ("NUM", "STEPS", "NPROC")
    for text in NO_NUMBERS
    if text or name == "NUM"
]
WRONG += [("FRESH", text) for text in ("maybe", "1 0", *HOSTILE)]
WRONG += [("LPIPS", text) for text in ("nowhere.pth", "configs", "-stub", *HOSTILE)]
WRONG += [("RUN", "-x"), ("RUN", "--out=x")]


@pytest.mark.parametrize(("name", "text"), WRONG)
def test_what_no_stage_could_use_is_told_before_the_first_one(place, name, text):
    before = sorted(os.listdir(place))
    for goal in ("report", "compare-quantizers"):
        done = make("PY=./stub", goal, "CONFIG=digits_vqvae", f"{name}={text}", cwd=place)
        assert done.returncode == 2 and done.stderr.startswith(f"error: {name}="), done.stderr
        assert done.stderr.count("error: ") == 1 and sorted(os.listdir(place)) == before


@pytest.mark.parametrize("text", ["w/exp #2", f"$(shell {HACK})", f"`{HACK}`"])
def test_the_same_holds_for_the_environment_and_for_every_comparison(place, text):
    made = calls(place, "samples", environment={"RUN": text, "DATA": text})
    assert (
        made[-1] == ["-m", "generate.sample", text, "--num", "500"]
        and f"data.source={text}" in made[0]
    )
    made = calls(place, "compare-quantizers", "compare-priors", "STEPS=7", f"RUN={text}")
    trained = [call for call in made if call[1].endswith("train")]
    assert sum("loop.steps=7" in call for call in trained) > 10
    assert all(f"root={text}" in call for call in trained)
    assert sorted(os.listdir(place)) == ["Makefile", "calls", "configs", "stub"]


def test_unknown_configuration_is_one_line():
    done = make("-o", "setup", "tokens", "CONFIG=nope")
    assert done.returncode == 2
    assert "CONFIG=nope" in done.stderr and "digits" in done.stderr


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_a_tiny_pipeline_on_two_processes(tmp_path):
    (tmp_path / "Makefile").symlink_to(PROJECT / "Makefile")
    folder = tmp_path / "configs" / "tiny"
    folder.mkdir(parents=True)
    loop = "{steps: 2, batch_size: 8, preview_every: 2}"
    (folder / "tokenizer.yaml").write_text(
        f"name: tokenizer\ndata: {{source: digits, image_size: 16}}\ncalibration_images: 64\nloop: {loop}\n"
        "model: {kind: vqvae, encoder: {kind: conv, channels: 8, stride: 4, residual_blocks: 1}, "
        "decoder: {kind: conv, channels: 8, residual_blocks: 1}, quantizer: {kind: vector, num_codes: 8, code_dim: 4}}"
    )
    (folder / "tokens.yaml").write_text("tokenizer: ${root}/tokenizer\n")
    prior = "prior: {kind: masked, steps: 2, backbone: {dim: 16, depth: 1, heads: 2}}"
    (folder / "prior.yaml").write_text(f"tokens: ${{root}}/tokens\n{prior}\nloop: {loop}\n")
    words = [
        "-o",
        "setup",
        f"PY={sys.executable}",
        "CONFIG=tiny",
        "RUN=some run #1",
        "NPROC=2",
        "NUM=20",
    ]
    done = make(
        "demo",
        *words,
        cwd=tmp_path,
        environment={"PYTHONPATH": str(PROJECT), "OMP_NUM_THREADS": "1"},
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "some run #1" / "report" / "report.html").is_file(), done.stdout


def test_a_run_of_the_tests_sees_no_gpu_unless_it_asks(place: Path) -> None:
    assert os.environ["CUDA_VISIBLE_DEVICES"] == os.environ["HIP_VISIBLE_DEVICES"] == ""
    *_, last = calls(place, "test-gpu")
    assert last == ["-m", "pytest", "-m", "gpu"]
    assert calls(place, "gpu-day", "OUT=-a day/of $(shell x)") == [
        ["-W", "ignore", "-m", "benchmarks.gpu_day", "--", "-a day/of $(shell x)"]
    ]
