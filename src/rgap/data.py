"""Pictures to audit with: photographs that come with scikit-image, and folders of your own."""

from __future__ import annotations

import os
import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import chain, zip_longest
from pathlib import Path

import numpy as np
import skimage
import torch
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor

from rgap.losses import CrossEntropy, Loss
from rgap.printable import line

# Files inside scikit-image's wheel, each in the public domain or CC0. They are read from there by path:
# `skimage.data` would download a file that it cannot find.
_PHOTOGRAPHS = ("astronaut.png", "chelsea.png", "coffee.png", "rocket.jpg", "retina.jpg")
# Each crop: its size, 1 being the largest that fits, and where it lies in the room that is left, down and
# across: 0 at the top or left, 1 at the other end.
_CROPS = ((1.0, 0.5, 0.5), (0.6, 0.0, 0.3), (0.6, 0.3, 0.9), (0.5, 0.8, 0.4), (0.5, 0.5, 0.6))
_EXTENSIONS = frozenset({".bmp", ".jpeg", ".jpg", ".pgm", ".png", ".ppm", ".tif", ".tiff", ".webp"})
# Pillow goes by a file's content, and has other programs open some formats.
_FORMATS = ("BMP", "JPEG", "PNG", "PPM", "TIFF", "WEBP")
PIXELS = 50_000_000
"""Of a larger picture nothing is decoded."""
_MODES = {1: ("1", "L", "LA", "I;16", "I;16B", "I;16L"), 3: ("RGB", "RGBA", "P", "CMYK", "YCbCr")}
_KIND = {1: "grey", 3: "colour"}


class DataError(ValueError):
    """Pictures that cannot be used as asked; says which, and what to do."""


@dataclass(frozen=True, eq=False)
class Images:
    """Pictures as a model takes them. `images[3]` and `images[:8]` are Images too, with a batch dimension.

    Args:
        inputs: (n, channels, height, width), float32 in [0, 1].
        names: one for each picture.
        classes: the name of each picture's class; "" where it has none.

    Raises:
        DataError: the three disagree about the number of pictures.
    """

    inputs: Tensor
    names: tuple[str, ...]
    classes: tuple[str, ...]

    def __post_init__(self) -> None:
        if self.inputs.ndim != 4 or not len(self.inputs) == len(self.names) == len(self.classes):
            raise DataError(
                f"got inputs of shape {tuple(self.inputs.shape)}, {len(self.names)} names and "
                f"{len(self.classes)} classes: expected (n, channels, height, width), and n of each"
            )

    def __len__(self) -> int:
        return len(self.inputs)

    def __getitem__(self, which: int | slice) -> Images:
        if isinstance(which, int):
            which = range(len(self))[which]  # raises IndexError, and turns -1 into the last
            which = slice(which, which + 1)
        return Images(self.inputs[which], self.names[which], self.classes[which])


def labels(images: Images, loss: Loss) -> list[float]:
    """A label for each picture: its class's place in alphabetical order, where the loss has as many classes; else all
    labels of the loss in turn."""
    classes = sorted(set(images.classes) - {""})
    if isinstance(loss, CrossEntropy) and 1 < len(classes) <= loss.classes:
        return [float(classes.index(name)) for name in images.classes]
    return [float(loss.examples[at % len(loss.examples)]) for at in range(len(images))]


def photographs(count: int = 5, size: int | tuple[int, int] = (32, 32), channels: int = 3) -> Images:
    """Real photographs, the same each time, without a download: an astronaut, a cat, a cup, a rocket, an eye.

    They are cut out of the photographs in scikit-image's wheel, in the proportions of `size`, and scaled with
    antialiasing. The first five are whole scenes, the following ones details of them; the class is the
    photograph.

    Args:
        count: 1 to 25.
        size: (height, width) in pixels, or one number for both.
        channels: 3, or 1 for grey (luma, ITU-R BT.601).

    Raises:
        DataError: an argument is out of its range, or scikit-image was installed without its pictures.
    """
    size = _size(size)
    _check_channels(channels)
    available = [(file, crop) for crop in range(len(_CROPS)) for file in _PHOTOGRAPHS]
    if not 1 <= count <= len(available):
        raise DataError(f"count is {count}: expected 1 to {len(available)}, the number of built-in photographs")
    mode = "RGB" if channels == 3 else "L"
    scenes = {file: _scene(_shipped(file), mode) for file in _PHOTOGRAPHS[:count]}
    classes = tuple(Path(file).stem for file, _ in available[:count])
    return Images(
        _stack([_array(_cut(scenes[file], size, *_CROPS[crop])) for file, crop in available[:count]]),
        tuple(f"{name}-{crop}" for name, (_, crop) in zip(classes, available, strict=False)),
        classes,
    )


