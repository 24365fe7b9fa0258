"""What solving one layer takes: operations, by which a solver is chosen, and bytes, which must be there."""

from __future__ import annotations

from bisect import bisect_left
from typing import Literal

from rgap.nn.layers import Layer

Solver = Literal["auto", "direct", "iterative"]
"""How trailing directions are solved for; auto takes whichever needs fewer operations."""

LARGEST = 2**33
"""Bytes of the largest dense matrix that is formed."""
WIDEST, SPARE = 4096, 2048
"""Dominant directions are looked for where the smaller side of K0 is at most this: they take its eigenvectors. The
second where more weight rows are in use than there are unknowns: these tell the input without, and no worse, while the
eigenvectors of 3,136 directions take as long as all solves together."""
PRODUCTS = 150
"""Of conjugate gradients for one layer, about: the drawn move, the input, its refinement and a draw of noise."""
CHUNK = 2**22
"""Values of weight rows that are taken at once where not the whole matrix of their normal equations is formed."""
STARTED, TOUCHED = 2e7, 1000
"""Operations that a factor does in the time in which one product is set up, and in which one new value of a matrix is
touched for the first time."""


def kernel_rows(layer: Layer) -> int:
    """Gradient rows of one channel."""
    return layer.outputs // layer.groups * layer.offsets


def splits(layer: Layer, rows: int, spare: bool = False) -> bool:
    """Whether dominant directions are looked for.

    Args:
        rows: gradient rows of one channel, of all layers that read the same input.
        spare: whether more weight rows are in use than there are unknowns.
    """
    return min(rows, layer.pixels) <= (SPARE if spare else WIDEST)


def fits(layer: Layer) -> bool:
    """Whether a dense matrix of the layer's unknowns may be formed."""
    return 8 * layer.groups * (layer.unknowns // layer.groups) ** 2 <= LARGEST


def factor_is_cheaper(layer: Layer, trailing: int, systems: int, rows: int) -> bool:
    """Whether a factor takes less time than conjugate gradients usually do.

    Args: those of `worth_a_factor`.
    """
    return fits(layer) and worth_a_factor(layer, trailing, systems, rows) < PRODUCTS


def worth_a_factor(layer: Layer, trailing: int, systems: int, rows: int) -> float:
    """The number of products of conjugate gradients that take as long as a factor.

    Args:
        trailing: directions of each channel that are solved for.
        systems: with their own k.
        rows: gradient rows of one channel, of all layers that read the same input.
    """
    channels, n, trailing = layer.channels // layer.groups, layer.pixels, max(trailing, 0)
    factor = (channels * trailing) ** 3 / 3
    eigen = 10.0 * n**3 if rows < n else 0.0
    formed = min(systems * _by_rows(layer, trailing), systems * _by_gram(layer, trailing) + _whole(layer))
    product = 8 * layer.weight.numel() * layer.positions + 4 * layer.channels * n * (n - trailing)
    direct = layer.groups * (systems * (factor + eigen) + formed)
    return direct / (systems * product + STARTED)


def from_rows(layer: Layer, directions: int) -> bool:
    """Whether the normal equations on so many directions of each channel are formed sooner from weight rows than from
    the whole matrix."""
    return _by_rows(layer, directions) < _by_gram(layer, directions) + _whole(layer)


def _by_rows(layer: Layer, directions: int) -> float:
    """Operations of one group: the weight rows' products with the directions, and what they make of each other."""
    rows, columns = layer.weight_rows // layer.groups, layer.channels // layer.groups * directions
    touched = min(rows * columns, CHUNK) + columns**2
    return 1.0 * rows * columns * (columns + 2 * layer.offsets) + TOUCHED * touched


def _by_gram(layer: Layer, directions: int) -> float:
    """Operations of one group, once the whole matrix is there."""
    return float((layer.channels // layer.groups) ** 2 * layer.pixels * directions * (layer.pixels + directions))


def _whole(layer: Layer) -> float:
    """What the whole matrix of one group takes."""
    return 1.0 * TOUCHED * (layer.channels // layer.groups * layer.pixels) ** 2


def bytes_needed(layer: Layer, solver: Solver) -> int:
    """At the most, for one system.

    Vectors and patches in any case; the dominant directions where they are looked for; and a matrix, its part on the
    trailing directions and the factor of that where they are formed.
    """
    c, n, rows = layer.channels, layer.pixels, kernel_rows(layer)
    small = min(rows, n)
    values = 10 * c * n + 10 * layer.weight_rows + 4 * c * layer.table.numel() + 4 * layer.weight.numel()
    split = layer.groups * (rows * n + n * small + 3 * small**2) if splits(layer, rows) else 0
    matrices = 0
    if solver == "direct":
        matrices = 3 * layer.groups * (c // layer.groups * n) ** 2 if fits(layer) else 0
    elif solver == "auto" and factor_is_cheaper(layer, n - small, 1, rows):
        matrices = layer.groups * _factored(layer, _most_trailing(layer, rows))
    return 8 * (values + split + matrices)


def _most_trailing(layer: Layer, rows: int) -> int:
    """The most trailing directions of each channel for which a factor is cheaper."""
    more = range(1, layer.pixels + 1)
    return bisect_left(more, True, key=lambda trailing: not factor_is_cheaper(layer, trailing, 1, rows))


def _factored(layer: Layer, trailing: int) -> int:
    """Values of what a factor of one group takes: of its trailing directions, and of what these are formed from."""
    channels = layer.channels // layer.groups
    formed = CHUNK if from_rows(layer, trailing) else (channels * layer.pixels) ** 2
    return formed + 2 * (channels * trailing) ** 2
