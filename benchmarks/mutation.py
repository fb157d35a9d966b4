"""Mutation testing: python -m benchmarks.mutation --files priors/uniform.py --sample 40

A mutant is one of our files with one thing changed: an operator, a comparison, a constant, a condition negated, a
statement or a call left out, a function taken for another. A test that fails with it kills it; one that no test kills
tells of a line that no test holds, or changes nothing (benchmarks/equivalent_mutants.txt, with why).

Test files that import a mutated file, or a package that does (with --reach 2 a module that does, …), are run once, to
see which tests call which functions; a mutant meets the tests that call its function, the fastest first, up to --budget
seconds of them, in a copy of the tree, in a process forked from one that has torch. What was found is kept in --out
after every mutant: the same command goes on where it stopped, a larger --sample adds to it, and survivors meet the
tests again when tests have changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import copy
import dataclasses
import difflib
import hashlib
import json
import multiprocessing
import os
import random
import re
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[1]
PACKAGES = ("training", "tokenizer", "priors", "generate", "eval")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
LEFT_OUT = shutil.ignore_patterns(".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info")

NOTHING: Mapping[Any, Any] = {}
OPERATORS = {
    ast.Add: [ast.Sub], ast.Sub: [ast.Add], ast.Mult: [ast.Div], ast.Div: [ast.Mult], ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv], ast.Pow: [ast.Mult], ast.BitAnd: [ast.BitOr], ast.BitOr: [ast.BitAnd],
    ast.LShift: [ast.RShift], ast.RShift: [ast.LShift],
    ast.Lt: [ast.LtE, ast.GtE], ast.LtE: [ast.Lt, ast.Gt], ast.Gt: [ast.GtE, ast.LtE], ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq], ast.NotEq: [ast.Eq], ast.Is: [ast.IsNot], ast.IsNot: [ast.Is], ast.In: [ast.NotIn],
    ast.NotIn: [ast.In], ast.And: [ast.Or], ast.Or: [ast.And],
}  # fmt: skip
SWAPS = [
    ("sigmoid", "tanh"), ("min", "max"), ("amin", "amax"), ("argmin", "argmax"), ("minimum", "maximum"),
    ("sum", "mean"), ("exp", "expm1"), ("log", "log1p"), ("sin", "cos"), ("softmax", "log_softmax"), ("relu", "gelu"),
    ("any", "all"), ("floor", "ceil"), ("zeros", "ones"), ("zeros_like", "ones_like"), ("cumsum", "cumprod"),
    ("square", "abs"), ("sqrt", "square"), ("new_zeros", "new_ones"), ("silu", "relu"), ("mse_loss", "l1_loss"),
]  # fmt: skip
SWAPPED = {a: b for pair in SWAPS for a, b in (pair[::-1], pair)}
WORDS = {"mean": "sum", "sum": "mean", "bicubic": "bilinear", "bilinear": "bicubic", "amin": "amax", "amax": "amin"}
DROPPED = {"detach", "abs", "clamp", "exp", "log", "sqrt", "square", "softmax", "neg", "where", "masked_fill", "clone"}


@dataclasses.dataclass(frozen=True)
class Mutant:
    file: str
    function: str  # qualified name, "" for what runs on import
    line: int
    key: str  # the same wherever the line stands: file::function::statement::change
    source: str  # of the whole file


def mutants_of(file: str, text: str) -> list[Mutant]:
    """All mutants of a file, in the order of its lines."""
    found: list[Mutant] = []
    counts: dict[str, int] = {}
    for function, statement, node, new in _changes(ast.parse(text)):
        change = f"{ast.unparse(node)} => {new}"
        key = "::".join((file, function, ast.unparse(_header(statement)).split("\n")[0], " ".join(change.split())))
        counts[key] = counts.get(key, 0) + 1
        key += f" ({counts[key]})" if counts[key] > 1 else ""
        source = _spliced(text, node, new if isinstance(node, ast.stmt) else f"({new})")
        with contextlib.suppress(SyntaxError):
            compile(source, file, "exec")
            found.append(Mutant(file, function, node.lineno, key, source))
    return found


def _changes(tree: ast.Module) -> Iterator[tuple[str, ast.stmt, ast.AST, str]]:
    """(function, statement, node, its new source) of everything that can be changed."""

    def visit(node: ast.AST, function: str, statement: ast.stmt | None) -> Iterator[Any]:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            function = f"{function}.{node.name}" if function else node.name
        if isinstance(node, ast.stmt):
            statement = node
            if isinstance(node, ast.Import | ast.ImportFrom) or _is_guard(node):
                return
            if _can_go(node):
                yield function, node, node, "pass"
            if isinstance(node, ast.Raise):  # messages are not mutated
                return
        elif isinstance(node, ast.expr):
            for new in _expressions(node):
                yield function, statement, node, ast.unparse(new)
        for name, value in ast.iter_fields(node):
            if name in ("annotation", "returns", "decorator_list") or isinstance(node, ast.JoinedStr):
                continue
            for child in value if isinstance(value, list) else [value]:
                if isinstance(child, ast.AST):
                    yield from visit(child, function, statement)

    yield from visit(tree, "", None)


def _expressions(node: ast.expr) -> Iterator[ast.expr]:
    """What may stand in an expression's place."""
    if isinstance(node, ast.BinOp | ast.BoolOp):
        for operator in OPERATORS.get(type(node.op), ()):
            yield _with(node, op=operator())
    elif isinstance(node, ast.UnaryOp) and not isinstance(node.operand, ast.Constant):
        yield node.operand
    elif isinstance(node, ast.Compare) and len(node.ops) == 1:
        for operator in OPERATORS.get(type(node.ops[0]), ()):
            yield _with(node, ops=[operator()])
    elif isinstance(node, ast.Compare):
        for place, one in enumerate(node.ops):
            for operator in OPERATORS.get(type(one), ())[:1]:
                yield _with(node, ops=[*node.ops[:place], operator(), *node.ops[place + 1 :]])
    elif isinstance(node, ast.IfExp):
        yield _with(node, test=ast.UnaryOp(ast.Not(), node.test))
    elif isinstance(node, ast.Constant):
        for value in _constants(node.value):
            yield ast.Constant(value)
    elif isinstance(node, ast.Call):
        function = node.func
        name = function.attr if isinstance(function, ast.Attribute) else getattr(function, "id", "")
        if name in SWAPPED:
            renamed = {"attr": SWAPPED[name]} if isinstance(function, ast.Attribute) else {"id": SWAPPED[name]}
            yield _with(node, func=_with(function, **renamed))
        if isinstance(function, ast.Attribute) and name in DROPPED and not _is_module(function.value):
            yield function.value
        for place, keyword in enumerate(node.keywords):
            if keyword.arg in ("min", "max"):
                other = ast.keyword({"min": "max", "max": "min"}[keyword.arg], keyword.value)
                yield _with(node, keywords=[*node.keywords[:place], other, *node.keywords[place + 1 :]])


