"""What a client sends: the gradient of its loss, and what is said about it. Never the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from safetensors.torch import save as to_bytes
from torch import Tensor

from rgap.files import write_atomically
from rgap.target import Target, fingerprint

FORMAT = 1
"""Version of the update file. A reader refuses versions it does not know."""


class UpdateError(ValueError):
    """An update, or a file that should hold one, does not fit."""


@dataclass(frozen=True)
class Header:
    """What the client says of its update. None means that it does not say."""

    batch_size: int = 1
    """Over how many samples the gradient is averaged."""
    loss: str | None = None
    input_shape: tuple[int, ...] | None = None
    fingerprint: str | None = None
    """The model's, as `rgap.Target.fingerprint`."""
    training: bool | None = None
    """Whether the model was in training mode."""


@dataclass(frozen=True, eq=False)
class Update:
    """Named gradients, frozen.

    Args:
        gradients: by parameter name, with the parameters' shapes.
        header: what the client says about them.
    """

    gradients: Mapping[str, Tensor]
    header: Header = field(default_factory=Header)

    def __post_init__(self) -> None:
        if not self.gradients:
            raise UpdateError("the update holds no gradient: got 0 tensors, expected one for each trained parameter")
        kept = {}
        for name, gradient in self.gradients.items():
            if not gradient.is_floating_point():
                raise UpdateError(f"{name}: got {gradient.dtype}, expected floating-point gradients")
            bad = int((~gradient.isfinite()).sum())
            if bad:
                raise UpdateError(
                    f"{name}: {bad} of {gradient.numel()} values are NaN or infinite, expected finite gradients; "
                    "check the client's loss scaling"
                )
            kept[name] = gradient.detach().clone()
        object.__setattr__(self, "gradients", MappingProxyType(kept))

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest type among the gradients: it bounds what they can tell."""
        return max((g.dtype for g in self.gradients.values()), key=lambda dtype: torch.finfo(dtype).eps)

    @property
    def norm(self) -> float:
        """The Euclidean norm over all gradients."""
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))

    def samples(self, target: Target) -> int:
        """Over how many samples the gradient is averaged: as the client says, else as the target expects."""
        return self.header.batch_size if self.header.batch_size != 1 else target.batch_size

    def check(self, target: Target) -> None:
        """Refuse an update that is not one of this target's model.

        Raises:
            UpdateError: names, shapes or fingerprint do not fit; says what was got and what was expected.
        """
        missing = [name for name in target.parameters if name not in self.gradients]
        extra = [name for name in self.gradients if name not in target.parameters]
        if missing or extra:
            parts = [f"missing {_listed(missing)}"] * bool(missing) + [f"unknown {_listed(extra)}"] * bool(extra)
            raise UpdateError(
                f"the update's names do not fit the model: {'; '.join(parts)}. Expected one gradient for each of "
                f"{_listed(list(target.parameters))}."
            )
        for name, parameter in target.parameters.items():
            got, expected = tuple(self.gradients[name].shape), tuple(parameter.shape)
            if got != expected:
                raise UpdateError(f"{name}: got a gradient of shape {got}, expected {expected} as the model has it")
        if self.header.fingerprint not in (None, target.fingerprint):
            raise UpdateError(
                f"the update belongs to another model or another checkpoint: got fingerprint "
                f"{str(self.header.fingerprint)[:12]}, expected {target.fingerprint[:12]}. "
                "Load the weights with which the gradient was taken."
            )
        if self.header.input_shape not in (None, target.input_shape):
            raise UpdateError(
                f"the update was taken on inputs of shape {self.header.input_shape}, expected {target.input_shape}"
            )

    def save(self, path: str | Path) -> None:
        """Write a safetensors file with a JSON header, in one step: the file is there whole or not at all."""
        tensors = {name: g.cpu().contiguous() for name, g in self.gradients.items()}
        said = json.dumps({"format": FORMAT, "kind": "gradient", **asdict(self.header)})
        content = to_bytes(tensors, metadata={"rgap": said})
        write_atomically(path, content)

    @classmethod
    def load(cls, path: str | Path, target: Target | None = None) -> Update:
        """Read an update file; nothing in it is executed.

        Args:
            target: if given, the update must fit it; see `check`.

        Raises:
            UpdateError: no such file, not a whole update file, an unknown version, or not this target's.
        """
        path = Path(path)
        if not path.is_file():
            raise UpdateError(f"{path}: no such file; expected an update written by rgap.Update.save")
        try:
            with safetensors.safe_open(path, framework="pt") as file:
                said = (file.metadata() or {}).get("rgap")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise UpdateError(f"{path}: not a whole safetensors file, it may be truncated ({error})") from error
        header = _header(said, path)
        try:
            update = cls(tensors, header)
            if target is not None:
                update.check(target)
        except UpdateError as error:
            raise UpdateError(f"{path}: {error}") from None
        return update


def _header(said: str | None, path: Path) -> Header:
    if said is None:
        raise UpdateError(f"{path}: no rgap header; expected an update written by rgap.Update.save")
    try:
        found = json.loads(said)
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"{path}: the header is not JSON ({error})") from error
    if not isinstance(found, dict):
        raise UpdateError(f"{path}: the header is {type(found).__name__}, expected an object")
    if found.get("format") != FORMAT:
        raise UpdateError(
            f"{path}: got update format {found.get('format')!r}, expected {FORMAT}; read it with the version of rgap "
            "that wrote it"
        )
    if found.get("kind") != "gradient":
        raise UpdateError(f"{path}: got an update of kind {found.get('kind')!r}, expected 'gradient'")
    shape = found.get("input_shape")
    header: dict[str, Any] = {name: found.get(name) for name in ("batch_size", "loss", "fingerprint", "training")}
    right = (
        _is(header["batch_size"], int)
        and header["batch_size"] >= 1
        and all(header[n] is None or isinstance(header[n], str) for n in ("loss", "fingerprint"))
        and (header["training"] is None or isinstance(header["training"], bool))
        and (shape is None or (isinstance(shape, list) and all(_is(size, int) for size in shape)))
    )
    if not right:
        raise UpdateError(f"{path}: a field of the header has the wrong type: {said[:200]}")
    return Header(**header, input_shape=None if shape is None else tuple(shape))


def _is(value: Any, kind: type) -> bool:
    return isinstance(value, kind) and not isinstance(value, bool)


def _listed(names: list[str]) -> str:
    shown = ", ".join(names[:8])
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


def capture(target: Target, x: Tensor, y: Tensor) -> Update:
    """The update of a client whose batch is x, y: the gradient of the mean loss, taken in the model's own precision.

    The model is used as it stands, in its own mode; its gradients, buffers and mode are left as they were.

    Args:
        x: (batch, *input_shape).
        y: (batch,), in the loss's labels, such as {-1, 1} for the binary losses.

    Raises:
        ValueError: shapes or labels do not fit; says what was got and what was expected.
    """
    expected = ", ".join(map(str, target.input_shape))
    if tuple(x.shape[1:]) != target.input_shape or len(x) == 0:
        hint = ""
        if x.dim() == len(target.input_shape) + 1 and x.shape[1] == 1 and target.input_shape[0] == 3:
            hint = ": these are grey pictures, the model takes colour"
        elif tuple(x.shape) == target.input_shape:
            hint = ": the batch dimension is missing, use x[None]"
        raise ValueError(f"got inputs of shape {tuple(x.shape)}, expected (batch, {expected}){hint}")
    if tuple(y.shape) != (len(x),):
        raise ValueError(f"got labels of shape {tuple(y.shape)}, expected ({len(x)},), one for each input")
    target.loss.check_labels(y)
    model = target.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: t.detach().clone() for name, t in tensors.items()}
    trained = list(target.parameters)
    for name in trained:
        state[name].requires_grad_()
    like = state[trained[0]]
    outputs = torch.func.functional_call(model, state, (x.to(like),))
    loss = target.loss(outputs, y.to(like))
    gradients = torch.autograd.grad(loss, [state[name] for name in trained], allow_unused=True)
    return Update(
        {n: torch.zeros_like(state[n]) if g is None else g for n, g in zip(trained, gradients, strict=True)},
        Header(
            batch_size=len(x),
            loss=target.loss.name,
            input_shape=target.input_shape,
            fingerprint=fingerprint(model),
            training=model.training,
        ),
    )
