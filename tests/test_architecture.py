"""The house plan, read from the code: what may import what, and what no module does."""

from __future__ import annotations

import ast
import functools
from collections.abc import Collection
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PACKAGES = (
    "training",
    "tokenizer",
    "priors",
    "generate",
    "eval",
    "tessera",  # the console command
)  # each may import those before it
MODULES = sorted(
    path.relative_to(ROOT) for package in PACKAGES for path in (ROOT / package).rglob("*.py")
)
HEAVY = {
    "transformers",
    "datasets",
    "sklearn",
    "lpips",
    "matplotlib",
    "jinja2",
    "torchvision",
    "torch_fidelity",
    "tensorboard",
}


MOST_LINES = 320  # about 300, of a file that is not in LONG
LONG = {  # longer files, and why each is one
    "eval/generation.py": "to be told apart",
    "eval/metrics/codec.py": "to be told apart",
    "eval/metrics/rate_distortion.py": "to be told apart",
    "eval/record.py": "to be told apart",
    "eval/reference.py": "to be told apart",
    "eval/run.py": "to be told apart",
    "generate/drawing.py": "to be told apart",
    "priors/backbone.py": "to be told apart",
    "priors/families/uniform.py": "one process: its rates, its loss and its sampler",
    "tokenizer/autoencoder.py": "one module and the two configurations that make it",
    "tokenizer/data/dataset.py": "one data set: what it skips is what it is",
    "tokenizer/data/tar_index.py": "one format, read header by header",
    "tokenizer/dry_run.py": "the costs of every loss, which are one sum",
    "tokenizer/encode.py": "one command: a cache is whole or not there",
    "tokenizer/encoders/foundation.py": "one adapter of six families of models",
    "tokenizer/objective.py": "one loss with its configuration and weights",
    "tokenizer/published/files.py": "one question: where a file and its configuration are",
    "tokenizer/published/load.py": "one question: which tensor is whose",
    "tokenizer/published/pickles.py": "one reader, which runs nothing of what it reads",
    "tokenizer/quantizers/codebook.py": "one codebook: its search, statistics and restarts",
    "tokenizer/quantizers/fused.py": "one kernel and the proof of its bound",
    "tokenizer/quantizers/search_on_cpu.py": "one algorithm: products, a bound, what decides",
    "training/checkpoint.py": "one format: a run's folder, its checkpoints and weights",
    "training/config.py": "one language: layers, types and references of a YAML",
    "training/estimate.py": "one sum, and its table",
    "training/folder.py": "one list of files, and all that goes by it",
    "training/loop.py": "one loop, in the order of its steps",
    "training/tracing.py": "one trace: operations, bytes and casts of the same pass",
}


@functools.cache
def tree_of(path: Path) -> ast.Module:
    return ast.parse((ROOT / path).read_text(), str(path))


def imports(tree: ast.AST) -> set[str]:
    """Full names of all imported modules, wherever in the file."""
    found = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            found.add("." * node.level + (node.module or ""))
    return found


def calls(tree: ast.AST) -> list[tuple[str, dict[str, ast.expr]]]:
    """(dotted name, keyword arguments) of all calls."""
    return [
        (ast.unparse(node.func), {keyword.arg or "**": keyword.value for keyword in node.keywords})
        for node in ast.walk(tree)
        if isinstance(node, ast.Call)
    ]


def is_constant(keywords: dict[str, ast.expr], name: str, value: object) -> bool:
    return isinstance(keywords.get(name), ast.Constant) and keywords[name].value is value


