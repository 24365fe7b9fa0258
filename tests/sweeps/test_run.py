"""Runs in this process: what the jobs find, what fails, what is gone on with."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file
from small_plans import home, spec_of

from rgap import Target, audit, capture, data, losses, models, score
from rgap.attacks import Bias, Closed, Status
from rgap.defences import GaussianNoise, gradient_error
from rgap.protocol import Protocol, Sends
from rgap.sweeps import Plan, Progress, SweepStore, engine, sweep, work
from rgap.sweeps.engine import Here, Outcome
from rgap.sweeps.job import FIGURES
from rgap.sweeps.store import ROW
from rgap.training import train


@pytest.fixture(autouse=True)
def folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home(tmp_path))
    monkeypatch.setattr(sys, "path", [str(tmp_path), *sys.path])
    monkeypatch.delitem(sys.modules, "small_sweep_models", raising=False)
    work._target.cache_clear()  # of models by the same name in another test's folder
    return tmp_path


def rows(path: Path) -> list[dict[str, Any]]:
    with SweepStore(path, make=False) as opened:
        return list(opened.rows())


def test_a_job_finds_what_the_attack_finds(folder: Path) -> None:
    """Done by hand: the same capture, defence, attack and comparison."""
    plan = Plan.of(
        {
            "models": ["cnn6"],
            "seeds": [7],
            "widths": [20, 30],
            "attacks": ["closed", "bias"],
            "defences": ["none", {"name": "GaussianNoise", "strengths": [1e-3]}],
            "noise-seed": 11,
            "input-shape": [3, 8, 8],
            "images": {"count": 2},
        }
    )
    found = sweep(plan, folder / "s.sqlite")
    assert (found.jobs, found.before, found.done, found.failed) == (16, 0, 16, 0)
    images = data.photographs(2, size=8)
    for row in rows(folder / "s.sqlite"):
        if row["attack"] == "bias":
            assert row["status"] == "does not apply"
            assert "no Linear layer with a bias" in row["reason"]
            assert row["level"] is None
            continue
        target = Target(models.cnn6(3, 8, seed=7, width=row["width"]), losses.Logistic(), (3, 8, 8), (0.0, 1.0))
        at = images.names.index(row["image"])
        x, y = images.inputs[at : at + 1], torch.tensor([-1.0 if at % 2 == 0 else 1.0])
        sent = update = capture(target, x, y)
        if row["defence"] != "none":
            sent = GaussianNoise(1e-3)(update, torch.Generator().manual_seed(11 + at))
        answer = Closed()(target, sent)
        quality = score(answer, x)
        assert row["status"] == answer.status.value
        assert row["mse"] == pytest.approx(quality.mse[0], rel=1e-6, abs=1e-13)
        assert row["ssim"] is None if math.isnan(quality.ssim[0]) else row["ssim"] == pytest.approx(quality.ssim[0])
        assert row["gradient_error"] == pytest.approx(gradient_error(update, sent), rel=1e-6)
        assert row["labels_right"] == (answer.labels.tolist() == y.tolist())
    assert torch.get_num_threads() >= 1


@pytest.mark.parametrize(
    ("batch", "clients", "protocol"),
    [
        (2, 1, Protocol()),
        (1, 2, Protocol(clients=2)),
        (2, 2, Protocol(clients=2, summed=True)),
        (1, 1, Protocol(Sends.DIFFERENCE, 2, 0.05)),
        (2, 1, Protocol(Sends.DIFFERENCE, learning_rate=0.05, minibatch=1)),
    ],
    ids=["batch", "clients", "both", "local steps", "minibatches"],
)
def test_batches_clients_and_protocols_are_axes(folder: Path, batch: int, clients: int, protocol: Protocol) -> None:
    """As `rgap.audit` has it for the same samples: the best of them, and the shares of all."""
    told: dict[str, Any] = {"sends": protocol.sends.value, "summed": protocol.summed, "local-steps": protocol.steps}
    told |= {} if protocol.learning_rate is None else {"learning-rate": protocol.learning_rate}
    told |= {} if protocol.minibatch is None else {"minibatch": protocol.minibatch}
    axes = {"batch-sizes": [batch], "clients": [clients], "protocols": [{**told, "name": "ours"}]}
    plan = Plan.of(spec_of(**axes, images={"count": 2 * batch * clients}))
    assert sweep(plan, folder / "s.sqlite").failed == 0
    import small_sweep_models

    target = Target(small_sweep_models.make(0).eval(), losses.Logistic(), (1, 4, 4), (0.0, 1.0), batch)
    images = data.photographs(2 * batch * clients, size=4, channels=1)
    cases = audit(target, images, protocol=protocol, attacks=[Bias()]).cases
    found, size = rows(folder / "s.sqlite"), batch * clients
    assert [(row["batch"], row["clients"], row["protocol"]) for row in found] == 2 * [(batch, clients, "ours")]
    for at, row in enumerate(found):
        own = [case.results[0] for case in cases[at * size : (at + 1) * size] if case.results]
        if not own:
            assert row["status"] == "does not apply"
            continue
        assert row["mse"] == pytest.approx(min(each.mse for each in own), rel=1e-6, abs=1e-15)
        assert row["exact"] == sum(each.level.value == "exact" for each in own) / size


def test_a_trained_network_is_attacked_as_it_is_after_its_epochs(folder: Path) -> None:
    plan = Plan.of(
        spec_of(stages=[0, 2], attacks=["bias"], images={"count": 1}, training={"images": 6, "batch": 4, "rate": 0.01})
    )
    sweep(plan, folder / "s.sqlite")
    before, after = rows(folder / "s.sqlite")
    assert (before["stage"], after["stage"]) == (0, 2)
    assert before["accuracy"] is None
    assert 0 <= after["accuracy"] <= 1
    import small_sweep_models  # type: ignore[import-not-found]

    model = small_sweep_models.make(0).eval()
    images = data.photographs(6, size=4, channels=1).inputs
    labels = torch.tensor([-1.0, 1.0] * 3)
    train(model, losses.Logistic(), images, labels, 2, 0.01, 4, seed=0)
    target = Target(model, losses.Logistic(), (1, 4, 4), (0.0, 1.0))
    answer = Bias()(target, capture(target, images[:1], labels[:1]))
    assert after["mse"] == pytest.approx(score(answer, images[:1]).mse[0], rel=1e-6, abs=1e-18)
    assert after["mse"] != before["mse"]


def test_weights_come_from_a_file(folder: Path) -> None:
    save_file(dict(models.fcn3(16, seed=9).state_dict()), folder / "w.safetensors")
    plan = Plan.of(
        spec_of(models=["fcn3", {"name": "fcn3", "weights": "w.safetensors"}], seeds=[9], attacks=["recursive"]), folder
    )
    sweep(plan, folder / "s.sqlite")
    first, second = rows(folder / "s.sqlite")
    assert first["mse"] == second["mse"]
    assert first["status"] == second["status"] == Status.EXACT.value


def test_what_fails_keeps_its_error_and_is_tried_again_when_asked(folder: Path) -> None:
    plan, path = Plan.of(spec_of("picky", seeds=[0, 1, 2, 3])), folder / "s.sqlite"
    found = sweep(plan, path)
    assert (found.done, found.failed) == (3, 1)
    (failed,) = (row for row in rows(path) if row["state"] == "failed")
    assert failed["seed"] == 2
    assert "RuntimeError: seed 2 is bad luck" in failed["failure"].strip().splitlines()[-1]
    assert "Traceback" in failed["failure"]
    again = sweep(plan, path)
    assert (again.before, again.done, again.failed) == (3, 0, 1)
    (folder / "mended").touch()
    mended = sweep(plan, path, retry=True)
    assert (mended.before, mended.done, mended.failed) == (3, 1, 0)
    assert [row["attempts"] for row in rows(path)] == [1, 1, 2, 1]


def test_a_larger_plan_does_only_what_is_new(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = folder / "s.sqlite"
    sweep(Plan.of(spec_of(seeds=[0, 1])), path)
    done: list[int] = []
    real = work.do

    def watched(spec: Mapping[str, Any]) -> dict[str, Any]:
        done.append(spec["target"]["seed"])
        return real(spec)

    monkeypatch.setattr(engine, "do", watched)
    found = sweep(Plan.of(spec_of(seeds=[2, 1, 3])), path)
    assert done == [2, 3]
    assert (found.jobs, found.before, found.done) == (3, 1, 2)
    assert sorted(row["seed"] for row in rows(path)) == [0, 1, 2, 3]


def test_an_interruption_keeps_what_was_done_and_gives_back_the_rest(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    plan, path = Plan.of(spec_of(seeds=[0, 1, 2])), folder / "s.sqlite"
    real, calls = work.do, 0

    def impatient(spec: Mapping[str, Any]) -> dict[str, Any]:
        nonlocal calls
        calls += 1
        if calls == 2:
            raise KeyboardInterrupt
        return real(spec)

    monkeypatch.setattr(engine, "do", impatient)
    with pytest.raises(KeyboardInterrupt):
        sweep(plan, path)
    assert [row["state"] for row in rows(path)] == ["done", "waiting", "waiting"]
    assert sweep(plan, path).done == 2


class Forgetful(Here):
    """Loses the first job that it is given."""

    lost = False

    def get(self, timeout: float) -> list[tuple[str, Outcome]]:
        if not Forgetful.lost and self._jobs:
            Forgetful.lost = True
            return [(self._jobs.popleft()[0], None)]
        return super().get(timeout)


def test_what_a_worker_lost_is_done_again(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rgap.sweeps import run

    monkeypatch.setattr(Forgetful, "lost", False)
    monkeypatch.setattr(run, "Here", Forgetful)
    found = sweep(Plan.of(spec_of(seeds=[0, 1])), folder / "s.sqlite")
    assert Forgetful.lost
    assert (found.done, found.failed) == (2, 0)
    assert [row["attempts"] for row in rows(folder / "s.sqlite")] == [1, 1]  # it was not its fault


def test_progress_is_told(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from rgap.sweeps import run

    monkeypatch.setattr(run, "WAIT", 0.0)
    seen: list[Progress] = []
    sweep(Plan.of(spec_of(seeds=[0, 1, 2])), folder / "s.sqlite", progress=seen.append)
    assert [each.done for each in seen] == sorted(each.done for each in seen)
    last = seen[-1]
    assert (last.done, last.failed, last.total, last.here) == (3, 0, 3, 3)
    assert last.left == 0
    assert Progress(1, 0, 3, 0, 1.0).left is None
    assert Progress(2, 0, 10, 2, 4.0).left == pytest.approx(16.0)


def test_a_job_needs_its_supplies() -> None:
    (job,) = Plan.of(spec_of()).jobs()
    with pytest.raises(work.NotSupplied):
        work.do({**job.spec, "pictures": ["of nobody"]})


def test_a_specification_is_plain_and_its_figures_have_columns() -> None:
    for job in Plan.of(spec_of(stages=[1], defences=["sign"])).jobs():
        assert json.loads(json.dumps(job.spec)) == job.spec
    assert set(FIGURES) <= set(ROW)
