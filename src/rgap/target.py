"""What the attacker knows before any update arrives."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass, field
from functools import cached_property
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from rgap.losses import for_model
from rgap.nn.batch_norm import BatchStatistics, statistics
from rgap.nn.build import Batch
from rgap.nn.graph import Graph
from rgap.nn.kernels import differentiable
from rgap.nn.losses import Loss, MarginLoss
from rgap.nn.models import trains, unwrapped, used_in_place
from rgap.nn.network import Network
from rgap.nn.obstacles import Obstacle
from rgap.nn.outputs import outputs_of, reason_of, wrong_shape
from rgap.nn.reads import listening
from rgap.nn.trace import follow

GradientFunction = Callable[..., dict[str, Tensor]]


@dataclass(frozen=True, eq=False)
class Target:
    """A model, its loss and the shape of its inputs: everything an honest-but-curious server has.

    The model is traced once, when the target is made, and its weights are copied: training it further does not
    change the target.

    Args:
        model: takes a batch (b, *input_shape).
        loss: takes outputs and labels, gives the mean over the batch; see `rgap.losses`. A name, a loss of torch.nn, or
            a function of your own is turned into one by `rgap.losses.for_model`.
        input_shape: one sample's shape, without the batch, such as (3, 32, 32).
        value_range: the values an input can have, such as (0.0, 1.0); None if not known. It chooses between inputs
            that give the same gradient, and nothing else.
        batch_size: how many samples one gradient is averaged over.

    Raises:
        ValueError: the model does not take inputs of this shape, or an argument makes no sense.
    """

    model: nn.Module
    if TYPE_CHECKING:
        loss: Loss
    else:
        loss: Any  # whatever `rgap.losses.for_model` takes; what it makes of it is kept
    input_shape: tuple[int, ...]
    value_range: tuple[float, float] | None = None
    batch_size: int = 1
    fingerprint: str = field(init=False)
    """SHA-256 over the names, types, shapes and values of the parameters."""
    parameters: Mapping[str, Tensor] = field(init=False, repr=False)
    """Every parameter that is trained, by name, as it was when the target was made."""
    buffers: Mapping[str, Tensor] = field(init=False, repr=False)
    """Those of its state dict, likewise."""
    graph: Graph = field(init=False, repr=False)
    """Every use of a Linear or convolutional layer, and what stands in the recursion's way."""
    _tensors: Mapping[str, Tensor] = field(init=False, repr=False)
    _modes: tuple[bool, ...] = field(init=False, repr=False)

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "model", unwrapped(self.model))
        put(self, "input_shape", tuple(int(size) for size in self.input_shape))
        put(self, "loss", for_model(self.model, self.input_shape, self.loss))
        if not self.input_shape or min(self.input_shape) < 1:
            raise ValueError(f"input_shape is {self.input_shape}: expected positive sizes, such as (3, 32, 32)")
        if self.value_range is not None and not self.value_range[0] < self.value_range[1]:
            raise ValueError(f"value_range is {self.value_range}: expected (low, high) with low < high, or None")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: expected 1 or more")
        if not any(p.requires_grad for p in self.model.parameters()):
            raise ValueError(
                "no parameter of the model is trained, so no gradient leaves the client: nothing to attack"
            )
        put(self, "fingerprint", fingerprint(self.model))
        put(self, "_modes", tuple(module.training for module in self.model.modules()))
        tensors = {**dict(self.model.named_parameters()), **dict(self.model.named_buffers())}
        put(self, "_tensors", {name: t.detach().clone() for name, t in tensors.items()})
        trained = {name: self._tensors[name] for name, p in self.model.named_parameters() if p.requires_grad}
        put(self, "parameters", trained)
        kept = self.model.state_dict()
        put(self, "buffers", {name: self._tensors[name] for name, _ in self.model.named_buffers() if name in kept})
        put(self, "graph", follow(self.model, self.input_shape, self.loss.outputs, self.loss.ending))
        if not self.graph.uses:
            # Tracing checks shapes; where it failed, only a run of the model tells whether the shape was wrong.
            self._state  # noqa: B018
        used_in_place(self.model, lambda: self._run(_copies(self._tensors), torch.zeros(1, *self.input_shape)))
        if type(self.loss).misfit is not Loss.misfit:
            noise = 3 * torch.randn(16, *self.input_shape, generator=torch.Generator().manual_seed(0))
            with torch.no_grad(), torch.random.fork_rng():
                wrong = self.loss.misfit(self.outputs(noise))
            if wrong:
                raise ValueError(wrong)

    @cached_property
    def _state(self) -> Mapping[str, Tensor]:
        """Parameters and buffers for recomputing gradients: in float64 unless the model's code insists otherwise."""
        reason = ""
        for state in (_cast(self._tensors, torch.float64), self._tensors):
            reason = self._refuses(state)
            if not reason:
                return state
        raise ValueError(wrong_shape((self.batch_size, *self.input_shape), reason))

    def _state_in(self, dtype: torch.dtype) -> Mapping[str, Tensor]:
        """The same in another type, if the model runs with it."""
        if dtype not in self._states:
            state = self._state if dtype == torch.float64 else _cast(self._tensors, dtype)
            self._states[dtype] = self._state if state is self._state or self._refuses(state) else state
        return self._states[dtype]

    @cached_property
    def _states(self) -> dict[torch.dtype, Mapping[str, Tensor]]:
        return {}

    def _refuses(self, state: Mapping[str, Tensor], samples: int | None = None) -> str:
        """Why the model does not run with these tensors; empty if it does."""
        floating = next(t for t in state.values() if t.is_floating_point())
        sample = torch.zeros(
            samples or self.batch_size, *self.input_shape, dtype=floating.dtype, device=floating.device
        )
        try:
            with torch.no_grad(), torch.random.fork_rng(), self._mode(), differentiable():
                outputs_of(torch.func.functional_call(self.model, _copies(state), (sample,)))
        except Exception as error:  # of the model's own code
            return reason_of(error)
        return ""

    @cached_property
    def network(self) -> Network:
        """All operations of the model, whatever they are, made when first asked for.

        Raises:
            NotImplementedError: the model cannot be traced, or does something else than compute values from values.
        """
        program = self.graph.program
        if program is None:
            raise NotImplementedError("; ".join(str(each) for each in self.graph.obstacles))
        try:
            network = program.network(self._tensors, frozenset(self.parameters))
            self._check(network)
        except NotImplementedError:
            raise
        except Exception as error:  # of operations that no tracing can run again
            reason = str(error).strip().splitlines()[0]
            raise NotImplementedError(f"forward: the traced operations do not run by themselves: {reason}") from error
        return network

    def of_batch(self, after: Mapping[str, Tensor], gradients: Mapping[str, Tensor], samples: int) -> Target:
        """The same target, whose network takes batch norms in training mode as they were in the batch of one update.

        Args:
            after: the buffers after the step.
            gradients: of the mean loss over the batch.
            samples: of the batch.
        """
        found, program = copy(self), self.graph.program
        known = self.batch_statistics(after, samples)
        if program is not None and known:
            batch = Batch(known, {name: g.to(self.device) for name, g in gradients.items()})
            vars(found)["network"] = program.network(self._tensors, frozenset(self.parameters), batch)
        return found

    def batch_statistics(self, after: Mapping[str, Tensor], samples: int) -> dict[str, BatchStatistics]:
        """What batch norms in training mode made of one step's batch, by the names of their running means.

        Args:
            after, samples: as in `of_batch`.
        """
        with self._mode():
            return statistics(self.model, self.buffers, after, samples)

    def _check(self, network: Network) -> None:
        """Raise NotImplementedError if the operations do not compute what the model does.

        A model may change values in place through views of them, which tracing does not show.
        """
        generator = torch.Generator().manual_seed(0)
        x = torch.rand(1, *self.input_shape, generator=generator, dtype=torch.float64).to(self.device)
        refused = self._refuses(self._state, 1)
        if refused:
            raise NotImplementedError(f"forward: a sample alone is not followed: {refused}")
        with torch.no_grad(), torch.random.fork_rng():
            first, second = (self.outputs(x).double().reshape(-1) for _ in range(2))
            if not torch.equal(first, second):
                return  # it draws at random, as dropout in training mode does
            try:
                found = network.forward(x)[-1].reshape(-1)
            except RuntimeError as error:
                raise NotImplementedError(
                    f"forward: the traced operations do not run in float64: {str(error).strip().splitlines()[0]}. "
                    "Cast values to no type of your own"
                ) from error
            if self.graph.ending_is_the_loss:
                found = found.sigmoid() if self.graph.ending == "sigmoid" else found.log_softmax(0)
        # Models that insist on float32 agree to its rounding.
        if not bool((found - first).norm() <= 1e-3 * first.norm() + 1e-12):
            raise NotImplementedError(
                "forward: the traced operations do not compute what the model does. Write to no views of values"
            )

    @property
    def obstacles(self) -> tuple[Obstacle, ...]:
        """What keeps the model from being a plain chain of layers; empty if `chain` can be used.

        The recursion passes more than plain chains: see `network`.
        """
        return self.graph.obstacles

    @property
    def margin_loss(self) -> MarginLoss:
        """The loss, where it is one of the margin.

        Raises:
            TypeError: it is another one.
        """
        if not isinstance(self.loss, MarginLoss):
            raise TypeError(f"the {self.loss.name} loss is no function of a margin: expected logistic or the like")
        return self.loss

    @property
    def mode(self) -> str:
        """The mode that the model had when the target was made, ``training`` or ``evaluation``; of what torch.export
        made that in which it was made, and ``evaluation`` where that makes no difference."""
        return "training" if trains(self.model, self._modes[0]) else "evaluation"

    @property
    def device(self) -> torch.device:
        return next(iter(self.parameters.values())).device

    @contextmanager
    def _mode(self) -> Iterator[None]:
        """The model in the mode it had when the target was made: training it must not make its dropout count here."""
        modules = list(self.model.modules())
        now = [module.training for module in modules]
        try:
            _set(modules, self._modes)
            yield
        finally:
            _set(modules, now)

    def outputs(self, inputs: Tensor) -> Tensor:
        """What the model gives for inputs (b, *input_shape), in float64 where it allows that."""
        return self._run(_copies(self._state), inputs)

    def _run(self, state: Mapping[str, Tensor], inputs: Tensor) -> Tensor:
        """The model with these tensors, in the mode it had when the target was made."""
        with self._mode(), differentiable():
            result = torch.func.functional_call(
                self.model, dict(state), (inputs.to(state[next(iter(self.parameters))]),)
            )
        outputs: Tensor = outputs_of(result)
        return outputs

    def network_at(self, weights: Mapping[str, Tensor]) -> Network:
        """The same operations as `network`, with other values of some parameters."""
        program = self.graph.program
        if program is None:
            return self.network
        return program.network({**self._tensors, **weights}, frozenset(self.parameters))

    def gradient(
        self,
        inputs: Tensor,
        labels: Tensor,
        dtype: torch.dtype = torch.float64,
        weights: Mapping[str, Tensor] | None = None,
        k: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """The gradient of the mean loss of a batch, recomputed through the model itself.

        Args:
            inputs: (b, *input_shape); labels: (b,).
            dtype: to compute in, where the model allows it.
            weights: other values of some parameters, as they are after local steps.
            k: (b, outputs), taken for the mean loss's gradient by what the loss takes, in place of its own.

        Returns:
            By parameter name, in the parameter's shape.
        """
        names = list(self.parameters)
        state = _copies(self._state_in(dtype))
        for name, value in (weights or {}).items():
            state[name] = value.detach().to(state[name], copy=True)
        for name in names:
            state[name].requires_grad_()
        outputs = self._run(state, inputs)
        loss = self.loss(outputs, labels.to(self.device))
        if k is not None:
            given = k.to(outputs).reshape(outputs.shape)
            if self.graph.ending_is_the_loss and outputs.grad_fn is not None:
                outputs.grad_fn.register_hook(lambda inner, _: (given, *inner[1:]))
            else:
                outputs.register_hook(lambda _: given)  # type: ignore[no-untyped-call]
        found = torch.autograd.grad(loss, [state[n] for n in names], allow_unused=True)
        return {n: torch.zeros_like(state[n]) if g is None else g for n, g in zip(names, found, strict=True)}

    def backward(self, inputs: Tensor, k: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
        """The outputs, and every parameter's gradient from their cotangent k, in float64 where the model allows that.

        Both can be differentiated again, by inputs that ask for it. A parameter that nothing reads is left out.
        """
        state = _copies(self._state)
        trained = {name: state[name].requires_grad_() for name in self.parameters}
        outputs = self._run(state, inputs)
        found = torch.autograd.grad(outputs, list(trained.values()), k, create_graph=True, allow_unused=True)
        return outputs, {name: g for name, g in zip(trained, found, strict=True) if g is not None}

    def label_gradients(self, inputs: Tensor, labels: Tensor, *names: str) -> list[Tensor]:
        """Some parameters' gradients at each of several labels of one sample, (labels, *shape) each, by one forward
        pass, and backwards no further than to them."""
        state = _copies(self._state)
        asked = [state[name].requires_grad_() for name in names]
        outputs = self._run(state, inputs)
        losses = (self.loss(outputs, label.reshape(1).to(self.device)) for label in labels)
        found = (torch.autograd.grad(loss, asked, retain_graph=True, allow_unused=True) for loss in losses)
        zero = [torch.zeros_like(each) for each in asked]
        return [
            torch.stack([none if g is None else g for g in each])
            for none, each in zip(zero, zip(*found, strict=True), strict=True)
        ]

    def gradients(self, inputs: Tensor, labels: Tensor) -> dict[str, Tensor]:
        """The gradient that each of s samples alone would give: by parameter name, (s, *shape); see `gradient`."""
        rows = [self.gradient(x[None], y[None]) for x, y in zip(inputs, labels, strict=True)]
        return {name: torch.stack([row[name] for row in rows]) for name in self.parameters}

    def gradient_function(self, dtype: torch.dtype, plain: bool = False, reads: Sequence[str] = ()) -> GradientFunction:
        """The gradient of the mean loss as a pure function, which can be differentiated: by torch.func, which batches
        it too, or by plain automatic differentiation.

        It takes inputs (b, *input_shape) and label weights (b, labels), each row a distribution over the loss's
        labels, and computes in ``dtype`` where the model allows it. Other weights than the target's may follow.

        Args:
            reads: modules of whose inputs it tells as well what they were, each by the name `read_by` gives it.
        """
        state = self._state_in(dtype)
        own = state[next(iter(self.parameters))].dtype
        trained = {name: state[name] for name in self.parameters}
        fixed = {name: t for name, t in state.items() if name not in trained}

        def loss(parameters: dict[str, Tensor], inputs: Tensor, weights: Tensor) -> tuple[Tensor, dict[str, Tensor]]:
            # A model may write to its buffers: into values of this very call, which torch.func allows.
            zero = torch.zeros_like(inputs.reshape(-1)[0])
            buffers = {name: t + zero.to(t.dtype) for name, t in fixed.items()}
            with listening(self.model, reads) as seen:
                outputs = self._run({**buffers, **parameters}, inputs)
            return self.loss.expected(outputs, weights.to(own)), seen

        def gradient(inputs: Tensor, weights: Tensor, at: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
            if not plain:
                found, seen = torch.func.grad(loss, has_aux=True)(trained if at is None else at, inputs, weights)
                return {**found, **seen}
            given = {name: t.detach().clone().requires_grad_() for name, t in trained.items()} if at is None else at
            value, seen = loss(given, inputs, weights)
            slopes = torch.autograd.grad(value, list(given.values()), create_graph=True, allow_unused=True)
            pairs = zip(given.items(), slopes, strict=True)
            return {n: torch.zeros_like(t) if g is None else g for (n, t), g in pairs} | seen

        return gradient


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over the names, types, shapes and values of the parameters."""
    digest = hashlib.sha256()
    for name, parameter in model.named_parameters():
        data = parameter.detach().cpu().contiguous()
        digest.update(f"{name} {data.dtype} {tuple(data.shape)}\n".encode())
        digest.update(data.reshape(-1).view(torch.uint8).numpy().tobytes())
    return digest.hexdigest()


def _cast(state: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    return {name: t.to(dtype) if t.is_floating_point() else t for name, t in state.items()}


def _set(modules: Sequence[nn.Module], modes: Sequence[bool]) -> None:
    """Training or evaluation mode, where it is another one: to set it takes as long as small layers take to run."""
    for module, mode in zip(modules, modes, strict=True):
        if module.training is not mode:
            module.training = mode


def _copies(state: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Fresh copies, so that a model that writes to its buffers leaves no trace."""
    return {name: tensor.clone() for name, tensor in state.items()}
