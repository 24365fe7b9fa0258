"""The first pass: each value by the rows behind it alone, from the output to the input."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from rgap.inversion.smoother.information import Information
from rgap.inversion.smoother.kinks import passed, unpassed
from rgap.inversion.smoother.setting import Setting, definite
from rgap.inversion.smoother.steps import Guess
from rgap.linalg.psd import cholesky_solve
from rgap.nn.layers import Layer
from rgap.nn.ops import Linear


@dataclass(frozen=True, eq=False)
class First:
    setting: Setting

    def guess(self, k: Tensor) -> Guess:
        """All values, from the output's cotangent."""
        z, std = dict[int, Tensor](), dict[int, Tensor]()
        for _, found, _ in self._values(k, z, std):
            information = found
        return self._begun(information, z, std)

    def mismatch(self, k: Tensor) -> float:
        """How much of its gradient the last layer but one misses, relatively, at the value that it tells best: its rows
        are many more than the numbers of that value, which for the wrong label do not fit."""
        steps, seen, found = self.setting.steps, 0, 0.0
        for at, information, cotangent in self._values(k, {}, {}):
            op = steps.middle_network.nodes[at].op
            if at not in steps.layers or not isinstance(op, Linear):
                continue
            layer, seen = op.layer, seen + 1
            mean = self.setting.posterior(information)[0].reshape(1, layer.channels, layer.pixels)
            grad = layer.pack_weight(steps.gradient[layer.weight_name][None])[0]
            missed = grad - layer.grad_weight(mean, layer.pack_output(cotangent))[0]
            found = float(missed.norm() / grad.norm())
            if seen > 1:
                break
        return found

    def _values(
        self, k: Tensor, z: dict[int, Tensor], std: dict[int, Tensor]
    ) -> Iterator[tuple[int, Information, Tensor]]:
        """At each node, from the last one on: what is known of the value that it reads, and the cotangent behind it;
        z and std are filled in with what is in front of the activations.

        The weights are those in the middle of the steps. What slopes in doubt do to the rows in front is taken for
        noise, of each row alone.
        """
        steps, network = self.setting.steps, self.setting.steps.middle_network
        own, scale = self.setting.noise(steps.trail(None)), self._sizes()
        information, doubt = Information.nothing(k.numel(), 0, self.setting.like), torch.zeros_like(k)
        for at in reversed(range(len(network.nodes))):
            node, shape, behind = network.nodes[at], network.shapes[network.nodes[at].reads[0]], k
            if at in steps.activations:
                j = steps.activations.index(at)
                below = steps.below[j].flatten()
                z_mean, z_std = unpassed(*self.setting.posterior(information), below)
                out = passed(z_mean, z_std, below)
                information = information.shifted(out.mean - out.slope * z_mean).blurred(out.residual)[0]
                information = information.scaled(out.slope)
                slope, variance = (each.reshape(k.shape) for each in (out.slope, out.slope_variance))
                doubt = slope.square() * doubt + k.square() * variance + doubt * variance
                k = k * slope
                z[j], std[j] = z_mean.reshape(1, *shape), z_std.reshape(1, *shape)
            else:
                like = (k.new_zeros(1, *shape),)
                information = self.setting.pulled(at, information.shifted(node.op.forward(*like).flatten()))
                if isinstance(node.op, Linear):
                    layer = node.op.layer
                    information = self._with_rows(layer, information, k, doubt, own, scale[node.reads[0]])
                    doubt = layer.unpack_input(layer.grad_input(layer.pack_output(doubt), layer.weight.square()))
                else:
                    doubt = node.op.vjp(doubt, like)[0]
                k, doubt = node.op.vjp(k, like)[0].reshape(1, *shape), doubt.reshape(1, *shape)
            yield at, information, behind

    def _with_rows(
        self, layer: Layer, information: Information, k: Tensor, doubt: Tensor, own: dict[str, Tensor], scale: float
    ) -> Information:
        """And the layer's gradient rows.

        Args:
            doubt: the variance of k.
            scale: of what the layer reads, about.
        """
        steps, name = self.setting.steps, layer.weight_name
        square = k.new_full((1, layer.channels, layer.pixels), scale**2)
        variance = layer.grad_weight(square, layer.pack_output(doubt))[0]
        variance = variance + layer.pack_weight(own[name][None])[0]
        weight = 1 / (variance + (self.setting.smoothing.first * steps.size[name]) ** 2)
        grad = layer.pack_weight(steps.gradient[name][None])[0]
        return information.with_rows(layer, layer.pack_output(k)[0], weight, grad, grad.new_zeros(0, *grad.shape))

    def _begun(self, information: Information, z: dict[int, Tensor], std: dict[int, Tensor]) -> Guess:
        """The first guess, with the input and what is in front of the first activation by the prior as well."""
        steps, network, (tie, flat) = self.setting.steps, self.setting.steps.middle_network, self.setting.tie
        lower = torch.linalg.cholesky(definite(information.known + tie))
        x = cholesky_solve((information.right + flat * self.setting.prior.centre)[:, None], lower).reshape(
            1, *network.input_shape
        )
        drawn = self.setting.drawn(lower).reshape(-1, *network.input_shape)
        if steps.activations:
            there, spread = x, drawn
            for node in network.nodes[: steps.activations[0]]:
                there, spread = node.op.forward(there), node.op.jvp((spread,), (there,))
            z[0], std[0] = there, spread.square().mean(0, keepdim=True).sqrt()
        order = range(len(steps.activations))
        nowhere = [torch.zeros_like(z[j]) for j in order]
        places = [each.expand(steps.plan.steps, *each.shape[1:]) for each in nowhere]
        return Guess(x, [z[j] for j in order], [std[j] for j in order], places, nowhere)

    def _sizes(self) -> list[float]:
        """Root mean squares of all values, of an input drawn at random."""
        low, high = self.setting.value_range
        network = self.setting.steps.middle_network
        x = low + (high - low) * torch.rand(
            1, *network.input_shape, generator=self.setting.draw, dtype=self.setting.like.dtype
        )
        return [float(value.square().mean().sqrt()) for value in network.forward(x.to(self.setting.like))]
