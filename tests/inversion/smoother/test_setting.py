"""What a search takes, as far as it is foretold, against what was measured."""

from __future__ import annotations

import pytest

from rgap import Target, losses, models
from rgap.inversion.smoother.setting import memory, operations, operations_to_the_end
from rgap.nn.network import Network


@pytest.fixture(scope="module")
def network() -> Network:
    return Target(models.cnn6(), losses.Logistic(), (3, 32, 32), (0.0, 1.0)).network


def test_memory_with_all_doubts(network: Network) -> None:
    measured = 3.3 * 2**30  # the peak of a linearisation with 2,138 of them, less what was taken before
    assert memory(network) == pytest.approx(measured, rel=0.2)


def test_time_grows_with_local_steps(network: Network) -> None:
    two, ten = (operations_to_the_end(network, steps) for steps in (2, 10))
    assert 12 * operations(network) < two < ten < 5 * two
