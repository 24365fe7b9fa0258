"""Where the recursion starts: label and k of the last layer, from its gradient.

With a bias its gradient is k. Without one, for the losses of the margin mu = label * output,

    <W, grad W> = mu * dl/dmu        (Eq. 11)
    k           = label * dl/dmu     (Eq. 14)

and for those of several outputs grad W = k x' is of rank one: k = s u and x = v / s, with s a root of the scalar
equation <u, dl/do(W v / s)> = s. Every root and every label that nothing rules out becomes one candidate; the gradient
residual decides later.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from scipy.optimize import brentq
from torch import Tensor

from rgap.nn.activations import Activation
from rgap.nn.layers import Layer
from rgap.nn.losses import BinaryCrossEntropy, CrossEntropy, Loss, MarginLoss

GRID = 400
"""Values of s, evenly spread over its orders of magnitude, between which roots are looked for."""
SMALLEST = 1e-12
"""A smaller s is a saturated loss's: x would be a billion times the gradient's own direction."""
HOLDS = 1e-3
"""A candidate of several outputs must satisfy all their equations to this part of k, or to a thousand roundings."""


@dataclass(frozen=True)
class Heads:
    """s candidates for what the last layer, of o outputs, put out."""

    labels: Float[Tensor, " s"]
    margins: Float[Tensor, " s"]
    """The label times the output; NaN for other losses than those of the margin."""
    k: Float[Tensor, "s o 1"]
    z: Float[Tensor, "s o 1"]
    """The network's outputs, bias included."""
    k_error: Float[Tensor, " s"]
    """How far rounding may have moved k, relative to k."""
    assumptions: tuple[str, ...]
    reason: str = ""
    """Why there are no candidates."""

    def select(self, index: Tensor) -> Heads:
        """The candidates at an index or mask."""
        return replace(
            self,
            labels=self.labels[index],
            margins=self.margins[index],
            k=self.k[index],
            z=self.z[index],
            k_error=self.k_error[index],
        )

    @property
    def one_per_direction(self) -> Int[Tensor, " directions"]:
        """The index of one candidate for each direction of k, the one with the best known k.

        All k of one last layer are multiples of one vector, so that there are two directions at the most.
        """
        first = self.k[:1].flatten()
        if not len(first):
            return torch.zeros(0, dtype=torch.long, device=self.k.device)
        along = (self.k.flatten(1) @ first > 0).tolist()
        order = self.k_error.argsort(descending=True).tolist()
        return torch.tensor(sorted({along[at]: at for at in order}.values()), dtype=torch.long, device=self.k.device)


def heads(last: Layer, before: Activation, loss: Loss, gradients: dict[str, Tensor], precision: float) -> Heads:
    """All candidates that the last layer's gradient allows; none if no sample can have given it.

    Args:
        before: the activation that gives the last layer its input, the identity if nothing is known of it.
        precision: relative rounding of the gradient.
    """
    if isinstance(loss, MarginLoss):
        return _of_margin(last, before, loss, gradients, precision)
    bias = None if last.bias is None or last.bias_name not in gradients else gradients[last.bias_name].double()
    grad = gradients[last.weight_name].double().reshape(last.weight[0].shape)
    if bias is None:
        return _without_bias(last, loss, grad, precision)
    return _with_bias(last, loss, grad, bias, precision)


