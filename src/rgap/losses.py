"""The losses rgap knows, under their public name; see `rgap.nn.losses`."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from rgap.nn.export import CannotBeTraced, export
from rgap.nn.kernels import differentiable
from rgap.nn.label_maps import LabelMaps
from rgap.nn.losses import (
    MOST_BINARY,
    SEVERAL,
    BinaryCrossEntropy,
    BinaryCrossEntropyOfProbabilities,
    CrossEntropy,
    Exponential,
    Hinge,
    Logistic,
    Loss,
    MarginLoss,
    MeanSquaredError,
    NegativeLogLikelihood,
    SquaredHinge,
    by_name,
)
from rgap.nn.models import unwrapped
from rgap.nn.outputs import of_fixed_batch, outputs_of, reason_of, wrong_shape

__all__ = [
    "BinaryCrossEntropy", "BinaryCrossEntropyOfProbabilities", "CrossEntropy", "Exponential", "Hinge", "LabelMaps",
    "Logistic", "Loss", "MarginLoss", "MeanSquaredError", "NegativeLogLikelihood", "OfFunction", "SquaredHinge",
    "by_name", "for_model",
]  # fmt: skip

TORCH: dict[type[nn.Module], type[Loss]] = {
    nn.CrossEntropyLoss: CrossEntropy,
    nn.NLLLoss: NegativeLogLikelihood,
    nn.MSELoss: MeanSquaredError,
    nn.BCEWithLogitsLoss: BinaryCrossEntropy,
    nn.BCELoss: BinaryCrossEntropyOfProbabilities,
    nn.SoftMarginLoss: Logistic,
}
"""Losses of torch, and what each is here."""
BY_TORCH_NAME = {kind.__name__: kind for kind in TORCH}


@dataclass(frozen=True)
class OfFunction(Loss):
    """A function of outputs and targets of one's own, averaged over the batch, as training code calls it.

    Args:
        function: takes outputs (b, outputs) and classes (b,) as whole numbers; of a single output (b,) and numbers.
        outputs: of the model. With several, labels are classes from 0 to outputs - 1, else 0 and 1.
    """

    function: Callable[[Tensor, Tensor], Tensor]
    outputs: int = 1

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(float(label) for label in range(max(2, self.outputs)))

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        single = self.outputs == 1
        given = outputs[:, 0] if single else outputs
        targets = labels.to(outputs) if single else labels.long()
        found: Tensor = torch.func.vmap(lambda o, y: self.function(o[None], y[None]).reshape(()))(given, targets)
        return found


def for_model(model: nn.Module, input_shape: tuple[int, ...], loss: Any = None) -> Loss:
    """What a model is trained with, for its number of outputs.

    Args:
        loss: a name of this package, a loss of ``torch.nn`` or its name, a function of outputs and targets, a `Loss`,
            or masks (n, h, w) for `LabelMaps`. None: what the model's outputs suggest: binary cross-entropy where it
            ends in a sigmoid, else logistic for one output and cross-entropy for several.

    Raises:
        ValueError: an unknown name, a loss that is not known here or is set in a way that is not, or a loss of several
            outputs for a model that does not take this shape.
    """
    if isinstance(loss, Loss):
        return loss
    model = unwrapped(model)
    outputs, refused = _outputs(model, input_shape)
    count = None if outputs is None else outputs[:1].numel()
    if isinstance(loss, Tensor):
        return _label_maps(loss, outputs, wrong_shape((2, *input_shape), refused))
    if isinstance(loss, str) and loss in BY_TORCH_NAME:
        loss = getattr(nn, loss)
    if isinstance(loss, type) and issubclass(loss, (Loss, nn.Module)):
        loss = loss()
    if isinstance(loss, nn.Module) and type(loss).__module__.startswith("torch."):
        return _of_torch(loss, outputs, wrong_shape((2, *input_shape), refused))
    if callable(loss):
        return loss if isinstance(loss, Loss) else OfFunction(loss, count or 1)
    probabilities = outputs is not None and bool(((outputs >= 0) & (outputs <= 1)).all())
    if loss in (None, "bce") and count and probabilities and _ending(model, input_shape) == "sigmoid":
        return BinaryCrossEntropyOfProbabilities(count)
    if loss is None:
        loss = "logistic" if count in (None, 1) else "cross-entropy"
    if count is None and (loss in SEVERAL or of_fixed_batch(refused)):
        raise ValueError(wrong_shape((2, *input_shape), refused))
    if outputs is not None and (
        loss in ("cross-entropy", "nll") or (loss == "bce" and outputs[0].numel() > MOST_BINARY)
    ):
        _check_classes(outputs)
    return by_name(loss, count)


def _label_maps(masks: Tensor, outputs: Tensor | None, wrong: str) -> Loss:
    """Pixel-wise cross-entropy of a model's outputs with these masks."""
    if outputs is None:
        raise ValueError(wrong)
    if masks.dim() == 4 and masks.shape[1] == 1:
        masks = masks[:, 0]
    if outputs.dim() != 4 or masks.dim() != 3 or outputs.shape[2:] != masks.shape[1:]:
        raise ValueError(
            f"got masks of shape {tuple(masks.shape[1:])} for a model that returns {tuple(outputs.shape[1:])}, "
            "expected (h, w) and (classes, h, w)"
        )
    return LabelMaps(masks, outputs.shape[1])


