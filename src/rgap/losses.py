"""The losses rgap knows, under their public name; see `rgap.nn.losses`."""

from rgap.nn.losses import CrossEntropy, Exponential, Hinge, Logistic, Loss, MarginLoss, SquaredHinge, by_name

__all__ = ["CrossEntropy", "Exponential", "Hinge", "Logistic", "Loss", "MarginLoss", "SquaredHinge", "by_name"]
