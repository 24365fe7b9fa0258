"""H-GAP: of several answers the right one is kept, and nothing is kept from a member that has none."""

from __future__ import annotations

import math
from dataclasses import dataclass

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn

from rgap import Target, Update, capture, data, losses, models, score
from rgap.attacks import DLG, Answer, Attack, Closed, Hybrid, Outcome, Reconstruction, Recursive, Rule, Status
from rgap.attacks.hybrid import choose, roughness
from rgap.checks import Preflight
from rgap.nn.obstacles import NotAChain


def small(count: int = 1) -> tuple[Target, Tensor, Update]:
    target = Target(models.cnn6(1, 12).double(), losses.Logistic(), (1, 12, 12), (0.0, 1.0))
    x = data.photographs(count, 12, channels=1).inputs.double()
    return target, x, capture(target, x[:1], torch.tensor([1.0]))


@dataclass(frozen=True, eq=False)
class Says(Attack):
    """Always the same answer, or none."""

    inputs: Tensor | None
    residual: float = 0.1
    called: str = "Says"

    @property
    def name(self) -> str:
        return self.called

    def run(self, target: Target, update: Update) -> Outcome:
        answers: tuple[Answer, ...] = ()
        if self.inputs is not None:
            labels = torch.ones(len(self.inputs), dtype=torch.float64)
            answers = (Answer(self.inputs, labels, math.nan, self.residual, math.nan),)
        return Outcome(Status.NOT_CONVERGED, f"{self.called} said", answers, (f"{self.called} assumes",))


def said(inputs: Tensor | None, residual: float = 0.1, called: str = "Says") -> Reconstruction:
    outcome = Says(inputs, residual, called).run(None, None)  # type: ignore[arg-type]
    checks = Preflight((), ())
    return Reconstruction(called, outcome.status, outcome.reason, outcome.answers, outcome.assumptions, checks, 1e-8)


