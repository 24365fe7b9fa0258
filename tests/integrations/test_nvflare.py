"""With NVFlare's filters where it is installed, else with a stand-in of their interface."""

from __future__ import annotations

import importlib
import importlib.util
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rgap import Target, attacks, defences, federation, losses
from rgap.protocol import Protocol, Sends
from rgap.update import UpdateError

RATE = 0.1
DIFFERENCE = Protocol(Sends.DIFFERENCE, learning_rate=RATE)


class Filter:
    """As much of `DXOFilter` as is used here."""

    def __init__(self, supported_data_kinds: list[str] | None, data_kinds_to_filter: list[str] | None):
        self.data_kinds = data_kinds_to_filter or supported_data_kinds

    def set_prop(self, key: str, value: Any) -> None:
        setattr(self, key, value)

    def get_prop(self, key: str, default: Any = None) -> Any:
        return getattr(self, key, default)


class Dxo:
    def __init__(self, data_kind: str, data: dict[str, Any]):
        self.data_kind, self.data = data_kind, data


STAND_IN = {
    "nvflare": {},
    "nvflare.apis": {},
    "nvflare.apis.dxo": {"DXO": Dxo, "DataKind": SimpleNamespace(WEIGHTS="WEIGHTS", WEIGHT_DIFF="WEIGHT_DIFF")},
    "nvflare.apis.dxo_filter": {"DXOFilter": Filter},
    "nvflare.apis.event_type": {"EventType": SimpleNamespace(END_RUN="_end_run")},
}  # fmt: skip


class Context:
    """A server's, as far as filters look into it; what is sticky is common to all clients."""

    def __init__(self, sticky: dict[str, Any], peer: str):
        self.sticky, self.peer = sticky, SimpleNamespace(get_identity_name=lambda: peer)

    def get_peer_context(self) -> Any:
        return self.peer

    def set_prop(self, key: str, value: Any, private: bool, sticky: bool) -> None:
        assert private
        assert sticky
        self.sticky[key] = value

    def get_prop(self, key: str) -> Any:
        return self.sticky.get(key)


@pytest.fixture
def ours(monkeypatch: pytest.MonkeyPatch) -> Iterator[ModuleType]:
    if importlib.util.find_spec("nvflare") is None:
        for name, content in STAND_IN.items():
            module = ModuleType(name)
            vars(module).update(content)
            monkeypatch.setitem(sys.modules, name, module)
    monkeypatch.delitem(sys.modules, "rgap.integrations.nvflare", raising=False)
    yield importlib.import_module("rgap.integrations.nvflare")
    sys.modules.pop("rgap.integrations.nvflare", None)


def make_target() -> Target:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    return Target(model.eval(), losses.CrossEntropy(3), (4,), (0.0, 1.0))


def step(target: Target, part: int) -> tuple[Tensor, dict[str, Tensor]]:
    """A client's sample, and its weights after a step of SGD; with plain torch."""
    x = torch.rand(1, 4, generator=torch.Generator().manual_seed(part))
    model = target.model
    grads = torch.autograd.grad(nn.functional.cross_entropy(model(x), torch.tensor([part % 3])), [*model.parameters()])
    names = [name for name, _ in model.named_parameters()]
    return x, {n: target.parameters[n] - RATE * g for n, g in zip(names, grads, strict=True)}


def arrays(state: dict[str, Tensor]) -> dict[str, Any]:
    return {name: t.numpy().copy() for name, t in state.items()}


def shareable(number: int) -> Any:
    return SimpleNamespace(get_header=lambda key: number if key == "current_round" else None)


