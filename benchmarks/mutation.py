"""Mutation testing: python -m benchmarks.mutation --files priors/families/uniform.py --sample 40

A mutant is one of our files with one thing changed (benchmarks/mutants.py). A test that fails with
it kills it; one that no test kills tells of a line that no test holds, or changes nothing
(benchmarks/equivalent_mutants.txt, with why).

A process imports torch once. A fork of it collects the tests near the files (those that import a
file or a package that does; with --reach 2 a module that does, …) once, runs them once to see which
tests call which functions, and is forked again for every mutant: there the mutant's function gets
its new code, and the tests that call it run, those that killed the mutants before it first, up to
--budget seconds of them, until one fails. A mutant that shows on import alone (a constant, a
default) is imported anew. Seconds are those of the processor, so that a busy machine changes
nothing. What was found is kept in --out after every mutant: the same command goes on where it
stopped, a larger --sample adds to it, and survivors meet the tests again when tests that call them
have changed.
"""

from __future__ import annotations

import argparse
import ast
import contextlib
import difflib
import functools
import gc
import hashlib
import importlib
import json
import math
import multiprocessing
import os
import re
import resource
import shutil
import signal
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from types import CodeType, FunctionType
from typing import Any

from benchmarks.mutants import ROOT, Mutant, replaced_functions, sampled

PACKAGES = ("training", "tokenizer", "priors", "generate", "eval")
EQUIVALENT = Path(__file__).with_name("equivalent_mutants.txt")
LEFT_OUT = shutil.ignore_patterns(
    ".git", ".venv", "runs", "__pycache__", ".*_cache", ".hypothesis", "*.egg-info"
)
TEST_SECONDS = 5  # a test that takes longer, watched, is left out
NOTHING: Mapping[Any, Any] = {}


# Which tests meet which functions


def test_files_near(file: str, reach: int) -> list[Path]:
    """Test files that reach a file by at most so many imports, the nearest first; through packages
    without a step."""
    modules = [path for package in PACKAGES for path in sorted((ROOT / package).rglob("*.py"))]
    packages = {path: _imports(path) for path in modules if path.name == "__init__.py"}
    imports = {path: _imports(path, packages=packages) for path in modules} if reach > 1 else {}
    tests = sorted((ROOT / "tests").rglob("*.py"))
    helpers = {
        path.stem: _imports(path, packages=packages)
        for path in tests
        if not path.stem.startswith("test_")
    }
    near = []
    for test in (path for path in tests if path.stem.startswith("test_")):
        reached, distance = _imports(test, helpers, packages), 1
        while distance < reach and ROOT / file not in reached:
            reached, distance = (
                reached.union(*(imports.get(path, set()) for path in reached)),
                distance + 1,
            )
        if ROOT / file in reached:
            near.append((distance, test.stat().st_size, test))
    return [test for *_, test in sorted(near)]


def _imports(
    path: Path,
    helpers: Mapping[str, set[Path]] = NOTHING,
    packages: Mapping[Path, set[Path]] = NOTHING,
) -> set[Path]:
    """Our files that a file imports, and those that its packages and helpers do."""
    names = _imported_names(path)
    found = set().union(*(helpers.get(name, set()) for name in names))
    for name in names:
        place = ROOT / name.replace(".", "/")
        for file in (place.with_suffix(".py"), place / "__init__.py"):
            found |= {file, *packages.get(file, ())} if file.is_file() else set()
    return found


@functools.cache
def _imported_names(path: Path) -> frozenset[str]:
    """Modules that a file imports, in functions too."""
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom) and node.module:
            for alias in node.names:  # a module of a package, or what the package itself names
                inner = f"{node.module}.{alias.name}"
                names.add(
                    inner if (ROOT / f"{inner.replace('.', '/')}.py").is_file() else node.module
                )
    return frozenset(names)


