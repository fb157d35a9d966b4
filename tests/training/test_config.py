"""One YAML per run: what is right gives a frozen config, all else one line that names file, key and
remedy."""

from __future__ import annotations

import dataclasses
import inspect
import os
import random
import re
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import hypothesis
import processes
import pytest
import yaml
from hypothesis import strategies as st

from priors.run import PriorRun
from tokenizer.encode import TokensRun
from tokenizer.encoders.pretrain import PretrainRun
from tokenizer.run import TokenizerRun
from training.command import Parser, config_command, run_command
from training.config import from_dict, load, one_of, read_overrides, signed, to_dict, to_yaml
from training.errors import UserError
from training.signals import Interrupted

ROOT = Path(__file__).parents[2]


@dataclasses.dataclass(frozen=True)
class Round:
    kind: str = "round"
    radius: float = 1.0
    color: str = "red"


@dataclasses.dataclass(frozen=True)
class Square:
    kind: str = "square"
    side: int = 2
    corner: Any = one_of({"round": Round}, "round", radius=0.1)

    def __post_init__(self) -> None:
        if self.side < 1:
            raise ValueError(f"shape.side={self.side} must be at least 1")


@dataclasses.dataclass(frozen=True)
class Place:
    x: int = 0
    span: tuple[float, float] = (0.0, 1.0)
    weights: dict[str, float] = dataclasses.field(default_factory=dict)
    flag: bool = False
    turns: tuple[int, ...] = signed(())


@dataclasses.dataclass(frozen=True)
class Drawing:
    title: str
    root: str = "out"
    target: str = "${root}/picture"
    layer: str | None = None
    shape: Any = one_of({"round": Round, "square": Square}, "square", side=5)
    place: Place = dataclasses.field(default_factory=lambda: Place(x=7))


def drawing(tmp_path: Path, text: str, *overrides: str) -> Drawing:
    (tmp_path / "drawing.yaml").write_text(text)
    return load(Drawing, tmp_path / "drawing.yaml", overrides)


# What is right


def test_defaults_live_in_the_dataclasses(tmp_path):
    config = drawing(tmp_path, "title: a")
    assert config == Drawing("a", "out", "out/picture", None, Square(side=5), Place(x=7))
    assert config.shape.corner == Round(radius=0.1)


def test_the_file_then_the_command_line(tmp_path):
    config = drawing(
        tmp_path, "title: a\nplace: {x: 1, span: [2, 3]}", "place.x=4", "title=b", "layer=top"
    )
    assert (config.title, config.layer, config.place) == ("b", "top", Place(4, (2.0, 3.0)))


def test_interpolation_follows_overrides(tmp_path):
    assert drawing(tmp_path, "title: a").target == "out/picture"
    assert drawing(tmp_path, "title: a", "root=there").target == "there/picture"
    assert drawing(tmp_path, "title: ${root}-${place.x}").title == "out-7"


def test_another_kind_drops_the_keys_of_the_lower_layer(tmp_path):
    text = "title: a\nshape: {kind: square, side: 9}"
    assert drawing(tmp_path, text, "shape.kind=round").shape == Round()
    assert drawing(tmp_path, text, "shape.kind=round", "shape.radius=2").shape == Round(radius=2.0)
    assert drawing(tmp_path, text, "shape.kind=square").shape == Square(side=9)


def test_a_kind_of_the_command_line_says_what_it_leaves_out(tmp_path, capsys):
    text = "title: a\nshape: {kind: square, side: 9}"
    drawing(tmp_path, text, "shape.kind=square", "shape.side=3")
    assert capsys.readouterr().err == ""
    drawing(tmp_path, text, "shape.kind=round")
    told = capsys.readouterr().err
    assert told.count("\n") == 1 and "kinds do not combine" in told
    assert "of square is left out (shape.side)" in told and "drawing.yaml" in told


def test_a_default_kind_keeps_its_defaults_and_another_has_its_own(tmp_path):
    shape = drawing(tmp_path, "title: a\nshape: {corner: {color: blue}}").shape
    assert (shape.side, shape.corner) == (5, Round(radius=0.1, color="blue"))
    assert drawing(tmp_path, "title: a\nshape: {kind: round}").shape == Round()


