"""``--junit`` and ``--sarif``: what CI systems show of a gate."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from xml.etree import ElementTree

import pytest
import torch
from command import run

from rgap.auditing import Level
from rgap.cli.ci import Files
from rgap.cli.condition import Condition

NAMES = ["<b>&amp;", "a\x00\x1b[2J\ufffe", 'two\nlines "quoted"', "\udcff\u202e", "]]>", "é 漢"]


def audited(levels: list[Level], names: list[str] | None = None) -> Any:
    """What `Files` reads of an audit."""
    names = names or [f"sample {at}" for at in range(len(levels))]
    cases = [SimpleNamespace(name=name, level=level, results=()) for name, level in zip(names, levels, strict=True)]

    class Audited(SimpleNamespace):
        def __str__(self) -> str:
            return f"of {', '.join(names)}"

    return Audited(cases=cases, seconds=1.5)


def files(tmp_path: Path, condition: Condition | None = None) -> Files:
    return Files(tmp_path / "new" / "rgap.xml", tmp_path / "new" / "rgap.sarif", condition)


def shown(written: Files) -> list[ElementTree.Element]:
    assert written.junit is not None
    return list(ElementTree.parse(written.junit).iter("testcase"))


def findings(written: Files) -> list[dict[str, Any]]:
    assert written.sarif is not None
    (found,) = json.loads(written.sarif.read_text())["runs"]
    rules = [rule["id"] for rule in found["tool"]["driver"]["rules"]]
    assert all(rules[each["ruleIndex"]] == each["ruleId"] for each in found["results"])
    return list(found["results"])


@pytest.mark.parametrize(
    ("levels", "condition", "fails", "rules"),
    [
        ([Level.EXACT, Level.NOTHING], Condition("exact", ">", 0.0), True, ["fail-if", "exact"]),
        ([Level.RECOGNISABLE, Level.EXACT], Condition("exact", ">", 0.5), False, ["exact", "recognisable"]),
        ([Level.NOTHING, Level.NOTHING_SENT], Condition("recognisable", ">", 0.0), False, []),
        ([Level.NOTHING], Condition("psnr", ">", 20.0), False, []),
    ],
    ids=str,
)
def test_what_fails_is_what_the_condition_says(
    levels: list[Level], condition: Condition, fails: bool, rules: list[str], tmp_path: Path
) -> None:
    written = files(tmp_path, condition)
    written.add("audit", audited(levels), "cnn6", tmp_path / "audit.html")
    written.write(ended=True)
    (test,) = shown(written)
    assert (test.find("failure") is not None) == fails
    assert ElementTree.parse(tmp_path / "new" / "rgap.xml").getroot().get("failures") == str(int(fails))
    assert [each["ruleId"] for each in findings(written)] == rules
    assert [each["level"] for each in findings(written)] == [
        "error" if rule == "fail-if" else "warning" for rule in rules
    ]


@pytest.mark.parametrize("name", NAMES, ids=ascii)
def test_names_of_others_break_no_file(name: str, tmp_path: Path) -> None:
    written = files(tmp_path, Condition("exact", ">", 0.0))
    written.add(name, audited([Level.EXACT], [name]), name, tmp_path / f"{name!a}.html")
    written.write(ended=True)
    (test,) = shown(written)
    for text in (test.get("name"), test.findtext("failure"), test.findtext("system-out")):
        assert text
        assert not any(each in text for each in "\x00\x1b\ufffe\udcff\u202e")
    assert len(findings(written)) == 2


def test_rounds_are_tests_of_one_file(tmp_path: Path) -> None:
    written = files(tmp_path, Condition("exact", ">", 0.0))
    for at, level in enumerate((Level.NOTHING, Level.EXACT, Level.RECOGNISABLE)):
        written.add(f"round-{at}", audited([level]), "cnn6", tmp_path / "audit.html")
    written.write(ended=True)
    assert [test.find("failure") is not None for test in shown(written)] == [False, True, False]
    assert len({each["partialFingerprints"]["rgap/v1"] for each in findings(written)}) == 3


SMALL = ("audit", "--input-shape", "1,8,8", "--count", 1, "--attack", "bias")


def test_both_files_of_an_audit_point_at_the_model(
    capsys: pytest.CaptureFixture[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "gated_net.py").write_text(
        "from torch import nn\n\n\ndef make(classes):\n    return nn.Sequential(nn.Flatten(), nn.Linear(64, classes))\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", list(sys.path))
    options = ("--junit", "ci/rgap.xml", "--sarif", "ci/rgap.sarif", "--fail-if", "exact>0")
    with torch.random.fork_rng():
        code, _, err = run(capsys, *SMALL, "--model", "gated_net:make(classes=4)", *options)
    assert (code, err.splitlines()[-1]) == (3, "rgap: exact>0 holds")
    (test,) = ElementTree.parse("ci/rgap.xml").iter("testcase")
    assert test.get("name") == "audit: not exact>0"
    assert "astronaut" in str(test.findtext("failure"))
    (sarif,) = json.loads(Path("ci/rgap.sarif").read_text())["runs"]
    (place,) = sarif["results"][0]["locations"]
    assert place["physicalLocation"] == {"artifactLocation": {"uri": "gated_net.py"}, "region": {"startLine": 4}}


def test_what_broke_off_leaves_an_error_and_never_an_old_file(
    capsys: pytest.CaptureFixture[str], tmp_path: Path
) -> None:
    junit, sarif = tmp_path / "rgap.xml", tmp_path / "rgap.sarif"
    options = ("--junit", junit, "--sarif", sarif, "--fail-if", "exact>0", "--out", tmp_path / "out")
    assert run(capsys, *SMALL, "--model", "fcn3", *options)[0] == 0
    assert ElementTree.parse(junit).find(".//error") is None
    assert run(capsys, *SMALL, "--model", "fcn3", *options, "--weights", tmp_path / "none.safetensors")[0] == 1
    assert ElementTree.parse(junit).find(".//error") is not None
    (found,) = json.loads(sarif.read_text())["runs"]
    assert not found["invocations"][0]["executionSuccessful"]


def test_a_test_needs_a_condition(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    code, _, err = run(capsys, *SMALL, "--junit", tmp_path / "rgap.xml")
    assert code == 2
    assert "--junit needs --fail-if" in err
