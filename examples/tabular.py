"""A multi-layer perceptron on a table: a Linear layer with a bias gives its input away, whatever comes after it.

    python examples/tabular.py [OUT]

The rows are twelve values between 0 and 1, drawn at random: to see the leak no real data is needed.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import nn

import rgap
from rgap import attacks, losses


def main(out: Path, count: int = 6) -> rgap.Audit:
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(12, 32), nn.GELU(), nn.LayerNorm(32), nn.Linear(32, 3))
    rows = torch.rand(count, 12, generator=torch.Generator().manual_seed(1))
    target = rgap.Target(model.eval(), losses.CrossEntropy(3), (12,), value_range=(0.0, 1.0))
    about = {"model": "a perceptron of two layers", "data": "random rows of 12 values"}
    tried = (attacks.Bias(), attacks.Closed(), attacks.IDLG(iterations=200))
    found = rgap.audit(target, rows, attacks=tried, about=about)
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "audit.json")
    found.render(out / "audit.html")
    return found


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "rgap-out/tabular")).verdict.headline)
