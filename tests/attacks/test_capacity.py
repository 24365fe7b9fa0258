"""How much memory is free."""

from __future__ import annotations

from pathlib import Path

import psutil
import pytest
import torch

from rgap.attacks import capacity as memory

CPU = torch.device("cpu")


def test_no_more_is_free_than_the_machine_has() -> None:
    assert 0 < memory.free(CPU) <= psutil.virtual_memory().total


@pytest.mark.parametrize(("limit", "expected"), [("3000", 2000), ("500", 0), ("max", None), ("", None)])
def test_a_container_may_have_less(
    limit: str, expected: int | None, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    (tmp_path / "max").write_text(limit)
    (tmp_path / "current").write_text("1000")
    there = memory.free(CPU)
    monkeypatch.setattr(memory, "_LIMITS", ((str(tmp_path / "max"), str(tmp_path / "current")), ("/no/such", "/file")))
    found = memory.free(CPU)
    assert found == expected if expected is not None else abs(found - there) < 2**30


@pytest.mark.parametrize(
    ("count", "words"), [(0, "1 MiB"), (5 * 2**20, "5 MiB"), (1.5 * 2**30, "1.5 GiB"), (2**40, "1024.0 GiB")]
)
def test_bytes_in_words(count: float, words: str) -> None:
    assert memory.readable(count) == words


@pytest.mark.gpu
def test_of_a_device_its_own() -> None:
    assert memory.free(torch.device("cuda")) <= torch.cuda.get_device_properties(0).total_memory
