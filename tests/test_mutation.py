"""The mutation benchmark: what it changes, and that samples and keys hold."""

from __future__ import annotations

import ast

import pytest

from benchmarks import mutation

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
    found = mutation.mutants_of("rows.py", TEXT) + mutation.negated_conditions("rows.py", TEXT)
    return {mutant.key.rsplit("::", 1)[1]: mutant for mutant in found}


def test_every_mutant_is_one_change_that_compiles():
    found = changes()
    for mutant in found.values():
        ast.parse(mutant.source)
        changed = [
            pair for pair in zip(TEXT.splitlines(), mutant.source.splitlines(), strict=True) if len(set(pair)) > 1
        ]
        assert len(changed) == 1 and TEXT.splitlines()[mutant.line - 1] == changed[0][0]
    assert {
        "2.5 => 5.0", "not rows => rows", "weight > 0 => weight >= 0", "weight > 0 => weight <= 0",
        "not rows and weight > 0 => not rows or weight > 0", "not rows and weight > 0 => not", "1 => 2", "0 => 1",
        "total += row * weight => pass", "row * weight => row / weight", "total = min(total, LIMIT) => pass",
        "min(total, LIMIT) => max(total, LIMIT)", "total.detach().sum() => total.detach().mean()",
        "total.detach() => total", "total == 3 => total != 3", "math.sqrt(total) => math.square(total)",
        "raise ValueError(f'no {1 + 1} rows') => pass",
    } <= found.keys()  # fmt: skip
    assert not any("1 + 1 =>" in change or "docstring" in change for change in found)
    assert found["row * weight => row / weight"].function == "Rows.total"
    assert found["2.5 => 5.0"].function == ""


def test_keys_name_one_mutant_each_wherever_its_line_stands():
    found = mutation.mutants_of("rows.py", TEXT)
    assert len({mutant.key for mutant in found}) == len(found)
    moved = mutation.mutants_of("rows.py", TEXT.replace("import math", "# more\n\nimport math"))
    assert [mutant.key for mutant in moved] == [mutant.key for mutant in found]
    assert moved[0].line == found[0].line + 2


def test_a_larger_sample_holds_the_smaller_one():
    few, total = mutation.sampled("tokenizer/quantizers/fsq.py", 5, 0)
    more, _ = mutation.sampled("tokenizer/quantizers/fsq.py", 9, 0)
    other, _ = mutation.sampled("tokenizer/quantizers/fsq.py", 5, 1)
    assert more[:5] == few != other and len(more) == 9 < total


def test_tests_are_those_that_import_the_file_or_its_package():
    names = {path.name for path in mutation.test_files_near("tokenizer/quantizers/fsq.py", 1)}
    assert {"test_lookup_free.py", "test_quantizers.py"} <= names and "test_backbone.py" not in names
    assert {path.name for path in mutation.test_files_near("tokenizer/quantizers/fsq.py", 2)} > names


def test_a_mutant_meets_the_tests_of_its_function_the_fastest_first():
    tests = {
        "slow": {"seconds": 9.0, "calls": ["a.py::f"]},
        "fast": {"seconds": 1.0, "calls": ["a.py::f", "a.py::g"]},
        "other": {"seconds": 0.1, "calls": ["a.py::g"]},
    }
    mutant = mutation.Mutant("a.py", "f", 1, "key", "")
    assert mutation.tests_for(mutant, tests, 30) == ["fast", "slow"]
    assert mutation.tests_for(mutant, tests, 5) == ["fast"] and mutation.tests_for(mutant, tests, 0) == ["fast"]
    default = mutation.Mutant("a.py", "", 1, "key", "")
    assert mutation.tests_for(default, tests, 30) == ["other", "fast", "slow"]


def test_equivalent_mutants_say_why(tmp_path, monkeypatch):
    path = tmp_path / "list.txt"
    monkeypatch.setattr(mutation, "EQUIVALENT", path)
    assert mutation.equivalents() == {}
    path.write_text(
        "# of the search\na.py::f::x = 1::1 => 2\n    It changes\n    nothing.\n\nb.py::g::y::z\n    Nor this.\n"
    )
    assert mutation.equivalents() == {"a.py::f::x = 1::1 => 2": "It changes nothing.", "b.py::g::y::z": "Nor this."}
    path.write_text("a.py::f::x = 1::1 => 2\n")
    with pytest.raises(SystemExit, match="says not why a"):
        mutation.equivalents()
