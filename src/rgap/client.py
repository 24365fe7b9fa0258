"""A client's training, simulated as torch runs it: what it sends of its samples by its protocol."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from rgap.nn.outputs import outputs_of
from rgap.protocol import ADAM_EPSILON, Optimiser, Protocol, Sends
from rgap.target import Target


def orders(samples: int, protocol: Protocol, generator: torch.Generator) -> Iterator[Tensor]:
    """Which samples each local step is on, as torch's DataLoader draws them."""
    loader: DataLoader[Tensor] = DataLoader(
        torch.arange(samples),  # type: ignore[arg-type]
        batch_size=protocol.minibatch or samples,
        shuffle=protocol.shuffled and protocol.minibatch is not None,
        drop_last=protocol.drop_last,
        generator=generator,
    )
    for _ in range(protocol.passes):
        yield from loader


def make_optimiser(weights: Sequence[Tensor], protocol: Protocol) -> torch.optim.Optimizer:
    """torch's own, at its first learning rate."""
    rate, decay = protocol.learning_rate or 0.0, protocol.weight_decay
    if protocol.linear:
        return torch.optim.SGD(
            weights, lr=rate, momentum=protocol.momentum, nesterov=protocol.nesterov, weight_decay=decay
        )
    kind = torch.optim.AdamW if protocol.optimiser is Optimiser.ADAMW else torch.optim.Adam
    return kind(weights, lr=rate, eps=ADAM_EPSILON, weight_decay=decay)


def sent_by(
    target: Target, x: Tensor, y: Tensor, protocol: Protocol, generator: torch.Generator
) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """The gradient or the weight difference of one client, and its buffers afterwards; the model is left as it was.

    Args:
        x: (n, *input_shape); y: (n,).
        generator: draws the order of the samples.
    """
    model = target.model
    tensors = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    state = {name: t.detach().clone() for name, t in tensors.items()}
    trained = list(target.parameters)
    weights = [state[name].requires_grad_() for name in trained]
    first = [weight.detach().clone() for weight in weights]
    inputs, labels = x.to(weights[0]), y.to(weights[0].device)

    def differentiate(which: Tensor | slice) -> None:
        loss = target.loss(outputs_of(torch.func.functional_call(model, state, (inputs[which],))), labels[which])
        if protocol.summed:
            loss = len(inputs[which]) * loss
        if protocol.proximal:
            apart = torch.stack([(w - w0).square().sum() for w, w0 in zip(weights, first, strict=True)]).sum()
            loss = loss + protocol.proximal / 2 * apart
        for weight, found in zip(weights, torch.autograd.grad(loss, weights, allow_unused=True), strict=True):
            weight.grad = found
        if protocol.clip_norm is not None:
            torch.nn.utils.clip_grad_norm_(weights, protocol.clip_norm)

    if protocol.sends is Sends.GRADIENT:
        differentiate(slice(None))
        sent = [torch.zeros_like(weight) if weight.grad is None else weight.grad for weight in weights]
    else:
        optimiser = make_optimiser(weights, protocol)
        rates = protocol.rates(len(x))
        for rate, which in zip(rates, orders(len(x), protocol, generator), strict=True):
            optimiser.param_groups[0]["lr"] = rate
            differentiate(which)
            optimiser.step()
        sent = [weight.detach() - w0 for weight, w0 in zip(weights, first, strict=True)]
    buffers = {name: state[name] for name in target.buffers}
    return dict(zip(trained, sent, strict=True)), buffers
