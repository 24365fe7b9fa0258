"""Gradients, weight differences and weights as other people have them on disk.

Tensors are matched to the model's parameters by name, or by order where the file has no names of its own.
"""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from torch import Tensor, nn

from rgap.printable import listed, shown
from rgap.protocol import Protocol, Sends
from rgap.target import Target
from rgap.tensorfiles import LARGEST, NESTS, ReadError, Room, guarded, read, tensors
from rgap.update import PLAIN, Header, Update, UpdateError

__all__ = [
    "LARGEST", "NESTS", "WRAPPERS", "HeaderWins", "Matched", "ReadError", "load_tensors", "load_weights", "matched",
    "read_pair", "read_update", "tensors",
]  # fmt: skip

WRAPPERS = (
    "module.", "_orig_mod.", "model.", "net.", "_module.", "_fsdp_wrapped_module.", "_checkpoint_wrapped_module.",
    "base_model.",
)  # fmt: skip
"""What DataParallel, torch.compile, Lightning, Opacus, FSDP, adapters and habit put before a parameter's name."""

INNER = re.compile(r"(?<=\.)(?:module|_orig_mod|_module|_fsdp_wrapped_module|_checkpoint_wrapped_module|base_layer)\.")
"""What they put into the middle of it where they wrap a part of the model."""

_DEEPEST = 4
"""How many wrappers may stand before one name."""

STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class HeaderWins(UserWarning):
    """An update file's own header contradicts what the caller says of it; the header is taken."""


@dataclass(frozen=True, eq=False)
class Matched:
    """Tensors of a file under the names of the parameters they belong to.

    Args:
        values: by parameter name, in the model's order and shapes.
        missing: trained parameters that the file does not have.
        left_over: names in the file that belong to no trained parameter, such as buffers.
        renamed: by parameter name, the file's name where it is another one.
        by_order: whether the file's names say nothing, and what is left over are the model's buffers.
    """

    values: Mapping[str, Tensor]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    renamed: Mapping[str, str]
    by_order: bool = False

    def __str__(self) -> str:
        lines = [f"{len(self.values)} of {len(self.values) + len(self.missing)} parameters are there"]
        lines += [f"missing: {listed(self.missing)}"] * bool(self.missing)
        lines += [f"left over: {listed(self.left_over)}"] * bool(self.left_over)
        if self.renamed:
            lines.append(f"renamed: {listed([f'{shown(theirs)} to {ours}' for ours, theirs in self.renamed.items()])}")
        return "\n".join(lines)


def matched(tensors: Mapping[str, Tensor], target: Target, what: str = "gradient") -> Matched:
    """The tensors that belong to the target's trained parameters.

    By name, wrappers inside of names left out where more fit then; if no name fits, by name after one prefix made of
    `WRAPPERS` is taken off all names (of the file, of the model, or of both); if none fits then, by order, if number
    and shapes agree one by one with the trained parameters or with the state dict, whole or without counts of batches.
    A tensor that the model has under several names may have any of them.

    Args:
        tensors: by the file's names, in the file's order.
        what: what the tensors are, for messages.

    Raises:
        ReadError: a shape or a type does not fit, or two prefixes fit equally well.
    """
    names, by_order = _match(tensors, target.parameters, target.model)
    for ours, theirs in names.items():
        got, expected = tensors[theirs], target.parameters[ours]
        if got.shape != expected.shape:
            raise ReadError(
                f"{_both(ours, theirs)}: got a {what} of shape {tuple(got.shape)}, expected {tuple(expected.shape)} as "
                "the model has it"
            )
        if got.dtype not in _FLOATING:
            raise ReadError(
                f"{_both(ours, theirs)}: got a {what} of {got.dtype}, expected floating-point numbers of 16 to 64 bits"
            )
    used = set(names.values())
    return Matched(
        {ours: tensors[theirs] for ours, theirs in names.items()},
        tuple(name for name in target.parameters if name not in names),
        tuple(name for name in tensors if name not in used),
        {ours: theirs for ours, theirs in names.items() if ours != theirs},
        by_order,
    )


def buffers_in(tensors: Mapping[str, Tensor], target: Target) -> dict[str, Tensor]:
    """The target's buffers among the tensors of a whole state dict, by the model's names; see `matched`."""
    names = _match(tensors, target.buffers, target.model)[0] if target.buffers else {}
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    return {name: t for name, t in found.items() if t.shape == target.buffers[name].shape}


def _match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, str], bool]:
    """For each wanted name that the file has, the file's name for it; and whether they were matched by order."""
    tied = {name: others for name, others in _tied(model).items() if name in wanted}
    names = _by_name(found, dict.fromkeys([*wanted, *(other for others in tied.values() for other in others)]))
    for name, others in tied.items():
        there = next((names[each] for each in (name, *others) if each in names), None)
        if there is not None:
            names[name] = there
    names = {name: names[name] for name in wanted if name in names}
    return (names, False) if names else (_by_order(found, wanted, _state(model)), True)