def test_include_is_relative_and_overridden_key_by_key(tmp_path):
    (tmp_path / "base").mkdir()
    (tmp_path / "base" / "low.yaml").write_text(
        "title: low\nplace: {x: 1, span: [0, 2]}\nshape: {kind: round}"
    )
    (tmp_path / "base" / "mid.yaml").write_text("include: low.yaml\nplace: {x: 2}")
    config = drawing(tmp_path, "include: base/mid.yaml\ntitle: top\nshape: {color: blue}")
    assert config == Drawing(
        "top", target="out/picture", shape=Round(color="blue"), place=Place(2, (0.0, 2.0))
    )


def test_configs_are_frozen(tmp_path):
    config = drawing(tmp_path, "title: a")
    for part, key in (
        (config, "title"),
        (config.shape, "side"),
        (config.shape.corner, "radius"),
        (config.place, "x"),
    ):
        with pytest.raises(dataclasses.FrozenInstanceError):
            setattr(part, key, 1)


def test_round_trip_through_yaml(tmp_path):
    config = drawing(
        tmp_path,
        "title: a",
        "shape.kind=round",
        "place.weights={a.b: 1e-7, c: 2}",
        "place.span=[0.1,3]",
    )
    (tmp_path / "resolved.yaml").write_text(to_yaml(config))
    assert load(Drawing, tmp_path / "resolved.yaml") == config
    assert from_dict(Drawing, to_dict(config), "here") == config
    assert config.place.weights == {"a.b": 1e-7, "c": 2.0}


# What a word means is for the field to say

TEXTS = [
    "pics #2",
    "007",
    "1e3",
    "yes",
    "null#",
    "1:30",
    "2024_01_05",
    "2024-01-05",
    "0x1f",
    "1_000",
    ".5",
    "a: b",
    "[x]",
    "[x",
    "{a: b}",
    "{",
    " spaces ",
    "'quoted'",
    '"',
    "a=b",
    "!!python/name:os.system",
    "*a",
    "&a b",
    "- x",
    "? x",
    "%x",
    "@x",
    "`x`",
    "two\nlines",
    "???",
    "é",
    "💥",
    "\x1b[2J",
    "\u2028",
    "\x85r\\",
    "x" * 300,
    "${root}",
    "${",
    "$${root}",
    "$$${root}",
    "${oc.env:HOME}",
    "\\${root}",
    "$",
    "",
]


@pytest.mark.parametrize("text", TEXTS)
def test_a_text_is_taken_from_the_command_line_as_it_is_and_from_the_saved_file_again(
    tmp_path, text
):
    config = drawing(tmp_path, "title: a", f"title={text}", f"shape.corner.color={text}")
    assert config.title == config.shape.corner.color == text
    (tmp_path / "saved.yaml").write_text(to_yaml(config))
    assert load(Drawing, tmp_path / "saved.yaml") == config
    assert from_dict(Drawing, to_dict(config), "here") == config


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    return tmp_path_factory.mktemp("saved") / "saved.yaml"


@hypothesis.settings(deadline=None)  # the machine may be busy
@hypothesis.given(st.text(max_size=30).filter(lambda text: not text.startswith("~")))
def test_any_text_survives_the_saved_file(saved, text):
    config = Drawing(text, target="x" + text, layer="y" + text)
    saved.write_text(to_yaml(config))
    assert load(Drawing, saved) == config


@pytest.mark.parametrize(
    "text", ["007", "1e3", "yes", "1:30", "2024_01_05", "2024-01-05", "0x1f", ".inf", "True"]
)
def test_a_text_in_a_file_is_as_it_is_written(tmp_path, text):
    (tmp_path / "base.yaml").write_text(f"title: {text}\nshape: {{kind: round, color: {text}}}")
    config = drawing(tmp_path, f"include: base.yaml\nlayer: {text}")
    assert config.title == config.layer == config.shape.color == text


def test_nothing_is_null_where_a_field_may_be_none_and_refused_where_not(tmp_path):
    for word in ("null", ""):
        assert drawing(tmp_path, "title: a\nlayer: top", f"layer={word}").layer is None
        assert drawing(tmp_path, "title: a\nlayer: top", f"title={word}").title == word
    for word in ("null", "", "~", "Null"):
        assert drawing(tmp_path, f"title: a\nlayer: {word}").layer is None
        with pytest.raises(UserError, match=r"drawing.yaml: title: .*null.*put text in quotes"):
            drawing(tmp_path, f"title: {word}")
    assert drawing(tmp_path, "title: 'null'\nlayer: 'null'").layer == "null"


