"""Gauss-Newton on all local steps at once, for all samples of a client together.

Where the first layer reads the samples themselves its weights act on the space that they span alone, and move within
it. There a client of n samples is a network of n inputs, and the samples are n n numbers, whatever their size.
Elsewhere, as behind convolutions, all values of the samples are sought, by products with the steps' derivative. The
gradient jumps wherever a unit changes its side of a kink; so kinks are rounded off first, and less with each step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from math import prod

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.all_steps import AllSteps, behind_first, whole_cotangents
from rgap.inversion.prior import Prior
from rgap.inversion.walk import Client, Difference, Order, Plan, Walk, Weights
from rgap.linalg import cg, deadline, psd
from rgap.linalg.least_squares import Direct, Regulariser, probes
from rgap.linalg.operator import LinearOperator
from rgap.nn.layers import Layer, linear
from rgap.nn.network import Network, Node
from rgap.nn.ops import Linear
from rgap.nn.soft import SoftKinks

STEPS = 10
"""With one derivative: samples are nearly known."""
RTOL, PRODUCTS = 1e-2, 60
"""Of the conjugate gradients of a step: what it leaves the next one takes up."""
RTOL_MOVES, PRODUCTS_MOVES = 1e-3, 400
"""Of those that tell how far rounding moves samples."""
ENOUGH = 0.999
"""A step that lowers the residual by less is the last."""
HALVINGS = 5
"""Of a step that leads astray, at the most."""
DIRECT = Direct(rank_tolerance=1e-7)
SAME = 1e-9
"""How well the small network's step must agree with the whole one's, relatively."""


def in_their_span(
    steps: AllSteps, x: Float[Tensor, "n u"], order: Order
) -> tuple[Float[Tensor, "n u"], Float[Tensor, " n"]]:
    """Samples that all parameters agree with, in units of their rounding, and their labels, which are unknowns too
    where they may be any number; x itself where that cannot be had.

    Args:
        order: of each step the numbers of its samples.
    """
    inside = _inside(steps, x, order)
    if inside is None:
        return x, steps.labels
    operator, nearly, q = inside
    at, here, real = operator.like, operator.missed, not steps.client.loss.labels
    for _ in range(STEPS):
        right = operator.rmv(here[None])
        if not float((right * nearly(right)).sum()) > (1 - ENOUGH**2) * float(here.square().sum()):
            break
        move = cg.solve(operator.normal, right, RTOL, PRODUCTS, precondition=nearly).x[0]
        there = -operator.made(at + move)
        if not float(there.norm()) < ENOUGH * float(here.norm()):
            break
        at, here = at + move, there
    return (at[:, :-1] @ q.mT, at[:, -1]) if real else (at @ q.mT, steps.labels)


def rounding_moves(steps: AllSteps, x: Float[Tensor, "n u"], order: Order) -> Float[Tensor, " n"] | None:
    """How far one draw of the difference's rounding moves each sample's values within their span, root mean square;
    None where that cannot be had. The arguments are those of `in_their_span`."""
    moved = drawn_moves(steps, x, order, 1)
    return None if moved is None else moved[0].square().mean(1).sqrt()


def drawn_moves(steps: AllSteps, x: Float[Tensor, "n u"], order: Order, draws: int) -> Float[Tensor, "d n u"] | None:
    """Where to draws of the difference's rounding move the samples, as `rounding_moves`."""
    inside = _inside(steps, x, order)
    if inside is None:
        return None
    operator, nearly, q = inside
    generator = torch.Generator(device=x.device).manual_seed(0)
    drawn = torch.randn(draws, *operator.missed.shape, generator=generator, dtype=x.dtype, device=x.device)
    found = [
        cg.solve(operator.normal, operator.rmv(each[None]), RTOL_MOVES, PRODUCTS_MOVES, precondition=nearly)
        for each in drawn
    ]
    if not all(bool(each.converged.all()) for each in found):
        return None
    return torch.cat([each.x[:, :, : q.shape[1]] for each in found]) @ q.mT


def _inside(
    steps: AllSteps, x: Float[Tensor, "n u"], order: Order
) -> tuple[Unrolled, Callable[[Tensor], Tensor], Float[Tensor, "u n"]] | None:
    """The derivative by the samples as coordinates in their span, what solves for them nearly, and the span."""
    client, plan, layer, labels = steps.client, steps.plan, steps.layer, steps.labels
    q: Tensor = torch.linalg.qr(x.mT)[0]
    found = spanned(client, steps.difference, layer, q)
    if found is None:
        return None
    small, inside = found
    real = not client.loss.labels
    made = made_by(small, plan, inside, None if real else labels, order)
    inputs = x.reshape(-1, *client.input_shape)
    k = whole_cotangents(Walk(client, plan).all(inputs, labels, order), inputs, labels, order, behind_first(client))
    operator = Unrolled(made, torch.cat([x @ q, labels[:, None]], 1) if real else x @ q)
    return operator, _nearly(operator, k / inside.noise[layer.weight_name], real), q


