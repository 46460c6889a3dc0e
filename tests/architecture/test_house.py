"""Rules of the house that no other tool keeps."""

from __future__ import annotations

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
MAX_SOURCE_LINES, MAX_TEST_LINES, MAX_FUNCTION_LINES = 400, 800, 60


def _python_files() -> Iterator[Path]:
    for path in sorted(ROOT.rglob("*.py")):
        parts = path.relative_to(ROOT).parts
        is_ours = not any(part.startswith(".") or part == "build" for part in parts)
        if is_ours and "_pb2" not in path.name:
            yield path


FILES = list(_python_files())
SOURCES = [path for path in FILES if "tests" not in path.relative_to(ROOT).parts]


def _name(path: Path) -> str:
    return path.relative_to(ROOT).as_posix()


def _functions(tree: ast.AST) -> Iterator[ast.FunctionDef | ast.AsyncFunctionDef]:
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef):
            yield node


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_files_and_functions_stay_readable(path: Path) -> None:
    text = path.read_text(encoding="utf-8")
    limit = MAX_SOURCE_LINES if path in SOURCES else MAX_TEST_LINES
    assert text.count("\n") <= limit, f"{_name(path)} has more than {limit} lines"
    for function in _functions(ast.parse(text)):
        num_lines = (function.end_lineno or 0) - function.lineno + 1
        assert num_lines <= MAX_FUNCTION_LINES, f"{function.name} has {num_lines} lines"


@pytest.mark.parametrize("path", FILES, ids=_name)
def test_a_file_opens_with_what_it_does(path: Path) -> None:
    assert ast.get_docstring(ast.parse(path.read_text(encoding="utf-8")))


@pytest.mark.parametrize("path", [p for p in SOURCES if p.name == "__init__.py"], ids=_name)
def test_an_init_is_a_docstring(path: Path) -> None:
    """Import contracts do not see into __init__ files: there must be nothing to see."""
    body = ast.parse(path.read_text(encoding="utf-8")).body
    assert len(body) == 1
    assert isinstance(body[0], ast.Expr)


FORBIDDEN = re.compile(
    r"\bpickle\b|\btrust_remote_code\b|\btorch\.load\b|^\s*global\s", re.MULTILINE
)


@pytest.mark.parametrize("path", SOURCES, ids=_name)
def test_nothing_runs_code_that_came_with_data(path: Path) -> None:
    code = ast.unparse(_without_docstrings(ast.parse(path.read_text(encoding="utf-8"))))
    assert not FORBIDDEN.search(code)


def _without_docstrings(tree: ast.Module) -> ast.Module:
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [s for s in body if not _is_text(s)] or [ast.Pass()]  # type: ignore[attr-defined]
    return tree


def _is_text(statement: ast.stmt) -> bool:
    return (
        isinstance(statement, ast.Expr)
        and isinstance(statement.value, ast.Constant)
        and isinstance(statement.value.value, str)
    )


@pytest.mark.parametrize(
    "module", ["pilotlight.server.main", "pilotlight.cli", "pilotlight.client.generate"]
)
def test_what_users_start_does_not_import_torch(module: str) -> None:
    code = f"import {module}, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_only_the_configuration_and_who_passes_it_on_read_the_environment() -> None:
    readers = [_name(p) for p in SOURCES if re.search(r"os\.environ|os\.getenv", p.read_text())]
    assert readers == ["engine/spawn.py", "server/config.py"]
