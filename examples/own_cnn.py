"""A small convolutional network of your own with cross-entropy: what do the attacks make of its gradients?

    python examples/own_cnn.py [OUT]

The recursion stops at the last pooling, which makes one value of four; what is known there is solved jointly for the
picture. The report names what stands in each attack's way, and shows what those that apply make of the faces.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import rgap
from rgap import attacks, data, losses

CLASSES = 5


class OwnNet(nn.Module):
    """Two convolutions with pooling, and a Linear layer."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv2d(1, 16, 5, padding=2)
        self.second = nn.Conv2d(16, 32, 5, padding=2)
        self.last = nn.Linear(32 * 4 * 4, CLASSES)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        x = nn.functional.avg_pool2d(torch.tanh(self.first(x)), 2)
        x = nn.functional.avg_pool2d(torch.tanh(self.second(x)), 2)
        scores: torch.Tensor = self.last(x.flatten(1))
        return scores


def main(out: Path, count: int = 3, iterations: int = 300) -> rgap.Audit:
    torch.manual_seed(0)
    target = rgap.Target(OwnNet().eval(), losses.CrossEntropy(CLASSES), (1, 16, 16), value_range=(0.0, 1.0))
    tried = (attacks.Closed(), attacks.Bias(), attacks.IDLG(iterations=iterations))
    about = {"model": "OwnNet", "data": "faces"}
    found = rgap.audit(target, data.faces(count, size=16), attacks=tried, about=about)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "audit.json")
    found.render(out / "audit.html")
    return found


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "rgap-out/own-cnn")).verdict.headline)
