"""What the server of a federation was sent, round by round, as a folder of plain files.

    FOLDER/weights/<digest>.safetensors         weights that clients were given, each kept once
    FOLDER/round-0001/round.json                who was in the round, with which weights, and their metrics
    FOLDER/round-0001/node-<name>.safetensors   what each of them sent: an update as `Update.save` writes it

A round is there whole or not at all. A server that starts over captures its first round again: what it was sent before
stays, and the second capture is ``round-0001.2``. There are no paths in a round.json: the names of the files follow
from the names of the nodes and the digests of the weights, so that reading never leaves the folder.
"""

from __future__ import annotations

import copy
import hashlib
import json
import re
import shutil
import uuid
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors.torch import save as to_bytes
from torch import Tensor, nn

from rgap.files import plain, write_atomically
from rgap.reading import load_tensors
from rgap.reading import tensors as read_tensors
from rgap.schema import validator
from rgap.target import Target
from rgap.update import Update, UpdateError

FORMAT = 2
"""Version of round.json. Version 1, which has ``said`` for ``metrics``, is read too; others are refused."""

_NODE = re.compile(r"[A-Za-z0-9._-]{1,100}")
_ROUND = re.compile(r"round-(\d{4,})(?:\.(\d+))?")
ROW = validator(
    {
        "required": ["node", "weights", "failed", "metrics"],
        "properties": {
            "node": {"type": "string", "pattern": rf"^{_NODE.pattern}\Z"},
            "weights": {"type": "string", "pattern": r"^([0-9a-f]{32})?\Z"},
            "failed": {"type": "string"},
            "metrics": {"type": "object"},
        },
    }
)
"""What is kept of one node."""


@dataclass(frozen=True, eq=False)
class Received:
    """What one node sent in one round.

    Args:
        node: its name: letters, digits, dots, dashes and underscores.
        weights: those it was given: a state dict, as far as it was sent.
        update: None if what came is no update of the model.
        failed: why there is no update.
        metrics: what the node says of itself, such as its number of examples; ready for JSON.

    Raises:
        UpdateError: the name cannot be part of a file's, or there is neither an update nor a reason.
    """

    node: str
    weights: Mapping[str, Tensor]
    update: Update | None
    failed: str = ""
    metrics: Mapping[str, Any] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if not _NODE.fullmatch(self.node):
            raise UpdateError(
                f"got the node name {self.node[:100]!r}, expected 1 to 100 letters, digits, dots, dashes or underscores"
            )
        if (self.update is None) != bool(self.failed):
            raise UpdateError(f"node {self.node}: expected either an update or the reason why there is none")


@dataclass(frozen=True, eq=False)
class Round:
    """What all nodes sent in one round.

    Args:
        number: counted from 1.
        nodes: in the order in which their replies came.
        attempt: 2 if the same round was captured before, and so on; `write` counts.

    Raises:
        UpdateError: the number is negative, or two nodes have one name.
    """

    number: int
    nodes: tuple[Received, ...]
    attempt: int = 1

    def __post_init__(self) -> None:
        names = [each.node for each in self.nodes]
        if self.number < 0 or len(set(names)) < len(names):
            raise UpdateError(
                f"got round {self.number} with the nodes {', '.join(names[:8])}: expected a number from 0 on, and each "
                "node once"
            )

    @property
    def name(self) -> str:
        """As its folder is called."""
        return f"round-{self.number:04}" + ("" if self.attempt == 1 else f".{self.attempt}")

    def by_target(self, target: Target) -> list[tuple[Target, dict[str, Update]]]:
        """The target with the weights that were sent, and what came back, by node; most often they all got the same.

        Nodes without an update are left out.

        Args:
            target: the model, with whichever weights.

        Raises:
            UpdateError: weights or an update do not fit the model.
        """
        groups: dict[str, tuple[Target, dict[str, Update]]] = {}
        for each, digest, _ in _packed(self.nodes):
            if each.update is None:
                continue
            try:
                if digest not in groups:
                    groups[digest] = (given(target, each.weights), {})
                each.update.check(groups[digest][0])
            except UpdateError as error:
                raise UpdateError(f"round {self.number}, node {each.node}: {error}") from None
            groups[digest][1][each.node] = each.update
        return list(groups.values())


def given(target: Target, weights: Mapping[str, Tensor]) -> Target:
    """The target as a client saw it that was given these weights; the one that is passed is left as it is.

    Args:
        weights: a state dict; what is not trained may be missing, and is then the target's own.

    Raises:
        UpdateError: names, shapes or types do not fit, or a trained parameter is missing.
    """
    model = with_weights(target, weights)
    return Target(model, target.loss, target.input_shape, target.value_range, target.batch_size)


def with_weights(target: Target, weights: Mapping[str, Tensor]) -> nn.Module:
    """A copy of the target's model with these weights; arguments and errors are those of `given`."""
    model = copy.deepcopy(target.model)
    missing = [name for name in load_tensors(model, weights, partial=True) if name in target.parameters]
    if missing:
        raise UpdateError(
            f"the weights that were sent lack {', '.join(missing[:8])}, expected every parameter that is trained"
        )
    return model


