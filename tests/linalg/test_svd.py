"""Singular values where the fast method gives up."""

from __future__ import annotations

import pytest
import torch

from rgap.linalg.svd import svd


def gives_up(*_: object, **__: object) -> None:
    raise torch.linalg.LinAlgError("linalg.svd: The algorithm failed to converge")


@pytest.mark.parametrize("shape", [(5, 3), (3, 5), (4, 4), (2, 5, 3), (2, 1, 3, 4)])
@pytest.mark.parametrize("full", [False, True])
def test_the_slow_method_takes_over(shape: tuple[int, ...], full: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix = torch.randn(shape, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    expected = torch.linalg.svdvals(matrix)
    for _ in range(2):
        u, sizes, vh = svd(matrix, full)
        few = min(shape[-2:])
        assert torch.allclose(sizes, expected)
        assert torch.allclose((u[..., :few] * sizes[..., None, :]) @ vh[..., :few, :], matrix)
        assert u.shape == (*shape[:-1], shape[-2] if full else few)
        assert vh.shape == (*shape[:-2], shape[-1] if full else few, shape[-1])
        monkeypatch.setattr("torch.linalg.svd", gives_up)


def test_what_is_not_finite_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("torch.linalg.svd", gives_up)
    with pytest.raises(torch.linalg.LinAlgError):
        svd(torch.full((2, 2), torch.nan))
