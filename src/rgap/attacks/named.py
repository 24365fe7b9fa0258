"""Attacks by their names on the command line and in the plan of a sweep."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

from rgap.attacks.base import Attack
from rgap.attacks.bias import Bias
from rgap.attacks.closed import Closed, Recursive
from rgap.attacks.hybrid import Hybrid
from rgap.attacks.matching import Matching
from rgap.attacks.polish import Polish
from rgap.attacks.presets import DLG, IDLG, FeatureMatching, InvertingGradients, Modern, SeeThroughGradients

BY_NAME: dict[str, Callable[[], Attack]] = {
    "closed": Closed,
    "recursive": Recursive,
    "bias": Bias,
    "dlg": DLG,
    "idlg": IDLG,
    "inverting-gradients": InvertingGradients,
    "see-through-gradients": SeeThroughGradients,
    "modern": Modern,
    "feature-matching": FeatureMatching,
    "hybrid": Hybrid,
}


def by_name(name: str, iterations: int | None = None, restarts: int | None = None, polish: bool = False) -> Attack:
    """An attack by its name, such as ``inverting-gradients``; upper and lower case, dashes and underscores do not
    matter: ``InvertingGradients`` is the same.

    Args:
        iterations, restarts: of an attack by optimisation; None: its own.
        polish: go on from its answer by `Polish`.

    Raises:
        ValueError: an unknown name, or sizes for an attack that has none.
    """
    known = {_plain(each): kind for each, kind in BY_NAME.items()}
    kind = known.get(_plain(name))
    if kind is None:
        raise ValueError(f"got the attack {name!r}, expected one of {', '.join(BY_NAME)}")
    made = kind()
    if (iterations or restarts) and not isinstance(made, (Matching, Hybrid)):
        raise ValueError(f"{made.name} is no attack by optimisation")
    made = resized(made, iterations, restarts)
    return Polish(made) if polish else made


def _plain(name: str) -> str:
    return name.lower().replace("-", "").replace("_", "")


def resized(attack: Attack, iterations: int | None, restarts: int | None) -> Attack:
    """An attack by optimisation with other sizes; another attack as it is."""
    if isinstance(attack, Matching):
        return replace(attack, iterations=iterations or attack.iterations, restarts=restarts or attack.restarts)
    if isinstance(attack, Hybrid):
        return replace(attack, members=tuple(resized(member, iterations, restarts) for member in attack.members))
    return attack
