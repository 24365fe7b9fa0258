"""What every attack of an audit runs behind: one that fails is a row with its reason, and stops nothing."""

from __future__ import annotations

from collections.abc import Sequence

from rgap.attacks import Attack, Reconstruction, Status
from rgap.checks import Preflight
from rgap.target import Target
from rgap.update import Update


def guarded(attack: Attack, target: Target, updates: Sequence[Update]) -> tuple[Reconstruction, ...]:
    """`Attack.many`; of the updates on which it fails, what it failed of."""
    try:
        return attack.many(target, updates)
    except Exception as error:
        if len(updates) > 1:  # the others may not be to blame
            return tuple(found for update in updates for found in guarded(attack, target, [update]))
        (update,) = updates
        return (
            Reconstruction(
                attack=attack.name,
                status=Status.NOT_CONVERGED,
                reason=_failed(error),
                answers=(),
                assumptions=(),
                preflight=Preflight((), ()),
                tolerance=update.tolerance,
                value_range=target.value_range,
            ),
        )


def obstacle_of(attack: Attack, target: Target, samples: int) -> str | None:
    """`Attack.obstacle`; what it failed of, where it fails."""
    try:
        return attack.obstacle(target, samples)
    except Exception as error:
        return _failed(error)


def _failed(error: Exception) -> str:
    text = str(error).strip().splitlines()
    return f"the attack failed: {type(error).__name__}" + (f": {text[0]}" if text else "")
