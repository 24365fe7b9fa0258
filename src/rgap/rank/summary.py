"""Many obstacles in few lines: a deep network has the same ones again and again."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rgap.files import plain
from rgap.nn.obstacles import Kind, Obstacle
from rgap.printable import listed

names = partial(listed, most=3)
"""A few of several names, and how many more there are."""


@dataclass(frozen=True)
class Group:
    """Obstacles with the same remedy."""

    what: tuple[str, ...]
    """Each different obstacle once."""
    where: tuple[str, ...]
    """Of every obstacle."""
    kind: Kind
    remedy: str

    @property
    def count(self) -> int:
        return len(self.where)

    def __str__(self) -> str:
        times = f"{self.count} x " if self.count > 1 else ""
        return times + names(self.what)

    @property
    def sentence(self) -> str:
        """What, where and what to do, for people."""
        if self.count == 1:
            return f"{self.where[0]}: {self.what[0]} ({self.kind.value}). {self.remedy}"
        return f"{self} ({self.kind.value}), at {names(self.where)}. {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return plain({"count": self.count, **asdict(self), "kind": self.kind.value})


def summarise(obstacles: Iterable[Obstacle]) -> tuple[Group, ...]:
    """Obstacles of one kind together, in the order in which each kind is first met."""
    found: dict[tuple[Kind, str], list[Obstacle]] = {}
    for obstacle in obstacles:
        found.setdefault((obstacle.kind, obstacle.remedy), []).append(obstacle)
    return tuple(
        Group(tuple(dict.fromkeys(o.what for o in same)), tuple(o.where for o in same), kind, remedy)
        for (kind, remedy), same in found.items()
    )
