"""What noise does to a layer's input, against many draws through the dense matrix."""

from __future__ import annotations

import torch

from rgap.inversion.layer import LayerSystem
from rgap.inversion.noise import propagate
from rgap.nn import layers


def test_the_error_of_a_layer_with_one_weak_direction_is_no_accident_of_a_draw() -> None:
    """The weights tell one direction a thousand times worse than the others: the error is along it alone."""
    generator = torch.Generator().manual_seed(0)

    def randn(*shape: int) -> torch.Tensor:
        return torch.randn(shape, generator=generator, dtype=torch.float64)

    left, _, right = torch.linalg.svd(randn(12, 8), full_matrices=False)
    values = torch.ones(8, dtype=torch.float64)
    values[-1] = 1e-3
    layer = layers.linear("fc", left @ values.diag() @ right, None, (8,), "weight", None)
    system = LayerSystem(layer, torch.zeros(1, 12, 1, dtype=torch.float64), None, 1e-9)
    std, nothing = torch.full((1, 12, 1), 1e-6, dtype=torch.float64), torch.zeros(1, dtype=torch.float64)
    grad = torch.zeros(1, *layer.weight.shape, dtype=torch.float64)
    true = (values**-2).sum().mul(1e-12 / 8).sqrt()
    apart = []
    for seed in range(60):
        probe = torch.Generator().manual_seed(seed)
        found = propagate(system, std, grad.new_zeros(1, 8, 1), grad, 6e-8, nothing, nothing, probe)
        apart.append(float(found.square().mean().sqrt() / true))
    assert min(apart) > 0.2  # one draw is below it 10 times in 60
    assert max(apart) < 2.5