def tests_for(
    mutant: Mutant,
    tests: dict[str, Any],
    budget: float,
    killers: Sequence[str] = (),
    *,
    all_of_them: bool = False,
) -> list[str]:
    """Tests that call its function, else any of its file, as long as `budget` seconds allow.

    First those that killed others, the latest first; then those of a file named after the mutant's;
    the fastest first. `all_of_them`: then those that do not call it, which may read a default.
    """
    of_file = f"{mutant.file}::"
    wanted = {of_file + mutant.function} if mutant.function else set()
    calling = {name for name, test in tests.items() if wanted.intersection(test["calls"])}
    if not calling:  # a constant, a default, a class's own line
        calling = {
            name
            for name, test in tests.items()
            if any(call.startswith(of_file) for call in test["calls"])
        }
    place = {name: number for number, name in enumerate(reversed(killers))}
    named = f"/test_{Path(mutant.file).stem}.py"

    def order(name: str) -> tuple[bool, float, bool, float]:
        first = place.get(name, math.inf)
        return name not in calling, first, named not in name, tests[name]["seconds"]

    chosen, total = [], 0.0
    for name in sorted(tests if all_of_them else calling, key=order):
        total += tests[name]["seconds"]
        if chosen and total > budget:
            break
        chosen.append(name)
    return chosen


# Running


class TooLong(BaseException):
    """A test took more than TEST_SECONDS."""


class Recorder:
    """Of each test that passes, its seconds, and which of our functions it calls."""

    def __init__(self, root: str) -> None:
        self.prefixes = tuple(f"{root}/{package}/" for package in PACKAGES)
        self.root, self.tests, self.start = root, {}, 0.0
        self.calls: set[tuple[str, str]] = set()

    def _profile(self, frame: Any, event: str, _: Any) -> None:
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(self.prefixes):
            self.calls.add((code.co_filename, code.co_qualname))

    def before(self) -> None:
        def stop(*_: Any) -> None:
            raise TooLong

        signal.signal(signal.SIGPROF, stop)
        signal.setitimer(signal.ITIMER_PROF, TEST_SECONDS)
        self.calls, self.start = set(), _seconds()
        sys.setprofile(self._profile)

    def after(self, name: str, passed: bool) -> None:
        sys.setprofile(None)
        signal.setitimer(signal.ITIMER_PROF, 0)
        if passed:
            calls = (
                (Path(file).relative_to(self.root), name.replace(".<locals>", ""))
                for file, name in self.calls
            )
            functions = {f"{file}::{name}" for file, name in calls}
            self.tests[name] = {"seconds": _seconds() - self.start, "calls": sorted(functions)}


def _seconds() -> float:
    """The processor's, of this process and of those that it started and that have ended."""
    return sum(os.times()[:4])


class Session:
    """A pytest plugin that collects tests once and hands them to `work` in place of running them
    all."""

    def __init__(self, work: Callable[[Session], None]) -> None:
        self.work, self.items, self.failed = work, {}, False

    def pytest_runtest_logreport(self, report: Any) -> None:
        self.failed |= report.failed

    def pytest_runtestloop(self, session: Any) -> bool:
        self.items = {item.nodeid: item for item in session.items}
        self.work(self)
        return True

    def passes(self, name: str, following: str | None) -> bool:
        """Run one test, with what it shares with the one that follows."""
        item, self.failed = self.items[name], False
        after = self.items[following] if following else None
        item.config.hook.pytest_runtest_protocol(item=item, nextitem=after)
        return not self.failed


def _pytest(arguments: list[str], plugins: Sequence[Any] = ()) -> int:
    import pytest

    plain = [
        "-q",
        "-s",
        "-p",
        "no:cacheprovider",
        "-p",
        "no:xdist",
        "-o",
        "timeout=0",
        "--no-header",
        "--tb=no",
    ]
    return int(pytest.main([*arguments, *plain], plugins=plugins))


