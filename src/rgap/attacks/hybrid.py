"""H-GAP: run several attacks, keep one answer (Zhu and Blaschko 2021, arXiv:2010.07733, Section 5)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum

from jaxtyping import Float
from torch import Tensor
from torch.nn import functional

from rgap.attacks.base import Attack, BatchAttack
from rgap.attacks.closed import Recursive
from rgap.attacks.presets import DLG
from rgap.attacks.result import Outcome, Reconstruction, Status
from rgap.nn.obstacles import NotAChain
from rgap.target import Target
from rgap.update import Update


class Rule(Enum):
    """How an answer is chosen, without the truth."""

    SMOOTHING = "smoothing"
    """The paper's: the one nearest to its own average over 3 x 3 pixels. Failed answers are noise."""
    RESIDUAL = "residual"
    """The one whose recomputed gradient is nearest to the update."""


def roughness(inputs: Float[Tensor, "b c h w"]) -> float:
    """Mean squared distance between pictures and their average over 3 x 3 pixels, of those inside at the edges."""
    smooth = functional.avg_pool2d(inputs, 3, stride=1, padding=1, count_include_pad=False)
    return float((inputs - smooth).square().mean())


def choose(found: Sequence[Reconstruction], rule: Rule) -> tuple[int, list[float]]:
    """The index of the answer that a rule keeps, and the figure that it went by for each; infinite where none is.

    Raises:
        ValueError: nothing to choose from, or the smoothing rule on inputs that are no pictures.
    """
    if not found:
        raise ValueError("got no reconstruction, expected one or more to choose from")
    figures = []
    for each in found:
        if not each.answers:
            figures.append(math.inf)
        elif rule is Rule.RESIDUAL:
            figures.append(each.gradient_residual)
        elif each.inputs.ndim != 4:
            raise ValueError(
                f"got inputs of shape {tuple(each.inputs.shape)}: the smoothing rule takes pictures, (b, channels, "
                "height, width); use Rule.RESIDUAL"
            )
        else:
            figures.append(roughness(each.inputs))
    figures = [math.inf if math.isnan(figure) else figure for figure in figures]
    return min(range(len(found)), key=lambda at: figures[at]), figures


MEMBERS = (Recursive(), DLG())


@dataclass(frozen=True)
class Hybrid(BatchAttack):
    """Run every member, and keep the answer that the rule prefers.

    A member that does not apply to the model is left out and named.

    Args:
        members: the attacks.
        rule: the paper's, unless told otherwise.
    """

    members: tuple[Attack, ...] = MEMBERS
    rule: Rule = Rule.SMOOTHING

    def __post_init__(self) -> None:
        if not self.members:
            raise ValueError("got no members, expected one attack or more")

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        by_member: list[tuple[Reconstruction, ...]] = []
        left_out: list[str] = []
        for member in self.members:
            try:
                by_member.append(member.many(target, updates))
            except NotAChain as error:
                left_out.append(f"{member.name} was left out: {'; '.join(str(o) for o in error.obstacles)}")
        if not by_member:
            return [Outcome(Status.NOT_CONVERGED, "; ".join(left_out)) for _ in updates]
        return [self._keep(found, left_out) for found in zip(*by_member, strict=True)]

    def _keep(self, found: Sequence[Reconstruction], left_out: Sequence[str]) -> Outcome:
        at, figures = choose(found, self.rule)
        kept = found[at]
        compared = ", ".join(f"{each.attack} {figure:.1e}" for each, figure in zip(found, figures, strict=True))
        chosen = f"the {self.rule.value} rule chooses {kept.attack} ({compared})"
        assumptions = (*kept.assumptions, chosen, *left_out)
        return Outcome(kept.status, f"{kept.attack}: {kept.reason}", kept.answers, assumptions, kept.features)
