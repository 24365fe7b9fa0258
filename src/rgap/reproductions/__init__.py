"""The paper's tables and figures again, each beside the paper's numbers."""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any, cast

from rgap.reproductions.catalogue import CATALOGUE

if TYPE_CHECKING:
    from rgap.reproductions.base import Job, Options, Reproduction, ReproductionError, reproduce

__all__ = ["CATALOGUE", "Job", "Options", "Reproduction", "ReproductionError", "by_name", "reproduce"]


def __getattr__(name: str) -> Any:
    """All else when it is first used: `rgap reproduce --help` needs no torch."""
    if name in __all__:
        return getattr(importlib.import_module("rgap.reproductions.base"), name)
    raise AttributeError(f"module 'rgap.reproductions' has no attribute {name!r}")


def by_name(name: str) -> Reproduction:
    """The reproduction of that name, imported now.

    Raises:
        ReproductionError: there is none; the message lists those there are.
    """
    if name not in CATALOGUE:
        error: type[Exception] = __getattr__("ReproductionError")
        raise error(f"unknown reproduction {name!r}: expected one of {', '.join(CATALOGUE)}")
    module, _, own = CATALOGUE[name].home.partition(".")
    return cast("Reproduction", getattr(importlib.import_module(f"rgap.reproductions.{module}"), own)())
