"""Which label a sample has, and, where its features are known up to scale only, which scale.

At the right label k lies in the first layer's column space, and (x, 1)' G^+ k is the number of samples.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.inversion.subspace.head import Spaces
from rgap.linalg.roots import find_roots

SLACK = 30.0
"""Times what rounding explains, within which two numbers agree."""


@dataclass(frozen=True, eq=False)
class Samples:
    """b samples that were found."""

    x: Float[Tensor, "b n"]
    """Features."""
    labels: Float[Tensor, " b"]
    share: Float[Tensor, " b"]
    """What each one's gradient counts in the one that was sent: the inverse of the number of samples."""
    others: tuple[tuple[float, float], ...]
    """Of each sample another label and a factor of its features that give the same gradient; the label itself and 1
    where there is none."""
    error: Float[Tensor, " b"] | None = None
    """How far rounding may have moved each one's values (root mean square), where all were solved for at once."""

    def __len__(self) -> int:
        return len(self.x)

    def select(self, index: Sequence[int]) -> Samples:
        """Some of them, before all are solved for at once."""
        at = torch.tensor(index, dtype=torch.long, device=self.x.device)
        return Samples(self.x[at], self.labels[at], self.share[at], tuple(self.others[each] for each in index))

    @staticmethod
    def none(like: Float[Tensor, "s n"]) -> Samples:
        nothing = like.new_zeros(0)
        return Samples(like[:0], nothing, nothing, ())

    @staticmethod
    def concatenate(several: Sequence[Samples]) -> Samples:
        return Samples(
            torch.cat([each.x for each in several]),
            torch.cat([each.labels for each in several]),
            torch.cat([each.share for each in several]),
            tuple(other for each in several for other in each.others),
        )


def likeliest(spaces: Spaces, x: Float[Tensor, "s n"]) -> Float[Tensor, " s"]:
    """Of each input the label whose cotangent comes nearest to the first layer's column space."""
    labels = torch.tensor(spaces.head.loss.labels or (0.0,), dtype=x.dtype, device=x.device)
    if not len(x):
        return x.new_zeros(0)
    values = spaces.head.values(x)
    off = [spaces.first.outside(k).norm(dim=1) / k.norm(dim=1) for k in _cotangents(spaces, values, labels)]
    return labels[torch.stack(off).nan_to_num(nan=torch.inf).argmin(0)]


def _cotangents(spaces: Spaces, values: list[Tensor], labels: Float[Tensor, " t"]) -> list[Float[Tensor, "s o"]]:
    """By label, the cotangents of several inputs."""
    return [spaces.head.k(values, label.expand(len(values[0]))) for label in labels]


def identify(spaces: Spaces, x: Float[Tensor, "s n"], count: int) -> Samples:
    """Of inputs that satisfy the condition those that are samples, with their labels.

    Args:
        count: the number of samples. Where features are known up to scale it decides the scale.
    """
    found = [_identify(spaces, x[at : at + 1], count) for at in range(len(x))]
    return _once(spaces, Samples.concatenate([Samples.none(x), *(each for each in found if each is not None)]))


def _once(spaces: Spaces, found: Samples) -> Samples:
    """Each sample once: of two that are the same (x, 1)' G^+ k is what it is of one, of two others it is zero."""
    if not len(found):
        return found
    head, first = spaces.head, spaces.first
    k = head.k(head.values(found.x), found.labels)
    left = torch.linalg.solve(first.core, first.row(found.x) @ first.v, left=False)
    crossed = (left @ (k @ first.u).mT).abs() * found.share[:, None]
    kept: list[int] = []
    for at in range(len(found)):
        if all(float(crossed[at, other]) < 0.5 for other in kept):
            kept.append(at)
    return found.select(kept)


def _identify(spaces: Spaces, x: Float[Tensor, "1 n"], count: int) -> Samples | None:
    labels = torch.tensor(spaces.head.loss.labels, dtype=x.dtype, device=x.device)
    if not len(labels):
        return _of_real_label(spaces, x, count)
    if spaces.head.scalable:
        return _of_direction(spaces, x, labels, count)
    wide = x.expand(len(labels), -1)
    values = spaces.head.values(wide)
    k = spaces.head.k(values, labels)
    off = _off(spaces, x, k, labels)
    share, moved = spaces.first.inverse_share(wide, k)
    # One sample counts 1 / count, m samples that are the same m / count.
    times = (count / share).round().clamp(min=1)
    allowed = SLACK * moved + 1e-6 * count
    # What rounding explains must be less than what lies between one number of samples and the next.
    counted = ((share - count / times).abs() <= allowed) & (allowed < 0.1 * count / (times * (times + 1)))
    off = torch.where(counted, off, torch.inf)
    best = int(off.argmin())
    if not off[best] <= 1:
        return None
    label = labels[best : best + 1]
    return Samples(x, label, 1 / share[best : best + 1], ((float(label), 1.0),))


