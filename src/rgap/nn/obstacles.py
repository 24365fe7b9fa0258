"""What keeps a model from being a plain chain of layers: each operation with its kind and what to do about it."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import Enum


class Kind(Enum):
    """Why a model is no plain chain of layers."""

    PASSED = "the recursion passes it"

    NEVER = "never invertible"
    NOT_YET = "not supported yet"
    SETTING = "wrong setting"


@dataclass(frozen=True)
class Obstacle:
    """One thing in a model that keeps it from being a plain chain of layers; most of them the recursion passes."""

    where: str
    """The module or operation, such as ``features.3``."""
    what: str
    kind: Kind
    remedy: str

    def __str__(self) -> str:
        return f"{self.where}: {self.what} ({self.kind.value}). {self.remedy}"


class NotAChain(ValueError):
    """The model is no plain chain of layers; ``obstacles`` lists all that keeps it from being one."""

    def __init__(self, obstacles: Sequence[Obstacle]):
        self.obstacles = tuple(obstacles)
        lines = "\n".join(f"  - {obstacle}" for obstacle in obstacles)
        super().__init__(f"the model is no plain chain of layers, {len(obstacles)} obstacle(s):\n{lines}")


PASSED = (
    Kind.PASSED,
    "ranks are measured where nothing but activations, batch norm and reordering stands between the layers",
)
"""Of operations that the recursion passes."""
ROUTES = (Kind.PASSED, "where its maxima come from is found if the layer in front has enough rows for it")
MEANS = (Kind.PASSED, "what it averages is found if the layer in front has enough rows for it")
FOLLOWED = {
    "conv_transpose1d", "conv_transpose2d", "conv_transpose3d", "matmul", "mm", "addmm", "add", "sub", "mul", "div",
    "relu6", "hardtanh", "hardsigmoid", "gelu", "silu", "mish", "hardswish", "flip", "roll",
    "pixel_shuffle", "pixel_unshuffle", "channel_shuffle",
    "slice", "select", "split", "chunk", "narrow", "unbind", "cat", "pad", "permute", "transpose", "mT", "t",
    "upsample_nearest1d", "upsample_nearest2d", "upsample_nearest3d", "slice_scatter", "select_scatter",
}  # fmt: skip
"""Operations that the recursion passes."""
KNOWN: dict[str, tuple[Kind, str]] = {
    **dict.fromkeys(FOLLOWED, PASSED),
    **{f"{adaptive}max_pool{n}d": ROUTES for adaptive in ("", "adaptive_") for n in (1, 2, 3)},
    **{f"{adaptive}avg_pool{n}d": MEANS for adaptive in ("", "adaptive_") for n in (1, 2, 3)},
    "prelu": (Kind.PASSED, "where all its slopes are positive"),
    "mean": (Kind.NOT_YET, "replace it by a flatten and a Linear layer"),
    "clamp": (Kind.NEVER, "clamps values away"),
    "softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "log_softmax": (Kind.SETTING, "give the loss the raw outputs"),
    "abs": (Kind.NEVER, "loses the sign of every value"),
    "square": (Kind.NEVER, "loses the sign of every value"),
    "pow": (Kind.NEVER, "may lose the sign of every value"),
    "sign": (Kind.NEVER, "keeps nothing but signs, and its gradient is zero"),
    "round": (Kind.NEVER, "its gradient is zero"),
    "floor": (Kind.NEVER, "its gradient is zero"),
    "wrap_with_set_grad_enabled": (Kind.SETTING, "layers under no_grad send no gradient; compute them with gradients"),
    "wrap_with_autocast": (Kind.SETTING, "rounding is not followed; call the model without autocast"),
    "to": (Kind.NOT_YET, "what it rounds is not followed; keep the model's own precision"),
    "detach": (Kind.NEVER, "stops the gradient"),
    "argmax": (Kind.NEVER, "its gradient is zero"),
}


def known(operation: str) -> bool:
    """Whether an operation is one of those here."""
    return operation in KNOWN


def about(operation: str) -> tuple[Kind, str]:
    """The kind of an operation that no plain chain holds, and the remedy."""
    return KNOWN.get(operation, (Kind.NOT_YET, "no rule for it; replace it or attack the part of the model after it"))