class NeedsMasks(ValueError):
    """The model returns classes for each place of a map."""

    def __init__(self, outputs: Tensor):
        self.outputs = outputs
        super().__init__(
            f"the model returns {tuple(outputs.shape[1:])} for a sample, classes for each place, whose labels are "
            "masks: give them (--data FILE.npz with x and masks y of shape (n, h, w), or rgap.losses.LabelMaps)"
        )


def _check_classes(outputs: Tensor) -> None:
    """Refuse classes for each place of a map."""
    sizes = [size for size in outputs.shape[1:] if size > 1]
    if len(sizes) > 1:
        raise NeedsMasks(outputs)


def _of_torch(loss: nn.Module, found: Tensor | None, wrong: str) -> Loss:
    """A loss of torch.nn as it is here.

    Args:
        found: the model's outputs; None if it does not take the shape.
        wrong: what is said then.
    """
    outputs = None if found is None else found[:1].numel()
    kind, name = TORCH.get(type(loss)), type(loss).__name__
    if kind is None:
        raise ValueError(
            f"got {name}, which has no closed form here: expected one of {', '.join(BY_TORCH_NAME)}, a name such as "
            "cross-entropy, or a function of outputs and targets of your own"
        )
    reduction = getattr(loss, "reduction", "mean")
    if reduction != "mean":
        how = "Protocol(summed=True), --summed" if reduction == "sum" else "a mean"
        raise ValueError(f"got {name} with reduction {reduction!r}, expected 'mean': of a sum say so by {how}")
    if getattr(loss, "pos_weight", None) is not None or getattr(loss, "ignore_index", -100) >= 0:
        raise ValueError(f"got {name} with pos_weight or ignore_index, expected neither: pass a function of your own")
    if issubclass(kind, MarginLoss):
        return kind()
    if outputs is None or found is None:
        raise ValueError(wrong)
    if issubclass(kind, CrossEntropy):
        _check_classes(found)
        weight = getattr(loss, "weight", None)
        weights = None if weight is None else tuple(float(w) for w in weight)
        return kind(outputs, float(getattr(loss, "label_smoothing", 0.0)), weights)
    if getattr(loss, "weight", None) is not None:
        raise ValueError(f"got {name} with weights, expected none: pass a function of your own")
    made: Loss = kind(outputs)  # type: ignore[call-arg]
    return made


def _outputs(model: nn.Module, input_shape: tuple[int, ...]) -> tuple[Tensor | None, str]:
    """Of two samples of noise, (2, ...); None and the reason if the model does not take the shape."""
    parameter = next((p for p in model.parameters() if p.is_floating_point()), torch.zeros(()))
    noise = torch.rand(2, *input_shape, generator=torch.Generator().manual_seed(0)).to(parameter)
    try:
        with torch.no_grad(), torch.random.fork_rng(), differentiable():
            outputs = outputs_of(model(noise))
    except Exception as error:  # of the model's own code
        return None, reason_of(error)
    if not isinstance(outputs, Tensor) or not outputs.numel() or outputs.numel() % 2:
        return None, "it returns something else than outputs for each sample"
    return (outputs if len(outputs.shape) > 1 and len(outputs) == 2 else outputs.reshape(2, -1)), ""


def _ending(model: nn.Module, input_shape: tuple[int, ...]) -> str:
    """The function of probabilities that the model does last; empty if there is none, or nobody can tell."""
    try:
        found = export(model, input_shape).ending
    except CannotBeTraced:
        return ""
    return "" if found is None else str(found.target).split(".")[1].strip("_")
