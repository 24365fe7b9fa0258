"""Flower: keep what the server of a federation was sent, defend what a client sends, and try both in one process.

    strategy = Capture(FedAvg(), target, "captured", Protocol(Sends.DIFFERENCE, learning_rate=0.1))  # server
    app = ClientApp(mods=[defend(GaussianNoise(1e-2))])  # client

For the Message API of Flower, 1.41 or later.
"""

from __future__ import annotations

import copy
import logging
import uuid
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from rgap.defences import Defence
from rgap.federation import Received, Round, write
from rgap.integrations.common import Reader, going_on, protect
from rgap.printable import line
from rgap.protocol import Protocol, Sends
from rgap.target import Target
from rgap.update import UpdateError

try:
    from flwr.app import (
        Array,
        ArrayRecord,
        ConfigRecord,
        Context,
        Error,
        Message,
        MessageType,
        MetricRecord,
        RecordDict,
    )
    from flwr.clientapp import ClientApp
    from flwr.clientapp.typing import ClientAppCallable, Mod
    from flwr.common.constant import SUPERLINK_NODE_ID, ErrorCode
    from flwr.serverapp import Grid, ServerApp
    from flwr.serverapp.strategy import Result, Strategy
    from flwr.supercore.run import Run
    from flwr.supercore.task_identity import TaskIdentity
except ImportError as error:
    raise ImportError(
        f"rgap.integrations.flower needs Flower 1.41 or later ({error}): install it with pip install 'rgap[flower]'"
    ) from error

_LOG = logging.getLogger(__name__)


