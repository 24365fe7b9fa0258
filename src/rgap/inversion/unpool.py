"""Back through a pool: from what is known behind it to what is known in front of it.

The layer in front of the pool tells the routes (`rgap.inversion.routes`). Then the value that a maximum let through is
known at its place, and of the others that they are no larger; of a mean all values are known.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from rgap.inversion.prior import Prior
from rgap.inversion.route_rows import Annealing, Observed, Pooled
from rgap.inversion.routes import (
    ANNEALING,
    COLDER,
    FROM_INPUT,
    NEAR,
    QUICK,
    VALUES_ONLY,
    Unpooled,
    find_routes,
    missed_by,
    settle,
)
from rgap.inversion.state import Cause, State, Stop
from rgap.inversion.through import find_through
from rgap.inversion.windows import windows
from rgap.nn.activation import Activation
from rgap.nn.activations import Identity, ReLU
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Affine, Elementwise, Linear
from rgap.nn.pools import MaxPool, MeanPool, Pool

FEWER = 2
"""So many times fewer unknowns has the network's input where routes are looked for from it first."""
MANY = 8_192
"""Unknowns of which routes are looked for in large steps first."""
FEW = 1_024
"""Unknowns of which routes are looked for from a second start: that takes seconds."""
ENOUGH = 1.25
"""Rows for each unknown with which routes are looked for."""
SHARE = 0.75
"""So much of what it reads the rows of a layer that is not the first have to tell for routes to be looked for there."""
ZERO = 10
"""A mean behind a ReLU below so many roundings of the largest says that nothing was above zero, and no more."""
CLOSE = 2e-4
"""What may be missed of the sides behind a mean where the network's input is the unknown: all layers tell the rest."""
MISSED = 200
"""What right routes may miss, in roundings of the gradient."""
LARGER = 1e4
"""Values are so many times larger than their errors at least where it is known that they are none."""
LIMIT = 10.0
"""Routes that miss more than this many times as much are not taken."""


@dataclass(frozen=True)
class Route:
    """A pool, and what it reads: a layer, norms with fixed statistics, an increasing activation."""

    part: Pooled
    activation: Activation
    """Between the layer and the pool."""
    weight_name: str
    scale: Tensor
    """Of what follows the layer, one for each output, (o, 1)."""

    def observed(self, state: State, gradient: Tensor, bounded: bool) -> Observed:
        """What is known behind the pool: of a maximum as values of the layer, of a mean as they are.

        Args:
            state: behind the pool, (b, *shape).
            gradient: of the layer's weight.
            bounded: whether values that are not known do not exceed what stands there, as behind a ReLU's zeros.
        """
        known = torch.ones_like(state.value, dtype=torch.bool)
        if state.row_weight is not None:
            known &= state.row_weight > 0
        value, k = state.value, state.cotangent
        zero, idle = None, torch.zeros_like(k)
        if isinstance(self.part.pool, MaxPool):
            inverse = self.activation.invert(state.value, state.std)
            zero = None if inverse.weight is None else known & (inverse.weight == 0)
            if isinstance(self.activation, ReLU) and zero is not None:
                idle = torch.where(zero, k, 0.0)
            value, k = inverse.z, k * inverse.slope
        limit = torch.where(known, value, value if bounded else torch.inf)
        if zero is not None:
            limit = torch.where(zero, 0.0 if isinstance(self.activation, ReLU) else torch.inf, limit)
            known &= ~zero
        layer = self.part.layer
        shape = (len(state.value), layer.outputs, -1)
        grad = layer.pack_weight(gradient[None])[0]
        grad = grad / self.scale.reshape(layer.weight.shape[0], layer.weight.shape[1], 1)
        k = torch.where(known, k, 0.0)
        return Observed(limit.reshape(shape), known.reshape(shape), k.reshape(shape), idle.reshape(shape), grad)


