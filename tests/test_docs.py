"""The pages: what they name exists."""

import ast
import re
from pathlib import Path

import pytest
from conftest import LONGEST, MARKED

ROOT = Path(__file__).parents[1]
PAGES = [
    *sorted((ROOT / "docs").glob("*.md")),
    *(ROOT / f"{name}.md" for name in "README CONTRIBUTING SECURITY".split()),
]


def defined(*folders: str) -> set[str]:
    """The names of all functions and classes below these folders."""
    trees = [ast.parse(file.read_text()) for folder in folders for file in (ROOT / folder).rglob("*.py")]
    kinds = ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef
    return {node.name for tree in trees for node in ast.walk(tree) if isinstance(node, kinds)}


def test_the_tests_of_the_invariants_exist() -> None:
    named = re.findall(r"`(test_\w+)`", (ROOT / "docs" / "invariants.md").read_text())
    assert len(named) > 80
    assert not set(named) - defined("tests")


def test_the_functions_of_the_mathematics_exist() -> None:
    named = re.findall(r"`([A-Za-z_]+)`", (ROOT / "docs" / "math.md").read_text())
    others = {"T_inner", "PAD_I", "PAD_F", "where"}
    assert len(set(named) - others) > 20
    assert not set(named) - others - defined("xlstm_ray")


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.name)
def test_files_and_pages_that_are_named_exist(page: Path) -> None:
    text = page.read_text()
    links = [page.parent / link for link in re.findall(r"\]\(([\w./-]+)[)#]", text)]
    paths = re.findall(r"`\.?/?((?:scripts|deploy|docs|examples|tests|actors|xlstm_ray|\.ci)/[\w./-]*)`", text)
    missing = [link for link in [*links, *(ROOT / path for path in paths)] if not link.exists()]
    assert not missing


def test_what_the_fast_loop_leaves_out_exists() -> None:
    tests = ROOT / "tests"
    there = (
        defined("tests") | {file.stem for file in tests.rglob("test_*.py")} | {file.name for file in tests.iterdir()}
    )
    assert not {name for names in (*MARKED.values(), LONGEST) for name in names.split()} - there
