"""A federation of three clients in one process, one of them defended, and what its server saw of each.

    python examples/federation/run.py [OUT]

writes OUT/captured, what the server was sent, and for each round OUT/round-1.html and OUT/round-1.json
(default rgap-out/federation).
"""

from __future__ import annotations

import logging
import os
import shutil
import sys
import tomllib
from pathlib import Path
from typing import Any

os.environ.setdefault("FLWR_TELEMETRY_ENABLED", "0")

import client
import server

import rgap
from rgap import attacks, federation
from rgap.integrations.flower import LocalGrid

SETTINGS = Path(__file__).parent / "pyproject.toml"
CLIENTS = 3


def main(out: Path, iterations: int = 300, **settings: Any) -> list[rgap.Audit]:
    config = {**tomllib.loads(SETTINGS.read_text())["tool"]["flwr"]["app"]["config"], **settings}
    config["captured"] = str(out / "captured")
    shutil.rmtree(out / "captured", ignore_errors=True)  # of the run before
    apps = {1 + part: client.defended if part == CLIENTS - 1 else client.app for part in range(CLIENTS)}
    LocalGrid(apps, config).serve(server.app)

    # From here on nothing is known but the files and the model; the pictures are for the comparison alone.
    audits = []
    print("client     round  status         level          PSNR dB")
    truth = {f"client {node}": client.own_data(node - 1, config["size"]) for node in apps}
    for found in federation.read(out / "captured"):
        for target, updates in found.by_target(server.make_target(config["size"])):
            named = {f"client {node}": update for node, update in sorted(updates.items())}
            audit = rgap.audit_updates(
                target,
                named,
                truth={name: (x, y.tolist()) for name, (x, y) in truth.items() if name in named},
                attacks=[attacks.Closed(), attacks.InvertingGradients(iterations=iterations)],
                about={"model": "CNN6", "data": f"round {found.number} of a federation", "command": "run.py"},
            )
            audit.save(out / f"round-{found.number}.json")
            audit.render(out / f"round-{found.number}.html")
            audits.append(audit)
            for case in audit.cases:
                if case.best is not None:
                    best = case.best
                    status, level = best.status.value, best.level.value
                    print(f"{case.name:<10} {found.number:<6} {status:<14} {level:<14} {best.psnr:.0f}")
    print(f"client {CLIENTS} adds noise to what it sends. The reports: {out}/round-1.html and so on")
    return audits


if __name__ == "__main__":
    logging.getLogger("flwr").setLevel(logging.ERROR)
    main(Path(sys.argv[1] if len(sys.argv) > 1 else "rgap-out/federation"))
