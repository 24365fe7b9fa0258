"""With Flower's own ServerApp, ClientApp and strategies: what is kept is what was sent, and nothing changes."""

from __future__ import annotations

import builtins
import importlib
import logging
import random
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
from flwr.app import Array, ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.mod import fixedclipping_mod
from flwr.serverapp import Grid, ServerApp, strategy
from flwr.serverapp.strategy import FedAvg, Result, Strategy, strategy_utils
from torch import Tensor, nn
from warm import Program, python

from rgap import Target, defences, federation, losses
from rgap.defences import Defence
from rgap.federation import Round
from rgap.integrations.flower import Capture, LocalGrid, defend
from rgap.protocol import Protocol, Sends
from rgap.update import Update

RATE = 0.1
DIFFERENCE = Protocol(Sends.DIFFERENCE, learning_rate=RATE)
STATISTICS = ("1.running_mean", "1.running_var", "1.num_batches_tracked")
NODES = (11, 12, 13)


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 1))


def make_target() -> Target:
    return Target(make_model().eval(), losses.Logistic(), (4,))


def samples(part: int) -> tuple[Tensor, Tensor]:
    """The data of one client: as many as its number and two more."""
    generator = torch.Generator().manual_seed(part)
    x = torch.randn(part + 2, 4, generator=generator)
    return x, torch.tensor([1.0, -1.0] * 3)[: part + 2]


def gradient(weights: Mapping[str, Tensor], part: int, training: bool = True) -> dict[str, Tensor]:
    """With plain torch."""
    model = make_model().train(training)
    model.load_state_dict(dict(weights))
    x, y = samples(part)
    nn.functional.softplus(-y * model(x).squeeze(1)).mean().backward()
    return {name: p.grad for name, p in model.named_parameters() if p.grad is not None}


def trained(message: Message, context: Context, change: Callable[[dict[str, Tensor]], None] | None = None) -> Message:
    """One step of SGD on all of the client's data."""
    model = make_model().train()
    model.load_state_dict(message.content.array_records["arrays"].to_torch_state_dict())
    part = int(context.node_config["partition-id"])
    x, y = samples(part)
    optimizer = torch.optim.SGD(model.parameters(), RATE)
    loss = nn.functional.softplus(-y * model(x).squeeze(1)).mean()
    loss.backward()
    optimizer.step()
    state = model.state_dict()
    if change is not None:
        change(state)
    metrics = MetricRecord({"num-examples": len(x), "train_loss": loss.item()})
    return Message(RecordDict({"arrays": ArrayRecord(state), "metrics": metrics}), reply_to=message)


def make_app(*mods: Any, train: Callable[[Message, Context], Message] = trained) -> ClientApp:
    app = ClientApp()
    app.train(mods=list(mods))(train)

    @app.evaluate()
    def evaluate(message: Message, context: Context) -> Message:
        total = sum(float(a.numpy().sum()) for a in message.content.array_records["arrays"].values())
        return Message(RecordDict({"m": MetricRecord({"num-examples": 1, "total": total})}), reply_to=message)

    return app


def federate(
    chosen: Strategy, apps: Mapping[int, ClientApp] | None = None, rounds: int = 2, grid: Grid | None = None
) -> Result:
    """Two rounds over Flower's own ServerApp."""
    found: list[Result] = []
    server = ServerApp()

    @server.main()
    def main(grid: Grid, context: Context) -> None:
        found.append(chosen.start(grid, ArrayRecord(make_model().state_dict()), num_rounds=rounds))

    with mock.patch.object(strategy_utils, "random", random.Random(0)):  # it samples the nodes, and so their order
        LocalGrid(apps or dict.fromkeys(NODES, make_app())).serve(server)
    return found[0]


def same(one: ArrayRecord, two: ArrayRecord) -> bool:
    return list(one) == list(two) and all(one[name].data == two[name].data for name in one)


def counted(folder: Path) -> list[Round]:
    return list(federation.read(folder))


# The training goes on as it would.

