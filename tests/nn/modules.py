"""Modules of every kind that a network is built of, for tests; a new operation adds one row."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional


class Call(nn.Module):
    """A function as a module."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Tensor:
        return self.function(x)


class Skip(nn.Module):
    """act(shortcut(x) + inner(x)), or the two side by side."""

    def __init__(
        self, inner: nn.Module, shortcut: nn.Module | None = None, act: nn.Module | None = None, cat: bool = False
    ):
        super().__init__()
        self.inner, self.shortcut = inner, shortcut or nn.Identity()
        self.act, self.cat = act or nn.Identity(), cat

    def forward(self, x: Tensor) -> Tensor:
        own, other = self.shortcut(x), self.inner(x)
        out: Tensor = self.act(torch.cat([own, other], 1) if self.cat else own + other)
        return out


class Shifted(nn.Module):
    """A trained constant for every value."""

    def __init__(self, *shape: int):
        super().__init__()
        self.shift = nn.Parameter(torch.randn(1, *shape))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.shift


class ByHand(nn.Module):
    """x @ W + b, without nn.Linear."""

    def __init__(self, features: int, outputs: int):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(features, outputs)), nn.Parameter(torch.randn(outputs))

    def forward(self, x: Tensor) -> Tensor:
        return torch.addmm(self.bias, x, self.weight)


class Written(nn.Module):
    """Writes into a tensor of its own, or into its input's copy, part by part."""

    def __init__(self, how: str):
        super().__init__()
        self.how = how

    def forward(self, x: Tensor) -> Tensor:
        out = torch.zeros_like(x) if self.how in ("halves", "frame") else x.clone()
        if self.how == "halves":
            out[:, ::2] = torch.tanh(x[:, ::2])
            out[:, 1::2] = torch.sigmoid(x[:, 1::2])
        elif self.how == "frame":
            out[:, :, 1:-1] = x[:, :, 1:-1]
        elif self.how == "one row":
            out[:, :, 2] = 0.5
        else:
            out[:, 1:] += 2 * x[:, 1:]
        return out


class Attention(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        tokens = x.flatten(2).mT
        return functional.scaled_dot_product_attention(tokens, tokens, tokens).mT.reshape(x.shape)


def norm(channels: int) -> nn.BatchNorm2d:
    """Batch norm in evaluation mode, with statistics and factors of its own."""
    made = nn.BatchNorm2d(channels).eval()
    with torch.no_grad():
        made.running_mean.normal_()
        made.running_var.uniform_(0.5, 2)
        made.weight.uniform_(0.5, 1.5)
        made.bias.normal_()
    return made


SHAPE = (4, 6, 6)
"""What every one of these takes; none of them depends on other samples."""
MODULES: dict[str, Callable[[], nn.Module]] = {
    "convolution": lambda: nn.Conv2d(4, 5, 3, 2, 1),
    "grouped": lambda: nn.Conv2d(4, 6, 3, groups=2, bias=False),
    "depthwise, dilated": lambda: nn.Conv2d(4, 4, 2, dilation=2, groups=4),
    "reflected": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="reflect"),
    "replicated": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="replicate"),
    "circular": lambda: nn.Conv2d(4, 3, 3, padding=1, padding_mode="circular"),
    "transposed": lambda: nn.ConvTranspose2d(4, 6, 3, 2, 1, output_padding=1, groups=2),
    "convolution in one dimension": lambda: nn.Sequential(nn.Flatten(2), nn.Conv1d(4, 5, 3, padding=1)),
    "convolution in three dimensions": lambda: nn.Sequential(nn.Unflatten(1, (2, 2)), nn.Conv3d(2, 3, 2)),
    "linear": lambda: nn.Sequential(nn.Flatten(), nn.Linear(144, 7)),
    "linear on positions": lambda: nn.Linear(6, 3),
    "by hand": lambda: nn.Sequential(nn.Flatten(), ByHand(144, 3)),
    "batch norm": lambda: norm(4),
    "dropout": lambda: nn.Dropout(0.5).eval(),
    "leaky relu in place": lambda: nn.Sequential(nn.Conv2d(4, 4, 1), nn.LeakyReLU(0.1, inplace=True)),
    "gelu": lambda: nn.GELU(),
    "silu": lambda: nn.SiLU(),
    "mish": lambda: nn.Mish(),
    "hardswish": lambda: nn.Hardswish(),
    "relu6": lambda: nn.ReLU6(),
    "hardsigmoid": lambda: nn.Hardsigmoid(),
    "celu": lambda: nn.CELU(0.5),
    "log sigmoid": lambda: nn.LogSigmoid(),
    "average pool": lambda: nn.AvgPool2d(2),
    "maximum": lambda: nn.MaxPool2d(2),
    "mean": lambda: Call(lambda x: x.mean((2, 3))),
    "layer norm": lambda: nn.LayerNorm(6),
    "group norm": lambda: nn.GroupNorm(2, 4),
    "softmax": lambda: nn.Softmax(1),
    "attention": Attention,
    "permuted": lambda: Call(lambda x: x.permute(0, 2, 3, 1)),
    "sliced": lambda: Call(lambda x: x[:, 1:, ::2]),
    "split": lambda: Call(lambda x: x.chunk(2, 1)[1]),
    "rolled and flipped": lambda: Call(lambda x: x.roll(1, 2).flip(3)),
    "padded with ones": lambda: Call(lambda x: functional.pad(x, (1, 0, 2, 1), value=1.0)),
    "padded": lambda: Call(lambda x: functional.pad(x, (1, 0, 2, 1))),
    "shuffled": lambda: nn.PixelShuffle(2),
    "upsampled": lambda: nn.Upsample(scale_factor=2),
    "upsampled, convolution": lambda: nn.Sequential(nn.Upsample(scale_factor=2), nn.Conv2d(4, 2, 3)),
    "bilinear": lambda: nn.Upsample(scale_factor=2, mode="bilinear"),
    "scaled and shifted": lambda: Call(lambda x: (x - 0.3) / 0.7 * 2 + 1),
    "one minus": lambda: Call(lambda x: 1 - x),
    "shifted": lambda: Shifted(4, 6, 6),
    "twice": lambda: Call(lambda x: x + x),
    "gate": lambda: Call(lambda x: x * x.mean((2, 3), keepdim=True).sigmoid()),
    "skip": lambda: Skip(nn.Sequential(nn.Conv2d(4, 3, 3, padding=1), nn.Tanh(), nn.Conv2d(3, 4, 1)), act=nn.ELU()),
    "strided skip": lambda: Skip(nn.Conv2d(4, 6, 3, 2, 1), nn.Sequential(nn.Conv2d(4, 6, 1, 2), norm(6))),
    "side by side": lambda: Skip(nn.Sequential(nn.ReLU(), nn.Conv2d(4, 3, 3, padding=1)), cat=True),
    "written by halves": lambda: Written("halves"),
    "written within a frame": lambda: Written("frame"),
    "one row overwritten": lambda: Written("one row"),
    "added in place": lambda: Written("added"),
    "nested": lambda: Skip(Skip(nn.Conv2d(4, 4, 3, padding=1), act=nn.ELU()), nn.Conv2d(4, 4, 1)),
}  # fmt: skip


def made(*names: str) -> nn.Module:
    """Modules of these names that fit one after another, in float64, drawn from a fixed seed."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(*(MODULES[name]() for name in names)).double()
