"""Pictures to attack: photographs that an installed package ships, or any folder of images. Nothing is downloaded."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cache
from importlib.resources import as_file, files
from itertools import zip_longest
from pathlib import Path

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image, UnidentifiedImageError
from torch import Tensor

SUFFIXES = frozenset({".png", ".jpg", ".jpeg", ".bmp", ".gif", ".webp", ".tif", ".tiff", ".pgm", ".ppm"})

# Photographs inside scikit-image's wheel, public domain or CC0, with square crops (left, top, side) worth looking at.
_CROPS: tuple[tuple[str, int, int, int], ...] = (
    ("astronaut.png", 80, 0, 280),
    ("chelsea.png", 75, 0, 300),
    ("coffee.png", 120, 0, 400),
    ("rocket.jpg", 220, 0, 427),
    ("retina.jpg", 100, 100, 1200),
    ("astronaut.png", 0, 0, 512),
    ("chelsea.png", 120, 60, 160),
    ("coffee.png", 240, 80, 220),
    ("rocket.jpg", 260, 180, 240),
    ("motorcycle_left.png", 120, 0, 500),
    ("astronaut.png", 300, 150, 210),
    ("motorcycle_right.png", 200, 100, 300),
    ("hubble_deep_field.jpg", 100, 100, 500),
    ("ihc.png", 0, 0, 512),
    ("chelsea.png", 200, 0, 240),
    ("coffee.png", 0, 150, 250),
)


class DataError(ValueError):
    """Pictures that cannot be used; says which, and what was expected."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures of one size."""

    inputs: Float[Tensor, "n c h w"]
    """Values in [0, 1], float32."""
    names: tuple[str, ...]
    classes: tuple[str, ...]
    """The folder each picture came from, "" if none."""

    def __len__(self) -> int:
        return len(self.inputs)

    def __iter__(self) -> Iterator[Images]:
        return (self[at : at + 1] for at in range(len(self)))

    def __getitem__(self, part: slice) -> Images:
        return Images(self.inputs[part], self.names[part], self.classes[part])


def photographs(count: int = 8, size: int = 32, channels: int = 3) -> Images:
    """Built-in photographs, cut square and scaled to size x size.

    Args:
        count: at most 16.
        channels: 3 for colour, 1 for grey.

    Raises:
        DataError: more pictures than there are.
    """
    if not 1 <= count <= len(_CROPS):
        raise DataError(f"got count={count}, expected 1 to {len(_CROPS)} built-in photographs; use a folder for more")
    if channels not in (1, 3):
        raise DataError(f"got channels={channels}, expected 1 (grey) or 3 (colour)")
    pictures = []
    for file, left, top, side in _CROPS[:count]:
        cut = _photograph(file).crop((left, top, left + side, top + side))
        cut = cut.resize((size, size), Image.Resampling.LANCZOS)
        pictures.append(_tensor(cut.convert("RGB" if channels == 3 else "L")))
    names = tuple(f"{file.split('.')[0]}-{at}" for at, (file, *_) in enumerate(_CROPS[:count], 1))
    return Images(torch.stack(pictures), names, ("",) * count)


@cache
def _photograph(file: str) -> Image.Image:
    with as_file(files("skimage") / "data" / file) as path, Image.open(path) as picture:
        return picture.convert("RGB")


def folder(path: str | Path, size: int | None = None, channels: int | None = 3, limit: int | None = None) -> Images:
    """Pictures of a folder with one subfolder for each class (torchvision's ImageFolder arrangement), or of a flat one.

    The classes take turns, so that a limit keeps all of them: first pictures first, in order of name.

    Args:
        size: cut to a centred square and scaled to size x size; None keeps the pictures as they are.
        channels: 3 for colour, 1 for grey; None takes what the first picture has.
        limit: how many pictures at most.

    Raises:
        DataError: no such folder, no picture in it, an unreadable picture, another number of channels or size.
    """
    root = Path(path)
    if not root.is_dir():
        raise DataError(f"{root}: no such folder; expected a folder of pictures, or of one subfolder for each class")
    classes = sorted(entry for entry in root.iterdir() if entry.is_dir())
    found = [_pictures(folder) for folder in classes] if classes else [_pictures(root)]
    order = [file for turn in zip_longest(*found) for file in turn if file is not None][:limit]
    if not order:
        raise DataError(f"{root}: no pictures here, expected files ending in {', '.join(sorted(SUFFIXES))}")
    tensors = []
    for file in order:
        picture = _read(file, size, channels)
        channels = len(picture)
        if tensors and picture.shape != tensors[0].shape:
            raise DataError(
                f"{file}: got {picture.shape[2]}x{picture.shape[1]} pixels, expected "
                f"{tensors[0].shape[2]}x{tensors[0].shape[1]} as in {order[0]}; give a size to scale all to it"
            )
        tensors.append(picture)
    names = tuple(str(file.relative_to(root)) for file in order)
    return Images(torch.stack(tensors), names, tuple(f.parent.name if classes else "" for f in order))


def _pictures(root: Path) -> Iterable[Path]:
    return sorted(file for file in root.iterdir() if file.suffix.lower() in SUFFIXES)


def _read(file: Path, size: int | None, channels: int | None) -> Float[Tensor, "c h w"]:
    try:
        with Image.open(file) as picture:
            picture.load()
    except (UnidentifiedImageError, OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise DataError(f"{file}: cannot be read as a picture ({error})") from error
    grey = picture.mode in ("1", "L", "I;16", "I", "F", "LA")
    if channels is not None and channels != (1 if grey else 3):
        got = f"a {'grey' if grey else 'colour'} picture (mode {picture.mode})"
        raise DataError(f"{file}: got {got}, expected {channels} channel(s); convert it, or use a model for such pictures")
    if size is not None:
        side = min(picture.size)
        left, top = (picture.width - side) // 2, (picture.height - side) // 2
        picture = picture.crop((left, top, left + side, top + side)).resize((size, size), Image.Resampling.LANCZOS)
    return _tensor(picture.convert("L" if grey else "RGB"))


def _tensor(picture: Image.Image) -> Float[Tensor, "c h w"]:
    values = torch.from_numpy(np.array(picture, dtype=np.float32) / 255)
    return values[None] if values.dim() == 2 else values.permute(2, 0, 1).contiguous()
