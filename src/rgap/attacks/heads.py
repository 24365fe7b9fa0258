"""Where the recursion starts: label, margin and k of the last layer, from its gradient (Eqs. 9-14).

    <W, grad W> = mu * dl/dmu        (Eq. 11, without bias; mu = label * output)
    k           = label * dl/dmu     (Eq. 14)

Every root mu and every label that nothing rules out becomes one candidate; the gradient residual decides later.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor

from rgap.nn.chain import Chain
from rgap.nn.losses import MarginLoss


@dataclass(frozen=True)
class Heads:
    """s candidates for what the last layer put out."""

    labels: Float[Tensor, " s"]
    margins: Float[Tensor, " s"]
    k: Float[Tensor, "s 1 1"]
    z: Float[Tensor, "s 1 1"]
    """The network's output, bias included."""
    k_error: Float[Tensor, " s"]
    """How far rounding may have moved k, relative to k."""
    assumptions: tuple[str, ...]

    def select(self, index: Tensor) -> Heads:
        """The candidates at an index or mask."""
        return Heads(
            self.labels[index],
            self.margins[index],
            self.k[index],
            self.z[index],
            self.k_error[index],
            self.assumptions,
        )

    @property
    def one_per_label(self) -> Int[Tensor, " labels"]:
        """The index of one candidate for each label, the one with the best known k."""
        order = self.k_error.argsort(descending=True).tolist()
        positions = {float(self.labels[at]): at for at in order}
        return torch.tensor(sorted(positions.values()), dtype=torch.long, device=self.labels.device)


def heads(chain: Chain, loss: MarginLoss, gradients: dict[str, Tensor], precision: float) -> Heads:
    """All candidates that the last layer's gradient allows; none if no sample can have given it.

    Args:
        precision: relative rounding of the gradient.
    """
    last = chain[-1]
    weight, grad = last.weight, gradients[last.weight_name].double().reshape(last.weight.shape)
    product = float((weight * grad).sum())
    noise = precision * float(weight.norm() * grad.norm())
    found: list[tuple[float, float, float, float, float]] = []  # label, mu, k, z, error of k
    if last.bias is not None and last.bias_name is not None:
        k = float(gradients[last.bias_name].double().sum())
        if k != 0:
            label = -1.0 if k > 0 else 1.0  # dl/dmu < 0
            z = product / k + float(last.bias.sum())
            found.append((label, label * z, k, z, precision))
        assumption = "the label and k are read off the last layer's bias gradient"
    else:
        labels, assumption = _labels(chain, loss, grad)
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
            found += [(y, mu, y * float(slopes[0]), y * mu, error) for y in labels]
    columns = torch.tensor(found, dtype=torch.float64, device=grad.device).reshape(-1, 5).T
    labels_, margins, k_, z_, error_ = columns
    return Heads(labels_, margins, k_.reshape(-1, 1, 1), z_.reshape(-1, 1, 1), error_, (assumption,))


def _nearest(roots: tuple[float, ...], mu: float) -> float:
    return min(roots, key=lambda other: abs(other - mu), default=mu)


def _labels(chain: Chain, loss: MarginLoss, grad: Tensor) -> tuple[tuple[float, ...], str]:
    """The labels to try: only one where the features' sign is known, because grad W = k x and k has -label's sign."""
    if len(chain) > 1 and chain[-2].activation.nonnegative:
        total = float(grad.sum())
        if total != 0:
            label = -1.0 if total > 0 else 1.0
            return (label,), f"the label is read off the sign of the last gradient ({chain[-2].activation} is >= 0)"
    return loss.labels, "both labels are tried, and the gradient residual decides"
