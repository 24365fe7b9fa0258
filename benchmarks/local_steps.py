"""Clients that take several local steps: how many samples are certified, how near they are, whether the order is right.

    python benchmarks/local_steps.py --data FOLDER [--only TEXT] [--clients 1] [--out FILE]

FOLDER holds `cifar10`, with one subfolder of pictures for each class. Every client starts from float32 weights drawn as
torch draws them and sends the float32 difference of its weights after the last step; what is told is the protocol and,
but for the rows that say so, the number of samples. A sample is right where its picture has a mean squared error below
1e-4 with the right label; one that is certified and is not right is wrong. A step is right where it is on the client's
own samples. Then come one picture and CNN6, whose convolutions leave no order to find, and one epoch of several
through convolutions with two Linear layers behind.
Seconds of the process on one thread, the largest of a row's clients; `wall` is what passed meanwhile.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from batches import headed, small
from rows import Tally, measure, parser, perceptron
from torch import Tensor, nn

from rgap import Protocol, Target, Update, attacks, capture, data, losses, models
from rgap.protocol import Sends

WIDTHS = (3072, 512, 256, 10)


@dataclass(frozen=True)
class Row:
    activation: str
    samples: int
    minibatch: int
    rate: float
    epochs: int = 1
    more: dict[str, Any] = field(default_factory=dict)
    known: bool = True
    """Whether the number of samples is told."""

    def __str__(self) -> str:
        about = f"{self.activation} N={self.samples} in {self.minibatch}s rate {self.rate:g} epochs {self.epochs}"
        about += "".join(f" {name} {value:g}" for name, value in self.more.items())
        return about + ("" if self.known else " N unknown")

    @property
    def protocol(self) -> Protocol:
        return Protocol(
            Sends.DIFFERENCE, learning_rate=self.rate, epochs=self.epochs, minibatch=self.minibatch, **self.more
        )


ROWS = [
    *(
        Row(activation, samples, minibatch, rate, epochs)
        for samples, minibatch in ((16, 4), (32, 8))
        for activation in ("ReLU", "LeakyReLU", "tanh")
        for rate in (0.1, 0.01)
        for epochs in (1, 2, 3, 5)
    ),
    Row("ReLU", 16, 4, 0.1, 2, {"momentum": 0.9}),
    Row("ReLU", 16, 4, 0.1, 2, {"weight_decay": 5e-4}),
    Row("ReLU", 16, 4, 0.1, 2, {"proximal": 0.1}),
    Row("ReLU", 16, 4, 0.05, 2, {"momentum": 0.9, "weight_decay": 5e-4, "proximal": 0.1}),
    Row("ReLU", 18, 4, 0.1, 2),
    Row("ReLU", 16, 4, 0.1, 2, known=False),
    Row("LeakyReLU", 30, 8, 0.1, 2, {"momentum": 0.9, "weight_decay": 5e-4}, known=False),
]


@dataclass(frozen=True)
class Convolved:
    """One picture, CNN6, each step on all that the client has."""

    steps: int
    rate: float

    def __str__(self) -> str:
        return f"CNN6 one sample, {self.steps} steps, rate {self.rate:g}"


@dataclass(frozen=True)
class Behind:
    """One epoch of samples with distinct labels, through convolutions with two Linear layers behind."""

    name: str
    network: Callable[[], nn.Module]
    size: int
    samples: int
    minibatch: int
    rate: float

    def __str__(self) -> str:
        return f"{self.name} N={self.samples} in {self.minibatch}s rate {self.rate:g}"

    @property
    def protocol(self) -> Protocol:
        return Protocol(Sends.DIFFERENCE, learning_rate=self.rate, epochs=1, minibatch=self.minibatch)


CNN6_HEADED = headed(models.cnn6, 3200)
BEHIND = [
    *(Behind("three convolutions, 16 x 16,", small, 16, n, 2, rate) for n in (4, 8) for rate in (0.1, 0.01)),
    *(Behind("CNN6 with two Linear layers,", CNN6_HEADED, 32, 8, 2, rate) for rate in (0.1, 0.01)),
]
CONVOLVED = [Convolved(steps, rate) for rate in (0.1, 0.01, 0.001) for steps in (2, 5, 10)]


def client(row: Row, pictures: data.Images, seed: int) -> tuple[Target, Update, Tensor, Tensor, list[set[int]]]:
    """A client of its own draw, with torch's optimiser, and which samples each of its steps was on."""
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(pictures), generator=generator)[: row.samples]
    x = pictures.inputs[chosen].float()
    labels = torch.randint(10, (row.samples,), generator=generator)
    model, protocol = perceptron(WIDTHS, row.activation), row.protocol
    target = Target(model, losses.CrossEntropy(10), tuple(x.shape[1:]), (0.0, 1.0), batch_size=row.samples)
    header = capture(target, x, labels.float(), protocol).header
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimiser = torch.optim.SGD(
        model.parameters(), lr=row.rate, momentum=protocol.momentum, weight_decay=protocol.weight_decay
    )
    steps = []
    for _ in range(row.epochs):
        for members in torch.randperm(row.samples, generator=generator).split(row.minibatch):
            optimiser.zero_grad()
            loss = nn.functional.cross_entropy(model(x[members]), labels[members])
            for name, p in model.named_parameters():
                loss = loss + protocol.proximal / 2 * (p - before[name]).square().sum()
            loss.backward()
            optimiser.step()
            steps.append(set(members.tolist()))
    sent = {name: p.detach() - before[name] for name, p in model.named_parameters()}
    header = header if row.known else replace(header, batch_size=row.minibatch)
    target = target if row.known else replace_batch(target, row.minibatch, before)
    return target, Update(sent, header), x, labels, steps