MAKERS: dict[str, tuple[Callable[[], Strategy], tuple[Any, ...]]] = {
    "FedAvg": (lambda: FedAvg(), ()),
    "FedProx": (lambda: strategy.FedProx(proximal_mu=0.1), ()),
    "FedAdam": (lambda: strategy.FedAdam(), ()),
    "FedMedian": (lambda: strategy.FedMedian(), ()),
    "Krum": (lambda: strategy.Krum(num_malicious_nodes=0), ()),
    "FedTrimmedAvg": (lambda: strategy.FedTrimmedAvg(beta=0.34), ()),
    "server clipping": (
        lambda: strategy.DifferentialPrivacyServerSideFixedClipping(FedAvg(), 0.0, 1e-3, len(NODES)), (),
    ),
    "client clipping": (
        lambda: strategy.DifferentialPrivacyClientSideFixedClipping(FedAvg(), 0.0, 1e-3, len(NODES)),
        (fixedclipping_mod,),
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", MAKERS)
def test_the_training_is_the_same_bit_for_bit(name: str, tmp_path: Path) -> None:
    make, mods = MAKERS[name]
    apps = dict.fromkeys(NODES, make_app(*mods))
    alone = federate(make(), apps)
    inner = make()
    with_it = federate(Capture(inner, make_target(), tmp_path, DIFFERENCE), apps)
    assert same(alone.arrays, with_it.arrays)
    assert alone.train_metrics_clientapp == with_it.train_metrics_clientapp
    assert alone.evaluate_metrics_clientapp == with_it.evaluate_metrics_clientapp
    assert len(with_it.evaluate_metrics_clientapp) == 2
    assert not {"configure_train", "aggregate_train"} & set(vars(inner))
    assert [each.number for each in counted(tmp_path)] == [1, 2]
    assert all(node.update is not None for each in counted(tmp_path) for node in each.nodes)


def test_what_is_kept_is_the_gradient_times_the_learning_rate(tmp_path: Path) -> None:
    federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE))
    for each in counted(tmp_path):
        assert {node.node for node in each.nodes} == {str(node) for node in NODES}
        for node in each.nodes:
            part = NODES.index(int(node.node))
            expected = gradient(node.weights, part)
            assert node.update is not None
            assert list(node.update.gradients) == list(expected) or set(node.update.gradients) == set(expected)
            for name, found in node.update.gradients.items():
                assert found.dtype is torch.float32
                # The weight was rounded when the step was taken.
                rounding = 2 * torch.finfo(torch.float32).eps * float(node.weights[name].abs().max())
                assert torch.allclose(found, -RATE * expected[name], rtol=1e-5, atol=rounding)
            header = node.update.header
            assert (header.batch_size, header.loss, header.input_shape) == (part + 2, "logistic", (4,))
            assert header.protocol == DIFFERENCE
            assert node.metrics["num-examples"] == part + 2
            assert node.metrics["train_loss"] > 0


def test_what_is_kept_is_what_came_before_the_strategy_changed_it(tmp_path: Path) -> None:
    for name in ("FedAvg", "server clipping"):
        federate(Capture(MAKERS[name][0](), make_target(), tmp_path / name, DIFFERENCE), rounds=1)
    one, two = (counted(tmp_path / name)[0] for name in ("FedAvg", "server clipping"))
    for a, b in zip(one.nodes, two.nodes, strict=True):
        assert a.update is not None
        assert b.update is not None
        assert all(torch.equal(t, b.update.gradients[name]) for name, t in a.update.gradients.items())


def test_the_weights_of_a_round_are_those_that_were_sent(tmp_path: Path) -> None:
    result = federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE), rounds=1)
    federate(Capture(FedAvg(), make_target(), tmp_path / "two", DIFFERENCE))
    first, second = counted(tmp_path / "two")
    for name, tensor in make_model().state_dict().items():
        assert torch.equal(first.nodes[0].weights[name], tensor)
        assert torch.equal(second.nodes[0].weights[name], torch.from_numpy(result.arrays[name].numpy()))
    groups = second.by_target(make_target())
    assert len(groups) == 1
    target, updates = groups[0]
    assert len(updates) == 3
    assert all(update.header.fingerprint == target.fingerprint for update in updates.values())
    # Kept once, although three nodes got them.
    assert len(list((tmp_path / "two" / "weights").iterdir())) == 2


