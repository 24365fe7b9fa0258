"""The audit: what it measures and what it writes."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from rgap import Target, audit, data, losses, models
from rgap.attacks import Attack, Reconstruction, Status
from rgap.checks import Preflight
from rgap.update import Update


def small_target() -> Target:
    return Target(models.cnn6(1, 12), losses.Logistic(), (1, 12, 12), (0.0, 1.0))


def test_every_sample_is_attacked_with_labels_in_turn(tmp_path: Path) -> None:
    seen = []
    result = audit(small_target(), data.photographs(3, 12, channels=1), progress=seen.append)
    assert [case.label for case in result.cases] == [-1.0, 1.0, -1.0]
    assert [case.name for case in seen] == [case.name for case in result.cases]
    assert all(case.mse < 1e-8 for case in result.cases)
    assert result.summary == "3 of 3 pictures recovered exactly"
    result.save(tmp_path / "audit.json")
    read = json.loads((tmp_path / "audit.json").read_text())
    assert read["format"] == 1
    assert read["cases"][1]["label"] == 1.0
    assert len(read["cases"][0]["reconstruction"]["answers"][0]["layers"]) == 7


class Silent(Attack):
    """An attack that never has an answer."""

    def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
        return Reconstruction(self.name, Status.NOT_CONVERGED, "gave up", (), (), checks, 0.1)


def test_an_attack_without_an_answer_is_reported_not_scored(tmp_path: Path) -> None:
    result = audit(small_target(), data.photographs(1, 12, channels=1), attack=Silent())
    assert math.isnan(result.cases[0].mse)
    assert result.summary == "0 of 1 pictures recovered exactly, 1 not converged"
    # JSON has no NaN: it must read back with a strict parser.
    assert json.loads(json.dumps(result.to_dict(), allow_nan=False))["cases"][0]["mse"] is None


def test_one_label_for_each_sample() -> None:
    with pytest.raises(ValueError, match="shorter"):
        audit(small_target(), data.photographs(2, 12, channels=1), labels=[1.0])


def test_a_wrong_label_is_refused() -> None:
    with pytest.raises(ValueError, match=r"got label 0.*write class 0 as -1"):
        audit(small_target(), data.photographs(1, 12, channels=1), labels=[0.0])


def test_the_attack_cannot_reach_the_sample() -> None:
    """What is handed to the attack holds no tensor of the input's shape."""
    shapes: list[tuple[int, ...]] = []

    class Looks(Silent):
        def run(self, target: Target, update: Update, checks: Preflight) -> Reconstruction:
            shapes.extend(tuple(g.shape) for g in update.gradients.values())
            shapes.extend(tuple(v.shape) for v in vars(target).values() if isinstance(v, torch.Tensor))
            return super().run(target, update, checks)

    audit(small_target(), data.photographs(1, 12, channels=1), attack=Looks())
    assert (1, 1, 12, 12) not in shapes
    assert (1, 12, 12) not in shapes
