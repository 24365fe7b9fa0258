"""Networks to attack, with weights that depend on the seed alone.

Weights are drawn as torch draws them by default: the same seed gives the same weights, and the global random state
stays as it was.
"""

from __future__ import annotations

from rgap.models.chains import cnn6, cnn6_d, convnet, fcn3, lenet, mlp, strided, vgg11
from rgap.models.resnet import residual, resnet18, resnet20, settled
from rgap.models.vit import vit_tiny

__all__ = [
    "cnn6", "cnn6_d", "convnet", "fcn3", "lenet", "mlp", "residual", "resnet18", "resnet20", "settled", "strided",
    "vgg11", "vit_tiny",
]  # fmt: skip
