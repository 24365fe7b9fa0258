"""Gradients, weight differences and weights as other people have them on disk.

Tensors are matched to the model's parameters by name, or by order where the file has no names of its own.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rgap import naming
from rgap.naming import WRAPPERS, Matched, matched
from rgap.printable import listed
from rgap.protocol import Protocol, Sends
from rgap.target import Target
from rgap.tensorfiles import LARGEST, NESTS, ReadError, Room, guarded, read, tensors
from rgap.update import PLAIN, Header, Update, UpdateError

__all__ = [
    "LARGEST", "NESTS", "WRAPPERS", "HeaderWins", "Matched", "ReadError", "load_tensors", "load_weights", "matched",
    "read_pair", "read_update", "tensors",
]  # fmt: skip


class HeaderWins(UserWarning):
    """An update file's own header contradicts what the caller says of it; the header is taken."""


def read_update(
    path: str | Path,
    target: Target,
    protocol: Protocol = PLAIN,
    batch_size: int = 1,
    partial: bool = False,
    largest: int | None = None,
) -> Update:
    """An update from a file: one that `Update.save` wrote, or any that `tensors` reads.

    Args:
        protocol, batch_size: what the client did, where the file does not say. A weight difference is the weights
            after its local steps less those before. A file with a header of its own is
            taken at its word; if what is given here is another than the default and contradicts it, a `HeaderWins`
            warning says so.
        partial: take what is there if parameters are missing: frozen or withheld layers.
        largest: how many bytes the file may hold, or claim to hold; None: what is ample for the model.

    Raises:
        UpdateError: the file cannot be read or does not fit the target: names, shapes, types, values.
    """
    path = Path(path)
    found, own = read(path, Room.of(naming.state_of(target.model), largest))
    if own:
        with guarded(path, "update"):
            update = Update.load(path)
        with _named(path):
            update.check(target, partial)
        _compare(path, update.header, protocol, batch_size)
        return update
    with _named(path):
        values = _fitting(matched(found, target), target, partial)
        if _are_weights(values, target):
            raise ReadError(
                "got the target's own weights, expected gradients or a weight difference; for weights before and after "
                "training use read_pair"
            )
        return Update(values, _header(protocol, batch_size))


def _are_weights(values: Mapping[str, Tensor], target: Target) -> bool:
    same = all(torch.equal(value, target.parameters[name].to(value)) for name, value in values.items())
    return same and any(bool(value.any()) for value in values.values())


def read_pair(
    before: str | Path,
    after: str | Path,
    target: Target,
    protocol: Protocol,
    batch_size: int = 1,
    partial: bool = False,
    largest: int | None = None,
) -> Update:
    """The weight difference between two files: what a client sent less what it was given, and its buffers.

    The difference is taken in float64 and kept in the files' own type, the coarser one if they have two. Running
    statistics that moved say that the client was in training mode: so does the header then.

    Args:
        before: the weights the client was given; they must be the target's, up to the rounding of their type.
        after: its weights after local training.
        protocol: how it trained; it sends a difference.
        batch_size, partial, largest: as for `read_update`.

    Raises:
        UpdateError: a file cannot be read or does not fit the target, or 'before' holds other weights.
        ValueError: the protocol is that of a gradient.
    """
    if protocol.sends is not Sends.DIFFERENCE:
        raise ValueError(
            "got the protocol of a client that sends a gradient, expected that of one that sends a weight difference: "
            "Protocol(Sends.DIFFERENCE, steps, learning_rate)"
        )
    (old, held), (new, buffers) = (_weights(Path(path), target, partial, largest) for path in (before, after))
    with _named(Path(before)):
        _check_weights(old, target)
    with _named(Path(after)):
        both = {name: (old[name], t) for name, t in new.items() if name in old}
        values = {name: (t.double() - t0.double()).to(_coarser(t0.dtype, t.dtype)) for name, (t0, t) in both.items()}
        statistics = [name for name in buffers if name in held and name.split(".")[-1] in naming.STATISTICS]
        moved = any(not torch.equal(held[name], buffers[name]) for name in statistics)
        return Update(values, replace(_header(protocol, batch_size), training=True if moved else None), buffers)


