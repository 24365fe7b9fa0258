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
    measured = 2.1 * 2**30  # the peak of all passes and linearisations, less what was taken before
    assert memory(network) == pytest.approx(measured, rel=0.2)


# Seconds of one thread at 5e10 operations a second, of steps of rate 0.01 and 0.1; the last less what older code
# of its first half took longer.
@pytest.mark.parametrize(("steps", "measured"), [(2, (150, 231)), (5, (210, 573)), (10, (464, 1220))])
def test_time_is_foretold_to_a_factor_of_two(network: Network, steps: int, measured: tuple[int, int]) -> None:
    foretold = operations_to_the_end(network, steps) / 5e10
    assert measured[1] / 2 < foretold < 2 * measured[0]
    assert 2 * operations(network) / 5e10 == pytest.approx(60, rel=0.4)  # of the first pass
