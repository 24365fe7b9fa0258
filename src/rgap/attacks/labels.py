"""Which labels an update was computed with."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import combinations_with_replacement

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.losses import Loss
from rgap.target import Target
from rgap.update import Update


@dataclass(frozen=True)
class Candidates:
    labels: tuple[Float[Tensor, " b"], ...]
    assumption: str


def one_hot(loss: Loss, labels: Float[Tensor, " b"]) -> Float[Tensor, "b labels"]:
    """Distributions that are certain of these labels."""
    return (labels.cpu()[:, None] == torch.tensor(loss.labels, dtype=labels.dtype)).to(labels.dtype)


def candidates(target: Target, update: Update) -> Candidates:
    b = update.samples(target)
    c = combinations_with_replacement(target.loss.labels, b)
    return Candidates(tuple(torch.tensor(x, dtype=torch.float64) for x in c), "all labels are tried")
