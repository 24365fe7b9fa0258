"""How far certificates can be trusted: the closed attacks on random networks, with gradients clean and spoilt.

    python benchmarks/certificates.py --networks 2000 --out found.jsonl [--pools] [--only Closed]

With --pools a pool follows the first convolution, and every second one of the others: of maxima or means, over windows
apart or overlapping, adaptive ones among them. Appends a line for each network, goes on where it ended before, and
prints the table: how answers ended, and how many times the stated error the true one is. False is an answer that is
called exact and whose error is above ten times the stated one and above 1e-3.
"""

from __future__ import annotations

import argparse
import json
import math
from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

from rgap import Target, Update, capture, losses
from rgap.attacks import Bias, Closed, Recursive, Status
from rgap.defences import DPSGD
from rgap.linalg import deadline
from rgap.nn.obstacles import NotAChain

ACTIVATIONS = [
    nn.Sigmoid, nn.Tanh, nn.ReLU, lambda: nn.LeakyReLU(0.2), nn.ELU, nn.Softplus, nn.GELU, nn.SiLU,
]  # fmt: skip
ATTACKS = (Closed(), Recursive(), Bias())
SAMPLES = 32
FALSE = 10.0
"""An error above so many times the stated one, and above `RIGHT`, makes a certificate false."""
RIGHT = 1e-3
SEVERAL = ("mean of two", "mean of 32", "another sample's layer")


@dataclass(frozen=True, eq=False)
class Drawn:
    """A network of up to three convolutions and three Linear layers, and samples."""

    target: Target
    x: Tensor
    y: Tensor
    generator: torch.Generator

    def pick(self, names: list[str]) -> str:
        return names[int(torch.randint(len(names), (), generator=self.generator))]


POOLS: list[Callable[[], nn.Module]] = [
    lambda: nn.MaxPool2d(2),
    lambda: nn.MaxPool2d(2, ceil_mode=True),
    lambda: nn.MaxPool2d(3, 2),
    lambda: nn.MaxPool2d(3, 2, padding=1),
    lambda: nn.MaxPool2d(2, 1),
    lambda: nn.AdaptiveMaxPool2d(3),
    lambda: nn.AvgPool2d(2),
    lambda: nn.AvgPool2d(3, 2, padding=1),
    lambda: nn.AdaptiveAvgPool2d(3),
]


def drawn(seed: int, pools: bool = False) -> Drawn:
    """In single precision, as clients compute.

    Args:
        pools: whether they follow convolutions, the first one at least.
    """
    generator = torch.Generator().manual_seed(seed)

    def one(*of: int | float) -> int:
        return of[int(torch.randint(len(of), (), generator=generator))]  # type: ignore[return-value]

    activation, bias, norm = ACTIVATIONS[one(*range(len(ACTIVATIONS)))], bool(one(0, 1)), one(0, 0, 0, 1)
    channels, side, layers = one(1, 3), one(6, 7, 8) if pools else one(4, 5, 6), []
    size, widths = (channels, side, side), (6, 12, 24) if pools else (4, 6, 12)
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for at in range(one(1, 1, 2) if pools else one(0, 1, 1, 2, 3)):
            layer = nn.Conv2d(size[0], one(*widths), one(2, 3, 3), one(1, 1, 2 - pools), one(0, 1), bias=bias)
            if min(size[1:]) + 2 * int(layer.padding[0]) < layer.kernel_size[0]:
                break
            size = tuple(layer(torch.zeros(1, *size)).shape[1:])
            layers += [layer, nn.BatchNorm2d(size[0]), activation()] if norm else [layer, activation()]
            if pools and (at == 0 or one(0, 1)) and min(size[1:]) > 2:
                layers.append(POOLS[one(*range(len(POOLS)))]())
                size = tuple(layers[-1](torch.zeros(1, *size)).shape[1:])
        layers.append(nn.Flatten())
        width = math.prod(size)
        for wide in [one(10, 30, 60) for _ in range(one(0, 0, 1, 2))]:
            layers += [nn.Linear(width, wide, bias=bias), activation()]
            width = wide
        outputs = one(1, 1, 4, 10)
        model = nn.Sequential(*layers, nn.Linear(width, outputs, bias=bias)).eval()
        scale = one(1.0, 1.0, 0.3, 2.0)
        with torch.no_grad():
            for p in model.parameters():
                p.mul_(scale)
            for module in model.modules():
                if isinstance(module, nn.BatchNorm2d):
                    module.running_mean.uniform_(-0.2, 0.2)
                    module.running_var.uniform_(0.5, 1.5)
    binary = (losses.Logistic(), losses.MeanSquaredError(1))[one(0, 1)]
    loss: losses.Loss = binary if outputs == 1 else losses.CrossEntropy(outputs)
    x = torch.rand(SAMPLES, channels, side, side, generator=generator)
    at = torch.randint(max(1, len(loss.labels)), (SAMPLES,), generator=generator)
    y = torch.tensor(loss.labels)[at] if loss.labels else torch.rand(SAMPLES, generator=generator)
    return Drawn(Target(model, loss, (channels, side, side), (0.0, 1.0)), x, y.float(), generator)


