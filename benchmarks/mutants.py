"""Mutants of a file: the file with one thing changed, an operator, a constant, a statement or a
call left out.

`benchmarks.mutation` runs the tests over them.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import hashlib
import inspect
import itertools
from collections.abc import Iterator
from pathlib import Path
from types import CodeType
from typing import Any

ROOT = Path(__file__).parents[1]

OPERATORS = {
    ast.Add: [ast.Sub],
    ast.Sub: [ast.Add],
    ast.Mult: [ast.Div],
    ast.Div: [ast.Mult],
    ast.FloorDiv: [ast.Mult],
    ast.Mod: [ast.FloorDiv],
    ast.Pow: [ast.Mult],
    ast.BitAnd: [ast.BitOr],
    ast.BitOr: [ast.BitAnd],
    ast.LShift: [ast.RShift],
    ast.RShift: [ast.LShift],
    ast.Lt: [ast.LtE, ast.GtE],
    ast.LtE: [ast.Lt, ast.Gt],
    ast.Gt: [ast.GtE, ast.LtE],
    ast.GtE: [ast.Gt, ast.Lt],
    ast.Eq: [ast.NotEq],
    ast.NotEq: [ast.Eq],
    ast.Is: [ast.IsNot],
    ast.IsNot: [ast.Is],
    ast.In: [ast.NotIn],
    ast.NotIn: [ast.In],
    ast.And: [ast.Or],
    ast.Or: [ast.And],
}
SWAPS = [
    ("sigmoid", "tanh"),
    ("min", "max"),
    ("amin", "amax"),
    ("argmin", "argmax"),
    ("minimum", "maximum"),
    ("sum", "mean"),
    ("exp", "expm1"),
    ("log", "log1p"),
    ("sin", "cos"),
    ("softmax", "log_softmax"),
    ("relu", "gelu"),
    ("any", "all"),
    ("floor", "ceil"),
    ("zeros", "ones"),
    ("zeros_like", "ones_like"),
    ("cumsum", "cumprod"),
    ("square", "abs"),
    ("sqrt", "square"),
    ("new_zeros", "new_ones"),
    ("silu", "relu"),
    ("mse_loss", "l1_loss"),
]
SWAPPED = {a: b for pair in SWAPS for a, b in (pair[::-1], pair)}
WORDS = {
    "mean": "sum",
    "sum": "mean",
    "bicubic": "bilinear",
    "bilinear": "bicubic",
    "amin": "amax",
    "amax": "amin",
}
DROPPED = {
    "detach",
    "abs",
    "clamp",
    "exp",
    "log",
    "sqrt",
    "square",
    "softmax",
    "neg",
    "where",
    "masked_fill",
    "clone",
}


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
        key = "::".join(
            (
                file,
                function,
                ast.unparse(_header(statement)).split("\n")[0],
                " ".join(change.split()),
            )
        )
        counts[key] = counts.get(key, 0) + 1
        key += f" ({counts[key]})" if counts[key] > 1 else ""
        source = _spliced(text, node, new if isinstance(node, ast.stmt) else f"({new})")
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
            if name in ("annotation", "returns", "decorator_list") or isinstance(
                node, ast.JoinedStr
            ):
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
            renamed = (
                {"attr": SWAPPED[name]}
                if isinstance(function, ast.Attribute)
                else {"id": SWAPPED[name]}
            )
            yield _with(node, func=_with(function, **renamed))
        if (
            isinstance(function, ast.Attribute)
            and name in DROPPED
            and not _is_module(function.value)
        ):
            yield function.value
        for place, keyword in enumerate(node.keywords):
            if keyword.arg in ("min", "max"):
                other = ast.keyword({"min": "max", "max": "min"}[keyword.arg], keyword.value)
                yield _with(
                    node, keywords=[*node.keywords[:place], other, *node.keywords[place + 1 :]]
                )


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
        names = {
            name.id
            for target in node.targets
            for name in ast.walk(target)
            if isinstance(name, ast.Name)
        }
        return any(isinstance(name, ast.Name) and name.id in names for name in ast.walk(node.value))
    return isinstance(node, ast.AugAssign | ast.Raise | ast.Continue | ast.Break)


def _is_guard(node: ast.stmt) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test) in (
        "TYPE_CHECKING",
        "__name__ == '__main__'",
    )


def _is_module(node: ast.expr) -> bool:
    return isinstance(node, ast.Name) and node.id in ("torch", "F", "np", "math", "distributed")


def _header(statement: ast.stmt) -> ast.stmt:
    """A statement without the statements in it."""
    blocks = [
        name
        for name in ("body", "orelse", "finalbody", "handlers")
        if getattr(statement, name, None)
    ]
    return _with(statement, **{name: [ast.Pass()] if name == "body" else [] for name in blocks})


def _spliced(text: str, node: Any, new: str) -> str:
    lines = text.encode().splitlines(keepends=True)
    start = sum(map(len, lines[: node.lineno - 1])) + node.col_offset
    end = sum(map(len, lines[: node.end_lineno - 1])) + node.end_col_offset
    whole = text.encode()
    return (whole[:start] + new.encode() + whole[end:]).decode()


def negated_conditions(file: str, text: str) -> list[Mutant]:
    """`if` with its condition turned round, beside what `mutants_of` makes of the condition's
    parts."""
    found = []
    for function, node in _ifs(ast.parse(text)):
        new = f"not ({ast.unparse(node.test)})"
        key = "::".join(
            (
                file,
                function,
                ast.unparse(_header(node)).split("\n")[0],
                f"{ast.unparse(node.test)} => not",
            )
        )
        found.append(
            Mutant(file, function, node.lineno, key, _spliced(text, node.test, f"({new})"))
        )
    return found


def _ifs(node: ast.AST, function: str = "") -> Iterator[tuple[str, ast.If]]:
    if isinstance(node, ast.FunctionDef | ast.ClassDef):
        function = f"{function}.{node.name}" if function else node.name
    if isinstance(node, ast.If) and not _is_guard(node):
        yield function, node
    for child in ast.iter_child_nodes(node):
        yield from _ifs(child, function)


def sampled(file: str, count: int | None, seed: int) -> tuple[list[Mutant], int]:
    """So many of a file's mutants, and how many there are.

    A larger sample holds the smaller one, and whether a mutant is in it depends on nothing but its
    key: a file that moves, or changes elsewhere, keeps its sample.
    """
    text = (ROOT / file).read_text()
    every = mutants_of(file, text) + negated_conditions(file, text)
    folder = file.removesuffix(Path(file).name)

    def rank(mutant: Mutant) -> str:
        return hashlib.sha256(f"{seed}:{mutant.key.removeprefix(folder)}".encode()).hexdigest()

    return list(itertools.islice(filter(_compiles, sorted(every, key=rank)), count)), len(every)


def _compiles(mutant: Mutant) -> bool:
    try:
        compile(mutant.source, mutant.file, "exec")
    except SyntaxError:
        return False
    return True


def replaced_functions(before: CodeType, after: CodeType) -> list[tuple[CodeType, CodeType]] | None:
    """(old, new) code of each function that differs between two modules, outermost functions only.

    None where what runs on import differs (a constant, a default, a decorator): such a module has
    to be imported anew.
    """
    if before.co_flags & inspect.CO_OPTIMIZED:  # a function
        return [] if _same(before, after) else [(before, after)]
    if not _same_but_code(before, after):
        return None
    found: list[tuple[CodeType, CodeType]] = []
    for old, new in zip(_codes(before), _codes(after), strict=True):
        inner = replaced_functions(old, new)
        if inner is None:
            return None
        found += inner
    return found


def _same(before: CodeType, after: CodeType) -> bool:
    return _same_but_code(before, after) and all(map(_same, _codes(before), _codes(after)))


def _same_but_code(before: CodeType, after: CodeType) -> bool:
    """Whether two blocks do the same, whatever the functions do that they define; line numbers do
    not count."""
    names = (
        "co_code",
        "co_names",
        "co_varnames",
        "co_freevars",
        "co_cellvars",
        "co_argcount",
        "co_flags",
    )
    constants = [
        [(type(value), repr(value)) for value in code.co_consts if not isinstance(value, CodeType)]
        for code in (before, after)
    ]
    same = all(getattr(before, name) == getattr(after, name) for name in names)
    return same and constants[0] == constants[1] and len(_codes(before)) == len(_codes(after))


def _codes(code: CodeType) -> list[CodeType]:
    return [value for value in code.co_consts if isinstance(value, CodeType)]
