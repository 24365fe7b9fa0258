"""No operation crashes an audit: it is named, and the attacks that apply run."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rgap import Target, audit, losses
from rgap.attacks import IDLG, Bias, Closed, Recursive, Status


class Around(nn.Module):
    """A convolution, anything, and a Linear layer."""

    def __init__(self, function: Callable[[Tensor], Tensor]):
        super().__init__()
        self.conv, self.function = nn.Conv2d(2, 4, 3, padding=1), function
        if isinstance(function, nn.Module):
            self.inner = function
        self.fc = nn.Linear(function(torch.rand(1, 4, 4, 4)).numel(), 3)

    def forward(self, x: Tensor) -> Tensor:
        scores: Tensor = self.fc(self.function(self.conv(x)).flatten(1))
        return scores


class Square(torch.autograd.Function):
    """An operation of one's own that torch.func cannot batch."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:  # type: ignore[override, no-untyped-def]
        ctx.save_for_backward(x)
        return x * x

    @staticmethod
    def backward(ctx, g: Tensor) -> Tensor:  # type: ignore[override, no-untyped-def]
        return 2 * ctx.saved_tensors[0] * g


class Recurrent(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.lstm = nn.LSTM(16, 5, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        found: Tensor = self.lstm(x.flatten(2))[0]
        return found


MODELS: dict[str, Callable[[], Callable[[Tensor], Tensor]]] = {
    "Fourier": lambda: lambda h: torch.fft.rfft2(h).abs(),
    "sorted": lambda: lambda h: h.sort(-1).values,
    "products": lambda: lambda h: torch.einsum("bchw,bdhw->bcd", h, h),
    "an operation of one's own": lambda: Square.apply,
    "control flow": lambda: lambda h: h * 2 if h.sum() > 0 else h,
    "masks": lambda: lambda h: torch.where(h > 0, h, 0.1 * h),
    "a norm": lambda: lambda h: h / h.norm(dim=1, keepdim=True),
    "noise": lambda: lambda h: h + torch.randn_like(h),
    "complex numbers": lambda: lambda h: torch.view_as_real(torch.fft.fft2(h)),
    "recurrent": Recurrent,
    "attention": lambda: nn.TransformerEncoderLayer(4, 2, 8, batch_first=True).eval(),
    "spectral norm": lambda: nn.utils.parametrizations.spectral_norm(nn.Conv2d(4, 4, 3)),
    "batch norm in training": lambda: nn.BatchNorm2d(4, track_running_stats=False).train(),
    "dropout in training": lambda: nn.Dropout().train(),
    "largest values": lambda: lambda h: functional.max_pool2d(h, 2, return_indices=True)[0],
}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", MODELS)
def test_no_operation_crashes_an_audit(name: str) -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        inner = MODELS[name]()
        if name == "attention":
            encoder = inner
            inner = lambda h: encoder(h.flatten(2).mT)  # noqa: E731
        model = Around(inner)
        if name == "attention":
            model.inner = encoder  # type: ignore[assignment]
        x = torch.rand(1, 2, 4, 4)
        target = Target(model, losses.CrossEntropy(3), (2, 4, 4), (0.0, 1.0))
        attacks = [Recursive(), Closed(), Bias(), IDLG(iterations=2)]
        found = audit(target, x, attacks=attacks, about={"model": name, "data": "one"})
    for ran in found.attacks:
        assert ran.obstacle or all(result.reason for result in ran.results)
    assert any(ran.obstacle is None and ran.results for ran in found.attacks) or name in ("control flow", "recurrent")
    for ran in found.attacks:
        for result in ran.results:
            if result.status is Status.EXACT:
                assert float((result.inputs - x).abs().max()) < 1e-3