def test_there_is_something_to_walk():
    assert len(MODULES) > 30 and {path.parts[0] for path in MODULES} == set(PACKAGES)


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_keeps_the_house_rules(path):
    tree, source = tree_of(path), (ROOT / path).read_text()
    names = imports(tree)

    # Every package asks first whether the packages found under our names are ours.
    roots = {name.split(".")[0] for name in names - {"tessera.names"}}
    downstream = set(PACKAGES[PACKAGES.index(path.parts[0]) + 1 :])
    assert not roots & downstream, "imports point upstream"
    assert not any(name.startswith(".") for name in names), "imports are absolute"
    assert "x_transformers" not in roots or path == Path("priors/block.py"), (
        "one file knows x_transformers"
    )
    assert not any(
        alias.name == "*"
        for node in ast.walk(tree)
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    ), "no star imports"
    at_import = {
        name.split(".")[0] for node in tree.body for name in imports(node) if _is_import(node)
    }
    assert not at_import & HEAVY, "heavy imports stay inside functions"

    assert ast.get_docstring(tree) and source.startswith('"""'), (
        "the first line says what the module is"
    )
    length = source.count("\n")
    assert length <= MOST_LINES or str(path) in LONG, f"{length} lines: one file, one idea"


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_module_runs_nothing_that_it_reads(path):
    tree = tree_of(path)
    roots = {name.split(".")[0] for name in imports(tree)}
    assert not roots & {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
    assert "yaml" not in roots or path == Path("training/words.py"), "one file knows YAML"
    assert "omegaconf" not in roots or path == Path("training/config.py"), (
        "one file knows omegaconf"
    )
    for name, keywords in calls(tree):
        last = name.split(".")[-1]
        assert name != "torch.load" or is_constant(keywords, "weights_only", True), (
            f"{name} without weights_only=True"
        )
        assert "allow_pickle" not in keywords or is_constant(keywords, "allow_pickle", False), (
            f"{name} unpickles"
        )
        assert "trust_remote_code" not in keywords or is_constant(
            keywords, "trust_remote_code", False
        ), name
        if name.startswith("yaml."):
            safe = ("yaml.safe_load", "yaml.dump", "yaml.compose", "yaml.MarkedYAMLError")
            assert name in safe, f"{name} may run what it reads"
        assert name not in ("eval", "exec", "os.system", "__import__"), (
            f"{name} runs what it is given"
        )
        assert not is_constant(keywords, "shell", True), f"{name} runs a shell"
        if last == "from_pretrained" and "safetensors" not in name:
            assert "use_safetensors" not in keywords or is_constant(
                keywords, "use_safetensors", True
            ), name


@pytest.mark.parametrize("path", MODULES, ids=str)
def test_a_command_reports_errors_in_one_line(path):
    """Whatever runs as a program does so through run_command."""
    guards = [
        node
        for node in tree_of(path).body
        if isinstance(node, ast.If) and "__main__" in ast.unparse(node.test)
    ]
    for guard in guards:
        assert [ast.unparse(node) for node in guard.body] == ["run_command(main)"]


def test_the_tree_of_imports_has_no_cycle():
    """Of imports at any depth: within a function one only hides a circle."""
    modules = {
        ".".join(path.with_suffix("").parts).removesuffix(".__init__"): path for path in MODULES
    }
    edges = {
        name: {
            other
            for node in ast.walk(tree_of(path))
            if _is_import(node)
            for other in _imported(node, modules)
            if other != name
        }
        for name, path in modules.items()
    }
    done: set[str] = set()

    def visit(name: str, above: tuple[str, ...]) -> None:
        assert name not in above, f"a cycle: {' -> '.join([*above, name])}"
        if name not in done:
            for other in sorted(edges[name]):
                visit(other, (*above, name))
            done.add(name)

    for name in modules:
        visit(name, ())


def _is_import(node: ast.AST) -> bool:
    return isinstance(node, ast.Import | ast.ImportFrom)


def _imported(node: ast.AST, modules: Collection[str]) -> set[str]:
    """Our modules that a statement names: `from a import b` is a.b where that is one, else a."""
    if isinstance(node, ast.ImportFrom):
        inner = {f"{node.module}.{alias.name}" for alias in node.names}
        outer = any(name not in modules for name in inner)
        return (inner | ({node.module or ""} if outer else set())) & set(modules)
    assert isinstance(node, ast.Import)
    return {alias.name for alias in node.names} & set(modules)
