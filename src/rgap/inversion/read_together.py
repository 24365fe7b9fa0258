"""What a convolution reads of each of several samples, past what no constraint passes.

The row space of the layer's gradient tells what the inputs of all samples span, x_i = Q a_i
(`rgap.inversion.subspace.patches`). What lies behind bends, and what is known of each sample's output tells its a_i: as
many equations as that has values, for as many unknowns as there are samples. The layer's own gradient shows whether all
of it is right.
"""

from __future__ import annotations

from collections.abc import Mapping

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.read_ahead import AGREES
from rgap.inversion.rounding import rounding
from rgap.inversion.state import State
from rgap.inversion.subspace.patches import input_space, readable
from rgap.linalg import deadline
from rgap.nn.layers import Layer
from rgap.nn.network import Network
from rgap.nn.ops import Linear

STARTS = 16
"""Drawn, of each sample."""
STEPS, HALVINGS = 40, 8
"""Of Gauss and Newton, and of one of them, at the most."""
MET = 1e-4
"""What outputs may miss at the end, relatively: elsewhere steps end at some hundredths."""


def read_together(
    network: Network, output: State, gradients: Mapping[str, Tensor], eps: float
) -> tuple[int, State] | None:
    """The value nearest to the input that a gradient tells of all samples, and what is known of it; None if none does.

    Args:
        network: from the input to what is known.
        output: value and cotangent of its output, (b, *shape), of samples that are all there.
        gradients: by parameter name, of the sum over the samples.
        eps: their relative rounding.
    """
    samples = len(output.value)
    for segment in network.segments:
        for node_id in network.readers[segment.entry]:
            op = network.nodes[node_id].op
            if not (isinstance(op, Linear) and op.has_gradient and readable(op.layer, samples)):
                continue
            if op.layer.positions == 1 or op.layer.weight_name not in gradients:
                continue
            deadline.check()
            tail = network.part([each for each in network.segments if each.entry >= segment.entry])
            grad = op.layer.pack_weight(gradients[op.layer.weight_name][None])[0, 0]
            found = _at(tail, node_id - segment.entry, op.layer, output, grad, eps)
            if found is not None:
                return segment.entry, found
    return None


def _at(
    tail: Network, node_id: int, layer: Layer, output: State, grad: Float[Tensor, "o i"], eps: float
) -> State | None:
    """What is known of what the layer reads; None where its gradient is another one."""
    space = input_space(layer, grad, eps, len(output.value))
    if space is None:
        return None
    told = [_mixture(tail, layer.unpack_input(space), wanted[None], None) for wanted in output.value]
    a = [each for each in told if each is not None]
    if len(a) < len(told):
        return None
    x = layer.unpack_input(torch.einsum("ij,jcn->icn", torch.stack(a), space))
    values = tail.forward(x)
    cotangents = tail.cotangents(values, tail.slopes(values), output.cotangent)
    k, there = cotangents[node_id + 1], cotangents[0]
    if k is None or there is None:
        return None
    made = layer.batch_gradient(layer.pack_input(x), layer.pack_output(k))[0, 0]
    if not float((made - grad).norm()) <= AGREES * eps * float(grad.norm()):
        return None
    # The same once more with all that is known moved by its rounding.
    draw = torch.Generator(device=grad.device).manual_seed(0)

    def drawn(like: Tensor) -> Tensor:
        return torch.randn(like.shape, generator=draw, dtype=like.dtype, device=like.device)

    moved = input_space(layer, grad + drawn(grad) * rounding(grad, eps), 2 * eps, len(x))
    if moved is None:
        return None
    wanted = output.value + drawn(output.value) * output.std.expand(output.value.shape)
    error = torch.zeros_like(x)
    for at, each in enumerate(x):
        start = moved.flatten(1) @ layer.pack_input(each[None]).flatten()
        again = _mixture(tail, layer.unpack_input(moved), wanted[at : at + 1], start)
        if again is None:
            return None
        error[at] = layer.unpack_input(torch.einsum("j,jcn->cn", again, moved)[None])[0] - each
    std = error.flatten(1).square().mean(1).sqrt().reshape(-1, *[1] * (x.dim() - 1))
    return State(x, there, None, std.expand(x.shape))


def _mixture(
    tail: Network, space: Float[Tensor, "j ..."], wanted: Float[Tensor, "1 ..."], start: Float[Tensor, " j"] | None
) -> Float[Tensor, " j"] | None:
    """The mixture of the space that puts out what is wanted, by Gauss and Newton's steps from drawn starts."""
    generator = torch.Generator(device=space.device).manual_seed(0)
    size = float(wanted.norm())

    def at(a: Float[Tensor, " j"]) -> list[Tensor]:
        return tail.forward(torch.einsum("j,j...->...", a, space)[None])

    for _trial in range(1 if start is not None else STARTS):
        drawn = torch.randn(len(space), generator=generator, dtype=space.dtype, device=space.device)
        a = drawn * space[0].numel() ** 0.5 if start is None else start
        values = at(a)
        for _ in range(STEPS):
            missed = values[-1] - wanted
            slopes = tail.slopes(values)
            columns = [tail.jvp(values, slopes, each[None])[-1].flatten() for each in space]
            step = torch.linalg.lstsq(torch.stack(columns, 1), missed.flatten()[:, None]).solution[:, 0]
            for halving in range(HALVINGS):
                values = at(a - step * 0.5**halving)
                if float((values[-1] - wanted).norm()) < float(missed.norm()):
                    break
            else:
                break
            a = a - step * 0.5**halving
            if float((step * 0.5**halving).norm()) <= 1e-12 * float(a.norm()):
                break
        if float((at(a)[-1] - wanted).norm()) <= MET * size:
            return a
    return None
