"""Defences: each takes an update and gives the one that the client sends in its place.

A defence sees what is in the update and nothing else: neither the data nor the model. If that is a weight difference,
or a mean over several clients, then the difference or the mean is what is changed.

Every defence has one field that says how strong it is, `levels` to sweep it over from weak to strong, and a cost in
`gradient_error`. No defence but `DPSGD` gives a guarantee: that the attacks which were tried have failed is not one.
"""

from __future__ import annotations

import importlib
import math
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import ClassVar, final

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.update import Update

Gradients = dict[str, Tensor]
"""By parameter name, in float64."""


@dataclass(frozen=True)
class Defence(ABC):
    """``Update -> Update``. Authors write `run`, and name the field that is the strength."""

    about: ClassVar[str]
    """What it does, in one sentence."""
    strength_name: ClassVar[str] = ""
    """The field that says how strong the defence is; empty for a defence that is either on or off."""
    levels: ClassVar[tuple[float, ...]] = (1.0,)
    """Strengths for a sweep, from weak to strong."""

    @property
    def name(self) -> str:
        return type(self).__name__

    @property
    def random(self) -> bool:
        """Whether it needs a generator."""
        return False

    @property
    def strength(self) -> float:
        """The value of the field `strength_name`; 1 for a defence that is either on or off."""
        return float(getattr(self, self.strength_name)) if self.strength_name else 1.0

    def with_strength(self, value: float) -> Defence:
        """The same defence with another strength.

        Raises:
            ValueError: this defence does not have such a strength; says which it expects.
        """
        if not self.strength_name:
            if value != 1:
                raise ValueError(f"{self.name} is either on or off: got strength {value}, expected 1")
            return self
        if not isinstance(getattr(self, self.strength_name), int):
            return replace(self, **{self.strength_name: float(value)})
        if not float(value).is_integer():
            raise ValueError(f"got {self.strength_name}={value} for {self.name}, expected a whole number")
        return replace(self, **{self.strength_name: round(value)})

    @final
    def __call__(self, update: Update, generator: torch.Generator | None = None) -> Update:
        """Defend one update; it is left as it is.

        Args:
            generator: of everything random; the same state gives the same result.

        Returns:
            An update with the names, shapes, types and header of the one given. Values beyond the range of their type
            become its largest.

        Raises:
            ValueError: the defence is random and got no generator, or it does not fit the update.
        """
        if self.random and generator is None:
            raise ValueError(
                f"{self.name} is random: got no generator, expected a torch.Generator, such as "
                "torch.Generator().manual_seed(0)"
            )
        found = self.run({n: g.to(torch.float64, copy=True) for n, g in update.gradients.items()}, generator)
        got, expected = ({n: tuple(g.shape) for n, g in each.items()} for each in (found, update.gradients))
        if got != expected:
            raise ValueError(f"{self.name} changed names or shapes: got {got}, expected {expected} as it was given")
        kept = {}
        for name, given in update.gradients.items():
            limits = torch.finfo(given.dtype)
            kept[name] = found[name].clamp(limits.min, limits.max).to(given)
        return Update(kept, update.header)

    @abstractmethod
    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        """The defence itself, in float64 on copies; the same names and shapes come back, in the same order.

        Args:
            generator: given if `random` says that it is needed.
        """


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
        _not_negative(deviation=self.deviation)

    @property
    def random(self) -> bool:
        return True

    @abstractmethod
    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        """Noise of standard deviation 1 in the shape of a gradient."""

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        deviation = self.deviation * (_root_mean_square(gradients) if self.relative else 1.0)
        return {name: g + deviation * self.draw(g, generator) for name, g in gradients.items()}


@dataclass(frozen=True)
class GaussianNoise(Noise):
    """Normal noise; arguments, units and errors are those of `Noise`."""

    about: ClassVar[str] = "Adds normal noise to every value."

    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return _normal(like, generator)


@dataclass(frozen=True)
class LaplaceNoise(Noise):
    """Laplace noise: more of it is small, and more is very large, than of normal noise.

    Arguments, units and errors are those of `Noise`; the scale of the distribution is the deviation / sqrt(2).
    """

    about: ClassVar[str] = "Adds Laplace noise to every value."

    def draw(self, like: Tensor, generator: torch.Generator | None) -> Tensor:
        return _laplace(like, generator)


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
        _positive(norm=self.norm)

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        length = _norm(gradients.values())
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
        _positive(norm=self.norm)
        _not_negative(multiplier=self.multiplier)

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
        if not (0 < rate <= 1 and 0 < delta < 1 and steps >= 0):
            raise ValueError(
                f"got rate={rate}, steps={steps}, delta={delta}: expected 0 < rate <= 1, steps >= 0, 0 < delta < 1"
            )
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


