"""The rank of [W; K] of one layer, measured at a sample.

Counting is not rank. Per group of outputs, with T weights to an output and P positions, k_c' W_c' x lies in the span
of the weight rows and of the gradient rows for every pair of outputs (c, c'), so that [W; K] loses
rank(w) * rank(k) = min(outputs, T) * min(outputs, P) dimensions to overlap. The kernel offsets of a strided
convolution each reach one residue class of pixels only, where their rows can be more than the pixels. And some pixels
no position reads.

Structure leaves a small problem: K is one matrix K0 for every input channel, K0 splits by residue class, and the
weight rows matter on its null space alone.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.layer.restricted import restricted_grams
from rgap.linalg import psd
from rgap.linalg.svd import svd
from rgap.nn.layers import Layer

TOLERANCE = 1e-9
"""Singular values of K0 below this fraction of the largest count as zero."""
HELD = 1e-5
"""A free direction of norm 1 that moves values of slope 0 by less is taken not to move them: next to a constraint that
is nearly missing, free directions are known to no more than that."""
LARGEST_GRAM = 2**24
"""Entries of the largest W'W that is formed: 4096 unknowns in one group."""
LARGEST_KERNEL = 2**25
"""Entries of the largest K0 of one residue class that is formed."""
SUMMED = 1000
"""Roundings that an entry of W'W may have gone through, at least."""
INVERSE_ITERATIONS = 6
GRADIENT_ALONE = "gradient rows alone"


@dataclass(frozen=True, eq=False)
class Rows:
    """The constraints on one layer's input at a batch of b samples: row scales do not change a rank, so all are 1."""

    layer: Layer
    """With weights of norm 1 for each output, the b samples side by side as further pixels, unseen pixels left out."""
    k: Float[Tensor, "1 o p"]
    """The gradient of the layer's output, of norm 1 for each output that is not dead."""
    slope: Float[Tensor, "1 o p"]
    """Of the next layer's input in this one's output; where it is 0, z is not known and its row is missing."""
    norm: Float[Tensor, "o 1"]
    """What each output's weights were divided by."""
    seen: Int[Tensor, " n"]
    """Which of the batch's pixels some position reads."""
    pixels: int
    """Of the whole batch, seen or not."""

    @property
    def known(self) -> Float[Tensor, "1 o p"]:
        """1 for every weight row that is there."""
        return (self.slope != 0).to(self.slope)

    @property
    def unseen(self) -> int:
        return self.layer.channels * (self.pixels - len(self.seen))

    @property
    def dead(self) -> int:
        """The number of outputs whose gradient is zero at all positions."""
        return int((self.k == 0).all(-1).sum())


@dataclass(frozen=True, eq=False)
class Free:
    """What a layer's constraints leave open of its input."""

    count: int
    method: str
    basis: Float[Tensor, "f c n"] | None
    """The free directions, over all pixels of the batch; None where only their number is known."""
    exact: bool = True
    error: int = 0
    """How far the count may be off."""


def rows(layer: Layer, k: Float[Tensor, "b o p"], slope: Float[Tensor, "b o p"]) -> Rows:
    """A batch is a layer on b times as many pixels: the gradient sums over samples as it does over positions."""
    layer = layer.side_by_side(len(k))
    table, pixels = layer.table, layer.pixels
    read = torch.zeros(pixels + 1, dtype=torch.bool, device=k.device)
    read[table] = True
    seen = read[:-1].nonzero()[:, 0]
    norm = layer.weight.norm(dim=-1, keepdim=True)
    norm = torch.where(norm > 0, norm, 1.0)
    k, slope = layer.beside(k), layer.beside(slope)
    size = k.norm(dim=-1, keepdim=True)
    return Rows(
        replace(layer, weight=layer.weight / norm, table=_renumber(table, seen, pixels), pixels=len(seen)),
        k / torch.where(size > 0, size, 1.0),
        slope,
        norm.reshape(-1, 1),
        seen,
        pixels,
    )


def _renumber(table: Tensor, kept: Tensor, pixels: int) -> Tensor:
    """The table over the kept pixels alone."""
    number = torch.full((pixels + 1,), len(kept), dtype=table.dtype, device=table.device)
    number[kept] = torch.arange(len(kept), device=table.device)
    return number[table]


