"""The last layer of a model, as labels are read off its gradient."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.attacks.base import residual_tolerance
from rgap.nn.losses import CrossEntropy, Loss, MarginLoss
from rgap.target import Target
from rgap.update import Update


class Unreadable(ValueError):
    """No labels can be read off the last layer."""


@dataclass(frozen=True)
class LastLayer:
    """The last layer: the loss takes its outputs as they are."""

    loss: Loss
    weight: Float[Tensor, "outputs features"]
    bias: Float[Tensor, " outputs"]
    """Zero if there is none."""
    weight_name: str
    bias_name: str
    """Empty if there is none."""
    bias_trained: bool
    nonnegative: str | None
    """The activation that keeps its input from being negative, if one is known to."""

    @property
    def plain(self) -> bool:
        """Whether g is softmax(o) - one_hot(y), in a batch as well as alone."""
        loss = self.loss
        return isinstance(loss, CrossEntropy) and not loss.label_smoothing and loss.weight is None

    def output_gradient(self, x: Float[Tensor, "s features"], y: Float[Tensor, " s"]) -> Float[Tensor, "s outputs"]:
        """g of each sample, from its features and label."""
        return self.loss.output_gradient(x @ self.weight.mT + self.bias, y.to(x.device))

    def shares(
        self,
        known: Float[Tensor, "s features"],
        grad_weight: Float[Tensor, "*n outputs features"],
        grad_bias: Float[Tensor, "*n outputs"] | None,
        b: int,
    ) -> Float[Tensor, "*n labels"]:
        """The share of each label in a batch of b, not yet between 0 and 1, from features of noise and the gradient; of
        as many batches as there are gradients."""
        if isinstance(self.loss, MarginLoss):
            assert grad_bias is not None
            low, high = (
                float(self.output_gradient(known, torch.full((len(known),), y, dtype=torch.float64)).mean())
                for y in self.loss.labels
            )
            up = (grad_bias.double().cpu() - low) / (high - low)
            return torch.cat([1 - up, up], -1).clamp(0, 1)
        mean = known.mean(0)
        if grad_bias is None:
            # Sums of a row, features that are negative on noise counted so: they do not cancel.
            grad_bias = grad_weight @ mean.sign() / mean.abs().sum()
        g = grad_bias.to(grad_weight.device)
        # grad W = g x' if all samples had the same features. Where labels occur in nearly equal numbers g is next to
        # nothing and tells as little of them: features of noise take part, with the |g|^2 of labels at random.
        ridge = 1 / b
        reads = (g[..., None, :] @ grad_weight)[..., 0, :]
        x = (reads + ridge * mean) / (g.square().sum(-1, keepdim=True) + ridge)
        return (x @ self.weight.mT + self.bias).softmax(-1) - g


def last_layer(target: Target) -> LastLayer:
    """The layer whose outputs the loss takes.

    Raises:
        Unreadable: it is not one that labels can be read off; says why.
    """
    uses, loss = target.graph.uses, target.loss
    if not uses:
        raise Unreadable("no layer of the model is known")
    use = uses[-1]
    weight = target.parameters.get(use.weight_name or "")
    if use.weight_name is None or weight is None or weight.dim() != 2 or len(weight) != use.outputs:
        raise Unreadable(f"{use.name}, the last layer, is no Linear layer whose gradient is shared")
    if use.outputs != loss.outputs:
        raise Unreadable(f"{use.name}, the last layer, has {use.outputs} outputs, the loss takes {loss.outputs}")
    bias = torch.zeros(len(weight)) if use.bias_name is None else target._tensors[use.bias_name]
    # Behind an obstacle, such as batch norm, the activation before may say nothing of the sign.
    chain = not target.graph.obstacles
    before = uses[use.before].activation if chain and use.before is not None else None
    last = LastLayer(
        loss,
        weight.double(),
        bias.double().to(weight.device),
        use.weight_name,
        use.bias_name or "",
        use.bias_name in target.parameters,
        str(before) if before is not None and before.nonnegative else None,
    )
    if not chain and noise_features(target, last, 1) is None:
        raise Unreadable(f"it is not certain that the loss takes the outputs of {use.name} as they are")
    return last


def noise_features(target: Target, last: LastLayer, count: int) -> Float[Tensor, "s features"] | None:
    """What the last layer reads where the model reads noise; None if its gradient is not g x' there.

    The gradients that two labels give differ by (g - g') x'. With cross-entropy g - g' is -1 in one row and 1 in the
    other; with one output it is read off the bias.
    """
    single = len(last.weight) == 1
    if single and not last.bias_trained:
        return None
    low, high = target.value_range or (0.0, 1.0)
    generator = torch.Generator().manual_seed(0)
    noise = low + (high - low) * torch.rand((count, *target.input_shape), generator=generator, dtype=torch.float64)
    labels = torch.tensor(target.loss.examples[:2], dtype=torch.float64)
    names = (last.weight_name, last.bias_name) if single else (last.weight_name,)
    found = []
    with torch.random.fork_rng():  # a model with dropout in training mode draws from the global state
        for x in noise:
            grads, *biases = target.label_gradients(x[None], labels, *names)
            tolerance, grads = residual_tolerance(grads.dtype), grads.double()
            apart = grads[0] - grads[1]
            reads = apart / (biases[0][0] - biases[0][1]).double() if single else apart[1:2]
            g = last.output_gradient(reads.expand(2, -1), labels)
            missed = (g[:, :, None] * reads - grads).flatten(1).norm(dim=1)
            if not bool((missed <= tolerance * grads.flatten(1).norm(dim=1)).all()):
                return None
            found.append(reads)
    return torch.cat(found)


def sent(update: Update, name: str) -> Tensor | None:
    """The gradient of that name; None if it was not sent, or withheld by sending zeros."""
    grad = update.gradients.get(name)
    return grad.double() if grad is not None and grad.any() else None