def _nearly(operator: Unrolled, k: Float[Tensor, "n o"], real: bool) -> Callable[[Tensor], Tensor]:
    """What J'J is nearly, solved: the first layer's rows tell the samples, as far as k does not depend on them.

    Args:
        k: of each sample in the whole difference, in roundings of the first layer's weights.
        real: whether each sample has its label behind its values.
    """
    samples = psd.factor(k @ k.mT, 0.0)
    if not real:
        return lambda v: samples.solve(v[0])[None]
    units = operator.like.new_zeros(len(k), *operator.in_shape)
    units[range(len(k)), range(len(k)), -1] = 1
    rows = operator.mv(units)
    labels = psd.factor(rows @ rows.mT, 0.0)
    return lambda v: torch.cat([samples.solve(v[0, :, :-1]), labels.solve(v[0, :, -1:])], 1)[None]


def spanned(
    client: Client, difference: Difference, layer: Layer, q: Float[Tensor, "u n"]
) -> tuple[Client, Difference] | None:
    """The client whose samples are coordinates in a space, and what was sent there; None where something that knows
    their shape stands in front.

    Args:
        q: the space's orthonormal basis.
    """
    name, inputs = layer.weight_name, q.shape[1]
    whole = client.weights[name]
    if whole.shape != (layer.outputs, layer.unknowns) or prod(client.input_shape) != layer.unknowns:
        return None
    small = replace(client, weights={**client.weights, name: whole @ q})
    if not _agrees(client, small, name, q):
        return None

    def network(weights: Weights) -> Network:
        return _of_coordinates(client.network({n: w for n, w in weights.items() if n != name}), weights[name], name)

    small = replace(small, input_shape=(inputs,), network=network, gradient=client.differentiable)
    return small, replace(difference, sent={**difference.sent, name: difference.sent[name] @ q})


def _of_coordinates(network: Network, weight: Float[Tensor, "o n"], name: str) -> Network:
    """A network from its first layer on, that with this weight."""
    linears = ((i, node.op) for i, node in enumerate(network.nodes) if isinstance(node.op, Linear))
    at = next(i for i, op in linears if op.layer.weight_name == name)
    node = network.nodes[at]
    assert isinstance(node.op, Linear)
    shape, old = (weight.shape[1],), node.op.layer
    layer = linear(old.name, weight, old.bias, shape, name, old.bias_name)
    rest = (replace(each, reads=tuple(value - at for value in each.reads)) for each in network.nodes[at + 1 :])
    return Network((Node(replace(node.op, layer=layer), (0,), node.shape), *rest), shape)


@dataclass(frozen=True)
class Softening:
    """How kinks get their edges back, and how a prior fades, over the steps of a search."""

    width: float = 0.3
    """Of the first step's kinks, as in `SoftKinks`."""
    narrows: float = 0.6
    weight: float = 1e-2
    """Of the prior, relative to the rows'."""
    fades: float = 0.3
    soft: int = 22
    """Steps."""
    sharp: int = 4
    """Steps on the network as it is, and without the prior."""
    patience: int = 6
    """Steps in which the misfit has to halve, or the search is given up."""


SOFTENING = Softening()


@dataclass(frozen=True, eq=False)
class Met:
    """Samples whose steps come as near to the difference as Gauss and Newton's get."""

    x: Float[Tensor, "n ..."]
    walk: Walk
    """Their steps."""
    misfit: float
    """Of these steps (`Difference.misfit`), each value in units of its own rounding."""
    operator: Unrolled

    @property
    def std(self) -> float:
        """How far the difference's rounding moves their values, root mean square; infinite where some are left free."""
        operator = self.operator
        generator = torch.Generator(device=self.x.device).manual_seed(0)
        drawn = torch.randn(operator.missed.shape, generator=generator, dtype=self.x.dtype, device=self.x.device)
        sure = DIRECT.determine(operator, drawn[None])
        return sure.std if sure.rank == operator.unknowns else torch.inf


