"""A small vision transformer (A. Dosovitskiy et al., *An Image is Worth 16x16 Words*, ICLR 2021)."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from rgap.models.common import check_sizes, seeded


class Attention(nn.Module):
    """Self-attention of several heads."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.qkv, self.out = nn.Linear(width, 3 * width), nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        count, tokens, width = x.shape
        parts = self.qkv(x).reshape(count, tokens, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2])
        out: Tensor = self.out(mixed.transpose(1, 2).reshape(count, tokens, width))
        return out


class Encoder(nn.Module):
    """Attention and a perceptron, each behind a layer norm and beside a skip connection."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.norm1, self.attention = nn.LayerNorm(width), Attention(width, heads)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(nn.Linear(width, 4 * width), nn.GELU(), nn.Linear(4 * width, width))

    def forward(self, x: Tensor) -> Tensor:
        x = x + self.attention(self.norm1(x))
        out: Tensor = x + self.mlp(self.norm2(x))
        return out


class VisionTransformer(nn.Module):
    """Patches with learned positions and a class token, encoders, and a Linear layer on the class token."""

    def __init__(self, in_channels: int, size: int, patch: int, width: int, depth: int, heads: int, classes: int):
        super().__init__()
        self.embed = nn.Conv2d(in_channels, width, patch, patch)
        self.token = nn.Parameter(0.02 * torch.randn(1, 1, width))
        self.positions = nn.Parameter(0.02 * torch.randn(1, 1 + (size // patch) ** 2, width))
        self.encoders = nn.Sequential(*(Encoder(width, heads) for _ in range(depth)))
        self.norm, self.head = nn.LayerNorm(width), nn.Linear(width, classes)

    def forward(self, x: Tensor) -> Tensor:
        patches = self.embed(x).flatten(2).transpose(1, 2)
        tokens = torch.cat([self.token.expand(len(x), -1, -1), patches], 1) + self.positions
        scores: Tensor = self.head(self.norm(self.encoders(tokens))[:, 0])
        return scores


def vit_tiny(
    in_channels: int = 3,
    size: int = 32,
    patch: int = 4,
    width: int = 192,
    depth: int = 12,
    heads: int = 3,
    classes: int = 10,
    seed: int = 0,
) -> VisionTransformer:
    """ViT-tiny, with the sizes of DeiT-Ti (H. Touvron et al., ICML 2021), in evaluation mode.

    A convolution with as great a stride as its kernel makes a token of every patch; a class token joins them, and
    learned positions are added. Each encoder adds attention and then a perceptron of 4 times `width` with GELU, both
    behind a layer norm. A layer norm and a Linear layer read the class token.

    Layers embed, encoders.0, ..., norm, head, and the parameters token and positions:
    (batch, in_channels, size, size) to (batch, classes).

    Args:
        in_channels: of the input.
        size: its height and width, a multiple of the patch.
        patch: height and width of a patch.
        width: values of a token, a multiple of the heads.
        depth: encoders.
        heads: of each attention.
        classes: outputs, one for each.
        seed: of the weights.

    Raises:
        ValueError: an argument is less than 1, or no multiple of what it must be one of.
    """
    check_sizes(in_channels=in_channels, size=size, patch=patch, width=width, depth=depth, heads=heads, classes=classes)
    if size % patch or width % heads:
        raise ValueError(
            f"got size={size}, patch={patch}, width={width}, heads={heads}: expected a size that is a multiple of the "
            "patch, and a width that is one of the heads"
        )
    with seeded(seed):
        return VisionTransformer(in_channels, size, patch, width, depth, heads, classes).eval()
