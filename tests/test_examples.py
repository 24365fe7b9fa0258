"""Every example runs, on less than it would, and leaves a report."""

from __future__ import annotations

import importlib.util
import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType

import pytest

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
