"""``--fail-if``: what a condition is, and when it holds."""

from __future__ import annotations

import math
from collections.abc import Sequence

import click
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from rgap.attacks import Status
from rgap.auditing import Case, Result
from rgap.cli.condition import Condition, condition

HOLDS = {
    ">": lambda a, b: a > b,
    ">=": lambda a, b: a >= b,
    "<": lambda a, b: a < b,
    "<=": lambda a, b: a <= b,
}


def parsed(text: str) -> Condition:
    found = condition(click.Context(click.Command("audit")), click.Option(["--fail-if"]), text)
    assert found is not None
    return found


def case(*qualities: tuple[float, float]) -> Case:
    """A sample with one result for each PSNR and SSIM; those of 50 dB and more are exact."""
    results = tuple(
        Result(
            attack="Some", status=Status.REPRODUCED, reason="", mse=0.1, psnr=psnr, ssim=ssim, shape_psnr=psnr,
            best_mse=0.1, gradient_residual=0.0, reproduced=True, error=0.0, seconds=0.0, labels=(), labels_right=False,
            twins=0, assumptions=(), warnings=(),
        )
        for psnr, ssim in qualities
    )  # fmt: skip
    return Case("a", torch.zeros(1, 2), 1.0, results)


FOUR: Sequence[Case] = [case((60.0, 0.99)), case((10.0, 0.1), (25.0, 0.3)), case((5.0, math.nan)), case()]


@pytest.mark.parametrize(("figure", "value"), [("psnr", 60.0), ("ssim", 0.99), ("exact", 0.25), ("recognisable", 0.5)])
def test_the_figures(figure: str, value: float) -> None:
    assert Condition(figure, ">", 0.0).value(FOUR) == value


@given(
    figure=st.sampled_from(["psnr", "ssim", "exact", "recognisable"]),
    sign=st.sampled_from(sorted(HOLDS)),
    bound=st.sampled_from([-1.0, 0.0, 0.25, 0.5, 0.99, 1.0, 20.0, 60.0, 61.0]),
)
def test_a_condition_holds_as_its_sign_says(figure: str, sign: str, bound: float) -> None:
    value = Condition(figure, sign, 0.0).value(FOUR)
    assert Condition(figure, sign, bound).holds(FOUR) is HOLDS[sign](value, bound)


@pytest.mark.parametrize("sign", sorted(HOLDS))
@pytest.mark.parametrize("figure", ["psnr", "ssim"])
def test_without_a_figure_nothing_holds(figure: str, sign: str) -> None:
    for cases in ([case()], [case((math.nan, math.nan))]):
        assert math.isnan(Condition(figure, sign, 1.0).value(cases))
        assert not Condition(figure, sign, 1.0).holds(cases)


@given(
    figure=st.sampled_from(["psnr", "ssim", "exact", "recognisable"]),
    sign=st.sampled_from(sorted(HOLDS)),
    bound=st.floats(-1e6, 1e6),
    spaces=st.lists(st.sampled_from(["", " ", "  "]), min_size=4, max_size=4),
)
def test_conditions_are_read(figure: str, sign: str, bound: float, spaces: list[str]) -> None:
    before, inside, between, after = spaces
    assert parsed(f"{before}{figure}{inside}{sign}{between}{bound!r}{after}") == Condition(figure, sign, bound)


def test_a_condition_is_told_as_it_was_given() -> None:
    for text in ("psnr>20", "ssim<=0.5", "exact>0", "recognisable>=0.1"):
        assert str(parsed(text)) == text
        assert parsed(str(parsed(text))) == parsed(text)


@pytest.mark.parametrize(
    "text",
    ["", "psnr", "psnr>", ">20", "psnr=20", "psnr==20", "psnr>>20", "mse>1", "PSNR>20", "psnr>twenty", "psnr>1e",
     "psnr>nan", "psnr>1>2", "psnr>20; exact>0", "psnr>--1", "psnr>20dB"],
)  # fmt: skip
def test_what_is_no_condition_is_refused(text: str) -> None:
    with pytest.raises(click.BadParameter, match="expected one of psnr, ssim, exact, recognisable") as caught:
        parsed(text)
    assert repr(text) in str(caught.value)


def test_no_condition_is_none() -> None:
    assert condition(click.Context(click.Command("audit")), click.Option(["--fail-if"]), None) is None
