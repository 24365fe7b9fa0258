"""A client's local steps as a function of its samples, which can be differentiated."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.attacks.local_steps import MOST_UNROLLED, plan_of
from rgap.protocol import Protocol
from rgap.target import GradientFunction, Target

FOLLOWED = "{} local steps are simulated, every epoch in the same order of the samples"


@dataclass(frozen=True)
class LocalSteps:
    """One that sends the difference of its weights after steps of SGD."""

    protocol: Protocol
    samples: int

    @staticmethod
    def of(protocol: Protocol, samples: int) -> LocalSteps | None:
        """None where its steps are not simulated: Adam's, clipped or averaged ones, none, or too many."""
        plain = protocol.local and protocol.linear and protocol.clip_norm is None and protocol.clients == 1
        if not plain or not 1 < len(protocol.minibatches(samples)) <= MOST_UNROLLED:
            return None
        return LocalSteps(protocol, samples)

    @property
    def assumption(self) -> str:
        return FOLLOWED.format(len(self.protocol.minibatches(self.samples)))

    def difference(self, target: Target, gradient: GradientFunction, dtype: torch.dtype) -> GradientFunction:
        """The weight difference of inputs and label weights, by `Protocol.expansion`."""
        plan = plan_of(self.protocol, self.samples)
        first = {name: t.to(dtype) for name, t in target.parameters.items()}

        def moved(step: int, steps: list[dict[str, Tensor]]) -> dict[str, Tensor]:
            decay, coefficients = plan.expansion[step]
            return {
                name: decay * w + torch.stack([c * g[name] for c, g in zip(coefficients, steps, strict=True)]).sum(0)
                for name, w in first.items()
            }

        def difference(inputs: Tensor, weights: Tensor) -> dict[str, Tensor]:
            steps: list[dict[str, Tensor]] = []
            at, begin = None, 0
            for number, size in enumerate(plan.sizes):
                if number % plan.epoch == 0:
                    begin = 0
                if steps:
                    at = {name: first[name] + each for name, each in moved(number, steps).items()}
                steps.append(gradient(inputs[begin : begin + size], weights[begin : begin + size], at))
                begin += size
            return moved(-1, steps)

        return difference