def _by_name(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    theirs, ours = _plain(found), _plain(wanted)
    exact = {name: name for name in wanted if name in set(found)}
    plain = {name: theirs[short] for short, name in ours.items() if short in theirs}
    if exact or plain:
        return plain if len(plain) > len(exact) else exact
    return {ours[short]: theirs[other] for short, other in _by_prefix(theirs, ours).items()}


def _plain(names: Iterable[str]) -> dict[str, str]:
    """Names by themselves without what wraps parts of a model; those that are another's then stay as they are."""
    found: dict[str, str] = {}
    for name in names:
        short = INNER.sub("", name)
        found[name if short in found else short] = name
    return found


def _tied(model: nn.Module) -> dict[str, tuple[str, ...]]:
    """The other names of each parameter that has several."""
    names: dict[int, list[str]] = {}
    for name, parameter in model.named_parameters(remove_duplicate=False):
        names.setdefault(id(parameter), []).append(name)
    return {name: tuple(same) for same in names.values() if len(same) > 1 for name in same}


def _by_prefix(found: Iterable[str], wanted: Iterable[str]) -> dict[str, str]:
    there = set(found)
    options = [
        {
            name: theirs + name[len(ours) :]
            for name in wanted
            if name.startswith(ours) and theirs + name[len(ours) :] in there
        }
        for theirs in _prefixes(found)
        for ours in _prefixes(wanted)
    ]
    most = max(map(len, options))
    best = [option for option in options if len(option) == most]
    if other := [option for option in best if option != best[0]]:
        one, two = (shown(next(iter(option.values()))) for option in (best[0], other[0]))
        raise ReadError(
            f"names such as {one} and {two} fit the model equally well, expected one set of names; "
            "keep the one that is meant"
        )
    return best[0]


def _prefixes(names: Iterable[str]) -> set[str]:
    """What could be taken off: every run of wrappers that some name begins with, and nothing."""
    found = {""}
    for name in names:
        prefix = ""
        for _ in range(_DEEPEST):
            prefix += next((wrapper for wrapper in WRAPPERS if name.startswith(prefix + wrapper)), "")
            found.add(prefix)
    return found


def _by_order(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    names = _in_order(list(found))
    shapes = [found[name].shape or (1,) for name in names]  # servers make one number an array of one
    uncounted = {name: t for name, t in state.items() if not _counts(name)}
    for expected in (wanted, state, uncounted):
        if shapes == [t.shape or (1,) for t in expected.values()]:
            return {ours: theirs for ours, theirs in zip(expected, names, strict=True) if ours in wanted}
    return {}


def _counts(name: str) -> bool:
    """Whether it is a number of batches that batch norm has seen, which no model needs."""
    return name.split(".")[-1] == "num_batches_tracked"


def _in_order(names: list[str]) -> list[str]:
    """Numbered names by their numbers, and so too names that some writer sorted; others as they come."""
    stems = {re.sub(r"\d+$", "", name) for name in names}
    numbered = len(stems) == 1 and all(name[-1:].isdigit() for name in names)
    if not numbered and names != sorted(names):
        return names
    return sorted(names, key=lambda name: [(part.isdecimal(), part.zfill(20)) for part in re.split(r"(\d+)", name)])


def _state(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def _both(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"{ours} ({shown(theirs)} in the file)"


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
    found, own = read(path, Room.of(_state(target.model), largest))
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
        values = {name: _difference(old[name], t) for name, t in new.items() if name in old}
        statistics = [name for name in buffers if name in held and name.split(".")[-1] in STATISTICS]
        moved = any(not torch.equal(held[name], buffers[name]) for name in statistics)
        return Update(values, replace(_header(protocol, batch_size), training=True if moved else None), buffers)


def _weights(
    path: Path, target: Target, partial: bool, largest: int | None
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The trained parameters in a file, and the buffers."""
    found, own = read(path, Room.of(_state(target.model), largest))
    with _named(path):
        _refuse_update(own)
        return dict(_fitting(matched(found, target, "weight"), target, partial)), buffers_in(found, target)


def _refuse_update(own: bool) -> None:
    if own:
        raise ReadError("got an update written by rgap, expected weights; read it with read_update")


def _difference(before: Tensor, after: Tensor) -> Tensor:
    return (after.double() - before.double()).to(_coarser(before.dtype, after.dtype))


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
    found, own = read(path, Room.of(_state(module), largest))
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
    state = _state(module)
    tensors = {name: t for name, t in tensors.items() if not name.startswith(ignore)}
    names, _ = _match(tensors, state, module)
    used = set(names.values())
    missing = [name for name in state if name not in names and not _counts(name)]
    extra = [name for name in tensors if name not in used]
    parts = [f"missing {listed(missing)}"] * (bool(missing) and not partial)
    parts += [f"unexpected {listed(extra)}"] * bool(extra)
    values = {ours: tensors[theirs] for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if _counts(ours) and values[ours].numel() == 1:
            values[ours] = values[ours].to(state[ours].dtype).reshape(())
        got, expected = values[ours], state[ours]
        if got.shape != expected.shape:
            parts.append(f"{_both(ours, theirs)} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif (got.dtype in _FLOATING) != expected.is_floating_point() or got.is_complex():
            parts.append(f"{_both(ours, theirs)} has type {got.dtype}, expected {expected.dtype}")
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
    known, prefixes = set(_state(target.model)), _prefixes(found.left_over)
    unknown = [
        name
        for name in found.left_over
        if not found.by_order
        and name.split(".")[-1] not in STATISTICS
        and not any(name.removeprefix(p) in known for p in prefixes)
    ]
    if not found.values or unknown or (found.missing and not partial):
        hint = " If layers were frozen or withheld, pass partial=True." if found.values and not unknown else ""
        raise ReadError(
            f"the names in the file do not fit the model: {str(found).replace(chr(10), '; ')}. Expected one tensor "
            f"for each of {listed(target.parameters)}.{hint}"
        )
    return found.values
