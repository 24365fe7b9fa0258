"""Gradients, weight differences and weights as other people have them on disk: read, never executed.

What a file is, its first bytes say, not its name. Tensors are matched to the model's parameters by name, or by order
where the file has no names of its own.
"""

from __future__ import annotations

import io
import math
import re
import warnings
import zipfile
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import safetensors
import torch
from torch import Tensor, nn

from rgap.protocol import Protocol, Sends
from rgap.target import Target
from rgap.update import PLAIN, Header, Update, UpdateError

LARGEST = 16 * 2**30
"""How many bytes a file may hold, or claim to hold, unless the caller says otherwise."""

NESTS = ("state_dict", "model", "model_state_dict", "gradients")
"""Under which of its keys a pickled dict may hold the dict of tensors."""

WRAPPERS = ("module.", "_orig_mod.", "model.", "net.", "_module.")
"""What DataParallel, torch.compile, Lightning, Opacus and habit put before a parameter's name."""

_DEEPEST = 4
"""How many wrappers may stand before one name."""

_FORMATS = "a .safetensors file, an .npz file, or a .pt, .pth, .bin or .ckpt file written by torch.save"
_AGAIN = "get it again from where it was made"
_SAVE = "Save the tensors by name with safetensors.torch.save_file, or torch.save({name: tensor, ...}, path)."

_MAGIC = b"\x6c\xfc\x9c\x46\xf9\x20\x6a\xa8\x50\x19"
"""Near the start of every file torch.save wrote before version 1.6."""
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")
_FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


class ReadError(UpdateError):
    """A file of tensors that cannot be read, or does not fit the model."""


class HeaderWins(UserWarning):
    """An update file's own header contradicts what the caller says of it; the header is taken."""


# Files to tensors.


def tensors(path: str | Path, largest: int = LARGEST) -> dict[str, Tensor]:
    """The named tensors in a file. Nothing in it is executed.

    Args:
        path: a safetensors file, an npz file, or one written by torch.save that holds a dict of tensors, by itself or
            under one of the keys in `NESTS`.
        largest: how many bytes the file may hold, or claim to hold.

    Returns:
        Tensors of the file's own shapes and types, in the file's order, except those of a safetensors file, which has
        no order of its own: by name.

    Raises:
        ReadError: no such file, damaged, of another kind, too large, or with anything but tensors in it.
    """
    return _read(Path(path), largest)[0]


def _read(path: Path, largest: int) -> tuple[dict[str, Tensor], bool]:
    """The tensors, and whether the file is an update that rgap wrote."""
    if not path.is_file():
        raise ReadError(f"{path}: no such file; expected {_FORMATS}")
    with _guarded(path, "readable"):
        size = path.stat().st_size
        with path.open("rb") as file:
            head = file.read(32)
    _allow(path, size, largest, "is a file of")
    own = False
    if head.startswith(b"PK\x03\x04"):
        found = _zipped(path, largest)
    elif head[:1] == b"\x80" and _MAGIC in head:
        found = _pickled(path, size, largest, zipped=False)
    elif head[8:9] == b"{":
        found, own = _safetensors(path, size)
    else:
        raise ReadError(f"{path}: got {_looks_like(head)}, expected {_FORMATS}; it may be truncated. {_SAVE}")
    if not found:
        raise ReadError(f"{path}: got 0 tensors, expected one for each parameter")
    return found, own


def _looks_like(head: bytes) -> str:
    if head.startswith(b"\x93NUMPY"):
        return "a single .npy array without a name"
    if head[:1] == b"\x80":
        return "a bare pickle, which is not opened: it could run code"
    return f"a file of another kind that begins with {head[:8]!r}" if head else "an empty file"


def _allow(path: Path, size: int, largest: int, doing: str) -> None:
    if size > largest:
        raise ReadError(
            f"{path}: {doing} {size:,} bytes, expected at most {largest:,}; if that is right, pass a larger `largest`"
        )