@pytest.mark.parametrize(
    ("word", "value"),
    [
        ("x=007", 7),
        ("x=1_000", 1000),
        ("x=+3", 3),
        ("x= 4 ", 4),
        ("span=[0, 1e-3]", (0.0, 1e-3)),
        ("span=[.5,2]", (0.5, 2.0)),
        ("weights={007: 1, a.b: 2}", {"007": 1.0, "a.b": 2.0}),
        ("weights={}", {}),
        ("flag=on", True),
        ("flag=False", False),
        ("flag=0", False),
    ],
)
def test_other_fields_read_their_type(tmp_path, word, value):
    name, _, text = word.partition("=")
    assert getattr(drawing(tmp_path, "title: a", f"place.{word}").place, name) == value
    assert getattr(drawing(tmp_path, f"title: a\nplace: {{{name}: {text}}}").place, name) == value


NONE = [
    "x=1:30",
    "x=1e3",
    "x=yes",
    "x=0x1f",
    "x=1 #2",
    "x=٣",
    "x=" + "9" * 5000,
    "flag=2",
    "flag=maybe",
    "x=[1]",
    "span=[1:30,2]",
    "span=3",
    "weights=[1]",
    "weights={a: yes}",
]


@pytest.mark.parametrize("word", NONE)
def test_and_refuse_what_is_none(tmp_path, word):
    with pytest.raises(UserError, match=f"command line: place.{word.partition('=')[0]}"):
        drawing(tmp_path, "title: a", f"place.{word}")


def test_a_section_may_be_one_word(tmp_path):
    assert drawing(tmp_path, "title: a", "place=5", "place.x=3").place == Place(x=3)
    words = ("shape={kind: round, radius: 2}", "place={x: 3}", "shape.color=007")
    config = drawing(tmp_path, "title: a\nplace: {span: [2, 3]}", *words)
    assert (config.shape, config.place) == (Round(radius=2.0, color="007"), Place(3, (2.0, 3.0)))


def test_words_about_one_section_add_up_in_any_form(tmp_path):
    for words in (
        ["place.x=3", "place={flag: on}"],
        ["place={flag: on}", "place.x=3"],
        ["place={x: 3}", "place={flag: on}"],
        ["place.flag=on", "place={x: 4}", "place.x=3"],
    ):
        assert drawing(tmp_path, "title: a\nplace: {span: [1, 2]}", *words).place == Place(
            3, (1.0, 2.0), {}, True
        )
    shape = drawing(
        tmp_path, "title: a", "shape.corner.color=blue", "shape={corner: {radius: 2}, side: 4}"
    ).shape
    assert shape == Square(side=4, corner=Round(radius=2.0, color="blue"))
    assert (
        drawing(tmp_path, "title: a", "place.x=1", "place.x=2", "title=b", "title={c").title == "{c"
    )


