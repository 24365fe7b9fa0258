"""Imports point one way, and attacks can reach neither the truth nor a way to compare with it."""

from __future__ import annotations

import ast
from pathlib import Path

import rgap

ROOT = Path(rgap.__file__).parent
# From the ground up: a part may import those before it.
ORDER = [
    "files", "picture", "printable", "schema", "report", "store", "identity", "linalg", "nn", "inversion", "losses",
    "models", "data", "tables", "metrics", "training", "target", "protocol", "client", "update", "embedding",
    "tensorfiles", "naming", "reading", "federation", "watching", "defences", "checks", "rank", "attacks", "auditing",
    "reproductions", "sweeps", "integrations", "cli", "__main__",
]  # fmt: skip


def imports(path: Path) -> set[str]:
    """The parts of rgap that a file imports, imports for type checking alone included."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module.split(".")[0] == "rgap":
            rest = node.module.split(".")[1:]
            found |= {rest[0]} if rest else {alias.name for alias in node.names}
        elif isinstance(node, ast.Import):
            found |= {alias.name.split(".")[1] for alias in node.names if alias.name.startswith("rgap.")}
    return found


def part(path: Path) -> str:
    return path.relative_to(ROOT).parts[0].removesuffix(".py")


def test_every_part_has_its_place() -> None:
    assert {part(path) for path in ROOT.rglob("*.py")} - {"__init__"} <= set(ORDER)


def test_imports_point_one_way() -> None:
    wrong = [
        (str(path.relative_to(ROOT)), name)
        for path in ROOT.rglob("*.py")
        if part(path) != "__init__"
        for name in imports(path)
        if ORDER.index(name) > ORDER.index(part(path))
    ]
    assert wrong == []


def test_attacks_know_neither_metrics_nor_data() -> None:
    for path in (ROOT / "attacks").rglob("*.py"):
        assert not imports(path) & {"metrics", "data"}, path


def test_inversion_knows_neither_targets_nor_updates() -> None:
    for path in (ROOT / "inversion").rglob("*.py"):
        assert imports(path) <= {"inversion", "nn", "linalg"}, path