def in_child(run: Callable[[], int], tree: Path, seconds: float | None = None) -> int | None:
    """Its exit code when it runs in a fork whose modules come from `tree`; None where it took
    longer.

    Seconds are the processor's; one that waits may take ten times as many.
    """

    def child() -> None:
        signal.signal(signal.SIGTERM, signal.SIG_DFL if seconds else lambda *_: sys.exit(143))
        os.setsid()
        if seconds:
            resource.setrlimit(resource.RLIMIT_CPU, (math.ceil(seconds), math.ceil(seconds) + 1))
        log = os.open(tree / "mutation.log", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(log, 1), os.dup2(log, 2)
        os.chdir(tree)
        sys.path[:] = [
            str(tree),
            *(place for place in sys.path if place not in ("", str(ROOT), str(tree))),
        ]
        os.environ |= {
            "PYTHONPATH": str(tree),
            "PYTHONDONTWRITEBYTECODE": "1",
            "OMP_NUM_THREADS": "1",
        }
        sys.dont_write_bytecode = False  # the tree's own
        os._exit(run())

    process = multiprocessing.get_context("fork").Process(target=child)
    process.start()
    try:
        process.join(10 * seconds + 60 if seconds else None)
        late = process.is_alive() or process.exitcode in (-signal.SIGXCPU, -signal.SIGKILL)
        return None if late else process.exitcode
    finally:
        if process.is_alive():  # too late, or we are told to end
            process.terminate()
            process.join(5)
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)  # and what it started
        process.join()


@contextlib.contextmanager
def written(mutant: Mutant, tree: Path, stamps: list[int]) -> Any:
    """A mutant in the tree, with a date of its own, since compiled files go by dates."""
    path = tree / mutant.file
    before, was = path.read_text(), path.stat()
    path.write_text(mutant.source)
    stamps.append(1_000_000_000 + len(stamps))
    os.utime(path, (stamps[-1], stamps[-1]))
    try:
        yield
    finally:
        path.write_text(before)
        os.utime(path, ns=(was.st_atime_ns, was.st_mtime_ns))


def new_code(mutant: Mutant, tree: Path) -> list[tuple[FunctionType, CodeType]] | None:
    """Functions in this process with the code that the mutant gives them; None where it has to be
    imported anew."""
    path = tree / mutant.file
    before, after = (compile(text, str(path), "exec") for text in (path.read_text(), mutant.source))
    replaced = replaced_functions(before, after)
    if not replaced:
        return None
    wanted = {(old.co_qualname, old.co_firstlineno): new for old, new in replaced}
    found, lacking = [], set(wanted)
    for function in _functions().get(str(path), ()):
        key = (function.__code__.co_qualname, function.__code__.co_firstlineno)
        if new := wanted.get(key):
            if len(new.co_freevars) != len(function.__code__.co_freevars):
                return None
            found.append((function, new))
            lacking.discard(key)
    return None if lacking else found


def _is_installed(module: Any) -> bool:
    return "site-packages" in (getattr(module, "__file__", None) or "")


@functools.cache
def _functions() -> dict[str, list[FunctionType]]:
    """Functions by the file that they come from."""
    found: dict[str, list[FunctionType]] = {}
    for thing in gc.get_objects():
        if type(thing) is FunctionType:  # isinstance would wake what is lazy
            found.setdefault(thing.__code__.co_filename, []).append(thing)
    return found


def outcome_here(
    replaced: list[tuple[FunctionType, CodeType]],
    names: list[str],
    session: Session,
    tree: Path,
    seconds: float,
) -> dict[str, Any]:
    """Whether a test of these fails in a fork of this process where functions have other code, and
    which."""
    told = tree / "mutation.killer"
    told.write_text("")

    def run() -> int:
        for function, code in replaced:
            function.__code__ = code
        for name, following in zip(names, [*names[1:], None]):
            told.write_text(name)
            if not session.passes(name, following):
                return 1
        return 0

    started = time.monotonic()
    code = in_child(run, tree, seconds)
    return _result(code, told.read_text(), seconds, started, names)


