"""Noise, clipping, and differential privacy of both."""

from __future__ import annotations

import importlib
import math
import warnings
from abc import abstractmethod
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from rgap.defences.base import Defence, Gradients, l2_norm, not_negative, positive


@dataclass(frozen=True)
class Noise(Defence):
    """Independent noise on every value; authors write `draw`.

    If relative, the gradient error is about ``deviation`` on every model. The noise then grows with the gradient, so
    that it gives no differential privacy; `DPSGD` does.

    Args:
        deviation: standard deviation, as a multiple of the root mean square of all values of the update.
        relative: False: the deviation is in the gradient's own unit.

    Raises:
        ValueError: the deviation is negative or not finite.

    Source: L. Zhu, Z. Liu and S. Han, *Deep Leakage from Gradients*, NeurIPS 2019, section 5.
    """

    deviation: float = 0.1
    relative: bool = True
    strength_name: ClassVar[str] = "deviation"
    levels: ClassVar[tuple[float, ...]] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        not_negative(deviation=self.deviation)

    @property
    def random(self) -> bool:
        return True

    @abstractmethod
    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise of standard deviation 1 in the shape of a gradient."""

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        count = sum(g.numel() for g in gradients.values())
        root_mean_square = l2_norm(gradients.values()) / math.sqrt(max(1, count))
        deviation = self.deviation * (root_mean_square if self.relative else 1.0)
        return {name: g + deviation * self.draw(g, generator) for name, g in gradients.items()}


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Normal noise; arguments, units and errors are those of `Noise`."""

    about: ClassVar[str] = "Adds normal noise to every value."

    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return fresh(like, generator).normal_(generator=generator).to(like)


@dataclass(frozen=True)
class LaplaceNoise(Noise):
    """Laplace noise: more of it is small, and more is very large, than of normal noise.

    Arguments, units and errors are those of `Noise`; the scale of the distribution is the deviation / sqrt(2).
    """

    about: ClassVar[str] = "Adds Laplace noise to every value."

    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        # The difference of two exponential values, whose variances of 1 add up to 2.
        one, other = (fresh(like, generator).exponential_(generator=generator) for _ in range(2))
        return ((one - other) / math.sqrt(2)).to(like)


@dataclass(frozen=True)
class Clip(Defence):
    """Scale the whole update down to an L2 norm, if it is longer.

    Nothing but one number is hidden. On a network without biases whose activations are all ReLU or LeakyReLU the
    scaled gradient of a picture is the gradient of the same picture, dimmed: attacks find that one.

    Args:
        norm: the largest L2 norm over all tensors together, in the gradient's own unit.

    Raises:
        ValueError: the norm is not positive and finite.
    """

    norm: float = 1.0
    about: ClassVar[str] = "Scales the update down to a largest L2 norm."
    strength_name: ClassVar[str] = "norm"
    levels: ClassVar[tuple[float, ...]] = (1.0, 1e-1, 1e-2, 1e-3)

    def __post_init__(self) -> None:
        positive(norm=self.norm)

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        length = l2_norm(gradients.values())
        factor = self.norm / length if length > self.norm else 1.0
        return {name: factor * g for name, g in gradients.items()}


@dataclass(frozen=True)
class DPSGD(Defence):
    """Clip, then add normal noise of standard deviation multiplier * norm to every value: the Gaussian mechanism.

    What is protected is one update as a whole. If the client has one sample, that is the sample. If it has a batch,
    the mean over the batch is clipped, which is not the clipping of each sample's gradient that DP-SGD does on the
    client: all samples together share the protection.

    Args:
        norm: the largest L2 norm of the update, in the gradient's own unit.
        multiplier: standard deviation of the noise on each value as a multiple of the norm.

    Raises:
        ValueError: the norm is not positive and finite, or the multiplier is negative or not finite.

    Source: M. Abadi et al., *Deep Learning with Differential Privacy*, CCS 2016, arXiv:1607.00133, and for the update
    as the unit H. B. McMahan et al., *Learning Differentially Private Recurrent Language Models*, ICLR 2018,
    arXiv:1710.06963.
    """

    norm: float = 1.0
    multiplier: float = 1.0
    about: ClassVar[str] = (
        "Clips the update and adds normal noise of a fixed size: differential privacy for the update, worth what its "
        "epsilon is worth."
    )
    strength_name: ClassVar[str] = "multiplier"
    levels: ClassVar[tuple[float, ...]] = (1e-6, 1e-5, 1e-4, 1e-3, 1e-2, 1e-1, 1.0)

    def __post_init__(self) -> None:
        positive(norm=self.norm)
        not_negative(multiplier=self.multiplier)

    @property
    def random(self) -> bool:
        return True

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        clipped = Clip(self.norm).run(gradients, generator)
        return GaussianNoise(self.multiplier * self.norm, relative=False).run(clipped, generator)

    def epsilon(self, rate: float, steps: int, delta: float) -> float:
        """The epsilon of (epsilon, delta) differential privacy after so many updates; an upper bound.

        Neighbours are with and without one update. To replace one update by another is twice as far: its epsilon is
        that of half the multiplier. A rate below 1 only counts against someone who does not learn who took part; a
        server that sees the client's own update does, so that against it the rate is 1.

        Args:
            rate: with which probability the client takes part in a round, drawn anew for each.
            steps: rounds.
            delta: the probability with which epsilon may fail.

        Returns:
            Renyi accounting by opacus, minimised over orders from 1.01 to 512: loose where the best order lies beyond,
            which is where epsilon is above a thousand or below about 0.02. Infinite without noise.

        Raises:
            ImportError: opacus is not installed.
            ValueError: an argument is out of its range.

        Source: I. Mironov, K. Talwar and L. Zhang, *Renyi Differential Privacy of the Sampled Gaussian Mechanism*,
        2019, arXiv:1908.10530.
        """
        check_accounting(rate, steps, delta)
        try:
            rdp = importlib.import_module("opacus.accountants.analysis.rdp")
        except ImportError as error:
            raise ImportError(f"epsilon needs opacus ({error}): install it with pip install 'rgap[dp]'") from error
        if steps == 0:
            return 0.0
        if self.multiplier == 0:
            return math.inf
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # opacus tells when the best order is the first or the last
            spent = rdp.compute_rdp(q=rate, noise_multiplier=self.multiplier, steps=steps, orders=_ORDERS)
            epsilon, _ = rdp.get_privacy_spent(orders=_ORDERS, rdp=spent, delta=delta)
        return max(0.0, float(epsilon))


def check_accounting(rate: float, steps: int, delta: float) -> None:
    """Raise ValueError for what no differential privacy is counted with."""
    if not (0 < rate <= 1 and 0 < delta < 1 and steps >= 0):
        raise ValueError(
            f"got rate={rate}, steps={steps}, delta={delta}: expected 0 < rate <= 1, steps >= 0, 0 < delta < 1"
        )


_ORDERS = [
    *(1 + n / 100 for n in (1, 2, 3, 5, 7)),
    *(1 + n / 10 for n in range(1, 100)),
    *range(11, 64),
    *(72, 96, 128, 192, 256, 384, 512),
]


def fresh(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Room for draws: where the generator is, in float64, so that the same seed gives the same values whatever the
    gradient's type and device."""
    return torch.empty(like.shape, dtype=torch.float64, device=None if generator is None else generator.device)
