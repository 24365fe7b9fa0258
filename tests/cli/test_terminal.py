"""What commands print on a real terminal of what is foreign."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from hostile import NAMES
from PIL import Image
from safetensors.torch import save_file
from terminal import EVIL, assert_harmless, ended, seen

MODEL = ("--model", "hostile_model:make", "--input-shape", "1,2,2")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "hostile_model.py").write_text(
        "from torch import nn\n\n\ndef make():\n    return nn.Sequential(nn.Flatten(), nn.Linear(4, 3))\n\n\n"
        f"def fails():\n    raise ValueError({EVIL!r})\n"
    )
    return tmp_path


def test_names_of_files_and_folders(folder: Path) -> None:
    commands = []
    for kind in ("escape", "right to left", "isolate", "C1", "no UTF-8", "markup"):
        name = NAMES[kind].replace("/", "|")
        (folder / name / name).mkdir(parents=True)
        (folder / name / name / f"{name}.png").write_bytes(b"")
        (folder / f"{name}.toml").write_text("a = [")
        audit = ["audit", "--data", name, *MODEL, "--count", "1", "--attack", "bias"]
        commands += [audit, ["sweep", f"{name}.toml"], ["sweep", "show", f"{name}.sqlite"], ["federation", f"{name}-"]]
        commands += [["attack", f"{name}.pt", *MODEL], ["rank", "--model", f"{name}:make"], ["reproduce", name]]
    text = seen(commands, folder)
    assert_harmless(text)
    assert len(ended(text)) == len(commands)
    assert set(ended(text)) <= {"1", "2"}


def test_contents(folder: Path) -> None:
    """Names of tensors, messages of libraries and of a user's own code, a store's texts, and a report that is made."""
    right = {"1.weight": torch.ones(3, 4), "1.bias": torch.ones(3)}
    save_file({**right, EVIL: torch.ones(1)}, folder / "names.safetensors")
    save_file(right, folder / "header.safetensors", {"rgap": json.dumps({"format": EVIL})})
    head = json.dumps({"1.weight": {"dtype": EVIL, "shape": [3, 4], "data_offsets": [0, 48]}}, ensure_ascii=False)
    raw = head.encode()
    (folder / "library.safetensors").write_bytes(len(raw).to_bytes(8, "little") + raw + bytes(48))
    torch.save({EVIL: torch.ones(1)}, folder / "names.pt")
    (folder / "pickle.pt").write_bytes(b"\x80\x02cx\x1b[2Jy\nz\n)R.")
    commands = [
        ["attack", name, *MODEL]
        for name in sorted(each.name for each in folder.iterdir() if each.suffix in (".pt", ".safetensors"))
    ]
    commands += [["rank", "--model", "hostile_model:fails", "--input-shape", "1,2,2"]]
    (folder / "evil.toml").write_text(f"{json.dumps(EVIL)} = 1\n")
    commands += [["audit", "--config", "evil.toml"], ["sweep", "evil.toml"]]
    (folder / "in" / EVIL).mkdir(parents=True)
    Image.new("L", (9, 9), 3).save(folder / "in" / EVIL / f"{EVIL}.png")
    commands += [["audit", "--data", "in", *MODEL, "--count", "1", "--attack", "bias", "--out", f"{EVIL}-out"]]
    text = seen(commands, folder)
    assert_harmless(text)
    assert ended(text)[-1] == "0"
    assert len(ended(text)) == len(commands)
    assert text.count("[U+001B]") >= 5
