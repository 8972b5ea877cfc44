"""Check that no identifier or config key holds a word that the project has retired.

The list stands in pyproject.toml under `tool.deebert.retired-words`. Only definitions are checked:
names of other libraries may hold any word. The names of tests are sentences and are not checked.
"""

import ast
import re
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path

import yaml

ROOT = Path(__file__).parent.parent
FOLDERS = ("deebert", "benchmarks", "tests")


def defined(tree: ast.AST) -> Iterator[tuple[int, str]]:
    """Yield the line and the name of everything that a module defines."""
    for node in ast.walk(tree):
        if isinstance(node, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef):
            if not node.name.startswith("test_"):
                yield node.lineno, node.name
        elif isinstance(node, ast.arg):
            yield node.lineno, node.arg
        elif isinstance(node, ast.Name | ast.Attribute) and isinstance(node.ctx, ast.Store):
            yield node.lineno, node.id if isinstance(node, ast.Name) else node.attr
        elif isinstance(node, ast.alias) and node.asname:
            yield node.lineno, node.asname


def keys(values: object) -> Iterator[str]:
    """Yield the keys of nested mappings."""
    if isinstance(values, dict):
        for key, value in values.items():
            yield str(key)
            yield from keys(value)


def words(name: str) -> set[str]:
    """Split a name into its words: `ExitScores` and `exit_scores` into `exit` and `scores`."""
    return {word.lower() for word in re.findall(r"[A-Z]?[a-z]+|[A-Z]+(?![a-z])", name)}


def main() -> int:
    """Print every definition with a retired word; return the exit code."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["tool"]["deebert"]
    retired, allowed = set(project["retired-words"]), set(project["allowed-names"])
    faults = []
    files = [
        *ROOT.glob("*.py"),
        *(file for name in FOLDERS for file in (ROOT / name).rglob("*.py")),
    ]
    for file in sorted(files):
        for line, name in defined(ast.parse(file.read_text("utf-8"))):
            if name not in allowed and (bad := words(name) & retired):
                faults.append(f"{file.relative_to(ROOT)}:{line}: {name}: {', '.join(bad)}")
        if words(file.stem) & retired and file.stem not in allowed:
            faults.append(f"{file.relative_to(ROOT)}: a retired word names a module")
    for file in sorted((ROOT / "conf").rglob("*.yaml")):
        for name in keys(yaml.safe_load(file.read_text("utf-8"))):
            if bad := words(name) & retired:
                faults.append(f"{file.relative_to(ROOT)}: {name}: {', '.join(bad)}")
    print("\n".join(faults) or "no retired words")
    return bool(faults)


if __name__ == "__main__":
    sys.exit(main())