_ORDERS = [
    *(1 + n / 100 for n in (1, 2, 3, 5, 7)),
    *(1 + n / 10 for n in range(1, 100)),
    *range(11, 64),
    *(72, 96, 128, 192, 256, 384, 512),
]


@dataclass(frozen=True)
class TopK(Defence):
    """Keep the values of largest magnitude and set all others to zero.

    Args:
        keep: which share of all values of the update is kept, rounded to a whole number of them and at least one. Of
            equal magnitudes those that come first are kept.

    Raises:
        ValueError: keep is not in (0, 1].

    Source: Y. Lin et al., *Deep Gradient Compression*, ICLR 2018, arXiv:1712.01887; as a defence L. Zhu, Z. Liu and
    S. Han, *Deep Leakage from Gradients*, NeurIPS 2019, section 5.
    """

    keep: float = 0.1
    about: ClassVar[str] = "Keeps the share of values with the largest magnitudes and zeroes the rest."
    strength_name: ClassVar[str] = "keep"
    levels: ClassVar[tuple[float, ...]] = (0.9, 0.7, 0.5, 0.3, 0.1, 0.01)

    def __post_init__(self) -> None:
        if not 0 < self.keep <= 1:
            raise ValueError(f"got keep={self.keep}, expected a share above 0 and up to 1")

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        magnitudes = torch.cat([g.flatten().abs() for g in gradients.values()])
        largest = magnitudes.argsort(descending=True, stable=True)[: max(1, round(self.keep * len(magnitudes)))]
        kept = torch.zeros_like(magnitudes, dtype=torch.bool)
        kept[largest] = True
        parts = torch.split(kept, [g.numel() for g in gradients.values()])
        return {n: g.where(part.view_as(g), 0.0) for (n, g), part in zip(gradients.items(), parts, strict=True)}


@dataclass(frozen=True)
class Sign(Defence):
    """Send signs alone, times the mean magnitude of each tensor. Zero has no sign and stays zero.

    Source: S. P. Karimireddy et al., *Error Feedback Fixes SignSGD and other Gradient Compression Schemes*, ICML 2019,
    arXiv:1901.09847.
    """

    about: ClassVar[str] = "Sends signs alone, times the mean magnitude of each tensor."

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        return {name: g.abs().mean() * g.sign() if g.numel() else g for name, g in gradients.items()}


@dataclass(frozen=True)
class Quantise(Defence):
    """Round to evenly spaced values, 2^bits - 1 of them in each tensor: zero, and as many on each side of it.

    The outermost are plus and minus the tensor's largest magnitude m, so that neighbours are m / (2^(bits-1) - 1)
    apart, as in symmetric integer formats. Rounding moves a value by half of that at most, stochastic rounding by
    all of it.

    Args:
        bits: for each value, from 2, which is {-m, 0, m}, to 32. For 1 there is `Sign`.
        stochastic: round up or down at random, so that the mean is the value; needs a generator.

    Raises:
        ValueError: bits is not a whole number from 2 to 32.

    Source: D. Alistarh et al., *QSGD*, NeurIPS 2017, arXiv:1610.02132 (which scales by the norm).
    """

    bits: int = 8
    stochastic: bool = False
    about: ClassVar[str] = "Rounds each tensor to few evenly spaced values."
    strength_name: ClassVar[str] = "bits"
    levels: ClassVar[tuple[float, ...]] = (16.0, 12.0, 8.0, 6.0, 4.0, 3.0, 2.0)

    def __post_init__(self) -> None:
        if self.bits not in range(2, 33):
            raise ValueError(f"got bits={self.bits}, expected a whole number from 2 to 32; for one bit use Sign")

    @property
    def random(self) -> bool:
        return self.stochastic

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        return {name: self._round(g, generator) for name, g in gradients.items()}

    def _round(self, gradient: Float[Tensor, "..."], generator: torch.Generator | None) -> Float[Tensor, "..."]:
        largest, steps = _largest(gradient), 2 ** (self.bits - 1) - 1
        if largest == 0:
            return gradient
        exact = gradient / largest * steps
        whole = (exact + _uniform(gradient, generator)).floor() if self.stochastic else exact.round()
        rounded: Tensor = whole.clamp(-steps, steps) / steps * largest
        return rounded