def replace_batch(target: Target, samples: int, before: dict[str, Tensor]) -> Target:
    """The same with another number of samples expected, at the weights before the first step."""
    with torch.no_grad():
        for name, p in target.model.named_parameters():
            p.copy_(before[name])
    return Target(target.model, target.loss, target.input_shape, target.value_range, batch_size=samples)


@dataclass
class Runs:
    """The attacks of one row, and what came of them."""

    tally: Tally = field(default_factory=Tally)
    seconds: list[float] = field(default_factory=list)
    wall: list[float] = field(default_factory=list)
    statuses: list[str] = field(default_factory=list)
    roundings: list[float] = field(default_factory=list)
    stated: list[float] = field(default_factory=list)

    def attack(self, target: Target, update: Update) -> attacks.Reconstruction:
        start, clock = time.process_time(), time.perf_counter()
        found = attacks.Closed()(target, update)
        self.seconds.append(time.process_time() - start)
        self.wall.append(time.perf_counter() - clock)
        self.statuses.append(f"{found.status.value}: {found.reason}")
        return found

    def figures(self, client: Row | Convolved | Behind, steps: str, samples: int) -> dict[str, Any]:
        return {
            "client": str(client),
            "steps": steps,
            **self.tally.figures(samples),
            "roundings": max(self.roundings, default=float("nan")),
            "stated error": max(self.stated, default=float("nan")),
            "seconds": max(self.seconds),
            "wall": max(self.wall),
            "status": self.statuses,
        }


def run(row: Row, pictures: data.Images, clients: int) -> dict[str, Any]:
    runs, steps_right = Runs(), 0
    for seed in range(clients):
        target, update, x, labels, steps = client(row, pictures, seed)
        found = runs.attack(target, update)
        if not found.answers or not found.samples:
            continue
        verdicts = [sample.status for sample in found.samples]
        nearest = runs.tally.add(found.inputs.flatten(1), found.labels, verdicts, x.double().flatten(1), labels)
        runs.stated += [sample.error for sample in found.samples]
        runs.roundings.append(found.answers[0].unexplained)
        steps_right += sum(
            {int(nearest[each]) for each in own} == of for own, of in zip(found.steps, steps, strict=False)
        )
    all_steps = clients * len(row.protocol.minibatches(row.samples))
    return runs.figures(row, f"{steps_right} of {all_steps}", clients * row.samples)


def run_convolved(row: Convolved, pictures: data.Images, clients: int) -> dict[str, Any]:
    runs = Runs()
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=row.rate, steps=row.steps)
    target = Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0))
    for seed in range(clients):
        x, label = pictures.inputs[seed : seed + 1].float(), torch.ones(1)
        found = runs.attack(target, capture(target, x, label, protocol))
        if found.answers:
            runs.tally.add(found.inputs.flatten(1), found.labels, [found.status], x.double().flatten(1), label)
            runs.stated.append(found.answers[0].error)
            runs.roundings.append(found.answers[0].unexplained)
    return runs.figures(row, f"{row.steps}", clients)


def run_behind(row: Behind, pictures: data.Images, clients: int) -> dict[str, Any]:
    """Where there are no inputs, `steps` are those whose labels are right."""
    runs, steps_right = Runs(), 0
    model = row.network()
    target = Target(model, losses.CrossEntropy(10), (3, row.size, row.size), (0.0, 1.0), batch_size=row.samples)
    for seed in range(clients):
        generator = torch.Generator().manual_seed(seed)
        chosen = torch.randperm(len(pictures), generator=generator)[: row.samples]
        x = nn.functional.adaptive_avg_pool2d(pictures.inputs[chosen].float(), row.size)
        labels = torch.randperm(10, generator=generator)[: row.samples].float()
        order = Protocol(Sends.DIFFERENCE, learning_rate=row.rate, epochs=1, minibatch=row.minibatch, shuffled=False)
        sent = capture(target, x, labels, order)
        found = runs.attack(target, replace(sent, header=replace(sent.header, protocol=row.protocol)))
        told = found.labels if found.answers else None if found.features is None else found.features.labels
        if told is not None:
            own = [set(each.tolist()) for each in labels.split(row.minibatch)]
            steps_right += sum(
                {float(told[i]) for i in members} == of for members, of in zip(found.steps, own, strict=False)
            )
        if found.answers and found.samples:
            verdicts = [sample.status for sample in found.samples]
            runs.tally.add(found.inputs.flatten(1), found.labels, verdicts, x.double().flatten(1), labels)
            runs.stated += [sample.error for sample in found.samples]
            runs.roundings.append(found.answers[0].unexplained)
    return runs.figures(row, f"{steps_right} of {clients * row.samples // row.minibatch}", clients * row.samples)


def main() -> None:
    asked = parser(__doc__)
    asked.add_argument("--clients", type=int, default=1)
    arguments = asked.parse_args()
    torch.set_num_threads(1)
    pictures = data.folder(arguments.data / "cifar10", channels=3)
    columns = ("certified", "found", "steps", "wrong", "median MSE", "worst MSE", "roundings", "seconds")
    rows = [(str(row), partial(run, row, pictures, arguments.clients)) for row in ROWS]
    rows += [(str(row), partial(run_convolved, row, pictures, arguments.clients)) for row in CONVOLVED]
    rows += [(str(row), partial(run_behind, row, pictures, arguments.clients)) for row in BEHIND]
    measure(rows, arguments.only, "client", columns, arguments.out)


if __name__ == "__main__":
    main()