def spoilt(case: Drawn) -> Iterator[tuple[str, Update]]:
    """What a server may be sent for the first sample's gradient."""
    target, x, y = case.target, case.x, case.y
    clean = dict(capture(target, x[:1], y[:1]).gradients)
    other = capture(target, x[1:2], y[1:2]).gradients
    names = list(clean)
    yield "clean", Update(clean)
    yield "half", Update({name: g.half().float() for name, g in clean.items()})
    yield "bfloat16", Update({name: g.bfloat16().float() for name, g in clean.items()})
    name = case.pick(names)
    wrong = clean[name].clone()
    at = int(torch.randint(wrong.numel(), (), generator=case.generator))
    wrong.view(-1)[at] += wrong.abs().max()
    yield "one entry", Update(clean | {name: wrong})
    name = case.pick(names)
    yield "one layer scaled", Update(clean | {name: 1.001 * clean[name]})
    name = case.pick(names)
    yield "another sample's layer", Update(clean | {name: other[name]})
    yield "mean of two", Update({name: (g + other[name]) / 2 for name, g in clean.items()})
    yield "mean of 32", Update(dict(capture(target, x, y).gradients))
    count = sum(g.numel() for g in clean.values())
    size = Update(clean).norm / count**0.5
    for noise in (1e-2, 1e-4):
        draws = {name: torch.randn(g.shape, generator=case.generator) for name, g in clean.items()}
        yield "noise", Update({name: g + noise * size * draws[name] for name, g in clean.items()})
    for multiplier in (1e-4, 1e-6):
        private = DPSGD(max(Update(clean).norm / 2, 1e-9), multiplier)
        yield "DP noise", private(Update(clean), case.generator)
    trained = _in_training(case)
    if trained is not None:
        yield "training mode", trained


def _in_training(case: Drawn) -> Update | None:
    """With the statistics of the batch in place of the model's; None where that is the same."""
    model = case.target.model
    if not any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
        return None
    model.train()
    try:
        return Update(dict(capture(case.target, case.x[:1], case.y[:1]).gradients))
    except ValueError:
        return None  # a single value has no statistics
    finally:
        model.eval()


@dataclass(frozen=True)
class Ended:
    """How one attack on one gradient ended."""

    seed: int
    kind: str
    attack: str
    status: str
    error: float | None = None
    """Root mean square; None where there is no answer."""
    stated: float | None = None
    reason: str = ""

    @property
    def exact(self) -> bool:
        return self.status == Status.EXACT.value

    @property
    def ratio(self) -> float:
        """True over stated error."""
        return (self.error or 0.0) / max(self.stated or 0.0, torch.finfo(torch.float64).tiny)

    @property
    def false(self) -> bool:
        return self.exact and self.ratio > FALSE and (self.error or 0.0) > RIGHT

    @property
    def missed(self) -> bool:
        """A right answer that is not called exact."""
        return not self.exact and self.error is not None and self.error < RIGHT


