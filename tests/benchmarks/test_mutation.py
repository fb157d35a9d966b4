"""The mutation benchmark: what it changes, and that samples and keys hold."""

from __future__ import annotations

import ast
import importlib.util
from types import CodeType

import pytest

from benchmarks import mutants, mutation

TEXT = '''"""A docstring."""
import math

LIMIT: float = 2.5


class Rows:
    def total(self, rows, weight=1):
        """Another."""
        if not rows and weight > 0:
            raise ValueError(f"no {1 + 1} rows")
        total = 0
        for row in rows:
            total += row * weight
        total = min(total, LIMIT)
        return total.detach().sum() if total == 3 else math.sqrt(total)
'''


def changes():
    found = mutants.mutants_of("rows.py", TEXT) + mutants.negated_conditions("rows.py", TEXT)
    return {mutant.key.rsplit("::", 1)[1]: mutant for mutant in found}


def test_every_mutant_is_one_change_that_compiles():
    found = changes()
    for mutant in found.values():
        ast.parse(mutant.source)
        changed = [
            pair
            for pair in zip(TEXT.splitlines(), mutant.source.splitlines(), strict=True)
            if len(set(pair)) > 1
        ]
        assert len(changed) == 1 and TEXT.splitlines()[mutant.line - 1] == changed[0][0]
    assert {
        "2.5 => 5.0",
        "not rows => rows",
        "weight > 0 => weight >= 0",
        "weight > 0 => weight <= 0",
        "not rows and weight > 0 => not rows or weight > 0",
        "not rows and weight > 0 => not",
        "1 => 2",
        "0 => 1",
        "total += row * weight => pass",
        "row * weight => row / weight",
        "total = min(total, LIMIT) => pass",
        "min(total, LIMIT) => max(total, LIMIT)",
        "total.detach().sum() => total.detach().mean()",
        "total.detach() => total",
        "total == 3 => total != 3",
        "math.sqrt(total) => math.square(total)",
        "raise ValueError(f'no {1 + 1} rows') => pass",
    } <= found.keys()
    assert not any("1 + 1 =>" in change or "docstring" in change for change in found)
    assert found["row * weight => row / weight"].function == "Rows.total"
    assert found["2.5 => 5.0"].function == ""


def test_keys_name_one_mutant_each_wherever_its_line_stands():
    found = mutants.mutants_of("rows.py", TEXT)
    assert len({mutant.key for mutant in found}) == len(found)
    moved = mutants.mutants_of("rows.py", TEXT.replace("import math", "# more\n\nimport math"))
    assert [mutant.key for mutant in moved] == [mutant.key for mutant in found]
    assert moved[0].line == found[0].line + 2


def test_a_larger_sample_holds_the_smaller_one():
    few, total = mutants.sampled("tokenizer/quantizers/fsq.py", 5, 0)
    more, _ = mutants.sampled("tokenizer/quantizers/fsq.py", 9, 0)
    other, _ = mutants.sampled("tokenizer/quantizers/fsq.py", 5, 1)
    assert more[:5] == few != other and len(more) == 9 < total


def test_a_file_that_moves_or_changes_elsewhere_keeps_its_sample(tmp_path, monkeypatch):
    monkeypatch.setattr(mutants, "ROOT", tmp_path)
    (tmp_path / "folder").mkdir()
    (tmp_path / "rows.py").write_text(TEXT)
    (tmp_path / "folder/rows.py").write_text(TEXT.replace("import math", "import math\n\nMORE = 1"))
    here, moved = (
        [mutant.key for mutant in mutants.sampled(f"{folder}rows.py", None, 0)[0]]
        for folder in ("", "folder/")
    )
    assert [f"folder/{key}" for key in here] == [key for key in moved if "MORE" not in key]
    assert len(moved) == len(here) + 2


def test_tests_are_those_that_import_the_file_or_its_package():
    names = {path.name for path in mutation.test_files_near("tokenizer/quantizers/fsq.py", 1)}
    assert {
        "test_lookup_free.py",
        "test_quantizers.py",
    } <= names and "test_backbone.py" not in names
    assert {
        path.name for path in mutation.test_files_near("tokenizer/quantizers/fsq.py", 2)
    } > names