def test_home_is_home_in_files_on_the_command_line_and_in_references(tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", "/home/anna")
    for config in (
        drawing(tmp_path, "title: a\nroot: ~/runs"),
        drawing(tmp_path, "title: a", "root=~/runs"),
    ):
        assert (config.root, config.target) == ("/home/anna/runs", "/home/anna/runs/picture")
    (tmp_path / "base.yaml").write_text("title: ~/a~/b")
    assert drawing(tmp_path, "include: base.yaml").title == "/home/anna/a~/b"
    parser = Parser()
    parser.add_argument("run", type=Path)
    parser.add_argument("--out", type=Path)
    parsed = parser.parse_args(["~/runs", "--out", "~"])
    assert (parsed.run, parsed.out) == (Path("/home/anna/runs"), Path("/home/anna"))


@pytest.mark.parametrize(
    "inside", ["oc.env:SECRET", "oc.env:SECRET,x", "oc.create:{a: 1}", "eval:1", "", ".x", "a:b"]
)
def test_nothing_but_keys_is_referred_to(tmp_path, monkeypatch, inside):
    """A configuration that was downloaded reads nothing of this machine."""
    monkeypatch.setenv("SECRET", "hunter2")
    with pytest.raises(UserError, match=r"drawing.yaml: not readable as YAML") as caught:
        drawing(tmp_path, f"title: 'a ${{{inside}}} b'")
    assert "hunter2" not in str(caught.value)
    raw = {"title": f"${{{inside}}}", "layer": "${root}"}
    config = from_dict(Drawing, raw, "manifest.json")
    assert (config.title, config.layer, config.target) == (
        raw["title"],
        raw["layer"],
        "out/picture",
    )
    saved = to_yaml(config)
    assert "hunter2" not in saved and f"$${{{inside}}}" in saved


def test_references_stay_within_the_text_of_one_configuration(tmp_path):
    assert drawing(tmp_path, "title: $${root} ${shape.side}").title == "${root} 5"
    for text in (
        "title: ${place}",
        "title: ${place.span}",
        "title: a\nroot: ${target}",
        "title: ${root.x}",
        "title: a\nplace: {x: '${root}'}",
        "title: ${layer}",
    ):
        with pytest.raises(UserError, match=r"drawing.yaml: (title|root|target|place.x): "):
            drawing(tmp_path, text)


def test_aliases_end(tmp_path):
    assert drawing(tmp_path, "title: &a one\nroot: *a").root == "one"
    rows = ["a0: &a0 [1]"] + [
        f"a{i}: &a{i} [{', '.join([f'*a{i - 1}'] * 9)}]" for i in range(1, 12)
    ]
    for text in (
        "\n".join(rows),
        "title: &a [*a]",
        "place: &p {x: *p}",
        "a: " + "{a: " * 900 + "1" + "}" * 900,
    ):
        with pytest.raises(UserError, match=r"drawing.yaml: not readable as YAML"):
            drawing(tmp_path, text)


def test_only_fields_that_say_so_take_numbers_below_zero(tmp_path):
    assert drawing(tmp_path, "title: a\nplace: {turns: [-1, 2]}").place.turns == (-1, 2)
    with pytest.raises(
        UserError, match=rf"command line: place.turns: {-(2**63)} is not a number from {1 - 2**63}"
    ):
        drawing(tmp_path, "title: a", f"place.turns=[{-(2**63)}]")


def schemas() -> Iterator[type]:
    """Every config class of the project."""
    for name, module in list(sys.modules.items()):
        if name.split(".")[0] in ("training", "tokenizer", "priors"):
            for schema in vars(module).values():
                if dataclasses.is_dataclass(schema) and getattr(schema, "__module__", "") == name:
                    yield schema


def test_every_field_whose_comment_speaks_of_negative_numbers_takes_them():
    found = []
    for schema in schemas():
        for name, note in re.findall(r"^    (\w+): .*#(.*)$", inspect.getsource(schema), re.M):
            if "negative" in note and name in {field.name for field in dataclasses.fields(schema)}:
                assert to_dict(from_dict(schema, {name: [-1]}, "here"))[name] == [-1]
                found.append(f"{schema.__name__}.{name}")
    assert "DinoConfig.layers" in found


SCHEMAS = {
    "tokenizer": TokenizerRun,
    "prior": PriorRun,
    "tokens": TokensRun,
    "encoder": PretrainRun,
}
CONFIGS = [
    (path, schema)
    for path in sorted((ROOT / "configs").rglob("*.yaml"))
    for start, schema in SCHEMAS.items()
    if path.stem.split("-")[0] == start
]


@pytest.mark.parametrize(
    ("path", "schema"), CONFIGS, ids=lambda value: str(value).removeprefix(f"{ROOT}/")
)
def test_every_configuration_of_the_project_loads_and_round_trips(tmp_path, path, schema):
    config = load(schema, path)
    (tmp_path / "config.yaml").write_text(to_yaml(config))
    assert load(schema, tmp_path / "config.yaml") == config


# What is wrong: (file, overrides, what the one line says)

WRONG = {
    "unknown key": (
        "title: a\ncolour: red",
        [],
        "drawing.yaml: colour: unknown key; it takes layer, place, root",
    ),
    "misspelt key": ("tilte: a", [], "drawing.yaml: tilte: unknown key; did you mean title?"),
    "misspelt inner key": (
        "title: a\nplace: {wieghts: {}}",
        [],
        "drawing.yaml: place.wieghts: unknown key; did you mean weights?",
    ),
    "key of another kind": (
        "title: a\nshape: {radius: 1}",
        [],
        "drawing.yaml: shape.radius: unknown key",
    ),
    "key on the command line": (
        "title: a",
        ["plaec.x=1"],
        "command line: plaec: unknown key; did you mean place?",
    ),
    "no default": ("root: a", [], "drawing.yaml: title: this key has no default"),
    "wrong type": (
        "title: a\nplace: {x: many}",
        [],
        "drawing.yaml: place.x: Value 'many' is not a whole number",
    ),
    "fraction": ("title: a\nplace: {x: 1.5}", [], "drawing.yaml: place.x: Value '1.5'"),
    "type on the command line": (
        "title: a",
        ["place.x=many"],
        "command line: place.x: Value 'many'",
    ),
    "nothing": ("title: a", ["place.x="], "command line: place.x: "),
    "too long": (
        "place: {x: 1, span: [1, 2, 3]}\ntitle: a",
        [],
        "drawing.yaml: place.span: [1, 2, 3] is of a wrong",
    ),
    "a section for a pair": ("title: a\nplace: {span: {a: 1}}", [], "drawing.yaml: place.span"),
    "wrong items": (
        "title: a",
        ["place.span=[a,b]"],
        "command line: place.span: [a, b] is of a wrong",
    ),
    "wrong item": (
        "title: a\nplace: {weights: {a: b}}",
        [],
        "drawing.yaml: place.weights.a: Value 'b'",
    ),
    "a scalar for a section": (
        "title: a\nplace: 3",
        [],
        "drawing.yaml: place: a section of keys is expected, not 3",
    ),
    "an empty section": (
        "title: a\nplace:",
        [],
        "drawing.yaml: place: a section of keys is expected, not None",
    ),
    "an empty choice": (
        "title: a\nshape:",
        [],
        "drawing.yaml: shape: a section of keys is expected, not None",
    ),
    "a section for a scalar": ("title: {a: b}", [], "drawing.yaml: title: Cannot convert"),
    "unknown kind": (
        "title: a\nshape: {kind: sqare}",
        [],
        "drawing.yaml: shape.kind: unknown kind 'sqare'; did you "
        "mean square? It is one of round, square",
    ),
    "kind on the command line": (
        "title: a",
        ["shape.kind=x"],
        "command line: shape.kind: unknown kind 'x'; it is one",
    ),
    "kind as a list": (
        "title: a\nshape: {kind: [a]}",
        [],
        "drawing.yaml: shape.kind: unknown kind ['a']",
    ),
    "bare kind": (
        "title: a\nshape: round",
        [],
        "drawing.yaml: shape: a section is expected: shape: {kind: round}",
    ),
    "out of range": (
        "title: a\nshape: {side: 0}",
        [],
        "drawing.yaml: shape.side=0 must be at least 1",
    ),
    "below zero": (
        "title: a\nplace: {x: -1}",
        [],
        "drawing.yaml: place.x: -1 is not a number from 0 to",
    ),
    "no number": (
        "title: a\nplace: {span: [0, .nan]}",
        [],
        "drawing.yaml: place.span: nan is not a number from 0",
    ),
    "endless": (
        "title: a",
        ["shape.kind=round", "shape.radius=inf"],
        "command line: shape.radius: inf is not",
    ),
    "beyond a tensor": (
        "title: a",
        [f"place.x={2**63}"],
        f"command line: place.x: {2**63} is not a number",
    ),
    "an item below zero": (
        "title: a\nplace: {weights: {b: -1}}",
        [],
        "drawing.yaml: place.weights.b: -1.0 is not",
    ),
    "a section within text": (
        "title: a ${place}",
        [],
        "drawing.yaml: title: ${place} refers to more than one value",
    ),
    "no such reference": (
        "title: ${nothing}",
        [],
        "drawing.yaml: title: Interpolation key 'nothing' not found",
    ),
    "a reference to itself": ("title: ${title}", [], "drawing.yaml: title: "),
    "half a reference": ("title: ${", [], "drawing.yaml: not readable as YAML"),
    "bad YAML": ("title: [1", [], "drawing.yaml: not readable as YAML"),
    "a key twice": ("title: a\ntitle: b", [], "drawing.yaml: not readable as YAML"),
    "a list": ("[1, 2]", [], "drawing.yaml: a configuration is a mapping"),
    "a number": ("42", [], "drawing.yaml: a configuration is a mapping"),
    "a tag": (
        "title: !!python/object/apply:os.mkdir [executed]",
        [],
        "drawing.yaml: not readable as YAML",
    ),
    "include of a list": (
        "include: [3]",
        [],
        "drawing.yaml: include: one file name is expected, not [3]",
    ),
    "include of nothing": (
        "include: drawin.yaml",
        [],
        "drawin.yaml: there is no such configuration file; did you mean",
    ),
    "include of itself": (
        "include: drawing.yaml",
        [],
        "drawing.yaml: include: the files include each other",
    ),
    "no equals sign": (
        "title: a",
        ["title"],
        "command line: 'title' is not of the form section.key=value",
    ),
    "no key": ("title: a", ["=3"], "command line: '=3' is not of the form"),
    "empty part": ("title: a", ["place..x=3"], "command line: 'place..x=3' is not of the form"),
    "bad value": ("title: a", ["place.x=["], "command line: place.x: while parsing"),
}


@pytest.mark.parametrize(("text", "overrides", "says"), WRONG.values(), ids=WRONG)
def test_what_is_wrong_is_said_in_one_line(tmp_path, monkeypatch, text, overrides, says):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError) as caught:
        drawing(tmp_path, text, *overrides)
    message = str(caught.value).replace(f"{tmp_path}/", "")
    assert message.startswith(says) and "\n" not in message
    assert os.listdir(tmp_path) == ["drawing.yaml"]