def outcomes(seed: int, every: int = 1, pools: bool = False, limit: float = 600.0, only: str = "") -> Iterator[Ended]:
    """Of every attack on one network's gradients: the clean one, those rounded, and one in `every` of the others.

    Args:
        limit: seconds for an attack.
        only: attacks whose name contains this.
    """
    case = drawn(seed, pools)
    for at, (kind, update) in enumerate(spoilt(case)):
        if at > 2 and (at + seed) % every:
            continue
        for attack in ATTACKS:
            if only not in attack.name or attack.obstacle(case.target, 1) is not None:
                continue
            try:
                with deadline.within(limit):
                    found = attack(case.target, update)
            except NotAChain:
                continue
            ended = Ended(seed, kind, attack.name, found.status.value)
            if found.answers:
                # Of a mean one sample may outweigh the others by far: its picture is right.
                among = case.x if kind in SEVERAL else case.x[:1]
                error = min(float((found.inputs - x).square().mean().sqrt()) for x in among)
                ended = replace(ended, error=error, stated=found.answers[0].error, reason=found.reason)
            yield ended


def table(found: Iterable[Ended]) -> Table:
    """By kind of gradient and attack."""
    rows: dict[tuple[str, str], list[Ended]] = {}
    for each in found:
        rows.setdefault((each.kind, each.attack), []).append(each)
    made = Table(
        "gradient", "attack", "runs", "exact", "false", "right, not exact", "1 %", "50 %", "99 %", "within 10", "ended"
    )
    for (kind, attack), every in sorted(rows.items()):
        exact = torch.tensor([each.ratio for each in every if each.exact], dtype=torch.float64)
        missed, false = sum(each.missed for each in every), sum(each.false for each in every)
        right = missed + sum(each.exact and (each.error or 0.0) < RIGHT for each in every)
        spread = [f"{float(exact.quantile(q)):.2g}" for q in (0.01, 0.5, 0.99)] if len(exact) else ["-"] * 3
        within = f"{float(((exact >= 0.1) & (exact <= 10)).double().mean()):.1%}" if len(exact) else "-"
        share = f"{missed / right:.1%}" if right else "-"
        ended = ", ".join(f"{name} {count}" for name, count in Counter(each.status for each in every).most_common())
        made.add_row(kind, attack, str(len(every)), str(len(exact)), str(false), share, *spread, within, ended)
    return made


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--networks", type=int, default=100)
    parser.add_argument("--first", type=int, default=0, help="the seed of the first network")
    parser.add_argument(
        "--every",
        type=int,
        default=1,
        help="attack one in so many of a network's gradients, in turn, beside the clean one and those rounded",
    )
    parser.add_argument("--limit", type=float, default=600.0, help="seconds for an attack")
    parser.add_argument("--only", default="", help="attacks whose name contains this")
    parser.add_argument("--pools", action="store_true", help="draw networks with pools")
    parser.add_argument("--out", type=Path, required=True, help="a file of lines, appended to")
    options = parser.parse_args()
    lines = options.out.read_text().splitlines() if options.out.exists() else []
    found = [[Ended(**each) for each in json.loads(line)] for line in lines if line.endswith("]")]
    done = {every[0].seed for every in found if every}
    with options.out.open("a") as file:
        for seed in range(options.first, options.first + options.networks):
            if seed not in done:
                ended = list(outcomes(seed, options.every, options.pools, options.limit, options.only))
                found.append(ended)
                print(json.dumps([asdict(each) for each in ended]), file=file, flush=True)
    ended = [each for every in found for each in every]
    Console(width=200).print(table(ended))
    for each in ended:
        if each.false:
            print("FALSE", each)


if __name__ == "__main__":
    main()
