"""R-GAP: the closed-form recursive attack (Zhu and Blaschko 2021, arXiv:2010.07733, Algorithm 1)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from itertools import product

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

from rgap.attacks import kinks
from rgap.attacks.base import (
    AS_ONE,
    MIXTURE,
    Answer,
    Attack,
    Reconstruction,
    Status,
    gradient_residual,
    judge,
    rounding,
)
from rgap.attacks.heads import Heads, heads
from rgap.attacks.trail import End, Step, Trail
from rgap.checks import Preflight
from rgap.constraints import System
from rgap.nn.activations import Activation
from rgap.nn.chain import Chain
from rgap.target import Target
from rgap.update import Update


def settled(eps: float) -> float:
    """A gradient residual below this leaves no unit to look for on the other side of its kink.

    It is some hundred roundings of the gradient, and not less than float64 solves reach on conditions of 1e6.
    """
    return max(200 * eps, 1e-10)


UNSURE, BRANCHES = 5.0, 3
"""A value within so many errors of its activation's kink may lie on either side of it; how many are tried at once."""


@dataclass(frozen=True)
class Recursive(Attack):
    """From the last layer to the first, each layer's input is the least-squares solution of its constraints.

    Label and margin are inferred, and every root is followed. The certificate, the gradient recomputed through the
    model itself, decides which answers are given.

    Args:
        rank_tolerance: singular values below this fraction of the largest count as zero. The default follows the
            gradient's rounding eps as eps^(2/3): a direction that is kept is known to eps^(1/3) or better.
        visible: an estimated error above this fraction of the value range (or of the input's own spread) is called
            ill-conditioned, not exact.
        seed: of the random probe that estimates errors.
    """

    rank_tolerance: float | None = None
    visible: float = 0.01
    seed: int = 0

    def obstacle(self, target: Target, samples: int) -> str | None:
        if target.obstacles:
            return "the recursion cannot pass this model: " + "; ".join(str(each) for each in target.obstacles)
        return MIXTURE.format(samples) if samples > 1 else None

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        chain = target.chain
        eps = update.precision
        rank_tolerance = eps ** (2 / 3) if self.rank_tolerance is None else self.rank_tolerance
        tolerance = update.tolerance
        gradients = {name: g.double().to(target.device) for name, g in update.gradients.items()}
        assumptions: tuple[str, ...] = ()
        if target.batch_size != 1 or update.header.batch_size != 1:
            assumptions = (AS_ONE,)

        def ended(status: Status, reason: str, answers: tuple[Answer, ...] = ()) -> Reconstruction:
            return Reconstruction(
                self.name, status, reason, answers, assumptions, checks, tolerance, target.value_range
            )

        empty = next((layer for layer in reversed(chain.layers) if not gradients[layer.weight_name].any()), None)
        if empty is not None:
            cause = "the loss is saturated" if empty is chain[-1] else "all units after it are dead"
            return ended(Status.GRADIENT_ZERO, f"the gradient of {empty.weight_name} is zero: {cause}")
        if chain.scalable:
            assumptions += ("the gradient was not scaled: here a scaled one is that of a brighter or darker input",)
        start = heads(chain, target.margin_loss, gradients, eps)
        assumptions += start.assumptions
        if len(start.labels) == 0:
            return ended(Status.NOT_CONVERGED, f"under {target.loss.name} loss no sample gives this last gradient")
        answers = self._follow(target, update, gradients, start, rank_tolerance)
        best = min(a.gradient_residual for a in answers)
        # Where none agrees, those that come as near as the nearest are no worse than it.
        good = [a for a in answers if a.gradient_residual <= max(tolerance, 3 * best)]
        good.sort(key=lambda a: _misfit(a.inputs, target.value_range))
        if len(good) > 1 and target.value_range is not None:
            assumptions += (f"of {len(good)} answers the one that fits the value range {target.value_range} is first",)
        assumptions += tuple({a.joint.prior: None for a in good if a.joint is not None})
        status, reason = self._judge(good, target, tolerance)
        if update.samples(target) > 1 and status in (Status.EXACT, Status.AMBIGUOUS):
            status, reason = Status.REPRODUCED, f"one input that stands for {update.samples(target)} samples; {reason}"
        return ended(status, reason, tuple(good))

    def _follow(
        self, target: Target, update: Update, gradients: dict[str, Tensor], start: Heads, rank_tolerance: float
    ) -> list[Answer]:
        """Every candidate to its input, with certificates."""
        chain = target.chain
        followed = start.select(start.one_per_label) if chain.scalable else start
        probe = torch.Generator(device=target.device).manual_seed(self.seed)
        eps = update.precision
        found = recurse(chain, gradients, followed, eps, rank_tolerance, probe)
        ends: list[End] = []
        for end in found:
            own = followed.select((followed.labels == end.label) & (followed.margins == end.margin))
            end = self.finish(target, gradients, end, eps, rank_tolerance, probe)
            if end.joint is None or end.joint.converged:
                end = replace(end, x=kinks.settle(chain, gradients, end.x, own.k, settled(eps)))
            if chain.scalable:  # the other roots' inputs are the same one, scaled: their gradients agree by Eq. 11
                same = (start.labels == end.label).nonzero().flatten().tolist()
                ends += [end.scaled(float(start.margins[at])) for at in same]
            else:
                ends.append(end)
        inputs = torch.cat([chain[0].unpack_input(end.x) for end in ends]).reshape(-1, *target.input_shape)
        labels = torch.tensor([end.label for end in ends], dtype=inputs.dtype, device=inputs.device)
        residuals = [
            gradient_residual(target, update, x, y) for x, y in zip(inputs[:, None], labels[:, None], strict=True)
        ]
        return [
            Answer(
                inputs[s : s + 1],
                labels[s : s + 1],
                end.margin,
                residuals[s],
                end.error,
                end.layers,
                end.joint,
                end.note,
            )
            for s, end in enumerate(ends)
        ]

    def finish(
        self,
        target: Target,
        gradients: dict[str, Tensor],
        end: End,
        eps: float,
        rank_tolerance: float,
        probe: torch.Generator,
    ) -> End:
        """What is still done for a candidate after the recursion; `Closed` solves jointly what it left open."""
        return end

    def _judge(self, answers: list[Answer], target: Target, tolerance: float) -> tuple[Status, str]:
        """The status that the first answer deserves."""
        best = answers[0]
        residual, joint = f"gradient residual {best.gradient_residual:.1e}", best.joint
        if joint is not None and joint.free:
            together = f"{' and '.join(joint.layers)} together leave {joint.free} of {joint.unknowns} dimensions free"
            settled = "" if joint.converged else f", and {joint.steps} steps did not settle the rest"
            return Status.RANK_DEFICIENT, f"{together}{settled}; {residual}"
        if joint is not None and not joint.converged:
            together = f"{' and '.join(joint.layers)} together determine the input"
            return Status.NOT_CONVERGED, f"{together}, but {joint.steps} steps did not find it; {residual}"
        status, reason = judge(best, tolerance, target.value_range, self.visible)
        if status is not Status.EXACT or len(answers) == 1:
            return status, reason
        low, high = target.value_range or (float(best.inputs.min()), float(best.inputs.max()))
        inside = [a for a in answers if _outside(a.inputs, target.value_range) <= 10 * a.error + 1e-3 * (high - low)]
        if len(inside) == 1:
            return status, reason
        return Status.AMBIGUOUS, f"{len(answers)} inputs reproduce the gradient, {len(inside)} inside the value range"


