"""What counting cannot know of batches, from batches that are drawn: whether rounding leaves their samples apart, and
how many values activations tell.

A gradient has no more rank than its samples have different cotangents: where all units of a deep layer stand on the
same sides for all of them, or activations are nearly straight, they have fewer.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cached_property
from math import prod

import torch
from torch import Tensor

from rgap.inversion.batch import Features
from rgap.inversion.subspace.head import spaces
from rgap.inversion.subspace.identify import Samples
from rgap.nn.activations import ReLU
from rgap.nn.losses import Loss
from rgap.nn.network import Network
from rgap.nn.non_monotone import NonMonotone
from rgap.nn.ops import Elementwise, Linear

DRAWS = 3
"""Batches of each size, an odd number; most of them decide."""
APART = 5e-3
"""An error of features, relative to their size, above which an attack did not find the samples."""
LARGEST = 2**26
"""Values of a batch, of all operations, above which none is drawn."""


@dataclass(frozen=True, eq=False)
class Drawn:
    """Batches of inputs drawn uniformly from a value range, with drawn labels and gradients in float32."""

    network: Network
    loss: Loss
    value_range: tuple[float, float]
    seed: int

    def measurable(self, samples: int) -> bool:
        """Whether batches up to this size can be drawn."""
        return bool(self.loss.labels) and samples * sum(map(prod, self.network.shapes)) <= LARGEST

    def told_apart(self, counted: Mapping[int, int], most: Mapping[int, int]) -> int:
        """Up to how many samples some place tells apart, of those up to which it is asked for.

        Args:
            counted: up to how many each place does by count, by the id of the value that it reads.
            most: up to how many it is asked for, no more than counted. No larger batch is drawn.
        """
        places: dict[int, frozenset[int]] = {}
        found = min(1, max(most.values(), default=0))

        def apart(place: int, samples: int) -> bool:
            if not found < samples <= most[place]:
                return samples <= found  # whichever it is, no more is found
            if samples not in places:
                places[samples] = self._apart(samples)
            return place in places[samples]

        for place, size in sorted(counted.items(), key=lambda each: -most[each[0]]):
            low, high = 1, size + 1  # apart at the one, not at the other
            if apart(place, size):
                low = size
            while high - low > 1:
                middle = (low + high) // 2
                low, high = (middle, high) if apart(place, middle) else (low, middle)
            found = max(found, min(low, most[place]))
        return found

    @cached_property
    def told(self) -> dict[int, float]:
        """Of ReLUs, and of activations some of whose outputs have two inputs, the part of their outputs that tells its
        input, by their nodes."""
        generator = torch.Generator(device=self.network.device).manual_seed(self.seed)
        values, found = self.network.forward(self._inputs(DRAWS, generator)), {}
        for at, node in enumerate(self.network.nodes):
            if isinstance(node.op, Elementwise) and isinstance(node.op.activation, (ReLU, NonMonotone)):
                z, activation = values[node.reads[0]], node.op.activation
                # Where no value is below the minimum the upper input is the right one everywhere.
                upper = isinstance(activation, NonMonotone) and not bool((z < activation.argmin).any())
                found[at] = 1.0 if upper else float((z > 0).double().mean())
        return found

    def _inputs(self, samples: int, generator: torch.Generator) -> Tensor:
        low, high = self.value_range
        shape = (samples, *self.network.input_shape)
        return low + (high - low) * torch.rand(
            shape, generator=generator, dtype=torch.float64, device=self.network.device
        )

    def _apart(self, samples: int) -> frozenset[int]:
        """The places at which rounding leaves so many samples apart, in most draws."""
        times: Counter[int] = Counter()
        for draw in range(DRAWS):
            generator = torch.Generator(device=self.network.device).manual_seed(self.seed + draw)
            times.update(place for place, error in self._batch(samples, generator).items() if error <= APART)
            # Draws that can change nothing are not made; 0 is that of the places that were never among them.
            left = DRAWS - draw - 1
            if all(2 * each > DRAWS or 2 * (each + left) < DRAWS for each in (0, *times.values())):
                break
        return frozenset(place for place, each in times.items() if 2 * each > DRAWS)

    def _batch(self, samples: int, generator: torch.Generator) -> dict[int, float]:
        """By place how far rounding may move the features of a sample, relative to their size, where they are told."""
        x = self._inputs(samples, generator)
        known = torch.tensor(self.loss.labels, dtype=x.dtype, device=x.device)
        labels = known[torch.randint(len(known), (samples,), generator=generator, device=x.device)]
        values = self.network.forward(x)
        gradients = self._gradients(values, labels)
        found: dict[int, float] = {}
        for place in spaces(self.network, self.loss, gradients, float(torch.finfo(torch.float32).eps)):
            if place.left != samples:
                continue
            features = values[place.head.value_id].flatten(1)
            share = torch.full_like(labels, 1 / samples)
            told = Samples(features, labels, share, tuple((label, 1.0) for label in labels.tolist()))
            size = float(features.square().mean().sqrt().clamp(min=torch.finfo(x.dtype).tiny))
            error = float(Features(place, told, samples).error.max()) / size
            found[place.head.value_id] = min(error, found.get(place.head.value_id, torch.inf))
        return found

    def _gradients(self, values: list[Tensor], labels: Tensor) -> dict[str, Tensor]:
        """Of the mean over the batch, of the layers that read one position of one sample."""
        network = self.network
        k = self.loss.output_gradient(values[-1].flatten(1), labels).reshape(values[-1].shape) / len(labels)
        cotangents = network.vjp(values, network.slopes(values), {len(network.nodes): k})
        found = {}
        for at, node in enumerate(network.nodes):
            k_of = cotangents[at + 1]
            if not isinstance(node.op, Linear) or node.op.layer.positions > 1 or k_of is None:
                continue
            layer, k_of = node.op.layer, node.op.layer.pack_output(k_of)
            grad = layer.batch_gradient(layer.pack_input(values[node.reads[0]]), k_of)[0]
            found[layer.weight_name] = (grad.mT if layer.transposed else grad).float().double()
            if layer.bias_name is not None:
                found[layer.bias_name] = k_of.sum((0, 2)).float().double()
        return found
