"""A server that trains as any other does, and keeps what each client sent in each round."""

from __future__ import annotations

from flwr.app import ArrayRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import rgap
from rgap import losses, models
from rgap.integrations.flower import Capture
from rgap.protocol import Protocol, Sends

app = ServerApp()


def make_target(size: int) -> rgap.Target:
    return rgap.Target(models.cnn6(size=size), losses.Logistic(), (3, size, size), value_range=(0.0, 1.0))


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    target = make_target(int(config["size"]))
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=float(config["learning-rate"]))
    strategy = Capture(FedAvg(fraction_evaluate=0.0), target, str(config["captured"]), protocol)
    strategy.start(grid, ArrayRecord(target.model.state_dict()), num_rounds=int(config["rounds"]))
