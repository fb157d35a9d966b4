"""Mutated configurations through the commands themselves: accepted, or one line on stderr and exit
code 2.

Catalogue row 15 (docs/reliability.md). Mutants of every configuration of the project go through the
`main` of its command in this process: tokenizers with --dry-run, the others up to the first
training step.
"""

from __future__ import annotations

import copy
import dataclasses
import random
import resource
import signal
import subprocess
import sys
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import yaml
from test_cache import save_images, save_tokenizer
from test_config import CONFIGS, ROOT
from tiny import command, save_encoder

import priors.train
import tokenizer.encoders.pretrain
from tokenizer.encode import TokensRun, encode_data
from tokenizer.encoders.pretrain import PretrainRun
from training.config import load, to_dict
from training.errors import UserError

COMMANDS = {
    "TokenizerRun": ["tokenizer.train", "--dry-run"],
    "PriorRun": ["priors.train"],
    "TokensRun": ["tokenizer.encode"],
    "PretrainRun": ["tokenizer.encoders.pretrain"],
}
SLOWER = ("digits", "fashion_mnist")  # their images are opened
SECONDS = 20  # of the processor's, that one mutant may take before it counts as hanging
BEGUN = "training would begin"
MEMORY = 2 * 2**30
NUMBERS = [
    -1,
    0,
    -(2**63),
    2**31,
    2**62,
    2**63,
    10**30,
    1.5,
    -0.5,
    1e308,
    float("nan"),
    float("inf"),
    float("-inf"),
]
TYPES = [
    None,
    True,
    "",
    " ",
    "text",
    "1e",
    "0x",
    "null",
    [],
    [1, "a", None],
    [[[]]],
    {},
    {"kind": "x"},
    {1: 2},
    {None: 1},
    {"a": {"b": {"c": [{}]}}},
    "2026-11-21",
    "!!",
    "\u202etxt",
    "é" * 3,
    "💥",
    "a\nb",
    "../../etc",
    "x" * 5000,
]
REFERENCES = [
    "${nothing}",
    "${",
    "${}",
    "${root",
    "${root}}",
    "${.name}",
    "${..}",
    "${name}",
    "${loop}",
    "${loop.steps}",
    "${oc.env:NO_SUCH_VARIABLE}",
    "${oc.env:HOME}",
    "${oc.decode:'['}",
    "${nothing:1}",
    "${root}${nothing}",
    "???",
    "${oc.create:{a: 1}}",
    "$${root}",
    "${seed}",
    "\\${root}",
]
OVERRIDES = ["{0}={1}"] * 3 + ["{0}", "{0}.x={1}", "{0}.0={1}", "={1}", "{0}[0]={1}"]
LINES = [
    "include: nowhere.yaml",
    "include: [a, b]",
    "include: .",
    "include: mutant.yaml",
    "include: /dev/null",
    "include: image.bin",
    "include: ''",
    "include: ${root}",
    "include: loop-a.yaml",
    "include: ../" + "x" * 300,
    "x: !!python/object/apply:os.mkdir [executed]",
    "x: !!python/name:os.system",
    "x: !!binary aGVsbG8=",
    "x: !tag 1",
    "<<: {seed: 1}",
    "a: &a [*a]",
    "a: *b",
    "? [1, 2] : 3",
    "? {a: 1} : 3",
    "\t- x",
    "--- \nseed: 1",
    "...",
    "%YAML 9.9",
    "seed: 0\nseed: 1",
    "''",
    "- a",
    ": ",
    "null: 1",
    "1: 2",
    "true: 1",
    "2026-11-21: 1",
    "seed: 2026-11-21",
    "seed: 1_000",
    "seed: 0o17",
    "seed: 1:30",
    "@",
    "`",
    "&",
    "seed: |\n  a",
    "name: >-\n  a\n\n  b",
    "prior: {prior: {prior: {}}}",
    "root: [" * 300,
    "a: " + "{a: " * 900 + "1" + "}" * 900,
    "a: &a [1]\nb: &b [" + ", ".join(["*a"] * 9) + "]\nc: [" + ", ".join(["*b"] * 9) + "]",
]


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A working folder with what the commands read, where training ends before its first step."""

    def stand_in(config: Any, run: Any, turns: Any, batches: Any, **options: Any) -> None:
        for turn in turns:
            turn.optimizer.build(turn.module)
        raise UserError(BEGUN)

    monkeypatch.delenv("NO_SUCH_VARIABLE", raising=False)
    for module in (priors.train, tokenizer.encoders.pretrain):
        monkeypatch.setattr(module, "train", stand_in)
    save_encoder(tmp_path / "encoder" / "model", patch_size=2, image_size=30)
    save_images(tmp_path / "images")
    save_tokenizer(tmp_path / "tokenizer", tmp_path / "images")
    encode_data(TokensRun(root=str(tmp_path), tokenizer=str(tmp_path / "tokenizer")))
    for name in ("tokenizer-stage1", "tokenizer-stage2"):
        (tmp_path / name).symlink_to(tmp_path / "tokenizer")
    (tmp_path / "image.bin").write_bytes(bytes(range(256)))
    (tmp_path / "loop-a.yaml").write_text("include: loop-b.yaml")
    (tmp_path / "loop-b.yaml").write_text("include: loop-a.yaml")
    monkeypatch.chdir(tmp_path)
    kept = resource.getrlimit(resource.RLIMIT_AS)  # a mutant may ask for all memory that there is
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + MEMORY, kept[1]))
    yield tmp_path
    resource.setrlimit(resource.RLIMIT_AS, kept)


@dataclasses.dataclass(frozen=True)
class Mutant:
    words: list[str]  # of the command line
    story: str  # what was done, for a failure's message


@dataclasses.dataclass(frozen=True)
class Answer:
    code: int
    lines: list[str]  # of stderr
    crash: str  # what came out of the command in place of an exit code


def mutate(path: Path, schema: type, generator: random.Random, place: Path) -> Mutant:
    """Write place/mutant.yaml: the text damaged, or one of the resolved values changed; or a
    hostile override."""
    file, kind = (
        place / "mutant.yaml",
        generator.choice(["text", "text", "value", "value", "value", "override"]),
    )
    original = path.read_text().replace("include: ", f"include: {path.parent}/")
    words = [*COMMANDS[schema.__name__], str(file)]
    where = overrides(path, schema, place)
    if kind == "text":
        text, how = damage(original, generator)
        file.write_bytes(text)
        return Mutant([*words, *where], f"{path.name}: {how}")
    raw = to_dict(load(schema, path, where))
    spot = generator.choice(list(spots(raw)))
    if kind == "override":
        file.write_text(original)
        value = generator.choice(
            [generator.choice(NUMBERS), generator.choice(TYPES), generator.choice(REFERENCES)]
        )
        override = generator.choice(
            ["{0}={1}", "{0}={1}", "{0}={1}", "{0}", "{0}.x={1}", "{0}.0={1}", "={1}", "{0}[0]={1}"]
        )
        override = override.format(".".join(spot), value)
        return Mutant(
            [*words, *where, override], f"{path.name}: {override[:200]!r} on the command line"
        )
    how = change(raw, spot, generator)
    file.write_text(yaml.safe_dump(raw, allow_unicode=generator.random() < 0.5))
    return Mutant(words, f"{path.name}: {how}")


def overrides(path: Path, schema: type, place: Path) -> list[str]:
    """What lets a configuration of the project run here, without a network."""
    source = (
        [f"data.source={place / 'images'}"]
        if path.parent.name == "fashion_mnist" and schema is PretrainRun
        else []
    )
    return [f"root={place / 'pretrained' if schema is PretrainRun else place}", *source]


def damage(text: str, generator: random.Random) -> tuple[bytes, str]:
    """A file's text with characters or lines lost, doubled, moved or put in."""
    lines, place = text.splitlines(), generator.randrange(len(text))
    row = generator.randrange(len(lines))
    match generator.randrange(7):
        case 0:
            return text[:place].encode(), f"cut at {place}"
        case 1:
            return text.encode()[:place] + generator.randbytes(3) + text.encode()[
                place:
            ], f"bytes put in at {place}"
        case 2:
            odd = generator.choice("{}[]:,'\"\t&*!|>%@`#-?\u2028\ufeff\x00é$")
            return (
                text[:place] + odd + text[place + generator.randrange(2) :]
            ).encode(), f"{odd!r} at {place}"
        case 3:
            del lines[row]
            return "\n".join(lines).encode(), f"line {row} lost"
        case 4:
            lines.insert(generator.randrange(len(lines) + 1), lines[row])
            return "\n".join(lines).encode(), f"line {row} doubled"
        case 5:
            lines[row] = generator.choice([" " * generator.randrange(9), "\t"]) + lines[row]
            return "\n".join(lines).encode(), f"line {row} indented"
        case _:
            line = generator.choice(LINES)
            lines.insert(generator.choice([0, row, len(lines)]), line)
            return "\n".join(lines).encode(), f"the line {line[:80]!r}"


