"""CNN6, the network of R-GAP, on photographs: the closed form reads them out exactly, and noise closes the leak.

    python examples/photographs.py [OUT]

writes OUT/audit.json and OUT/audit.html (default rgap-out/photographs).
"""

from __future__ import annotations

import sys
from pathlib import Path

import rgap
from rgap import data, defences, losses, models


def main(out: Path, count: int = 4, size: int = 32) -> rgap.Audit:
    target = rgap.Target(models.cnn6(size=size), losses.Logistic(), (3, size, size), value_range=(0.0, 1.0))
    found = rgap.audit(
        target,
        data.photographs(count, size=size),
        defences=[defences.GaussianNoise(1e-3)],
        about={"model": "CNN6", "data": "built-in photographs"},
    )
    out.mkdir(parents=True, exist_ok=True)
    found.save(out / "audit.json")
    found.render(out / "audit.html")
    return found


if __name__ == "__main__":
    print(main(Path(sys.argv[1] if len(sys.argv) > 1 else "rgap-out/photographs")).verdict.headline)