def test_a_missing_file_names_the_nearest(tmp_path):
    (tmp_path / "stage1.yaml").write_text("")
    with pytest.raises(
        UserError,
        match=r"stage.yaml: there is no such configuration file; did you mean .*stage1.yaml",
    ):
        load(Drawing, tmp_path / "stage.yaml")
    with pytest.raises(UserError, match="there is no such configuration file"):
        load(Drawing, tmp_path)


def test_an_error_names_the_file_that_said_it(tmp_path):
    (tmp_path / "base.yaml").write_text("title: a\nplace: {x: many}")
    with pytest.raises(UserError, match=r"base\.yaml: place\.x"):
        drawing(tmp_path, "include: base.yaml\nplace: {span: [1, 2]}")


def test_not_text_is_not_yaml(tmp_path):
    (tmp_path / "image.yaml").write_bytes(b"\xff\xd8\xff\xe0\x00\x10JFIF")
    with pytest.raises(UserError, match=r"image\.yaml: not readable as YAML"):
        load(Drawing, tmp_path / "image.yaml")


def test_overrides_are_nested_dictionaries():
    assert read_overrides(["a.b=1", "a.c=[x, 1e-3]", "d="]) == {
        "a": {"b": "1", "c": "[x, 1e-3]"},
        "d": "",
    }


