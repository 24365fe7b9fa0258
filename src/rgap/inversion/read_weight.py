"""What gradient rows count while what their layer reads is off: K e for an error e, which goes over all outputs alike.

Rows of few outputs alive are many more than what K tells of each channel, so that they repeat each other. Weighed each
by itself, what K shows strongly outweighs what it shows weakly, and conjugate gradients take long; weighed by the
inverse of the covariance that errors of one size give them, all that K shows of a channel counts alike.
"""

from __future__ import annotations

from copy import copy

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.routed import MOST, GradientWeight
from rgap.nn.layers import Layer

# b samples, o outputs, a of them alive, n places, c channels, t kernel offsets, q windows' places in doubt.

MOST_ROWS = 2048
"""Gradient rows of a channel, of outputs alive, for which this is tried: a matrix of so many."""
TINY = 1e-13
"""Added to the diagonal, relatively, so that rounding leaves the matrix definite."""


class ByReadings(GradientWeight):
    """The inverse of error K K', a variance of each output's own, and what places in doubt do: a layer of one group."""

    def __init__(
        self,
        layer: Layer,
        k: Float[Tensor, "b o n"],
        error: float,
        own: Float[Tensor, " o"],
        outputs: Int[Tensor, " q"],
        columns: Float[Tensor, "q i"],
    ):
        """
        Args:
            error: variance of what the layer reads.
            own: variance of each output's rows besides.
            outputs: of the places in doubt.
            columns: what each does to its output's rows, one standard deviation of it.
        """
        self.offsets, self.alive = layer.offsets, _alive(k)
        kernel = torch.cat(list(layer.kernel_matrix(k)[:, 0]), 1)
        kernel = kernel.reshape(layer.outputs, self.offsets, -1)[self.alive].flatten(0, 1)
        covariance = error * kernel @ kernel.mT
        diagonal = own[self.alive].repeat_interleave(self.offsets)
        covariance.diagonal().add_(diagonal + TINY * covariance.diagonal().max())
        self.inverse = torch.cholesky_inverse(torch.linalg.cholesky(covariance))
        doubted = columns.new_zeros(len(columns), layer.outputs, columns.shape[1])
        doubted[torch.arange(len(columns), device=columns.device), outputs] = columns
        doubted = self._by_channel(doubted[:, self.alive])
        weighed = doubted @ self.inverse
        small = torch.eye(len(columns), dtype=columns.dtype, device=columns.device)
        lower = torch.linalg.cholesky(small + doubted.flatten(1) @ weighed.flatten(1).mT)
        self.doubted = torch.linalg.solve_triangular(lower, weighed.flatten(1), upper=False)

    def single(self, unit: float) -> ByReadings:
        found = copy(self)
        found.inverse = (self.inverse * unit**2).clamp(min=-MOST, max=MOST).float()
        found.doubted = (self.doubted * unit).clamp(min=-MOST, max=MOST).float()
        return found

    def __call__(self, grads: Float[Tensor, "s g j i"]) -> Float[Tensor, "s g j i"]:
        rows = self._by_channel(grads[:, 0, self.alive])
        found = rows @ self.inverse
        found = found - ((rows.flatten(1) @ self.doubted.mT) @ self.doubted).reshape(found.shape)
        whole = torch.zeros_like(grads)
        by_output = found.reshape(*found.shape[:2], len(self.alive), self.offsets).transpose(1, 2)
        whole[:, 0, self.alive] = by_output.flatten(2)
        return whole

    def _by_channel(self, grads: Float[Tensor, "s a i"]) -> Float[Tensor, "s c at"]:
        channels = grads.shape[-1] // self.offsets
        return grads.reshape(*grads.shape[:2], channels, self.offsets).transpose(1, 2).flatten(2)


def can_weigh(layer: Layer, k: Float[Tensor, "b o n"]) -> bool:
    """Whether a layer is one whose rows this weighs: of one group, and not of too many outputs alive."""
    return layer.groups == 1 and 0 < len(_alive(k)) * layer.offsets <= MOST_ROWS


def _alive(k: Float[Tensor, "b o n"]) -> Int[Tensor, " a"]:
    return (k != 0).any(-1).any(0).nonzero()[:, 0]