def test_each_node_may_be_sent_weights_of_its_own(tmp_path: Path) -> None:
    class Personal(FedAvg):
        def configure_train(
            self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
        ) -> Iterable[Message]:
            for message in super().configure_train(server_round, arrays, config, grid):
                node = message.metadata.dst_node_id
                own = {n: Array(np.asarray(a.numpy() + a.numpy().dtype.type(node))) for n, a in arrays.items()}
                content = RecordDict({"arrays": ArrayRecord(own), "config": config})
                yield Message(content, node, MessageType.TRAIN)

    federate(Capture(Personal(), make_target(), tmp_path, DIFFERENCE), rounds=1)
    (found,) = counted(tmp_path)
    assert len(found.by_target(make_target())) == 3
    for node in found.nodes:
        assert torch.equal(node.weights["0.weight"], make_model().state_dict()["0.weight"] + int(node.node))
        assert node.update is not None
        expected = gradient(node.weights, NODES.index(int(node.node)))["0.weight"]
        assert torch.allclose(node.update.gradients["0.weight"], -RATE * expected, atol=1e-5)


def test_arrays_without_names_are_taken_in_order(tmp_path: Path) -> None:
    """As from ``ArrayRecord([array, ...])``, and ten of them, so that names in order are not numbers in order."""
    model = nn.Sequential(*[nn.Linear(2, 2) for _ in range(5)], nn.BatchNorm1d(2), nn.Linear(2, 1)).eval()

    def answer(message: Message, context: Context) -> Message:
        values = message.content.array_records["arrays"].to_numpy_ndarrays()
        content = {
            "arrays": ArrayRecord([np.asarray(v + v.dtype.type(0.5)) for v in values]),
            "m": MetricRecord({"num-examples": 1}),
        }
        return Message(RecordDict(content), reply_to=message)

    names = list(model.state_dict())
    capture = Capture(FedAvg(), Target(model, losses.Logistic(), (2,)), tmp_path, DIFFERENCE)
    grid = LocalGrid(dict.fromkeys(NODES, make_app(train=answer)))
    start = ArrayRecord([t.numpy() for t in model.state_dict().values()])
    capture.start(grid, start, num_rounds=2)
    for number, each in enumerate(counted(tmp_path)):
        ((target, updates),) = each.by_target(capture.target)
        assert len(updates) == 3
        for name, tensor in model.state_dict().items():
            expected = tensor + (0.5 * number if tensor.is_floating_point() else 0)
            assert torch.allclose(target.model.state_dict()[name], expected)
        for name, gradient in updates["11"].gradients.items():
            assert name in names
            assert torch.allclose(gradient, torch.tensor(0.5))


def test_gradients_are_kept_as_they_come(tmp_path: Path) -> None:
    def answer(message: Message, context: Context) -> Message:
        state = message.content.array_records["arrays"].to_torch_state_dict()
        own = gradient(state, int(context.node_config["partition-id"]))
        return Message(RecordDict({"g": ArrayRecord(own), "m": MetricRecord({"num-examples": 1})}), reply_to=message)

    capture = Capture(FedAvg(), make_target(), tmp_path, Protocol(), batch_size=5)
    federate(capture, dict.fromkeys(NODES, make_app(train=answer)), rounds=1)
    (found,) = counted(tmp_path)
    for node in found.nodes:
        assert node.update is not None
        assert node.update.header.batch_size == 5
        for name, expected in gradient(node.weights, NODES.index(int(node.node))).items():
            assert torch.equal(node.update.gradients[name], expected)


def test_a_strategy_with_a_start_of_its_own_keeps_it(tmp_path: Path) -> None:
    class Own(FedAvg):
        started = 0

        def start(self, *args: Any, **kwargs: Any) -> Result:
            self.started += 1
            return super().start(*args, **kwargs)

    inner = Own()
    found = federate(Capture(inner, make_target(), tmp_path, DIFFERENCE))
    assert inner.started == 1
    assert same(found.arrays, federate(FedAvg()).arrays)
    assert len(counted(tmp_path)) == 2