def _constants(value: Any) -> list[Any]:
    if isinstance(value, bool):
        return [not value]
    if isinstance(value, int):
        return [value + 1, value - 1]
    if isinstance(value, float):
        return [2 * value if value else 1.0]
    return [WORDS[value]] if isinstance(value, str) and value in WORDS else []


def _with(node: Any, **changes: Any) -> Any:
    changed = copy.copy(node)
    for name, value in changes.items():
        setattr(changed, name, value)
    return changed


def _can_go(node: ast.stmt) -> bool:
    """Whether the file still runs without a statement: one whose names are known without it."""
    if isinstance(node, ast.Expr):
        return not isinstance(node.value, ast.Constant)  # a docstring
    if isinstance(node, ast.Assign):
        names = {name.id for target in node.targets for name in ast.walk(target) if isinstance(name, ast.Name)}
        return any(isinstance(name, ast.Name) and name.id in names for name in ast.walk(node.value))
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in ("TYPE_CHECKING", "__name__ == '__main__'")


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "np", "math", "distributed")


def _header(statement: ast.stmt) -> ast.stmt:
    """A statement without the statements in it."""
    blocks = [name for name in ("body", "orelse", "finalbody", "handlers") if getattr(statement, name, None)]
    return _with(statement, **{name: [ast.Pass()] if name == "body" else [] for name in blocks})


