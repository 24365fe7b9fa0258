"""How many dimensions of its input a network's gradients leave free to first order, whatever the attack.

Along such a direction neither a gradient nor the output moves: no attack can tell the input from its neighbours there,
even one that knows every label, side of a kink and route through a pool. Measured for any model, by the derivative of
everything that is sent with respect to the input: its rank is that of as many drawn combinations of its rows as it
takes until they depend on each other.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.linalg import deadline, psd
from rgap.target import Target

FIRST = 64
"""Combinations that are drawn before the first look at their rank; twice as many before each other."""
MORE = 16
"""Combinations beyond the rank that show that there is no more."""
TELLING = 16
"""A bound tells something if it leaves out at least one of so many dimensions."""
SPARE = 64
"""Combinations beyond one for each unknown: as many as unknowns alone would be badly conditioned."""
AT_ONCE = 16
"""Combinations that are differentiated in one go, if the model's parameters are few."""
TOGETHER = 2**24
"""Factors of all parameters that are held at once."""
RATE = 2**30
"""Multiplications a second that one combination is taken to do; a slow machine does that many."""
TOLERANCE = 1e-6
"""Singular values below this part of the largest are zero: a move that small is less than float32 rounds."""


@dataclass(frozen=True)
class Local:
    """What the gradients leave free of a batch's inputs, near one of them."""

    unknowns: int
    """Dimensions of the inputs."""
    free: int
    complete: bool
    """Whether all combinations were looked at that were needed; if not, it is no more than this."""
    alone: bool = False
    """Whether it is of one sample by itself, since its batch would have taken too long."""
    seconds: float | None = None
    """That all combinations would take, about; None if that is not known, or they were looked at."""


def free_dimensions(
    target: Target,
    x: Float[Tensor, "b ..."],
    generator: torch.Generator,
    progress: Callable[[int, int], None] = lambda done, of: None,
) -> Local | None:
    """How many dimensions of the inputs move nothing that is sent; as far as the time allows that is set around it.

    Args:
        x: where to measure.
        progress: is called with the dimensions that were looked for and how many there are.

    Returns:
        None for a model that draws at random, or that computes in float32 whatever it is given.
    """
    unknowns, x = x.numel(), x.to(target.device, torch.float64).requires_grad_()
    with torch.no_grad(), torch.random.fork_rng():
        outputs, again = target.outputs(x), target.outputs(x)
    if outputs.dtype != torch.float64 or not torch.equal(outputs, again):
        return None
    k = torch.randn(outputs.shape, generator=generator, dtype=torch.float64).to(x.device)
    outputs, gradients = target.backward(x, k)
    sent = [part for part in (outputs, *gradients.values()) if part.requires_grad]
    together = max(1, min(AT_ONCE, TOGETHER // sum(part.numel() for part in sent)))
    rows, rank, begun = x.new_zeros(0, unknowns), 0, time.perf_counter()
    while len(rows) < unknowns:
        upto = max(FIRST, 2 * len(rows))
        if upto > 0.7 * unknowns:  # so near to all of them that a further look costs more than it saves
            upto = unknowns + SPARE
        while len(rows) < upto:
            if deadline.used() >= 1:
                return _so_far(rows, time.perf_counter() - begun)
            rows = torch.cat([rows, _rows(sent, x, min(together, upto - len(rows)), generator)])
            progress(min(len(rows), unknowns), unknowns)
        rank = _rank(rows)
        if rank <= len(rows) - MORE:
            break
    return Local(unknowns, unknowns - rank, True)


def _so_far(rows: Float[Tensor, "count n"], seconds: float) -> Local:
    """What the combinations tell that there was time for."""
    count, unknowns = rows.shape
    if not count:
        return Local(unknowns, unknowns, False)
    return Local(unknowns, unknowns - _rank(rows), False, seconds=seconds / count * (unknowns + SPARE))


def _rank(rows: Float[Tensor, "count n"]) -> int:
    count, unknowns = rows.shape
    return psd.factor(rows @ rows.mT if count < unknowns else rows.mT @ rows, TOLERANCE).rank


def worth(products: int, unknowns: int, seconds: float) -> bool:
    """Whether that time is enough for as many dimensions as tell something.

    Args:
        products: that the inputs take from the network's input to its output.
        unknowns: values of the inputs.
    """
    # Forward, backward and the weights' gradients; each is differentiated, which takes three times as many.
    return max(MORE, unknowns // TELLING) * 9 * products <= RATE * seconds


def _rows(sent: list[Tensor], x: Tensor, count: int, generator: torch.Generator) -> Float[Tensor, "count n"]:
    """Drawn combinations of the derivatives of all that is sent, each part in units of its own size."""

    def drawn(part: Tensor) -> Tensor:
        factors = torch.randn(count, *part.shape, generator=generator, dtype=part.dtype).to(part.device)
        return factors / (part.detach().norm() or 1.0)

    factors = [drawn(part) for part in sent]

    def differentiated(chosen: list[Tensor], batched: bool) -> Tensor:
        return torch.autograd.grad(sent, x, chosen, retain_graph=True, is_grads_batched=batched)[0]

    try:
        found = differentiated(factors, True)
    except RuntimeError:  # no rule to differentiate several at once
        found = torch.stack([differentiated([each[at] for each in factors], False) for at in range(count)])
    return found.flatten(1)
