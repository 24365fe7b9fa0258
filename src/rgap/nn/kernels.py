"""Which of torch's code computes a model: what can be differentiated again and again, and with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint


class _Plain:
    """In place of `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


@contextmanager
def differentiable() -> Iterator[None]:
    """Attention and recurrent layers by their plain formulas, since fast kernels know no second derivative; and no
    checkpoints, which would compute a part again later, with the model's weights in place of those that are tried.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    both: dict[str, Any] = {
        "CheckpointFunction": _Plain,
        "_checkpoint_without_reentrant_generator": lambda *_, **__: iter([None]),
    }
    known: Any = {name: each for name, each in both.items() if hasattr(checkpoint, name)}
    try:
        with (
            mock.patch.multiple(checkpoint, **known),
            sdpa_kernel(SDPBackend.MATH),
            torch.backends.cudnn.flags(enabled=False),
        ):
            yield
    finally:
        torch.backends.mha.set_fastpath_enabled(fast)
