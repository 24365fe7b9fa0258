"""Every example runs, on less than it would, and leaves a report."""

from __future__ import annotations

import ast
import importlib.util
import json
import re
import sys
from collections.abc import Callable
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import pytest
import torch

from rgap import Audit, Target, audit, defences, losses
from rgap.attacks import Bias, Closed
from rgap.report import render

EXAMPLES = Path(__file__).parent.parent / "examples"
ARGUMENTS: dict[str, dict[str, int]] = {
    "own_cnn": {"count": 1, "iterations": 2},
    "photographs": {"count": 1, "size": 8},
    "tabular": {"count": 3},
}


def load(name: str) -> ModuleType:
    spec = importlib.util.spec_from_file_location(f"example_{name}", EXAMPLES / f"{name}.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_all_of_them_are_tried() -> None:
    assert {path.stem for path in EXAMPLES.glob("*.py")} == set(ARGUMENTS)


def check(name: str, out: Path) -> Audit:
    main: Callable[..., Audit] = load(name).main
    found = main(out / "new", **ARGUMENTS[name])
    assert sorted(path.name for path in (out / "new").iterdir()) == ["audit.html", "audit.json"]
    said = json.loads((out / "new" / "audit.json").read_text())
    assert render(said) == (out / "new" / "audit.html").read_text()
    assert len(said["samples"]) == ARGUMENTS[name]["count"]
    return found


def test_own_cnn(tmp_path: Path) -> None:
    found = check("own_cnn", tmp_path)
    assert [ran.name for ran in found.attacks if ran.obstacle is None] == ["Closed", "iDLG"]
    assert any("avg_pool2d" in str(ran.obstacle) for ran in found.attacks)


def test_tabular(tmp_path: Path) -> None:
    found = check("tabular", tmp_path)
    assert found.verdict.level.value == "exact"
    assert {case.best.attack for case in found.cases if case.best is not None} == {Bias().name}


def test_photographs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(defences.GaussianNoise, "levels", (1e-6, 1.0))
    example = load("photographs")

    def closed_alone(target: Target, samples: object, **asked: object) -> Audit:
        assert isinstance(target.loss, losses.Logistic)
        return audit(target, samples, attacks=[Closed()], **asked)  # type: ignore[arg-type]

    monkeypatch.setattr(example.rgap, "audit", closed_alone, raising=False)
    found: Audit = example.main(tmp_path, **ARGUMENTS["photographs"])
    assert found.cases[0].results
    assert [sweep.name for sweep in found.sweeps] == ["GaussianNoise"]
    assert render(json.loads((tmp_path / "audit.json").read_text())) == (tmp_path / "audit.html").read_text()


class DataFrame(list[dict[str, Any]]):
    """In the place of pandas' own: rows, of which columns can be chosen."""

    def __init__(self, rows: list[dict[str, Any]], columns: list[str]):
        super().__init__(rows)

    def __getitem__(self, chosen: Any) -> Any:
        return [{name: row[name] for name in chosen} for row in self]


def test_the_notebook(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    """Cell by cell; what the last line of a cell gives is what a notebook shows."""
    if importlib.util.find_spec("pandas") is None:
        stand_in = SimpleNamespace(DataFrame=DataFrame, __spec__=ModuleSpec("pandas", None))  # torch asks for the spec
        monkeypatch.setitem(sys.modules, "pandas", stand_in)
    notebook = json.loads((EXAMPLES / "notebook.ipynb").read_text())
    assert (notebook["nbformat"], notebook["metadata"]["kernelspec"]["name"]) == (4, "python3")
    codes = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert all(cell["outputs"] == [] for cell in notebook["cells"] if cell["cell_type"] == "code")
    scope, shown = dict[str, Any](), list[Any]()
    with torch.random.fork_rng():
        for code in codes:
            *body, last = ast.parse(code).body
            kept = [last] if not isinstance(last, ast.Expr) else []
            exec(compile(ast.Module([*body, *kept], []), "notebook", "exec"), scope)
            if isinstance(last, ast.Expr):
                shown.append(eval(compile(ast.Expression(last.value), "notebook", "eval"), scope))
    told = capsys.readouterr().out.splitlines()
    assert told[0].startswith("Trying Closed, Bias on 2 samples")
    assert next(line for line in told if re.match(r"\d+/\d+ ", line)).startswith("1/4 ")
    rank, audited, rows, found = shown
    assert "No layer protects the input" in str(rank)
    assert audited.verdict.level.value == "exact"
    assert "<iframe" in audited._repr_html_()
    assert [row["level"] for row in rows if row["attack"] == "Closed"] == ["exact"] * 2
    assert found.status.value == "exact"
