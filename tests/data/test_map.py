"""The map of bad input in tests/README.md names tests that exist."""

import ast
import re
from pathlib import Path

import pytest

TESTS = Path(__file__).resolve().parents[1]
ROWS = re.findall(r"^\| (.+?) \| (\S+)::(\S+) \|$", (TESTS / "README.md").read_text(encoding="utf-8"), flags=re.MULTILINE)


def test_the_map_is_whole() -> None:
    """One row for each kind of bad input that the product must answer clearly."""
    assert len(ROWS) == len({what for what, _, _ in ROWS}) >= 36


@pytest.mark.parametrize(("what", "file", "name"), ROWS)
def test_it_exists(what: str, file: str, name: str) -> None:
    tree = ast.parse((TESTS / file).read_text(encoding="utf-8"))
    assert name in {node.name for node in tree.body if isinstance(node, ast.FunctionDef)}, what
