"""Dask's side of a worker; imported only where Dask is installed."""

from __future__ import annotations

from distributed import Worker, WorkerPlugin

from rgap.sweeps.work import Supplies, supply, withdraw


class Equip(WorkerPlugin):
    """Gives every worker what the jobs need, also those that join later."""

    def __init__(self, run: str, supplies: Supplies):
        self.run, self.supplies = run, supplies

    def setup(self, worker: Worker) -> None:
        supply(self.run, self.supplies)

    def teardown(self, worker: Worker) -> None:
        withdraw(self.run)