class Capture(Strategy):
    """Another strategy, and beside it a record of what each client sent.

    Messages and replies go through as they are: the training is bit for bit that of the strategy alone. A reply that is
    no update of the model is logged as a warning and kept with the reason, and the training goes on; so it does if the
    record cannot be written or `after` fails. It goes around all other wrappers, such as those for differential
    privacy, which change replies: what it keeps is what came.

    Args:
        strategy: any strategy of the Message API.
        target: the model that is trained, with whichever weights.
        folder: where the rounds are kept, see `rgap.federation`; None: nowhere.
        protocol: how the clients train. If they send weight differences, what is kept is the difference between the
            weights that came and those that were sent; if gradients, what came is taken for one.
        batch_size: how many samples a client has; None: what its metrics say under ``size_key``, else the target's.
        size_key: of the number of samples of a client's data. With fewer than a minibatch it takes one of them all.
        arrays_key: of the record of arrays in messages and replies; None: the only one there is.
        differences: whether clients reply with weight differences, not with weights.
        partial: whether replies may lack layers, as those of clients that send only what changed: what is not there
            has not moved.
        after: is given each round that brought a reply, after it was kept and before it is aggregated.

    Raises:
        TypeError: the strategy is of Flower's older API.
        ValueError: batch_size is below 1.
        OSError: the folder cannot be made.
    """

    def __init__(
        self,
        strategy: Strategy,
        target: Target,
        folder: str | Path | None,
        protocol: Protocol,
        batch_size: int | None = None,
        size_key: str = "num-examples",
        arrays_key: str | None = None,
        after: Callable[[Round], object] | None = None,
        differences: bool = False,
        partial: bool = False,
    ):
        if not hasattr(strategy, "configure_train"):
            raise TypeError(
                f"got {type(strategy).__name__}, expected a strategy of Flower's Message API, such as "
                "flwr.serverapp.strategy.FedAvg: an older one shows the server no message"
            )
        self.strategy, self.target = strategy, target
        self.reader = Reader(target, protocol, batch_size, size_key, differences, partial)
        self.folder = None if folder is None else Path(folder)
        if self.folder is not None:
            self.folder.mkdir(parents=True, exist_ok=True)
        self.arrays_key, self.after = arrays_key, after
        self._configure, self._aggregate = strategy.configure_train, strategy.aggregate_train
        self._sent: dict[int, Mapping[str, Tensor]] = {}

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        """What the strategy sends, remembered by node."""
        messages = list(self._configure(server_round, arrays, config, grid))
        self._sent = {}
        read: dict[int, Mapping[str, Tensor]] = {}  # most often one record goes to all
        for message in messages:
            with going_on(
                _LOG, f"round {server_round}: what was sent to node {message.metadata.dst_node_id} is not kept"
            ):
                record = _arrays(message, self.arrays_key)[1]
                if id(record) not in read:
                    read[id(record)] = _tensors(record)
                self._sent[message.metadata.dst_node_id] = read[id(record)]
        return messages

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        """What the strategy makes of the replies, after they were kept."""
        replies = list(replies)
        with going_on(_LOG, f"round {server_round}: what the clients sent is not kept"):
            self._keep(server_round, replies)
        self._sent = {}
        return self._aggregate(server_round, replies)

    def _keep(self, number: int, replies: list[Message]) -> None:
        nodes: dict[str, Received] = {}
        prints: dict[int, str] = {}
        for reply in replies:
            found = self._received(reply, prints)
            if found.node in nodes:
                found = Received(found.node, found.weights, None, "it sent more than one reply")
            if found.failed:
                _LOG.warning("round %d: node %s sent no update: %s", number, found.node, found.failed)
            nodes[found.node] = found
        for node, weights in self._sent.items():
            nodes.setdefault(str(node), Received(str(node), weights, None, "no reply came"))
        if not nodes:
            return
        found_round = Round(number, tuple(nodes.values()))
        if self.folder is not None:
            write(self.folder, found_round)
        if self.after is not None and any(reply.has_content() for reply in replies):
            with going_on(_LOG, f"round {number}: {getattr(self.after, '__name__', 'after')} failed"):
                self.after(found_round)

    def _received(self, reply: Message, prints: dict[int, str]) -> Received:
        node = reply.metadata.src_node_id
        if not reply.has_content():
            reason = line(f"the client failed: {reply.error.reason or f'error {reply.error.code}'}")
            return Received(str(node), self._sent.get(node, {}), None, reason)
        metrics = {name: value for record in reply.content.metric_records.values() for name, value in record.items()}
        return self.reader.received(
            str(node), self._sent.get(node, {}), lambda: _tensors(_arrays(reply, self.arrays_key)[1]), metrics, prints
        )

    # All else is the strategy's own.

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.strategy.configure_evaluate(server_round, arrays, config, grid)

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        return self.strategy.aggregate_evaluate(server_round, replies)

    def summary(self) -> None:
        self.strategy.summary()

    def start(self, *args: Any, **kwargs: Any) -> Result:
        """The strategy's own start, whose rounds are led through here."""
        own: dict[str, Any] = vars(self.strategy)
        before = dict(own)
        own.update(configure_train=self.configure_train, aggregate_train=self.aggregate_train)
        try:
            return self.strategy.start(*args, **kwargs)
        finally:
            for name in ("configure_train", "aggregate_train"):
                del own[name]
                if name in before:
                    own[name] = before[name]