def test_after_a_failure_the_strategy_has_its_methods_back(tmp_path: Path) -> None:
    class Failing(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            raise RuntimeError("no")

    inner = Failing()
    with pytest.raises(RuntimeError, match="no"):
        federate(Capture(inner, make_target(), tmp_path, DIFFERENCE))
    assert not {"configure_train", "aggregate_train"} & set(vars(inner))
    assert len(counted(tmp_path)) == 1  # it was kept before it was aggregated


# Replies that are no updates.


def failing(message: Message, context: Context) -> Message:
    raise ZeroDivisionError("nothing to divide")


def test_an_error_passes_and_the_other_clients_are_kept(tmp_path: Path) -> None:
    apps = {11: make_app(), 12: make_app(train=failing), 13: make_app()}
    alone = federate(FedAvg(), apps)
    found = federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE), apps)
    assert same(alone.arrays, found.arrays)
    for each in counted(tmp_path):
        kept = {node.node: node.failed for node in each.nodes}
        assert kept.keys() == {"11", "12", "13"}
        assert kept["11"] == kept["13"] == ""
        assert "the client failed" in kept["12"]
        assert "nothing to divide" in kept["12"]


def test_a_round_in_which_every_client_failed_is_kept_with_the_reasons(tmp_path: Path) -> None:
    seen: list[Round] = []
    capture = Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE, after=seen.append)
    federate(capture, dict.fromkeys(NODES, make_app(train=failing)), rounds=1)
    (found,) = counted(tmp_path)
    assert [node.update for node in found.nodes] == [None] * 3
    assert all("nothing to divide" in node.failed for node in found.nodes)
    assert seen == []  # it brought nothing