def outcome_anew(names: list[str], tree: Path, seconds: float) -> dict[str, Any]:
    """The same in a fork that imports everything of ours."""
    wanted = tree / "mutation.tests"
    wanted.write_text("\n".join(names))
    started = time.monotonic()
    code = in_child(lambda: _pytest(["-x", f"@{wanted}"]), tree, seconds)
    failed = re.search(
        r"^(?:FAILED|ERROR) (.*)", (tree / "mutation.log").read_text(errors="replace"), re.MULTILINE
    )
    return _result(
        code, failed[1].split(" - ")[0] if failed else f"exit code {code}", seconds, started, names
    )


def _result(
    code: int | None, killer: str, seconds: float, started: float, names: list[str]
) -> dict[str, Any]:
    taken = {"seconds": round(time.monotonic() - started, 1), "tests": len(names)}
    if code is None:
        return {"status": "killed", "by": f"more than {seconds:.0f} s: {killer}", **taken}
    return {"status": "killed" if code else "survived", "by": killer if code else "", **taken}


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


class Bench:
    """Samples of files, the tests near them, and what was found."""

    def __init__(
        self, files: dict[str, list[str]], options: argparse.Namespace, tree: Path
    ) -> None:
        self.options, self.tree, self.out, self.stamps = options, tree, options.out, []
        self.calls, self.report = options.out / "calls", os.fdopen(os.dup(1), "w")
        self.calls.mkdir(parents=True, exist_ok=True)
        self.same, self.samples = (
            equivalents(),
            {file: sampled(file, options.sample, options.seed) for file in files},
        )
        self.near = {file: self._near(file, tests) for file, tests in files.items()}
        self.killers: dict[str, list[str]] = {}

    def _near(self, file: str, tests: list[str]) -> list[Path]:
        if tests:
            return [path for test in tests for path in (ROOT / "tests").rglob(f"test_{test}.py")]
        near = test_files_near(file, self.options.reach)
        return [test for test in near if not any(word in test.stem for word in self.options.skip)]

    def groups(self) -> dict[tuple[Path, ...], list[str]]:
        """Files by the tests near them."""
        found: dict[tuple[Path, ...], list[str]] = {}
        for file, tests in self.near.items():
            found.setdefault(tuple(tests), []).append(file)
        return found

    def recorded(self, test: Path, session: Session | None) -> dict[str, Any]:
        """What each test of a file calls, kept until the file changes; what they import is imported
        here, for forks."""
        kept, digest = (
            self.calls / f"{test.stem}.json",
            hashlib.sha256(test.read_bytes()).hexdigest(),
        )
        known = json.loads(kept.read_text()) if kept.is_file() else {}
        if session and known.get("sha256") != digest:
            known = {"sha256": digest, **self._record(test, session)}
            kept.write_text(json.dumps(known))
        for module in known.get("imports", ()) if session else ():
            with contextlib.suppress(Exception):
                importlib.import_module(module)
        return known.get("tests", {})

    def _record(self, test: Path, session: Session) -> dict[str, Any]:
        names = [
            name for name in session.items if name.split("::")[0] == str(test.relative_to(ROOT))
        ]
        found, before = self.tree / "mutation.calls", set(sys.modules)
        found.write_text(json.dumps({"tests": {}, "imports": []}))

        def run() -> int:
            recorder = Recorder(str(self.tree))
            if names:  # unwatched: the seconds of the first are not those of what all import
                session.passes(names[0], None)
            for name, following in zip(names, [*names[1:], None]):
                recorder.before()
                try:
                    passed = session.passes(name, following)
                except TooLong:  # outside the test itself: what it had set up is still there
                    passed = False
                    session.items[name].session._setupstate.teardown_exact(None)
                recorder.after(name, passed)
                imports = [
                    name
                    for name in sys.modules
                    if name not in before and _is_installed(sys.modules[name])
                ]
                found.write_text(json.dumps({"tests": recorder.tests, "imports": imports}))
            return 0

        in_child(run, self.tree, 600)
        recorded = json.loads(found.read_text())
        seconds = sum(test["seconds"] for test in recorded["tests"].values())
        line = f"{test.name}: {len(recorded['tests'])} of {len(names)} tests, {seconds:.0f} s"
        print(line, file=self.report, flush=True)
        return recorded

    def try_all(self, files: Iterable[str], session: Session | None) -> None:
        """Every mutant that was not tried: in forks of this process, or, without a session, those
        imported anew."""
        for file in files:
            mutants, total = self.samples[file]
            kept = self.out / f"{file.replace('/', '.')}.json"
            known = json.loads(kept.read_text())["mutants"] if kept.is_file() else {}
            tests = {
                name: test
                for path in self.near[file]
                for name, test in self.recorded(path, session).items()
            }
            text = (ROOT / file).read_text()
            digest = hashlib.sha256(
                b"".join(path.read_bytes() for path in sorted(self.near[file]))
            ).hexdigest()
            for mutant in mutants:
                before = known.get(mutant.key, {})
                if before.get("status") == "killed" or before.get("tests_sha256") == digest:
                    self._note(file, before)
                    continue
                if mutant.key in self.same:
                    result = {"status": "equivalent", "by": self.same[mutant.key]}
                else:
                    result = self.outcome(mutant, tests, session)
                if not result:
                    continue
                self._note(file, result)
                diff = difflib.unified_diff(
                    text.splitlines(), mutant.source.splitlines(), lineterm="", n=0
                )
                known[mutant.key] = {
                    **result,
                    "line": mutant.line,
                    "function": mutant.function,
                    "diff": list(diff)[3:],
                    "tests_sha256": digest,
                }
                print(
                    f"{file}:{mutant.line} {result['status']} {result['by'][:90]}",
                    file=self.report,
                    flush=True,
                )
                temporary = kept.with_suffix(".tmp")
                temporary.write_text(
                    json.dumps({"file": file, "possible": total, "mutants": known}, indent=1)
                )
                temporary.replace(kept)

    def _note(self, file: str, result: dict[str, Any]) -> None:
        if result["status"] == "killed":
            killers = self.killers.setdefault(file, [])
            if result["by"] in killers:
                killers.remove(result["by"])
            killers.append(result["by"])

    def outcome(
        self, mutant: Mutant, tests: dict[str, Any], session: Session | None
    ) -> dict[str, Any]:
        killers = self.killers.get(mutant.file, ())
        names = tests_for(mutant, tests, self.options.budget, killers, all_of_them=session is None)
        if not names:
            return {} if session else {"status": "survived", "by": "no test calls it"}
        limit = 20 + 3 * sum(tests[name]["seconds"] for name in names)
        replaced = new_code(mutant, self.tree) if session else None
        if session and replaced is None:
            return {}
        with written(mutant, self.tree, self.stamps):  # also for processes that a test starts
            if replaced:
                return outcome_here(replaced, names, session, self.tree, limit)
            return outcome_anew(names, self.tree, limit + 60)

    def found(self) -> list[dict[str, Any]]:
        """Of each file, its sample's results."""
        results = []
        for file, (mutants, total) in self.samples.items():
            kept = self.out / f"{file.replace('/', '.')}.json"
            known = json.loads(kept.read_text())["mutants"] if kept.is_file() else {}
            mutants = {mutant.key: known[mutant.key] for mutant in mutants if mutant.key in known}
            for key, result in mutants.items():
                if key in self.same:
                    mutants[key] = {**result, "status": "equivalent", "by": self.same[key]}
                elif result["status"] == "equivalent":
                    mutants[key] = {**result, "status": "survived"}
            results.append({"file": file, "possible": total, "mutants": mutants})
        return results


