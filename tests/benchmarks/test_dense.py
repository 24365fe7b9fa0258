"""The dense baseline is the paper's procedure: its matrices are the model's own maps, and it finds the picture."""

from __future__ import annotations

import pytest
import torch
from benchmark import load
from torch import nn

from rgap import Target, capture, data, losses, models

dense = load("dense")


def small(dtype: torch.dtype) -> tuple[nn.Sequential, torch.Tensor]:
    return models.strided(3, 8, widths=(13, 60)).to(dtype), data.photographs(1, 8).inputs.to(dtype)


@pytest.mark.parametrize("label", [-1.0, 1.0])
@pytest.mark.parametrize(("dtype", "largest"), [(torch.float64, 1e-20), (torch.float32, 1e-6)])
def test_it_finds_the_picture(label: float, dtype: torch.dtype, largest: float) -> None:
    model, picture = small(dtype)
    target = Target(model, losses.Logistic(), (3, 8, 8))
    update = capture(target, picture, torch.tensor([label], dtype=dtype))
    mu = dense.margin(model, picture, label)
    found = dense.recover(model, update.gradients, (3, 8, 8), label, mu)
    assert (found.inputs - picture).square().mean() < largest
    assert [layer.rank for layer in found.layers] == [3 * 8 * 8, 13 * 4 * 4, 60 * 2 * 2]
    assert found.seconds > 0


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Conv2d(2, 3, 3, 2, 1, bias=False), (2, 7, 6)),
        (nn.Conv2d(1, 2, (2, 3), (1, 2), (0, 2), dilation=(2, 1), bias=False), (1, 6, 5)),
        (nn.Linear(5, 2, bias=False), (5,)),
    ],
)
def test_matrices_are_the_layers_own_maps(module: nn.Conv2d | nn.Linear, shape: tuple[int, ...]) -> None:
    module = module.double()
    (step,) = dense.steps(nn.Sequential(module), shape)
    x = torch.randn(1, *shape, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    z = module(x)
    k = torch.randn(z.shape, dtype=torch.float64, generator=torch.Generator().manual_seed(1))
    (expected,) = torch.autograd.grad(z, module.weight, k)
    found = dense.matrix(step, k[0]) @ x.flatten()
    assert tuple(z.shape[1:]) == step.after
    torch.testing.assert_close(found, torch.cat([z.detach().flatten(), expected.flatten()]))


@pytest.mark.parametrize("margin", [-30.0, -0.1, 0.0, 0.5, 1.2, 1.4, 9.0])
def test_the_root_is_the_one_that_was_told(margin: float) -> None:
    mu = torch.tensor(margin, dtype=torch.float64, requires_grad=True)
    (slope,) = torch.autograd.grad(nn.functional.softplus(-mu), mu)
    assert dense.root(margin * float(slope), margin + 1e-3) == pytest.approx(margin, abs=1e-6)


def test_it_refuses_what_does_not_fit() -> None:
    model, picture = small(torch.float64)
    needed = dense.bytes_needed(model, (3, 8, 8))
    rows, unknowns = 60 * 2 * 2 + 60 * 13 * 9, 13 * 4 * 4
    assert needed == rows * unknowns * 8 * 2
    gradients = {name: torch.zeros_like(weight) for name, weight in model.named_parameters()}
    with pytest.raises(dense.TooLarge, match=r"conv2: 7260 rows and 208 unknowns"):
        dense.recover(model, gradients, (3, 8, 8), 1.0, 0.0, limit=needed - 1)
    assert dense.recover(model, gradients, (3, 8, 8), 1.0, 0.0, limit=needed).inputs.shape == picture.shape


def test_it_names_what_it_does_not_know() -> None:
    with pytest.raises(ValueError, match=r"act1 is Sigmoid"):
        dense.steps(models.strided(3, 8, activation=nn.Sigmoid), (3, 8, 8))
    with pytest.raises(ValueError, match=r"conv1 is Conv2d"):
        dense.steps(models.strided(3, 8, bias=True), (3, 8, 8))
