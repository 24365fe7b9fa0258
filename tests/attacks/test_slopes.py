"""Attacks by optimisation take any code that torch differentiates twice, together or one system after another."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rgap import Target, capture, losses
from rgap.attacks import IDLG, Closed, Status
from rgap.attacks.slopes import REUSED, refused, slopes, together
from rgap.target import GradientFunction


class Between(nn.Module):
    """Two layers with something of one's own between them."""

    def __init__(self, between: Callable[[Tensor], Tensor]) -> None:
        super().__init__()
        self.first, self.last, self.between = nn.Linear(6, 8), nn.Linear(8, 3), between

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.between(self.first(x)))


class Recurrent(nn.Module):
    def __init__(self, kind: type[nn.RNNBase]) -> None:
        super().__init__()
        self.rnn, self.head = kind(3, 12, batch_first=True), nn.Linear(12, 3)  # type: ignore[call-arg]

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.rnn(x.reshape(len(x), 2, 3))[0].mean(1))


class Encoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 8, batch_first=True)
        self.embed, self.encoder, self.head = nn.Linear(3, 8), nn.TransformerEncoder(layer, 1), nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x.reshape(len(x), 2, 3))).mean(1))


class Twice(torch.autograd.Function):
    """Of the old kind, which torch.func does not take."""

    @staticmethod
    def forward(ctx: object, x: Tensor) -> Tensor:
        return 2 * x

    @staticmethod
    def backward(ctx: object, k: Tensor) -> Tensor:  # type: ignore[override]
        return 2 * k


def branches(h: Tensor) -> Tensor:
    return torch.tanh(h) if h.sum() > -99 else torch.sigmoid(h)


def item(h: Tensor) -> Tensor:
    return torch.tanh(h) * float(1 + 0 * h.detach().mean().item())


def halves(h: Tensor) -> Tensor:
    out = torch.zeros_like(h)
    out[:, ::2], out[:, 1::2] = torch.tanh(h[:, ::2]), torch.sigmoid(h[:, 1::2])
    return out


def masked(h: Tensor) -> Tensor:
    h = h.clone()
    h[h < 0] = 0.5 * h[h < 0]
    return torch.tanh(h)


def kept(h: Tensor) -> Tensor:
    return checkpoint(torch.tanh, h, use_reentrant=False)  # type: ignore[no-any-return]


OWN = {
    "branches": lambda: Between(branches),
    "item": lambda: Between(item),
    "in place": lambda: Between(halves),
    "masked": lambda: Between(masked),
    "numpy": lambda: Between(lambda h: torch.tanh(h) + torch.from_numpy(0 * h.detach().numpy())),
    "old function": lambda: Between(lambda h: torch.tanh(Twice.apply(h))),
    "checkpoint": lambda: Between(kept),
    "RNN": lambda: Recurrent(nn.RNN),
    "GRU": lambda: Recurrent(nn.GRU),
    "LSTM": lambda: Recurrent(nn.LSTM),
    "attention": Encoder,
}


def made(name: str) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(1)
        return Target(OWN[name]().eval(), losses.CrossEntropy(3), (6,), (0.0, 1.0))


@pytest.mark.parametrize("name", OWN)
def test_code_of_ones_own_is_attacked(name: str) -> None:
    target, attack = made(name), IDLG(iterations=60)
    assert attack.obstacle(target, 1) is None
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    found = attack(target, capture(target, x, torch.tensor([2.0])))
    # A search may end in another minimum; that it went down shows that it has the slopes.
    assert found.gradient_residual < 0.1, found.reason
    many = attack.many(target, [capture(target, each[None], torch.tensor([1.0])) for each in torch.rand(3, 6)])
    assert len(many) == 3


@pytest.mark.parametrize("name", ["branches", "in place", "GRU", "attention"])
def test_slopes_are_those_of_finite_differences(name: str) -> None:
    target = made(name)
    weights = torch.eye(3, dtype=torch.float64)[:1]

    def size_of(gradient: GradientFunction) -> Callable[..., Tensor]:
        def size(point: Tensor, scale: Tensor) -> Tensor:
            found = gradient(point[None], weights)
            return scale * torch.stack([g.square().sum() for g in found.values()]).sum()

        return size

    both = slopes(target, torch.float64, size_of, (False,), at_once=8)
    points, scales = torch.rand(2, 6, dtype=torch.float64), torch.tensor([1.0, 3.0], dtype=torch.float64)
    slope, value = both(points, scales)
    assert slope.shape == points.shape
    for at in range(6):
        moved = points.clone()
        moved[:, at] += 1e-5
        change = (both(moved, scales)[1] - value) / 1e-5
        assert torch.allclose(change, slope[:, at], rtol=1e-2, atol=1e-3 * float(value.max()))


def test_one_after_the_other_is_the_same_as_all_together() -> None:
    chain = Target(nn.Sequential(nn.Linear(6, 4), nn.Tanh(), nn.Linear(4, 3)), losses.CrossEntropy(3), (6,))
    assert refused(made("branches"), torch.float64)
    assert not refused(chain, torch.float64)
    x, w = torch.rand(2, 6, dtype=torch.float64), torch.full((2, 3), 1 / 3, dtype=torch.float64)
    plain, pure = (chain.gradient_function(torch.float64, plain=each)(x, w) for each in (True, False))
    assert all(torch.allclose(plain[name], g) for name, g in pure.items())


def test_of_a_large_model_few_systems_run_together() -> None:
    small, large = (
        Target(nn.Sequential(nn.Linear(6, width), nn.Tanh(), nn.Linear(width, 3)), losses.CrossEntropy(3), (6,))
        for width in (4, 2**17)
    )
    assert together(small, torch.float32, 32) == 32
    assert together(made("branches"), torch.float32, 32) == 1
    parameters = sum(p.numel() for p in large.parameters.values())
    for dtype, most in ((torch.float32, 3), (torch.float64, 1)):
        assert together(large, dtype, 32) == most
        assert most * dtype.itemsize * parameters <= REUSED


@pytest.mark.parametrize("name", ["masked", "attention"])
def test_what_cannot_be_replayed_ends_the_closed_form_with_a_reason(name: str) -> None:
    """And never in torch's own error."""
    target = made(name)
    if Closed().obstacle(target, 1) is None:
        found = Closed()(target, capture(target, torch.rand(1, 6), torch.tensor([2.0])))
        assert found.status in Status
        assert "Could not" not in found.reason
