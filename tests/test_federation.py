"""The folder of a federation: what is read is what was written, whole or not at all, and nothing leads out of it."""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, UpdateError, capture, federation, losses
from rgap.federation import Received, Round, given, read, write
from rgap.protocol import Protocol, Sends

DIFFERENCE = Protocol(Sends.DIFFERENCE, learning_rate=0.1)


def make_target(seed: int = 0) -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1)).eval()
    return Target(model, losses.Logistic(), (4,), (-3.0, 3.0), batch_size=2)


def state(target: Target) -> dict[str, Tensor]:
    return {name: t.detach().clone() for name, t in target.model.state_dict().items()}


def sent(target: Target, seed: int) -> Update:
    x = torch.randn(2, 4, generator=torch.Generator().manual_seed(seed))
    return capture(target, x, torch.tensor([1.0, -1.0]), DIFFERENCE)


def make_round(number: int = 1) -> Round:
    """Two nodes with the same weights, one with others, and one whose reply was no update."""
    one, two = make_target(0), make_target(1)
    weights = state(one)
    return Round(
        number,
        (
            Received("7", weights, sent(one, 7), metrics={"num-examples": 2, "loss": 0.5, "per-class": [1, 2]}),
            Received("9", weights, sent(one, 9)),
            Received("8", weights, None, "NaN", {"loss": math.nan}),
            Received("10", state(two), sent(two, 10)),
            Received("11", {}, None, "it was sent nothing"),
        ),
    )


def only(folder: Path) -> Round:
    (found,) = read(folder)
    return found


# What is written.


def test_what_is_read_is_what_was_written(tmp_path: Path) -> None:
    wrote = make_round(3)
    path = write(tmp_path / "new" / "folder", wrote)
    assert path.name == "round-0003"
    found = only(tmp_path / "new" / "folder")
    assert (found.number, found.attempt) == (3, 1)
    assert [node.node for node in found.nodes] == ["7", "9", "8", "10", "11"]
    for one, two in zip(wrote.nodes, found.nodes, strict=True):
        assert one.failed == two.failed
        assert {n: t.dtype for n, t in one.weights.items()} == {n: t.dtype for n, t in two.weights.items()}
        assert all(torch.equal(t, two.weights[name]) for name, t in one.weights.items())
        if one.update is None or two.update is None:
            assert one.update is two.update
            continue
        assert one.update.header == two.update.header
        assert all(torch.equal(t, two.update.gradients[name]) for name, t in one.update.gradients.items())
    assert found.nodes[0].metrics == {"num-examples": 2, "loss": 0.5, "per-class": [1, 2]}
    assert found.nodes[2].metrics == {"loss": None}  # JSON has no NaN


def test_weights_are_kept_once_by_content(tmp_path: Path) -> None:
    for number in (1, 2):
        write(tmp_path, make_round(number))
    assert len(list((tmp_path / "weights").iterdir())) == 2
    assert len(list(read(tmp_path))) == 2


def test_rounds_come_in_order_of_their_numbers(tmp_path: Path) -> None:
    for number in (12000, 2, 10, 1):
        write(tmp_path, Round(number, make_round().nodes[:1]))
    assert [each.number for each in read(tmp_path)] == [1, 2, 10, 12000]


def test_a_round_that_is_captured_again_stands_beside_the_first(tmp_path: Path) -> None:
    nodes = make_round().nodes
    paths = [write(tmp_path, Round(1, nodes[at : at + 1])) for at in (0, 1, 2)]
    write(tmp_path, Round(2, nodes[:1]))
    assert [path.name for path in paths] == ["round-0001", "round-0001.2", "round-0001.3"]
    found = [(each.number, each.attempt, each.nodes[0].node) for each in read(tmp_path)]
    assert found == [(1, 1, "7"), (1, 2, "9"), (1, 3, "8"), (2, 1, "7")]