def _collected(
    found: list[tuple[float, float, Tensor, Tensor, float]], last: Layer, said: str, reason: str = ""
) -> Heads:
    """Candidates of label, margin, k, z and the error of k."""
    like = last.weight

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=like.device)

    def stacked(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[..., None] if values else like.new_zeros(0, last.outputs, 1)

    return Heads(
        column([each[0] for each in found]),
        column([each[1] for each in found]),
        stacked([each[2] for each in found]),
        stacked([each[3] for each in found]),
        column([each[4] for each in found]),
        (said,) if said else (),
        reason,
    )


# Several outputs.


def _with_bias(last: Layer, loss: Loss, grad: Tensor, k: Tensor, precision: float) -> Heads:
    """The gradient of the bias is k; x = grad W' k / |k|^2, and the label is the one that gives this k at W x + b."""
    if not bool(k.any()):
        return _collected([], last, "", "the last layer's bias gradient is zero: the loss is saturated")
    assert last.bias is not None
    z = last.weight[0] @ (grad.mT @ k / (k @ k)) + last.bias
    said = "the label and k are read off the last layer's bias gradient"
    if not loss.labels:
        label = float(z - k / loss.output_gradient(torch.ones(1, 1).to(z), torch.zeros(1).to(z))[0])
        return _collected([(label, math.nan, k, z, precision)], last, said)
    labels = _labels(loss, k, z)
    wrong = (loss.output_gradient(z.expand(len(labels), -1), labels) - k).norm(dim=1) / k.norm()
    least = float(wrong.min())
    if least > max(HOLDS, 1000 * precision):
        said = f"{said}; none of one sample gives it, the nearest label is taken"
    near = (wrong <= max(10 * least, 100 * precision)).nonzero().flatten().tolist()
    return _collected([(float(labels[at]), math.nan, k, z, precision) for at in near], last, said)


def _labels(loss: Loss, k: Tensor, z: Tensor) -> Float[Tensor, " s"]:
    """The labels that k and outputs do not rule out at once."""
    if isinstance(loss, BinaryCrossEntropy):  # sigmoid(z) - y, with y 0 or 1: the sign of k tells y
        return loss.label((k < 0)[None])
    return torch.tensor(loss.labels, dtype=torch.float64, device=z.device)


def _without_bias(last: Layer, loss: Loss, grad: Tensor, precision: float) -> Heads:
    """The roots s, with k = s u and x = v / s."""
    if not loss.labels:
        return _collected(
            [],
            last,
            "",
            "without a bias the last layer's gradient leaves the scale open: an input twice as bright with another "
            f"label gives the same gradient of the {loss.name} loss",
        )
    u, sigma, v = torch.linalg.svd(grad, full_matrices=False)
    if float(sigma[0]) == 0:
        return _collected([], last, "", "the last layer's gradient is zero: the loss is saturated")
    rest = float(sigma[1:].norm() / sigma[0])
    if rest > max(HOLDS, 1000 * precision):
        reason = f"the last layer's gradient is not that of one sample: it is of rank one to {rest:.1e} only"
        return _collected([], last, "", reason)
    found: list[tuple[float, float, Tensor, Tensor, float]] = []
    for sign in (1.0, -1.0):
        along, way = sign * u[:, 0], sign * (last.weight[0] @ v[0]) * sigma[0]
        for label in _signed(loss, along):
            for s, error in _roots(loss, along, way, label, precision):
                k, z = s * along, way / s
                wrong = float((loss.output_gradient(z[None], label[None])[0] - k).norm() / k.norm())
                if wrong <= max(HOLDS, 1000 * error):
                    found.append((float(label), math.nan, k, z, error))
    said = "the label and the size of k are roots of the loss's equation for the last layer's gradient; all are tried"
    return _collected(found, last, said if found else "", "" if found else _saturated(loss, float(sigma[0])))


def _saturated(loss: Loss, size: float) -> str:
    return f"under {loss.name} loss no sample gives this last gradient, of size {size:.1e}, or it is below rounding"


def _signed(loss: Loss, along: Tensor) -> Float[Tensor, " labels"]:
    """The labels for which k can point this way."""
    labels = torch.tensor(loss.labels, dtype=torch.float64, device=along.device)
    if isinstance(loss, BinaryCrossEntropy):
        return loss.label((along < 0)[None])
    if isinstance(loss, CrossEntropy) and not loss.label_smoothing:
        below = (along < 0).nonzero().flatten()  # of p - y the label's alone
        return labels[below] if len(below) == 1 else labels[:0]
    return labels


def _roots(loss: Loss, along: Tensor, way: Tensor, label: Tensor, precision: float) -> Iterator[tuple[float, float]]:
    """Every s > 0 with <u, dl/do(W v / s)> = s, and its relative error."""

    def miss(s: Tensor) -> Tensor:
        return loss.output_gradient(way / s[:, None], label.expand(len(s))) @ along - s

    def at(s: float) -> float:
        return float(miss(way.new_tensor([s]))[0])

    grid = torch.logspace(math.log10(SMALLEST), 1, GRID, dtype=torch.float64, device=along.device)
    values = miss(grid)
    for place in (values[:-1].sign() != values[1:].sign()).nonzero().flatten().tolist():
        low, high = float(grid[place]), float(grid[place + 1])
        s = low if at(low) == 0 else brentq(at, low, high, xtol=1e-300, rtol=1e-15)
        # s is moved by the size of grad W, which enters as way / s.
        step = 1e-6
        scaled = way.new_tensor([s])
        up = float((loss.output_gradient((1 + step) * way[None] / s, label[None]) @ along)[0])
        down = float((loss.output_gradient((1 - step) * way[None] / s, label[None]) @ along)[0])
        slope = (up - down) / (2 * step)
        yield float(scaled), precision * (1 + abs(slope / (s + slope) if s + slope else math.inf))


# One output: the losses of the margin.


def _of_margin(
    last: Layer, before: Activation, loss: MarginLoss, gradients: dict[str, Tensor], precision: float
) -> Heads:
    weight, grad = last.weight, gradients[last.weight_name].double().reshape(last.weight.shape)
    product = float((weight * grad).sum())
    noise = precision * float(weight.norm() * grad.norm())
    found: list[tuple[float, float, Tensor, Tensor, float]] = []

    def candidate(label: float, mu: float, k: float, z: float, error: float) -> None:
        found.append((label, mu, weight.new_tensor([k]), weight.new_tensor([z]), error))

    if last.bias is not None and last.bias_name in gradients:
        k = float(gradients[last.bias_name].double().sum())
        if k != 0:
            label = -1.0 if k > 0 else 1.0  # dl/dmu < 0
            z = product / k + float(last.bias.sum())
            candidate(label, label * z, k, z, precision)
        return _collected(found, last, "the label and k are read off the last layer's bias gradient")
    labels, said = _margin_labels(before, loss, grad)
    roots = loss.roots(product) or loss.roots(product + noise)
    for mu in roots:
        # Near the turning point the two roots meet, and rounding of the product moves them most.
        # Where the product less the noise has no root, the two have met within the noise: each may be the other.
        low, high = loss.roots(product - noise), loss.roots(product + noise)
        shifted = [_nearest(low, mu), _nearest(high, mu)] if low else list(high)
        slopes = loss.slope(torch.tensor([mu, *shifted], dtype=torch.float64))
        if slopes[0] == 0:
            continue
        error = precision + float((slopes[1:] / slopes[0] - 1).abs().max())
        for y in labels:
            candidate(y, mu, y * float(slopes[0]), y * mu, error)
    return _collected(found, last, said)


def _nearest(roots: tuple[float, ...], mu: float) -> float:
    return min(roots, key=lambda other: abs(other - mu), default=mu)


def _margin_labels(before: Activation, loss: MarginLoss, grad: Tensor) -> tuple[tuple[float, ...], str]:
    """The labels to try: only one where the features' sign is known, because grad W = k x and k has -label's sign."""
    if before.nonnegative:
        total = float(grad.sum())
        if total != 0:
            label = -1.0 if total > 0 else 1.0
            return (label,), f"the label is read off the sign of the last gradient ({before} is >= 0)"
    return loss.labels, "both labels are tried, and the gradient residual decides"