def residue_classes(layer: Layer) -> Iterator[tuple[Int[Tensor, " t"], Int[Tensor, " n"]]]:
    """Sets of kernel offsets that share no pixel with any other set, each with the pixels it reads.

    With stride s these are the residues modulo s; found from the table alone, they hold for any geometry.
    """
    reads = torch.zeros(layer.offsets, layer.pixels + 1, device=layer.table.device)
    reads = reads.scatter_(1, layer.table, 1.0)[:, :-1]
    linked = (reads @ reads.mT > 0) | torch.eye(layer.offsets, dtype=torch.bool, device=reads.device)
    while True:
        further = linked.float() @ linked.float() > 0
        if torch.equal(further, linked):
            break
        linked = further
    first = linked.float().argmax(1)
    for label in sorted(set(first.tolist())):
        offsets = (first == label).nonzero()[:, 0]
        pixels = reads[offsets].any(0).nonzero()[:, 0]
        if len(pixels):
            yield offsets, pixels


def measure(
    found: Rows, directions: bool, later: Float[Tensor, "f o p"] | None = None
) -> tuple[Free, Free | None] | None:
    """The free dimensions of a layer's input, or None where the layer is too large to be measured.

    Args:
        directions: whether they are asked for, not only their number.
        later: directions of the layer's activated output that later layers leave free; None or empty if none.

    Returns:
        What is free if all of z is known, and what is free if z is known up to ``later``; None for the second where
        it cannot be told.
    """
    if not len(found.seen):
        return _by_gradient_alone(found)  # all positions read padding: no rows, and no unknowns that they could tell
    layer = found.layer
    per_group, groups, outputs = layer.channels // layer.groups, layer.groups, layer.outputs // layer.groups
    classes = list(residue_classes(layer))
    gram_fits = groups * (per_group * layer.pixels) ** 2 <= LARGEST_GRAM
    kernel_fits = all(groups * outputs * len(t) * len(n) <= LARGEST_KERNEL for t, n in classes)
    may_be_full = all(outputs * len(t) >= len(n) for t, n in classes)
    if kernel_fits and gram_fits:
        nulls = _null_of_gradient(found, classes)
        if any(basis.shape[1] for basis in nulls):
            return _by_numbers(found, nulls, directions, later)
        return _by_gradient_alone(found)
    if kernel_fits and may_be_full and _definite(found, classes):
        return _by_gradient_alone(found)
    apart = layer.offsets * layer.positions == layer.pixels and int(layer.table.max()) < layer.pixels
    if apart and bool((found.slope != 0).all()):
        # Each position reads pixels of its own, so that the overlap is all that is lost.
        own = Free(layer.unknowns - patch_rank(found) + found.unseen, "patches that do not overlap", None)
        return own, None if later is not None and len(later) else own
    return None


def _by_gradient_alone(found: Rows) -> tuple[Free, Free]:
    free = Free(found.unseen, GRADIENT_ALONE, unseen_directions(found))
    return free, free  # later layers have nothing to add


def patch_rank(found: Rows) -> int:
    """The rank of [W; K] if all positions read pixels of their own: an upper bound for any geometry."""
    layer = found.layer
    k = found.k.reshape(layer.groups, -1, layer.positions)
    of_k = torch.linalg.matrix_rank(k @ k.mT, hermitian=True)
    of_w = torch.linalg.matrix_rank(layer.weight)
    return int((of_k * layer.weight.shape[-1] + of_w * layer.positions - of_k * of_w).sum())


def _kernel(found: Rows, offsets: Tensor, pixels: Tensor) -> Float[Tensor, "g r n"]:
    layer = found.layer
    table = _renumber(layer.table[offsets], pixels, layer.pixels)
    return replace(layer, table=table, pixels=len(pixels)).kernel_matrix(found.k)[0]


def _definite(found: Rows, classes: list[tuple[Tensor, Tensor]]) -> bool:
    """Whether K0 has full column rank, from K0' K0: enough where its null space is not asked for."""
    return all(
        _nullity(kernel.mT @ kernel) == 0 for offsets, pixels in classes for kernel in _kernel(found, offsets, pixels)
    )