@dataclass(frozen=True)
class Freeze(Defence):
    """Withhold the gradients of the first layers, as if they were not trained.

    Zeros are sent in their place, so that the update keeps its form. An attacker who knows this leaves them out; one
    who does not takes them for gradients.

    Args:
        layers: how many. Parameters whose names are the same up to the last dot are one layer, batch norm included.
        order: the layers' names from the input on, such as ("conv1", "conv2", "fc"). Empty: the order of the update,
            which is the model's for one from `rgap.capture`, and alphabetical for one from a file.

    Raises:
        ValueError: the number is negative, or the update holds no layer of a name.
    """

    layers: int = 1
    order: tuple[str, ...] = ()
    about: ClassVar[str] = "Zeroes the gradients of the first layers."
    strength_name: ClassVar[str] = "layers"
    levels: ClassVar[tuple[float, ...]] = (1.0, 2.0, 3.0, 4.0)

    def __post_init__(self) -> None:
        _not_negative(layers=self.layers)

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        there = list(dict.fromkeys(_layer(name) for name in gradients))
        unknown = [layer for layer in self.order if layer not in there]
        if unknown:
            raise ValueError(f"the update holds no layer {', '.join(unknown)}; expected some of {', '.join(there)}")
        frozen = (self.order or there)[: self.layers]
        return {name: torch.zeros_like(g) if _layer(name) in frozen else g for name, g in gradients.items()}


@dataclass(frozen=True)
class DropBias(Defence):
    """Zero the gradients of biases: of parameters whose name ends in ``bias``, or that have one dimension.

    The quotient of a Linear layer's weight and bias gradients is its input, for every unit; without the bias it is
    known but for a factor. The one-dimensional weights of norm layers are zeroed as well.

    Source: L. T. Phong et al., *Privacy-Preserving Deep Learning via Additively Homomorphic Encryption*, IEEE
    TIFS 2018, for the leak.
    """

    about: ClassVar[str] = "Zeroes the gradients of biases."

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        return {n: torch.zeros_like(g) if n.endswith("bias") or g.ndim == 1 else g for n, g in gradients.items()}


@dataclass(frozen=True)
class Soteria(Defence):
    """Hide features from the weight gradient of the Linear layer that reads the representation.

    Zeroes a share of the columns of that gradient, one column for each feature: those with the largest L2 norm, of
    equal ones those that come first. Of one sample column i is r_i times the gradient of the layer's output, so that
    these are the features with the largest |r_i|. The bias and all other layers stay as they are.

    The paper zeroes the columns of the features with the least |dr_i/dX| / |r_i|, where X is the data. That derivative
    is not in the update: it is taken to be the same for all features here.

    Args:
        share: of the columns, rounded to a whole number of them.
        layer: the name of the layer's module, such as ``fc``. Empty: the first weight with two dimensions in the
            update's order.

    Raises:
        ValueError: the share is not in [0, 1], or the update holds no such layer.

    Source: J. Sun et al., *Soteria: Provable Defense against Privacy Leakage in Federated Learning from Representation
    Perspective*, CVPR 2021, arXiv:2012.06043.
    """

    share: float = 0.4
    layer: str = ""
    about: ClassVar[str] = "Zeroes the largest columns of the weight gradient of one Linear layer."
    strength_name: ClassVar[str] = "share"
    levels: ClassVar[tuple[float, ...]] = (0.01, 0.1, 0.2, 0.4, 0.8)

    def __post_init__(self) -> None:
        if not 0 <= self.share <= 1:
            raise ValueError(f"got share={self.share}, expected a share from 0 to 1")

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        matrices = [name for name, g in gradients.items() if g.ndim == 2]
        found = [name for name in matrices if self.layer in ("", _layer(name))]
        if not found:
            wanted = f"the layer {self.layer!r}" if self.layer else "a Linear layer"
            raise ValueError(
                f"Soteria needs the weight gradient of {wanted}: got {', '.join(matrices) or 'none'} with two "
                f"dimensions among {', '.join(gradients)}"
            )
        columns = gradients[found[0]].norm(dim=0)
        hidden = columns.argsort(descending=True, stable=True)[: round(self.share * len(columns))]
        return {**gradients, found[0]: gradients[found[0]].index_fill(1, hidden, 0.0)}