def _spliced(text: str, node: Any, new: str) -> str:
    lines = text.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = text.encode()
    return (whole[:start] + new.encode() + whole[end:]).decode()


def negated_conditions(file: str, text: str) -> list[Mutant]:
    """`if` with its condition turned round, beside what `mutants_of` makes of the condition's parts."""
    found = []
    for function, node in _ifs(ast.parse(text)):
        new = f"not ({ast.unparse(node.test)})"
        key = "::".join((file, function, ast.unparse(_header(node)).split("\n")[0], f"{ast.unparse(node.test)} => not"))
        found.append(Mutant(file, function, node.lineno, key, _spliced(text, node.test, f"({new})")))
    return found


def _ifs(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.If]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}" if function else node.name
    if isinstance(node, ast.If) and not _is_guard(node):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from _ifs(child, function)


def sampled(file: str, count: int | None, seed: int) -> tuple[list[Mutant], int]:
    """So many of a file's mutants, and how many there are; a larger sample holds the smaller one."""
    text = (ROOT / file).read_text()
    every = mutants_of(file, text) + negated_conditions(file, text)
    random.Random(f"{seed}:{file}").shuffle(every)
    return every[:count], len(every)


# Which tests meet which functions


def test_files_near(file: str, reach: int) -> list[Path]:
    """Test files that reach a file by at most so many imports, the nearest first; through packages without a step."""
    modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    packages = {path: _imports(path) for path in modules if path.name == "__init__.py"}
    imports = {path: _imports(path, packages=packages) for path in modules}
    tests = sorted((ROOT / "tests").glob("*.py"))
    helpers = {path.stem: _imports(path, packages=packages) for path in tests if not path.stem.startswith("test_")}
    near = []
    for test in (path for path in tests if path.stem.startswith("test_")):
        reached, distance = _imports(test, helpers, packages), 1
        while distance < reach and ROOT / file not in reached:
            reached, distance = reached.union(*(imports.get(path, set()) for path in reached)), distance + 1
        if ROOT / file in reached:
            near.append((distance, test.stat().st_size, test))
    return [test for *_, test in sorted(near)]


