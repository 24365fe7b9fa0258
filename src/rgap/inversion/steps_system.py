"""All constraints of a network on the samples of several local steps, each step at its own weights.

    D (y_i - F_t(x_i)) = 0                                    for each sample i of step t: its weight rows
    grad W_l - sum over t, and i of step t, of K_tl(x_i) x_li = 0     for each layer l: gradient rows of all steps

Each step is one constraint system; what they share is the gradient rows.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from copy import copy
from dataclasses import dataclass
from functools import cached_property

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.doubted import effects, joined
from rgap.inversion.jacobian import Jacobian
from rgap.inversion.pattern import changed_sides, least_certain
from rgap.inversion.system import ConstraintSystem, Linearisation, Rows
from rgap.linalg.operator import LinearOperator


@dataclass(frozen=True, eq=False)
class StepsSystem:
    """The systems of the steps, with the same sum of gradients in each. Samples come in the order of the steps."""

    systems: tuple[ConstraintSystem, ...]

    @property
    def sizes(self) -> list[int]:
        """Samples of each step."""
        return [system.samples for system in self.systems]

    def linearise(
        self, x: Float[Tensor, "n ..."], guesses: Sequence[Mapping[int, Tensor]] | None = None
    ) -> list[Linearisation]:
        """
        Args:
            guesses: of each step, as `ConstraintSystem.linearise` takes one.
        """
        of = guesses or [{}] * len(self.systems)
        steps = zip(self.systems, x.split_with_sizes(self.sizes), of, strict=True)
        return [system.linearise(own, guess) for system, own, guess in steps]

    def residual(self, at: Sequence[Linearisation]) -> Rows:
        """What the inputs leave of the right-hand sides; not weighted."""
        steps = list(zip(self.systems, at, strict=True))
        weight = torch.cat([system.output.value - own.values[-1] for system, own in steps])
        return Rows(weight[None], tuple(self.missed([system.made(own) for system, own in steps])))

    def missed(self, made: Sequence[Sequence[Float[Tensor, "1 g j i"]]]) -> list[Float[Tensor, "1 g j i"]]:
        """What gradients of the steps, each of all layers, leave of their sum that was given."""
        sums = (torch.stack(each).sum(0) for each in zip(*made, strict=True))
        return [grad - own for grad, own in zip(self.systems[0].gradients, sums, strict=True)]

    def changed(self, before: Sequence[Linearisation], after: Sequence[Linearisation]) -> int:
        """How many units changed their sides."""
        return sum(changed_sides(*each) for each in zip(self.systems, before, after, strict=True))


class StepsJacobian(LinearOperator):
    """The linearised constraints of all steps."""

    def __init__(
        self, of: StepsSystem, at: Sequence[Linearisation], count: int | None, scale: Sequence[float] | None = None
    ):
        """
        Args:
            count: units in doubt in each step; None keeps all gradient rows out that a slope behind them may move.
            scale: what each layer's gradient rows weigh, squared, where weight rows weigh 1; None as in one system.
        """
        pairs = list(zip(of.systems, at, strict=True))
        doubt = [None if count is None else least_certain(*pair, count) for pair in pairs]
        self.doubted = [effects(*pair, each) for pair, each in zip(pairs, doubt, strict=True)]
        every = [
            joined(each, grad)
            for each, grad in zip(zip(*self.doubted, strict=True), of.systems[0].gradients, strict=True)
        ]
        self.parts = [Jacobian(*pair, each, doubted=every) for pair, each in zip(pairs, doubt, strict=True)]
        if scale is None:
            scale = [sum(each) / len(self.parts) for each in zip(*(part.scale for part in self.parts), strict=True)]
        for part in self.parts:
            part.scale = list(scale)
        self.sizes, self.like = of.sizes, at[0].x
        self.in_shape = (sum(self.sizes), *of.systems[0].network.input_shape)
        self.values = sum(part.values for part in self.parts)
        self.mean_diagonal = sum(part.mean_diagonal for part in self.parts) / len(self.parts)

    @cached_property
    def single(self) -> StepsJacobian | None:  # type: ignore[override]
        parts = [part.single for part in self.parts]
        if any(part is None for part in parts):
            return None
        found = copy(self)
        vars(found).pop("factor", None)
        found.parts, found.like = [part for part in parts if part is not None], self.like.float()
        return found

    def mv(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d rows"]:
        return self.weighted(self._moved(x))

    def rmv(self, rows: Float[Tensor, "d rows"]) -> Float[Tensor, "d *in_shape"]:
        system = self.parts[0].system
        shape, grads = (sum(self.sizes), *system.output.value.shape[1:]), system.gradients
        first, *rest = rows.split_with_sizes([torch.Size(shape).numel(), *(grad[0].numel() for grad in grads)], 1)
        gradient = tuple(part.reshape(len(rows), *grad.shape[1:]) for part, grad in zip(rest, grads, strict=True))
        return self._pulled(Rows(first.reshape(len(rows), *shape), gradient), 0.5)

    def normal(self, x: Float[Tensor, "d *in_shape"]) -> Float[Tensor, "d *in_shape"]:
        return self._pulled(self._moved(x), 1.0)

    def weighted(self, rows: Rows) -> Float[Tensor, "d rows"]:
        """Right-hand sides as `rmv` takes them."""
        every = [part.weigh(own, 0.5) for part, own in self._apart(rows)]
        weight = torch.cat([each.weight for each in every], 1).flatten(1)
        return torch.cat([weight, *(each.flatten(1) for each in every[0].gradient)], 1)

    def explained(self, missed: Sequence[Float[Tensor, "1 g j i"]]) -> list[list[Float[Tensor, "1 g j i"]]]:
        """What units in doubt explain of gradients that are missed: of each step its own ones', by layer."""
        found: list[list[Tensor]] = [[] for _ in self.parts]
        for at, grad in enumerate(missed):
            bases = [own[at].whole(grad) for own in self.doubted]
            every = torch.cat(bases)
            times = torch.linalg.pinv(every.mT) @ grad.flatten()
            parts = times.split_with_sizes([len(each) for each in bases])
            for step, (basis, part) in enumerate(zip(bases, parts, strict=True)):
                found[step].append((part @ basis).reshape(grad.shape) if len(basis) else torch.zeros_like(grad))
        return found

    def _moved(self, x: Float[Tensor, "d *in_shape"]) -> Rows:
        return _summed(
            [part.moved_rows(own) for part, own in zip(self.parts, x.split_with_sizes(self.sizes, 1), strict=True)]
        )

    def _pulled(self, rows: Rows, power: float) -> Float[Tensor, "d *in_shape"]:
        return torch.cat([part.pulled_back(part.weigh(own, power)) for part, own in self._apart(rows)], 1)

    def _apart(self, rows: Rows) -> list[tuple[Jacobian, Rows]]:
        """Each step's own weight rows, and the gradient rows of all."""
        weights = rows.weight.split_with_sizes(self.sizes, 1)
        return [(part, Rows(weight, rows.gradient)) for part, weight in zip(self.parts, weights, strict=True)]


def _summed(rows: Sequence[Rows]) -> Rows:
    """Weight rows side by side, gradient rows added up."""
    weight = torch.cat([each.weight for each in rows], 1)
    return Rows(weight, tuple(torch.stack(each).sum(0) for each in zip(*(own.gradient for own in rows), strict=True)))