@dataclass(frozen=True)
class Compose(Defence):
    """Several defences, one after the other. As a whole it is either on or off.

    Raises:
        ValueError: there is none.
    """

    defences: tuple[Defence, ...]
    about: ClassVar[str] = "Applies several defences one after the other."

    def __post_init__(self) -> None:
        if not self.defences:
            raise ValueError("got no defences to compose, expected at least one")

    @property
    def name(self) -> str:
        return " + ".join(defence.name for defence in self.defences)

    @property
    def random(self) -> bool:
        return any(defence.random for defence in self.defences)

    def run(self, gradients: Gradients, generator: torch.Generator | None) -> Gradients:
        for defence in self.defences:
            gradients = defence.run(gradients, generator)
        return gradients


ALL: tuple[type[Defence], ...] = (
    GaussianNoise, LaplaceNoise, Clip, DPSGD, TopK, Sign, Quantise, Freeze, DropBias, Soteria,
)  # fmt: skip
"""Every defence on its own; each can be made without arguments."""


def by_name(name: str, strength: float | None = None) -> Defence:
    """A defence of `ALL` by its name; upper and lower case, dashes and underscores do not matter: ``top-k`` is `TopK`.

    Raises:
        ValueError: no defence has this name, or not this strength.
    """
    known = {kind.__name__.lower(): kind for kind in ALL}
    kind = known.get(name.lower().replace("-", "").replace("_", ""))
    if kind is None:
        raise ValueError(f"got the defence {name!r}, expected one of {', '.join(kind.__name__ for kind in ALL)}")
    return kind() if strength is None else kind().with_strength(strength)


def gradient_error(before: Update, after: Update) -> float:
    """What a defence costs: |after - before| / |before|, L2 norms over all tensors.

    Returns:
        0 if nothing was changed; inf if something was made of a gradient that is all zero.

    Raises:
        ValueError: the two do not hold the same names and shapes.
    """
    got, expected = ({n: tuple(g.shape) for n, g in each.gradients.items()} for each in (after, before))
    if got != expected:
        raise ValueError(f"got gradients {got}, expected {expected} as before the defence")
    apart = _norm(after.gradients[name].double() - g.double() for name, g in before.gradients.items())
    length = _norm(before.gradients.values())
    if length == 0:
        return 0.0 if apart == 0 else math.inf
    return apart / length


def _layer(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]


def _largest(values: Float[Tensor, "..."]) -> float:
    return float(values.abs().amax()) if values.numel() else 0.0


def _norm(gradients: Iterable[Tensor]) -> float:
    """The Euclidean norm over several tensors, whose squares may overflow."""
    tensors = [g.double() for g in gradients]
    largest = max(_largest(g) for g in tensors)
    if largest == 0:
        return 0.0
    return largest * math.sqrt(sum(float((g / largest).square().sum()) for g in tensors))


def _root_mean_square(gradients: Gradients) -> float:
    return _norm(gradients.values()) / math.sqrt(max(1, sum(g.numel() for g in gradients.values())))


# Drawn where the generator is, in float64: the same seed gives the same values whatever the gradient's type and device.


def _normal(like: Tensor, generator: torch.Generator | None) -> Tensor:
    return torch.randn(like.shape, generator=generator, dtype=torch.float64, device=_home(generator)).to(like)


def _uniform(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """From 0 to 1, 1 excluded."""
    return torch.rand(like.shape, generator=generator, dtype=torch.float64, device=_home(generator)).to(like)


def _laplace(like: Tensor, generator: torch.Generator | None) -> Tensor:
    """Of standard deviation 1: the difference of two exponential values, whose variances of 1 add up to 2."""
    one, other = (
        torch.empty(like.shape, dtype=torch.float64, device=_home(generator)).exponential_(generator=generator)
        for _ in range(2)
    )
    return ((one - other) / math.sqrt(2)).to(like)


def _home(generator: torch.Generator | None) -> torch.device | None:
    return None if generator is None else generator.device


def _not_negative(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 <= value < math.inf:
            raise ValueError(f"got {name}={value}, expected 0 or more, and finite")


def _positive(**values: float | int) -> None:
    for name, value in values.items():
        if not 0 < value < math.inf:
            raise ValueError(f"got {name}={value}, expected more than 0, and finite")