def _imports(
    path: Path, helpers: Mapping[str, set[Path]] = NOTHING, packages: Mapping[Path, set[Path]] = NOTHING
) -> set[Path]:
    """Our files that a file imports, and those that its packages and helpers do."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of a package, or what the package itself names
                inner = f"{node.module}.{alias.name}"
                names.add(inner if (ROOT / f"{inner.replace('.', '/')}.py").is_file() else node.module)
    found = set().union(*(helpers.get(name, set()) for name in names))
    for name in names:
        place = ROOT / name.replace(".", "/")
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            found |= {file, *packages.get(file, ())} if file.is_file() else set()
    return found


class Recorder:
    """A pytest plugin: of each test that passes, its seconds, and which of our functions it calls."""

    def __init__(self, root: str) -> None:
        self.prefixes = tuple(f"{root}/{package}/" for package in PACKAGES)
        self.root, self.tests = root, {}
        self.calls: set[tuple[str, str]] = set()

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.prefixes):
            self.calls.add((code.co_filename, code.co_qualname))

    def pytest_runtest_setup(self) -> None:
        self.calls = set()
        sys.setprofile(self._profile)

    def pytest_runtest_logreport(self, report: Any) -> None:
        if report.when == "call" and report.passed:
            calls = ((Path(file).relative_to(self.root), name.replace(".<locals>", "")) for file, name in self.calls)
            functions = {f"{file}::{name}" for file, name in calls}
            self.tests[report.nodeid] = {"seconds": report.duration, "calls": sorted(functions)}
        if report.when == "teardown":
            sys.setprofile(None)


def record(test: Path, tree: Path, folder: Path) -> dict[str, Any]:
    """What each test of a file calls, kept in `folder` until the file changes."""
    kept, digest = folder / f"{test.stem}.json", hashlib.sha256(test.read_bytes()).hexdigest()
    if kept.is_file() and (known := json.loads(kept.read_text()))["sha256"] == digest:
        return known["tests"]
    found = folder / f".{test.stem}.tests"

    def run() -> int:
        recorder = Recorder(str(tree))
        _pytest([f"tests/{test.name}", "-q"], [recorder])
        found.write_text(json.dumps(recorder.tests))
        return 0

    in_child(run, tree, 900)
    tests = json.loads(found.read_text()) if found.is_file() else {}
    found.unlink(missing_ok=True)
    kept.write_text(json.dumps({"sha256": digest, "tests": tests}))
    return tests


def tests_for(mutant: Mutant, tests: dict[str, Any], budget: float) -> list[str]:
    """Those that call its function, else any of its file, the fastest first, as long as `budget` seconds allow."""
    of_file = f"{mutant.file}::"
    wanted = {of_file + mutant.function} if mutant.function else set()
    calling = [name for name, test in tests.items() if wanted.intersection(test["calls"])]
    if not calling:  # a constant, a default, a class's own line
        calling = [name for name, test in tests.items() if any(call.startswith(of_file) for call in test["calls"])]
    chosen, total = [], 0.0
    for name in sorted(calling, key=lambda name: tests[name]["seconds"]):
        total += tests[name]["seconds"]
        if chosen and total > budget:
            break
        chosen.append(name)
    return chosen


# Running


def _pytest(arguments: list[str], plugins: Sequence[Any] = ()) -> int:
    import pytest

    return int(pytest.main([*arguments, "-p", "no:cacheprovider", "--no-header", "--tb=no"], plugins=plugins))


def in_child(run: Callable[[], int], tree: Path, seconds: float) -> int | None:
    """Its exit code when it runs in a fork whose modules come from `tree`; None where it took longer."""

    def child() -> None:
        os.setsid()
        log = os.open(tree / "mutation.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        sys.path[:] = [str(tree), *(place for place in sys.path if place not in ("", str(ROOT)))]
        os.environ |= {"PYTHONPATH": str(tree), "PYTHONDONTWRITEBYTECODE": "1", "OMP_NUM_THREADS": "1"}
        sys.dont_write_bytecode = True
        os._exit(run())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        process.join(seconds)
        return None if process.is_alive() else process.exitcode
    finally:
        if process.is_alive():  # too late, or we are told to end
            with contextlib.suppress(ProcessLookupError):
                os.killpg(process.pid, signal.SIGKILL)  # it and what it started
            process.join()


def outcome(mutant: Mutant, names: list[str], tree: Path, seconds: float) -> dict[str, Any]:
    """Whether a test of these fails with the mutant in the tree, and which."""
    if not names:
        return {"status": "survived", "by": "no test calls it"}
    path, wanted = tree / mutant.file, tree / "mutation.tests"
    before = path.read_text()
    wanted.write_text("\n".join(names))
    path.write_text(mutant.source)
    started = time.monotonic()
    try:
        code = in_child(lambda: _pytest(["-x", "-q", f"@{wanted}"]), tree, seconds)
    finally:
        path.write_text(before)
    taken = {"seconds": round(time.monotonic() - started, 1), "tests": len(names)}
    if code is None:
        return {"status": "killed", "by": f"more than {seconds:.0f} s", **taken}
    if code == 0:
        return {"status": "survived", "by": "", **taken}
    failed = re.search(r"^(?:FAILED|ERROR) (.*)", (tree / "mutation.log").read_text(errors="replace"), re.MULTILINE)
    return {"status": "killed", "by": failed[1].split(" - ")[0] if failed else f"exit code {code}", **taken}


def equivalents() -> dict[str, str]:
    """Key -> why, from lines that begin at the margin and the indented ones below each."""
    found, key = {}, ""
    for line in EQUIVALENT.read_text().splitlines() if EQUIVALENT.is_file() else ():
        if line.strip() and not line.startswith((" ", "#")):
            key = line.strip()
            found[key] = ""
        elif line.startswith(" ") and key:
            found[key] = f"{found[key]} {line.strip()}".strip()
    lacking = [key for key, why in found.items() if not why]
    if lacking:
        raise SystemExit(f"{EQUIVALENT}: says not why {lacking[0]} changes nothing")
    return found


def test(file: str, options: argparse.Namespace, tree: Path, out: Path) -> dict[str, Any]:
    """Try a file's sample, and keep what is found in `out`."""
    (out / "calls").mkdir(parents=True, exist_ok=True)
    kept = out / f"{file.replace('/', '.')}.json"
    known = json.loads(kept.read_text())["mutants"] if kept.is_file() else {}
    same = equivalents()
    chosen, total = sampled(file, options.sample, options.seed)
    tests: dict[str, Any] = {}
    for path in [path.resolve() for path in options.tests or ()] or test_files_near(file, options.reach):
        print(f"{file}: tests of {path.name}", flush=True)
        tests |= record(path, tree, out / "calls")
    all_tests = hashlib.sha256(b"".join(path.read_bytes() for path in sorted((ROOT / "tests").glob("*.py"))))
    text, results = (ROOT / file).read_text(), {}
    for number, mutant in enumerate(chosen, 1):
        before = known.get(mutant.key, {})
        done = before.get("status") == "killed" or before.get("tests_sha256") == all_tests.hexdigest()
        result = before if done else outcome(mutant, tests_for(mutant, tests, options.budget), tree, options.timeout)
        if mutant.key in same:
            result = {**result, "status": "equivalent", "by": same[mutant.key]}
        elif result["status"] == "equivalent":
            result = {**result, "status": "survived"}
        diff = difflib.unified_diff(text.splitlines(), mutant.source.splitlines(), lineterm="", n=0)
        results[mutant.key] = {
            **result, "line": mutant.line, "function": mutant.function, "diff": list(diff)[3:],
            "tests_sha256": all_tests.hexdigest(),
        }  # fmt: skip
        if not done:
            print(f"{file}:{mutant.line} {number}/{len(chosen)} {result['status']} {result['by'][:70]}", flush=True)
        everything = {"file": file, "possible": total, "mutants": {**known, **results}}
        temporary = kept.with_suffix(".tmp")
        temporary.write_text(json.dumps(everything, indent=1))
        temporary.replace(kept)
    return {"file": file, "possible": total, "mutants": results}


