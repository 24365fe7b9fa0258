"""Which job a worker does next: one of the network that it has at hand, which took it time to make or to train."""

from __future__ import annotations

from collections import deque
from collections.abc import Iterable


class Lanes:
    """Jobs that wait, by their network. Each worker is a lane: it stays with a network until no job of it is left, then
    goes to one that no other is at, and where there is none helps with the one of which most is left."""

    def __init__(self) -> None:
        self._left: dict[str, deque[str]] = {}
        self._at: dict[str, str] = {}

    def __bool__(self) -> bool:
        return bool(self._left)

    def fill(self, waiting: Iterable[tuple[str, str]]) -> None:
        """Keys and networks of all jobs that wait, in order."""
        self._left.clear()
        for key, network in waiting:
            self._left.setdefault(network, deque()).append(key)

    def give_back(self, waiting: Iterable[tuple[str, str]]) -> None:
        """Jobs that wait again, before all others of their networks."""
        for key, network in waiting:
            self._left.setdefault(network, deque()).appendleft(key)

    def next(self, lane: str) -> str | None:
        """The key of a lane's next job; None if none waits."""
        if not self._left:
            return None
        if self._at.get(lane) not in self._left:
            free = (network for network in self._left if network not in self._at.values())
            self._at[lane] = next(free, None) or max(self._left, key=lambda network: len(self._left[network]))
        network = self._at[lane]
        key = self._left[network].popleft()
        if not self._left[network]:
            del self._left[network]
        return key
