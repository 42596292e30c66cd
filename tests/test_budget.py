"""The size of the code is kept: a stranger reads router.py in an hour or two."""

from __future__ import annotations

import ast
import io
import tokenize
from pathlib import Path

import pytest
from conftest import ROOT

SOURCES = sorted([ROOT / "router.py", *ROOT.glob("parts/*.py")])
QUIET = (
    tokenize.COMMENT, tokenize.NL, tokenize.NEWLINE, tokenize.INDENT, tokenize.DEDENT,
    tokenize.ENDMARKER,
)  # fmt: skip
NESTS = (ast.If, ast.For, ast.While, ast.With, ast.Try)


def code_lines(path: Path) -> int:
    """Lines that hold code: no blank lines, comments or docstrings."""
    text = path.read_text()
    tokens = tokenize.generate_tokens(io.StringIO(text).readline)
    lines = {token.start[0] for token in tokens if token.type not in QUIET}
    for node in ast.walk(ast.parse(text)):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef) and ast.get_docstring(
            node
        ):
            lines -= set(range(node.body[0].lineno, node.body[0].end_lineno + 1))
    return len(lines)


def functions(path: Path) -> list[ast.FunctionDef]:
    return [
        node for node in ast.walk(ast.parse(path.read_text())) if isinstance(node, ast.FunctionDef)
    ]


def depth(node: ast.AST, level: int = 0) -> int:
    inner = [n for n in ast.iter_child_nodes(node) if not isinstance(n, ast.FunctionDef)]
    return max([level, *(depth(n, level + isinstance(n, NESTS)) for n in inner)])


def test_router_stays_within_its_budget():
    assert len((ROOT / "router.py").read_text().splitlines()) <= 1800
    assert code_lines(ROOT / "router.py") <= 1300


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_leaves_stay_small(path):
    assert path.name == "router.py" or code_lines(path) <= 600


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_functions_are_short_and_flat(path):
    long = [f.name for f in functions(path) if f.end_lineno - f.lineno >= 30]
    deep = [f.name for f in functions(path) if depth(f) > 3]

    assert (long, deep) == ([], [])


@pytest.mark.parametrize("path", SOURCES, ids=lambda path: path.name)
def test_public_functions_have_docstrings(path):
    public = [f for f in functions(path) if not f.name.startswith("_")]

    assert [f.name for f in public if not ast.get_docstring(f)] == []


def test_sections_of_router_stand_in_the_order_of_its_path():
    text = (ROOT / "router.py").read_text()
    names = [
        "reading a request", "circuit breakers", "choosing a category", "upstreams",
        "the router: walk, relay", "routes", "application",
    ]  # fmt: skip

    places = [text.index(f"# --- {name} -") for name in names]

    assert places == sorted(places)
