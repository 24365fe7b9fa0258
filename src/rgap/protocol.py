"""What a client does between its data and what it sends, and what the server can undo of it.

A weight difference after one step of SGD is the gradient times the learning rate. After several steps it is a sum of
gradients at weights that moved: the estimate takes them all for the first, and is as good as the steps are small.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor


class Sends(Enum):
    """What the client sends."""

    GRADIENT = "gradient"
    DIFFERENCE = "difference"
    """Its weights after local steps, less those it was given."""


class Optimiser(Enum):
    """How the client takes its local steps, as torch.optim does."""

    SGD = "sgd"
    MOMENTUM = "momentum"
    """SGD with momentum 0.9."""
    ADAM = "adam"


MOMENTUM = 0.9
ADAM_EPSILON = 1e-8


@dataclass(frozen=True)
class Protocol:
    """A client's protocol, as the server knows it.

    Args:
        sends: a gradient (FedSGD), or a weight difference (FedAvg).
        steps: local steps, each on the client's whole batch; 1 for a gradient.
        learning_rate: of the local steps; None for a gradient.
        optimiser: of the local steps.
        summed: whether the loss is summed over the batch, not averaged.
        clients: over how many clients of equal batches the server sees the average; 1 without secure aggregation.

    Raises:
        ValueError: the fields contradict each other.
    """

    sends: Sends = Sends.GRADIENT
    steps: int = 1
    learning_rate: float | None = None
    optimiser: Optimiser = Optimiser.SGD
    summed: bool = False
    clients: int = 1

    def __post_init__(self) -> None:
        if self.steps < 1 or self.clients < 1:
            raise ValueError(f"got steps={self.steps}, clients={self.clients}: expected 1 or more")
        if self.sends is Sends.GRADIENT and (self.steps > 1 or self.learning_rate is not None):
            raise ValueError(
                "a client that sends a gradient takes no local steps: expected steps=1, learning_rate=None"
            )
        if self.sends is Sends.DIFFERENCE and not (self.learning_rate is not None and self.learning_rate > 0):
            raise ValueError(f"got learning_rate={self.learning_rate}: a weight difference needs a positive one")

    def undo(self, sent: Mapping[str, Tensor], batch_size: int) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The gradient of the mean loss that was sent, in float64, and what had to be taken for granted.

        Args:
            batch_size: of one client.
        """
        found = {name: tensor.double() for name, tensor in sent.items()}
        assumptions: tuple[str, ...] = ()
        if self.sends is Sends.DIFFERENCE and self.learning_rate is not None:
            if self.optimiser is Optimiser.ADAM:
                # Every step with the same gradient g moves a weight by rate * g / (|g| + epsilon).
                ratio = {
                    name: (-t / (self.learning_rate * self.steps)).clamp(-1 + 1e-12, 1 - 1e-12)
                    for name, t in found.items()
                }
                found = {name: ADAM_EPSILON * r / (1 - r.abs()) for name, r in ratio.items()}
                assumptions += ("Adam's step hides the size of a gradient: what is left of it was inverted",)
            else:
                found = {name: t / -(self.learning_rate * self._pushes) for name, t in found.items()}
            if self.steps > 1:
                assumptions += (f"the {self.steps} local steps are taken for {self.steps} times the first",)
        if self.summed and batch_size > 1:
            found = {name: t / batch_size for name, t in found.items()}
        return found, assumptions

    @property
    def _pushes(self) -> float:
        """How often a constant gradient is added to the weights, momentum included."""
        if self.optimiser is Optimiser.SGD:
            return float(self.steps)
        return sum((1 - MOMENTUM**step) / (1 - MOMENTUM) for step in range(1, self.steps + 1))
