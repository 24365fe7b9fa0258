"""One pass at a guess: from the output to the input, and back to all values and slopes in doubt."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.smoother.information import Blurred, Information
from rgap.inversion.smoother.setting import Setting, definite
from rgap.inversion.smoother.steps import Guess, Middle
from rgap.linalg.psd import cholesky_solve
from rgap.nn.ops import Linear

SURE = 1e-7
"""How well the change of the output's cotangent follows that of the output, relatively."""


@dataclass(frozen=True, eq=False)
class Solved:
    """One pass: from the output to the input, and back."""

    guess: Guess
    information: Information
    left: dict[str, Tensor]
    """What the rows still miss."""
    excess: dict[str, float]
    """Its root mean square in units of what was taken for noise."""


@dataclass(frozen=True, eq=False)
class Again:
    setting: Setting

    def solve(self, guess: Guess, middle: Middle, residual: dict[str, Tensor], weight: dict[str, Tensor]) -> Solved:
        """One pass at a guess, whose steps leave a residual of the mean gradient."""
        steps, chosen = self.setting.steps, self._in_doubt(middle)
        effects = self._effects(middle, chosen)
        information, blurred = self.back(middle, residual, weight, effects)
        rise = torch.cat([(1 - b).flatten()[u] for b, u in zip(steps.below, chosen, strict=True)])
        variance = torch.cat([v.flatten()[u] for v, u in zip(middle.variances, chosen, strict=True)])
        shares = torch.cat([s.flatten()[u] for s, u in zip(guess.shares, chosen, strict=True)])
        units, inner = len(variance), information.beside.clone()
        inner.diagonal()[:units].add_(1 / variance)
        right = information.beside_right.clone()
        right[:units] -= shares * rise / variance
        lower = torch.linalg.cholesky(definite(inner))
        half = torch.linalg.solve_triangular(lower, torch.cat([information.cross.mT, right[:, None]], 1), upper=False)
        alone = information.known - half[:, :-1].mT @ half[:, :-1]
        tie = self.setting.tie[0]
        wanted = (
            information.right - half[:, :-1].mT @ half[:, -1] - tie @ (guess.x.flatten() - self.setting.prior.centre)
        )
        factor = torch.linalg.cholesky(definite(alone + tie))
        move = cholesky_solve(wanted[:, None], factor)[:, 0]
        beside = cholesky_solve((right - information.cross.mT @ move)[:, None], lower)[:, 0]
        tangents, moved = self.forth(middle, blurred, move[None], beside[None], middle.apart)
        left = self._left(middle, residual, effects, tangents, beside)
        drawn = self.setting.drawn(factor)
        beside_drawn = cholesky_solve(-(drawn @ information.cross).mT, lower).mT + self.setting.drawn(lower)
        spread = self.forth(middle, blurred, drawn, beside_drawn, None)[1]
        std = [each.square().mean(0, keepdim=True).sqrt().clamp(min=1e-12) for each in spread]
        z = [own + each for own, each in zip(guess.z, moved, strict=True)]
        found = [torch.zeros_like(each) for each in guess.shares]
        all_shares = shares + beside[:units] / rise
        for own, index, part in zip(found, chosen, torch.split(all_shares, [len(u) for u in chosen]), strict=True):
            own.view(-1)[index] = part
        new = Guess(guess.x + move.reshape(guess.x.shape), z, std, guess.places, found)
        excess = {name: float((left[name].square() * weight[name]).mean().sqrt()) for name in left}
        return Solved(new, replace(information, known=alone), left, excess)

    def _in_doubt(self, middle: Middle) -> list[Tensor]:
        """Of each activation the numbers of the units whose slope is in doubt."""
        every = torch.cat([each.flatten() for each in middle.variances])
        rise = torch.cat([(1 - below).square().flatten() for below in self.setting.steps.below])
        open_ = every > self.setting.smoothing.open * rise
        if int(open_.sum()) > self.setting.smoothing.units:
            open_ &= every >= every.topk(self.setting.smoothing.units).values[-1]
        return [part.nonzero().flatten() for part in torch.split(open_, [each.numel() for each in middle.variances])]

    def _effects(self, middle: Middle, chosen: list[Tensor]) -> dict[str, Tensor]:
        """What the slopes in doubt and the output's cotangent do to each parameter's gradient, for a change by one.

        Those that do nothing are left out: of units behind an activation in front of the parameter's layer.
        """
        steps, network, values = self.setting.steps, self.setting.steps.middle_network, middle.values
        found: dict[str, list[Tensor]] = {name: [] for name in steps.names}
        for at, index in zip(steps.activations, chosen, strict=True):
            k, there = middle.cotangents[at + 1], steps.reads(at)
            assert k is not None
            own = k.new_zeros(len(index), k.numel())
            own[torch.arange(len(index)), index] = k.flatten()[index]
            ks = network.vjp(values, middle.slopes, {there: own.reshape(-1, *network.shapes[there])})
            for name, rows in steps.rows(network, values, ks).items():
                found[name].append(rows)
        outputs = values[-1].numel()
        unit = (
            torch.eye(outputs, dtype=self.setting.like.dtype)
            .to(self.setting.like)
            .reshape(outputs, *network.shapes[-1])
        )
        ks = network.vjp(values, middle.slopes, {len(values) - 1: unit})
        for name, rows in steps.rows(network, values, ks).items():
            found[name].append(rows)
        return {name: torch.cat(rows) for name, rows in found.items()}

    def back(
        self, middle: Middle, residual: dict[str, Tensor], weight: dict[str, Tensor], effects: dict[str, Tensor]
    ) -> tuple[Information, dict[int, Blurred | None]]:
        """From the output to the input: of how all values have to move."""
        network, steps = self.setting.steps.middle_network, self.setting.steps
        information, blurred = self._tied(middle), dict[int, Blurred | None]()
        for at in reversed(range(len(network.nodes))):
            op = network.nodes[at].op
            if at in steps.activations:
                j = steps.activations.index(at)
                information, blurred[at] = information.blurred(middle.residuals[j].flatten())
                information = information.scaled(middle.slopes[at].flatten()).shifted(-middle.apart[j].flatten())
                continue
            information = self.setting.pulled(at, information)
            if not isinstance(op, Linear) or not op.has_gradient:
                continue
            layer, name, k = op.layer, op.layer.weight_name, middle.cotangents[at + 1]
            assert k is not None
            own, missed = (layer.pack_weight(each[name][None])[0] for each in (weight, residual))
            information = information.with_rows(
                layer, layer.pack_output(k)[0], own, missed, layer.pack_weight(effects[name])
            )
            if layer.bias_name in effects:
                bias = layer.bias_name
                information = information.with_sums(weight[bias], residual[bias], effects[bias])
        return information, blurred

    def _tied(self, middle: Middle) -> Information:
        """That the output's cotangent changes as the output does."""
        flat, slope = middle.values[-1].flatten(), self.setting.steps.output_curvature(middle.values[-1])
        k = middle.cotangents[-1]
        assert k is not None
        sure = (SURE * float(k.norm())) ** -2
        eye = torch.eye(len(flat), dtype=flat.dtype).to(flat)
        return Information(
            sure * slope.mT @ slope, -sure * slope.mT, torch.zeros_like(flat), sure * eye, torch.zeros_like(flat)
        )

    def forth(
        self,
        middle: Middle,
        blurred: dict[int, Blurred | None],
        move: Float[Tensor, "s v"],
        beside: Float[Tensor, "s m"],
        apart: list[Tensor] | None,
    ) -> tuple[list[Tensor], list[Tensor]]:
        """From the input to the output: how all values move, and those in front of the activations once more; where
        nothing is apart, drawn."""
        network, steps = self.setting.steps.middle_network, self.setting.steps
        values, found = [move.reshape(-1, *network.input_shape)], list[Tensor]()
        for at, node in enumerate(network.nodes):
            read = values[node.reads[0]]
            if at not in steps.activations:
                values.append(node.op.jvp((read,), (middle.values[node.reads[0]],)))
                continue
            if apart is not None:
                read = read - apart[len(found)]
            found.append(read)
            out, noise = (read * middle.slopes[at]).flatten(1), blurred[at]
            if noise is not None:
                draw = self.setting.draw if apart is None else None
                out = out.index_add(1, noise.index, noise.noise(out, beside, draw, apart is None))
            values.append(out.reshape(-1, *network.shapes[at + 1]))
        return values, found

    def _left(
        self,
        middle: Middle,
        residual: dict[str, Tensor],
        effects: dict[str, Tensor],
        tangents: list[Tensor],
        beside: Float[Tensor, " m"],
    ) -> dict[str, Tensor]:
        """What all rows miss behind a pass, as far as it is linear."""
        network, found = self.setting.steps.middle_network, {}
        bent = self.setting.steps.rows(network, tangents, middle.cotangents)
        for name, each in residual.items():
            own = effects[name]
            by = torch.tensordot(beside[len(beside) - len(own) :], own, 1).reshape(each.shape)
            of_x = 0.0 if each.dim() == 1 else bent[name][0]
            found[name] = each - of_x - by
        return found