def meet(
    client: Client,
    plan: Plan,
    difference: Difference,
    x: Float[Tensor, "n ..."],
    labels: Float[Tensor, " n"],
    order: Order,
    prior: Prior,
    enough: float,
    softening: Softening = SOFTENING,
    report: Callable[[int, float], None] = lambda step, misfit: None,
) -> Met:
    """Samples that all parameters agree with after all steps, in units of their rounding.

    Args:
        x: where to begin; the middle of the value range will do.
        enough: a misfit (`Met.misfit`) from which on the steps are those at the end.
    """
    steps = softening.soft + softening.sharp
    walk = Walk(client, plan).all(x, labels, order)
    best, least, step, trail = (x, walk), torch.inf, 0, list[float]()
    while step < steps:
        last = step >= softening.soft
        soft = client if last else _softened(client, softening.width * softening.narrows**step)
        units = difference.along(walk) if last else difference
        if last and trail:  # what was the nearest may not be in the finer units
            (best, least), trail = ((x, walk), units.misfit(walk)), []
        operator = Unrolled(made_by(soft, plan, units, labels, order), x)
        weight = softening.weight * softening.fades**step
        move = DIRECT.step(operator, operator.missed[None], x, Regulariser(prior, prior.centre, weight, last)) - x
        points = [x + move * 0.5**halving for halving in range(HALVINGS)]
        size = float(operator.missed.norm())
        x = next((each for each in points if float(operator.made(each).norm()) < size), points[-1])
        walk = Walk(client, plan).all(x, labels, order)
        misfit = (difference.along(walk) if last else difference).misfit(walk)
        report(step + 1, misfit)
        if misfit < least:
            best, least = (x, walk), misfit
        elif last:
            break
        trail.append(misfit)
        if not last and len(trail) > softening.patience and misfit > trail[-1 - softening.patience] / 2:
            break
        step = max(step + 1, softening.soft) if misfit <= enough else step + 1
    x, walk = best
    units = difference.along(walk)
    return Met(x, walk, units.misfit(walk), Unrolled(made_by(client, plan, units, labels, order), x))


def _softened(client: Client, width: float) -> Client:
    def differentiable(at: Weights, x: Tensor, labels: Tensor) -> dict[str, Tensor]:
        with SoftKinks(width):
            return client.differentiable(at, x, labels)

    return replace(client, differentiable=differentiable)


class Unrolled(LinearOperator):
    """How the difference after all steps moves with the samples."""

    def __init__(self, made: Callable[[Tensor], Tensor], x: Float[Tensor, "n ..."]):
        """
        Args:
            made: of samples, what their steps make, less what was sent, in roundings.
        """
        self.made, self.like, self.in_shape = made, x, tuple(x.shape)
        here, self._back = torch.func.vjp(made, x)[:2]
        # The adjoint of the adjoint: forward mode would run the steps again for every product.
        self._forth = torch.func.vjp(lambda rows: self._back(rows)[0], torch.zeros_like(here))[1]
        self.missed: Float[Tensor, " rows"] = -here.detach()
        self.values = 8 * len(here)
        drawn = probes(self, 2)
        self.mean_diagonal = float(self.mv(drawn).square().sum()) / drawn.numel()

    def mv(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d rows"]:
        found: Tensor = torch.func.vmap(lambda v: self._forth(v)[0])(x)
        return found.detach()

    def rmv(self, rows: Float[Tensor, "d rows"]) -> Float[Tensor, "d *in_shape"]:
        deadline.check()
        found: Tensor = torch.func.vmap(lambda r: self._back(r)[0])(rows)
        return found.detach()


def made_by(
    client: Client, plan: Plan, difference: Difference, labels: Float[Tensor, " n"] | None, order: Order
) -> Callable[[Tensor], Tensor]:
    """What the steps on samples make, less what was sent, each value in units of its rounding; without labels each
    sample has its own behind its values."""
    smooth = replace(client, gradient=client.differentiable)

    sent = {name: d for name, d in difference.sent.items() if difference.noise[name]}

    def made(x: Tensor) -> Float[Tensor, " rows"]:
        samples, own = (x[:, :-1], x[:, -1]) if labels is None else (x, labels)
        end = Walk(smooth, plan).all(samples, own, order).end
        parts = ((end[name] - d) / difference.units(name) for name, d in sent.items())
        return torch.cat([each.flatten() for each in parts])

    return made


def _agrees(client: Client, small: Client, name: str, q: Float[Tensor, "u n"]) -> bool:
    """Whether the model takes samples as they are in a space: nothing that knows their shape stands in front."""
    label = (client.loss.labels or (0.5,))[0]
    at = torch.eye(q.shape[1], dtype=q.dtype, device=q.device) * len(q) ** 0.5
    labels = q.new_full((len(at),), label)
    wanted = client.gradient(client.weights, (at @ q.mT).reshape(-1, *client.input_shape), labels)
    wanted = {**wanted, name: wanted[name] @ q}
    try:
        found = small.differentiable(small.weights, at, labels)
    except (RuntimeError, ValueError, IndexError, TypeError):
        return False
    return all(float((found[each] - g).norm()) <= SAME * float(g.norm()) for each, g in wanted.items())