@cache
def _scene(file: Path, mode: str) -> Image.Image:
    """A whole photograph: it takes longer to read than to cut pictures out of."""
    return _open(file).convert(mode)


def faces(count: int = 5, size: int | tuple[int, int] = (25, 25)) -> Images:
    """Real faces in grey, the same each time, without a download: from Labelled Faces in the Wild.

    Args:
        count: 1 to 100.
        size: (height, width) in pixels, or one number for both; the faces themselves are 25 x 25, and are cut
            and scaled to any other size as `photographs` are.

    Raises:
        DataError: an argument is out of its range, or scikit-image was installed without its pictures.
    """
    size = _size(size)
    if not 1 <= count <= 100:
        raise DataError(f"count is {count}: expected 1 to 100, the number of built-in faces")
    # The file has 100 faces, then 100 pictures that are none.
    values = np.load(_shipped("lfw_subset.npy"), allow_pickle=False)[:count].astype(np.float32) * 255
    return Images(
        _stack([_array(_cut(Image.fromarray(face), size)) for face in values]),
        tuple(f"face-{index}" for index in range(count)),
        ("face",) * count,
    )


def folder(
    path: str | os.PathLike[str], size: int | tuple[int, int] | None = None, channels: int = 3, limit: int | None = None
) -> Images:
    """Pictures from a folder: a subfolder for each class, as in torchvision's ImageFolder, or all in one.

    The order is the same each time: the classes in alphabetical order and in turn, one picture from each, so
    that `limit` takes from all of them. Folders below a class folder belong to the class. Names that begin
    with a dot and files that are not pictures by their extension are passed over. Alpha channels are dropped.

    Args:
        path: the folder.
        size: (height, width) in pixels, or one number for both: the largest centred part of these proportions
            is scaled to it with antialiasing. None keeps the pictures as they are, if they all have one size.
        channels: 3 for colour or 1 for grey. Pictures are never turned from one into the other.
        limit: at most so many pictures; the others are not opened. None: all.

    Raises:
        DataError: no such folder, no pictures in it, or pictures both beside and inside class folders; a
            picture that cannot be read, is grey where 3 channels were asked for or the other way round, or
            (size=None) differs from the first in size; an argument out of its range.
    """
    root = Path(path)
    size = None if size is None else _size(size)
    _check_channels(channels)
    if limit is not None and limit < 1:
        raise DataError(f"limit is {limit}: expected 1 or more, or None for all pictures")
    found = _find(root)[:limit]
    pictures: list[Image.Image] = []
    for file, _ in found:
        picture = _converted(_open(file), file, channels)
        if size is not None:
            picture = _cut(picture, size)
        elif pictures and picture.size != pictures[0].size:
            raise DataError(
                f"{file} is {_dimensions(picture)} and {found[0][0]} is {_dimensions(pictures[0])} "
                "(height x width): expected one size; pass size=(height, width) to scale them"
            )
        pictures.append(picture)
    return Images(
        _stack([_array(picture) for picture in pictures]),
        tuple(line(file.relative_to(root).as_posix()) for file, _ in found),
        tuple(line(name) for _, name in found),
    )


def picture(path: str | os.PathLike[str], size: int | tuple[int, int] | None = None, channels: int = 3) -> Images:
    """One picture from a file, as `folder` reads it.

    Raises:
        DataError: no such file, a file that is no picture, a grey picture where 3 channels were asked for or the
            other way round; an argument out of its range.
    """
    file = Path(path)
    _check_channels(channels)
    if not file.is_file():
        raise DataError(f"{file} does not exist: expected a picture file")
    found = _converted(_open(file), file, channels)
    return Images(_stack([_array(found if size is None else _cut(found, _size(size)))]), (line(file.name),), ("",))


def _shipped(name: str) -> Path:
    """A file in scikit-image's wheel."""
    path = Path(skimage.__file__).parent / "data" / name
    if not path.is_file():
        raise DataError(f"{path} does not exist: expected it to come with scikit-image; install scikit-image again")
    return path


