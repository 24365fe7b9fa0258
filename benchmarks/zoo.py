"""Thirty families of architectures, written plainly and small: pictures of 32 x 32, series and tables."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

PICTURE, SERIES, ROW, WORDS = (3, 32, 32), (4, 24), (12,), (10, 16)


class Lambda(nn.Module):
    """A function as a module, with the modules that it uses."""

    def __init__(self, function: Callable[..., Any], **parts: nn.Module | nn.Parameter) -> None:
        super().__init__()
        self.function = function
        for name, part in parts.items():
            setattr(self, name, part)

    def forward(self, *x: Tensor) -> Any:
        return self.function(self, *x)


def residual(body: nn.Module, short: nn.Module | None = None, end: nn.Module | None = None) -> nn.Module:
    parts = {"body": body, "short": short or nn.Identity(), "end": end or nn.Identity()}
    return Lambda(lambda m, x: m.end(m.body(x) + m.short(x)), **parts)


def conv(i: int, o: int, k: int = 3, s: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, act or nn.ReLU())


def head(channels: int) -> nn.Sequential:
    return nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 10))


def alexnet() -> nn.Module:
    features = [nn.Conv2d(3, 16, 5, 2, 2), nn.ReLU(), nn.MaxPool2d(2), nn.Conv2d(16, 32, 3, padding=1), nn.ReLU()]
    classifier = [nn.Dropout(), nn.Linear(512, 64), nn.ReLU(), nn.Dropout(), nn.Linear(64, 10)]
    return nn.Sequential(*features, nn.MaxPool2d(2), nn.Flatten(), *classifier)


def vgg() -> nn.Module:
    layers: list[nn.Module] = []
    for i, o in ((3, 16), (16, 32), (32, 64)):
        layers += [nn.Conv2d(i, o, 3, padding=1), nn.ReLU(), nn.MaxPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(1024, 64), nn.ReLU(), nn.Linear(64, 10))


def _resnet(groups: int = 1) -> nn.Module:
    blocks: list[nn.Module] = []
    for i, o, s in ((16, 16, 1), (16, 32, 2)):
        body = nn.Sequential(conv(i, o, s=s, groups=groups), nn.Conv2d(o, o, 3, padding=1), nn.BatchNorm2d(o))
        short = None if s == 1 else nn.Conv2d(i, o, 1, s)
        blocks.append(residual(body, short, nn.ReLU()))
    return nn.Sequential(conv(3, 16), *blocks, head(32))


def densenet() -> nn.Module:
    def dense(i: int) -> nn.Module:
        return Lambda(lambda m, x: torch.cat([x, m.body(x)], 1), body=conv(i, 8))

    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), dense(16), dense(24), nn.AvgPool2d(2), conv(32, 16, 1), head(16))


def squeezenet() -> nn.Module:
    def fire(i: int, s: int, e: int) -> nn.Module:
        parts = {"s": nn.Conv2d(i, s, 1), "a": nn.Conv2d(s, e, 1), "b": nn.Conv2d(s, e, 3, padding=1)}
        return Lambda(lambda m, x: torch.cat([m.a(h := m.s(x).relu()), m.b(h)], 1).relu(), **parts)

    last = [nn.Conv2d(32, 10, 1), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(nn.Conv2d(3, 16, 3, 2, 1), nn.ReLU(), fire(16, 4, 16), fire(32, 8, 16), *last)


def googlenet() -> nn.Module:
    """With an auxiliary head that it returns in training and in evaluation."""
    branches = {"a": conv(16, 8, 1), "b": nn.Sequential(conv(16, 8, 1), conv(8, 8)), "c": conv(16, 8, 1)}

    def inception(m: Any, x: Tensor) -> Tensor:
        return torch.cat([m.a(x), m.b(x), m.c(functional.max_pool2d(x, 3, 1, 1))], 1)

    parts = {"stem": conv(3, 16, s=2), "inception": Lambda(inception, **branches), "aux": head(16), "head": head(24)}
    return Lambda(lambda m, x: (m.head(m.inception(h := m.stem(x))), m.aux(h)), **parts)


def mobilenet() -> nn.Module:
    depthwise = [conv(16, 16, groups=16, act=nn.ReLU6()), conv(16, 32, 1, act=nn.ReLU6())]
    inverted = residual(nn.Sequential(conv(32, 64, 1), conv(64, 64, groups=64), nn.Conv2d(64, 32, 1)))
    return nn.Sequential(conv(3, 16, s=2, act=nn.Hardswish()), *depthwise, inverted, head(32))


def shufflenet() -> nn.Module:
    def half(m: Any, x: Tensor) -> Tensor:
        a, b = x.chunk(2, 1)
        return nn.functional.channel_shuffle(torch.cat([a, m.body(b)], 1), 2)

    return nn.Sequential(conv(3, 16, s=2), Lambda(half, body=conv(8, 8)), head(16))


def efficientnet() -> nn.Module:
    gate = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Conv2d(32, 8, 1), nn.SiLU(), nn.Conv2d(8, 32, 1), nn.Sigmoid())
    squeeze = Lambda(lambda m, x: x * m.gate(x), gate=gate)
    inside = nn.Sequential(conv(16, 32, 1, act=nn.SiLU()), conv(32, 32, groups=32, act=nn.SiLU()), squeeze)
    return nn.Sequential(
        conv(3, 16, s=2, act=nn.SiLU()), residual(nn.Sequential(inside, nn.Conv2d(32, 16, 1))), head(16)
    )


def convnext() -> nn.Module:
    def last(m: Any, x: Tensor) -> Tensor:
        return m.mlp(m.depth(x).permute(0, 2, 3, 1)).permute(0, 3, 1, 2)

    mlp = nn.Sequential(nn.LayerNorm(16), nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    block = residual(Lambda(last, depth=nn.Conv2d(16, 16, 7, padding=3, groups=16), mlp=mlp))
    return nn.Sequential(nn.Conv2d(3, 16, 4, 4), block, head(16))


class Attention(nn.Module):
    def __init__(self, width: int, heads: int = 2) -> None:
        super().__init__()
        self.mix, self.norm = nn.MultiheadAttention(width, heads, batch_first=True), nn.LayerNorm(width)
        self.mlp = nn.Sequential(
            nn.LayerNorm(width), nn.Linear(width, 2 * width), nn.GELU(), nn.Linear(2 * width, width)
        )

    def forward(self, x: Tensor) -> Tensor:
        h = self.norm(x)
        x = x + self.mix(h, h, h, need_weights=False)[0]
        return x + self.mlp(x)


def vit() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2).transpose(1, 2)
        return m.head(m.block(torch.cat([m.token.expand(len(x), 1, 32), x], 1) + m.place)[:, 0])

    tokens = {"token": nn.Parameter(torch.zeros(1, 1, 32)), "place": nn.Parameter(0.02 * torch.randn(1, 17, 32))}
    return Lambda(run, patches=nn.Conv2d(3, 32, 8, 8), block=Attention(32), head=nn.Linear(32, 10), **tokens)


def swin() -> nn.Module:
    """Attention within windows of 4 x 4, then within shifted ones."""

    def windows(m: Any, x: Tensor) -> Tensor:
        for block, shift in ((m.a, 0), (m.b, 2)):
            h = torch.roll(x, (-shift, -shift), (1, 2)).unflatten(1, (2, 4)).unflatten(3, (2, 4)).transpose(2, 3)
            h = block(h.reshape(-1, 16, 24)).reshape(-1, 2, 2, 4, 4, 24).transpose(2, 3).reshape(-1, 8, 8, 24)
            x = torch.roll(h, (shift, shift), (1, 2))
        return x

    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.windows(m.patches(x).permute(0, 2, 3, 1)).mean((1, 2)))

    inner = Lambda(windows, a=Attention(24), b=Attention(24))
    return Lambda(run, patches=nn.Conv2d(3, 24, 4, 4), windows=inner, head=nn.Linear(24, 10))


def mixer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        x = m.patches(x).flatten(2)
        return m.head((x + m.tokens(x) + m.channels(x.transpose(1, 2)).transpose(1, 2)).mean(2))

    tokens = nn.Sequential(nn.Linear(16, 32), nn.GELU(), nn.Linear(32, 16))
    channels = nn.Sequential(nn.LayerNorm(24), nn.Linear(24, 48), nn.GELU(), nn.Linear(48, 24))
    return Lambda(run, patches=nn.Conv2d(3, 24, 8, 8), tokens=tokens, channels=channels, head=nn.Linear(24, 10))


def unet() -> nn.Module:
    """Segmentation, of which the mean over all places is taken."""

    def run(m: Any, x: Tensor) -> Tensor:
        high = m.down(x)
        low = functional.interpolate(m.middle(functional.max_pool2d(high, 2)), scale_factor=2)
        return m.up(torch.cat([high, low], 1)).mean((2, 3))

    return Lambda(run, down=conv(3, 8), middle=conv(8, 16), up=nn.Conv2d(24, 10, 1))


def deeplab() -> nn.Module:
    rates = {f"r{rate}": nn.Conv2d(16, 8, 3, padding=rate, dilation=rate) for rate in (1, 2, 4)}
    pyramid = Lambda(lambda m, x: torch.cat([m.r1(x), m.r2(x), m.r4(x)], 1), **rates)
    out = Lambda(lambda m, x: {"out": m.last(m.body(x)).mean((2, 3))}, body=pyramid, last=nn.Conv2d(24, 10, 1))
    return nn.Sequential(conv(3, 16, s=2), out)


def lenet() -> nn.Module:
    layers = [nn.Conv2d(3, 6, 5), nn.Sigmoid(), nn.AvgPool2d(2), nn.Conv2d(6, 16, 5), nn.Sigmoid(), nn.AvgPool2d(2)]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(400, 120), nn.Sigmoid(), nn.Linear(120, 10))


def plain_cnn() -> nn.Module:
    layers = [nn.Conv2d(3, 12, 5, 2, 2), nn.ReLU(), nn.Conv2d(12, 12, 5, 2, 2), nn.ReLU()]
    return nn.Sequential(*layers, nn.Flatten(), nn.Linear(768, 10))


def mlp() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(3072, 64), nn.ReLU(), nn.Linear(64, 10))


def _recurrent(kind: Any) -> nn.Module:
    return Lambda(
        lambda m, x: m.head(m.rnn(x.transpose(1, 2))[0][:, -1]),
        rnn=kind(4, 16, batch_first=True),
        head=nn.Linear(16, 5),
    )


def tcn() -> nn.Module:
    def causal(i: int, rate: int) -> nn.Module:
        return nn.Sequential(nn.ConstantPad1d((2 * rate, 0), 0.0), nn.Conv1d(i, 8, 3, dilation=rate), nn.ReLU())

    return nn.Sequential(causal(4, 1), residual(causal(8, 2)), nn.Flatten(), nn.Linear(192, 5))


def wavenet() -> nn.Module:
    gated = Lambda(
        lambda m, x: torch.tanh(m.a(x)) * torch.sigmoid(m.b(x)), a=nn.Conv1d(8, 8, 3, padding=1), b=nn.Conv1d(8, 8, 1)
    )
    return nn.Sequential(nn.Conv1d(4, 8, 1), residual(gated), nn.Flatten(), nn.Linear(192, 5))


def tabular_mlp() -> nn.Module:
    return nn.Sequential(nn.Linear(12, 32), nn.BatchNorm1d(32), nn.ReLU(), nn.Dropout(0.2), nn.Linear(32, 2))


def tabular_resnet() -> nn.Module:
    body = nn.Sequential(nn.BatchNorm1d(24), nn.Linear(24, 32), nn.ReLU(), nn.Linear(32, 24))
    return nn.Sequential(nn.Linear(12, 24), residual(body), nn.BatchNorm1d(24), nn.ReLU(), nn.Linear(24, 2))


def ft_transformer() -> nn.Module:
    def run(m: Any, x: Tensor) -> Tensor:
        return m.head(m.block(x[:, :, None] * m.weight + m.shift).mean(1))

    own = {"weight": nn.Parameter(torch.randn(12, 16)), "shift": nn.Parameter(torch.randn(12, 16))}
    return Lambda(run, block=Attention(16), head=nn.Linear(16, 2), **own)


def autoencoder() -> nn.Module:
    """Its classifier reads the code."""
    return nn.Sequential(
        conv(3, 16, s=2), conv(16, 8, s=2), nn.Flatten(), nn.Linear(512, 32), nn.Tanh(), nn.Linear(32, 10)
    )


def siamese() -> nn.Module:
    """Two pictures beside each other, told apart by how far their codes are."""
    base = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(1024, 16))
    return Lambda(
        lambda m, x: m.head((m.base(x[..., :16]) - m.base(x[..., 16:])).abs()), base=base, head=nn.Linear(16, 2)
    )


def distilbert() -> nn.Module:
    """On embedded words: tokens themselves are whole numbers."""
    return Lambda(lambda m, x: m.head(m.b(m.a(x + m.place))[:, 0]), a=Attention(16), b=Attention(16),
                  place=nn.Parameter(0.02 * torch.randn(10, 16)), head=nn.Linear(16, 3))  # fmt: skip


@dataclass(frozen=True)
class Family:
    name: str
    make: Callable[[], nn.Module]
    shape: tuple[int, ...] = PICTURE


FAMILIES = (
    Family("mlp", mlp), Family("cnn", plain_cnn), Family("lenet", lenet), Family("alexnet", alexnet),
    Family("vgg", vgg),
    Family("resnet", _resnet), Family("resnext", lambda: _resnet(4)), Family("densenet", densenet),
    Family("squeezenet", squeezenet), Family("googlenet, 2 heads", googlenet), Family("mobilenet", mobilenet),
    Family("shufflenet", shufflenet), Family("efficientnet", efficientnet), Family("convnext", convnext),
    Family("vit", vit), Family("swin", swin), Family("mixer", mixer), Family("unet", unet), Family("deeplab", deeplab),
    Family("autoencoder code", autoencoder), Family("siamese", siamese),
    Family("rnn", lambda: _recurrent(nn.RNN), SERIES), Family("gru", lambda: _recurrent(nn.GRU), SERIES),
    Family("lstm", lambda: _recurrent(nn.LSTM), SERIES), Family("tcn", tcn, SERIES), Family("wavenet", wavenet, SERIES),
    Family("tabular mlp", tabular_mlp, ROW), Family("tabular resnet", tabular_resnet, ROW),
    Family("ft-transformer", ft_transformer, ROW), Family("distilbert", distilbert, WORDS),
)  # fmt: skip
