"""Clients with many samples of which nothing was recovered: what was tried, in place of pictures of noise."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby

from rgap.attacks import Status
from rgap.auditing.results import Case, Level, Result
from rgap.auditing.run import MANY

IN_VAIN = (Status.NOT_CONVERGED, Status.CUT_OFF)


@dataclass(frozen=True)
class Unread:
    """Of one audit. A picture of a few samples is shown whatever became of it, as it may show something all the same;
    of many that a search mixed and did not fit to the gradient it is noise."""

    cases: frozenset[int] = frozenset()
    """Their numbers."""
    sentences: tuple[str, ...] = ()
    """One for each client."""


def unread(cases: Sequence[Case]) -> Unread:
    """Which clients these are; of those whose samples are known the numbers tell, and none is left out."""
    numbers: set[int] = set()
    sentences = []
    for client, group in groupby(enumerate(cases), lambda each: _client(each[1].name)):
        at, own = zip(*group, strict=True)
        if len(own) >= MANY and all(map(_in_vain, own)):
            numbers.update(at)
            tried = "; ".join(map(_tried, own[0].results))
            sentences.append(
                f"{client}: nothing was recovered of its {len(own)} samples, so that no picture is shown. "
                f"Tried: {tried}."
            )
    return Unread(frozenset(numbers), tuple(sentences))


def _client(name: str) -> str:
    """Of a sample's name; that of a client's only sample is the client's."""
    return name.rpartition(", sample ")[0] or name


def _in_vain(case: Case) -> bool:
    """Whether all that attacks have of a sample that nobody knows is where a search stood."""
    stood = all(r.inputs is None or (r.status in IN_VAIN and not r.reproduced) for r in case.results)
    told = any(r.features for r in case.results)
    return case.truth is None and case.level is Level.NOTHING and bool(case.results) and stood and not told


def _tried(result: Result) -> str:
    missed = result.gradient_residual
    misfit = "" if math.isnan(missed) else f", misfit of the gradient {missed:.2g}"
    return f"{result.attack} ({result.status.value}{misfit})"
