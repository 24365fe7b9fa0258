"""What integrations share: what a server makes of a reply, and how a client defends what it sends."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from rgap.defences import Defence
from rgap.federation import Received, with_weights
from rgap.naming import STATISTICS, buffers_in, matched
from rgap.protocol import Protocol, Sends
from rgap.target import Target, fingerprint
from rgap.update import Header, Update, UpdateError


@contextmanager
def going_on(log: logging.Logger, what: str) -> Iterator[None]:
    """A training is worth more than the record of it."""
    try:
        yield
    except Exception:
        log.warning("%s", what, exc_info=True)


@dataclass(frozen=True, eq=False)
class Reader:
    """Takes replies for updates; the arguments are those of `rgap.integrations.flower.Capture`.

    Raises:
        ValueError: batch_size is below 1.
    """

    target: Target
    protocol: Protocol
    batch_size: int | None = None
    size_key: str = "num-examples"
    differences: bool = False
    partial: bool = False

    def __post_init__(self) -> None:
        if self.batch_size is not None and self.batch_size < 1:
            raise ValueError(
                f"got batch_size={self.batch_size}, expected 1 or more, or None and the key of a client's metric"
            )

    def received(
        self,
        node: str,
        weights: Mapping[str, Tensor],
        read: Callable[[], Mapping[str, Tensor]],
        metrics: Mapping[str, Any],
        prints: dict[int, str],
    ) -> Received:
        """What one node sent, or why it is no update.

        Args:
            weights: those it was sent.
            read: gives what came.
            prints: fingerprints of weights that were met before, by their identity; added to.
        """
        try:
            if not weights:
                raise UpdateError("it was sent no weights in this round")
            if id(weights) not in prints:
                prints[id(weights)] = fingerprint(with_weights(self.target, weights))
            size, loss, shape = self._size(metrics), self.target.loss.name, self.target.input_shape
            protocol = self.protocol
            if protocol.minibatch is not None and protocol.minibatch > size and not protocol.drop_last:
                protocol = replace(protocol, minibatch=None)
            header = Header(size, loss, shape, prints[id(weights)], None, protocol)
            came = read()
            whole = self.protocol.sends is Sends.DIFFERENCE and not self.differences
            buffers = buffers_in(came, self.target) if whole else {}
            update = Update(self._change(came, weights), header, buffers)
        except Exception as error:
            return Received(node, weights, None, f"{type(error).__name__}: {error}", metrics)
        return Received(node, weights, update, metrics=metrics)

    def _size(self, metrics: Mapping[str, Any]) -> int:
        if self.batch_size is not None:
            return self.batch_size
        size = metrics.get(self.size_key, self.target.batch_size)
        if not isinstance(size, int | float) or size < 1 or not float(size).is_integer():
            raise UpdateError(f"its metric {self.size_key!r} is {size}, expected a whole number from 1 on")
        return int(size)

    def _change(self, came: Mapping[str, Tensor], weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """What the client sent as an update: by the model's names, in the type in which it came."""
        found = matched(came, self.target, "weight" if self.protocol.sends is Sends.DIFFERENCE else "gradient")
        if found.missing and not (self.partial and found.values):
            raise UpdateError(f"its arrays do not fit the model: {str(found).replace(chr(10), '; ')}")
        like = next(iter(found.values.values()))
        still = {name: torch.zeros_like(self.target.parameters[name]).to(like) for name in found.missing}
        if self.protocol.sends is Sends.GRADIENT or self.differences:
            return {**found.values, **still}
        before = matched(weights, self.target, "weight").values
        moved = {name: (after.double() - before[name].double()).to(after) for name, after in found.values.items()}
        return moved | still


def protect(
    defence: Defence,
    state: Mapping[str, Tensor],
    came: Mapping[str, Tensor] | None,
    trained: frozenset[str] | None,
    seeded: torch.Generator | None,
) -> dict[str, Tensor]:
    """What a client sends in place of its trained tensors, by name.

    Args:
        state: what it would send.
        came: the weights that came, to which `state` is the successor; None: it is a gradient or a difference itself.
        trained: names; None: all floating-point tensors but the running statistics of norm layers.
        seeded: draws the noise; None: fresh from the operating system.

    Raises:
        UpdateError: something cannot be defended; nothing may be sent then.
    """
    after = {name: t for name, t in state.items() if _is_trained(name, t, trained)}
    _check_names(after, trained, came)
    generator = seeded
    if generator is None:
        generator = torch.Generator()
        generator.seed()
    if came is None:
        return dict(defence(Update(after), generator).gradients)
    change = Update({name: t.double() - came[name].double() for name, t in after.items()})
    defended = defence(change, generator).gradients
    return {name: _rounded(came[name].double() + defended[name], t) for name, t in after.items()}


def _is_trained(name: str, tensor: Tensor, names: frozenset[str] | None) -> bool:
    if names is None:
        return tensor.is_floating_point() and name.split(".")[-1] not in STATISTICS
    return name in names


def _check_names(after: Mapping[str, Tensor], names: frozenset[str] | None, came: Mapping[str, Tensor] | None) -> None:
    """Refuse to send what could not be defended as a whole."""
    missing = sorted((names or frozenset()) - set(after))
    if missing:
        raise UpdateError(f"the client sends no {', '.join(missing[:8])}: expected all that are named as trained")
    if came is None:
        return
    for name, tensor in after.items():
        if name not in came or came[name].shape != tensor.shape:
            got = tuple(tensor.shape), tuple(came[name].shape) if name in came else "none"
            raise UpdateError(f"{name}: the client sends shape {got[0]} and was sent {got[1]}: there is no difference")


def _rounded(value: Tensor, like: Tensor) -> Tensor:
    limits = torch.finfo(like.dtype)
    return value.clamp(limits.min, limits.max).to(like)