def route_of(network: Network, node: int, first: int | None = None) -> Route | None:
    """A pool with what it reads, if that is a layer whose gradient tells its routes.

    Args:
        node: of the pool.
        first: the value from which on everything is unknown; what the layer reads if None.
    """
    pool = network.nodes[node].op
    assert isinstance(pool, Pool)
    activation: Activation = Identity()
    affine: list[Affine] = []
    at = node
    while True:
        reads = network.nodes[at].reads
        if len(reads) != 1 or reads[0] == 0 or len(network.readers[reads[0]]) != 1:
            return None
        at = reads[0] - 1
        op = network.nodes[at].op
        if isinstance(op, Elementwise) and isinstance(activation, Identity) and not affine:
            if isinstance(pool, MaxPool) and isinstance(op.activation, NonMonotone):
                return None  # the largest output need not be that of the largest value
            if isinstance(pool, MeanPool) and not op.activation.kinked:
                return None  # no sides are hidden: Gauss and Newton's steps find the input
            activation = op.activation
        elif isinstance(op, Affine):
            affine.append(op)
        elif isinstance(op, Linear):
            break
        else:
            return None
    layer = op.layer
    if not op.has_gradient or layer.channels_last or pool.channels != layer.outputs:
        return None
    scale, offset = layer.weight.new_ones(layer.outputs, 1), layer.offset
    for each in reversed(affine):
        if each.scale.numel() not in (1, layer.outputs) or each.shift.numel() not in (1, layer.outputs):
            return None
        of, shift = each.scale.reshape(-1, 1), each.shift.reshape(-1, 1)
        scale, offset = of * scale, of * offset + shift
    if not bool((scale != 0).all()):
        return None
    weight = layer.weight * scale.reshape(*layer.weight.shape[:2], 1)
    folded = replace(layer, weight=weight, bias=offset[:, 0])
    entry = network.nodes[at].reads[0]
    first = entry if first is None else first
    front = _between(network, first, entry)
    if front is None:
        return None
    within = Identity() if isinstance(pool, MaxPool) else activation
    return Route(Pooled(front, folded, within, pool), activation, layer.weight_name, scale)


def _between(network: Network, first: int, last: int) -> Network | None:
    """What leads from one value to another, through which everything passes."""
    if first == last:
        return Network((), network.shapes[first])
    segments = [each for each in network.segments if first <= each.entry and each.exit <= last]
    if not segments or segments[0].entry != first or segments[-1].exit != last:
        return None
    return network.part(segments)


def solve_route(
    route: Route,
    observed: Observed,
    eps: float,
    with_prior: bool = False,
    report: Callable[[int, float], None] = lambda step, missed: None,
    whole: Route | None = None,
) -> Unpooled | None:
    """The input and the routes, or the network's own input; None where the rows are too few to tell them.

    Args:
        eps: relative rounding of the gradient.
        with_prior: whether the prior may decide what too few rows leave open.
        whole: the same pool from the network's own input on, where that has far fewer unknowns.
    """
    known = int(_equations(route.part, observed, eps).sum())
    unknowns = len(observed.value) * math.prod(route.part.front.input_shape)
    if not with_prior and known + route.part.layer.gradient_rows < ENOUGH * unknowns:
        return None
    start, other, prior = _constants(route.part, observed)
    part = (whole or route).part
    through = _behind_maxima(part) or (isinstance(part.pool, MeanPool) and bool(part.front.activations))
    tries: list[tuple[Annealing | None, Tensor]] = []
    if known >= ENOUGH * unknowns:
        tries.append((VALUES_ONLY, start))
    if whole is not None:
        tries.append((NEAR, _read(whole, _from_input(whole, observed, eps, report))))
    if through:
        tries.append((None, start))
    if unknowns > MANY:
        tries.append((QUICK, start))
    tries.append((ANNEALING, start))
    if unknowns <= FEW:
        tries.append((ANNEALING, other))
    tries.append((COLDER, start))
    found: Unpooled | None = None
    agrees = MISSED * eps
    for schedule, begin in tries:
        if schedule is None:
            tried = _through(whole or route, observed, agrees, report)
            if tried.missed <= max(agrees, CLOSE):
                return tried if whole is None else replace(found or tried, input=tried.x)
            if whole is not None:
                continue
            if _behind_maxima(part):  # other searches lead no nearer
                return tried
        else:
            tried = find_routes(route.part, observed, prior, agrees, begin, schedule, report)
        found = tried if found is None or tried.missed < found.missed else found
        if found.missed <= agrees:
            break
    return found


