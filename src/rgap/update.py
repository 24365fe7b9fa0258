"""What a client sends: the gradient of its loss, and what the client says about it. Never the data."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import MappingProxyType
from typing import Any

import safetensors
import torch
from numpy.typing import NDArray
from safetensors.torch import save as to_bytes
from torch import Tensor

from rgap.client import sent_by
from rgap.files import write_atomically
from rgap.inversion.rounding import stored_precision
from rgap.nn.models import trains
from rgap.printable import line, listed
from rgap.protocol import Optimiser, Protocol, Sends
from rgap.schema import of_fields, validator
from rgap.target import Target, fingerprint

FORMAT = 2
"""Version of the update file. Version 1, whose protocols know neither epochs nor minibatches, is read too; others are
refused."""


PLAIN = Protocol()
LOOSEST = 2.0**-5
"""A tolerance is never above this, that of float16: at a residual of 0.1 are pictures that are a tenth too dark, and
others of 19 dB, which nobody would call the same."""
NEGLIGIBLE = 1e-5
"""Part of the largest gradient below which one may be nothing but what rounding left of zero."""


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
    protocol: Protocol = PLAIN
    """What lies between the gradient and what was sent."""
    precision: float | None = None
    """How far rounding may have moved the gradient, relative to its size; None: as far as its type rounds."""

    def __post_init__(self) -> None:
        if self.batch_size != 1:  # else the client may just not say how many samples it has
            self.protocol.minibatches(self.batch_size)


@dataclass(frozen=True, eq=False, repr=False)
class Update:
    """Named gradients, or weight differences, frozen.

    Args:
        gradients: by parameter name, with the parameters' shapes; what the client sent, be it a gradient or, as the
            header's protocol says, a weight difference.
        header: what the client says about them.
        buffers: those that were sent beside them, as they are after the local steps: running statistics and the like.
    """

    gradients: Mapping[str, Tensor]
    header: Header = field(default_factory=Header)
    buffers: Mapping[str, Tensor] = field(default_factory=dict)

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
        buffers = {name: t.detach().clone() for name, t in self.buffers.items()}
        object.__setattr__(self, "buffers", MappingProxyType(buffers))

    def __str__(self) -> str:
        """What it is, in one line, without its values."""
        header, values = self.header, sum(g.numel() for g in self.gradients.values())
        kind = "gradient" if header.protocol.sends is Sends.GRADIENT else "weight difference"
        of = f"{header.batch_size} sample(s)" + (f", {header.loss} loss" if header.loss else "")
        size = f"{len(self.gradients)} tensors, {values:,} values in {str(self.dtype).removeprefix('torch.')}"
        return f"Update: {kind} of {of}; {size}, norm {self.norm:.3g}"

    __repr__ = __str__

    @property
    def dtype(self) -> torch.dtype:
        """The coarsest type among the gradients: it bounds what they can tell."""
        return max((g.dtype for g in self.gradients.values()), key=lambda dtype: torch.finfo(dtype).eps)

    @cached_property
    def precision(self) -> float:
        """How far rounding may have moved the gradient, relative to its size: that of its coarsest parameter.

        A gradient that is zero but for rounding, as of a bias in front of a batch norm in training mode, has few bits
        by itself. It says nothing of the others.
        """
        sizes = {name: float(g.double().square().mean().sqrt()) for name, g in self.gradients.items() if g.numel()}
        largest, least = max(sizes.values(), default=0.0), float(torch.finfo(self.dtype).eps)
        nothing = {
            name
            for name, size in sizes.items()
            if size < NEGLIGIBLE * largest and self.precisions[name] * size < least * largest
        }
        return max(each for name, each in self.precisions.items() if name not in nothing)

    @cached_property
    def precisions(self) -> Mapping[str, float]:
        """The same of each parameter, by its type, by the bits that its values use, and as the header says."""
        found = {name: stored_precision(g) for name, g in self.gradients.items()}
        certain = [each for each in found.values() if each.certain]
        coarsest = max([each.relative for each in certain] or [float(torch.finfo(self.dtype).eps)])
        least, steps = self.header.precision or 0.0, {each.step for each in certain}
        # What a few values leave open is taken to be as in the others; but where they end with the same bit as those,
        # as where float16 underflows, they were rounded to it.
        return {
            name: max(each.relative if each.certain or each.step in steps else min(each.relative, coarsest), least)
            for name, each in found.items()
        }

    @property
    def tolerance(self) -> float:
        """How well a recomputed gradient must agree with this one, relatively."""
        return tolerated(self.precision)

    @property
    def norm(self) -> float:
        """The Euclidean norm over all gradients."""
        return math.sqrt(sum(float(g.double().square().sum()) for g in self.gradients.values()))

    def samples(self, target: Target) -> int:
        """Over how many samples the gradient is averaged, all clients together: as the client says, else as the target
        expects."""
        return self.samples_of_one(target) * self.header.protocol.clients

    def samples_of_one(self, target: Target) -> int:
        """The samples of one client, as it says, else as the target expects."""
        return self.header.batch_size if self.header.batch_size != 1 else target.batch_size

    def to_gradient(self, target: Target) -> tuple[Update, tuple[str, ...]]:
        """The gradient of the mean loss behind what was sent, and what had to be taken for granted to get it.

        A gradient of a mean loss is given back as it is. What comes of a weight difference is less precise than its
        type: the weights were rounded, which are much larger than what they moved by.
        """
        protocol = self.header.protocol
        if protocol.sends is Sends.GRADIENT and not protocol.summed:
            return self, ()
        found, assumptions = protocol.undo(self.gradients, self.samples_of_one(target), target.parameters)
        plain = Protocol(clients=protocol.clients)
        dtype = self.dtype
        kept = {name: t.to(dtype) for name, t in found.items()}
        precision = self.precision
        if protocol.sends is Sends.DIFFERENCE and self.norm > 0:
            weights = math.sqrt(sum(float(target.parameters[n].double().square().sum()) for n in self.gradients))
            precision = max(precision, float(torch.finfo(dtype).eps) * (1 + weights / self.norm))
        one_step = len(protocol.minibatches(self.samples_of_one(target))) == 1
        buffers = self.buffers if one_step else {}  # else those of several batches
        return Update(kept, replace(self.header, protocol=plain, precision=precision), buffers), assumptions

    def with_batch(self, target: Target) -> Target:
        """The target as its network was in this update's batch, as far as the buffers that were sent tell."""
        protocol, own = self.header.protocol, self.samples_of_one(target)
        if not self.buffers or protocol.clients > 1 or len(protocol.minibatches(own)) > 1:
            return target
        return target.of_batch(self.buffers, self.gradients, own)

    def check(self, target: Target, partial: bool = False) -> None:
        """Refuse an update that is not one of this target's model.

        Args:
            partial: accept an update in which some parameters are missing: frozen or withheld layers.

        Raises:
            UpdateError: names, shapes or fingerprint do not fit; says what was got and what was expected.
        """
        missing = [] if partial else [name for name in target.parameters if name not in self.gradients]
        extra = [name for name in self.gradients if name not in target.parameters]
        if missing or extra:
            parts = [f"missing {listed(missing)}"] * bool(missing) + [f"unknown {listed(extra)}"] * bool(extra)
            raise UpdateError(
                f"the update's names do not fit the model: {'; '.join(parts)}. Expected one gradient for each of "
                f"{listed(list(target.parameters))}."
            )
        for name, gradient in self.gradients.items():
            got, expected = tuple(gradient.shape), tuple(target.parameters[name].shape)
            if got != expected:
                each = ", or the mean of one for each sample" if got[1:] == expected else ""
                raise UpdateError(
                    f"{name}: got a gradient of shape {got}, expected {expected} as the model has it{each}"
                )
        for name, value in self.buffers.items():
            own = target.buffers.get(name)
            if own is None or own.shape != value.shape:
                there = "no buffer of this name" if own is None else f"{tuple(own.shape)} as the model has it"
                raise UpdateError(f"{name}: got a buffer of shape {tuple(value.shape)}, expected {there}")
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
        tensors = {name: t.cpu().contiguous() for name, t in {**self.gradients, **self.buffers}.items()}
        header = asdict(self.header)
        protocol = header.pop("protocol")
        if header["precision"] is None:
            del header["precision"]
        kind, optimiser = protocol.pop("sends").value, protocol.pop("optimiser").value
        fields = {"format": FORMAT, "kind": kind, **header, "protocol": {**protocol, "optimiser": optimiser}}
        if self.buffers:
            fields["buffers"] = list(self.buffers)
        content = to_bytes(tensors, metadata={"rgap": json.dumps(fields)})
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
                header_text = (file.metadata() or {}).get("rgap")
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
        except safetensors.SafetensorError as error:
            raise UpdateError(
                f"{path}: not a whole safetensors file, it may be truncated ({line(str(error), 200)})"
            ) from error
        header, names = _header(header_text, path)
        missing = [name for name in names if name not in tensors]
        if missing:
            raise UpdateError(f"{path}: the buffers {listed(missing)} are not in the file, expected all in its header")
        buffers = {name: tensors.pop(name) for name in names}
        try:
            update = cls(tensors, header, buffers)
            if target is not None:
                update.check(target)
        except UpdateError as error:
            raise UpdateError(f"{path}: {error}") from None
        return update


