"""TOML that nobody would write, as options and as plans."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from hostile import NAMES, refused

DEEP = "[" * 100_000
VALUES = {
    "a list": "[1, 2]",
    "a table": "{a = 1}",
    "a date": "2026-01-01",
    "a time": "2026-01-01T00:00:00Z",
    "NaN": "nan",
    "infinity": "-inf",
    "a whole number without end": "9" * 5000,
    "more than a machine has": "9" * 30,
    "text that acts": '"\\u001b[2J\\u202e"',
    "nothing": '""',
    "true": "true",
    "brackets": DEEP,
}
"""In a scalar's place."""
SCALARS = ("seed", "budget", "local-steps", "count", "value-range")
WHOLE: dict[str, bytes] = {
    "brackets": b"a = " + DEEP.encode(),
    "braces": b"a = " + b"{a=" * 100_000,
    "dots": b".".join([b"a"] * 50_000) + b" = 1",
    "tables": b"".join(b"[a%d]\n" % at for at in range(30_000)),
    "no UTF-8": b"a = '\xff\xfe'",
    "UTF-16": "a = 1".encode("utf-16"),
    "zeros": bytes(1000),
    "names that act": b'"\\u001b[2J\\u202e" = 1',
    "text without end": b"a = '" + b"x" * 200_000,
    "a megabyte": b"# \n" * 350_000,
    "names twice": b"seed = 1\nseed = 2\n",
}
PLAN = 'models = ["fcn3"]\nattacks = ["bias"]\ninput-shape = [1, 4, 4]\n[images]\ncount = 1\n'
PLANS = {
    "no models": 'attacks = ["bias"]\n',
    "models of numbers": PLAN.replace('["fcn3"]', "[1, 2]"),
    "a model that acts": PLAN.replace("fcn3", "\\u001b[2J\\u202e"),
    "a model that is nowhere": PLAN.replace("fcn3", "nowhere_at_all:make"),
    "a model that is no function": PLAN.replace("fcn3", "os:sep"),
    "a model in brackets": PLAN.replace("fcn3", "[red]x[/red]"),
    "an attack that acts": PLAN.replace("bias", "\\u001b[2J"),
    "attacks in attacks": PLAN.replace('["bias"]', '[["bias"]]'),
    "a width of NaN": "widths = [nan]\n" + PLAN,
    "a seed beyond all": f"seeds = [{'9' * 30}]\n" + PLAN,
    "a stage below zero": "stages = [-1]\n" + PLAN,
    "a shape of NaN": PLAN.replace("[1, 4, 4]", "[nan, nan, nan]"),
    "a shape of nothing": PLAN.replace("[1, 4, 4]", "[]"),
    "a shape beyond all": PLAN.replace("[1, 4, 4]", "[3, 4000000000, 4000000000]"),
    "a range of NaN": "value-range = [nan, 1]\n" + PLAN,
    "a range without end": "value-range = [0, inf]\n" + PLAN,
    "a range of one": "value-range = [1, 1]\n" + PLAN,
    "a loss that acts": 'loss = "\\u001b[2J"\n' + PLAN,
    "a strength of NaN": 'defences = [{name = "Clip", strengths = [nan]}]\n' + PLAN,
    "a strength below zero": 'defences = [{name = "GaussianNoise", strengths = [-1]}]\n' + PLAN,
    "a defence that acts": 'defences = ["\\u001b[2J"]\n' + PLAN,
    "weights that are nowhere": PLAN.replace('"fcn3"', '{name = "fcn3", weights = "no\\u001bwhere"}'),
    "weights that are a device": PLAN.replace('"fcn3"', '{name = "fcn3", weights = "/dev/zero"}'),
    "pictures that are nowhere": PLAN + 'data = "no\\u001bwhere"\n',
    "more pictures than there are": PLAN.replace("count = 1", "count = 1000000000"),
    "a date": "noise-seed = 2026-01-01\n" + PLAN,
    "a field that acts": '"\\u001b[2J" = 1\n' + PLAN,
    "a rate of NaN": PLAN + "[training]\nrate = nan\n",
}


@pytest.fixture
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


def small(config: object) -> tuple[object, ...]:
    return ("audit", "--config", config, "--model", "fcn3", "--input-shape", "1,4,4", "--attack", "bias")


@pytest.mark.parametrize("value", VALUES)
@pytest.mark.parametrize("name", SCALARS)
def test_an_option(name: str, value: str, folder: Path) -> None:
    if (name, value) == ("budget", "more than a machine has"):
        return  # patience
    (folder / "a.toml").write_text(f"{name} = {VALUES[value]}\n")
    refused(*small("a.toml"))
    assert [path.name for path in folder.iterdir()] == ["a.toml"]


@pytest.mark.parametrize("kind", WHOLE)
def test_a_file(kind: str, folder: Path) -> None:
    (folder / "a.toml").write_bytes(WHOLE[kind])
    assert "a.toml" in refused(*small("a.toml"))
    assert "a.toml" in refused("sweep", "a.toml", "--workers", "1")


@pytest.mark.parametrize("kind", NAMES)
def test_names(kind: str, folder: Path) -> None:
    path = folder / NAMES[kind].replace("/", "|")
    for text in (None, "a = ["):
        if text is not None:
            path.write_text(text)
        refused(*small(path))
        refused("sweep", path, "--workers", "1")


def test_3_gib(folder: Path) -> None:
    (folder / "a.toml").write_bytes(b"#")
    os.truncate(folder / "a.toml", 3 * 2**30)
    refused(*small("a.toml"))
    refused("sweep", "a.toml", "--workers", "1")


@pytest.mark.parametrize("kind", PLANS)
def test_a_plan(kind: str, folder: Path) -> None:
    (folder / "a.toml").write_text(PLANS[kind])
    refused("sweep", "a.toml", "--workers", "1", "--dry-run")
    refused("sweep", "a.toml", "--workers", "1")


@pytest.mark.parametrize("value", ["nan", "inf", "-1", "1e400", "\x1b[2J"])
@pytest.mark.parametrize(
    "option",
    ["--budget", "--learning-rate", "--dp-rate", "--value-range", "--seed", "--mean", "--std", "--schedule"],
)
def test_a_number(option: str, value: str, folder: Path) -> None:
    if value == "-1" and option in ("--seed", "--mean", "--std"):
        return  # a number, and a std that is refused with the model
    for text in (value, f"1,{value}"):
        refused("audit", option, text, "--sends", "difference")
