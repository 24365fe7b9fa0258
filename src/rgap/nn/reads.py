"""What modules read while a model runs."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def read_by(module: str) -> str:
    """The name of what a module reads among gradients, no parameter's."""
    return f"{module}:input"


@contextmanager
def listening(model: nn.Module, modules: Sequence[str]) -> Iterator[dict[str, Tensor]]:
    """What these modules read while the model runs, each by the name `read_by` gives it."""
    seen: dict[str, Tensor] = {}

    def listener(name: str) -> Callable[[nn.Module, tuple[Any, ...]], None]:
        def hook(module: nn.Module, arguments: tuple[Any, ...]) -> None:
            seen[read_by(name)] = arguments[0]

        return hook

    handles = [model.get_submodule(name).register_forward_pre_hook(listener(name)) for name in modules]
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()