@contextmanager
def _guarded(path: Path, kind: str) -> Iterator[None]:
    """Whatever a library says of a file it cannot read, errors or warnings, becomes one ReadError."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            yield
        except UpdateError:
            raise
        except Exception as error:
            if isinstance(error, OSError) and error.filename is not None:
                raise ReadError(f"{path}: cannot be read ({error.strerror}); expected {_FORMATS}") from error
            raise ReadError(
                f"{path}: not a whole {kind} file, it may be truncated or changed ({_first_line(error)}); {_AGAIN}"
            ) from error


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    return f"{type(error).__name__}: {lines[0][:200]}" if lines else type(error).__name__


def _safetensors(path: Path, size: int) -> tuple[dict[str, Tensor], bool]:
    with _guarded(path, "safetensors"):
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
        if length > size - 8:
            raise ReadError(
                f"{path}: not a whole safetensors file, it may be truncated or changed: its header claims "
                f"{length:,} bytes, {size - 8:,} are there; {_AGAIN}"
            )
        # The library compares the sizes of the tensors with the file's before it makes any.
        with safetensors.safe_open(path, framework="pt") as opened:
            own = "rgap" in (opened.metadata() or {})
            # Cloned: what it gives is a view of the file.
            return {name: opened.get_tensor(name).clone() for name in sorted(opened.keys())}, own


def _zipped(path: Path, largest: int) -> dict[str, Tensor]:
    """What numpy.savez or torch.save wrote."""
    with _guarded(path, "zip"), zipfile.ZipFile(path) as archive:
        kind = _checked(path, archive, largest)
        if kind == "npz":
            for member in archive.infolist():
                with archive.open(member) as file:
                    _check_array(path, member, file)
    if kind == "npz":
        with _guarded(path, "npz"), np.load(path, allow_pickle=False) as arrays:
            return {name: _from_numpy(arrays[name]) for name in arrays.files}
    if path.suffix.lower() == ".safetensors":
        # torch.load would go by the name.
        raise ReadError(f"{path}: got a torch.save file of another name, expected .pt; rename it")
    return _pickled(path, path.stat().st_size, largest, zipped=True)


def _checked(path: Path, archive: zipfile.ZipFile, largest: int) -> str:
    """Which kind of zip file it is: "npz" or "pt". It is whole, of allowed size, and its checksums are right."""
    members = archive.infolist()
    names = [member.filename for member in members]
    if _members(path) not in (len(members), 0xFFFF):  # that many stands for more
        raise ReadError(f"{path}: not a whole zip file: the number of its members is wrong; {_AGAIN}")
    _allow(path, sum(member.file_size for member in members), largest, "holds, unpacked,")
    if len(set(names)) < len(names):
        raise ReadError(f"{path}: got two members of one name, expected each name once. {_SAVE}")
    ends = {name.split("/")[-1] for name in names}
    if "constants.pkl" in ends:
        raise ReadError(f"{path}: got a TorchScript archive, which is a program, expected tensors alone. {_SAVE}")
    if "data.pkl" in ends:
        kind, ways = "pt", [zipfile.ZIP_STORED]
    elif all(name.endswith(".npy") for name in names):
        kind, ways = "npz", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED]
    else:
        raise ReadError(f"{path}: got a zip file with {_listed(names)}, expected {_FORMATS}. {_SAVE}")
    packed = [member.filename for member in members if member.compress_type not in ways]
    if packed:
        raise ReadError(f"{path}: {_shown(packed[0])} is compressed in a way that its writer never does. {_SAVE}")
    broken = archive.testzip()
    if broken is not None:
        raise ReadError(f"{path}: {_shown(broken)} has a wrong checksum: it was changed; {_AGAIN}")
    return kind


def _members(path: Path) -> int:
    """How many members a zip file says it has: one that hides in another's comment is not seen otherwise."""
    with path.open("rb") as file:
        file.seek(-min(path.stat().st_size, 2**16 + 22), io.SEEK_END)
        tail = file.read()
    at = tail.rfind(b"PK\x05\x06")
    return int.from_bytes(tail[at + 10 : at + 12], "little")