def _equations(part: Pooled, observed: Observed, eps: float) -> Bool[Tensor, "b o m"]:
    """Which of the known values are equations: of a mean of nothing but a ReLU's zeros none is."""
    if not isinstance(part.activation, ReLU) or not observed.known.any():
        return observed.known
    return observed.known & (observed.value.abs() > ZERO * eps * observed.value[observed.known].abs().max())


def _behind_maxima(part: Pooled) -> bool:
    """Whether it is a maximum behind another one."""
    return isinstance(part.pool, MaxPool) and any(isinstance(node.op, MaxPool) for node in part.front.nodes)


def _tells_enough(part: Pooled, observed: Observed, eps: float, share: float = SHARE) -> bool:
    """Whether a layer's own rows tell such a part of what it reads, by count, with routes or sides as drawn.

    Args:
        eps: relative rounding of the gradient.
    """
    if len(observed.value) > 1:
        return True
    layer, told = part.layer, _equations(part, observed, eps)
    generator = torch.Generator(device=told.device).manual_seed(0)
    places = (1, layer.outputs, layer.positions)
    z = torch.randn(places, generator=generator, dtype=observed.value.dtype, device=told.device)
    slope = windows(part.pool, part.activation, z, 0.0).slope
    k = part.pool.scatter(slope * (observed.cotangent * told)[..., None]).reshape(places)
    kernel = layer.kernel_matrix(k)[0]
    values = torch.linalg.eigvalsh(kernel @ kernel.mT if kernel.shape[1] < kernel.shape[2] else kernel.mT @ kernel)
    rank = int((values > eps ** (4 / 3) * values[:, -1:]).sum()) * layer.unknowns // (layer.groups * layer.pixels)
    return rank + int(told.sum()) >= share * layer.unknowns


def _from_input(whole: Route, observed: Observed, eps: float, report: Callable[[int, float], None]) -> Unpooled:
    """The network's input that nearly meets the constraints, found from a constant one."""
    start, _, prior = _constants(whole.part, observed)
    return find_routes(whole.part, observed, prior, MISSED * eps, start, FROM_INPUT, report)


def _through(whole: Route, observed: Observed, agrees: float, report: Callable[[int, float], None]) -> Unpooled:
    """The same to the end, through kinks in front of the layer."""
    start, _, prior = _constants(whole.part, observed)
    return find_through(whole.part, observed, prior, agrees, start, report)


def _read(whole: Route, found: Unpooled) -> Float[Tensor, "b ..."]:
    """What the layer reads of an input."""
    return whole.part.front.forward(found.x)[-1]


def _constants(part: Pooled, observed: Observed) -> tuple[Tensor, Tensor, Prior]:
    """The constant input that misses least of the values, one of the size that these have, and the prior about the
    former; each input (b, *shape)."""
    shape, known = part.front.input_shape, observed.value[observed.known]
    scale = float(known.abs().mean() / part.layer.weight.flatten(1).norm(dim=1).mean()) if len(known) else 1.0
    sizes = [size * 2.0 ** (half / 2) for size in dict.fromkeys((1.0, scale)) for half in range(-8, 9)]

    def constant(value: float) -> Tensor:
        return observed.value.new_full((len(observed.value), *shape), value)

    best = min((v for size in sizes for v in (size, -size)), key=lambda v: missed_by(part, observed, constant(v)))
    return constant(best), constant(scale), Prior(shape, best)