def spots(raw: dict[str, Any], prefix: tuple[str, ...] = ()) -> Any:
    """The path of every key."""
    for key, value in raw.items():
        yield (*prefix, key)
        if isinstance(value, dict):
            yield from spots(value, (*prefix, key))


def change(raw: dict[str, Any], spot: tuple[str, ...], generator: random.Random) -> str:
    """Change what is at `spot`, in place; in words, how."""
    section = raw
    for key in spot[:-1]:
        section = section[key]
    key, name = spot[-1], ".".join(spot)
    value = section[key]
    match generator.randrange(9):
        case 0:
            misspelt = generator.choice(
                [key[:-1], key + "s", key.upper(), key[::-1], f" {key}", f"{key}.{key}", "é", ""]
            )
            section[misspelt] = section.pop(key)
            return f"{name} renamed to {misspelt!r}"
        case 1:
            del section[key]
            return f"{name} lost"
        case 2:
            generator.choice([raw, *(entry for entry in raw.values() if isinstance(entry, dict))])[
                key
            ] = value
            return f"{name} copied elsewhere"
        case 3:
            section[key] = [value] if generator.random() < 0.5 else {key: value}
            return f"{name} wrapped"
        case 4 | 5:
            section[key] = generator.choice(NUMBERS)
        case 6 | 7:
            section[key] = copy.deepcopy(generator.choice(TYPES))
        case _:
            section[key] = generator.choice(REFERENCES)
    return f"{name}={section[key]!r}"[:300]


