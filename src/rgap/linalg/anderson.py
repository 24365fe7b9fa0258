"""Anderson's acceleration of a fixed-point iteration (D. G. Anderson 1965): it also tames one that diverges slowly."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import deadline


def anderson(
    move: Callable[[Float[Tensor, " n"]], tuple[Float[Tensor, " n"], float]],
    x: Float[Tensor, " n"],
    max_steps: int,
    enough: float,
    patience: int = 6,
) -> tuple[Float[Tensor, " n"], float]:
    """The best x that was met on the way to move(x) = 0, and its misfit.

    Args:
        move: by how much a plain step moves x, and the misfit there.
        enough: a misfit at which the search ends.
        patience: steps without a smaller misfit after which it ends.
    """
    best, least, since = x, torch.inf, 0
    points: list[Tensor] = []
    moves: list[Tensor] = []
    for _ in range(max_steps):
        by, misfit = move(x)
        since += 1
        if misfit < least:
            best, least, since = x, misfit, 0
        if least <= enough or since >= patience or not bool(by.isfinite().all()) or deadline.used() >= 1:
            break
        points.append(x)
        moves.append(by)
        x = x + by
        if len(points) > 1:
            d_point = torch.stack([b - a for a, b in pairwise(points)], 1)
            d_move = torch.stack([b - a for a, b in pairwise(moves)], 1)
            mix = torch.linalg.lstsq(d_move, by[:, None], driver="gelsy").solution
            x = x - ((d_point + d_move) @ mix)[:, 0]
    return best, least
