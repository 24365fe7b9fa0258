"""Several layers' constraints, solved together for the network's input.

A layer whose own constraints leave dimensions of its input free may still leave none of the *network's* input free: the
layers before it restrict what it can be given. These are the paper's virtual constraints (Section 4). With the slopes
of the activations fixed, every constraint of every layer is linear in the input x_0, so all of them form one
least-squares problem. Its normal equations are carried from a layer's output to its input, as an information filter
carries them through time:

    G_i = W' D G_(i+1) D W + b K'K      g_i = W' D (g_(i+1) - G_(i+1) c) + b K' grad W

where x_(i+1) = D W x_i + c is the activation linearised. The slopes D depend on x_0: solve, linearise again, repeat. A
prior stands in for what the constraints do not yet tell, with a weight that falls to nothing. The gradient rows of the
layers in front jump when a unit changes its side, so they join once hardly any unit still does.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.linalg import psd
from rgap.nn.chain import Chain
from rgap.nn.layers import Layer

FEW = 12
"""So many units may change their side in one step for the gradient rows in front to be tried."""
TRIES, FASTER = 20, 0.7
"""How many linearisations such a trial may take, as long as each brings the misfit down to this fraction."""
INCREMENTAL = 300
"""With at most so many changed slopes the normal equations are updated rather than made again."""


@dataclass(frozen=True)
class Known:
    """What is known exactly of the last of the layers: all that the recursion found before it broke off."""

    k: Float[Tensor, "1 o p"]
    z: Float[Tensor, "1 o p"]
    row_weight: Float[Tensor, "1 o p"] | None


@dataclass
class Carried:
    """W' D M D W, remembered: as long as M is the same and few slopes change it is cheap to bring up to date."""

    layer: Layer
    order: Int[Tensor, " m"]
    """Where each output of the layer stands in the next layer's input."""
    _of: Tensor | None = None
    _slopes: Tensor = field(default_factory=lambda: torch.empty(0))
    _result: Tensor = field(default_factory=lambda: torch.empty(0))

    def carry(self, matrix: Float[Tensor, "m m"], slopes: Float[Tensor, " m"]) -> Float[Tensor, "u u"]:
        """The matrix for the layer's input from that for its output, slopes in the order of the output."""
        changed = (slopes != self._slopes).nonzero().flatten() if matrix is self._of else None
        if changed is None or len(changed) > INCREMENTAL:
            ordered = matrix[self.order][:, self.order] * slopes * slopes[:, None]
            self._result = self._back(self._back(ordered).mT)
        elif len(changed):
            # (D+E) M (D+E) - D M D, with E on few units, has low rank.
            step = slopes[changed] - self._slopes[changed]
            columns = matrix[self.order][:, self.order[changed]]
            units = torch.zeros(len(changed), len(slopes), dtype=matrix.dtype, device=matrix.device)
            units[torch.arange(len(changed)), changed] = 1.0
            rows = self._back(units)
            cross = self._back((columns * self._slopes[:, None] * step).mT)
            both = step[:, None] * columns[changed] * step
            mixed = cross.mT @ rows
            self._result = self._result + mixed + mixed.mT + rows.mT @ both @ rows
        self._of, self._slopes = matrix, slopes
        return self._result

    def _back(self, rows: Float[Tensor, "r m"]) -> Float[Tensor, "r u"]:
        """Each row times W."""
        shape = (-1, self.layer.outputs, self.layer.positions)
        return torch.cat([self.layer.grad_input(part.reshape(shape)).flatten(1) for part in torch.split(rows, 512)])


