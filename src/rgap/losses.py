"""The losses rgap knows, under their public name; see `rgap.nn.losses`."""

import torch
from torch import nn

from rgap.nn.losses import (
    BinaryCrossEntropy,
    CrossEntropy,
    Exponential,
    Hinge,
    Logistic,
    Loss,
    MarginLoss,
    MeanSquaredError,
    SquaredHinge,
    by_name,
)

__all__ = [
    "BinaryCrossEntropy",
    "CrossEntropy",
    "Exponential",
    "Hinge",
    "Logistic",
    "Loss",
    "MarginLoss",
    "MeanSquaredError",
    "SquaredHinge",
    "by_name",
    "for_model",
]


def for_model(model: nn.Module, input_shape: tuple[int, ...], name: str | None = None) -> Loss:
    """The loss of that name for a model's number of outputs.

    Args:
        name: None: logistic for a model of one output, cross-entropy for one of several.

    Raises:
        ValueError: an unknown name, or a loss of several outputs for a model that does not take this shape.
    """
    outputs = _outputs(model, input_shape)
    if name is None:
        name = "logistic" if outputs is None or outputs == 1 else "cross-entropy"
    return by_name(name, outputs)


def _outputs(model: nn.Module, input_shape: tuple[int, ...]) -> int | None:
    """The number of outputs for one sample; None if the model does not take the shape, which `Target` explains."""
    parameter = next(model.parameters(), torch.zeros(()))
    try:
        with torch.no_grad():
            outputs = model(parameter.new_zeros(1, *input_shape))
    except (RuntimeError, ValueError, IndexError, TypeError):
        return None
    return int(outputs.numel()) if isinstance(outputs, torch.Tensor) else None