def wilson(part: int, whole: int) -> tuple[float, float]:
    """95 % interval of a share (Wilson 1927)."""
    if not whole:
        return 0.0, 1.0
    z, share = 1.959964, part / whole
    centre, width = (
        share + z * z / (2 * whole),
        z * math.sqrt(share * (1 - share) / whole + (z / (2 * whole)) ** 2),
    )
    return (centre - width) / (1 + z * z / whole), (centre + width) / (1 + z * z / whole)


def table(found: list[dict[str, Any]]) -> str:
    """A line per file, and all together; of the mutants that are not equivalent, how many were
    killed."""
    lines = [
        "| file | mutants | tried | equivalent | survived | killed, % | 95 % interval |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    sums = [0, 0, 0, 0]
    for one in found:
        status = [mutant["status"] for mutant in one["mutants"].values()]
        numbers = [
            one["possible"],
            len(status),
            status.count("equivalent"),
            status.count("survived"),
        ]
        sums = [total + number for total, number in zip(sums, numbers)]
        lines.append(_row(one["file"], numbers))
    return "\n".join([*lines, _row("together", sums)])


def _row(title: str, numbers: list[int]) -> str:
    real = numbers[1] - numbers[2]
    low, high = wilson(real - numbers[3], real)
    share = 100 * (real - numbers[3]) / max(1, real)
    return f"| {title} | {' | '.join(map(str, numbers))} | {share:.1f} | {100 * low:.0f} to {100 * high:.0f} |"


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m benchmarks.mutation", description=__doc__.split("\n")[0]
    )
    parser.add_argument(
        "--files",
        nargs="+",
        required=True,
        help="our files or folders, from the root of the tree; FILE:engine,priors names its tests",
    )
    parser.add_argument("--sample", type=int, help="mutants of each file (all)")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--reach", type=int, default=1, help="imports from a test file to the mutated one (1)"
    )
    parser.add_argument(
        "--skip", nargs="+", default=[], help="words of test files' names that are left out"
    )
    parser.add_argument("--which", default="", help="pytest's -k, of the tests' names")
    parser.add_argument(
        "--budget", type=float, default=15, help="seconds of tests that a mutant meets (15)"
    )
    parser.add_argument(
        "--out", type=Path, default=ROOT / "runs" / "mutation", help="folder for what is found"
    )
    options = parser.parse_args()
    files: dict[str, list[str]] = {}
    for word in options.files:
        name, _, tests = word.partition(":")
        for path in (
            sorted((ROOT / name).rglob("*.py")) if (ROOT / name).is_dir() else [ROOT / name]
        ):
            if path.name != "__init__.py":
                files[str(path.relative_to(ROOT))] = tests.split(",") if tests else []
    import pytest  # noqa: F401  once, for all forks
    import torch

    torch.set_num_threads(1)
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))
    with tempfile.TemporaryDirectory(prefix="mutation-") as folder:
        tree = Path(folder).resolve() / "tree"
        shutil.copytree(ROOT, tree, ignore=LEFT_OUT)
        bench = Bench(files, options, tree)
        for tests, group in bench.groups().items():
            arguments = [
                *(str(path.relative_to(ROOT)) for path in tests),
                "--continue-on-collection-errors",
            ]
            session = Session(functools.partial(bench.try_all, group))
            code = in_child(lambda: _pytest([*arguments, "-k", options.which], [session]), tree)  # noqa: B023
            if code not in (0, 1):  # 1: a test file could not be read, and the others were
                raise SystemExit(
                    f"pytest ended with {code}: {(tree / 'mutation.log').read_text()[-2000:]}"
                )
        bench.try_all(bench.samples, None)
    found = bench.found()
    for one in found:
        for key, mutant in one["mutants"].items():
            if mutant["status"] == "survived":
                print(
                    f"\n{one['file']}:{mutant['line']} survived {mutant['by']}\n{key}",
                    *mutant["diff"],
                    sep="\n",
                )
    print(f"\n{table(found)}")


if __name__ == "__main__":
    main()
