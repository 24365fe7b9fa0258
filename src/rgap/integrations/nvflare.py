"""NVFlare: filters that keep what the server of a federation was sent, and that defend what a client sends.

NVFlare makes filters from the path of a class, without arguments that are no JSON: make classes of your own.

    class Kept(Capture):  # a filter of task data and of task results, on the server
        def __init__(self):
            super().__init__(make_target(), "captured", Protocol(Sends.DIFFERENCE, learning_rate=0.1))

    class Noisy(Defend):  # a filter of task results, on the clients
        def __init__(self):
            super().__init__(GaussianNoise(1e-2))

For NVFlare 2.4 or later.
"""

from __future__ import annotations

import logging
import threading
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from rgap.defences import Defence
from rgap.federation import Received, Round, write
from rgap.integrations.common import Reader, going_on, protect
from rgap.protocol import Protocol
from rgap.target import Target
from rgap.update import UpdateError

try:
    from nvflare.apis.dxo import DXO, DataKind
    from nvflare.apis.dxo_filter import DXOFilter
    from nvflare.apis.event_type import EventType
except ImportError as error:
    raise ImportError(
        f"rgap.integrations.nvflare needs NVFlare 2.4 or later ({error}): install it with pip install nvflare"
    ) from error

_LOG = logging.getLogger(__name__)
KINDS = [DataKind.WEIGHTS, DataKind.WEIGHT_DIFF]
SENT = "rgap.sent"
"""Under which a server's context remembers the weights that were sent last, for the filter of the results."""
ROUND = "current_round"


class Defend(DXOFilter):  # type: ignore[misc]
    """Defends what a client sends: a filter of task results, on the client.

    Clients must send weight differences (`params_transfer_type` DIFF): a filter of results does not see the weights
    that came. What cannot be defended is not sent.

    Args:
        defence, trained, seed: as in `rgap.integrations.flower.defend`.
    """

    def __init__(self, defence: Defence, trained: Iterable[str] | None = None, seed: int | None = None):
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=KINDS)
        self.defence, self.trained = defence, None if trained is None else frozenset(trained)
        self._seeded = None if seed is None else torch.Generator().manual_seed(seed)

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> DXO:
        """The same, with the defended values in place."""
        if dxo.data_kind != DataKind.WEIGHT_DIFF:
            raise UpdateError("the client sends weights, expected weight differences: set params_transfer_type to DIFF")
        sent = protect(self.defence, _tensors(dxo.data), None, self.trained, self._seeded)
        dxo.data = {name: _like(sent[name], value) if name in sent else value for name, value in dxo.data.items()}
        return dxo


class Capture(DXOFilter):  # type: ignore[misc]
    """Keeps what each client sent: a filter of both task data (outgoing) and task results (incoming), on the server.

    What passes is not changed. A round is written when the first result of the next one comes, and the last one when
    the run ends. What is no update of the model is kept with the reason.

    Args:
        target, folder, protocol, batch_size, partial: as in `rgap.integrations.flower.Capture`. NVFlare's
            clients do not say how many samples they have: batch_size does, by default the target's.
    """

    def __init__(
        self,
        target: Target,
        folder: str | Path,
        protocol: Protocol,
        batch_size: int | None = None,
        partial: bool = False,
    ):
        super().__init__(supported_data_kinds=KINDS, data_kinds_to_filter=KINDS)
        self.folder = Path(folder)
        self.folder.mkdir(parents=True, exist_ok=True)
        size = target.batch_size if batch_size is None else batch_size
        self._readers = {
            kind: Reader(target, protocol, size, differences=kind == DataKind.WEIGHT_DIFF, partial=partial)
            for kind in KINDS
        }
        self._number, self._nodes = 0, dict[str, Received]()
        self._lock = threading.Lock()  # results of several clients come at once

    def process_dxo(self, dxo: DXO, shareable: Any, fl_ctx: Any) -> None:
        """Nothing: what passes is not changed."""
        peer = fl_ctx.get_peer_context()
        node = "" if peer is None else peer.get_identity_name()
        with going_on(_LOG, f"what {node or 'a client'} sent is not kept"), self._lock:
            if str(self.get_prop("__chain_type", "")) == "task_data":
                fl_ctx.set_prop(SENT, _tensors(dxo.data), private=True, sticky=True)
                return
            number = int(shareable.get_header(ROUND) or fl_ctx.get_prop(ROUND) or 0)
            if number != self._number:
                self._write()
                self._number = number
            weights = fl_ctx.get_prop(SENT) or {}
            found = self._readers[dxo.data_kind].received(node, weights, lambda: _tensors(dxo.data), {}, {})
            if found.failed:
                _LOG.warning("round %d: %s sent no update: %s", number, node, found.failed)
            self._nodes[node] = found

    def handle_event(self, event_type: str, fl_ctx: Any) -> None:
        """Write the last round when the run ends."""
        if event_type == EventType.END_RUN:
            with going_on(_LOG, "the last round is not kept"), self._lock:
                self._write()

    def _write(self) -> None:
        nodes, self._nodes = tuple(self._nodes.values()), {}
        if nodes:
            write(self.folder, Round(self._number, nodes))


def _tensors(data: Mapping[str, Any]) -> dict[str, Tensor]:
    return {name: torch.as_tensor(value).detach().cpu().clone() for name, value in data.items()}


def _like(value: Tensor, given: Any) -> Any:
    """As what was given: a tensor, or an array of its type."""
    if isinstance(given, Tensor):
        return value.to(given)
    return value.numpy().astype(np.asarray(given).dtype)
