"""Singular values and vectors of matrices that LAPACK's fast method sometimes gives up."""

from __future__ import annotations

import scipy.linalg
import torch
from jaxtyping import Float
from torch import Tensor


def svd(
    matrix: Float[Tensor, "*s m n"], full: bool = False
) -> tuple[Float[Tensor, "*s m k"], Float[Tensor, "*s r"], Float[Tensor, "*s l n"]]:
    """U, the singular values in falling order, and V', of each of several matrices.

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
        found = [
            scipy.linalg.svd(each.detach().cpu().numpy(), full_matrices=full, lapack_driver="gesvd")
            for each in matrix.reshape(-1, *matrix.shape[-2:])
        ]
        each_kind = (torch.stack([torch.from_numpy(each) for each in kind]) for kind in zip(*found, strict=True))
        u, sizes, vh = (kind.to(matrix).reshape(*matrix.shape[:-2], *kind.shape[1:]) for kind in each_kind)
    return u, sizes, vh