class Hangs(BaseException):
    pass


def answer(mutant: Mutant, capsys: pytest.CaptureFixture) -> Answer:
    """Run the command in this process."""

    def ring(number: int, frame: Any) -> None:
        raise Hangs(f"over {SECONDS} s")

    kept = signal.signal(signal.SIGPROF, ring)
    signal.setitimer(signal.ITIMER_PROF, SECONDS)
    code, crash = 0, ""
    try:
        code = command(*mutant.words)
    except BaseException as error:
        crash = f"{type(error).__name__}: {error}"[:500]
        frame = error.__traceback__
        while frame.tb_next:
            frame = frame.tb_next
        crash += f" at {frame.tb_frame.f_code.co_filename}:{frame.tb_lineno}"
    finally:
        signal.setitimer(signal.ITIMER_PROF, 0)
        signal.signal(signal.SIGPROF, kept)
    return Answer(code, capsys.readouterr().err.splitlines(), crash)


def judge(count: int, seed: int, place: Path, capsys: pytest.CaptureFixture) -> Counter:
    """Outcomes of `count` mutants. Fails with the first few that are neither accepted nor refused
    in one line."""
    generator, outcomes, wrong = random.Random(seed), Counter(), []
    for _ in range(count):
        path, schema = generator.choice(CONFIGS)
        mutant = mutate(path, schema, generator, place)
        found = answer(mutant, capsys)
        accepted = not found.crash and (found.code == 0 or found.lines == [f"error: {BEGUN}"])
        refused = (
            not found.crash
            and found.code == 2
            and len(found.lines) == 1
            and found.lines[0].isprintable()
        )
        if not (accepted or refused) or (refused and not found.lines[0].startswith("error: ")):
            wrong.append((mutant.story, found))
        outcomes["accepted" if accepted else "refused"] += 1
    assert not wrong, f"{len(wrong)} of {count}: {wrong[:5]}"
    assert not list(place.rglob("executed*"))
    return outcomes


@pytest.mark.parametrize(
    "folder", ["priors", *(pytest.param(name, marks=pytest.mark.slow) for name in SLOWER)]
)
def test_the_originals_are_accepted(place, capsys, folder):
    """So it is what was done to them that mutants are refused for."""
    for path, schema in CONFIGS:
        if path.parent.name == folder:
            words = [*COMMANDS[schema.__name__], str(path), *overrides(path, schema, place)]
            found = answer(Mutant(words, path.name), capsys)
            assert not found.crash and (found.code == 0 or found.lines == [f"error: {BEGUN}"]), (
                path,
                found,
            )


def test_mutants_are_accepted_or_refused_in_one_line(place, capsys):
    assert min(judge(40, 0, place, capsys).values()) > 5


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_a_thousand_mutants(place, capsys, record_property):
    outcomes = judge(1200, 1, place, capsys)
    record_property("outcomes", dict(outcomes))
    print(f"1,200 mutants: {dict(outcomes)}")
    assert outcomes["refused"] > 600 and outcomes["accepted"] > 100


@pytest.mark.slow
@pytest.mark.parametrize(
    ("words", "says"),
    [
        (
            ["tokenizer.train", "configs/digits/tokenizer-stage1.yaml", "loop.stepz=3"],
            "did you mean steps?",
        ),
        (
            ["tokenizer.train", "configs/digits/tokenizer-stage1.yaml", "seed=x", "--dry-run"],
            "command line: seed: ",
        ),
        (
            ["tokenizer.encode", "configs/digits/tokens.yaml", "views=-1"],
            "views: -1 is not a number",
        ),
        (
            ["priors.train", "configs/digits/prior.yaml", "prior.kind=absorbin"],
            "did you mean absorbing?",
        ),
        (
            ["tokenizer.encoders.pretrain", "configs/digits/encoder.yml"],
            "did you mean configs/digits/encoder.yaml?",
        ),
        (["generate.sample", "runs", "--nun", "3"], "did you mean --num?"),
        (["eval.run", "report", "/nowhere"], "/nowhere"),
    ],
)
def test_as_real_processes(words, says):
    done = subprocess.run([sys.executable, "-m", *words], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == 2 and done.stdout == ""
    assert (
        done.stderr.startswith("error: ") and done.stderr.count("\n") == 1 and says in done.stderr
    )
