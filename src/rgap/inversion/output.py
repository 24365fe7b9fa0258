"""Where the recursion starts: label and k of the last layer, from its gradient (Eqs. 9-14).

A margin loss has one output, and a margin mu = label * output:

    <W, grad W> = mu * dl/dmu        (Eqs. 9-11, without bias)
    k           = label * dl/dmu     (Eqs. 12-14)

Of several outputs grad W = k x'. With a bias k is its gradient, x' follows, and so does z = W x + b. Without, a
singular pair of grad W gives k = s u and x = v / s with one unknown number s, a root of the loss's own equation

    <u, k(z(s))> = s    with    z(s) = W v / s + b.

Every root and every label that nothing rules out becomes one candidate; the gradient residual decides later.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.inversion.root import ScaleEquation, leading_pair
from rgap.nn.activation import Activation
from rgap.nn.activations import IDENTITY
from rgap.nn.layers import Layer
from rgap.nn.losses import Loss, MarginLoss
from rgap.nn.network import Network
from rgap.nn.ops import Elementwise, Gather, Linear

SLACK = 20.0
"""Times the estimated rounding by which k may miss the loss's equation."""
TURNED = 1e-3
"""By so much must the opposite of a direction fit better before its sign is taken for turned."""
COVERS = 3.0
"""So many standard deviations is the most by which rounding may have moved k."""
BLUNT = 0.1
"""A gradient of one sample has rank one; where more than this part of it does not, no root is looked for."""


@dataclass(frozen=True)
class OutputCandidates:
    """s candidates for what the last layer put out."""

    labels: Float[Tensor, " s"]
    margins: Float[Tensor, " s"]
    """NaN if the loss has none."""
    k: Float[Tensor, "s o 1"]
    z: Float[Tensor, "s o 1"]
    """The network's output, bias included."""
    k_error: Float[Tensor, " s"]
    """How far rounding may have moved k at the most, relative to k."""
    assumptions: tuple[str, ...]
    reason: str = ""
    """Why there are no candidates; empty if there are some, or where the loss alone excludes them."""

    def select(self, index: Tensor) -> OutputCandidates:
        """The candidates at an index or mask."""
        return replace(
            self,
            labels=self.labels[index],
            margins=self.margins[index],
            k=self.k[index],
            z=self.z[index],
            k_error=self.k_error[index],
        )

    @staticmethod
    def concatenate(several: Sequence[OutputCandidates]) -> OutputCandidates:
        """Those of several updates, without what was assumed of each."""
        return OutputCandidates(
            torch.cat([each.labels for each in several]),
            torch.cat([each.margins for each in several]),
            torch.cat([each.k for each in several]),
            torch.cat([each.z for each in several]),
            torch.cat([each.k_error for each in several]),
            (),
        )

    @property
    def one_per_direction(self) -> Int[Tensor, " directions"]:
        """The index of one candidate for each direction of k, the one with the best known k.

        All candidates' k are multiples of one vector, so that there are two directions at most.
        """
        order = self.k_error.argsort(descending=True).tolist()
        along = (self.k.flatten(1) @ self.k[:1].flatten(1).mT > 0).flatten().tolist()
        positions = {along[at]: at for at in order}
        return torch.tensor(sorted(positions.values()), dtype=torch.long, device=self.labels.device)


def output_candidates(
    last: Layer, before: Activation, loss: Loss, gradients: dict[str, Tensor], precision: float
) -> OutputCandidates:
    """All candidates that the last layer's gradient allows; none if no sample can have given it.

    Args:
        before: the activation that gives the last layer its input, the identity if nothing is known of it.
        precision: relative rounding of the gradient.
    """
    if isinstance(loss, MarginLoss):
        return _of_margin(last, before, loss, gradients, precision)
    grad = last.pack_weight(gradients[last.weight_name].double()[None])[0, 0]
    bias = None if last.bias_name is None else gradients.get(last.bias_name)
    return of_layer(loss, last.weight[0], last.bias, grad, bias, precision)


def of_layer(
    loss: Loss,
    weight: Float[Tensor, "o n"],
    bias: Float[Tensor, " o"] | None,
    grad_weight: Float[Tensor, "o n"],
    grad_bias: Float[Tensor, " o"] | None,
    precision: float,
) -> OutputCandidates:
    """The same for one layer z = W x + b, under a loss that is a function of z and no margin loss.

    Args:
        grad_bias: None if the bias is frozen or there is none; zeros count as not sent.
        precision: relative rounding of the gradient.
    """
    weight, grad = weight.double(), grad_weight.double()
    offset = weight.new_zeros(len(weight)) if bias is None else bias.double()
    if grad_bias is not None and grad_bias.any():
        return _with_bias(loss, weight, offset, grad, grad_bias.double(), precision)
    if not grad.any():
        return _none(loss, weight, "the last layer's gradient is zero: the loss is saturated, or its input is zero")
    if not loss.labels:
        return _none(
            loss,
            weight,
            "without a bias the last layer's gradient leaves the scale of input and label open: an input twice as "
            f"bright with another label gives the same gradient under the {loss.name} loss",
        )
    return _by_roots(loss, weight, offset, grad, precision)