def test_a_client_that_never_replies_is_named(tmp_path: Path) -> None:
    grid = LocalGrid(dict.fromkeys(NODES, make_app()))
    capture = Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE)
    messages = list(capture.configure_train(1, ArrayRecord(make_model().state_dict()), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    capture.aggregate_train(1, replies[1:])
    silent = str(replies[0].metadata.src_node_id)
    assert [node.node for node in counted(tmp_path)[0].nodes if node.failed == "no reply came"] == [silent]


def nan(state: dict[str, Tensor]) -> None:
    state["0.weight"][0, 0] = float("nan")


def renamed(state: dict[str, Tensor]) -> None:
    state["other"] = state.pop("0.weight")


def reshaped(state: dict[str, Tensor]) -> None:
    state["0.weight"] = state["0.weight"].T.contiguous()


@pytest.mark.parametrize(
    ("change", "reason"), [(nan, "1 of 12 values are NaN"), (renamed, "missing: 0.weight"), (reshaped, "shape")]
)
def test_a_reply_that_is_no_update_is_named_and_the_training_goes_on(
    change: Callable[[dict[str, Tensor]], None], reason: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    def wrong(message: Message, context: Context) -> Message:
        return trained(message, context, change)

    class Passing(FedAvg):
        """What the strategy makes of it is not the point."""

        got = 0

        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            self.got += len(replies)
            return super().aggregate_train(server_round, [r for r in replies if r.metadata.src_node_id != 12])

    inner = Passing()
    with caplog.at_level(logging.WARNING):
        federate(
            Capture(inner, make_target(), tmp_path, DIFFERENCE),
            {11: make_app(), 12: make_app(train=wrong), 13: make_app()},
            rounds=1,
        )
    assert inner.got == 3
    (found,) = counted(tmp_path)
    failed = {node.node: node.failed for node in found.nodes}
    assert reason in failed.pop("12")
    assert failed == {"11": "", "13": ""}
    assert "node 12 sent no update" in caplog.text
    assert set(found.by_target(make_target())[0][1]) == {"11", "13"}


@pytest.mark.parametrize("size", [0, -1, 1.5, float("nan"), [1, 2]])
def test_a_number_of_examples_that_is_none_is_refused(size: Any, tmp_path: Path) -> None:
    def wrong(message: Message, context: Context) -> Message:
        reply = trained(message, context)
        reply.content.metric_records["metrics"]["size"] = size
        return reply

    apps = dict.fromkeys(NODES, make_app(train=wrong))
    federate(Capture(QuietMetrics(), make_target(), tmp_path, DIFFERENCE, size_key="size"), apps, rounds=1)
    assert all("'size' is" in node.failed for node in counted(tmp_path)[0].nodes)


class QuietMetrics(FedAvg):
    def __init__(self) -> None:
        super().__init__(train_metrics_aggr_fn=lambda records, key: MetricRecord())


def test_where_the_client_does_not_say_the_batch_size_is_the_targets(tmp_path: Path) -> None:
    target = Target(make_model().eval(), losses.Logistic(), (4,), batch_size=3)
    federate(Capture(FedAvg(), target, tmp_path, DIFFERENCE, size_key="rows"), rounds=1)
    assert all(n.update is not None and n.update.header.batch_size == 3 for n in counted(tmp_path)[0].nodes)


def said(code: str, folder: Path) -> str:
    """What it prints in a process of its own."""
    program = Program(python, "-c", code, folder=folder)
    out, err = program.communicate()
    assert program.returncode == 0, err
    return out


def test_strategies_of_the_older_api_are_refused(tmp_path: Path) -> None:
    """In a process of its own, where no types are checked before."""
    code = (
        "import warnings; warnings.simplefilter('ignore')\n"
        "from flwr.server import strategy; from rgap.integrations.flower import Capture\n"
        "for older in (strategy.FedAvg, strategy.FedMedian, strategy.Krum):\n"
        "    try:\n        Capture(older(), None, None, None)\n"
        "    except TypeError as error:\n        print(error)\n"
    )
    told = said(code, tmp_path).splitlines()
    assert [line.split(",")[0] for line in told] == ["got FedAvg", "got FedMedian", "got Krum"]
    assert all("expected a strategy of Flower's Message API, such as" in line for line in told)


def test_a_batch_size_must_make_sense() -> None:
    with pytest.raises(ValueError, match="got batch_size=0"):
        Capture(FedAvg(), make_target(), None, DIFFERENCE, batch_size=0)


def test_replies_may_come_once_and_keep_their_order(tmp_path: Path) -> None:
    seen: list[list[int]] = []

    class Looking(FedAvg):
        def aggregate_train(self, server_round: int, replies: Iterable[Message]) -> Any:
            replies = list(replies)
            seen.append([reply.metadata.src_node_id for reply in replies])
            return super().aggregate_train(server_round, replies)

    grid = LocalGrid(dict.fromkeys(NODES, make_app()))
    capture = Capture(Looking(), make_target(), tmp_path, DIFFERENCE)
    messages = capture.configure_train(1, ArrayRecord(make_model().state_dict()), ConfigRecord(), grid)
    replies = list(grid.send_and_receive(messages))[::-1]
    contents = [reply.content for reply in replies]
    arrays, _ = capture.aggregate_train(1, (reply for reply in replies))
    assert arrays is not None
    assert seen == [[reply.metadata.src_node_id for reply in replies]]
    assert all(reply.content is content for reply, content in zip(replies, contents, strict=True))
    assert [node.node for node in counted(tmp_path)[0].nodes] == [str(n) for n in seen[0]]


def test_a_reply_that_nobody_asked_for_and_one_that_comes_twice(tmp_path: Path) -> None:
    grid = LocalGrid(dict.fromkeys(NODES, make_app()))
    capture = Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE)
    messages = list(capture.configure_train(1, ArrayRecord(make_model().state_dict()), ConfigRecord(), grid))
    replies = list(grid.send_and_receive(messages))
    capture.aggregate_train(1, [*replies, replies[0]])
    capture.aggregate_train(2, replies)
    first, second = counted(tmp_path)
    assert [node.failed for node in first.nodes] == ["it sent more than one reply", "", ""]
    assert all("it was sent no weights" in node.failed for node in second.nodes)


def test_a_record_that_cannot_be_written_does_not_stop_the_training(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def full(*_: object) -> None:
        raise OSError("no space left on device")

    monkeypatch.setattr("rgap.integrations.flower.write", full)
    found = federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE))
    assert same(found.arrays, federate(FedAvg()).arrays)
    assert "what the clients sent is not kept" in caplog.text
    assert "no space left" in caplog.text


def test_after_each_round_what_came_is_handed_on(caplog: pytest.LogCaptureFixture) -> None:
    seen: list[Round] = []

    def after(found: Round) -> None:
        seen.append(found)
        raise LookupError("an audit may fail")

    result = federate(Capture(FedAvg(), make_target(), None, DIFFERENCE, after=after))
    assert [each.number for each in seen] == [1, 2]
    assert same(result.arrays, federate(FedAvg()).arrays)
    assert "round 2: after failed" in caplog.text


# What a client sends, defended.


def sent_by(app: ClientApp, kind: str = MessageType.TRAIN) -> RecordDict:
    """What one client replies to the initial weights."""
    grid = LocalGrid({1: app})
    content = RecordDict({"arrays": ArrayRecord(make_model().state_dict()), "config": ConfigRecord({"a": 1})})
    (reply,) = grid.send_and_receive([Message(content, 1, kind)])
    if reply.has_error():
        raise AssertionError(reply.error.reason)
    return reply.content


@pytest.mark.parametrize("defence", [kind() for kind in defences.ALL], ids=lambda defence: defence.name)
def test_a_defence_changes_what_is_sent_and_nothing_else(defence: Defence) -> None:
    plain, defended = sent_by(make_app()), sent_by(make_app(defend(defence, seed=3)))
    assert plain.metric_records["metrics"] == defended.metric_records["metrics"]
    assert list(plain) == list(defended)
    before = make_model().state_dict()
    arrays = {name: torch.from_numpy(a.numpy()) for name, a in plain.array_records["arrays"].items()}
    found = {name: torch.from_numpy(a.numpy()) for name, a in defended.array_records["arrays"].items()}
    assert list(found) == list(arrays)
    assert all(torch.equal(found[name], arrays[name]) for name in STATISTICS)
    weights = [name for name in arrays if name not in STATISTICS]
    change = Update({name: arrays[name].double() - before[name].double() for name in weights})
    expected = defence(change, torch.Generator().manual_seed(3)).gradients
    for name in weights:
        assert found[name].dtype is torch.float32
        assert torch.equal(found[name], (before[name].double() + expected[name]).float())
    long = not isinstance(defence, defences.Clip)  # the update is shorter than that
    assert any(not torch.equal(found[name], arrays[name]) for name in weights) == long


def test_a_defence_that_does_nothing_changes_no_bit() -> None:
    plain, defended = sent_by(make_app()), sent_by(make_app(defend(defences.Clip(1e9))))
    assert same(plain.array_records["arrays"], defended.array_records["arrays"])


def test_evaluation_is_not_defended() -> None:
    def echo(message: Message, context: Context) -> Message:
        return Message(message.content, reply_to=message)

    before = ArrayRecord(make_model().state_dict())
    noisy = ClientApp(mods=[defend(defences.GaussianNoise(1.0, relative=False))])
    for register in (noisy.train(), noisy.evaluate(), noisy.train("more")):
        register(echo)
    assert same(sent_by(noisy, MessageType.EVALUATE).array_records["arrays"], before)
    assert not same(sent_by(noisy, "train.more").array_records["arrays"], before)


def test_noise_is_fresh_each_time() -> None:
    def twice(seed: int | None) -> list[ArrayRecord]:
        app = make_app(defend(defences.GaussianNoise(1.0), seed=seed))
        return [sent_by(app).array_records["arrays"] for _ in range(2)]

    assert not same(*twice(None))
    assert not same(twice(None)[0], twice(None)[0])
    # With a seed each message has other noise, and the same each time that the app is made.
    assert not same(*twice(0))
    assert all(same(*pair) for pair in zip(twice(0), twice(0), strict=True))


def test_only_what_is_trained_is_defended_where_it_is_named() -> None:
    plain = sent_by(make_app()).array_records["arrays"]
    noise = defences.GaussianNoise(1.0)
    found = sent_by(make_app(defend(noise, trained=["3.weight"]))).array_records["arrays"]
    assert {name for name in plain if plain[name].data != found[name].data} == {"3.weight"}


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64], ids=str)
def test_the_type_is_kept(dtype: torch.dtype) -> None:
    def answer(message: Message, context: Context) -> Message:
        state = {n: t.to(dtype) for n, t in message.content.array_records["arrays"].to_torch_state_dict().items()}
        return Message(RecordDict({"arrays": ArrayRecord(state)}), reply_to=message)

    found = sent_by(make_app(defend(defences.GaussianNoise(1e9, relative=False)), train=answer))
    for array in found.array_records["arrays"].values():
        assert array.dtype == str(dtype).removeprefix("torch.")
        assert torch.from_numpy(array.numpy()).isfinite().all()


