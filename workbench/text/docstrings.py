"""Python source without its docstrings, and the docstrings without the source."""

from __future__ import annotations

import ast
import inspect
import warnings
from collections.abc import Iterator

_Owner = ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef


def parse(source: str) -> ast.Module:
    """The syntax tree of `source`; what its author should be warned of (an invalid escape, say) is not said here."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return ast.parse(source)


def strip_docstrings(source: str, tree: ast.Module) -> str:
    """`source` without the docstring statements of `tree`; `pass` stands in where a body would be left empty."""
    # Column offsets count UTF-8 bytes, and only a line feed ends a line for the parser.
    lines = source.encode().split(b"\n")
    for _, owner, statement, _ in sorted(_docstrings(tree), key=lambda found: found[2].lineno, reverse=True):
        first, last = statement.lineno - 1, _end(statement)[0] - 1
        before, after = lines[first][: statement.col_offset], lines[last][_end(statement)[1] :]
        is_whole_body = len(owner.body) == 1 and not isinstance(owner, ast.Module)
        if is_whole_body or after.lstrip().startswith(b";"):
            lines[first : last + 1] = [before + b"pass" + after]
        elif before.strip() or after.strip():
            lines[first : last + 1] = [before + after]
        else:
            del lines[first : last + 1]
    return b"\n".join(lines).decode().lstrip("\n")


def docstrings(tree: ast.Module) -> Iterator[tuple[str, str]]:
    """Dotted name (empty for the module) and cleaned text of every docstring of `tree`, in the source's order."""
    for name, _, _, text in _docstrings(tree):
        yield name, inspect.cleandoc(text)


def _docstrings(tree: ast.Module) -> Iterator[tuple[str, _Owner, ast.Expr, str]]:
    """Dotted name, owner, statement and raw text of every docstring."""
    pending: list[tuple[str, ast.AST]] = [("", tree)]
    while pending:
        name, node = pending.pop()
        match node:
            case ast.Module() | ast.ClassDef() | ast.FunctionDef() | ast.AsyncFunctionDef():
                match node.body:
                    case [ast.Expr(value=ast.Constant(value=str(text))) as statement, *_]:
                        yield name, node, statement, text
        # Only statements are visited, so `body` is never that of a lambda.
        blocks = ("body", "handlers", "orelse", "finalbody", "cases")
        inner = [child for block in blocks for child in getattr(node, block, [])]
        for child in reversed(inner):
            is_named = isinstance(child, ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef)
            pending.append((f"{name}.{child.name}".lstrip(".") if is_named else name, child))


def _end(statement: ast.stmt) -> tuple[int, int]:
    assert statement.end_lineno is not None and statement.end_col_offset is not None
    return statement.end_lineno, statement.end_col_offset
