"""Watch the gradients of a training as it runs, in PyTorch alone, without changing it."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.hooks import RemovableHandle

from rgap.federation import given
from rgap.nn.models import trains
from rgap.printable import line
from rgap.target import Target, fingerprint
from rgap.update import Header, Update, UpdateError

DEEPEST = 4
"""Optimizers around an optimizer."""
INSIDE = ("_orig_mod", "module", "_module")
"""Where torch.compile, DataParallel and Opacus keep the model."""
Take = Callable[[Mapping[str, Tensor]], None]
"""Keeps a step that was begun, given its gradients by name; those that are not there are zero."""


class Watched:
    """What was seen so far: of each step its gradient, and the weights at which it was taken."""

    def __init__(self, target: Target | None, keep: int | None):
        self.steps = 0
        """How many there were, those that are no longer kept included."""
        self.failed: list[str] = []
        """Why a step has no update, such as values that are not finite."""
        self._target = target
        self._kept: deque[tuple[Update, Mapping[str, Tensor]]] = deque(maxlen=keep)

    @property
    def updates(self) -> list[Update]:
        """The gradients that are kept, in the order in which they came."""
        return [update for update, _ in self._kept]

    @property
    def weights(self) -> list[Mapping[str, Tensor]]:
        """The state dict of the model before each of these steps; empty if no model was given."""
        return [weights for _, weights in self._kept if weights]

    def target(self, at: int = -1) -> Target:
        """The target as it was before a step: what `updates[at]` is to be attacked with.

        Raises:
            ValueError: `watch` was given no target.
        """
        if self._target is None:
            raise ValueError("got no target, expected one: pass target=rgap.Target(...) to rgap.watch")
        return given(self._target, self._kept[at][1])


@contextmanager
def watch(
    watched: Any,
    target: Target | None = None,
    model: nn.Module | None = None,
    batch_size: int | None = None,
    keep: int | None = 10,
) -> Iterator[Watched]:
    """Keep the gradients of the training steps in a with block; the training is bit for bit as it would be without.

    An optimizer is watched at each step: what it gets is the gradient with all that was done to it, accumulated over
    several passes, clipped, without the scale of mixed precision. A model is watched at each backward pass: what that
    pass adds is kept, as it comes, a scaled loss and accumulation notwithstanding. An optimizer that takes a closure
    calls for the gradient itself: the one of its first call in a step is kept. Of an optimizer that wraps another the
    inner one is watched, and names are those of the model without DataParallel or the like around it.

    Parameters that get no gradient have zeros; frozen ones, and those the optimizer does not have, are left out. A step
    whose gradient is not finite, or cannot be kept, is named in ``failed``: no training ends because it is watched.

    Args:
        watched: a model, an optimizer, or what wraps one.
        target: for the update's header, and for `Watched.target`.
        model: that the optimizer trains, which gives the parameters their names; by default the target's.
        batch_size: of one step, for the header; by default the target's, else 1.
        keep: the last so many steps are kept, each with a copy of the weights; None: all.

    Raises:
        ValueError: an optimizer without a model, or a model that does not hold its parameters.
    """
    watched = watched if isinstance(watched, nn.Module) else _inner(watched)
    module = _plain(_module(watched, target, model), target)
    trained = _trained(watched, module)
    seen = Watched(target, keep)
    size = batch_size or (target.batch_size if target is not None else 1)
    loss, shape = (None, None) if target is None else (target.loss.name, target.input_shape)

    def begin() -> Take:
        return _begun(seen, module, trained, lambda: Header(size, loss, shape, fingerprint(module), trains(module)))

    if isinstance(watched, Optimizer):
        handles = [watched.register_step_pre_hook(_step(trained, begin))]
    else:
        handles = _passes(trained, begin)
    try:
        yield seen
    finally:
        for handle in handles:
            handle.remove()


def _begun(seen: Watched, module: nn.Module, trained: Mapping[str, nn.Parameter], header: Callable[[], Header]) -> Take:
    """A step that begins, with the weights that it begins at; nothing that goes wrong here reaches the training."""
    begun: tuple[Header, dict[str, Tensor]] | Exception
    try:
        state = module.state_dict().items()
        begun = header(), {name: t.detach().clone() for name, t in state if isinstance(t, Tensor)}
    except Exception as error:
        begun = error

    def take(found: Mapping[str, Tensor]) -> None:
        seen.steps += 1
        try:
            if isinstance(begun, Exception):
                raise begun
            values = {n: _dense(found[n]) if n in found else torch.zeros_like(p) for n, p in trained.items()}
            seen._kept.append((Update(values, begun[0]), begun[1]))
        except Exception as error:
            reason = str(error) if isinstance(error, UpdateError) else f"{type(error).__name__}: {line(str(error))}"
            seen.failed.append(f"step {seen.steps}: {reason}")

    return take


def _module(watched: nn.Module | Optimizer, target: Target | None, model: nn.Module | None) -> nn.Module:
    """The model whose parameters are watched."""
    if isinstance(watched, nn.Module):
        return watched
    if model is not None:
        return model
    if target is not None:
        return target.model
    raise ValueError("an optimizer has no names for its parameters: pass model=, the model that it trains, or target=")


def _plain(module: nn.Module, target: Target | None) -> nn.Module:
    """The model in whatever has the same parameters by longer names, as far as the target's names go."""
    known = (nn.DataParallel, nn.parallel.DistributedDataParallel)
    while target is None or not set(target.parameters) <= {name for name, _ in module.named_parameters()}:
        inner = next((each for name in INSIDE if isinstance(each := getattr(module, name, None), nn.Module)), None)
        if inner is None or not (target or isinstance(module, known) or inner is getattr(module, "_orig_mod", None)):
            break
        if [id(p) for p in inner.parameters()] != [id(p) for p in module.parameters()]:
            break
        module = inner
    return module


