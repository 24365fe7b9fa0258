"""The five networks behind Figure 2 and Table 2 of R-GAP, as far as they can be told.

Architectures reconstructed from the published indices: the paper draws the networks without naming their layers, so
the first layers here are the small ones that count to its indices, and the layers after them are our own choice. These
are of full rank by measurement, so that the critical layer alone decides.

Source: J. Zhu and M. Blaschko, *R-GAP: Recursive Gradient Attack on Privacy*, ICLR 2021, arXiv:2010.07733, Section 4.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

from torch import nn

from rgap.models.chains import chain
from rgap.models.common import seeded

INPUT_SHAPE = (3, 32, 32)


def full_rank(seed: int = 0) -> nn.Sequential:
    """Index -484: a convolution 3 -> 4 of kernel 4 that is over-determined."""
    return _network([(4, 4), (16, 3)], seed)


def deficient_first(seed: int = 0) -> nn.Sequential:
    """Index 405: a convolution 3 -> 3 of kernel 4 leaves part of the input free."""
    return _network([(3, 4), (16, 3)], seed)


def deficient_first_wide(seed: int = 0) -> nn.Sequential:
    """Index 405 again: the same first layer before more and wider layers, which make no difference."""
    return _network([(3, 4), (5, 3), (16, 3)], seed)


def full_rank_by_virtual(seed: int = 0) -> nn.Sequential:
    """Index -208: the second convolution, 4 -> 4, is short of constraints until the first one's 528 are counted."""
    return _network([(4, 3), (4, 3), (16, 3)], seed)


def deficient_second(seed: int = 0) -> nn.Sequential:
    """Index 316: the second convolution, 4 -> 4 of kernel 4, is short of constraints even with the first one's."""
    return _network([(4, 5), (4, 4), (16, 3)], seed)


NETWORKS: tuple[tuple[Callable[[int], nn.Sequential], int], ...] = (
    (full_rank, -484),
    (deficient_first, 405),
    (deficient_first_wide, 405),
    (full_rank_by_virtual, -208),
    (deficient_second, 316),
)
"""In the paper's order, each with the index that the paper prints."""


def _network(convolutions: Sequence[tuple[int, int]], seed: int) -> nn.Sequential:
    """Convolutions (channels, kernel) of stride 1 without padding or bias, LeakyReLU, and a Linear layer to 1."""
    with seeded(seed):
        return chain([(wide, kernel, 1, 0) for wide, kernel in convolutions], *INPUT_SHAPE[:2], 1)
