"""Labels that are maps: a class for each pixel, as segmentation networks learn them."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass

import torch
from jaxtyping import Float
from torch import Tensor

from rgap.nn.loss import Loss


@dataclass(frozen=True, eq=False)
class LabelMaps(Loss):
    """Pixel-wise cross-entropy of outputs (b, classes, h, w) with one of several masks, which the attacker knows.

    A label is the number of its mask. That an attacker knows the masks is an aid, which every result names: the
    gradient itself tells of a mask how often each class occurs in it, see `rgap.attacks.class_shares`.

    Args:
        masks: (n, h, w), with classes from 0 to classes - 1.
        classes: of the model. With 1 its outputs are logits of yes, and the masks 0 and 1: torch's
            binary_cross_entropy_with_logits.

    Raises:
        ValueError: the masks have another shape or other classes.
    """

    masks: Tensor
    classes: int

    def __post_init__(self) -> None:
        if self.masks.dim() != 3 or not self.masks.numel():
            raise ValueError(f"got masks of shape {tuple(self.masks.shape)}, expected (n, h, w), one for each sample")
        most = max(self.classes - 1, 1)
        wrong = self.masks[(self.masks < 0) | (self.masks > most) | (self.masks != self.masks.long())]
        if len(wrong):
            raise ValueError(f"got class {float(wrong[0]):g} in a mask, expected whole numbers from 0 to {most}")
        object.__setattr__(self, "masks", self.masks.detach().clone().long())

    @property
    def labels(self) -> tuple[float, ...]:
        return tuple(float(at) for at in range(len(self.masks)))

    @property
    def outputs(self) -> int:
        return self.classes * self.masks[0].numel()

    @property
    def aid(self) -> str:
        which = "the label map is" if len(self.masks) == 1 else f"the label map is one of {len(self.masks)} that are"
        return f"{which} known to the attacker; the update tells how often each class occurs in it, not where"

    def per_sample(self, outputs: Float[Tensor, "s outputs"], labels: Float[Tensor, " s"]) -> Float[Tensor, " s"]:
        maps = outputs.reshape(len(outputs), self.classes, -1)
        own = self.masks.flatten(1).to(outputs.device)[labels.long()]
        if self.classes == 1:
            own = own[:, None].to(maps)
            return torch.nn.functional.binary_cross_entropy_with_logits(maps, own, reduction="none").mean((1, 2))
        return torch.nn.functional.cross_entropy(maps, own, reduction="none").mean(1)

    def shares(self, label: float) -> Float[Tensor, " classes"]:
        """Of one mask, how often each class occurs in it; with one class how often yes does."""
        mask = self.masks[int(label)].flatten()
        found = mask.bincount(minlength=max(self.classes, 2)).double() / len(mask)
        return found if self.classes > 1 else found[1:]

    def __repr__(self) -> str:
        digest = hashlib.sha256(self.masks.cpu().numpy().tobytes()).hexdigest()[:16]
        return f"LabelMaps({len(self.masks)} masks {digest}, classes={self.classes})"

    def _expected(self, wrong: list[float]) -> str:
        return f"the number of one of the {len(self.masks)} masks"