def picture(roughly: float, *, batch: int = 1, seed: int = 0) -> Tensor:
    """The larger the number, the more noise."""
    ramp = torch.linspace(0, 1, 12, dtype=torch.float64).expand(batch, 1, 12, 12)
    return ramp + roughly * torch.randn(ramp.shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# The rules.


@settings(max_examples=12, deadline=None)
@given(st.integers(1, 2), st.integers(1, 3), st.integers(1, 5), st.integers(1, 5), st.integers(0, 2**31))
def test_roughness_is_the_distance_to_the_average_of_3_by_3(b: int, c: int, h: int, w: int, seed: int) -> None:
    x = torch.randn(b, c, h, w, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    total = 0.0
    for s in range(b):
        for k in range(c):
            for i in range(h):
                for j in range(w):
                    near = [
                        float(x[s, k, m, n])
                        for m in range(i - 1, i + 2)
                        for n in range(j - 1, j + 2)
                        if 0 <= m < h and 0 <= n < w
                    ]
                    total += (float(x[s, k, i, j]) - sum(near) / len(near)) ** 2
    assert roughness(x) == pytest.approx(total / x.numel(), rel=1e-9, abs=1e-15)


@pytest.mark.parametrize("batch", [1, 3])
def test_each_rule_goes_by_its_own_figure(batch: int) -> None:
    rough, smooth = picture(0.5, batch=batch), picture(0.1, batch=batch)
    found = [said(rough, residual=0.01), said(smooth, residual=0.5)]
    at, figures = choose(found, Rule.SMOOTHING)
    assert at == 1
    assert figures == [roughness(rough), roughness(smooth)]
    assert choose(found, Rule.RESIDUAL) == (0, [0.01, 0.5])


@pytest.mark.parametrize("rule", Rule)
def test_equals_keep_their_order(rule: Rule) -> None:
    assert choose([said(picture(0.1), 0.5), said(picture(0.1), 0.5)], rule)[0] == 0


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("place", [0, 1])
def test_what_has_no_answer_is_never_chosen(rule: Rule, place: int) -> None:
    found = [said(picture(5.0), residual=1e9), said(picture(5.0), residual=1e9)]
    found[1 - place] = said(None)
    at, figures = choose(found, rule)
    assert at == place
    assert figures[1 - place] == math.inf > figures[place]


@pytest.mark.parametrize("rule", Rule)
@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_answers_that_are_no_numbers_are_not_chosen(rule: Rule, bad: float) -> None:
    broken = picture(0.0)
    broken[0, 0, 3, 3] = bad
    at, figures = choose([said(broken, residual=math.nan), said(picture(5.0), residual=1e9)], rule)
    assert at == 1
    assert figures[0] == math.inf


def test_nothing_to_choose_from_is_refused() -> None:
    with pytest.raises(ValueError, match=r"^got no reconstruction, expected one or more to choose from$"):
        choose([], Rule.RESIDUAL)


def test_the_smoothing_rule_refuses_what_is_no_picture() -> None:
    found = [said(torch.ones(1, 6, dtype=torch.float64))]
    with pytest.raises(ValueError, match="smoothing rule") as refused:
        choose(found, Rule.SMOOTHING)
    assert str(refused.value) == (
        "got inputs of shape (1, 6): the smoothing rule takes pictures, (b, channels, height, width); use Rule.RESIDUAL"
    )
    assert choose(found, Rule.RESIDUAL) == (0, [0.1])


# The attack.


def test_no_members_are_refused() -> None:
    with pytest.raises(ValueError, match=r"^got no members, expected one attack or more$"):
        Hybrid(())


def test_the_answer_kept_is_the_members_own() -> None:
    target, x, update = small()
    found = Hybrid((Recursive(), Says(picture(0.5), called="noise")))(target, update)
    alone = Recursive()(target, update)
    assert (found.attack, found.status) == ("Hybrid", Status.EXACT)
    assert found.reason == f"Recursive: {alone.reason}"
    assert torch.equal(found.inputs, alone.inputs)
    assert found.layers == alone.layers
    assert score(found, x).mse[0] < 1e-12
    figures = f"Recursive {roughness(alone.inputs):.1e}, noise {roughness(picture(0.5)):.1e}"
    assert found.assumptions == (*alone.assumptions, f"the smoothing rule chooses Recursive ({figures})")


def test_the_rule_decides() -> None:
    target, _, update = small()
    members = (Says(picture(0.5), 0.1, "near"), Says(picture(0.1), 0.5, "smooth"))
    for rule, name in ((Rule.SMOOTHING, "smooth"), (Rule.RESIDUAL, "near")):
        found = Hybrid(members, rule)(target, update)
        assert found.reason == f"{name}: {name} said"
        assert found.assumptions[0] == f"{name} assumes"
        assert f"the {rule.value} rule chooses {name}" in found.assumptions[1]


@pytest.mark.parametrize("rule", Rule)
def test_a_member_without_an_answer_is_passed_over(rule: Rule) -> None:
    target, _, update = small()
    found = Hybrid((Says(None, called="none"), Says(picture(9.0), 1e9, "some")), rule)(target, update)
    assert found.reason == "some: some said"
    nothing = Hybrid((Says(None, called="none"), Says(None, called="neither")), rule)(target, update)
    assert nothing.answers == ()
    assert nothing.reason == "none: none said"


def no_chain() -> tuple[Target, Update]:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Conv2d(1, 2, 3), nn.MaxPool2d(2), nn.GELU(), nn.Flatten(), nn.Linear(2, 1), nn.Tanh()
        ).double()
    target = Target(model, losses.Logistic(), (1, 4, 4), (0.0, 1.0))
    return target, capture(target, torch.rand(1, 1, 4, 4, dtype=torch.float64), torch.tensor([1.0]))


def test_members_that_do_not_apply_are_left_out_and_named() -> None:
    target, update = no_chain()
    found = Hybrid((Recursive(), DLG(iterations=3), Closed()))(target, update)
    assert found.reason.startswith("DLG: ")
    assert found.answers
    left_out = [line for line in found.assumptions if "was left out" in line]
    assert [line.split()[0] for line in left_out] == [Recursive().name, Closed().name]
    *passed, cause = target.obstacles
    for line in left_out:
        assert str(cause) in line
        assert not any(str(each) in line for each in passed)  # the recursion goes past them


def test_nobody_left_ends_in_a_status() -> None:
    target, update = no_chain()
    with pytest.raises(NotAChain):
        Recursive()(target, update)
    both = Hybrid((Recursive(), Closed())).many(target, [update, update])
    for found in both:
        assert (found.attack, found.status, found.answers) == ("Hybrid", Status.NOT_CONVERGED, ())
        assert all(f"{name} was left out" in found.reason for name in (Recursive().name, Closed().name))
        assert "tanh" in found.reason
    assert Hybrid((Recursive(),)).many(target, []) == ()


def test_many_updates_are_decided_one_by_one() -> None:
    target, x, update = small(2)
    other = capture(target, x[1:], torch.tensor([-1.0]))
    zero = Update({name: torch.zeros_like(g) for name, g in update.gradients.items()}, update.header)
    hybrid = Hybrid((Says(picture(1.0)), Recursive()))
    together = hybrid.many(target, [update, zero, other])
    assert [found.reason.split(":")[0] for found in together] == ["Recursive", "Says", "Recursive"]
    for at, truth in ((0, x[:1]), (2, x[1:])):
        assert score(together[at], truth).mse[0] < 1e-12


def test_batches_are_compared_whole() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(1, 3, 3), nn.Tanh(), nn.Flatten(), nn.Linear(300, 3)).double()
    target = Target(model, losses.CrossEntropy(3), (1, 12, 12), (0.0, 1.0), batch_size=2)
    update = capture(target, picture(0.1, batch=2), torch.tensor([0.0, 2.0]))
    found = Hybrid((Recursive(), DLG(iterations=2), Says(picture(0.0, batch=2))))(target, update)
    assert found.reason == "Says: Says said"
    assert found.inputs.shape == (2, 1, 12, 12)