def test_gradients_are_defended_too() -> None:
    def answer(message: Message, context: Context) -> Message:
        return Message(RecordDict({"g": ArrayRecord({"w": Array(torch.tensor([3.0, -4.0]))})}), reply_to=message)

    found = sent_by(make_app(defend(defences.Clip(1.0), sends=Sends.GRADIENT), train=answer))
    assert found.array_records["g"]["w"].numpy().tolist() == pytest.approx([0.6, -0.8])


def none_at_all(message: Message, context: Context) -> Message:
    return Message(RecordDict({"m": MetricRecord({"a": 1})}), reply_to=message)


def two_records(message: Message, context: Context) -> Message:
    arrays = message.content.array_records["arrays"]
    return Message(RecordDict({"a": arrays, "b": arrays}), reply_to=message)


def other_names(message: Message, context: Context) -> Message:
    return trained(message, context, renamed)


def not_finite(message: Message, context: Context) -> Message:
    return trained(message, context, nan)


@pytest.mark.parametrize(
    ("train", "reason"),
    [
        (none_at_all, "got these records of arrays: none; expected one, or arrays_key"),
        (two_records, "got these records of arrays: a, b; expected one, or arrays_key"),
        (other_names, "other: the client sends shape .* was sent none"),
        (not_finite, "1 of 12 values are NaN"),
        (failing, "nothing to divide"),
    ],
)
def test_what_cannot_be_defended_is_not_sent(train: Callable[..., Message], reason: str) -> None:
    with pytest.raises(AssertionError, match=reason):
        sent_by(make_app(defend(defences.GaussianNoise()), train=train))


