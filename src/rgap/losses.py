"""The losses rgap knows, under their public name; see `rgap.nn.losses`."""

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
]
