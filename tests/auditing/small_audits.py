"""Networks that are audited in milliseconds, and attacks that can be watched."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from rgap import Audit, Target, Update, data, losses
from rgap.attacks import Answer, Attack, Bias, InvertingGradients, Outcome, Reconstruction, Status
from rgap.auditing import Result
from rgap.checks import Preflight
from rgap.report import render

SHAPE = (1, 4, 4)


def seeded(*layers: nn.Module, seed: int = 0) -> nn.Sequential:
    """Layers that are made elsewhere, with weights from a seed."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for layer in layers:
            for module in layer.modules():
                if hasattr(module, "reset_parameters"):
                    module.reset_parameters()
    return nn.Sequential(*layers).double().eval()


def open_target(batch_size: int = 1, classes: int = 1) -> Target:
    """A Linear layer with a bias reads the picture: every sample on its own can be read out exactly."""
    model = seeded(nn.Flatten(), nn.Linear(16, 20), nn.Tanh(), nn.Linear(20, classes))
    loss = losses.Logistic() if classes == 1 else losses.CrossEntropy(classes)
    return Target(model, loss, SHAPE, (0.0, 1.0), batch_size)


def pictures(count: int) -> data.Images:
    x = torch.rand(count, *SHAPE, generator=torch.Generator().manual_seed(3), dtype=torch.float64)
    return data.Images(x, tuple(f"p{at}" for at in range(count)), ("",) * count)


GAVE_UP = Outcome(Status.NOT_CONVERGED, "gave up")


@dataclass(frozen=True)
class Watched(Attack):
    """Another attack that notes which updates it is given; as a Linear layer with a bias gives it away by default.

    Args:
        label: its name.
        inner: what it does.
        fails_on: which calls give no answer, counted from 0.
        interrupted_at: the call at which the user loses patience.
        seen: the updates it was given.
    """

    label: str = "Watched"
    inner: Attack = field(default_factory=Bias)
    fails_on: tuple[int, ...] = ()
    interrupted_at: int | None = field(default=None, repr=False)
    seen: list[Update] = field(default_factory=list, repr=False, compare=False)

    @property
    def name(self) -> str:
        return self.label

    def run(self, target: Target, update: Update) -> Outcome:
        at = len(self.seen)
        if at == self.interrupted_at:
            raise KeyboardInterrupt
        self.seen.append(update)
        if at in self.fails_on:
            return GAVE_UP
        return self.inner.run(target, update)


@dataclass(frozen=True)
class Silent(Attack):
    """Never has an answer."""

    status: Status = Status.NOT_CONVERGED

    def run(self, target: Target, update: Update) -> Outcome:
        return Outcome(self.status, GAVE_UP.reason)


@dataclass(frozen=True)
class Picky(Silent):
    """Does not apply."""

    def obstacle(self, target: Target, samples: int) -> str | None:
        return f"it is a matter of taste, with {samples} samples"


@dataclass(frozen=True)
class Robust(InvertingGradients):
    """Stands in for an attack by optimisation: finds the first samples whatever noise was added."""

    samples: tuple[Tensor, ...] = field(default=(), repr=False, compare=False)

    def run_many(self, target: Target, updates: Sequence[Update]) -> list[Outcome]:
        made = [
            found(self.name, x, torch.ones(len(x)), residual=1.0) for x, _ in zip(self.samples, updates, strict=False)
        ]
        return [Outcome(each.status, each.reason, each.answers, each.assumptions) for each in made]


def nothing(name: str, checks: Preflight, status: Status = Status.NOT_CONVERGED) -> Reconstruction:
    return Reconstruction(name, status, "gave up", (), (), checks, 0.1)


def found(name: str, *inputs: Tensor, residual: float = 0.0) -> Reconstruction:
    """Answers, best first; the last of the tensors are the labels of all."""
    *answers, labels = inputs
    made = tuple(Answer(x, labels, float("nan"), residual, float("nan")) for x in answers)
    return Reconstruction(name, Status.REPRODUCED, "found", made, ("luck",), Preflight((), ()), 0.1)


def result(
    psnr: float = 0.0,
    ssim: float = 0.0,
    shape_psnr: float | None = None,
    reproduced: bool = True,
    status: Status = Status.REPRODUCED,
    labels_right: bool = True,
) -> Result:
    """A result of which only the quality counts."""
    return Result(
        attack="Some",
        status=status,
        reason="",
        mse=10 ** (-psnr / 10),
        psnr=psnr,
        ssim=ssim,
        shape_psnr=psnr if shape_psnr is None else shape_psnr,
        best_mse=10 ** (-psnr / 10),
        gradient_residual=0.0,
        reproduced=reproduced,
        error=0.0,
        seconds=1.0,
        labels=(1.0,),
        labels_right=labels_right,
        twins=0,
        assumptions=(),
        warnings=(),
    )


def documented(audit: Audit) -> dict[str, Any]:
    """What audit.json holds, read by a strict parser; the report of it can be made."""
    document: dict[str, Any] = json.loads(json.dumps(audit.to_dict(), allow_nan=False))
    assert "<html" in render(document)
    return document
