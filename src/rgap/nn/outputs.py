"""The outputs of a model among all that it returns."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

NAMES = ("logits", "out", "outputs", "output")
"""Under one of these a model that returns a dictionary, or an object like one, has its outputs."""

FIXED = (
    "What torch.export makes takes batches of the size that it was made with: export it with dynamic_shapes of the "
    "batch, or give the model that was exported"
)
"""What to do about a batch of another size."""


def outputs_of(result: Any) -> Any:
    """The outputs that the loss takes: of a dictionary those by their usual name or the only ones, of a tuple the
    first, since auxiliary heads come behind; a tensor as it is.

    Raises:
        TypeError: nothing tells which of several are meant; says what there is.
    """
    if isinstance(result, Mapping):
        found = next((result[name] for name in NAMES if name in result), None)
        if found is None and len(result) == 1:
            (found,) = result.values()
        if found is None:
            raise TypeError(
                f"the model returns {', '.join(map(str, result)) or 'nothing'}, expected one of {', '.join(NAMES)} "
                "among them, or a tensor alone"
            )
        return outputs_of(found)
    if isinstance(result, (tuple, list)) and len(result):
        return outputs_of(result[0])
    return outputs_of(result.logits) if hasattr(result, "logits") else result


def reason_of(error: Exception) -> str:
    """Why a model's code failed, in a line; with the kind of a failure whose own words say little."""
    if isinstance(error, ZeroDivisionError):
        return "it divides by zero, as batch norm in training mode does of a single value for each channel"
    said, kind = str(error).strip().partition("\n")[0], type(error).__name__
    return said if said and not isinstance(error, KeyError) else f"{kind}: {said}".rstrip(": ")


def of_fixed_batch(reason: str) -> bool:
    """Whether it is what torch.export made that refuses batches of another size than it was made with."""
    return "re-export" in reason or "Guard failed" in reason


def wrong_shape(shape: Sequence[int], reason: str) -> str:
    """That a model does not take a batch of this shape, and what to do, for people."""
    if "'indices'" in reason:  # as torch's embeddings refuse real numbers
        return (
            "the model takes whole numbers, which its embedding looks up: there is no input of real numbers to solve "
            "for. What leaks is which rows of the embedding have a gradient; rgap.tokens tells that set, exactly. To "
            "attack what is behind it, give the part of the model that takes embedded vectors"
        )
    wrong = f"the model does not take an input of shape ({', '.join(map(str, shape))}): {reason}. "
    if "required positional argument" in reason:
        return (
            f"{wrong}Of several inputs one is attacked: give each by its name, the attacked one first (--input-shape "
            "x=3,32,32 --input-shape meta=4), or a module of one input that fixes or splits off the others"
        )
    if of_fixed_batch(reason):
        return wrong + FIXED
    return f"{wrong}input_shape is one sample's shape without the batch: {_expected(shape, reason)}."


def _expected(shape: Sequence[int], reason: str) -> str:
    """What a shape should be, as far as torch's words on a layer tell."""
    channels = re.search(r"to have (\d+) channels", reason)
    if channels:
        return f"the model takes {channels[1]} channels, such as {','.join(map(str, (channels[1], *shape[2:])))}"
    values = re.search(r"\(\d+x(\d+) and (\d+)x\d+\)", reason)
    if values:
        return f"a Linear layer of the model takes {values[2]} values, and of this shape it is given {values[1]}"
    return "check it against the model"