def _check_array(path: Path, member: zipfile.ZipInfo, file: Any) -> None:
    """Refuse an array that is not of numbers, or claims another size than it has, before it is made."""
    readers = {(1, 0): np.lib.format.read_array_header_1_0, (2, 0): np.lib.format.read_array_header_2_0}
    version = np.lib.format.read_magic(file)
    if version not in readers:
        raise ReadError(f"{path}: {_shown(member.filename)} has npy version {version}, expected 1.0 or 2.0. {_SAVE}")
    shape, _, dtype = readers[version](file)
    if dtype.kind not in "biufc" or dtype.itemsize > (16 if dtype.kind == "c" else 8):
        kind = "objects, which are not opened: they could run code" if dtype.hasobject else f"type {dtype}"
        raise ReadError(
            f"{path}: {_shown(member.filename)} holds {kind}; expected numbers of at most 64 bits. "
            "Save one array of numbers for each parameter with numpy.savez."
        )
    claimed, there = math.prod(shape) * dtype.itemsize, member.file_size - file.tell()
    if claimed != there or min(shape, default=0) < 0:
        raise ReadError(
            f"{path}: {_shown(member.filename)} claims shape {shape}, {claimed:,} bytes, but holds {there:,}; {_AGAIN}"
        )


def _from_numpy(array: Any) -> Tensor:
    return torch.from_numpy(array.astype(array.dtype.newbyteorder("="), copy=False))


def _pickled(path: Path, size: int, largest: int, zipped: bool) -> dict[str, Tensor]:
    """What torch.save wrote.

    A zipped file is mapped, so that a tensor that claims more than is there cannot reach beyond the file; an older one
    is read from memory, which keeps torch from trying still older formats.
    """
    with _guarded(path, "torch.save"):
        source = path if zipped else io.BytesIO(path.read_bytes())
        try:
            found = torch.load(source, map_location="cpu", weights_only=True, mmap=zipped)
        except Exception as error:
            asked = re.search(r"GLOBAL (\S+)|[Uu]nsupported class (\S+)", str(error))
            if asked is None:
                raise
            got = f"a pickle that asks for {_shown(asked[1] or asked[2])}"
            raise ReadError(f"{path}: got {got}, expected tensors alone; nothing was executed. {_SAVE}") from error
        return _owned(path, _flat(path, found), size, largest)


def _flat(path: Path, found: Any) -> dict[str, Tensor]:
    """The dict of tensors in what was unpickled."""
    expected = f"expected a dict of tensors by name, by itself or under one of {', '.join(NESTS)}. {_SAVE}"
    if not isinstance(found, dict):
        raise ReadError(f"{path}: got a {type(found).__name__}, {expected}")
    nests = [key for key in NESTS if isinstance(found.get(key), dict)]
    if len(nests) > 1:
        raise ReadError(f"{path}: got dicts under {' and '.join(nests)}, expected one. {_SAVE}")
    within = f" under {nests[0]}" if nests else ""
    values = found[nests[0]] if nests else found
    wrong = [f"{key!r} ({type(v).__name__})" for key, v in values.items() if not (isinstance(key, str) and _plain(v))]
    if wrong:
        raise ReadError(f"{path}: got a dict{within} with {_listed(wrong)}, {expected}")
    return dict(values)


def _plain(value: Any) -> bool:
    return (
        isinstance(value, Tensor)
        and value.layout is torch.strided
        and value.device.type == "cpu"
        and not value.is_quantized
        and not value.is_nested
    )


def _owned(path: Path, found: dict[str, Tensor], size: int, largest: int) -> dict[str, Tensor]:
    """Copies of what the tensors see of their storage; one that repeats a number keeps doing so."""
    spans = {
        name: 1 + sum((n - 1) * step for n, step in zip(t.shape, t.stride(), strict=True)) if t.numel() else 0
        for name, t in found.items()
    }
    claimed = sum(max(spans[name], t.numel()) * t.element_size() for name, t in found.items())
    _allow(path, claimed, largest, "claims tensors of")
    large = [name for name, t in found.items() if t.untyped_storage().nbytes() > size]
    if large:
        raise ReadError(f"{path}: {_shown(large[0])} claims more than the {size:,} bytes that the file has")
    kept = {}
    for name, t in found.items():
        flat = t.detach().as_strided((spans[name],), (1,), t.storage_offset()).clone()
        kept[name] = flat.as_strided(t.shape, t.stride(), 0)
    return kept


