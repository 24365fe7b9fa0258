"""Which tensor of a file is which parameter of a model: by name, or by order where a file has no names of its own."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from rgap.printable import listed, shown
from rgap.target import Target
from rgap.tensorfiles import ReadError

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
FLOATING = (torch.float16, torch.bfloat16, torch.float32, torch.float64)


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
    names, by_order = match(tensors, target.parameters, target.model)
    for ours, theirs in names.items():
        got, expected = tensors[theirs], target.parameters[ours]
        if got.shape != expected.shape:
            raise ReadError(
                f"{both(ours, theirs)}: got a {what} of shape {tuple(got.shape)}, expected {tuple(expected.shape)} as "
                "the model has it"
            )
        if got.dtype not in FLOATING:
            raise ReadError(
                f"{both(ours, theirs)}: got a {what} of {got.dtype}, expected floating-point numbers of 16 to 64 bits"
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
    names = match(tensors, target.buffers, target.model)[0] if target.buffers else {}
    found = {ours: tensors[theirs] for ours, theirs in names.items()}
    return {name: t for name, t in found.items() if t.shape == target.buffers[name].shape}


def match(found: Mapping[str, Tensor], wanted: Mapping[str, Tensor], model: nn.Module) -> tuple[dict[str, str], bool]:
    """For each wanted name that the file has, the file's name for it; and whether they were matched by order."""
    tied = {name: others for name, others in _tied(model).items() if name in wanted}
    names = _by_name(found, dict.fromkeys([*wanted, *(other for others in tied.values() for other in others)]))
    for name, others in tied.items():
        there = next((names[each] for each in (name, *others) if each in names), None)
        if there is not None:
            names[name] = there
    names = {name: names[name] for name in wanted if name in names}
    return (names, False) if names else (_by_order(found, wanted, state_of(model)), True)


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
        for theirs in prefixes_of(found)
        for ours in prefixes_of(wanted)
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


def prefixes_of(names: Iterable[str]) -> set[str]:
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
    uncounted = {name: t for name, t in state.items() if not counts_batches(name)}
    for expected in (wanted, state, uncounted):
        if shapes == [t.shape or (1,) for t in expected.values()]:
            return {ours: theirs for ours, theirs in zip(expected, names, strict=True) if ours in wanted}
    return {}


def counts_batches(name: str) -> bool:
    """Whether it is a number of batches that batch norm has seen, which no model needs."""
    return name.split(".")[-1] == "num_batches_tracked"


def _in_order(names: list[str]) -> list[str]:
    """Numbered names by their numbers, and so too names that some writer sorted; others as they come."""
    stems = {re.sub(r"\d+$", "", name) for name in names}
    numbered = len(stems) == 1 and all(name[-1:].isdigit() for name in names)
    if not numbered and names != sorted(names):
        return names
    return sorted(names, key=lambda name: [(part.isdecimal(), part.zfill(20)) for part in re.split(r"(\d+)", name)])


def state_of(module: nn.Module) -> dict[str, Tensor]:
    return {name: t for name, t in module.state_dict().items() if isinstance(t, Tensor)}


def both(ours: str, theirs: str) -> str:
    return ours if ours == theirs else f"{ours} ({shown(theirs)} in the file)"
