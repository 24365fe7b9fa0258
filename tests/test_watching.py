"""Watching a training: what is seen is the gradient, the training stays as it is, and no hook is left behind."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Iterator
from contextlib import nullcontext
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, Adam, Optimizer

import rgap
from rgap import Target, attacks, losses, watch
from rgap.target import fingerprint


def make_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.BatchNorm1d(6), nn.ReLU(), nn.Dropout(0.3), nn.Linear(6, 1))


def batches(count: int, size: int = 3) -> Iterator[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(1)
    for _ in range(count):
        yield torch.randn(size, 4, generator=generator), torch.randn(size, generator=generator).sign()


def loss_of(model: nn.Module, x: Tensor, y: Tensor) -> Tensor:
    return nn.functional.softplus(-y * model(x).squeeze(1)).mean()


def train(model: nn.Module, optimizer: Optimizer, steps: int = 3, seen: list[dict[str, Tensor]] | None = None) -> None:
    """A plain loop; before each step the gradients are noted by hand."""
    torch.manual_seed(3)  # of the dropout
    for x, y in batches(steps):
        optimizer.zero_grad()
        loss_of(model, x, y).backward()
        if seen is not None:
            seen.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
        optimizer.step()


def hooks(model: nn.Module, optimizer: Optimizer) -> int:
    own = [len(p._backward_hooks or ()) + len(p._post_accumulate_grad_hooks or ()) for p in model.parameters()]
    return sum(own) + len(optimizer._optimizer_step_pre_hooks) + len(optimizer._optimizer_step_post_hooks)


MAKERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, 0.1, momentum=0.9, weight_decay=0.01),
    "Adam": lambda parameters: Adam(parameters, 0.01),
    "fused Adam": lambda parameters: Adam(parameters, 0.01, fused=True),
}


@pytest.mark.parametrize("through", ["optimizer", "model"])
@pytest.mark.parametrize("name", MAKERS)
def test_the_training_is_the_same_bit_for_bit(name: str, through: str) -> None:
    results, noted = [], []
    for watched in (False, True):
        model = make_model()
        optimizer = MAKERS[name](model.parameters())
        context = watch(optimizer if through == "optimizer" else model, model=model) if watched else nullcontext()
        by_hand: list[dict[str, Tensor]] = []
        with context as seen:
            train(model, optimizer, seen=by_hand)
        results.append((model.state_dict(), optimizer.state_dict()["state"]))
        noted.append(by_hand)
    assert seen is not None
    assert all(torch.equal(t, results[1][0][n]) for n, t in results[0][0].items())
    for at, values in results[0][1].items():
        assert all(torch.equal(t, results[1][1][at][n]) for n, t in values.items() if isinstance(t, Tensor))
    assert seen.steps == 3
    for update, expected in zip(seen.updates, noted[0], strict=True):
        assert list(update.gradients) == list(expected)
        assert all(torch.equal(g, expected[n]) for n, g in update.gradients.items())


@pytest.mark.parametrize("through", ["optimizer", "model"])
def test_the_header_tells_of_the_model_before_the_step(through: str) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    target = Target(model, losses.Logistic(), (4,), batch_size=3)
    prints = []
    with watch(optimizer if through == "optimizer" else model, target) as seen:
        for x, y in batches(2):
            prints.append(fingerprint(model))
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
    assert [update.header.fingerprint for update in seen.updates] == prints
    assert prints[0] == target.fingerprint != prints[1]
    for at, update in enumerate(seen.updates):
        header = update.header
        assert (header.batch_size, header.loss, header.input_shape, header.training) == (3, "logistic", (4,), True)
        update.check(seen.target(at))
    assert seen.target().fingerprint == prints[1]
    with watch(optimizer, target, batch_size=5) as other:
        train(model, optimizer, 1)
    assert other.updates[0].header.batch_size == 5


def test_what_is_seen_can_be_attacked() -> None:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 1)).double()
    target = Target(model, losses.Logistic(), (6,))
    optimizer = SGD(model.parameters(), 0.1)
    x = torch.linspace(-1, 1, 6, dtype=torch.float64)[None]
    with watch(optimizer, target) as seen:
        for scale in (1.0, 0.5):
            optimizer.zero_grad()
            loss_of(model, scale * x, torch.tensor([1.0])).backward()
            optimizer.step()
    for at, scale in enumerate((1.0, 0.5)):
        found = attacks.Bias()(seen.target(at), seen.updates[at])
        assert rgap.score(found, truth=scale * x).mse[0] < 1e-20


@pytest.mark.parametrize("through", ["optimizer", "model"])
@pytest.mark.parametrize("fails", [False, True])
def test_no_hook_is_left_behind(through: str, fails: bool) -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    with (
        pytest.raises(ZeroDivisionError) if fails else nullcontext(),
        watch(optimizer if through == "optimizer" else model, model=model) as seen,
    ):
        assert hooks(model, optimizer) > 0
        train(model, optimizer, 1)
        if fails:
            raise ZeroDivisionError
    assert hooks(model, optimizer) == 0
    train(model, optimizer, 1)
    assert len(seen.updates) == 1


# What a step is.


def test_an_optimizer_gets_what_was_accumulated_and_a_model_what_each_pass_adds() -> None:
    model = make_model().eval()
    optimizer = SGD(model.parameters(), 0.1)
    parts, by_hand = [], []
    with watch(optimizer, model=model) as steps, watch(model) as passes:
        for x, y in batches(2):
            by_hand.append(torch.autograd.grad(loss_of(model, x, y), list(model.parameters())))
            loss_of(model, x, y).backward()
            parts.append(passes.updates[-1].gradients)
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        expected = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
    assert steps.steps == 1
    for part, gradients in zip(parts, by_hand, strict=True):
        assert all(torch.equal(one, two) for one, two in zip(part.values(), gradients, strict=True))
    assert all(torch.equal(g, expected[n]) for n, g in steps.updates[0].gradients.items())
    total = {n: parts[0][n] + parts[1][n] for n in parts[0]}
    norm = torch.cat([t.flatten() for t in total.values()]).norm()
    for name, gradient in steps.updates[0].gradients.items():
        assert torch.allclose(gradient, total[name] * 0.1 / norm, rtol=1e-4, atol=1e-7)


def test_frozen_and_unused_parameters() -> None:
    model = make_model()
    model[0].requires_grad_(False)
    model.unused = nn.Linear(2, 2)
    optimizer = SGD(model.parameters(), 0.1)
    x, y = next(batches(1))
    with watch(optimizer, model=model) as steps, watch(model) as passes:
        torch.nn.functional.softplus(-y * nn.Sequential(*list(model)[:5])(x).squeeze(1)).mean().backward()
        optimizer.step()
    for update in (steps.updates[0], passes.updates[0]):
        assert not any(name.startswith("0.") for name in update.gradients)
        assert not update.gradients["unused.weight"].any()
        assert update.gradients["4.weight"].any()


def test_shared_parameters_are_counted_once() -> None:
    layer = nn.Linear(4, 4)
    model = nn.Sequential(layer, nn.Tanh(), layer, nn.Linear(4, 1))
    optimizer = SGD(model.parameters(), 0.1)
    by_hand: list[dict[str, Tensor]] = []
    with watch(optimizer, model=model) as steps, watch(model) as passes:
        train(model, optimizer, 2, by_hand)
    for seen in (steps, passes):
        assert seen.steps == 2
        for update, expected in zip(seen.updates, by_hand, strict=True):
            assert list(update.gradients) == ["0.weight", "0.bias", "3.weight", "3.bias"]
            assert all(torch.equal(g, expected[n]) for n, g in update.gradients.items())


@pytest.mark.parametrize("fused", [False, True])
def test_the_scale_of_mixed_precision_is_taken_off(fused: bool) -> None:
    model = make_model().eval()
    optimizer = SGD(model.parameters(), 0.1, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    x, y = next(batches(1))
    expected = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
    with watch(optimizer, model=model) as steps, watch(model) as passes:
        scaler.scale(loss_of(model, x, y)).backward()
        scaler.step(optimizer)
        scaler.update()
    for found, scaled, gradient in zip(
        steps.updates[0].gradients.values(), passes.updates[0].gradients.values(), expected, strict=True
    ):
        assert torch.allclose(found, gradient, rtol=1e-5, atol=1e-9)
        assert torch.allclose(scaled, 1024 * gradient, rtol=1e-5, atol=1e-6)


def test_a_step_that_is_not_finite_is_named_and_the_training_goes_on() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    with watch(optimizer, model=model) as seen:
        train(model, optimizer, 1)
        for p in model.parameters():
            assert p.grad is not None
            p.grad.fill_(float("nan"))
        optimizer.step()
    assert (seen.steps, len(seen.updates)) == (2, 1)
    assert len(seen.failed) == 1
    assert "step 2: 0.weight: 24 of 24 values are NaN" in seen.failed[0]


def test_only_the_last_steps_are_kept() -> None:
    model = make_model()
    optimizer = SGD(model.parameters(), 0.1)
    by_hand: list[dict[str, Tensor]] = []
    with watch(optimizer, model=model, keep=2) as seen, watch(optimizer, model=model, keep=None) as all_of_them:
        train(model, optimizer, 12, by_hand)
    assert (seen.steps, len(seen.updates), len(seen.weights)) == (12, 2, 2)
    assert len(all_of_them.updates) == 12
    assert all(torch.equal(g, by_hand[-1][n]) for n, g in seen.updates[-1].gradients.items())


def test_two_optimizers_are_watched_apart() -> None:
    model = make_model()
    one, two = SGD(model[0].parameters(), 0.1), SGD(model[4].parameters(), 0.1)
    with watch(one, model=model) as first, watch(two, model=model) as second:
        train(model, one, 1)
        two.step()
    assert list(first.updates[0].gradients) == ["0.weight", "0.bias"]
    assert list(second.updates[0].gradients) == ["4.weight", "4.bias"]


# What cannot be watched.


def test_an_optimizer_alone_has_no_names() -> None:
    with (
        pytest.raises(ValueError, match="pass model=, the model that it trains, or target="),
        watch(SGD(make_model().parameters(), 0.1)),
    ):
        pass


def test_the_model_must_be_the_one_that_is_trained() -> None:
    with (
        pytest.raises(ValueError, match="the model holds 0 of the 6 parameters"),
        watch(SGD(make_model().parameters(), 0.1), model=make_model()),
    ):
        pass


def test_without_a_target_there_is_none() -> None:
    model = make_model()
    with watch(model) as seen:
        loss_of(model, *next(batches(1))).backward()
    assert seen.updates[0].header.loss is None
    with pytest.raises(ValueError, match="pass target="):
        seen.target()


def test_a_gradient_that_is_asked_for_is_a_pass_too_and_one_that_fails_is_none() -> None:
    model = make_model().eval()
    (x, y), (other, _) = batches(2)
    x.requires_grad_()
    names = [name for name, _ in model.named_parameters()]

    class Failing(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, x: Tensor) -> Tensor:
            return x.clone()

        @staticmethod
        def backward(ctx: Any, *gradients: Tensor) -> Tensor:
            raise ZeroDivisionError

    with watch(model) as seen:
        expected = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
        torch.autograd.grad(loss_of(model, x, y), x)  # reaches no parameter
        with pytest.raises(ZeroDivisionError):
            model[4](Failing.apply(model[:4](other))).sum().backward()
        torch.autograd.grad(loss_of(model, x, y), [model[0].weight])
    assert seen.steps == 2
    assert all(torch.equal(g, e) for g, e in zip(seen.updates[0].gradients.values(), expected, strict=True))
    second = seen.updates[1].gradients
    assert torch.equal(second["0.weight"], expected[0])
    assert not any(second[name].any() for name in names if name != "0.weight")


def test_a_training_that_steps_within_the_pass_is_seen_as_it_was_before() -> None:
    model = make_model().eval()
    x, y = next(batches(1))
    expected = torch.autograd.grad(loss_of(model, x, y), list(model.parameters()))
    before = fingerprint(model)

    def step(p: Tensor) -> None:
        assert p.grad is not None
        p.data.sub_(p.grad, alpha=0.1)
        p.grad.zero_()

    for p in model.parameters():
        p.register_post_accumulate_grad_hook(step)
    with watch(model) as seen:
        loss_of(model, x, y).backward()
    assert fingerprint(model) != before == seen.updates[0].header.fingerprint
    assert all(torch.equal(g, e) for g, e in zip(seen.updates[0].gradients.values(), expected, strict=True))


# Optimizers and models as people have them.


class Around:
    """An optimizer around another one, without what the base class sets up."""

    def __init__(self, base: Any):
        self.base, self.param_groups = base, base.param_groups

    def step(self, closure: Callable[[], Tensor] | None = None) -> object:
        return self.base.step(closure)

    def zero_grad(self) -> None:
        self.base.zero_grad()


class Lookahead(Around, Optimizer):
    pass


WRAPPED: dict[str, Callable[[Optimizer], Any]] = {
    "itself": lambda base: base,
    "around it": Around,
    "an optimizer around it": Lookahead,
    "three around it": lambda base: Lookahead(Around(Lookahead(base))),
}
STEPS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda parameters: SGD(parameters, 0.1),
    "Adam": lambda parameters: Adam(parameters, 0.01),
    "LBFGS": lambda parameters: torch.optim.LBFGS(parameters, max_iter=3),
}


def plain_model() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 1))


@pytest.mark.parametrize("how", ["step()", "step(closure)", "step(closure=closure)"])
@pytest.mark.parametrize("name", STEPS)
@pytest.mark.parametrize("wrap", WRAPPED)
def test_each_step_has_its_own_gradient(wrap: str, name: str, how: str) -> None:
    """Whatever is around the optimizer, and whoever asks for the gradient."""
    if (name, how) == ("LBFGS", "step()"):
        return  # it needs a closure
    model = plain_model()
    optimizer = WRAPPED[wrap](STEPS[name](model.parameters()))
    expected: list[dict[str, Tensor]] = []
    with watch(optimizer, model=model) as seen:
        for x, y in batches(3):
            first = True

            def closure(x: Tensor = x, y: Tensor = y) -> Tensor:
                nonlocal first
                optimizer.zero_grad()
                loss = loss_of(model, x, y)
                loss.backward()
                if first:
                    expected.append({n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None})
                first = False
                return loss

            if how == "step()":
                closure()
                optimizer.step()
            elif how == "step(closure)":
                optimizer.step(closure)
            else:
                optimizer.step(closure=closure)
    assert (seen.steps, seen.failed) == (3, [])
    for update, own in zip(seen.updates, expected, strict=True):
        assert all(torch.equal(update.gradients[n], g) for n, g in own.items())


AROUND = {"parallel": nn.DataParallel, "compiled": lambda model: torch.compile(model, backend="eager")}


@pytest.mark.parametrize("through", ["optimizer", "model"])
@pytest.mark.parametrize("kind", AROUND)
@pytest.mark.parametrize("told", [True, False])
def test_names_are_those_of_the_model_inside(kind: str, told: bool, through: str) -> None:
    inner = plain_model()
    model: Any = AROUND[kind](inner)
    optimizer = SGD(model.parameters(), 0.1)
    target = Target(plain_model(), losses.Logistic(), (4,)) if told else None
    with watch(model if through == "model" else optimizer, target, model) as seen:
        train(model, optimizer, 2)
    assert seen.failed == []
    assert [list(update.gradients) for update in seen.updates] == [[n for n, _ in inner.named_parameters()]] * 2


class Holder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.module = plain_model()

    def forward(self, x: Tensor) -> Any:
        return self.module(x)


@pytest.mark.parametrize("told", [True, False])
def test_a_model_whose_layers_are_in_a_module_keeps_its_names(told: bool) -> None:
    model = Holder()
    optimizer = SGD(model.parameters(), 0.1)
    target = Target(Holder(), losses.Logistic(), (4,)) if told else None
    with watch(optimizer, target, model) as seen:
        train(model, optimizer, 1)
    assert list(seen.updates[0].gradients) == [name for name, _ in model.named_parameters()]


@pytest.mark.parametrize("through", ["optimizer", "model"])
@pytest.mark.parametrize("layer", [nn.Embedding, nn.EmbeddingBag])
def test_sparse_gradients_are_kept_dense(layer: Any, through: str) -> None:
    model = nn.Sequential(layer(9, 4, sparse=True), nn.Linear(4, 2))
    optimizer = SGD(model.parameters(), 0.1)
    with watch(optimizer if through == "optimizer" else model, model=model) as seen:
        optimizer.zero_grad()
        model(torch.tensor([[1, 2]])).sum().backward()
        optimizer.step()
    assert seen.failed == []
    assert model[0].weight.grad.is_sparse
    assert torch.equal(seen.updates[0].gradients["0.weight"], model[0].weight.grad.to_dense())


class Unkept(nn.Sequential):
    def state_dict(self, *args: Any, **kwargs: Any) -> Any:
        raise RuntimeError("no\x1b[2J weights\ntoday")


@pytest.mark.parametrize("through", ["optimizer", "model"])
@pytest.mark.parametrize("fault", ["state", "memory", "type"])
def test_a_training_never_ends_because_it_is_watched(fault: str, through: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = Unkept(*plain_model()) if fault == "state" else plain_model()
    optimizer = SGD(model.parameters(), 0.1)

    def fails(*_: object) -> None:
        raise MemoryError if fault == "memory" else TypeError("no such type")

    if fault != "state":
        monkeypatch.setattr("rgap.watching.Update", fails)
    before = [p.detach().clone() for p in model.parameters()]
    with watch(optimizer if through == "optimizer" else model, model=model) as seen:
        train(model, optimizer, 2)
    assert seen.steps == 2
    assert seen.updates == []
    assert [text.split(":")[0] for text in seen.failed] == ["step 1", "step 2"]
    assert "\x1b" not in "".join(seen.failed)
    assert not any(torch.equal(p, old) for p, old in zip(model.parameters(), before, strict=True))


@pytest.mark.parametrize("watched", [object(), {}, "an optimizer", None])
def test_what_is_neither_a_model_nor_an_optimizer(watched: Any) -> None:
    with pytest.raises(ValueError, match="expected a model, or an optimizer"), watch(watched):
        pass


@pytest.mark.parametrize("clip", [1e6, 0.01])
@pytest.mark.parametrize("through", ["optimizer", "inner optimizer", "model"])
def test_what_opacus_wraps_is_seen_clipped_and_under_the_names_of_the_model(through: str, clip: float) -> None:
    with warnings.catch_warnings(action="ignore"):  # of Opacus' own
        from opacus import GradSampleModule
        from opacus.optimizers import DPOptimizer
    target = Target(plain_model(), losses.Logistic(), (4,), (0.0, 1.0))
    x, y = torch.rand(1, 4, generator=torch.Generator().manual_seed(0)), torch.tensor([1.0])
    with warnings.catch_warnings(action="ignore"):
        model = GradSampleModule(plain_model())
        inner = SGD(model.parameters(), 0.1)
        optimizer = DPOptimizer(inner, noise_multiplier=0.0, max_grad_norm=clip, expected_batch_size=1)
        watched = {"optimizer": optimizer, "inner optimizer": inner, "model": model}[through]
        with watch(watched, target, model=None if through == "model" else model) as seen:
            optimizer.zero_grad()
            loss_of(model, x, y).backward()
            optimizer.step()
    assert (seen.steps, seen.failed) == (1, [])
    (update,) = seen.updates
    assert list(update.gradients) == list(target.parameters)
    exact = rgap.capture(target, x, y)
    clipped = through != "model" and clip < 1
    assert update.norm == pytest.approx(clip if clipped else exact.norm, rel=1e-3)
    if not clipped:
        found = attacks.Closed()(seen.target(), update)
        torch.testing.assert_close(found.inputs, x, atol=1e-4, rtol=0, check_dtype=False)
