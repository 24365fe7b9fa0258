"""Which of torch's code computes a model: what can be differentiated again and again, and with other weights."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils import checkpoint


class _Plain:
    """In place of `torch.utils.checkpoint.CheckpointFunction`."""

    @staticmethod
    def apply(function: Callable[..., Any], preserve: bool, *arguments: Any) -> Any:
        return function(*arguments)


_PATCHED = {
    name: each
    for name, each in {
        "CheckpointFunction": _Plain,
        "_checkpoint_without_reentrant_generator": lambda *_, **__: iter([None]),
    }.items()
    if hasattr(checkpoint, name)
}


@contextmanager
def differentiable() -> Iterator[None]:
    """Attention and recurrent layers by their plain formulas, since fast kernels know no second derivative; and no
    checkpoints, which would compute a part again later, with the model's weights in place of those that are tried.
    """
    fast = torch.backends.mha.get_fastpath_enabled()
    torch.backends.mha.set_fastpath_enabled(False)
    plain = {name: getattr(checkpoint, name) for name in _PATCHED}
    vars(checkpoint).update(_PATCHED)
    try:
        with sdpa_kernel(SDPBackend.MATH), torch.backends.cudnn.flags(enabled=False):
            yield
    finally:
        vars(checkpoint).update(plain)
        torch.backends.mha.set_fastpath_enabled(fast)