@pytest.mark.parametrize("at", [0, 1, 2, 3, 5])
def test_a_write_that_fails_leaves_nothing_half(at: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write(tmp_path, make_round(1))
    calls = 0
    there = federation.write_atomically

    def failing(path: Path, content: bytes) -> None:
        nonlocal calls
        calls += 1
        if calls > at:
            raise OSError("no space left on device")
        there(path, content)

    monkeypatch.setattr("rgap.federation.write_atomically", failing)
    monkeypatch.setattr("rgap.update.write_atomically", failing)
    other = make_target(5)
    nodes = (*make_round().nodes, Received("12", state(other), sent(other, 12)))
    with pytest.raises(OSError, match="no space left"):
        write(tmp_path, Round(2, nodes))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["round-0001", "weights"]
    assert only(tmp_path).number == 1


def test_a_process_that_was_killed_leaves_what_is_not_read(tmp_path: Path) -> None:
    write(tmp_path, make_round(1))
    (tmp_path / ".round-0123").mkdir()
    (tmp_path / ".round-0123" / "node-7.safetensors").write_bytes(b"half")
    (tmp_path / "notes.txt").write_text("of the reader's own")
    assert only(tmp_path).number == 1


# Targets.


def test_a_target_for_each_set_of_weights(tmp_path: Path) -> None:
    write(tmp_path, make_round())
    base = make_target(4)
    before = state(base)
    groups = only(tmp_path).by_target(base)
    assert [list(updates) for _, updates in groups] == [["7", "9"], ["10"]]
    assert [target.fingerprint for target, _ in groups] == [make_target(0).fingerprint, make_target(1).fingerprint]
    for target, _ in groups:
        assert (target.value_range, target.batch_size, target.loss) == (base.value_range, 2, base.loss)
    assert all(torch.equal(t, before[name]) for name, t in state(base).items())


def test_what_is_not_trained_may_be_missing() -> None:
    base, other = make_target(0), make_target(1)
    parameters = {name: t for name, t in state(other).items() if name in other.parameters}
    assert given(base, parameters).fingerprint == other.fingerprint
    del parameters["3.bias"]
    with pytest.raises(UpdateError, match=r"lack 3.bias, expected every parameter that is trained"):
        given(base, parameters)


def test_a_count_that_was_averaged_is_a_count_again() -> None:
    weights = state(make_target())
    weights["1.num_batches_tracked"] = torch.tensor(2.0, dtype=torch.float64)
    assert int(given(make_target(), weights).model.state_dict()["1.num_batches_tracked"]) == 2


def test_weights_of_another_model_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_round())
    model = nn.Sequential(nn.Linear(4, 5), nn.BatchNorm1d(5), nn.Tanh(), nn.Linear(5, 1)).eval()
    with pytest.raises(UpdateError, match=r"round 1, node 7: does not fit the model: 0.weight has shape \(3, 4\)"):
        only(tmp_path).by_target(Target(model, losses.Logistic(), (4,)))


def test_an_update_of_other_weights_is_refused() -> None:
    one, two = make_target(0), make_target(1)
    with pytest.raises(UpdateError, match="node 7: the update belongs to another model or another checkpoint"):
        Round(1, (Received("7", state(one), sent(two, 7)),)).by_target(one)


# What makes no sense.


@pytest.mark.parametrize("node", ["", "../7", "a/b", "7\n", "x" * 101, "7\0"])
def test_names_that_could_leave_the_folder_are_refused(node: str) -> None:
    with pytest.raises(UpdateError, match="got the node name"):
        Received(node, {}, None, "no update")


def test_a_node_has_an_update_or_a_reason() -> None:
    with pytest.raises(UpdateError, match="either an update or the reason"):
        Received("7", {}, None)
    with pytest.raises(UpdateError, match="each node once"):
        Round(1, (Received("7", {}, None, "a"), Received("7", {}, None, "b")))
    with pytest.raises(UpdateError, match="expected a number from 0 on"):
        Round(-1, ())