@pytest.mark.parametrize("kind", ["WEIGHTS", "WEIGHT_DIFF"])
@pytest.mark.parametrize("form", [arrays, dict])
def test_what_the_server_was_sent_is_kept_and_attacked(
    ours: ModuleType, tmp_path: Path, kind: str, form: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    target, sticky = make_target(), dict[str, Any]()
    given = dict(target.parameters)
    data, results = (ours.Capture(target, tmp_path, DIFFERENCE) for _ in range(2))
    for each, chain in ((data, "task_data"), (results, "task_result")):
        each.set_prop("__chain_type", chain)
    truth: dict[tuple[int, str], Tensor] = {}
    for number in (1, 2):
        for part, client in enumerate(("site-1", "site-2")):
            context = Context(sticky, client)
            data.process_dxo(ours.DXO("WEIGHTS", data=form(given)), shareable(number), context)
            truth[number, client], after = step(target, part + number)
            sent = after if kind == "WEIGHTS" else {name: after[name] - given[name] for name in after}
            dxo = ours.DXO(kind, data=form(sent))
            assert results.process_dxo(dxo, shareable(number), context) is None
            assert all(np.array_equal(dxo.data[name], form(sent)[name]) for name in sent)  # what passes is not changed
    assert [found.number for found in federation.read(tmp_path)] == [1]
    results.handle_event(ours.EventType.END_RUN, None)
    rounds = list(federation.read(tmp_path))
    assert [found.number for found in rounds] == [1, 2]
    for found in rounds:
        ((seen, updates),) = found.by_target(target)
        assert set(updates) == {"site-1", "site-2"}
        for client, update in updates.items():
            answer = attacks.Bias()(seen, update)
            torch.testing.assert_close(answer.inputs, truth[found.number, client], atol=1e-3, rtol=0, check_dtype=False)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda sent: sent.pop("0.bias"), "do not fit the model"),
        (lambda sent: sent.update({"0.bias": np.zeros(7, np.float32)}), "0.bias"),
        (lambda sent: sent["0.bias"].fill(np.nan), "finite"),
    ],
    ids=["missing", "shape", "nan"],
)
def test_what_is_no_update_is_kept_with_the_reason(
    ours: ModuleType, tmp_path: Path, change: Callable[[dict[str, Any]], object], reason: str
) -> None:
    target, context = make_target(), Context({}, "site-1")
    filters = [ours.Capture(target, tmp_path, DIFFERENCE) for _ in range(2)]
    filters[0].set_prop("__chain_type", "task_data")
    filters[0].process_dxo(ours.DXO("WEIGHTS", data=arrays(dict(target.parameters))), shareable(1), context)
    sent = arrays(step(target, 0)[1])
    change(sent)
    filters[1].process_dxo(ours.DXO("WEIGHTS", data=sent), shareable(1), context)
    filters[1].handle_event(ours.EventType.END_RUN, None)
    ((node,),) = (found.nodes for found in federation.read(tmp_path))
    assert node.update is None
    assert reason in node.failed


@pytest.mark.parametrize("defence", [defences.Sign(), defences.TopK(0.25), defences.GaussianNoise(0.1)], ids=str)
@pytest.mark.parametrize("form", [arrays, dict])
def test_what_a_client_sends_is_defended(
    ours: ModuleType, defence: Any, form: Callable[[dict[str, Tensor]], dict[str, Any]]
) -> None:
    target = make_target()
    change = {name: t - target.parameters[name] for name, t in step(target, 0)[1].items()}
    whole = {**change, "1.running_mean": torch.ones(2), "count": torch.tensor(3)}
    dxo = ours.DXO("WEIGHT_DIFF", data=form(whole))
    sent = ours.Defend(defence, seed=5).process_dxo(dxo, shareable(1), None).data
    from rgap.update import Update

    expected = defence(Update(change), torch.Generator().manual_seed(5)).gradients
    for name, value in sent.items():
        want = expected.get(name, whole[name])
        assert type(value) is type(form(whole)[name])
        torch.testing.assert_close(torch.as_tensor(value), want, check_dtype=False)


def test_what_cannot_be_defended_is_not_sent(ours: ModuleType) -> None:
    dxo = ours.DXO("WEIGHTS", data={"0.weight": np.ones(3, np.float32)})
    with pytest.raises(UpdateError, match="expected weight differences: set params_transfer_type to DIFF"):
        ours.Defend(defences.Sign()).process_dxo(dxo, shareable(1), None)
    dxo = ours.DXO("WEIGHT_DIFF", data={"0.weight": np.ones(3, np.float32)})
    with pytest.raises(UpdateError, match=r"the client sends no 0\.bias"):
        ours.Defend(defences.Sign(), trained=["0.bias"]).process_dxo(dxo, shareable(1), None)


def test_without_nvflare_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("nvflare", "nvflare.apis.dxo"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "rgap.integrations.nvflare", raising=False)
    with pytest.raises(ImportError, match=r"needs NVFlare 2\.4 or later"):
        importlib.import_module("rgap.integrations.nvflare")