def table(found: list[dict[str, Any]]) -> str:
    """A line per file, and all together; of the mutants that are not equivalent, how many were killed."""
    lines = ["| file | mutants | tried | equivalent | survived | killed, % |", "|---|---:|---:|---:|---:|---:|"]
    sums = [0, 0, 0, 0]
    for one in found:
        status = [mutant["status"] for mutant in one["mutants"].values()]
        numbers = [one["possible"], len(status), status.count("equivalent"), status.count("survived")]
        sums = [total + number for total, number in zip(sums, numbers)]
        lines.append(_row(one["file"], numbers))
    return "\n".join([*lines, _row("together", sums)])


def _row(title: str, numbers: list[int]) -> str:
    real = numbers[1] - numbers[2]
    return f"| {title} | {' | '.join(map(str, numbers))} | {100 * (real - numbers[3]) / max(1, real):.1f} |"


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.mutation", description=__doc__.split("\n")[0])
    parser.add_argument("--files", nargs="+", required=True, help="our files or folders, from the root of the tree")
    parser.add_argument("--sample", type=int, help="mutants of each file (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--reach", type=int, default=1, help="imports from a test file to the mutated one (1)")
    parser.add_argument("--tests", nargs="+", type=Path, help="test files, in place of those that reach it")
    parser.add_argument("--budget", type=float, default=30, help="seconds of tests that a mutant meets (30)")
    parser.add_argument("--timeout", type=float, default=150, help="seconds after which a mutant is killed (150)")
    parser.add_argument("--out", type=Path, default=ROOT / "runs" / "mutation", help="folder for what is found")
    options = parser.parse_args()
    files = []
    for name in options.files:
        place = ROOT / name
        files += sorted(place.rglob("*.py")) if place.is_dir() else [place]
    import numpy  # noqa: F401  once, for all forks
    import pytest  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    found = []
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        for path in files:
            if path.name != "__init__.py":
                found.append(test(str(path.relative_to(ROOT)), options, tree, options.out))
    for one in found:
        for key, mutant in one["mutants"].items():
            if mutant["status"] == "survived":
                print(f"\n{one['file']}:{mutant['line']} survived {mutant['by']}\n{key}", *mutant["diff"], sep="\n")
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
