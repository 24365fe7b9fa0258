"""All samples of a batch at once: Gauss and Newton on what they leave of a head's gradients.

Alone, a sample is told from a mixture of others by what bends behind it. Where little does, because all outputs are
nearly the same, it is the sum over all samples that tells them apart:

    G = sum over i of c k_i (x_i, 1)'      so      X = (c K)^+ G      once all k are known,

and k hardly depends on x there.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.condition import CotangentCondition
from rgap.inversion.subspace.head import Head, Spaces
from rgap.inversion.subspace.identify import Samples
from rgap.linalg import deadline
from rgap.linalg.derivative import jacobian as jacobian_of
from rgap.nn.ops import Linear

LARGEST = 20_000_000
"""Entries of the Jacobian up to which all samples are solved for at once."""
FIXED_POINT = 20
"""Steps of X = (c K)^+ G, at the most."""
ROUNDINGS = 10.0
"""A gradient that is met agrees to so many roundings (root mean square)."""


@dataclass(frozen=True, eq=False)
class HeadSystem:
    """The gradients of a head's layers as functions of the coordinates t of all samples, (b, d)."""

    spaces: Spaces
    labels: Float[Tensor, " b"]
    share: Float[Tensor, " b"]
    gradients: Mapping[str, Tensor]
    eps: float

    @cached_property
    def _condition(self) -> CotangentCondition:
        return self.spaces.cotangent_condition(self.labels)

    @property
    def head(self) -> Head:
        return self.spaces.head

    @property
    def unknowns(self) -> int:
        return len(self.labels) * self._condition.unknowns

    @property
    def entries(self) -> int:
        """Of the Jacobian."""
        first = self.spaces.first
        return self.unknowns * (len(first.u) * first.rank + sum(len(grad) for _, _, grad, _ in self._layers))

    @cached_property
    def _layers(self) -> tuple[tuple[int, Linear, Tensor, float], ...]:
        """Those behind the first one: where, which, the gradient, bias included, and its rounding."""
        found = []
        for node_id, node in enumerate(self.head.network.nodes[1:], 1):
            op = node.op
            if isinstance(op, Linear) and op.has_gradient and op.layer.weight_name in self.gradients:
                grad = op.layer.pack_weight(self.gradients[op.layer.weight_name].double()[None])[0].flatten()
                bias = self.gradients.get(op.layer.bias_name or "")
                grad = grad if bias is None else torch.cat([grad, bias.double()])
                found.append((node_id, op, grad, self._rounding(grad)))
        return tuple(found)

    def _rounding(self, grad: Tensor) -> float:
        return self.eps * max(float(grad.square().mean().sqrt()), torch.finfo(grad.dtype).tiny)

    def residual(self, t: Float[Tensor, "b d"]) -> Float[Tensor, " rows"]:
        """What is left of the gradients, in units of each layer's rounding."""
        condition, first, network = self._condition, self.spaces.first, self.head.network
        behind = condition.behind
        values = [condition.z(t).reshape(-1, *network.shapes[1])]
        if behind is not None:
            values = behind.forward(values[0])
        k_out = self.head.loss.output_gradient(values[-1].reshape(len(t), -1), self.labels)
        share = self.share.reshape(-1, *[1] * (values[-1].dim() - 1))
        end = k_out.reshape(values[-1].shape) * share
        ks: list[Tensor | None] = [end]
        if behind is not None:
            ks = behind.vjp(values, behind.slopes(values), {len(values) - 1: end})
        assert ks[0] is not None
        given = first.u @ first.core
        rows = [(ks[0].flatten(1).mT @ condition.coordinates(t) - given).flatten() / self._rounding(given)]
        for node_id, op, grad, unit in self._layers:
            x, k = values[network.nodes[node_id].reads[0] - 1], ks[node_id]
            assert k is not None
            packed = op.layer.pack_output(k)
            found = op.layer.batch_gradient(op.layer.pack_input(x), packed).flatten()
            if len(grad) > len(found):
                found = torch.cat([found, packed.sum((0, 2))])
            rows.append((found - grad) / unit)
        return torch.cat(rows)

    def k(self, t: Float[Tensor, "b d"]) -> Float[Tensor, "b o"]:
        return self._condition.k(t)

    def solved(self, k: Float[Tensor, "b o"]) -> Float[Tensor, "b d"]:
        """t for which the first layer's gradient agrees, given all k."""
        first = self.spaces.first
        a = torch.linalg.lstsq((k * self.share[:, None]).mT, first.u @ first.core).solution
        row = a @ first.v.mT
        return self._condition.unknowns_of(row)

    def settled(self, t: Float[Tensor, "b d"]) -> Float[Tensor, "b d"] | None:
        """Where X = (c K)^+ G leads from here; None where it runs away, or the time is up."""
        for _ in range(FIXED_POINT):
            if deadline.used() >= 1:
                return None
            t, before = self.solved(self.k(t)), t
            if not bool(t.isfinite().all()):
                return None
            if float((t - before).norm()) <= 1e-12 * float(t.norm()):
                break
        return t

    def inputs(self, t: Float[Tensor, "b d"]) -> Float[Tensor, "b n"]:
        return self._condition.inputs(t)

    def left(self, t: Float[Tensor, "b d"]) -> float:
        """The root mean square of the residual."""
        return float(self.residual(t).square().mean().sqrt())

    def jacobian(self, t: Float[Tensor, "b d"]) -> Float[Tensor, "rows u"]:
        """Of the residual."""
        return jacobian_of(lambda flat: self.residual(flat.reshape(t.shape)), t.flatten())

    def error(self, t: Float[Tensor, "b d"]) -> Float[Tensor, " b"]:
        """How far rounding may have moved each value of the inputs (root mean square): along the row space by what it
        does to all gradients, and with the row space. Where that is too much to form as `Span.error`, as if k did not
        depend on x."""
        first = self.spaces.first
        plain = first.error(self.k(t) * self.share[:, None])
        if self.entries > LARGEST:
            return plain
        jacobian = self.jacobian(t)
        inverse = torch.linalg.pinv(jacobian.mT @ jacobian, rtol=1e-12, hermitian=True)
        along = inverse.diagonal().reshape(t.shape).sum(1).clamp(min=0)
        across = first.uncertainty(self._condition.coordinates(t)).square()
        found: Tensor = ((along + across) / first.layer.unknowns).sqrt().maximum(plain)
        return found

    def start(self) -> Float[Tensor, "b d"]:
        """All samples at one point, some mean of theirs."""
        return self.labels.new_zeros(len(self.labels), self._condition.unknowns)


