"""Settings of `Matching` that were published, each constant with its source, and one of our own.

Rates, noise and variation are for values from 0 to 1. Others divide pictures by a deviation of about a quarter: their
rates are a quarter here, and their total variation weighs four times ours.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from rgap.attacks.distance import Distance, cosine
from rgap.attacks.matching import Matching
from rgap.attacks.minimise import Adam, Minimiser
from rgap.attacks.start import Normal, Start, Tiled

NORMAL, GREY, TILED = Normal(), Normal(deviation=0.01), Tiled()
SIGNED_ADAM = Adam(rate=0.025, signed=True, decay=(3 / 8, 5 / 8, 7 / 8))
LANGEVIN_ADAM = Adam(rate=0.025, cosine=True, warmup=50, noise=0.01)
MODERN_ADAM = Adam(rate=0.025, signed=True, cosine=True, warmup=50)


@dataclass(frozen=True)
class DLG(Matching):
    """Deep Leakage from Gradients (L. Zhu, Z. Liu and S. Han, NeurIPS 2019): squared distance, L-BFGS, 300 iterations,
    the label optimised with the input (Algorithm 1 and the authors' program)."""


@dataclass(frozen=True)
class IDLG(Matching):
    """Improved Deep Leakage from Gradients (B. Zhao, K. R. Mopuri and H. Bilen, arXiv:2001.02610): DLG, with the label
    inferred beforehand (Eq. 5)."""

    optimise_label: bool = False

    @property
    def name(self) -> str:
        return "iDLG"


@dataclass(frozen=True)
class InvertingGradients(Matching):
    """Inverting Gradients (J. Geiping, H. Bauermeister, H. Droege and M. Moeller, NeurIPS 2020, arXiv:2003.14053):
    cosine distance, total variation, and the signs of the gradient in Adam (Eq. 4).

    The label is inferred beforehand. Every guess is kept in the value range, where it is known. From the authors'
    program: rate 0.1, which is 0.025 here, falling to a tenth at 3/8, 5/8 and 7/8 of 4,800 iterations; normal start.
    """

    distance: Distance = cosine
    minimiser: Minimiser = SIGNED_ADAM
    variation: float = 1e-2
    boxed: bool = True
    optimise_label: bool = False
    start: Start = NORMAL
    iterations: int = 4800
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class SeeThroughGradients(Matching):
    """See through Gradients (H. Yin, A. Mallya, A. Vahdat, J. M. Alvarez, J. Kautz and P. Molchanov, CVPR 2021,
    arXiv:2104.07586): squared distance, total variation, statistics of batch norms, agreement of several starts.

    From breaching's settings of it: rate 0.1 with a cosine decay and 50 iterations of warm-up, 20,000 iterations,
    Langevin noise 0.01 (the paper has 0.2), and weights of the gradient 1e-4, of the variation 1e-4 and of the
    statistics 0.1. Only their ratios to the gradient's count. That is relative here, so that the variation's weight is
    as in Inverting Gradients; the paper's group term has 0.01, and its pictures are registered first, ours are not.
    """

    statistics: float = 0.1
    minimiser: Minimiser = LANGEVIN_ADAM
    variation: float = 1e-2
    boxed: bool = True
    optimise_label: bool = False
    start: Start = NORMAL
    restarts: int = 2
    consensus: float = 0.01
    iterations: int = 20_000
    dtype: torch.dtype = torch.float32


@dataclass(frozen=True)
class Modern(Matching):
    """breaching's *modern* attack (github.com/JonasGeiping/breaching, config/attack/modern.yaml): cosine distance,
    signed Adam of rate 0.1 with 50 iterations of warm-up and a cosine decay, 24,000 iterations, total variation 0.1
    with double opponents, features 0.1, a start of repeated tiles of 4 x 4.

    Its sign is a soft one, its variation the length of each place's slope; here they are the sign and the sum. Its
    features are estimates, here they are exact.
    """

    distance: Distance = cosine
    features: float = 0.1
    minimiser: Minimiser = MODERN_ADAM
    variation: float = 0.4
    opponents: float = 1.0
    boxed: bool = True
    optimise_label: bool = False
    start: Start = TILED
    iterations: int = 24_000
    dtype: torch.dtype = torch.float32

    @property
    def name(self) -> str:
        return "breaching's modern"


@dataclass(frozen=True)
class FeatureMatching(Matching):
    """What is known exactly, matched with the gradient.

    Cosine distance, features and labels that the gradient tells in closed form, statistics of batch norms, simulated
    local steps, and Gauss-Newton in float64 at the end. It begins at grey, and its variation weighs ten
    times that of Inverting Gradients: of nine settings that came out best on two pictures of PyTorch's tutorial
    network, by a third of a decibel.
    """

    distance: Distance = cosine
    features: float = 1.0
    statistics: float = 0.1
    minimiser: Minimiser = MODERN_ADAM
    variation: float = 0.1
    opponents: float = 3.0
    boxed: bool = True
    optimise_label: bool = False
    start: Start = GREY
    iterations: int = 1500
    finish: int = 6
    local_steps: bool = True
    dtype: torch.dtype = torch.float32
