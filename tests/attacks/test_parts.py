"""Layers that read a part of their input: strides that pass over pixels, crops, padding that is all that is read."""

from __future__ import annotations

import math
from dataclasses import dataclass
from functools import cached_property

import torch
from hypothesis import HealthCheck, example, given, settings
from hypothesis import strategies as st
from networks import ACTIVATIONS
from torch import Tensor, nn
from torch.nn import functional

from rgap import Target, capture, rank_analysis
from rgap.attacks import Bias, Closed, Recursive, Status
from rgap.attacks.base import Attack
from rgap.nn.losses import CrossEntropy, Logistic, Loss, MeanSquaredError


class Pad(nn.Module):
    """Zeros around a picture, or pixels cut away where the numbers are negative."""

    def __init__(self, *sides: int):
        super().__init__()
        self.sides = sides

    def forward(self, x: Tensor) -> Tensor:
        return functional.pad(x, self.sides)


class Add(nn.Module):
    def __init__(self, one: nn.Module, other: nn.Module):
        super().__init__()
        self.one, self.other = one, other

    def forward(self, x: Tensor) -> Tensor:
        return self.one(x) + self.other(x)


@dataclass(frozen=True)
class Reader:
    """A network of layers that need not read all of their input. Its repr makes it again.

    Attributes:
        steps: ("conv", outputs, kernel, stride, padding, dilation, groups), ("block", the same), whose shortcut is a
            1 x 1 convolution of the same stride, ("pad", left, right, top, bottom), or ("upsample",).
    """

    shape: tuple[int, int, int]
    steps: tuple[tuple[str | int, ...], ...]
    activation: str
    bias: bool
    loss: Loss
    seed: int

    @cached_property
    def made(self) -> tuple[nn.Sequential, Tensor]:
        with torch.random.fork_rng():
            torch.manual_seed(self.seed)
            layers: list[nn.Module] = []
            x = torch.rand(1, *self.shape)
            y = x
            for kind, *numbers in self.steps:
                layers += self.step(kind, numbers, y.shape[1])
                y = nn.Sequential(*layers)(x)
            layers += [nn.Flatten(), nn.Linear(y.numel(), self.loss.outputs, self.bias)]
            return nn.Sequential(*layers).double().eval(), x.double()

    def step(self, kind: str | int, numbers: list[int], channels: int) -> list[nn.Module]:
        if kind == "pad":
            return [Pad(*numbers)]
        if kind == "upsample":
            return [nn.Upsample(scale_factor=2)]
        outputs, kernel, stride, padding, dilation, groups = numbers
        conv = nn.Conv2d(channels, outputs, kernel, stride, padding, dilation, groups, self.bias)
        if kind == "block":
            return [Add(conv, nn.Conv2d(channels, outputs, 1, stride, bias=self.bias)), ACTIVATIONS[self.activation]()]
        return [conv, ACTIVATIONS[self.activation]()]

    @cached_property
    def target(self) -> Target:
        return Target(self.made[0], self.loss, self.shape, (0.0, 1.0))


def after(step: tuple[str | int, ...], size: tuple[int, int, int]) -> tuple[int, int, int]:
    """The shape behind a step; with a number below 1 where it does not fit."""
    kind, numbers = step[0], [int(n) for n in step[1:]]
    channels, height, width = size
    if kind == "pad":
        return channels, height + numbers[2] + numbers[3], width + numbers[0] + numbers[1]
    if kind == "upsample":
        return channels, 2 * height, 2 * width
    outputs, kernel, stride, padding, dilation, _ = numbers
    sizes = [(n + 2 * padding - dilation * (kernel - 1) - 1) // stride + 1 for n in (height, width)]
    return outputs, sizes[0], sizes[1]


@st.composite
def readers(draw: st.DrawFn) -> Reader:
    shape = (draw(st.integers(1, 2)), draw(st.integers(2, 5)), draw(st.integers(2, 5)))
    size, steps = shape, []
    for _ in range(draw(st.integers(1, 3))):
        kind = draw(st.sampled_from(["conv", "conv", "conv", "block", "pad", "upsample"]))
        step: tuple[str | int, ...] = (kind,)
        if kind == "pad":
            step += tuple(draw(st.integers(-2, 1)) for _ in range(4))
        elif kind != "upsample":
            kernel = draw(st.sampled_from([1, 3])) if kind == "block" else draw(st.integers(1, 3))
            padding = kernel // 2 if kind == "block" else draw(st.integers(0, 3))
            dilation = 1 if kind == "block" else draw(st.integers(1, 2))
            groups = draw(st.sampled_from([1, 1, size[0]]))
            step += (groups * draw(st.integers(1, 4)), kernel, draw(st.integers(1, 3)), padding, dilation, groups)
        new = after(step, size)
        if min(new) > 0 and math.prod(new) <= 60:
            steps.append(step)
            size = new
    return Reader(
        shape, tuple(steps), draw(st.sampled_from(sorted(ACTIVATIONS))), draw(st.booleans()),
        draw(st.sampled_from([Logistic(), CrossEntropy(3), MeanSquaredError()])), draw(st.integers(0, 2**31)),
    )  # fmt: skip


def read(reader: Reader) -> Tensor:
    """Which values of the input the output hangs on, tried one by one."""
    model, x = reader.made
    single = torch.eye(x.numel(), dtype=torch.float64).reshape(-1, *reader.shape)
    with torch.no_grad():
        moved = [(model(x + scale * single) - model(x)).abs().amax(1) for scale in (1.0, -1.0, 10.0, -10.0)]
    return (torch.stack(moved).amax(0) > 0).reshape(reader.shape)


# The first was found at random: the second convolution reads one pixel of four.
@settings(max_examples=4, suppress_health_check=[HealthCheck.too_slow])
@given(readers())
@example(Reader((1, 4, 4), (("conv", 2, 1, 2, 0, 1, 1), ("conv", 2, 1, 2, 0, 1, 1)), "elu", True, Logistic(), 0))
# Only the padding is read.
@example(Reader((1, 4, 4), (("conv", 3, 4, 1, 0, 1, 1), ("conv", 2, 1, 3, 1, 1, 1)), "elu", True, Logistic(), 0))
@example(Reader((1, 2, 2), (("pad", -1, 0, -1, 0), ("conv", 3, 1, 1, 0, 1, 1)), "tanh", True, CrossEntropy(3), 0))
@example(Reader((1, 4, 4), (("pad", -1, -1, -1, -1), ("block", 6, 3, 2, 1, 1, 1)), "elu", True, CrossEntropy(3), 0))
# With one output two labels tell what the last layer reads, by its bias.
@example(Reader((1, 2, 2), (("conv", 1, 1, 1, 0, 1, 1), ("upsample",)), "relu", True, MeanSquaredError(), 0))
def test_what_is_not_read_is_never_called_exact(reader: Reader) -> None:
    target, x = reader.target, reader.made[1]
    y = torch.tensor([1.0])
    update = capture(target, x, y)
    whole = bool(read(reader).all())
    attacks: list[Attack] = [Bias(), Recursive(), Closed()]
    for attack in attacks:
        found = attack(target, update)
        if found.status is Status.EXACT:
            assert whole, attack
            assert float((found.inputs - x).abs().max()) <= 1e-5, attack
        for answer in found.answers:
            assert answer.inputs.shape == x.shape
    assert len(rank_analysis(target).layers) == len(target.graph.uses)
