"""The paper's own procedure, written plainly: every layer is one dense matrix, solved by its singular values.

    python benchmarks/dense.py [--network cnn6] [--size 12] [--limit GIGABYTES]

From the last layer to the first, all weight rows W x = z (Eq. 16) and all gradient rows K x = grad W (Eq. 15) are
stacked in float64 and given to LAPACK's gelsd. Nothing is scaled, split into channels or kept for the next picture.
This is the slow and obvious baseline: it takes an nn.Sequential of Conv2d, LeakyReLU, Flatten and Linear without
biases, and the logistic loss log(1 + exp(-mu)), mu = label * output. It is told the label, and which of the two roots
mu is the right one: the attacks of this package have to find out both.
"""

from __future__ import annotations

import argparse
import math
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table
from scipy.optimize import brentq
from torch import Tensor, nn

from rgap import Target, capture, data, losses, models, score

Shape = tuple[int, ...]

ELEMENT = 8
"""Bytes of a float64."""
COPIES = 2
"""LAPACK overwrites its matrix, so that torch gives it a copy."""
TURN = 1.2784645427610738
"""Where mu dl/dmu is least: one root of Eq. 12 lies on either side."""


class TooLarge(ValueError):
    """A dense matrix that does not fit into the memory it may take."""


@dataclass(frozen=True)
class Solved:
    """One layer's part of the work."""

    name: str
    rows: int
    unknowns: int
    building: float
    """Seconds for writing the matrix."""
    solving: float
    """Seconds for its least-squares solution."""
    rank: int


@dataclass(frozen=True)
class Recovered:
    """The picture, (1, *input_shape), and what each layer took, from the input to the output."""

    inputs: Tensor
    layers: tuple[Solved, ...]

    @property
    def seconds(self) -> float:
        return sum(layer.building + layer.solving for layer in self.layers)


@dataclass(frozen=True)
class Step:
    """A Conv2d or Linear layer, the shapes around it, and the slope of the LeakyReLU in front of it."""

    name: str
    module: nn.Conv2d | nn.Linear
    before: Shape
    after: Shape
    slope: float

    @property
    def unknowns(self) -> int:
        return math.prod(self.before)

    @property
    def weight_rows(self) -> int:
        return math.prod(self.after)

    @property
    def rows(self) -> int:
        return self.weight_rows + self.module.weight.numel()

    @property
    def bytes(self) -> int:
        return self.rows * self.unknowns * ELEMENT * COPIES


def memory_limit() -> int:
    """What a matrix and its copy may take unless told otherwise: 0.7 of the machine's memory, in bytes."""
    return int(0.7 * os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))


def steps(model: nn.Sequential, input_shape: Shape) -> list[Step]:
    """The model's layers in order.

    Raises:
        ValueError: something else than Conv2d, LeakyReLU, Flatten and Linear without biases.
    """
    found: list[Step] = []
    shape, slope = input_shape, 1.0
    for name, module in model.named_children():
        match module:
            case nn.Conv2d() if module.bias is None and module.groups == 1 and module.padding_mode == "zeros":
                spans = zip(shape[1:], module.kernel_size, module.stride, module.padding, module.dilation, strict=True)
                sizes = (
                    (n + 2 * int(padding) - dilation * (kernel - 1) - 1) // stride + 1
                    for n, kernel, stride, padding, dilation in spans
                )
                after: Shape = (module.out_channels, *sizes)
                found.append(Step(name, module, shape, after, slope))
                shape, slope = after, 1.0
            case nn.Linear() if module.bias is None and len(shape) == 1:
                found.append(Step(name, module, shape, (module.out_features,), slope))
                shape, slope = (module.out_features,), 1.0
            case nn.LeakyReLU():
                slope *= module.negative_slope
            case nn.Flatten():
                shape = (math.prod(shape),)
            case _:
                raise ValueError(f"{name} is {module}: expected Conv2d, LeakyReLU, Flatten or Linear without biases")
    return found


def bytes_needed(model: nn.Sequential, input_shape: Shape) -> int:
    """What the largest layer's dense matrix takes, LAPACK's copy of it included."""
    return max(step.bytes for step in steps(model, input_shape))


def matrix(step: Step, k: Tensor) -> Tensor:
    """The weight rows W of a layer, and below them its gradient rows K: one row for each value of z and of grad W."""
    weight = step.module.weight.detach().double()
    whole = torch.zeros(step.rows, step.unknowns, dtype=torch.float64)
    top, bottom = whole[: step.weight_rows], whole[step.weight_rows :]
    if isinstance(step.module, nn.Linear):
        top.copy_(weight)
        # grad W[o, i] = k[o] x[i]
        bottom.unflatten(0, weight.shape).diagonal(dim1=1, dim2=2).copy_(k.reshape(-1, 1))
        return whole
    outputs, channels = weight.shape[:2]
    pixels = step.unknowns // channels
    weight, k = weight.flatten(2), k.reshape(outputs, -1)
    # z[o, p] = sum of weight[o, c, t] x[c, place]: rows (o, p), columns (c, place).
    forward = top.view(outputs, -1, channels, pixels)
    # grad W[o, c, t] = sum of k[o, p] x[c, place]: rows (o, c, t), columns (c, place), and no other channel's.
    backward = bottom.view(outputs, channels, -1, channels, pixels).diagonal(dim1=1, dim2=3)
    for tap, position, place in taps(step.module, step.before):
        forward[:, position, :, place] = weight[:, :, tap].expand(len(place), -1, -1)
        backward[:, tap, place] = k[:, position, None].expand(-1, -1, channels)
    return whole