def _null_of_gradient(found: Rows, classes: list[tuple[Tensor, Tensor]]) -> list[Float[Tensor, "n _"]]:
    """For each group, an orthonormal basis of what K0 does not tell of one channel."""
    layer = found.layer
    parts: list[list[Tensor]] = [[] for _ in range(layer.groups)]
    for offsets, pixels in classes:
        kernel = _kernel(found, offsets, pixels)
        if kernel.shape[1] > kernel.shape[2]:
            kernel = torch.linalg.qr(kernel, mode="r")[1]
        _, sigma, basis = svd(kernel, full=True)
        for group, part in enumerate(parts):
            rank = int((sigma[group] > TOLERANCE * sigma[group, :1]).sum())
            free = basis[group, rank:]
            whole = free.new_zeros(len(free), layer.pixels)
            whole[:, pixels] = free
            part.append(whole)
    return [torch.cat(part).mT for part in parts]


def _by_numbers(
    found: Rows, nulls: list[Float[Tensor, "n _"]], directions: bool, later: Tensor | None
) -> tuple[Free, Free]:
    """Weight rows on the null space V of the gradient rows: the null space of V' W' (1 - M M') W V."""
    layer = found.layer
    per_group, groups, n = layer.channels // layer.groups, layer.groups, layer.pixels
    all_known = bool((found.slope != 0).all())
    lowers = restricted_grams(layer, dict(enumerate(nulls)), None if all_known else found.known)
    blocks = [lower.tril() + lower.tril(-1).mT for lower in lowers.values()]
    bends = None if later is None else _in_weight_rows(found, later)
    if bends is None or not len(bends):
        own = _free(found, nulls, blocks, directions)
        return own, own
    onto = layer.grad_input(bends).reshape(len(bends), groups, per_group, n)
    onto = torch.cat([(onto[:, g] @ basis).flatten(1) for g, basis in enumerate(nulls)], 1)
    whole = psd.block_diagonal(blocks)
    fewer = whole - onto.mT @ onto
    if not directions:
        left = _free(found, nulls, [fewer], False)
        return left if left.count == found.unseen else _free(found, nulls, blocks, False), left
    # What all rows leave free the fewer ones do too.
    null = _null(fewer)
    count = _nullity(null.mT @ whole @ null, _rounding(whole))
    return Free(count + found.unseen, "eigenvalues", None), _as_inputs(found, nulls, null)


def _free(found: Rows, nulls: list[Tensor], blocks: list[Tensor], directions: bool) -> Free:
    """The null space of the blocks, whose coordinates are those in the bases ``nulls``, as directions of the input."""
    if not directions:
        return Free(sum(map(_nullity, blocks)) + found.unseen, "eigenvalues", None)
    return _as_inputs(found, nulls, psd.block_diagonal(_null(block) for block in blocks))


def _as_inputs(found: Rows, nulls: list[Tensor], null: Float[Tensor, "m f"]) -> Free:
    """Directions whose coordinates are those in the bases ``nulls``, as directions of the input."""
    layer = found.layer
    per_group = layer.channels // layer.groups
    free = null.new_zeros(null.shape[1], layer.channels, found.pixels)
    at = 0
    for group, basis in enumerate(nulls):
        d = basis.shape[1]
        part = null[at : at + per_group * d].mT.reshape(len(free), per_group, d)
        free[:, group * per_group : (group + 1) * per_group, found.seen] = part @ basis.mT
        at += per_group * d
    return Free(len(free) + found.unseen, "eigenvalues", torch.cat([free, unseen_directions(found)]))


def _rounding(matrix: Float[Tensor, "m m"]) -> float:
    """Eigenvalues up to this are zero or cannot be told from it. Rows of norm 1 make 1 the size to compare with.

    However small the matrix, its entries are sums over many rows, and may be what is left of a difference.
    """
    largest = float(matrix.abs().sum(0).max()) if len(matrix) else 0.0
    return max(len(matrix), SUMMED) * torch.finfo(matrix.dtype).eps * max(1.0, largest)