def defend(
    defence: Defence,
    trained: Iterable[str] | None = None,
    sends: Sends = Sends.DIFFERENCE,
    arrays_key: str | None = None,
    seed: int | None = None,
) -> Mod:
    """A mod for a ClientApp that defends what the client sends after training, before it leaves.

    The defence is given the difference between the weights that are to be sent and those that came, and what is sent is
    the weights that came plus what it makes of that. If anything fails, nothing is sent: the server gets an error. The
    client's metrics, such as its loss, are sent as they are.

    Args:
        defence: one of `rgap.defences`, or your own.
        trained: the names of the trained parameters: nothing else is changed. None: all floating-point arrays but
            the running statistics of norm layers; frozen parameters and buffers of your own are then changed as well.
        sends: GRADIENT if the client replies with gradients: it is they that are defended.
        arrays_key: of the record of arrays in messages and replies; None: the only one there is.
        seed: of the noise, for tests alone: who knows it can take the noise off again. None: fresh from the operating
            system for each message. torch's generator has 2^32 streams: who can try them all can take it off too.
    """
    names = None if trained is None else frozenset(trained)
    seeded = None if seed is None else torch.Generator().manual_seed(seed)

    def mod(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
        if message.metadata.message_type.split(".")[0] != MessageType.TRAIN:
            return call_next(message, context)
        came = _tensors(_arrays(message, arrays_key)[1]) if sends is Sends.DIFFERENCE else None
        reply = call_next(message, context)
        if reply.has_error():
            return reply
        key, record = _arrays(reply, arrays_key)
        sent = protect(defence, _tensors(record), came, names, seeded)
        reply.content[key] = ArrayRecord(
            {name: Array(sent[name].numpy()) if name in sent else array for name, array in record.items()}
        )
        return reply

    return mod


def _arrays(message: Message, key: str | None) -> tuple[str, ArrayRecord]:
    """The record of arrays in a message, with its key."""
    records = dict(message.content.array_records)
    named = [name for name in records if key in (None, name)]
    if len(named) != 1:
        expected = "one, or arrays_key to say which" if key is None else f"one under {key!r}"
        raise UpdateError(f"got these records of arrays: {', '.join(records) or 'none'}; expected {expected}")
    return named[0], records[named[0]]


def _tensors(record: ArrayRecord) -> dict[str, Tensor]:
    return {name: torch.from_numpy(array.numpy().copy()) for name, array in record.items()}


class LocalGrid(Grid):
    """A grid in this process, without a network: each message is answered when it is sent, by one client after another.

    Messages are copied on their way, as a network does; what a client raises comes back as an error. For trials and
    tests: Flower's own simulation runs clients in parallel.

    Args:
        apps: each node's app, by node id; for one app ``dict.fromkeys(range(1, 4), app)``.
        run_config: of all contexts.
    """

    def __init__(self, apps: Mapping[int, ClientApp], run_config: Mapping[str, Any] | None = None):
        self._apps, self._replies = dict(apps), dict[str, Message]()
        self._run, self._config = Run.create_empty(run_id=1), dict(run_config or {})
        self._contexts = {
            node: self._context(node, {"partition-id": at, "num-partitions": len(apps)}) for at, node in enumerate(apps)
        }
        # A message cannot be made before the process knows who it is; inside a real federation it does.
        for name, value in {"run_id": 1, "node_id": SUPERLINK_NODE_ID, "task_id": 1}.items():
            if vars(TaskIdentity)[f"_{name}"] is None:
                setattr(TaskIdentity, name, value)

    def _context(self, node: int, config: dict[str, Any]) -> Context:
        return Context(self._run.run_id, node, config, RecordDict(), dict(self._config))

    def serve(self, app: ServerApp) -> Context:
        """Run a server on this grid to its end.

        Returns:
            The server's context.
        """
        context = self._context(SUPERLINK_NODE_ID, {})
        app(self, context)
        return context

    def set_run(self, run: Run) -> None:
        self._run = run

    @property
    def run(self) -> Run:
        return self._run

    def create_message(
        self, content: RecordDict, message_type: str, dst_node_id: int, group_id: str, ttl: int | float | None = None
    ) -> Message:
        return Message(content, dst_node_id, message_type, ttl=ttl, group_id=group_id)

    def get_node_ids(self) -> Iterable[int]:
        return list(self._apps)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return [self._answered(message) for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return [self._replies.pop(name) for name in message_ids if name in self._replies]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: int | float | None = None) -> Iterable[Message]:
        return self.pull_messages(self.push_messages(messages))

    def _answered(self, message: Message) -> str:
        """Have a message answered; the id under which its reply can be pulled."""
        name, node = uuid.uuid4().hex, message.metadata.dst_node_id
        vars(message.metadata)["_message_id"] = name
        if node in self._apps:
            own = copy.deepcopy(message)
            try:
                reply = copy.deepcopy(self._apps[node](own, self._contexts[node]))
            except Exception as error:
                _LOG.error("the client of node %d failed", node, exc_info=True)
                reason = f"{type(error)}:<'{error}'>"
                reply = Message(Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, reason), reply_to=message)
        else:
            reply = Message(Error(ErrorCode.NODE_UNAVAILABLE, f"there is no node {node}"), reply_to=message)
        vars(reply.metadata)["_message_id"] = uuid.uuid4().hex
        self._replies[name] = reply
        return name
