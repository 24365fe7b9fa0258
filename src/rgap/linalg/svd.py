"""Singular values and vectors of matrices that LAPACK's fast method sometimes gives up."""

from __future__ import annotations

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor


def svd(
    matrix: Float[Tensor, "m n"], full: bool = False
) -> tuple[Float[Tensor, "m k"], Float[Tensor, " r"], Float[Tensor, "l n"]]:
    """U, the singular values in falling order, and V'.

    Divide and conquer (gesdd), which torch calls, does not converge on some matrices whose singular values are spread
    or repeated; the slower QR iteration (gesvd) does.

    Args:
        full: whether U and V are square.

    Raises:
        RuntimeError: a value is not finite.
    """
    try:
        u, sizes, vh = torch.linalg.svd(matrix, full_matrices=full)
    except RuntimeError:
        if not bool(matrix.isfinite().all()):
            raise
        found = scipy.linalg.svd(matrix.detach().cpu().numpy(), full_matrices=full, lapack_driver="gesvd")
        u, sizes, vh = (torch.from_numpy(each).to(matrix) for each in found)
    return u, sizes, vh
