"""Sending less: fewer values, fewer bits, fewer layers, fewer features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.defences.base import Defence, Gradients, largest_magnitude, not_negative
from rgap.defences.noise import fresh


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
        largest, steps = largest_magnitude(gradient), 2 ** (self.bits - 1) - 1
        if largest == 0:
            return gradient
        exact = gradient / largest * steps
        whole = (
            (exact + fresh(gradient, generator).uniform_(generator=generator).to(gradient)).floor()
            if self.stochastic
            else exact.round()
        )
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
        not_negative(layers=self.layers)

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


def _layer(name: str) -> str:
    """The module that a parameter belongs to."""
    return name.rpartition(".")[0]