# Files that were not written by rgap.


def change(folder: Path, edit: Callable[[dict[str, Any]], object]) -> None:
    index = folder / "round-0001" / "round.json"
    document = json.loads(index.read_text())
    edit(document)
    index.write_text(json.dumps(document))


NODE = "a field of a node has the wrong type or value"


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (
            lambda document: document.update(format=3),
            "got format 3, expected 2; read it with the version",
        ),
        (lambda document: document.update(round=4), "expected an object with the round, which is 1"),
        (lambda document: document.update(nodes={}), "a list of nodes"),
        (lambda document: document.update(nodes=[7]), "a list of nodes"),
        (lambda document: document["nodes"][0].update(node="../../../etc/passwd"), NODE),
        (lambda document: document["nodes"][0].update(node=7), NODE),
        (lambda document: document["nodes"][0].pop("node"), NODE),
        (lambda document: document["nodes"][0].update(weights="../round-0001/node-7"), NODE),
        (lambda document: document["nodes"][0].update(weights=None), NODE),
        (lambda document: document["nodes"][0].update(failed=None), NODE),
        (lambda document: document["nodes"][0].update(metrics=[]), NODE),
        (lambda document: document["nodes"][0].update(weights="0" * 32), "no such file"),
        (lambda document: document["nodes"][2].update(failed=""), "node-8.safetensors: no such file"),
        (lambda document: document["nodes"].append(document["nodes"][0]), "each node once"),
    ],
)
def test_an_index_that_was_changed_is_refused(
    edit: Callable[[dict[str, Any]], object], message: str, tmp_path: Path
) -> None:
    write(tmp_path, make_round())
    change(tmp_path, edit)
    with pytest.raises(UpdateError, match=message) as caught:
        list(read(tmp_path))
    assert str(tmp_path) in str(caught.value)


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b"\xff", b"[" * 100_000, b"7"])
def test_an_index_that_is_none_is_refused(content: bytes, tmp_path: Path) -> None:
    write(tmp_path, make_round())
    (tmp_path / "round-0001" / "round.json").write_bytes(content)
    with pytest.raises(UpdateError, match=r"round.json: (not a whole JSON file|got a JSON \w+, expected an object)"):
        list(read(tmp_path))


@pytest.mark.parametrize("name", ["weights", "round-0001"])
def test_files_that_were_cut_short_are_refused(name: str, tmp_path: Path) -> None:
    write(tmp_path, make_round())
    for path in (tmp_path / name).glob("*.safetensors"):
        path.write_bytes(path.read_bytes()[:-5])
    with pytest.raises(UpdateError, match="not a whole safetensors file"):
        list(read(tmp_path))


def test_weights_that_were_changed_are_refused(tmp_path: Path) -> None:
    write(tmp_path, make_round())
    for path in (tmp_path / "weights").iterdir():
        content = bytearray(path.read_bytes())
        content[-1] ^= 1
        path.write_bytes(bytes(content))
    with pytest.raises(UpdateError, match="its content is not what its name says"):
        list(read(tmp_path))


def test_a_missing_index_or_folder_is_named(tmp_path: Path) -> None:
    with pytest.raises(UpdateError, match="got no folder round-0001"):
        list(read(tmp_path))
    with pytest.raises(UpdateError, match="no such folder"):
        list(read(tmp_path / "none"))
    (tmp_path / "round-0001").mkdir()
    with pytest.raises(UpdateError, match=r"round.json: no such file"):
        list(read(tmp_path))


def test_a_round_of_the_first_format_is_read(tmp_path: Path) -> None:
    write(tmp_path, make_round())

    def to_first(document: dict[str, Any]) -> None:
        document["format"] = 1
        for node in document["nodes"]:
            node["said"] = node.pop("metrics")

    change(tmp_path, to_first)
    assert only(tmp_path).nodes[0].metrics == {"num-examples": 2, "loss": 0.5, "per-class": [1, 2]}
