"""How strong a defence must be: what still leaks at each strength, and what the strength costs."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Response:
    """A defence at one strength, over the samples of the sweep, the worst attack for the client each time."""

    strength: float
    psnr: float
    """Median over samples, in dB."""
    ssim: float
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