def before_pool(
    network: Network,
    node: int,
    state: State,
    gradients: Mapping[str, Tensor],
    eps: float,
    report: Callable[[int, float], None] = lambda step, missed: None,
) -> State | Stop:
    """The state in front of a pool, of b samples of one gradient; or why it is not known.

    Args:
        node: of the pool.
        state: behind it, (b, *shape).
        gradients: by parameter name, of the sum over the samples.
        eps: relative rounding of the gradient.
    """
    pool = network.nodes[node].op
    assert isinstance(pool, Pool)
    route = route_of(network, node)
    unknown = Stop(pool, Cause.LOSSY, pool.loses)
    if route is None or route.weight_name not in gradients:
        return unknown
    observed = route.observed(state, gradients[route.weight_name], zeros_behind(network, node))
    if not bool(observed.known.any()):
        return unknown
    whole = route_of(network, node, 0)
    # Behind another maximum there is a search from the network's input, and drawn routes tell more than the right ones.
    share = 1.0 if whole is not None and _behind_maxima(whole.part) else SHARE
    if whole is not None and whole.part.front.nodes and not _tells_enough(route.part, observed, eps, share):
        return replace(unknown, what=f"{pool.loses}, and its layer's own rows tell too little of what it reads")
    if math.prod(network.input_shape) * FEWER > math.prod(route.part.front.input_shape):
        whole = None
    found = solve_route(route, observed, eps, report=report, whole=whole)
    if found is None:
        return unknown
    if found.input is not None:
        what = f"{pool.loses}, and which ones its layer's own rows do not tell"
        return replace(unknown, what=what, input=found.input)
    if found.missed > LIMIT * MISSED * eps:
        what = f"{pool.loses}, and which ones was not found (missed {found.missed:.0e})"
        return replace(unknown, what=what, nearest=found.x)
    if isinstance(pool, MaxPool):
        return _routed(pool, state, found.routes)
    return _values(route, observed, state, found.x, eps)


def zeros_behind(network: Network, node: int) -> bool:
    """Whether a ReLU reads the pool: what it made zero was not above it."""
    behind = [network.nodes[each].op for each in network.readers[node + 1]]
    return len(behind) == 1 and isinstance(behind[0], Elementwise) and isinstance(behind[0].activation, ReLU)


def _values(route: Route, observed: Observed, state: State, x: Tensor, eps: float) -> State:
    """The state in front of a mean, whose values follow from the input, but for those that its rows leave open."""
    part = route.part
    assert isinstance(part.pool, MeanPool)
    x, std, hidden = settle(part, observed, x, state.std.expand(state.value.shape).reshape(observed.value.shape), eps)
    z = part.layer.output(part.layer.pack_input(part.front.forward(x)[-1])) + part.layer.offset
    shape, slope = (len(x), *part.pool.input_shape), part.activation.slope(z)
    # All values follow from as few as the layer reads: solved for these as if each had an error of its own, they would
    # take it for averaged out.
    repeated = max(1.0, int((slope != 0).sum()) / (len(x) * part.layer.unknowns))
    size = (std * slope * repeated**0.5).square().mean().sqrt()
    value = part.activation(z)
    # On which side of its kink each value lies is decided, however small it is.
    size = torch.minimum(size, value.abs() / LARGER)
    cotangent = part.pool.against(state.cotangent, part.pool.share)
    known = (~hidden).to(value).reshape(shape) if bool(hidden.any()) else None
    return State(value.reshape(shape), cotangent, known, size.reshape(shape))


def _routed(pool: MaxPool, state: State, routes: Tensor) -> State:
    """The state in front of the pool, where each window's value came from."""
    b = len(state.value)
    windows = (b, pool.channels, -1, 1)
    count = pool.scatter(routes)
    reached = count > 0

    def each(values: Tensor) -> Tensor:
        spread = pool.scatter(routes * values.expand(state.value.shape).reshape(windows))
        return torch.where(reached, spread / count.clamp(min=1.0), 0.0)

    weight = torch.ones_like(state.value) if state.row_weight is None else state.row_weight
    std = each(state.std)
    return State(each(state.value), pool.against(state.cotangent, routes), each(weight), std)
