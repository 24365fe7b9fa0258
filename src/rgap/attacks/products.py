"""The joint constraints of a chain as products: their normal equations by conjugate gradients, without a matrix.

The rows are those of `rgap.attacks.joint`, applied one layer after the other. Each product starts from the input of the
last linearisation, so it need not be solved to the end: what is left is the next one's to do.
"""

from __future__ import annotations

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.joint import Point, Problem

PROBES = 4
"""Drawn inputs from which the sizes of the rows are told."""
STEPS, LAST, CLOSE = 600, 1500, 1e-3
"""Of conjugate gradients for one linearisation, at the most, and for the last; and the relative residual at which to
stop."""
MOVES, EXACT, SURE = 3, 1e-6, 6000
"""Drawn moves, the relative residual to which they are solved for, and steps at the most."""
COMES_BACK = 5e-3
"""Drawn moves that come back to this part of themselves have no part that the rows do not see: of a single free
dimension among 3,000 one would keep less in one draw of five."""


class Products:
    """G x and g of the normal equations at one linearisation; batches (s, c, n) of inputs."""

    def __init__(self, problem: Problem, point: Point, doubtful: list[Tensor] | None):
        """
        Args:
            doubtful: as `Problem.normal` takes them.
        """
        self._problem, self._point = problem, point
        self._ks = problem.ks(point.slopes)
        self._away = problem.of_doubtful(point, doubtful)
        depth = len(problem.layers) - 1
        self._heard = [doubtful is not None or at == depth for at in range(depth + 1)]
        self._scale = [0.0] * (depth + 1)
        self._draw = torch.randn(
            PROBES,
            *problem.shape[1:],
            generator=torch.Generator(device=problem.device).manual_seed(0),
            dtype=torch.float64,
            device=problem.device,
        )
        z, grads = self._rows(self._draw)
        size = float(z.square().sum())
        for at in reversed(range(depth + 1)):
            grad = grads[at]
            own = 0.0 if grad is None else float(grad.square().sum())
            # As the dense equations have it: a layer's gradient rows weigh as much as all rows behind it.
            self._scale[at] = size / own if own > 0 else 0.0
            size = 2 * size if own > 0 else size
        self.diagonal = size / self._draw.numel()
        """The mean of G's diagonal, about."""

    @property
    def moves(self) -> Float[Tensor, "s c n"]:
        """Drawn ones."""
        return self._draw[:MOVES]

    def __call__(self, x: Float[Tensor, "s c n"]) -> Float[Tensor, "s c n"]:
        """G x."""
        return self._adjoint(*self._rows(x))

    def right(self) -> Float[Tensor, "1 c n"]:
        """g."""
        problem, point = self._problem, self._point
        z, grads = self._rows(self._draw[:1] * 0, point.offsets)
        told = [None if grad is None else self._seen(at, problem.grads[at]) - grad for at, grad in enumerate(grads)]
        return self._adjoint(problem.weighted(problem.z) - z, told)

    def noise(self, z: Float[Tensor, "1 o p"], grads: list[Tensor]) -> Float[Tensor, "1 c n"]:
        """g for errors of z and of the gradients."""
        told = [self._seen(at, grad) if self._heard[at] else None for at, grad in enumerate(grads)]
        return self._adjoint(self._problem.weighted(z), told)

    def _rows(
        self, x: Float[Tensor, "s c n"], offsets: list[Tensor] | None = None
    ) -> tuple[Tensor, list[Tensor | None]]:
        """Weight rows of the last layer and gradient rows of all that are heard."""
        layers = self._problem.layers
        grads: list[Tensor | None] = []
        for at, layer in enumerate(layers):
            patches = layer.patches(x)
            k = self._ks[at].reshape(1, layer.groups, -1, layer.positions)
            grads.append(self._seen(at, k @ patches.mT) if self._heard[at] else None)
            z = (layer.weight @ patches).reshape(len(x), layer.outputs, layer.positions)
            if at < len(layers) - 1:
                z = z * self._point.slopes[at] + (0.0 if offsets is None else offsets[at])
                x = layers[at + 1].pack_input(layer.unpack_output(z))
        return self._problem.weighted(z), grads

    def _adjoint(self, z: Tensor, grads: list[Tensor | None]) -> Float[Tensor, "s c n"]:
        layers, back = self._problem.layers, self._problem.weighted(z)
        for at in reversed(range(len(layers))):
            layer, grad = layers[at], grads[at]
            patches = layer.weight.mT @ back.reshape(len(back), layer.groups, -1, layer.positions)
            if grad is not None and self._scale[at]:
                k = self._ks[at].reshape(1, layer.groups, -1, layer.positions)
                patches = patches + (self._scale[at] * grad).mT @ k
            back = layer.scatter(patches)
            if at:
                before = layers[at - 1]
                back = self._point.slopes[at - 1] * before.pack_output(layer.unpack_input(back))
        return back

    def _seen(self, at: int, grad: Tensor) -> Tensor:
        """A gradient without what units in doubt may have done to it."""
        away = self._away[at]
        if not len(away):
            return grad
        flat = grad.flatten(1)
        return (flat - (flat @ away.mT) @ away).reshape(grad.shape)
