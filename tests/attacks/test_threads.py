"""Small models on one thread, large ones on all, and as many as before outside."""

import pytest
import torch
from torch import Tensor, nn

from rgap import Target, Update, attacks, capture, losses, rank_analysis
from rgap.attacks import Attack, Outcome, Status
from rgap.attacks.threads import multiplications

pytestmark = pytest.mark.usefixtures("two_threads")


class Asked(Attack):
    """Says on how many threads it runs."""

    def run(self, target: Target, update: Update) -> Outcome:
        return Outcome(Status.NOT_CONVERGED, str(torch.get_num_threads()))


def one_layer() -> tuple[Target, Update]:
    target = Target(nn.Sequential(nn.Linear(4, 3)), losses.CrossEntropy(3), input_shape=(4,))
    return target, capture(target, torch.rand(1, 4), torch.tensor([1.0]))


def test_an_attack_runs_on_one_thread() -> None:
    target, update = one_layer()
    assert Asked()(target, update).reason == "1"
    assert torch.get_num_threads() == 2


def threads_of(model: nn.Module, monkeypatch: pytest.MonkeyPatch) -> set[int]:
    """That the passes of a matching attack over this model ran on."""
    seen = set()

    def forward(_: nn.Module, inputs: tuple[Tensor, ...]) -> None:
        seen.add(torch.get_num_threads())

    target = Target(model, losses.CrossEntropy(3), input_shape=(4,))
    update = capture(target, torch.rand(1, 4), torch.tensor([1.0]))
    model[0].register_forward_pre_hook(forward)
    attacks.Matching(iterations=2)(target, update)
    return seen


def test_small_passes_of_matching_run_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    assert threads_of(nn.Sequential(nn.Linear(4, 3)), monkeypatch) == {1}


def test_large_passes_run_on_all(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rgap.attacks.threads.LARGE", 12)
    assert 2 in threads_of(nn.Sequential(nn.Linear(4, 3)), monkeypatch)
    monkeypatch.setattr("rgap.attacks.threads.LARGE", 13)
    assert threads_of(nn.Sequential(nn.Linear(4, 3)), monkeypatch) == {1}


def test_rank_analysis_runs_on_one_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    seen = []
    target, _ = one_layer()
    rank_analysis(target, progress=lambda *_: seen.append(torch.get_num_threads()))
    assert set(seen) == {1}
    assert torch.get_num_threads() == 2


def test_multiplications_are_those_of_the_layers() -> None:
    model = nn.Sequential(nn.Conv2d(3, 8, 3, 2, 1), nn.ReLU(), nn.Flatten(), nn.Linear(8 * 4 * 4, 5))
    target = Target(model, losses.CrossEntropy(5), input_shape=(3, 8, 8), batch_size=2)
    assert multiplications(target) == 8 * 4 * 4 * 3 * 3 * 3 + 128 * 5