def test_what_is_named_as_trained_must_be_there() -> None:
    with pytest.raises(AssertionError, match="the client sends no head"):
        sent_by(make_app(defend(defences.Sign(), trained=["0.weight", "head"])))
    with pytest.raises(AssertionError, match="expected one under 'weights'"):
        sent_by(make_app(defend(defences.Sign(), arrays_key="weights")))


# The grid.


def test_a_node_knows_its_part_and_remembers() -> None:
    seen: list[tuple[int, dict[str, Any], Any]] = []

    def answer(message: Message, context: Context) -> Message:
        context.state["count"] = MetricRecord({"n": 1 + len(context.state)})
        seen.append((context.node_id, dict(context.node_config), context.run_config["rate"]))
        message.content["mine"] = MetricRecord({"a": 1})  # a copy: nobody else sees it
        return Message(RecordDict({"m": context.state.metric_records["count"]}), reply_to=message)

    grid = LocalGrid(dict.fromkeys([7, 9], make_app(train=answer)), run_config={"rate": 0.5})
    content = RecordDict()
    messages = [Message(content, node, MessageType.TRAIN) for node in (7, 9, 7)]
    replies = list(grid.send_and_receive(messages))
    assert seen[:2] == [(n, {"partition-id": at, "num-partitions": 2}, 0.5) for at, n in enumerate((7, 9))]
    assert [reply.content.metric_records["m"]["n"] for reply in replies] == [1, 1, 2]
    assert [reply.metadata.src_node_id for reply in replies] == [7, 9, 7]
    assert [r.metadata.reply_to_message_id for r in replies] == [m.metadata.message_id for m in messages]
    assert not content


def test_messages_can_be_pushed_and_pulled() -> None:
    grid = LocalGrid({7: make_app(train=failing)})
    message = grid.create_message(RecordDict(), MessageType.TRAIN, 7, "1")
    names = list(grid.push_messages([message]))
    (reply,) = grid.pull_messages(names)
    assert reply.error.reason == "<class 'ZeroDivisionError'>:<'nothing to divide'>"
    assert list(grid.pull_messages(names)) == []
    (reply,) = grid.send_and_receive([Message(RecordDict(), 8, MessageType.TRAIN)], timeout=1.0)
    assert "there is no node 8" in str(reply.error.reason)