def solve_together(system: HeadSystem, t: Float[Tensor, "b d"], max_steps: int = 30) -> tuple[Tensor, float]:
    """The coordinates where all gradients agree best, and the root mean square of what is left, in roundings."""
    shape, damping = t.shape, 1e-6

    def residual(flat: Float[Tensor, " u"]) -> Float[Tensor, " rows"]:
        return system.residual(flat.reshape(shape))

    flat = t.flatten()
    here = residual(flat)
    for _ in range(max_steps):
        if deadline.used() >= 1:
            break
        jacobian = system.jacobian(flat.reshape(shape))
        gram, gradient = jacobian.mT @ jacobian, jacobian.mT @ here
        lowered = False
        for _ in range(6):
            scale = gram.diagonal().clamp(min=1e-300)
            move, failed = torch.linalg.solve_ex(gram + (damping * scale).diag(), gradient)
            new = flat - move
            there = residual(new)
            if int(failed) == 0 and float(there.norm()) < float(here.norm()):
                lowered = float(there.norm()) < 0.999 * float(here.norm())
                flat, here, damping = new, there, damping / 10
                break
            damping *= 10
        if not lowered:
            break
    return flat.reshape(shape), float(here.square().mean().sqrt())


def by_labels(spaces: Spaces, gradients: Mapping[str, Tensor], eps: float, count: int) -> Samples | None:
    """All samples, where their outputs are so much alike that those of their mean tell which labels there are.

    Args:
        count: the number of samples.
    """
    labels = counted_labels(spaces, gradients, count)
    if labels is None or len(labels) != spaces.left:
        return None
    share = labels.new_full((len(labels),), 1 / count)
    system = HeadSystem(spaces, labels, share, gradients, eps)
    if not system.unknowns:
        return None
    found = system.settled(system.start())
    if found is None:
        return None
    t = found
    left = system.left(t)
    if left > ROUNDINGS and system.entries <= LARGEST:
        # Samples with one label began at one point: nothing but a start apart tells them apart.
        draw = torch.Generator(device=t.device).manual_seed(0)
        spread = 0.1 * float(t.square().mean().sqrt())
        noise = torch.randn(t.shape, generator=draw, dtype=t.dtype, device=t.device)
        t, left = solve_together(system, t + spread * noise)
    if not left <= ROUNDINGS:
        return None
    others = tuple((float(label), 1.0) for label in labels)
    return Samples(system.inputs(t), labels, share, others, system.error(t))


def counted_labels(spaces: Spaces, gradients: Mapping[str, Tensor], count: int) -> Float[Tensor, " b"] | None:
    """The labels, each as often as there are samples with it, from the gradient of the last layer's bias.

    It is the mean of k = p - e_y, where p is about the same for all samples.
    """
    head = spaces.head
    last = next((node.op for node in reversed(head.network.nodes) if isinstance(node.op, Linear)), None)
    known = torch.tensor(head.loss.labels, dtype=spaces.first.v.dtype, device=spaces.first.v.device)
    bias = None if last is None else gradients.get(last.layer.bias_name or "")
    if bias is None or len(known) != head.loss.outputs:
        return None
    condition = spaces.cotangent_condition(known)
    mean = condition.inputs(spaces.first.v.new_zeros(1, condition.unknowns))
    k = head.loss.output_gradient(head.values(mean)[-1].reshape(1, -1).expand(len(known), -1), known)
    # Of each label, how often its k is in the mean: the sum over them is `count`.
    given = bias.double() * count
    ones = k.new_ones(1, len(known))
    if not bool(k.isfinite().all() & given.isfinite().all()):
        return None
    times = torch.linalg.lstsq(torch.cat([k.mT, ones]), torch.cat([given, ones.new_full((1,), count)])[:, None])
    often = times.solution[:, 0].round().clamp(min=0).long()
    return known.repeat_interleave(often) if int(often.sum()) == count else None