def recurse(
    chain: Chain,
    gradients: dict[str, Tensor],
    start: Heads,
    eps: float,
    rank_tolerance: float,
    probe: torch.Generator,
) -> list[End]:
    """Algorithm 1, on all candidates together; those that contradict their constraints fall out on the way."""
    head, k, z = start, start.k, start.z
    row_weight, z_error = None, torch.zeros_like(z)
    family = torch.arange(len(k), device=k.device)
    trails = [Trail() for _ in head.labels]
    for depth in reversed(range(len(chain))):
        layer = chain[depth]
        grad = layer.pack_weight(gradients[layer.weight_name][None]).expand(len(k), *layer.weight.shape)
        bias = 0.0 if layer.bias is None else layer.bias[:, None]
        k_known = layer.bias_name is not None and layer.positions == 1
        if layer.bias_name is not None and k_known:  # the gradient of the bias is k itself
            k = gradients[layer.bias_name].reshape(1, -1, 1).expand_as(k)
        system = System(layer, k, row_weight, rank_tolerance)
        solved = system.solve(z - bias, grad)
        # What is left of the weight rows is an error of z too, one that the layers after this one did not see.
        z_error = z_error.maximum(solved.weight_misfit[:, None, None])
        error = _error(system, z_error, grad, eps, head.k_error, probe)
        for s, trail in enumerate(trails):
            one = slice(s, s + 1)
            step = Step(k[one], z[one], z_error[one], solved.x[one], None if row_weight is None else row_weight[one])
            trail.add(step, layer, system, solved, s, float(error[s]), k_known)
        alive = _plausible(torch.maximum(solved.weight_residual, solved.gradient_residual), family)
        x, k, error, head, family = solved.x[alive], k[alive], error[alive], head.select(alive), family[alive]
        trails = [trail for trail, keep in zip(trails, alive.tolist(), strict=True) if keep]
        if depth > 0:
            before = chain[depth - 1]
            after = before.pack_output(layer.unpack_input(x))
            inverse = before.activation.invert(after, error)
            z, row_weight = inverse.z, inverse.weight
            z_error = error[:, None, None] / inverse.slope.clamp(min=1e-12)
            k = before.k_from(layer, k)
            of, slope = _branches(before.activation, after, inverse.slope, error)
            k = k[of] * slope  # Eq. 6
            z, z_error, head, family = z[of], z_error[of], head.select(of), family[of]
            row_weight = None if row_weight is None else row_weight[of]
            trails = [trails[parent].passed(before) for parent in of.tolist()]
    return [
        End(
            x[s : s + 1],
            float(head.labels[s]),
            float(head.margins[s]),
            float(error[s]),
            tuple(trail.layers),
            tuple(trail.steps),
        )
        for s, trail in enumerate(trails)
    ]