def write(folder: str | Path, found: Round) -> Path:
    """Keep a round, all of it in one step.

    Args:
        folder: made if need be; its parents too.

    Returns:
        The round's own folder: not the one that it has from before, if it was there already.
    """
    folder = Path(folder)
    kept, temporary = folder / "weights", folder / f".round-{uuid.uuid4().hex}"
    for path in (kept, temporary):
        path.mkdir(parents=True, exist_ok=True)
    nodes = []
    try:
        for each, digest, content in _packed(found.nodes):
            path = kept / f"{digest}.safetensors"
            if digest and not path.is_file():
                write_atomically(path, content)
            if each.update is not None:
                each.update.save(temporary / f"node-{each.node}.safetensors")
            nodes.append({"node": each.node, "weights": digest, "failed": each.failed, "metrics": dict(each.metrics)})
        document = {"format": FORMAT, "round": found.number, "nodes": nodes}
        write_atomically(temporary / "round.json", json.dumps(plain(document), indent=1).encode())
        return _moved(temporary, folder, found.number)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def _moved(temporary: Path, folder: Path, number: int) -> Path:
    """The folder under the first name that is free, which another server may be taking at this moment."""
    attempt = 1
    while True:
        path = folder / (f"round-{number:04}" if attempt == 1 else f"round-{number:04}.{attempt}")
        try:
            return temporary.rename(path)
        except OSError:
            if not path.exists():
                raise
        attempt += 1


def _packed(nodes: Iterable[Received]) -> Iterator[tuple[Received, str, bytes]]:
    """Each node with digest and content of the file of its weights; both are empty if there are none."""
    packed: dict[int, tuple[str, bytes]] = {}
    for each in nodes:
        if id(each.weights) not in packed:  # most often all nodes share one
            packed[id(each.weights)] = _file(each.weights)
        yield each, *packed[id(each.weights)]


def _file(weights: Mapping[str, Tensor]) -> tuple[str, bytes]:
    if not weights:
        return "", b""
    content = to_bytes({name: t.detach().cpu().contiguous().clone() for name, t in weights.items()})
    return hashlib.sha256(content).hexdigest()[:32], content


def read(folder: str | Path) -> Iterator[Round]:
    """The rounds in a folder in order, one after another; nothing in the files is executed.

    Raises:
        UpdateError: no such folder; or a file is missing, truncated, changed, or not what `write` wrote.
    """
    folder = Path(folder)
    if not folder.is_dir():
        raise UpdateError(f"{folder}: no such folder; expected one that rgap.federation.write wrote")
    found = []
    for path in folder.iterdir():
        name = _ROUND.fullmatch(path.name)
        if name and path.is_dir():
            found.append((int(name[1]), int(name[2] or 1), path))
    if not found:
        raise UpdateError(f"{folder}: got no folder round-0001 or the like, expected one for each round")
    for number, attempt, path in sorted(found):
        yield _round(path, folder / "weights", number, attempt)


def _round(path: Path, weights: Path, number: int, attempt: int) -> Round:
    index = path / "round.json"
    document = _parsed(index)
    version = document.get("format")
    if version not in (1, FORMAT):
        raise UpdateError(
            f"{index}: got format {version!r}, expected {FORMAT}; read it with the version of rgap that wrote it"
        )
    rows = document.get("nodes")
    if document.get("round") != number or not isinstance(rows, list) or not all(isinstance(row, dict) for row in rows):
        raise UpdateError(f"{index}: expected an object with the round, which is {number}, and a list of nodes")
    loaded: dict[str, Mapping[str, Tensor]] = {"": {}}
    nodes = []
    for row in rows:
        if version == 1:
            row["metrics"] = row.pop("said", None)
        if not ROW.is_valid(row):
            raise UpdateError(f"{index}: a field of a node has the wrong type or value: {str(row)[:200]}")
        node, digest, failed, metrics = (row[name] for name in ("node", "weights", "failed", "metrics"))
        if digest not in loaded:
            loaded[digest] = _weights(weights / f"{digest}.safetensors")
        update = None if failed else Update.load(path / f"node-{node}.safetensors")
        nodes.append(Received(node, loaded[digest], update, failed, metrics))
    try:
        return Round(number, tuple(nodes), attempt)
    except UpdateError as error:
        raise UpdateError(f"{index}: {error}") from None


def _parsed(path: Path) -> dict[str, Any]:
    try:
        found = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise UpdateError(f"{path}: no such file; expected one in the folder of each round") from None
    except (OSError, ValueError, RecursionError) as error:
        raise UpdateError(f"{path}: not a whole JSON file ({error})") from error
    if not isinstance(found, dict):
        raise UpdateError(f"{path}: got a JSON {type(found).__name__}, expected an object")
    return found


def _weights(path: Path) -> Mapping[str, Tensor]:
    found = read_tensors(path)
    if _file(found)[0] != path.stem:
        raise UpdateError(f"{path}: its content is not what its name says: it was changed after it was written")
    return found
