"""The losses the attack knows, under their public name; see `rgap.nn.losses`."""

from rgap.nn.losses import Exponential, Hinge, Logistic, Loss, SquaredHinge, by_name

__all__ = ["Exponential", "Hinge", "Logistic", "Loss", "SquaredHinge", "by_name"]