# Without Flower.


def test_without_flower_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    there = builtins.__import__

    def missing(name: str, *args: Any, **kwargs: Any) -> Any:
        if name.split(".")[0] == "flwr":
            raise ImportError("No module named 'flwr'")
        return there(name, *args, **kwargs)

    monkeypatch.delitem(sys.modules, "rgap.integrations.flower")
    monkeypatch.setattr(builtins, "__import__", missing)
    with pytest.raises(ImportError, match=r"pip install 'rgap\[flower\]'"):
        importlib.import_module("rgap.integrations.flower")


def test_reading_needs_no_flower(tmp_path: Path) -> None:
    federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE), rounds=1)
    code = (
        "import sys; from rgap import federation; "
        f"print(len(list(federation.read({str(tmp_path)!r}))), 'flwr' in sys.modules)"
    )
    assert said(code, tmp_path).split() == ["1", "False"]


# What clients reply with.


def changed(change: Callable[[dict[str, Tensor]], None]) -> dict[int, ClientApp]:
    return dict.fromkeys(NODES, make_app(train=lambda message, context: trained(message, context, change)))


def test_buffers_that_came_are_kept_as_they_are(tmp_path: Path) -> None:
    federate(Capture(FedAvg(), make_target(), tmp_path, DIFFERENCE), rounds=1)
    for node in counted(tmp_path)[0].nodes:
        assert node.update is not None
        assert set(node.update.buffers) == set(STATISTICS)
        assert int(node.update.buffers[STATISTICS[2]]) == 1
        assert not torch.equal(node.update.buffers[STATISTICS[0]], node.weights[STATISTICS[0]])


@pytest.mark.parametrize("missing", ["3.bias", "0.weight", "1.weight"])
def test_layers_that_were_not_sent_have_not_moved_where_clients_do_so(missing: str, tmp_path: Path) -> None:
    apps = changed(lambda state: state.__delitem__(missing))
    federate(Capture(FedAvg(), make_target(), tmp_path / "partial", DIFFERENCE, partial=True), apps, rounds=1)
    federate(Capture(FedAvg(), make_target(), tmp_path / "whole", DIFFERENCE), rounds=1)
    federate(Capture(FedAvg(), make_target(), tmp_path / "refused", DIFFERENCE), apps, rounds=1)
    partial, whole = (counted(tmp_path / name)[0].nodes for name in ("partial", "whole"))
    for a, b in zip(partial, whole, strict=True):
        assert a.update is not None
        assert b.update is not None
        for name, t in b.update.gradients.items():
            assert torch.equal(a.update.gradients[name], torch.zeros_like(t) if name == missing else t)
    assert all(f"missing: {missing}" in node.failed for node in counted(tmp_path / "refused")[0].nodes)


def test_replies_may_be_differences(tmp_path: Path) -> None:
    def subtract(state: dict[str, Tensor]) -> None:
        first = make_model().state_dict()
        state.update({name: t - first[name] for name, t in state.items()})

    made = Capture(FedAvg(), make_target(), tmp_path / "differences", DIFFERENCE, differences=True)
    federate(made, changed(subtract), rounds=1)
    federate(Capture(FedAvg(), make_target(), tmp_path / "weights", DIFFERENCE), rounds=1)
    one, two = (counted(tmp_path / name)[0].nodes for name in ("differences", "weights"))
    for a, b in zip(one, two, strict=True):
        assert a.update is not None
        assert b.update is not None
        assert all(torch.equal(a.update.gradients[name], t) for name, t in b.update.gradients.items())


def test_a_client_with_fewer_samples_than_a_minibatch_takes_one_of_all(tmp_path: Path) -> None:
    protocol = Protocol(Sends.DIFFERENCE, learning_rate=RATE, minibatch=3)
    federate(Capture(FedAvg(), make_target(), tmp_path, protocol), rounds=1)
    for node in counted(tmp_path)[0].nodes:
        assert node.update is not None
        header = node.update.header
        assert header.protocol.minibatch == (None if header.batch_size < 3 else 3)