def test_mutated_configurations_give_a_config_or_a_user_error(tmp_path):
    """Keys renamed, dropped and moved, values swapped for others of any type, characters lost and
    doubled."""
    generator, outcomes = random.Random(0), {"config": 0, "error": 0}
    digits = [(path, schema) for path, schema in CONFIGS if path.parent.name == "digits"]
    assert len(digits) >= 4
    for (path, schema), number in [(entry, number) for entry in digits for number in range(60)]:
        raw: Any = yaml.safe_load(path.read_text())
        raw.pop("include", None)
        for _ in range(generator.randint(1, 2)):
            _mutate(raw, generator)
        text = yaml.safe_dump(raw)
        if number % 3 == 0:
            place = generator.randrange(len(text))
            text = (
                text[:place]
                + generator.choice(["", text[place] * 2, "{", ":", "'", "\n"])
                + text[place + 1 :]
            )
        mutated = tmp_path / "mutated.yaml"
        mutated.write_text(text)
        try:
            config = load(schema, mutated)
        except UserError as error:
            assert "\n" not in str(error) and str(mutated) in str(error), text
            outcomes["error"] += 1
        else:
            assert isinstance(config, schema)
            from_dict(schema, to_dict(config), "again")
            outcomes["config"] += 1
    assert min(outcomes.values()) > 10, outcomes


VALUES = [
    None,
    True,
    -1,
    0,
    3,
    1.5,
    float("inf"),
    "",
    "text",
    "a: b",
    "1e-3",
    "???",
    [],
    [1, "a"],
    {},
    {"kind": "x"},
    {"a": {"b": 1}},
    10**30,
]


def _mutate(raw: Any, generator: random.Random) -> None:
    sections = [raw, *(value for value in raw.values() if isinstance(value, dict))]
    section = generator.choice([section for section in sections if section])
    key = generator.choice(list(section))
    value = section.pop(key)
    match generator.randrange(5):
        case 0:
            section[key[:-1] or "x"] = value
        case 1:
            generator.choice(sections)[key] = value
        case 2 | 3:
            section[key] = generator.choice(VALUES)
        case _:
            section["kind"] = value