def _trained(watched: nn.Module | Optimizer, module: nn.Module) -> dict[str, nn.Parameter]:
    """Its parameters by name, as far as they are trained."""
    trained = {name: p for name, p in module.named_parameters() if p.requires_grad}
    if isinstance(watched, Optimizer):
        own = {id(p) for group in watched.param_groups for p in group["params"] if p.requires_grad}
        trained = {name: p for name, p in trained.items() if id(p) in own}
        if len(trained) < len(own):
            raise ValueError(
                f"the model holds {len(trained)} of the {len(own)} parameters of the optimizer, expected all: pass "
                "model=, the very model that it trains"
            )
    return trained


def _inner(watched: Any) -> Optimizer:
    """The optimizer itself, in whatever wraps it: one that lacks what optimizers are watched by holds another."""
    found = watched
    for _ in range(DEEPEST):
        if isinstance(found, Optimizer) and hasattr(found, "_optimizer_step_pre_hooks"):
            return found
        inner = getattr(found, "__dict__", {}).values()
        found = next((each for each in inner if isinstance(each, Optimizer) or hasattr(each, "param_groups")), None)
        if found is None:
            break
    raise ValueError(f"got a {type(watched).__name__}, expected a model, or an optimizer of torch.optim or around one")


def _dense(gradient: Tensor) -> Tensor:
    return gradient if gradient.layout is torch.strided else gradient.to_dense()


def _step(trained: Mapping[str, nn.Parameter], begin: Callable[[], Take]) -> Callable[[Optimizer, Any, Any], Any]:
    def present(optimizer: Optimizer) -> dict[str, Tensor]:
        scale = getattr(optimizer, "grad_scale", None)  # a fused optimizer takes it off by itself
        found = {name: p.grad for name, p in trained.items() if p.grad is not None}
        return found if scale is None else {name: g / scale for name, g in found.items()}

    def step(optimizer: Optimizer, args: Any, kwargs: Any) -> Any:
        if not any(callable(each) and each is not optimizer for each in (*args, *kwargs.values())):
            begin()(present(optimizer))
            return None
        called = False

        def first(closure: Callable[..., Any]) -> Callable[..., Any]:
            def call(*inputs: Any, **named: Any) -> Any:
                nonlocal called
                take = None if called else begin()
                called = True
                loss = closure(*inputs, **named)
                if take is not None:
                    take(present(optimizer))
                return loss

            return call

        wrapped = [first(each) if callable(each) and each is not optimizer else each for each in args]
        return tuple(wrapped), {name: first(each) if callable(each) else each for name, each in kwargs.items()}

    return step


def _passes(trained: Mapping[str, nn.Parameter], begin: Callable[[], Take]) -> list[RemovableHandle]:
    """Hooks that take all gradients of a backward pass at its end, with the weights at its beginning: there are
    trainings that step while the pass is going on.

    `torch.autograd.graph.register_multi_grad_hook` would do, but makes `torch.autograd.grad` fail.
    """
    found: dict[str, Tensor] = {}
    running = None

    def see(name: str, gradient: Tensor) -> None:
        nonlocal running
        now = torch._C._current_graph_task_id()
        if now != running:
            found.clear()  # of a pass that failed
            running = now
            torch.autograd.Variable._execution_engine.queue_callback(partial(end, begin()))
        found[name] = gradient.detach().clone()

    def end(take: Take) -> None:
        take(found)
        found.clear()

    return [p.register_hook(partial(see, name)) for name, p in trained.items()]  # type: ignore[no-untyped-call]