def _error(
    system: System, z_error: Tensor, grad: Tensor, eps: float, k_error: Tensor, probe: torch.Generator
) -> Tensor:
    """Push one draw of the right-hand side's noise through the solver: the root mean square of what comes out.

    z carries the error of the layers after this one, grad W its rounding, and an error of k acts like one of grad W.
    """
    layer, k = system.layer, system.k

    def draw(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=probe, dtype=k.dtype, device=k.device)

    grad_noise = draw(len(k), *grad.shape[1:]) * rounding(grad, eps)
    grad_noise = grad_noise + grad * (k_error * draw(len(k)))[:, None, None, None]
    z_noise = draw(len(k), layer.outputs, layer.positions) * z_error
    return system.apply_inverse(z_noise, grad_noise).square().mean((1, 2)).sqrt()


def _branches(
    activation: Activation, x: Float[Tensor, "s o p"], slope: Float[Tensor, "s o p"], error: Float[Tensor, " s"]
) -> tuple[Int[Tensor, " b"], Float[Tensor, "b o p"]]:
    """Values so near their kink that their error leaves the side open: every choice of sides becomes a candidate.

    Returns:
        The candidate that each of b branches comes from, and its slopes.
    """
    other = activation.other_side(slope)
    of, slopes = [], []
    for s in range(len(x)):
        unsure = ((x[s].abs() <= UNSURE * error[s]) & (other[s] != slope[s])).nonzero()
        unsure = unsure[:0] if len(unsure) > BRANCHES else unsure
        for sides in product((False, True), repeat=len(unsure)):
            branch = slope[s].clone()
            for (o, p), change in zip(unsure.tolist(), sides, strict=True):
                branch[o, p] = other[s, o, p] if change else slope[s, o, p]
            of.append(s)
            slopes.append(branch)
    return torch.tensor(of, device=x.device), torch.stack(slopes)


def _plausible(residual: Float[Tensor, " s"], family: Int[Tensor, " s"]) -> Bool[Tensor, " s"]:
    """Which candidates go on.

    Of the branches of one candidate, the one that satisfies its constraints best; of different ones, all but those
    that contradict theirs while another satisfies them: those cannot be the sample.
    """
    rivals = torch.where(family[:, None] == family, residual, torch.inf)
    best_of_family = rivals.argmin(1) == torch.arange(len(residual), device=residual.device)
    return best_of_family & (residual <= max(1e3 * float(residual.min()), 1e-2))


def _outside(x: Tensor, value_range: tuple[float, float] | None) -> float:
    """Root mean square distance to the value range; 0 if it is not known."""
    if value_range is None:
        return 0.0
    return float((x - x.clamp(*value_range)).square().mean().sqrt())


def _misfit(x: Tensor, value_range: tuple[float, float] | None) -> tuple[float, float]:
    """How badly an input fits the range: first by what lies outside it, then by how little of it is used."""
    spread = float(x.max() - x.min())
    if value_range is None:
        return (0.0, 0.0)
    width = value_range[1] - value_range[0]
    outside = _outside(x, value_range) / width
    return (outside if outside > 1e-3 else 0.0, -min(spread / width, 1.0))