# Commands


def test_a_wrong_key_ends_the_process_with_one_line(tmp_path):
    (tmp_path / "x.yaml").write_text("name: x")
    done = processes.run("-m", "priors.train", tmp_path / "x.yaml", "priro.kind=foo", cwd=ROOT)
    assert done.returncode == 2
    assert done.stderr == "error: command line: priro: unknown key; did you mean prior?\n"
    assert done.stdout == ""


@pytest.mark.parametrize("schema", SCHEMAS)
def test_every_command_fails_in_one_line(tmp_path, monkeypatch, capsys, schema):
    import priors.train
    import tokenizer.encode
    import tokenizer.encoders.pretrain
    import tokenizer.train

    mains = {
        "tokenizer": tokenizer.train.main,
        "prior": priors.train.main,
        "tokens": tokenizer.encode.main,
        "encoder": tokenizer.encoders.pretrain.main,
    }
    (tmp_path / "x.yaml").write_text("name: x")
    for arguments, says in (
        (
            [str(tmp_path / "x.yaml"), "rooot=1"],
            "error: command line: rooot: unknown key; did you mean root?\n",
        ),
        (
            [str(tmp_path / "y.yaml")],
            f"error: {tmp_path}/y.yaml: there is no such configuration file",
        ),
    ):
        monkeypatch.setattr(sys, "argv", ["program", *arguments])
        with pytest.raises(SystemExit) as caught:
            run_command(mains[schema])
        printed = capsys.readouterr()
        assert caught.value.code == 2 and printed.out == ""
        assert printed.err.startswith(says) and printed.err.count("\n") == 1


@pytest.mark.parametrize(
    ("error", "code", "says"),
    [
        (UserError("two\nlines"), 2, "error: two lines"),
        (Interrupted("stopped at 3"), 130, "stopped at 3"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (
            OSError(28, "No space left on device", "/there"),
            2,
            "error: cannot write /there: No space left on device",
        ),
        (
            OSError(36, "File name too long", "/there"),
            2,
            "error: cannot open /there: File name too long",
        ),
        (
            OSError(13, "Permission denied", "/there"),
            2,
            "error: cannot open /there: Permission denied",
        ),
        (MemoryError(), 2, "error: out of memory: MemoryError: take"),
        (
            RuntimeError("CUDA out of memory. Tried\nmore"),
            2,
            "error: out of memory: CUDA out of memory. Tried: take",
        ),
        (
            ValueError("embedded null byte"),
            2,
            "error: a path holds the character \\0: leave it out\n",
        ),
        (UserError("a\x1b[2Jb\u202ec"), 2, "error: a?[2Jb?c\n"),
    ],
)
def test_exit_codes(capsys, error, code, says):
    def main():
        raise error

    with pytest.raises(SystemExit) as caught:
        run_command(main)
    assert caught.value.code == code and capsys.readouterr().err.startswith(says)


@pytest.mark.parametrize(
    "error", [OSError(9, "Bad file descriptor"), RuntimeError("shapes differ"), KeyError("x")]
)
def test_our_own_bugs_keep_their_traceback(error):
    def main():
        raise error

    with pytest.raises(type(error)):
        run_command(main)


@dataclasses.dataclass(frozen=True)
class Built:
    size: int = 1

    def build(self) -> Any:
        import torch

        return torch.empty(self.size, self.size), 1 / self.size


def test_what_torch_says_of_a_setting_is_one_line_and_what_else_it_says_a_traceback(
    tmp_path, monkeypatch, capsys
):
    """Within a config's `build` the settings are to blame."""
    (tmp_path / "x.yaml").write_text("size: 3")

    def run(config: Built, fresh: bool) -> None:
        config.build()
        raise ZeroDivisionError("ours")

    def main() -> None:
        config_command("program", "", Built, run)

    for words, says in (
        (["size=0"], "Built does not work out: division by zero"),
        ([f"size={2**40}"], "out of memory"),
    ):
        monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "x.yaml"), *words])
        with pytest.raises(SystemExit) as caught:
            run_command(main)
        printed = capsys.readouterr().err
        assert caught.value.code == 2 and says in printed and printed.count("\n") == 1
    monkeypatch.setattr(sys, "argv", ["program", str(tmp_path / "x.yaml")])
    with pytest.raises(ZeroDivisionError, match="ours"):
        run_command(main)