def taps(module: nn.Conv2d, before: Shape) -> Iterator[tuple[int, Tensor, Tensor]]:
    """For each offset of the kernel: its number, the output positions, and the pixel that each of them reads."""
    numbered = torch.arange(1.0, before[1] * before[2] + 1, dtype=torch.float64).view(1, 1, *before[1:])
    padding = tuple(int(size) for size in module.padding)
    read = nn.functional.unfold(numbered, module.kernel_size, module.dilation, padding, module.stride)[0].long() - 1
    for tap, row in enumerate(read):
        position = (row >= 0).nonzero().flatten()  # padding is numbered 0 by unfold
        yield tap, position, row[position]


def root(product: float, told: float) -> float:
    """The root mu of mu dl/dmu = product (Eq. 12) on the side of TURN where the right one, `told`, lies."""

    def over(mu: float) -> float:
        return -mu * _sigmoid(-mu) - product

    low, high = (-1000.0, TURN) if told < TURN else (TURN, 1000.0)
    # Rounding can lift the product over the least value there is: then both roots are one, at the turn.
    return float(brentq(over, low, high, xtol=1e-15)) if over(low) * over(high) < 0 else TURN


def _sigmoid(value: float) -> float:
    return float(torch.tensor(value, dtype=torch.float64).sigmoid())


def recover(
    model: nn.Sequential,
    gradients: Mapping[str, Tensor],
    input_shape: Shape,
    label: float,
    mu: float,
    limit: int | None = None,
) -> Recovered:
    """The picture behind one gradient.

    Args:
        gradients: by the parameters' names, such as conv1.weight.
        label: -1 or 1, the right one.
        mu: roughly the right margin; it chooses between the roots.
        limit: bytes that the largest matrix and its copy may take; None for `memory_limit()`.

    Raises:
        TooLarge: they would take more.
        ValueError: the model has something else in it than this procedure knows.
    """
    layers = steps(model, input_shape)
    limit = memory_limit() if limit is None else limit
    largest = max(layers, key=lambda step: step.bytes)
    if largest.bytes > limit:
        raise TooLarge(
            f"{largest.name}: {largest.rows} rows and {largest.unknowns} unknowns take {largest.bytes / 1e9:.1f} GB, "
            f"LAPACK's copy included; the limit is {limit / 1e9:.1f} GB"
        )
    last = layers[-1]
    last_weight = last.module.weight.detach().double()
    mu = root(float((gradients[f"{last.name}.weight"].double() * last_weight).sum()), mu)
    z = torch.tensor([label * mu], dtype=torch.float64)
    k = torch.tensor([-label * _sigmoid(-mu)], dtype=torch.float64)
    reports = []
    x = z
    for step in reversed(layers):
        start = time.perf_counter()
        rows = matrix(step, k)
        right = torch.cat([z, gradients[f"{step.name}.weight"].double().flatten()])
        built = time.perf_counter()
        rcond = torch.finfo(torch.float64).eps * max(rows.shape)
        solution = torch.linalg.lstsq(rows, right[:, None], rcond=rcond, driver="gelsd")
        x = solution.solution[:, 0]
        solved = time.perf_counter()
        reports.append(Solved(step.name, *rows.shape, built - start, solved - built, int(solution.rank)))
        # Eq. 6: through the layer, then through the activation in front of it.
        k = rows[: step.weight_rows].T @ k
        k = torch.where(x < 0, step.slope * k, k)
        z = torch.where(x < 0, x / step.slope, x)
        del rows, solution  # before the next matrix is made
    return Recovered(x.reshape(1, *input_shape), tuple(reversed(reports)))


def margin(model: nn.Sequential, picture: Tensor, label: float) -> float:
    """The right mu of one picture, in a batch of its own, which `recover` is told."""
    with torch.no_grad():
        return label * float(model(picture))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--network", choices=("cnn6", "strided"), default="cnn6")
    parser.add_argument("--size", type=int, default=12)
    parser.add_argument("--limit", type=float, default=memory_limit() / 1e9, help="gigabytes")
    options = parser.parse_args()
    shape = (3, options.size, options.size)
    model = getattr(models, options.network)(3, options.size)
    target = Target(model, losses.Logistic(), shape, (0.0, 1.0))
    truth, label = data.photographs(1, options.size).inputs, 1.0
    update = capture(target, truth, torch.tensor([label]))
    try:
        mu = margin(model, truth, label)
        found = recover(model, update.gradients, shape, label, mu, int(options.limit * 1e9))
    except TooLarge as refusal:
        parser.exit(1, f"{refusal}\n")
    table = Table("layer", "rows", "unknowns", "rank", "building", "solving")
    for layer in found.layers:
        numbers = (layer.rows, layer.unknowns, layer.rank)
        table.add_row(layer.name, *map(str, numbers), f"{layer.building:.2f} s", f"{layer.solving:.2f} s")
    Console().print(table)
    print(f"MSE {score(found.inputs, truth).mse[0]:.1e} in {found.seconds:.1f} s")


if __name__ == "__main__":
    main()
