"""How strong a defence must be: what still leaks at each strength, and what the strength costs."""

from __future__ import annotations

import statistics
from collections.abc import Sequence
from dataclasses import dataclass, replace

import torch

from rgap.attacks import Attack, InvertingGradients
from rgap.auditing.results import EXACT_PSNR, Level, Result, gave_away, or_least
from rgap.auditing.run import Run, any_seen, cut_off
from rgap.defences import DPSGD, Defence, gradient_error
from rgap.defences.noise import check_accounting

SWEPT = 4
"""Samples at the most on which a defence is swept."""
ITERATIONS = 500
"""Of an attack by optimisation in a sweep, which runs it many times."""


@dataclass(frozen=True)
class Accounting:
    """What differential privacy is counted with.

    Args:
        rate: the share of clients in a round.
        steps: rounds of the whole training.
        delta: the probability with which the guarantee may fail.
    """

    rate: float
    steps: int
    delta: float = 1e-5

    def __post_init__(self) -> None:
        check_accounting(self.rate, self.steps, self.delta)


@dataclass(frozen=True)
class Response:
    """A defence at one strength, over the samples of the sweep, the worst attack for the client each time."""

    strength: float
    median_psnr: float
    """Median over samples, in dB."""
    median_ssim: float
    """Median over samples; NaN for inputs that are no pictures."""
    recovered: float
    """Share of samples that are recognisable or better."""
    gradient_error: float
    """What it costs: how far the update was changed, relative to its size."""
    epsilon: float | None = None
    """Of differential privacy, where the defence gives any."""


@dataclass(frozen=True)
class DoseResponse:
    """One defence, from weak to strong."""

    name: str
    strength_name: str
    about: str
    points: tuple[Response, ...]
    private: bool = False
    """Whether the defence gives differential privacy, as much as its epsilon says."""

    @property
    def closes_at(self) -> Response | None:
        """The weakest point from which on no sample was recognisable; None if there is none."""
        closed = None
        if not self.points or self.points[0].recovered == 0:
            return None  # there was nothing to close
        for point in reversed(self.points):
            if point.recovered > 0:
                break
            closed = point
        return closed

    @property
    def sentence(self) -> str:
        at = self.closes_at
        if at is not None:
            return f"From {self.strength_name} {at.strength:g} on no sample was recognisable to the attacks tried."
        if not self.points:
            return "No strength was tried."
        if self.points[0].recovered == 0:
            return "The samples of the sweep do not leak without it."
        strongest = self.points[-1]
        return (
            f"No strength tried closes the leak: at {self.strength_name} {strongest.strength:g} "
            f"{strongest.recovered:.0%} of the samples are still recognisable."
        )


def dose_response(run: Run, defence: Defence, accounting: Accounting | None) -> DoseResponse | None:
    """The defence at each of its levels, on the first updates, against the attacks that gave most away.

    None if the time was up before the first of them.
    """
    attacks, updates = _best(run), _swept(run)
    points: list[Response] = []
    for strength in (None, *type(defence).levels):
        point = None if run.late else _response(run, defence, strength, attacks, updates, accounting)
        if point is None:
            since = "at all" if strength is None else f"from {defence.strength_name} {strength:g} on"
            run.put_off(f"{defence.name} {since}")
            break
        points.append(point)
    if not points:
        return None
    named = defence.strength_name or "on"
    return DoseResponse(defence.name, named, defence.about, tuple(points), isinstance(defence, DPSGD))


def _swept(run: Run) -> list[int]:
    """The numbers of the updates of a sweep: those that leak before those that do not."""
    leaks = [any(map(any_seen, run.of_update(at, run.able))) for at in range(len(run.updates))]
    first = sorted(range(len(leaks)), key=lambda at: not leaks[at])
    return sorted(first[: max(1, SWEPT // run.group)])


def _best(run: Run) -> list[Attack]:
    """The attack that gave most away, and the best of those that look for the input by optimisation: the closed form
    is the first to break down when a gradient is changed."""
    nothing = (-1, 0.0, 0.0)
    first = max(run.able, key=lambda attack: max(map(gave_away, run.of_attack(attack)), default=nothing))
    robust = (attack for attack in run.able if isinstance(attack, InvertingGradients))
    short = [replace(attack, iterations=min(attack.iterations, ITERATIONS)) for attack in robust]
    return list(dict.fromkeys([first, *short]))


def _response(
    run: Run,
    defence: Defence,
    strength: float | None,
    attacks: Sequence[Attack],
    updates: Sequence[int],
    accounting: Accounting | None,
) -> Response | None:
    """One strength, None for the update as it is; nothing if the time is up."""
    run.tell(f"{defence.name} {'off' if strength is None else f'{strength:g}'}")
    epsilon, name, sent = None, "", {at: run.updates[at] for at in updates}
    if strength is not None:
        armed = defence.with_strength(strength)
        name = repr(armed)
        sent = {at: armed(each, torch.Generator().manual_seed(run.seed + at)) for at, each in sent.items()}
        if accounting is not None and isinstance(armed, DPSGD):
            epsilon = armed.epsilon(accounting.rate, accounting.steps, accounting.delta)
    tried: dict[int, list[list[Result]]] = {at: [] for at in sent}
    left = sent
    for attack in attacks:
        found = run.results(attack, left, name)
        if len(found) < len(left):
            return None  # without this attack a leak could pass for closed
        for at, results in found.items():
            tried[at].append(results)
        left = {at: update for at, update in left.items() if any(or_least(r.psnr) < EXACT_PSNR for r in found[at])}
    samples = [each for results in tried.values() for each in zip(*results, strict=True)]
    best = [max(each, key=gave_away) for each in samples]
    undecided = [b.level is Level.NOTHING and any(map(cut_off, own)) for b, own in zip(best, samples, strict=True)]
    if not best or (strength is not None and any(undecided)):
        return None  # an attack that was cut off might have shown what none did
    return Response(
        strength=strength or 0.0,
        median_psnr=statistics.median(or_least(result.psnr) for result in best),
        median_ssim=statistics.median(or_least(result.ssim) for result in best),
        recovered=sum(result.level is not Level.NOTHING for result in best) / len(best),
        gradient_error=statistics.fmean(gradient_error(run.updates[at], update) for at, update in sent.items()),
        epsilon=epsilon,
    )
