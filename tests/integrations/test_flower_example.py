"""The example: three clients over two rounds, and what the server saw of each, on less than it would."""

from __future__ import annotations

import importlib
import json
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest
from flwr.common.config import validate_config

from rgap.federation import read
from rgap.report import render

EXAMPLE = Path(__file__).parents[2] / "examples" / "federation"


@pytest.fixture
def example(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    monkeypatch.syspath_prepend(str(EXAMPLE))
    yield importlib.import_module("run")
    for name in ("run", "client", "server"):
        sys.modules.pop(name)


def test_the_server_sees_the_pictures_of_all_but_the_client_that_defends_itself(
    example: ModuleType, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    for size in (8, 12):  # run again, it starts over
        audits = example.main(tmp_path, iterations=2, size=size)
    assert len(audits) == len(list(read(tmp_path / "captured"))) == 2
    for number, audit in enumerate(audits, 1):
        assert [case.name for case in audit.cases] == ["client 1", "client 2", "client 3"]
        best = [case.best for case in audit.cases]
        assert all(result is not None and result.psnr > 40 for result in best[:2])
        assert best[2] is not None
        assert best[2].psnr < 20
        document = json.loads((tmp_path / f"round-{number}.json").read_text())
        assert render(document) == (tmp_path / f"round-{number}.html").read_text()
    lines = capsys.readouterr().out.splitlines()
    assert sum(line.startswith("client ") for line in lines) == 2 * (1 + 2 * 3 + 1)


def test_it_is_a_flower_app() -> None:
    settings = tomllib.loads((EXAMPLE / "pyproject.toml").read_text())
    assert validate_config(settings, check_module=True, project_dir=EXAMPLE) == (True, [], [])