def _off(spaces: Spaces, x: Float[Tensor, "1 n"], k: Float[Tensor, "s o"], labels: Float[Tensor, " s"]) -> Tensor:
    """By how much each k misses the column space, in units of what rounding explains; (s,)."""
    head, first = spaces.head, spaces.first
    a = first.row(x) @ first.v
    # The features are known as far as the row space is: what that does to k is seen by moving them once.
    shift = first.uncertainty(a)[:, None] * x.shape[1] ** -0.5
    wide = (x + shift).expand(len(labels), -1)
    moved = (head.k(head.values(wide), labels) - k).norm(dim=1)
    allowed = SLACK * (first.cotangent_uncertainty(k) + moved + 1e-12 * k.norm(dim=1))
    off: Tensor = first.outside(k).norm(dim=1) / allowed
    return off


def _of_real_label(spaces: Spaces, x: Float[Tensor, "1 n"], count: int) -> Samples | None:
    """Of a loss with any real label and one output: k is one number times a known direction, and the share tells it."""
    head = spaces.head
    if head.loss.outputs != 1:
        return None
    values = head.values(x)
    k = head.direction(values)
    if not _off(spaces, x, k, x.new_zeros(1))[0] <= 1:
        return None
    share, moved = spaces.first.inverse_share(x, k)
    if not bool(share.abs() > SLACK * moved):
        return None
    size = count / share
    label = head.loss.label_from(values[-1].reshape(1, 1), size[:, None])
    if label is None:
        return None
    return Samples(x, label, x.new_full((1,), 1 / count), ((float(label), 1.0),))


GRID = 300
"""Scales that are tried, over twelve powers of ten."""


def _of_direction(spaces: Spaces, x: Float[Tensor, "1 n"], labels: Float[Tensor, " t"], count: int) -> Samples | None:
    """The scale a at which (a x)' G^+ k is the number of samples, and k lies in the column space.

    Scaled features leave the slopes behind them as they are: with z the outputs at x, k = B k_out(a z, label).
    """
    head, first = spaces.head, spaces.first
    values = head.values(x)
    outputs, shape = values[-1].reshape(-1), values[-1].shape[1:]
    eye = torch.eye(len(outputs), dtype=x.dtype, device=x.device).reshape(-1, *shape)
    found = head.network.vjp(values, head.network.slopes(values), {len(values) - 1: eye})[1]
    if found is None or not outputs.any():
        return None
    b = found.flatten(1)  # B', one row for each output
    share, _ = first.inverse_share(x.expand(len(b), -1), b)
    missed = first.outside(b)

    def k_out(label: Float[Tensor, " r"], scale: Float[Tensor, " r"]) -> Float[Tensor, "r o"]:
        return head.loss.output_gradient(outputs * scale[:, None], label)

    grid = torch.logspace(-4, 8, GRID, dtype=x.dtype, device=x.device) / outputs.abs().max()
    candidates: list[tuple[float, float, float]] = []  # how far off, label, scale
    for label in labels:

        def left(scale: Float[Tensor, " r"], label: Tensor = label) -> Float[Tensor, " r"]:
            return scale * (k_out(label.expand(len(scale)), scale) @ share) / count - 1

        scale = torch.cat(find_roots(left, grid, near=1e-3))
        k = k_out(label.expand(len(scale)), scale)
        uncertain = (first.noise + 1e-12) * torch.linalg.solve(first.core, (k @ b @ first.u).mT).norm(dim=0)
        a = first.row(x) @ first.v
        allowed = SLACK * (uncertain + first.uncertainty(a) / a.norm() * (k @ b).norm(dim=1))
        off = (k @ missed).norm(dim=1) / allowed
        candidates += [(float(o), float(label), float(each)) for o, each in zip(off, scale, strict=True)]
    candidates.sort()
    if not candidates or not candidates[0][0] <= 1:
        return None
    off, best, scale_ = candidates[0]
    # Where a loss has two margins for one product, both give the gradient.
    others = [(label, each / scale_) for away, label, each in candidates[1:] if away <= max(0.1, 3 * off)]
    return Samples(x * scale_, x.new_full((1,), best), x.new_full((1,), 1 / count), ((others or [(best, 1.0)])[0],))