def _nullity(matrix: Float[Tensor, "m m"], rounding: float | None = None) -> int:
    """The number of zero eigenvalues of a positive semidefinite matrix.

    Args:
        rounding: what counts as zero; None: the matrix's own.
    """
    shifted = matrix.clone()
    shifted.diagonal().sub_(_rounding(matrix) if rounding is None else rounding)
    if int(torch.linalg.cholesky_ex(shifted)[1]) == 0:
        return 0  # definite though shifted: no eigenvalue is as small as the shift
    # As many are below the shift as the shifted matrix has negative ones, and so D of L D L' (Sylvester): it takes a
    # fifth of the time of the eigenvalues themselves. Of its blocks of two each has one that is negative.
    factors, pivots = torch.linalg.ldl_factor(shifted)
    paired = pivots < 0
    return int((factors.diagonal()[~paired] <= 0).sum()) + int(paired.sum()) // 2


def _null(matrix: Float[Tensor, "m m"]) -> Float[Tensor, "m f"]:
    """An orthonormal basis of the null space, by inverse iteration: several times faster than all eigenvectors."""
    count, shift = _nullity(matrix), _rounding(matrix)
    if 2 * count > len(matrix):
        return _complement(matrix, len(matrix) - count, shift)
    basis = torch.randn(len(matrix), count, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis = basis.to(matrix.device)
    if count:
        shifted = matrix.clone()
        shifted.diagonal().add_(2 * shift)
        lower = torch.linalg.cholesky(shifted)
        settled = False
        for _ in range(INVERSE_ITERATIONS):
            basis, grown = torch.linalg.qr(psd.cholesky_solve(basis, lower))
            if settled:
                break
            # What the shifted matrix makes of the directions is the inverse of how they have grown. Where that is what
            # it makes of a null space, one more iteration leaves nothing else in them.
            settled = float(torch.linalg.matrix_norm(torch.linalg.inv_ex(grown)[0], 2)) <= 3 * shift
    return basis


def _complement(matrix: Float[Tensor, "m m"], rank: int, shift: float) -> Float[Tensor, "m f"]:
    """What lies beside the range, where that is the smaller of the two: by iteration on the range."""
    basis = torch.randn(len(matrix), rank, generator=torch.Generator().manual_seed(0), dtype=matrix.dtype)
    basis, settled = basis.to(matrix.device), False
    for _ in range(INVERSE_ITERATIONS):
        product = matrix @ basis
        left = product - basis @ (basis.mT @ product)
        basis = torch.linalg.qr(product)[0]
        if settled:
            break
        settled = float(torch.linalg.matrix_norm(left)) <= 3 * shift
    return psd.complement(basis)


def _in_weight_rows(found: Rows, later: Float[Tensor, "f o p"]) -> Float[Tensor, "m o p"]:
    """Free directions of the activated output as orthonormal directions M of the known weight rows.

    A move N a of the output that changes a value with slope 0 is no move of z: such a are left out.
    """
    dead = found.slope[0] == 0
    if bool(dead.any()):
        held = later[:, dead]
        _, sigma, basis = svd(held.mT, full=True)
        rank = int((sigma > HELD).sum())
        later = (basis[rank:] @ later.flatten(1)).reshape(-1, *later.shape[1:])
    moves = torch.where(dead, 0.0, later / torch.where(dead, 1.0, found.slope[0]) / found.norm)
    orthonormal: Tensor = torch.linalg.qr(moves.flatten(1).mT)[0]
    return orthonormal.mT.reshape(moves.shape)


def unseen_directions(found: Rows) -> Float[Tensor, "f c n"]:
    """One direction for each unknown that no position reads."""
    left = torch.ones(found.pixels, dtype=torch.bool, device=found.seen.device)
    left[found.seen] = False
    channels, pixels = found.layer.channels, left.nonzero()[:, 0]
    basis = found.k.new_zeros(channels, len(pixels), channels, found.pixels)
    for channel in range(channels):
        basis[channel, torch.arange(len(pixels), device=pixels.device), channel, pixels] = 1.0
    return basis.flatten(0, 1)
