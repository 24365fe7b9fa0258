"""What is said of the error of inputs on the way, whose units do not all stand on their sides yet."""

from __future__ import annotations

import pytest

from rgap.inversion.prior import Prior
from rgap.inversion.smoother.setting import Setting
from rgap.inversion.smoother.smooth import Reached, smooth
from tests.inversion.smoother.test_steps import of


@pytest.mark.parametrize("number", [2, 4])
def test_sides_that_are_open_count_once_in_the_stated_error(number: int, monkeypatch: pytest.MonkeyPatch) -> None:
    steps, x = of(number)
    k = steps.output_gradient(steps.middle_network.forward(x)[-1])
    passed, nearer = list[Reached](), Reached.nearer

    def noted(self: Reached, other: Reached) -> bool:
        passed.append(self)
        return nearer(self, other)

    monkeypatch.setattr(Reached, "nearer", noted)
    assert smooth(Setting(steps, Prior((1, 5, 5), 0.5), (0.0, 1.0)), k, 2.0) is not None
    assert max(found.misfit for found in passed if found.through) > 1000
    for found in passed:
        off = float((found.x - x).square().mean().sqrt())
        assert off / 5 < found.error < 100 * off
