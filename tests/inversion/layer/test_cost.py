"""Which solver a layer gets, and how much memory it takes."""

from __future__ import annotations

from typing import Any

import pytest
import torch

from rgap.inversion.layer import LayerSystem, bytes_needed
from rgap.inversion.layer.cost import PRODUCTS, factor_is_cheaper, fits, kernel_rows, worth_a_factor
from rgap.linalg import cg
from rgap.nn import layers
from rgap.nn.layers import Layer


def convolution(size: int, channels: int = 3, outputs: int = 12) -> Layer:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(outputs, channels, 4, 4, generator=generator, dtype=torch.float64)
    return layers.convolution(
        "conv", weight, None, (channels, size, size), (2, 2), ((2, 2),) * 2, (1, 1), 1, "weight", None
    )


def test_small_layers_are_factored_and_large_ones_are_not() -> None:
    chosen = [
        factor_is_cheaper(layer, layer.pixels - 100, 1, kernel_rows(layer))
        for layer in map(convolution, (8, 16, 32, 64, 224))
    ]
    assert chosen == sorted(chosen, reverse=True)
    assert chosen[0]
    assert not chosen[-1]
    assert [fits(convolution(size)) for size in (32, 224)] == [True, False]


@pytest.mark.parametrize(("size", "method"), [(16, "cholesky"), (40, "iterative")])
def test_the_system_says_how_it_was_solved(size: int, method: str) -> None:
    layer = convolution(size)
    k = torch.randn(2, 12, layer.positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert LayerSystem(layer, k, None, 1e-6).method == (method,) * 2


def test_the_choice_can_be_overridden() -> None:
    layer = convolution(16)
    k = torch.randn(1, 12, layer.positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    assert LayerSystem(layer, k, None, 1e-6, solver="iterative").method == ("iterative",)
    assert LayerSystem(layer, k, None, 1e-6, solver="direct").method == ("cholesky",)


def test_rows_that_conjugate_gradients_hardly_see_are_factored(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are left as soon as they have taken as long as a factor takes."""
    layer, drawn, steps = convolution(28), torch.Generator().manual_seed(1), []
    k = torch.randn(1, 12, layer.positions, generator=drawn, dtype=torch.float64)
    weight = 10 ** (-5 * torch.rand(k.shape, generator=drawn, dtype=torch.float64))
    x = torch.randn(1, 3, layer.pixels, generator=drawn, dtype=torch.float64)
    solve = cg.solve

    def counted(*arguments: Any) -> cg.Result:
        found = solve(*arguments)
        steps.append(found.steps)
        return found

    monkeypatch.setattr("rgap.linalg.cg.solve", counted)
    assert LayerSystem(layer, k, None, 1e-6).method == ("iterative",)
    assert sum(steps) < PRODUCTS
    steps.clear()
    system = LayerSystem(layer, k, weight, 1e-6)
    assert system.method != ("iterative",)
    most = worth_a_factor(layer, layer.pixels - kernel_rows(layer), 1, kernel_rows(layer))
    assert sum(steps) <= max(PRODUCTS, most) + 1
    found = system.solve(layer.output(x), layer.grad_weight(x, k)).x
    torch.testing.assert_close(found, x, rtol=0, atol=1e-6)


def test_no_eigenvectors_are_made_of_many_directions_where_weight_rows_are_enough(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr("rgap.inversion.layer.cost.SPARE", 63)
    layer = convolution(8, outputs=16)
    generator = torch.Generator().manual_seed(1)
    k = torch.randn(1, 16, layer.positions, generator=generator, dtype=torch.float64)
    x = torch.randn(1, 3, layer.pixels, generator=generator, dtype=torch.float64)
    dropped = torch.ones_like(k)
    dropped[:, 4:] = 0
    for weight, found in ((None, False), (dropped, True)):
        system = LayerSystem(layer, k, weight, 1e-9, solver="iterative")
        assert bool((system._dominant.count > 0).all()) == found
        solved = system.solve(layer.output(x), layer.grad_weight(x, k)).x
        torch.testing.assert_close(solved, x, rtol=0, atol=1e-7)


def test_memory_grows_with_the_pixels_where_no_matrix_is_formed() -> None:
    small, large = (bytes_needed(convolution(size), "iterative") for size in (128, 256))
    assert 3.5 < large / small < 4.5
    assert bytes_needed(convolution(32), "direct") > 8 * 3 * 3072**2
    assert bytes_needed(convolution(32), "iterative") < 8 * 3072**2


def test_a_layer_with_free_dimensions_is_counted_exactly_and_solved_with_least_norm() -> None:
    """Conjugate gradients see that dimensions are free; a factor says how many."""
    layer = convolution(24, outputs=4)
    k = torch.randn(1, 4, layer.positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    x = torch.randn(1, 3, layer.pixels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    z, grad = layer.output(x), layer.grad_weight(x, k)
    exact, drawn = (LayerSystem(layer, k, None, 1e-6, solver=solver) for solver in ("auto", "iterative"))
    assert (exact.method, drawn.method) == (("pivoted",), ("iterative",))
    assert exact.rank[0] < layer.unknowns
    assert drawn.rank[0] == pytest.approx(exact.rank[0], abs=6 * (2 * (layer.unknowns - exact.rank[0])) ** 0.5)
    first, second = exact.solve(z, grad).x, drawn.solve(z, grad).x
    assert float((first - second).norm()) <= 1e-5 * float(first.norm())


def test_of_fewer_rows_than_unknowns_a_factor_is_made_at_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """No product is spent on finding out that dimensions are free."""
    layer = convolution(24, outputs=4)
    k = torch.randn(1, 4, layer.positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    monkeypatch.setattr("rgap.inversion.layer.system.Iterative", None)
    assert LayerSystem(layer, k, None, 1e-6).rank == (layer.weight_rows + layer.spare_rows,)


def test_a_system_without_trailing_directions_next_to_one_that_has_some() -> None:
    """What the gradient determines alone is of full rank, whatever is solved in the same batch."""
    layer = convolution(12, outputs=24)
    k = torch.randn(2, 24, layer.positions, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    k[1, :, 1:] = 0  # shows the pixels of one position
    x = torch.randn(2, 3, layer.pixels, generator=torch.Generator().manual_seed(2), dtype=torch.float64)
    system = LayerSystem(layer, k, None, 1e-6, solver="iterative")
    alone = [LayerSystem(layer, k[s : s + 1], None, 1e-6, solver="iterative") for s in range(2)]
    assert system.rank == tuple(each.rank[0] for each in alone) == (432, 432)
    assert system.method == tuple(each.method[0] for each in alone)
    assert torch.allclose(system.solve(layer.output(x), layer.grad_weight(x, k)).x, x, atol=1e-7)