def _none(loss: Loss, like: Tensor, reason: str) -> OutputCandidates:
    some = like.new_zeros(0)
    z = like.new_zeros(0, loss.outputs, 1)
    return OutputCandidates(some, some, z, z, some, (), reason)


def _with_bias(
    loss: Loss, weight: Tensor, offset: Tensor, grad: Tensor, grad_bias: Float[Tensor, " o"], precision: float
) -> OutputCandidates:
    """k is the gradient of the bias, and the label follows from z."""
    scale = grad_bias.abs().max()  # squares of a saturated loss's gradient would be lost
    k = grad_bias / scale
    x = (grad / scale).mT @ k / (k @ k)
    z = (weight @ x + offset)[None]
    own = loss.label_from(z, grad_bias[None])
    labels = torch.tensor(loss.labels).to(z) if own is None else own
    moved = _moved(weight, offset, x[None], precision)
    off = _misses(loss, z, labels, grad_bias[None], moved, precision)
    assumption = "k is read off the last layer's bias gradient, and the label is the one with which the loss gives it"
    fits = off <= 1
    if not bool(fits.any()):
        # A gradient that was clipped still has its direction and leads to its input, one with noise near it.
        given = loss.output_gradient(z.expand(len(labels), -1), labels)
        along = given @ k / given.norm(dim=1)
        # The sign may be turned, as that of a weight difference is which was taken the other way round.
        turned = float(-along.min()) > float(along.max()) + TURNED
        fits = along == (along.min() if turned else along.max())
        assumption = (
            "with no label the loss gives the last layer's bias gradient exactly, as it does of one sample: the "
        )
        assumption += "label with the nearest direction is taken" + (", the sign turned" if turned else "")
    labels = labels[fits]
    if not loss.labels:  # where the loss is straight, k is the same for many
        apart = 0.1 * (labels.abs() + grad_bias.norm())
        others = torch.cat([labels - apart, labels + apart])
        if bool((_misses(loss, z, others, grad_bias[None], moved, precision) <= 1).any()):
            assumption += ", one of several that do"
    count = len(labels)
    k_, z_ = grad_bias.expand(count, -1)[..., None], z.expand(count, -1)[..., None]
    nan = z.new_full((count,), float("nan"))
    return OutputCandidates(labels, nan, k_, z_, z.new_full((count,), precision), (assumption,))


def _moved(weight: Tensor, offset: Tensor, x: Float[Tensor, "s n"], precision: float) -> Float[Tensor, " s"]:
    """How far rounding may have moved z = W x + b, in its worst output."""
    each = weight.norm(dim=1) * x.norm(dim=1, keepdim=True) + offset.abs()
    moved: Tensor = precision * each.amax(1)
    return moved


def _misses(
    loss: Loss,
    z: Float[Tensor, "*s o"],
    labels: Float[Tensor, " t"],
    k: Float[Tensor, "*s o"],
    moved: Float[Tensor, " *s"],
    precision: float,
) -> Float[Tensor, " t"]:
    """By how much k misses what the loss gives at z with each label, in units of what rounding may explain."""
    z, k, moved = (t.expand(len(labels), *t.shape[1:]) for t in (z, k, moved))
    given = loss.output_gradient(z, labels)
    size = k.norm(dim=1, keepdim=True)
    allowed = precision * size + loss.gradient_rounding(z, labels, moved, precision)
    # What agrees as well as a recomputed gradient must is not dropped: the certificate decides.
    allowed = SLACK * allowed + precision**0.5 * size + torch.finfo(z.dtype).tiny
    off: Tensor = ((given - k).abs() / allowed).amax(1)
    return off