# Names in the file to names in the model.


@dataclass(frozen=True, eq=False)
class Matched:
    """Tensors of a file under the names of the parameters they belong to.

    Args:
        values: by parameter name, in the model's order and shapes.
        missing: trained parameters that the file does not have.
        left_over: names in the file that belong to no trained parameter, such as buffers.
        renamed: by parameter name, the file's name where it is another one.
    """

    values: Mapping[str, Tensor]
    missing: tuple[str, ...]
    left_over: tuple[str, ...]
    renamed: Mapping[str, str]

    def __str__(self) -> str:
        lines = [f"{len(self.values)} of {len(self.values) + len(self.missing)} parameters are there"]
        lines += [f"missing: {_listed(self.missing)}"] * bool(self.missing)
        lines += [f"left over: {_listed(self.left_over)}"] * bool(self.left_over)
        if self.renamed:
            lines.append(
                f"renamed: {_listed([f'{_shown(theirs)} to {ours}' for ours, theirs in self.renamed.items()])}"
            )
        return "\n".join(lines)


def matched(tensors: Mapping[str, Tensor], target: Target, what: str = "gradient") -> Matched:
    """The tensors that belong to the target's trained parameters.

    By name; if no name fits, by name after one prefix made of `WRAPPERS` is taken off all names (of the file, of the
    model, or of both); if none fits then, by order, if number and shapes agree one by one with the trained
    parameters or with the whole state dict.

    Args:
        tensors: by the file's names, in the file's order.
        what: what the tensors are, for messages.

    Raises:
        ReadError: a shape or a type does not fit, or two prefixes fit equally well.
    """
    names = _match(tensors, target.parameters, _state(target.model))
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
    )


def _match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], state: Mapping[str, Tensor]) -> dict[str, str]:
    """For each wanted name that the file has, the file's name for it."""
    exact = {name: name for name in wanted if name in found}
    return exact or _by_prefix(found, wanted) or _by_order(found, wanted, state)


def _by_prefix(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor]) -> dict[str, str]:
    options = [
        {
            name: theirs + name[len(ours) :]
            for name in wanted
            if name.startswith(ours) and theirs + name[len(ours) :] in found
        }
        for theirs in _prefixes(found)
        for ours in _prefixes(wanted)
    ]
    most = max(map(len, options))
    best = [option for option in options if len(option) == most]
    if other := [option for option in best if option != best[0]]:
        one, two = (_shown(next(iter(option.values()))) for option in (best[0], other[0]))
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
    shapes = [found[name].shape for name in names]
    for expected in (wanted, state):
        if shapes == [t.shape for t in expected.values()]:
            return {ours: theirs for ours, theirs in zip(expected, names, strict=True) if ours in wanted}
    return {}


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
    return ours if ours == theirs else f"{ours} ({_shown(theirs)} in the file)"


def _shown(name: str) -> str:
    """A name from a file, without what would upset a terminal."""
    name = name if len(name) <= 100 else f"{name[:100]}..."
    return name if name.isprintable() else repr(name)


def _listed(names: Iterable[str]) -> str:
    names = list(names)
    shown = ", ".join(map(_shown, names[:8]))
    return shown if len(names) <= 8 else f"{shown} and {len(names) - 8} more"


# Tensors to updates and weights.