def test_a_mutant_meets_the_tests_of_its_function_the_fastest_first():
    tests = {
        "slow": {"seconds": 9.0, "calls": ["a.py::f"]},
        "fast": {"seconds": 1.0, "calls": ["a.py::f", "a.py::g"]},
        "other": {"seconds": 0.1, "calls": ["a.py::g"]},
    }
    mutant = mutants.Mutant("a.py", "f", 1, "key", "")
    assert mutation.tests_for(mutant, tests, 30) == ["fast", "slow"]
    assert mutation.tests_for(mutant, tests, 5) == ["fast"] and mutation.tests_for(
        mutant, tests, 0
    ) == ["fast"]
    assert mutation.tests_for(mutant, tests, 30, killers=["slow"]) == ["slow", "fast"]
    assert mutation.tests_for(mutant, tests, 5, killers=["fast", "slow"]) == ["slow"]
    assert mutation.tests_for(mutant, tests, 30, all_of_them=True) == ["fast", "slow", "other"]
    default = mutants.Mutant("a.py", "", 1, "key", "")
    assert mutation.tests_for(default, tests, 30) == ["other", "fast", "slow"]


def test_equivalent_mutants_say_why(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    monkeypatch.setattr(mutation, "EQUIVALENT", path)
    assert mutation.equivalents() == {}
    path.write_text(
        "# of the search\na.py::f::x = 1::1 => 2\n    It changes\n    nothing.\n\nb.py::g::y::z\n    Nor this.\n"
    )
    assert mutation.equivalents() == {
        "a.py::f::x = 1::1 => 2": "It changes nothing.",
        "b.py::g::y::z": "Nor this.",
    }
    path.write_text("a.py::f::x = 1::1 => 2\n")
    with pytest.raises(SystemExit, match="says not why a"):
        mutation.equivalents()


def function(module: CodeType, name: str) -> CodeType:
    return next(
        code for code in module.co_consts if isinstance(code, CodeType) and code.co_name == name
    )


def test_functions_that_a_mutant_changes():
    text = "LIMIT = 2\n\n\ndef f(x, y=1):\n    def g():\n        return x\n    return g\n\n\ndef h(x):\n    return x + 1\n"

    def replaced(old: str, new: str):
        before, after = (
            compile(source, "a.py", "exec") for source in (text, text.replace(old, new))
        )
        found = mutants.replaced_functions(before, after)
        return found and [(code.co_name, other) for code, other in found], after

    found, after = replaced("x + 1", "x - 1")
    assert found == [("h", function(after, "h"))]
    found, after = replaced(
        "        return x\n", "        return -x\n"
    )  # of an inner one, the outer one
    assert found == [("f", function(after, "f"))]
    assert replaced("x + 1", "(x\n    + 1)")[0] == []  # a line's number is no change
    assert replaced("x + 1", "x + 1.0")[0] != []  # 1 == 1.0
    for old, new in (("LIMIT = 2", "LIMIT = 3"), ("y=1", "y=2")):  # what runs on import
        assert replaced(old, new)[0] is None


def test_functions_of_this_process_get_the_mutants_code(tmp_path):
    text = "LIMIT = 2\n\n\ndef double(x, by=2):\n    return x * by\n\n\nDOUBLE = double\n"
    (tmp_path / "made.py").write_text(text)
    spec = importlib.util.spec_from_file_location("made", tmp_path / "made.py")
    made = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(made)
    mutation._functions.cache_clear()

    def replaced(old, new):
        return mutation.new_code(
            mutants.Mutant("made.py", "", 1, "", text.replace(old, new)), tmp_path
        )

    ((function, code),) = replaced("x * by", "x / by")
    function.__code__ = code
    assert made.DOUBLE(8) == 4  # whoever took it by name has it too
    assert replaced("by=2", "by=3") is None and replaced("LIMIT = 2", "LIMIT = 3") is None
    mutation._functions.cache_clear()


def test_intervals_are_wilsons():
    assert mutation.wilson(8, 10) == pytest.approx(
        (0.4902, 0.9433), abs=1e-4
    )  # Newcombe 1998, doi:10.1002/sim.4780
    low, high = mutation.wilson(10, 10)
    assert (low, high) == pytest.approx((1 / (1 + 1.959964**2 / 10), 1))
    assert mutation.wilson(0, 0) == (0, 1)