def _weights(
    path: Path, target: Target, partial: bool, largest: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained parameters in a file, and the buffers."""
    found, own = read(path, Room.of(naming.state_of(target.model), largest))
    with _named(path):
        _refuse_update(own)
        return dict(_fitting(matched(found, target, "weight"), target, partial)), naming.buffers_in(found, target)


def _refuse_update(own: bool) -> None:
    if own:
        raise ReadError("got an update written by rgap, expected weights; read it with read_update")


def _coarser(*dtypes: torch.dtype) -> torch.dtype:
    return max(dtypes, key=lambda dtype: torch.finfo(dtype).eps)


def _check_weights(weights: Mapping[str, Tensor], target: Target) -> None:
    """Refuse weights that are not the target's, up to the rounding of the coarser type."""
    apart = {}
    for name, weight in weights.items():
        own = target.parameters[name].cpu()
        limits = torch.finfo(_coarser(weight.dtype, own.dtype))
        difference = (weight.double() - own.double()).abs()
        if not bool((difference <= limits.eps * own.double().abs() + limits.tiny * limits.eps).all()):
            scale = max(float(own.abs().max()), float(weight.abs().max()), limits.tiny)
            apart[name] = float(difference.max()) / scale
    if apart:
        # NaN compares with nothing: it is put first.
        most = max(apart, key=lambda name: math.inf if math.isnan(apart[name]) else apart[name])
        raise ReadError(
            f"the target has other weights than the file 'before': {len(apart)} of {len(weights)} parameters differ, "
            f"{most} most, by {apart[most]:.1e} of its largest value; expected the weights the client was given. "
            "Make the target with them."
        )


def load_weights(module: nn.Module, path: str | Path, largest: int | None = None, ignore: tuple[str, ...] = ()) -> None:
    """Load a state dict from a file into a module, all of it. Nothing in the file is executed.

    Names are matched as by `matched`, buffers included. If the file is refused, the module stays as it was.

    Args:
        ignore: beginnings of names in the file that belong to no part of the model, such as a metric's.

    Raises:
        UpdateError: the file cannot be read; names are missing or unexpected; a shape or type does not fit.
    """
    path = Path(path)
    found, own = read(path, Room.of(naming.state_of(module), largest))
    with _named(path):
        _refuse_update(own)
        load_tensors(module, found, ignore=ignore)


def load_tensors(
    module: nn.Module, tensors: Mapping[str, Tensor], partial: bool = False, ignore: tuple[str, ...] = ()
) -> tuple[str, ...]:
    """Load a state dict into a module. If it is refused, the module stays as it was.

    A count of batches may be a fraction, an array of one, or missing: servers average it as if it were a weight.

    Args:
        tensors: buffers included; names are matched as by `matched`.
        partial: take what a server sent: what is missing stays as it was.
        ignore: beginnings of names in the file that belong to no part of the model.

    Returns:
        The names that are missing.

    Raises:
        ReadError: names are missing or unexpected; a shape or type does not fit.
    """
    state = naming.state_of(module)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(ignore)}
    names, _ = naming.match(tensors, state, module)
    used = set(names.values())
    missing = [name for name in state if name not in names and not naming.counts_batches(name)]
    extra = [name for name in tensors if name not in used]
    parts = [f"missing {listed(missing)}"] * (bool(missing) and not partial)
    parts += [f"unexpected {listed(extra)}"] * bool(extra)
    values = {ours: tensors[theirs] for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if naming.counts_batches(ours) and values[ours].numel() == 1:
            values[ours] = values[ours].to(state[ours].dtype).reshape(())
        got, expected = values[ours], state[ours]
        if got.shape != expected.shape:
            parts.append(f"{naming.both(ours, theirs)} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif (got.dtype in naming.FLOATING) != expected.is_floating_point() or got.is_complex():
            parts.append(f"{naming.both(ours, theirs)} has type {got.dtype}, expected {expected.dtype}")
    if parts:
        more = ". What belongs to no part of the model --ignore leaves out" if extra else ""
        raise ReadError(f"does not fit the model: {'; '.join(parts)}. Expected its whole state dict{more}.")
    try:
        module.load_state_dict(values, strict=False)  # what is missing and what is too much was told above
    except RuntimeError as error:
        raise ReadError(f"does not fit the model: {error}") from error
    return tuple(missing)


@contextmanager
def _named(path: Path) -> Iterator[None]:
    """Put the file's name before what is wrong with it."""
    try:
        yield
    except UpdateError as error:
        raise ReadError(f"{path}: {error}") from None


def _header(protocol: Protocol, batch_size: int) -> Header:
    if batch_size < 1:
        raise ReadError(f"got batch_size={batch_size}, expected 1 or more")
    return Header(batch_size, protocol=protocol)


def _compare(path: Path, header: Header, protocol: Protocol, batch_size: int) -> None:
    """Warn of what the caller says and the header does not."""
    pairs = [("protocol", protocol, PLAIN, header.protocol), ("batch_size", batch_size, 1, header.batch_size)]
    for name, given, default, stated in pairs:
        if given not in (default, stated):
            warnings.warn(
                f"{path}: got {name}={given}, but the file's own header says {stated}; the header is taken",
                HeaderWins,
                stacklevel=3,
            )


def _fitting(found: Matched, target: Target, partial: bool) -> Mapping[str, Tensor]:
    """The matched tensors; refused if parameters are missing or names unknown to the model are left over."""
    known, prefixes = set(naming.state_of(target.model)), naming.prefixes_of(found.left_over)
    unknown = [
        name
        for name in found.left_over
        if not found.by_order
        and name.split(".")[-1] not in naming.STATISTICS
        and not any(name.removeprefix(p) in known for p in prefixes)
    ]
    if not found.values or unknown or (found.missing and not partial):
        hint = (
            " If layers were frozen or withheld, pass partial=True (--partial)." if found.values and not unknown else ""
        )
        raise ReadError(
            f"the names in the file do not fit the model: {str(found).replace(chr(10), '; ')}. Expected one tensor "
            f"for each of {listed(target.parameters)}.{hint}"
        )
    return found.values