def read_update(
    path: str | Path,
    target: Target,
    protocol: Protocol = PLAIN,
    batch_size: int = 1,
    partial: bool = False,
    largest: int = LARGEST,
) -> Update:
    """An update from a file: one that `Update.save` wrote, or any that `tensors` reads.

    Args:
        protocol, batch_size: what the client did, where the file does not say. A weight difference is the weights
            after its local steps less those before. A file with a header of its own is
            taken at its word; if what is given here is another than the default and contradicts it, a `HeaderWins`
            warning says so.
        partial: take what is there if parameters are missing: frozen or withheld layers.
        largest: as for `tensors`.

    Raises:
        UpdateError: the file cannot be read or does not fit the target: names, shapes, types, values.
    """
    path = Path(path)
    found, own = _read(path, largest)
    if own:
        with _guarded(path, "update"):
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
    largest: int = LARGEST,
) -> Update:
    """The weight difference between two files: what a client sent less what it was given.

    The difference is taken in float64 and kept in the files' own type, the coarser one if they have two.

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
    old, new = (_weights(Path(path), target, partial, largest) for path in (before, after))
    with _named(Path(before)):
        _check_weights(old, target)
    with _named(Path(after)):
        values = {name: _difference(old[name], t) for name, t in new.items() if name in old}
        return Update(values, _header(protocol, batch_size))


def _weights(path: Path, target: Target, partial: bool, largest: int) -> dict[str, Tensor]:
    found, own = _read(path, largest)
    with _named(path):
        _refuse_update(own)
        return dict(_fitting(matched(found, target, "weight"), target, partial))


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


def load_weights(module: nn.Module, path: str | Path, largest: int = LARGEST) -> None:
    """Load a state dict from a file into a module, all of it. Nothing in the file is executed.

    Names are matched as by `matched`, buffers included. If the file is refused, the module stays as it was.

    Raises:
        UpdateError: the file cannot be read; names are missing or unexpected; a shape or type does not fit.
    """
    path = Path(path)
    found, own = _read(path, largest)
    with _named(path):
        _refuse_update(own)
        load_tensors(module, found)


def load_tensors(module: nn.Module, tensors: Mapping[str, Tensor], partial: bool = False) -> tuple[str, ...]:
    """Load a state dict into a module. If it is refused, the module stays as it was.

    Args:
        tensors: buffers included; names are matched as by `matched`.
        partial: take what a server sent: what is missing stays as it was, and the count of batches, which servers
            average as if it were a weight, may be a fraction.

    Returns:
        The names that are missing.

    Raises:
        ReadError: names are missing or unexpected; a shape or type does not fit.
    """
    state = _state(module)
    names = _match(tensors, state, state)
    used = set(names.values())
    missing = [name for name in state if name not in names]
    extra = [name for name in tensors if name not in used]
    parts = [f"missing {_listed(missing)}"] * (bool(missing) and not partial)
    parts += [f"unexpected {_listed(extra)}"] * bool(extra)
    values = {ours: tensors[theirs] for ours, theirs in names.items()}
    for ours, theirs in names.items():
        if partial and ours.split(".")[-1] == "num_batches_tracked":
            values[ours] = values[ours].to(state[ours].dtype)
        got, expected = values[ours], state[ours]
        if got.shape != expected.shape:
            parts.append(f"{_both(ours, theirs)} has shape {tuple(got.shape)}, expected {tuple(expected.shape)}")
        elif (got.dtype in _FLOATING) != expected.is_floating_point() or got.is_complex():
            parts.append(f"{_both(ours, theirs)} has type {got.dtype}, expected {expected.dtype}")
    if parts:
        raise ReadError(f"does not fit the model: {'; '.join(parts)}. Expected its whole state dict.")
    try:
        module.load_state_dict(values, strict=not partial)
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
        if name.split(".")[-1] not in STATISTICS and not any(name.removeprefix(p) in known for p in prefixes)
    ]
    if not found.values or unknown or (found.missing and not partial):
        hint = " If layers were frozen or withheld, pass partial=True." if found.values and not unknown else ""
        raise ReadError(
            f"the names in the file do not fit the model: {str(found).replace(chr(10), '; ')}. Expected one tensor "
            f"for each of {_listed(target.parameters)}.{hint}"
        )
    return found.values