def _by_roots(loss: Loss, weight: Tensor, offset: Tensor, grad: Tensor, precision: float) -> OutputCandidates:
    """Every scale of k at which the loss gives it back, by label."""
    u, size, v, left = leading_pair(grad)
    if left > BLUNT:
        return _none(
            loss,
            weight,
            f"the last layer's gradient is not of rank one, as that of one sample is: {left:.0%} of it is left over; "
            "it is of several samples, or was changed",
        )
    assumptions = [
        "label and scale of k are the roots of the loss's equation; the gradient residual decides among them"
    ]
    if left > 10 * precision:
        assumptions.append(
            f"the last layer's gradient is of rank one, but for {left:.1e} of it, which is taken for noise"
        )
        precision = left
    equation = ScaleEquation(loss, u, size * (weight @ v), offset)
    found: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []  # label, k, z, error of k
    for label in loss.possible_labels(u, precision):
        root = equation.roots(label)
        if not len(root):
            continue
        k, z = u / root[:, None], equation.outputs(root)
        x = v * (size * root)[:, None]
        moved = _moved(weight, offset, x, precision)
        # Each feature was rounded on its own: on average they move the outputs by less than all together could.
        error = equation.error(root, label, moved / len(v) ** 0.5, precision)
        own = loss.label_from(z, k)
        own = label.expand(len(root)) if own is None else own
        z_moved = moved + error * (z - offset).abs().amax(1)
        fits = _misses(loss, z, own, k, z_moved, precision) <= 1
        found.append((own[fits], k[fits], z[fits], error[fits]))
    if not any(len(labels) for labels, *_ in found):
        return _none(
            loss,
            weight,
            f"under {loss.name} loss no label and no scale of k give the last layer's gradient: it is scaled, of "
            "several samples, of a loss that is saturated, or of another loss",
        )
    labels, k, z, error = (torch.cat(column) for column in zip(*found, strict=True))
    return OutputCandidates(
        labels, torch.full_like(error, float("nan")), k[..., None], z[..., None], error, tuple(assumptions)
    )


def _collected(
    found: list[tuple[float, float, Tensor, Tensor, float]], last: Layer, assumption: str, reason: str = ""
) -> OutputCandidates:
    """Candidates of label, margin, k, z and the error of k."""
    like = last.weight

    def column(values: list[float]) -> Tensor:
        return torch.tensor(values, dtype=torch.float64, device=like.device)

    def stacked(values: list[Tensor]) -> Tensor:
        return torch.stack(values)[..., None] if values else like.new_zeros(0, last.outputs, 1)

    return OutputCandidates(
        column([each[0] for each in found]),
        column([each[1] for each in found]),
        stacked([each[2] for each in found]),
        stacked([each[3] for each in found]),
        column([each[4] for each in found]),
        (assumption,) if assumption else (),
        reason,
    )


def _of_margin(
    last: Layer, before: Activation, loss: MarginLoss, gradients: dict[str, Tensor], precision: float
) -> OutputCandidates:
    weight, grad = last.weight, gradients[last.weight_name].double().reshape(last.weight.shape)
    product = float((weight * grad).sum())  # mu * dl/dmu (Eq. 11)
    # Values are rounded independently of each other, and all of them with k.
    noise = precision * (COVERS * float((weight * grad).norm()) + abs(product))
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
    if last.bias is not None and bool(last.bias.any()):
        reason = "the last layer's bias is frozen: without its gradient the margin is not read off"
        return _collected([], last, "", reason)
    labels, assumption = _margin_labels(before, loss, grad)
    roots = loss.roots(product) or loss.roots(product + noise)
    for mu in roots:
        # Near the extremum the two roots meet, and rounding of the product moves them most.
        # Where the product less the noise has no root, the two have met within the noise: each may be the other.
        low, high = loss.roots(product - noise), loss.roots(product + noise)
        shifted = [_nearest(low, mu), _nearest(high, mu)] if low else list(high)
        slopes = loss.slope(torch.tensor([mu, *shifted], dtype=torch.float64))
        if slopes[0] == 0:
            continue
        error = precision + float((slopes[1:] / slopes[0] - 1).abs().max())
        for y in labels:
            candidate(y, mu, y * float(slopes[0]), y * mu, error)  # k = y dl/dmu (Eq. 14)
    return _collected(found, last, assumption)


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


def last_layer(network: Network) -> Layer | None:
    """The layer whose raw output the loss takes."""
    for node in reversed(network.nodes):
        if isinstance(node.op, Linear):
            layer = node.op.layer
            return layer if node.op.has_gradient and layer.positions == 1 and layer.groups == 1 else None
        if not isinstance(node.op, Gather):
            return None
    return None


def activation_before_last(network: Network) -> Activation:
    """The activation in front of the last layer, the identity if there is another operation."""
    value = next(n.reads[0] for n in network.nodes if isinstance(n.op, Linear) and n.op.layer is network.layers[-1])
    while value and isinstance(network.nodes[value - 1].op, Gather):
        value = network.nodes[value - 1].reads[0]
    op = network.nodes[value - 1].op if value else None
    return op.activation if isinstance(op, Elementwise) else IDENTITY
