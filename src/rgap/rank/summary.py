"""Many obstacles in few lines: a deep network has the same ones again and again."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

from rgap.files import plain
from rgap.nn.obstacles import Kind, Obstacle
from rgap.printable import listed

names = partial(listed, most=3)
"""A few of several names, and how many more there are."""


def percent(part: float) -> str:
    """Two digits of a small one, and never 100 % of what is not all, nor 0 % of what is not nothing."""
    per_cent = 100 * part
    return f"{int(per_cent)} %" if per_cent >= 99 else f"{per_cent:.2g} %"


@dataclass(frozen=True)
class Group:
    """Obstacles with the same remedy."""

    what: tuple[str, ...]
    """Each different obstacle once."""
    times: tuple[int, ...]
    """How often each of them is met."""
    where: tuple[str, ...]
    """Of every obstacle."""
    kind: Kind
    remedy: str

    @property
    def count(self) -> int:
        return len(self.where)

    def __str__(self) -> str:
        return names([f"{n} x {what}" if n > 1 else what for what, n in zip(self.what, self.times, strict=True)])

    @property
    def sentence(self) -> str:
        """What, where and what to do, for people."""
        if self.count == 1:
            return f"{self.where[0]}: {self.what[0]} ({self.kind.value}). {self.remedy}"
        return f"{self} ({self.kind.value}), at {names(list(dict.fromkeys(self.where)))}. {self.remedy}"

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return plain({"count": self.count, **asdict(self), "kind": self.kind.value})


def summarise(obstacles: Iterable[Obstacle]) -> tuple[Group, ...]:
    """Obstacles of one kind together, in the order in which each kind is first met."""
    found: dict[tuple[Kind, str], list[Obstacle]] = {}
    for obstacle in obstacles:
        found.setdefault((obstacle.kind, obstacle.remedy), []).append(obstacle)
    groups = []
    for (kind, remedy), same in found.items():
        whats = Counter(o.what for o in same)
        groups.append(Group(tuple(whats), tuple(whats.values()), tuple(o.where for o in same), kind, remedy))
    return tuple(groups)
