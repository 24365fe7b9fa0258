"""What the noise of a layer's constraints does to its input."""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.layer import LayerSystem
from rgap.inversion.rounding import rounding

DRAWS = 3
"""Of one direction alone, a draw is less than a tenth of the error 6 times in 100; of three, twice in 1,000."""


def propagate(
    system: LayerSystem,
    z_std: Tensor,
    x: Float[Tensor, "s c n"],
    grad: Tensor,
    eps: float,
    cotangent_error: Float[Tensor, " s"],
    cotangent_scatter: Float[Tensor, " s"],
    probe: torch.Generator,
) -> Float[Tensor, "d s c n"]:
    """Draws of the noise on the right, pushed through the solver, the same for all candidates: several where that takes
    little, and one through conjugate gradients.

    Where few directions are hardly determined one draw may be far smaller than the error by chance.

    z carries the error of the layers after this one, grad W its rounding, and an error of k acts like one of grad W: a
    factor of all of k, of which the size and not a draw counts, and what moves each of its values on its own.

    Args:
        cotangent_error, cotangent_scatter: as in `Paths`.
    """
    layer, k = system.layer, system.k

    def draw(*shape: int) -> Tensor:
        return torch.randn(1, *shape, generator=probe, dtype=k.dtype, device=k.device)

    found = []
    for _ in range(DRAWS if system.direct else 1):
        grad_noise = draw(*grad.shape[1:]) * rounding(grad, eps)
        grad_noise = grad_noise + grad * cotangent_error[:, None, None, None]
        z_noise = draw(layer.outputs, layer.positions) * z_std
        moved = k * draw(layer.outputs, layer.positions).sign() * cotangent_scatter[:, None, None]
        found.append(system.apply_inverse(z_noise, grad_noise + layer.grad_weight(x, moved)))
    return torch.stack(found)
