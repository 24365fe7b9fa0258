"""What a client does between its data and what it sends, and what the server can undo of it.

A weight difference after one step of SGD is the gradient times the learning rate. After several steps it is a sum of
gradients at weights that moved: momentum, weight decay and the proximal term are linear in known things, so that the
sum's coefficients follow from the protocol (`Protocol.expansion`).
"""

from __future__ import annotations

import math
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
    """SGD with momentum, 0.9 unless the protocol gives another."""
    ADAM = "adam"
    ADAMW = "adamw"


MOMENTUM = 0.9
ADAM_EPSILON = 1e-8
LONGEST = 1_000_000
"""Local steps that are followed one by one."""
LOCAL = ("steps", "learning_rate", "epochs", "minibatch", "nesterov", "weight_decay", "proximal", "schedule")
"""What only a client has that takes local steps."""
CLIPPED = 1e-3
"""A gradient this near to the clipping norm, relatively, is taken for a clipped one: weights are rounded."""


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
        epochs: how often the client goes over its samples.
        minibatch: samples of a local step; None: all that the client has.
        shuffled: whether each epoch takes the samples in an order of its own.
        drop_last: whether a last minibatch with too few samples is left out.
        momentum, nesterov: of SGD.
        weight_decay: as torch.optim has it: added to the gradient; of AdamW apart from it.
        proximal: FedProx's mu: mu / 2 times the squared distance from the first weights is added to the loss.
        clip_norm: the norm to which each step's gradient is clipped, as torch.nn.utils.clip_grad_norm_ does.
        schedule: what the learning rate is multiplied by in each epoch; empty: 1.
        buffers: whether the buffers are sent too, such as running statistics: a whole state dict.

    Raises:
        ValueError: a field makes no sense, or fields contradict each other.
    """

    sends: Sends = Sends.GRADIENT
    steps: int = 1
    learning_rate: float | None = None
    optimiser: Optimiser = Optimiser.SGD
    summed: bool = False
    clients: int = 1
    epochs: int = 1
    minibatch: int | None = None
    shuffled: bool = True
    drop_last: bool = False
    momentum: float = 0.0
    nesterov: bool = False
    weight_decay: float = 0.0
    proximal: float = 0.0
    clip_norm: float | None = None
    schedule: tuple[float, ...] = ()
    buffers: bool = False

    def __post_init__(self) -> None:
        if self.optimiser is Optimiser.MOMENTUM and self.momentum == 0:
            object.__setattr__(self, "momentum", MOMENTUM)
        object.__setattr__(self, "schedule", tuple(self.schedule))
        for name in ("steps", "clients", "epochs", "minibatch"):
            count = getattr(self, name)
            if not (_whole(count) and count >= 1) and (name, count) != ("minibatch", None):
                raise ValueError(f"got {name}={count!r}, expected a whole number from 1 on")
        for name in ("momentum", "weight_decay", "proximal"):
            if not (math.isfinite(getattr(self, name)) and getattr(self, name) >= 0):
                raise ValueError(f"got {name}={getattr(self, name)}, expected a finite number from 0 on")
        for factor in (*self.schedule, 1.0 if self.clip_norm is None else self.clip_norm):
            if not (math.isfinite(factor) and factor > 0):
                raise ValueError(f"got {factor} in schedule or as clip_norm, expected positive finite numbers")
        if self.sends is Sends.GRADIENT:
            self._check_gradient()
        else:
            self._check_difference()

    def _check_gradient(self) -> None:
        for name in LOCAL:
            got, expected = getattr(self, name), getattr(Protocol, name)
            if got != expected:
                raise ValueError(
                    f"got {name}={got}: a client that sends a gradient takes no local steps, expected {name}={expected}"
                )

    def _check_difference(self) -> None:
        if self.learning_rate is None or not (math.isfinite(self.learning_rate) and self.learning_rate > 0):
            raise ValueError(f"got learning_rate={self.learning_rate}: a weight difference needs a positive one")
        if self.steps > 1 and (self.epochs > 1 or self.minibatch is not None):
            raise ValueError(
                f"got steps={self.steps} with epochs or minibatches: steps are on the whole batch; expected steps=1, "
                "epochs count the passes"
            )
        if self.momentum and not self.linear:
            raise ValueError(f"got momentum={self.momentum} for {self.optimiser.value}, which has its own; expected 0")
        if self.nesterov and not self.momentum:
            raise ValueError("got nesterov=True without momentum, expected a positive momentum")
        if self.drop_last and self.minibatch is None:
            raise ValueError("got drop_last=True without minibatches, expected minibatch too")
        if self.schedule and len(self.schedule) != self.passes:
            raise ValueError(
                f"got a schedule of {len(self.schedule)} factors, expected {self.passes}: one for each epoch"
            )

    @property
    def linear(self) -> bool:
        """Whether the final weights are a linear combination of the first ones and of the steps' gradients."""
        return self.optimiser in (Optimiser.SGD, Optimiser.MOMENTUM)

    @property
    def local(self) -> bool:
        """Whether the client may take several local steps."""
        return self.sends is Sends.DIFFERENCE and (self.passes > 1 or self.minibatch is not None)

    @property
    def passes(self) -> int:
        """How often the client goes over its samples, be it told as epochs or as steps."""
        return max(self.steps, self.epochs)

    def minibatches(self, samples: int) -> tuple[int, ...]:
        """How many samples each local step is on, in order.

        Args:
            samples: of one client.

        Raises:
            ValueError: a minibatch has more samples than there are, or there are too many steps to follow.
        """
        size = samples if self.minibatch is None else self.minibatch
        if not 1 <= size <= samples:
            raise ValueError(f"got minibatch={size} for a client of {samples} samples, expected as many or fewer")
        whole, rest = divmod(samples, size)
        count = self.passes * (whole + (rest > 0 and not self.drop_last))
        if count > LONGEST:
            raise ValueError(f"got {count} local steps, expected {LONGEST} at the most")
        return self.passes * ((size,) * whole + (rest,) * (rest > 0 and not self.drop_last))

    def rates(self, samples: int) -> tuple[float, ...]:
        """The learning rate of each local step of a client of so many samples."""
        if self.learning_rate is None:
            return ()
        each = len(self.minibatches(samples)) // self.passes
        return tuple(self.learning_rate * f for f in self.schedule or (1.0,) * self.passes for _ in range(each))

    def expansion(self, samples: int, before: int | None = None) -> tuple[float, tuple[float, ...]]:
        """How far the weights have moved, as a combination of the first weights w_0 and of the steps' gradients g_t.

        w_t - w_0 = a w_0 + sum_s c_s g_s, exactly, for SGD with momentum, Nesterov's or not, weight decay and the
        proximal term; g_s is the gradient of the loss alone at the weights before step s. With a clipping norm it is
        the clipped gradient, in which the proximal term is.

        Args:
            samples: of one client.
            before: the weights before this step, counted from 0; None: those at the end.

        Returns:
            a, and the c_s of the steps so far.

        Raises:
            ValueError: Adam's steps are not linear, or a gradient is sent.
        """
        if not self.linear or self.learning_rate is None:
            raise ValueError(
                f"got a client that sends a {self.sends.value} by {self.optimiser.value}, expected a weight difference "
                "by sgd: only its steps are linear in the gradients"
            )
        proximal = self.proximal if self.clip_norm is None else 0.0
        # Backwards: what the end owes to the weights and to the momentum's buffer after each step, and to w_0 directly.
        weight, buffer, first = 1.0, 0.0, 0.0
        coefficients = []
        for rate in reversed(self.rates(samples)[:before]):
            step = -rate * weight
            gradient, buffer = (step, buffer + self.momentum * step) if self.nesterov else (0.0, buffer + step)
            gradient, buffer = gradient + buffer, self.momentum * buffer
            coefficients.append(gradient)
            weight += (proximal + self.weight_decay) * gradient
            first -= proximal * gradient
        return weight + first - 1, tuple(reversed(coefficients))

    def undo(
        self, sent: Mapping[str, Tensor], batch_size: int, weights: Mapping[str, Tensor] | None = None
    ) -> tuple[dict[str, Tensor], tuple[str, ...]]:
        """The gradient of the mean loss that was sent, in float64, and what had to be taken for granted.

        Several steps are taken as if they were all on all samples, at the first weights.

        Args:
            batch_size: the samples of one client.
            weights: the first ones, by name; needed for weight decay alone.
        """
        if self.weight_decay and weights is None:
            raise ValueError("got no weights, expected those before the first step: weight decay takes a share of them")
        found = {name: tensor.double() for name, tensor in sent.items()}
        before = {name: t if weights is None else weights[name].to(t) for name, t in found.items()}
        share = [float(size) if self.summed else 1.0 for size in self.minibatches(batch_size)]
        assumptions = self._assumptions(len(share))
        if self.sends is Sends.DIFFERENCE and self.linear:
            decay, coefficients = self.expansion(batch_size)
            decay = decay if self.weight_decay else 0.0
            total = sum(coefficients)
            found = {name: (t - decay * before[name]) / total for name, t in found.items()}
            share = [sum(c * s for c, s in zip(coefficients, share, strict=True)) / total]
        elif self.sends is Sends.DIFFERENCE:
            found = self._undo_adam(found, before, batch_size)
        if self.clip_norm is not None:
            norm = math.sqrt(sum(float(t.square().sum()) for t in found.values()))
            if len(self.minibatches(batch_size)) > 1 or norm > self.clip_norm * (1 - CLIPPED):
                assumptions += (f"a gradient that is clipped to a norm of {self.clip_norm:g} has lost its size",)
        mean = sum(share) / len(share)
        return {name: t / mean for name, t in found.items()}, assumptions

    def _undo_adam(self, found: Mapping[str, Tensor], before: Mapping[str, Tensor], samples: int) -> dict[str, Tensor]:
        """Every step with the same gradient g moves a weight by rate * g / (|g| + epsilon)."""
        apart = self.optimiser is Optimiser.ADAMW
        kept, pushes = 1.0, 0.0
        for rate in self.rates(samples):
            shrink = 1 - rate * self.weight_decay * apart
            kept, pushes = kept * shrink, pushes * shrink + rate
        moved = {name: t - (kept - 1) * before[name] for name, t in found.items()}
        ratio = {name: (-t / pushes).clamp(-1 + 1e-12, 1 - 1e-12) for name, t in moved.items()}
        added = 0.0 if apart else self.weight_decay
        return {name: ADAM_EPSILON * r / (1 - r.abs()) - added * before[name] for name, r in ratio.items()}

    def _assumptions(self, steps: int) -> tuple[str, ...]:
        """What `undo` takes for granted of so many steps, each in a sentence."""
        found: tuple[str, ...] = ()
        if not self.linear and self.sends is Sends.DIFFERENCE:
            found += ("Adam's step hides the size of a gradient: what is left of it was inverted",)
        if steps > 1 and self.minibatch is None:
            found += (f"the {steps} local steps are taken for {steps} times the first",)
        elif steps > 1:
            found += (f"the {steps} local steps on minibatches are taken for {steps} times the first, on all samples",)
        return found


def _whole(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
