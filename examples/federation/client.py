"""A client: one step of SGD on a picture of its own. Nothing but its weights leaves it, and they hold the picture."""

from __future__ import annotations

from typing import Any

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor

from rgap import data, losses, models
from rgap.defences import GaussianNoise
from rgap.integrations.flower import defend


def own_data(part: int, size: int) -> tuple[Tensor, Tensor]:
    """The data of one client: a photograph, (1, 3, size, size), and its label, -1 or 1."""
    return data.photographs(part + 1, size)[part].inputs, torch.tensor([1.0 if part % 2 else -1.0])


def train(message: Message, context: Context) -> Message:
    size, rate = int(context.run_config["size"]), float(context.run_config["learning-rate"])
    x, y = own_data(int(context.node_config["partition-id"]), size)
    model = models.cnn6(size=size)
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    optimizer = torch.optim.SGD(model.parameters(), rate)
    loss = losses.Logistic()(model(x), y)
    loss.backward()
    optimizer.step()
    metrics = MetricRecord({"num-examples": len(x), "loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(model.state_dict()), "metrics": metrics}), reply_to=message)


def make_app(*mods: Any) -> ClientApp:
    app = ClientApp(mods=list(mods))
    app.train()(train)
    return app


app = make_app()
defended = make_app(defend(GaussianNoise(1.0)))