def tolerated(precision: float) -> float:
    """The tolerance for a gradient of this precision: the square root of its rounding, and never above `LOOSEST`."""
    return min(math.sqrt(precision), LOOSEST)


LARGEST = 2**31
"""Nothing that a header counts is larger."""
HEADER = validator(
    {
        "required": ["batch_size"],
        "properties": {
            **of_fields(Header, maximum=LARGEST),
            "batch_size": {"type": "integer", "minimum": 1, "maximum": LARGEST},
            "precision": {"type": ["number", "null"], "minimum": 0},
            "buffers": {"type": "array", "items": {"type": "string"}, "uniqueItems": True},
        },
    }
)
OPTIMISERS = {"enum": [optimiser.value for optimiser in Optimiser]}
PROTOCOL = validator({"properties": {**of_fields(Protocol, maximum=LARGEST), "optimiser": OPTIMISERS}})


def _header(text: str | None, path: Path) -> tuple[Header, list[str]]:
    """What the client says, and the names of the buffers in the file."""
    if text is None:
        raise UpdateError(f"{path}: no rgap header; expected an update written by rgap.Update.save")
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise UpdateError(f"{path}: the header is not JSON ({line(str(error), 200)})") from error
    if not isinstance(found, dict):
        raise UpdateError(f"{path}: the header is {type(found).__name__}, expected an object")
    if found.get("format") not in (1, FORMAT):
        raise UpdateError(
            f"{path}: got update format {found.get('format')!r}, expected {FORMAT}; read it with the version of rgap "
            "that wrote it"
        )
    if found.get("kind") not in [sends.value for sends in Sends]:
        raise UpdateError(f"{path}: got an update of kind {found.get('kind')!r}, expected 'gradient' or 'difference'")
    if not HEADER.is_valid(found):
        raise UpdateError(f"{path}: a field of the header has the wrong type: {line(text, 200)}")
    header = {name: found[name] for name in HEADER.schema["properties"] if found.get(name) is not None}
    if "input_shape" in header:
        header["input_shape"] = tuple(header["input_shape"])
    buffers = header.pop("buffers", [])
    try:
        return Header(**header, protocol=_protocol(found["kind"], found.get("protocol", {}), path)), buffers
    except UpdateError:
        raise
    except ValueError as error:
        raise UpdateError(f"{path}: {error}") from error


