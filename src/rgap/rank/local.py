"""How many dimensions of its input a network's gradients leave free to first order, whatever the attack.

Along such a direction neither a gradient nor the output moves: no attack can tell the input from its neighbours there,
even one that knows every label, side of a kink and route through a pool. Measured for any network that is traced, by
the derivative of everything that is sent with respect to the input: its rank is that of its products with as many
drawn directions as it takes until they depend on each other.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np
import torch
from jaxtyping import Float
from scipy.fft import dct
from torch import Tensor

from rgap.linalg import deadline, psd
from rgap.nn.network import Network
from rgap.nn.ops import Linear

FIRST = 64
"""Directions that are drawn before the first look at their rank; twice as many before each other."""
MORE = 16
"""Directions beyond the rank that show that there is no more."""
TELLING = 16
"""A bound tells something if it leaves out at least one of so many dimensions."""
SPARE = 64
"""Rows that are kept beyond one for each unknown: drawn sums of all rows."""
TOGETHER = 2**24
"""Values of all parameters' moves that are held at once."""
RATE = 2**30
"""Multiplications a second that a look at one direction is taken to do; a slow machine does that many."""
TOLERANCE = 1e-6
"""Singular values below this part of the largest are zero: a move that small is less than float32 rounds."""


@dataclass(frozen=True)
class Local:
    """What the gradients leave free of a batch's inputs, near one of them."""

    free: int
    complete: bool
    """Whether all directions were looked at that were needed; if not, it is no more than this."""


def free_dimensions(
    network: Network,
    x: Float[Tensor, "b ..."],
    cotangent: Float[Tensor, "b ..."],
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Local:
    """How many dimensions of the inputs move nothing that is sent; as far as the time allows that is set around it.

    Args:
        x: where to measure.
        cotangent: the gradient of the loss with respect to the network's output, which is known with it.
        progress: is called with the directions that were looked at and how many there are.
    """
    unknowns, parts = x.numel(), []
    sketch = _Sketch(network, x, cotangent, unknowns + SPARE, generator)
    directions = _Directions(x, generator)
    count, rank = 0, 0
    while count < unknowns:
        upto = min(unknowns, max(FIRST, 2 * count))
        if upto > 0.7 * unknowns:  # so near to all of them that a further look costs more than it saves
            upto = unknowns
        while count < upto:
            if deadline.used() >= 1:
                return Local(unknowns - rank, False)
            step = min(sketch.together, upto - count)
            parts.append(sketch(directions.rows(count, step)))
            count += step
            progress(count, unknowns)
        moves = torch.cat(parts)
        rank = psd.factor(moves @ moves.mT, TOLERANCE).rank
        if rank <= count - MORE:
            break
    return Local(unknowns - rank, True)


def worth(products: int, unknowns: int, seconds: float) -> bool:
    """Whether that time is enough for as many directions as tell something.

    Args:
        products: that the inputs take from the network's input to its output.
        unknowns: values of the inputs.
    """
    # Forward, backward and the weights' gradients; each is differentiated, which takes three times as many.
    return max(MORE, unknowns // TELLING) * 9 * products <= RATE * seconds


def _cosines(rows: Float[Tensor, "d n"]) -> Float[Tensor, "d n"]:
    """Their cosine transform, orthonormal: it spreads each value over all others."""
    return torch.as_tensor(dct(rows.cpu().numpy(), norm="ortho")).to(rows)


class _Directions:
    """Orthonormal directions without order: cosines of drawn frequencies with drawn signs (Ailon and Chazelle 2009)."""

    def __init__(self, x: Float[Tensor, "b ..."], generator: torch.Generator):
        self._like = x
        self._frequency = torch.randperm(x.numel(), generator=generator, device=x.device).cpu()
        self._sign = 2.0 * torch.randint(2, x.shape, generator=generator, device=x.device).to(x.dtype) - 1

    def rows(self, start: int, count: int) -> Float[Tensor, "d b ..."]:
        chosen = np.zeros((count, self._like.numel()))
        chosen[np.arange(count), self._frequency[start : start + count].numpy()] = 1.0
        return _cosines(torch.as_tensor(chosen).to(self._like)).reshape(count, *self._like.shape) * self._sign


class _Sketch:
    """Directions of the input as moves of all that is sent, each parameter's in units of its largest; of its rows,
    mixed by signs and cosines, as many are kept as the input has unknowns."""

    def __init__(self, network: Network, x: Tensor, cotangent: Tensor, rows: int, generator: torch.Generator):
        self.network, self.x, self.cotangent, self.rows = network, x, cotangent, rows
        sizes = [part.shape[1:].numel() for part in self._sent(x[None])]
        self.together = max(1, min(FIRST, TOGETHER // sum(sizes)))
        self._signs = [
            2.0 * torch.randint(2, (size,), generator=generator, device=x.device).to(x) - 1 for size in sizes
        ]
        # Which frequencies of a parameter are kept, and in which rows.
        self._from = [torch.randperm(size, generator=generator, device=x.device)[:rows] for size in sizes]
        self._to = [torch.randperm(rows, generator=generator, device=x.device)[: len(kept)] for kept in self._from]
        self._sizes: list[Tensor] | None = None

    def __call__(self, drawn: Float[Tensor, "d b ..."]) -> Float[Tensor, "d rows"]:
        x = self.x.expand(drawn.shape).contiguous()
        moved = torch.func.jvp(self._sent, (x,), (drawn,))[1]
        if self._sizes is None:
            self._sizes = [part.flatten(1).norm(dim=1).max().clamp(min=torch.finfo(x.dtype).tiny) for part in moved]
        found = x.new_zeros(len(drawn), self.rows)
        for part, size, sign, kept, to in zip(moved, self._sizes, self._signs, self._from, self._to, strict=True):
            mixed = _cosines(part.flatten(1) * sign / size)
            found[:, to] += mixed[:, kept]
        return found

    def _sent(self, x: Float[Tensor, "d b ..."]) -> list[Tensor]:
        """The output and the gradients of all weights and biases, each (d, ...)."""
        d, b = x.shape[:2]
        values = self.network.forward(x.flatten(0, 1))
        k = self.cotangent.expand(d, *self.cotangent.shape).flatten(0, 1)
        cotangents = self.network.cotangents(values, self.network.slopes(values), k)
        found = [values[-1].reshape(d, -1)]
        for at, node in enumerate(self.network.nodes):
            if isinstance(node.op, Linear) and node.op.has_gradient:
                layer, k_out = node.op.layer, cotangents[at + 1]
                if k_out is None:
                    continue
                packed = layer.pack_output(k_out)
                weight = layer.grad_weight(layer.pack_input(values[node.reads[0]]), packed)
                found.append(weight.reshape(d, b, -1).sum(1))
                if layer.bias_name is not None:
                    found.append(packed.sum(2).reshape(d, b, -1).sum(1))
        return found