def _find(root: Path) -> list[tuple[Path, str]]:
    """Every picture below `root` with its class, the classes in turn."""
    if not root.exists():
        raise DataError(f"{root} does not exist: expected a folder of pictures")
    if not root.is_dir():
        raise DataError(f"{root} is a file: expected a folder of pictures")
    loose: list[Path] = []
    classes: list[list[Path]] = []
    for entry in sorted(root.iterdir()):
        if entry.is_dir() and not entry.name.startswith("."):
            inside = sorted(file for file in entry.rglob("*") if _is_picture(file, entry))
            if inside:
                classes.append(inside)
        elif _is_picture(entry, root):
            loose.append(entry)
    if loose and classes:
        raise DataError(
            f"{root} holds pictures ({loose[0].name}, ...) and class folders ({_class(classes[0][0], root)}, ...): "
            "expected one or the other; move the pictures into a class folder, or pass a single class folder"
        )
    if not loose and not classes:
        raise DataError(
            f"no images in {root}: expected a subfolder of pictures for each class, or pictures in the "
            f"folder itself ({', '.join(sorted(_EXTENSIONS))})"
        )
    if loose:
        return [(file, "") for file in loose]
    in_turn = chain.from_iterable(zip_longest(*classes))
    return [(file, _class(file, root)) for file in in_turn if file is not None]


def _class(file: Path, root: Path) -> str:
    return file.relative_to(root).parts[0]


def _is_picture(file: Path, root: Path) -> bool:
    hidden = any(part.startswith(".") for part in file.relative_to(root).parts)
    return not hidden and file.suffix.lower() in _EXTENSIONS and file.is_file()


def _open(file: Path) -> Image.Image:
    """The picture, with its pixels read, since Pillow notices most damage only then."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            with Image.open(file, formats=_FORMATS) as picture:
                if picture.width * picture.height > PIXELS:
                    raise ValueError(f"it says that it is {_dimensions(picture)}, more than {PIXELS:,} pixels")
                picture.load()
                return picture
        except Exception as error:  # Pillow's decoders report a damaged file by any of them
            reason = line(str(error) or type(error).__name__, 200)
            raise DataError(
                f"cannot read {file} as an image: {reason}; expected a whole picture file ({', '.join(_FORMATS)}) of "
                f"at most {PIXELS:,} pixels, remove or replace it"
            ) from error


def _converted(picture: Image.Image, file: Path, channels: int) -> Image.Image:
    """Colour as RGB, 8-bit grey as L, 16-bit grey as F with values from 0 to 255."""
    if picture.mode not in _MODES[channels]:
        other = 4 - channels
        if picture.mode not in _MODES[other]:
            raise DataError(f"{file} has mode {picture.mode}: expected 8-bit colour, or 8- or 16-bit grey; convert it")
        raise DataError(
            f"got a {_KIND[other]} picture (mode {picture.mode}) in {file}, "
            f"expected {channels} channel{'s' * (channels > 1)}: pass channels={other} or convert it"
        )
    if picture.mode.startswith("I;16"):
        # convert("L") would cut off every value above 255.
        return Image.fromarray(np.asarray(picture, dtype=np.float32) * np.float32(255 / 65535))
    if picture.mode == "P":
        picture = picture.convert("RGBA")  # a palette with transparency has no direct way to RGB
    return picture.convert("RGB" if channels == 3 else "L")


def _cut(
    picture: Image.Image, size: tuple[int, int], scale: float = 1.0, top: float = 0.5, left: float = 0.5
) -> Image.Image:
    """A part in the proportions of `size`, scaled to it. Pillow widens its filter to shrink: no aliasing."""
    height, width = size
    unit = scale * min(picture.height / height, picture.width / width)
    # At full size rounding may leave less than no room.
    x, y = left * max(0.0, picture.width - unit * width), top * max(0.0, picture.height - unit * height)
    box = (x, y, min(x + unit * width, picture.width), min(y + unit * height, picture.height))
    return picture.resize((width, height), Image.Resampling.LANCZOS, box=box)


def _array(picture: Image.Image) -> NDArray[np.float32]:
    """(channels, height, width) in [0, 1]."""
    values = np.asarray(picture, dtype=np.float32) / np.float32(255)
    values = np.clip(values, 0.0, 1.0)  # the filter overshoots at edges, and mode F keeps that
    return values[None] if values.ndim == 2 else np.moveaxis(values, -1, 0)


def _stack(pictures: Sequence[NDArray[np.float32]]) -> Tensor:
    return torch.from_numpy(np.ascontiguousarray(np.stack(pictures)))  # stack keeps the strides it is given


def _dimensions(picture: Image.Image) -> str:
    return f"{picture.height} x {picture.width}"


def _size(size: int | tuple[int, int]) -> tuple[int, int]:
    height, width = (size, size) if isinstance(size, int) else size
    if height < 1 or width < 1:
        raise DataError(f"size is {size}: expected a height and a width of 1 pixel or more")
    return height, width


def _check_channels(channels: int) -> None:
    if channels not in _MODES:
        raise DataError(f"channels is {channels}: expected 3 for colour or 1 for grey")
