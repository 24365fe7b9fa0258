"""Least squares by products alone: LSMR (Fong and Saunders 2011), with tensors."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
import torch
from jaxtyping import Float
from numpy.typing import NDArray
from scipy.sparse.linalg import LinearOperator
from scipy.sparse.linalg import lsmr as scipy_lsmr
from torch import Tensor

from rgap.linalg import deadline


def lsmr(
    along: Callable[[Tensor], Tensor],
    back: Callable[[Tensor], Tensor],
    right: Float[Tensor, " r"],
    unknowns: int,
    iterations: int,
    damp: float = 0.0,
    tolerance: float = 0.0,
) -> Float[Tensor, " u"]:
    """The v that minimises |J v - right|^2 + (damp |v|)^2, as near as so many iterations get.

    Args:
        along, back: J v and J' u.
        tolerance: of |J' r| relative to |J| |r|, at which it ends earlier.

    Raises:
        OutOfTime: the time is up.
    """

    def product(of: Callable[[Tensor], Tensor]) -> Callable[[NDArray[np.float64]], NDArray[np.float64]]:
        def numbers(v: NDArray[np.float64]) -> NDArray[np.float64]:
            deadline.check()
            return of(torch.from_numpy(np.ascontiguousarray(v.reshape(-1))).to(right)).cpu().numpy()

        return numbers

    operator = LinearOperator((len(right), unknowns), matvec=product(along), rmatvec=product(back), dtype=np.float64)
    found = scipy_lsmr(operator, right.cpu().numpy(), damp=damp, maxiter=iterations, atol=tolerance, btol=0)
    return torch.from_numpy(found[0]).to(right)