class Problem:
    """All constraints of the layers 0 to ``depth`` on the network's input, for one candidate."""

    def __init__(self, chain: Chain, depth: int, known: Known, gradients: dict[str, Tensor]):
        self.layers, self.known = chain.layers[: depth + 1], known
        self.grads = [layer.pack_weight(gradients[layer.weight_name][None]) for layer in self.layers]
        self._carried = [
            Carried(before, _order(before, after)) for before, after in zip(self.layers, self.layers[1:], strict=False)
        ]
        last = self.layers[-1]
        bias = 0.0 if last.bias is None else last.bias[:, None]
        self._z = known.z - bias
        self._row_weight = None if known.row_weight is None else known.row_weight**2
        self._scale = [0.0] * (depth + 1)
        """Of each layer's gradient rows, squared; 0 where they take no part."""
        gram = _block_diagonal(last.weight_gram(self._row_weight)[0])
        self._gram = [self._with_gradient_rows(depth, gram, known.k)]
        """Of the constraints on each layer's input, from the last layer to the first."""

    @property
    def unknowns(self) -> int:
        return self.layers[0].unknowns

    @property
    def rows(self) -> int:
        last, weight = self.layers[-1], self.known.row_weight
        used = last.weight_rows if weight is None else int((weight > 0).sum())
        return used + sum(layer.gradient_rows for layer in self.layers)

    def linearise(self, outputs: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
        """Slopes D and offsets c of the activations between the layers, at the given values of z."""
        slopes, offsets = [], []
        for layer, z in zip(self.layers[:-1], outputs, strict=False):
            slope = layer.activation.slope(z)
            slopes.append(slope)
            bias = 0.0 if layer.bias is None else layer.bias[:, None]
            offsets.append(layer.activation(z) - slope * (z - bias))
        return slopes, offsets

    def normal(
        self, slopes: list[Tensor], offsets: list[Tensor], in_front: bool
    ) -> tuple[Float[Tensor, "u u"], Float[Tensor, " u"]]:
        """G and g for the network's input.

        Args:
            in_front: whether the gradient rows of the layers in front of the last one take part.
        """
        ks = self._ks(slopes)
        del self._gram[1:]
        for depth in reversed(range(len(self.layers) - 1)):
            gram = self._carried[depth].carry(self._gram[-1], slopes[depth].flatten())
            self._scale[depth] = 0.0
            self._gram.append(self._with_gradient_rows(depth, gram, ks[depth]) if in_front else gram)
        return self._gram[-1], self.right_side(self._z, self.grads, slopes, offsets)

    def right_side(
        self, z: Tensor, grads: list[Tensor], slopes: list[Tensor], offsets: list[Tensor] | None
    ) -> Float[Tensor, " u"]:
        """g for the matrix that `normal` made last."""
        last, ks = self.layers[-1], self._ks(slopes)
        rhs = last.grad_input(z if self._row_weight is None else z * self._row_weight)
        rhs = rhs + self._scale[-1] * last.grad_input(ks[-1], grads[-1])
        for depth in reversed(range(len(self.layers) - 1)):
            layer, order = self.layers[depth], self._carried[depth].order
            flat = rhs.flatten()
            if offsets is not None and bool(offsets[depth].any()):
                c = torch.zeros_like(flat)
                c[order] = offsets[depth].flatten()
                flat = flat - self._gram[len(self.layers) - 2 - depth] @ c
            rhs = layer.grad_input(slopes[depth] * flat[order].reshape(slopes[depth].shape))
            if self._scale[depth]:
                rhs = rhs + self._scale[depth] * layer.grad_input(ks[depth], grads[depth])
        return rhs.flatten()

    def _ks(self, slopes: list[Tensor]) -> list[Tensor]:
        """k of every layer (Eq. 6)."""
        ks = [self.known.k]
        for depth in reversed(range(len(self.layers) - 1)):
            layer, after = self.layers[depth], self.layers[depth + 1]
            ks.insert(0, layer.pack_output(after.unpack_input(after.grad_input(ks[0]))) * slopes[depth])
        return ks

    def _with_gradient_rows(self, depth: int, gram: Tensor, k: Tensor) -> Tensor:
        """Add a layer's K'K, scaled so that both kinds of rows weigh the same."""
        layer = self.layers[depth]
        kernel = layer.kernel_matrix(k)[0]
        blocks = (kernel.mT @ kernel).repeat_interleave(layer.channels // layer.groups, 0)
        size = float(blocks.diagonal(dim1=1, dim2=2).sum())
        self._scale[depth] = (float(gram.diagonal().sum()) or size) / size if size > 0 else 0.0
        gram = gram.clone()
        diagonal = gram.view(layer.channels, layer.pixels, layer.channels, layer.pixels).diagonal(dim1=0, dim2=2)
        diagonal += (self._scale[depth] * blocks).movedim(0, -1)
        return gram

    def outputs(self, x: Float[Tensor, "1 c n"]) -> list[Tensor]:
        """z of every layer in front of the last, at an input."""
        found = []
        for layer, after in zip(self.layers, self.layers[1:], strict=False):
            z = layer.output(x)
            found.append(z if layer.bias is None else z + layer.bias[:, None])
            x = after.pack_input(layer.unpack_output(layer.activation(found[-1])))
        return found

    def misfit(self, x: Float[Tensor, "1 c n"]) -> float:
        """Relative distance between these layers' gradients at x and the given ones."""
        outputs = self.outputs(x)
        ks = self._ks(self.linearise(outputs)[0])
        wrong, size = 0.0, 0.0
        for depth, layer in enumerate(self.layers):
            wrong += float((layer.grad_weight(x, ks[depth]) - self.grads[depth]).square().sum())
            size += float(self.grads[depth].square().sum())
            if depth + 1 < len(self.layers):
                x = self.layers[depth + 1].pack_input(layer.unpack_output(layer.activation(outputs[depth])))
        return float((wrong / size) ** 0.5)


@dataclass(frozen=True)
class Found:
    """The input that a joint solve ended with."""

    x: Float[Tensor, "1 c n"]
    converged: bool
    steps: int
    factor: psd.Factor
    """Of the normal equations at the answer, without the prior."""


def solve(
    problem: Problem,
    outputs: list[Tensor],
    prior: Float[Tensor, "u u"],
    centre: float,
    weights: list[float],
    tolerance: float,
    rank_tolerance: float,
) -> Found:
    """Linearise and solve with a prior that fades, until the layers' gradients agree.

    Args:
        outputs: z of the layers in front of the last, to start from.
        prior: its matrix, of the size of an identity.
        centre: the value of a constant input that the prior likes best.
        weights: of the prior, relative to the constraints, falling.
        tolerance: relative misfit of the gradients at which the solve has converged.
    """
    slopes, offsets = problem.linearise(outputs)
    like = problem.layers[0]
    x = torch.full((1, like.channels, like.pixels), centre, dtype=prior.dtype, device=prior.device)
    middle, steps, converged = x.flatten(), 0, False

    def step(weight: float, in_front: bool) -> Tensor:
        gram, rhs = problem.normal(slopes, offsets, in_front)
        weight = weight * float(gram.diagonal().mean())
        return _regularised(gram, rhs, weight * prior, middle).reshape(x.shape)

    for weight in weights:
        x = step(weight, in_front=len(problem.layers) == 1)
        steps += 1
        before = slopes
        slopes, offsets = problem.linearise(problem.outputs(x))
        changed = _changed(before, slopes, problem)
        if changed > FEW:
            continue
        misfit = float("inf")
        for _ in range(TRIES):
            trial = step(weights[-1], in_front=True)
            steps += 1
            before = slopes
            slopes, offsets = problem.linearise(problem.outputs(trial))
            last, misfit = misfit, problem.misfit(trial)
            if misfit <= tolerance:
                x, converged = trial, True
                break
            if misfit > FASTER * last or _changed(before, slopes, problem) > FEW:
                break
        if converged:
            break
        slopes, offsets = problem.linearise(problem.outputs(x))
    gram, _ = problem.normal(slopes, offsets, True)
    return Found(x, converged, steps, psd.factor(gram, rank_tolerance))


def error(problem: Problem, found: Found, z_error: Tensor, eps: float, probe: torch.Generator) -> float:
    """One draw of the noise of the last layer's rows, pushed through the answer's own normal equations."""
    slopes = problem.linearise(problem.outputs(found.x))[0]

    def draw(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=probe, dtype=like.dtype, device=like.device)

    noises = [eps * (grad.abs() + 0.1 * grad.abs().max()) * draw(grad) for grad in problem.grads]
    rhs = problem.right_side(draw(z_error) * z_error, noises, slopes, None)
    return float(found.factor.solve(rhs[:, None]).square().mean().sqrt())


def _changed(before: list[Tensor], after: list[Tensor], problem: Problem) -> int:
    """How many slopes are other than they were, by more than half of the steepest."""
    return sum(int(((a - b).abs() > 0.5 * b.abs().max()).sum()) for a, b in zip(after, before, strict=True))


def _regularised(gram: Tensor, rhs: Tensor, prior: Tensor, middle: Tensor) -> Tensor:
    matrix = gram + prior
    # What neither constraints nor prior determine stays at the middle of the range.
    floor = 1e-13 * float(matrix.diagonal().mean())
    matrix.diagonal().add_(floor)
    lower, info = torch.linalg.cholesky_ex(matrix)
    while int(info) != 0:
        floor *= 10
        matrix.diagonal().add_(floor)
        lower, info = torch.linalg.cholesky_ex(matrix)
    start = middle
    for _ in range(3):  # the residual against the constraints removes what the floor and the rounding changed
        wrong = rhs - gram @ start - prior @ (start - middle)
        start = start + psd.cholesky_solve(wrong[:, None], lower)[:, 0]
    return start


def smoothness(shape: tuple[int, ...], like: Tensor) -> Float[Tensor, "u u"] | None:
    """The prior that neighbouring values are similar, for inputs (channels, height, width); None for others."""
    if len(shape) != 3 or min(shape[1:]) < 2:
        return None
    index = torch.arange(shape[1] * shape[2], device=like.device).reshape(shape[1:])
    laplacian = torch.zeros(index.numel(), index.numel(), dtype=like.dtype, device=like.device)
    for a, b in ((index[:, 1:], index[:, :-1]), (index[1:], index[:-1])):
        a, b = a.flatten(), b.flatten()
        laplacian.index_put_((torch.cat([a, b]),) * 2, laplacian.new_ones(2 * len(a)), accumulate=True)
        laplacian.index_put_((torch.cat([a, b]), torch.cat([b, a])), -laplacian.new_ones(2 * len(a)), accumulate=True)
    return _block_diagonal(laplacian.expand(shape[0], -1, -1))


def _block_diagonal(blocks: Float[Tensor, "b n n"]) -> Float[Tensor, "bn bn"]:
    b, n = blocks.shape[:2]
    out = blocks.new_zeros(b, n, b, n)
    out.diagonal(dim1=0, dim2=2).copy_(blocks.movedim(0, -1))
    return out.reshape(b * n, b * n)


def _order(before: Layer, after: Layer) -> Int[Tensor, " m"]:
    """Index into the next layer's flattened input for each of this layer's flattened outputs."""
    index = torch.arange(after.unknowns, device=before.weight.device).reshape(1, after.channels, after.pixels)
    return before.pack_output(after.unpack_input(index)).flatten()