def _protocol(kind: str, spec: Any, path: Path) -> Protocol:
    """The protocol of a header; fields that are not there have their defaults."""
    if not isinstance(spec, dict):
        raise UpdateError(f"{path}: the protocol is {type(spec).__name__}, expected an object")
    if not PROTOCOL.is_valid(spec):
        raise UpdateError(f"{path}: a field of the protocol has the wrong type or value: {line(str(spec), 200)}")
    fields = {name: spec[name] for name in PROTOCOL.schema["properties"] if name in spec}
    if "schedule" in fields:
        fields["schedule"] = tuple(fields["schedule"])
    return Protocol(Sends(kind), **fields | {"optimiser": Optimiser(spec.get("optimiser", Optimiser.SGD.value))})


def capture(
    target: Target,
    x: Tensor | NDArray[Any],
    y: Tensor | NDArray[Any] | Sequence[float | int],
    protocol: Protocol = PLAIN,
    generator: torch.Generator | None = None,
) -> Update:
    """What clients whose batches are x, y would send, computed in the model's own precision.

    The model is used as it stands, in its own mode; its gradients, weights, buffers and mode are left as they were.

    Args:
        x: (batch, *input_shape), of all clients one after another.
        y: (batch,), in the loss's labels, such as {-1, 1} for the binary losses.
        protocol: by default one client that sends the gradient of the mean loss.
        generator: draws the order of the samples, as torch's DataLoader does; None: one with the seed 0.

    Raises:
        ValueError: shapes or labels do not fit, or the samples cannot be shared out evenly among the clients or are
            fewer than a minibatch; says what was got and what was expected.
    """
    x, y = torch.as_tensor(x), torch.as_tensor(y)
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
    if len(x) % protocol.clients:
        raise ValueError(f"got {len(x)} samples for {protocol.clients} clients, expected the same number for each")
    model, own = target.model, len(x) // protocol.clients
    generator = generator or torch.Generator().manual_seed(0)
    each = [sent_by(target, x[at : at + own], y[at : at + own], protocol, generator) for at in range(0, len(x), own)]
    gradients, buffers = _mean([found for found, _ in each]), _mean([found for _, found in each])
    header = Header(own, target.loss.name, target.input_shape, fingerprint(model), trains(model), protocol)
    return Update(gradients, header, buffers if protocol.buffers else {})


def _mean(sent: Sequence[Mapping[str, Tensor]]) -> Mapping[str, Tensor]:
    """Of several clients' tensors by name; counts are rounded."""
    if len(sent) == 1:
        return sent[0]
    found = {name: torch.stack([each[name] for each in sent]) for name in sent[0]}
    return {n: t.mean(0) if t.is_floating_point() else t.double().mean(0).round().to(t) for n, t in found.items()}
