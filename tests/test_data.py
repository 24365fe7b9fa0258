from __future__ import annotations

import socket
from pathlib import Path

import numpy as np
import pytest
import skimage
import torch
from PIL import Image

from rgap import data
from rgap.data import DataError


def save(path: Path, values: np.ndarray, mode: str | None = None) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    picture = Image.fromarray(values.astype(values.dtype if values.dtype == np.uint16 else np.uint8))
    (picture if mode is None else picture.convert(mode)).save(path)
    return path


def colours(seed: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width, 3), dtype=np.uint8)


def greys(seed: int, height: int = 6, width: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (height, width), dtype=np.uint8)


@pytest.fixture
def classes(tmp_path: Path) -> Path:
    """Three classes with three, one and two pictures."""
    for seed, name in enumerate(["cat/b.png", "cat/a.png", "cat/more/c.png", "ant/z.png", "dog/1.png", "dog/2.PNG"]):
        save(tmp_path / name, colours(seed))
    return tmp_path


# Images


def test_images_are_indexed_with_their_names():
    images = data.photographs(4, size=8)
    assert len(images) == 4
    for which, rows in [(1, [1]), (-1, [3]), (slice(1, 3), [1, 2]), (slice(None, None, 2), [0, 2]), (slice(4, 9), [])]:
        part = images[which]
        assert torch.equal(part.inputs, images.inputs[rows])
        assert part.names == tuple(images.names[row] for row in rows)
        assert part.classes == tuple(images.classes[row] for row in rows)
    assert [part.names[0] for part in images] == list(images.names)
    for outside in (4, -5):
        with pytest.raises(IndexError):
            images[outside]


def test_images_that_disagree_are_refused():
    with pytest.raises(DataError, match=r"2 names and 1 classes: expected \(n, channels, height, width\)"):
        data.Images(torch.zeros(1, 3, 2, 2), ("a", "b"), ("",))
    with pytest.raises(DataError, match=r"shape \(1, 2, 2\)"):
        data.Images(torch.zeros(1, 2, 2), ("a",), ("",))


# photographs and faces


@pytest.mark.parametrize(
    ("images", "shape"),
    [
        (lambda: data.photographs(25), (25, 3, 32, 32)),
        (lambda: data.photographs(7, size=(20, 31), channels=1), (7, 1, 20, 31)),
        (lambda: data.faces(100), (100, 1, 25, 25)),
        (lambda: data.faces(3, size=28), (3, 1, 28, 28)),
    ],
)
def test_built_in_pictures_without_a_network(images, shape, monkeypatch):
    def refuse(*_: object) -> None:
        raise AssertionError("tried to open a connection")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    found = images()
    assert found.inputs.shape == shape
    assert found.inputs.dtype == torch.float32
    assert found.inputs.is_contiguous()
    assert 0 <= found.inputs.min() < found.inputs.max() <= 1
    assert torch.equal(found.inputs, images().inputs)
    assert len(set(found.names)) == len(found)


def test_photographs_differ_from_one_another():
    flat = data.photographs(25).inputs.flatten(1)
    distance = torch.cdist(flat, flat) + torch.eye(25) * 1e9
    assert distance.min() > 0.05 * flat.shape[1] ** 0.5  # root mean square over the pixels


def test_a_longer_list_begins_with_the_shorter_one():
    short, long = data.photographs(6), data.photographs(20)
    assert torch.equal(short.inputs, long.inputs[:6])
    assert short.names == long.names[:6]
    assert set(short.classes) == {"astronaut", "chelsea", "coffee", "rocket", "retina"}


def test_the_first_photograph_is_the_whole_astronaut():
    """512 x 512 to 64 x 64: near the plain mean over 8 x 8 blocks, far from picking every eighth pixel."""
    original = np.asarray(Image.open(Path(skimage.__file__).parent / "data" / "astronaut.png"), dtype=np.float64) / 255
    blocks = torch.from_numpy(original.reshape(64, 8, 64, 8, 3).mean((1, 3)).transpose(2, 0, 1))
    picked = torch.from_numpy(original[4::8, 4::8].transpose(2, 0, 1).copy())
    found = data.photographs(1, size=64).inputs[0].double()
    assert (found - blocks).square().mean().sqrt() < 0.03
    assert (found - picked).square().mean().sqrt() > 0.06


def test_crops_keep_the_proportions():
    """The cup's picture is 400 x 600: at 20 x 30 nothing is cut off, at 20 x 20 the middle two thirds are left."""
    whole = data.photographs(3, size=(20, 30)).inputs[2]
    middle = data.photographs(3, size=(20, 20)).inputs[2]
    assert (whole[:, :, 5:25] - middle).abs().max() < 0.01


def test_photographs_come_in_any_size():
    for size in range(1, 70):
        assert data.photographs(5, size).inputs.shape == (5, 3, size, size)


def test_grey_photographs_are_the_luma_of_the_colours():
    red, green, blue = data.photographs(5).inputs.unbind(1)
    luma = 0.299 * red + 0.587 * green + 0.114 * blue
    grey = data.photographs(5, channels=1).inputs[:, 0]
    # Not equal: rounding to 8 bits, and cutting off the filter's overshoot, happen once for each channel or once.
    assert (grey - luma).abs().mean() < 1 / 255
    assert (grey - (red + green + blue) / 3).abs().mean() > 3 / 255


def test_faces_at_their_own_size_are_those_of_the_file():
    values = np.load(Path(skimage.__file__).parent / "data" / "lfw_subset.npy")
    expected = torch.from_numpy(values[:4].astype(np.float32))
    torch.testing.assert_close(data.faces(4).inputs[:, 0], expected, atol=1e-6, rtol=0)


@pytest.mark.parametrize(("make", "most"), [(data.photographs, 25), (data.faces, 100)])
def test_counts_and_sizes_out_of_range(make, most):
    for count in (0, most + 1):
        with pytest.raises(DataError, match=f"count is {count}: expected 1 to {most}"):
            make(count)
    with pytest.raises(DataError, match=r"size is \(0, 3\): expected"):
        make(1, size=(0, 3))


def test_other_numbers_of_channels_are_refused(tmp_path):
    for make in (lambda: data.photographs(1, channels=2), lambda: data.folder(tmp_path, channels=2)):
        with pytest.raises(DataError, match="channels is 2: expected 3 for colour or 1 for grey"):
            make()


def test_a_missing_built_in_picture_is_named_and_not_downloaded(monkeypatch, tmp_path):
    monkeypatch.setattr(skimage, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(DataError, match=r"astronaut\.png does not exist"):
        data.photographs(1)


# folder


def test_classes_come_in_turn(classes):
    images = data.folder(classes)
    assert images.names == ("ant/z.png", "cat/a.png", "dog/1.png", "cat/b.png", "dog/2.PNG", "cat/more/c.png")
    assert images.classes == ("ant", "cat", "dog", "cat", "dog", "cat")
    seeds = [3, 1, 4, 0, 5, 2]
    expected = torch.tensor(np.stack([colours(seed) for seed in seeds])).permute(0, 3, 1, 2) / 255
    assert torch.equal(images.inputs, expected)
    assert images.inputs.dtype == torch.float32
    assert images.inputs.is_contiguous()


def test_a_limit_takes_the_first_of_them(classes):
    whole = data.folder(classes)
    for limit in (1, 2, 5, 6, 7):
        part = data.folder(classes, limit=limit)
        assert part.names == whole.names[:limit]
        assert torch.equal(part.inputs, whole.inputs[:limit])
    with pytest.raises(DataError, match="limit is 0: expected 1 or more"):
        data.folder(classes, limit=0)


def test_pictures_beyond_the_limit_are_not_opened(classes):
    (classes / "cat/b.png").write_text("no picture")
    assert len(data.folder(classes, limit=3)) == 3
    with pytest.raises(DataError, match=r"b\.png"):
        data.folder(classes, limit=4)


def test_a_flat_folder_has_no_classes(tmp_path):
    for seed, name in enumerate(["b.jpg", "a.png", "notes.txt", ".hidden.png"]):
        if name.endswith("txt"):
            (tmp_path / name).write_text("not a picture")
        else:
            save(tmp_path / name, colours(seed))
    (tmp_path / "no pictures here").mkdir()
    save(tmp_path / ".thumbnails/a.png", colours(0))
    images = data.folder(str(tmp_path))
    assert images.names == ("a.png", "b.jpg")
    assert images.classes == ("", "")


def test_size_takes_the_middle_and_averages(tmp_path):
    """A 40 x 80 picture: its outer quarters are cut away, and a fine chequerboard comes out as an even grey."""
    values = np.zeros((40, 80), dtype=np.uint8)
    values[:, 20:60] = 255 * (np.indices((40, 40)).sum(0) % 2)
    save(tmp_path / "a.png", values)
    found = data.folder(tmp_path, size=10, channels=1).inputs
    assert found.shape == (1, 1, 10, 10)
    assert (found - 0.5).abs().max() < 0.05
    assert data.folder(tmp_path, size=(4, 8), channels=1).inputs.shape == (1, 1, 4, 8)


def test_mixed_sizes_need_a_size(tmp_path):
    save(tmp_path / "a.png", colours(0, 6, 5))
    save(tmp_path / "b.png", colours(1, 5, 6))
    with pytest.raises(DataError, match=r"b\.png is 5 x 6 and .*a\.png is 6 x 5 .*pass size="):
        data.folder(tmp_path)
    assert data.folder(tmp_path, size=(3, 4)).inputs.shape == (2, 3, 3, 4)


def test_grey_depths(tmp_path):
    """8, 16 and 1 bit, and 8 bit with alpha: each scaled by its own largest value."""
    eight = greys(0)
    sixteen = np.random.default_rng(1).integers(0, 65536, (6, 5), dtype=np.uint16)
    save(tmp_path / "a.png", eight)
    save(tmp_path / "b.png", sixteen)
    save(tmp_path / "c.png", np.where(eight > 127, 255, 0), "1")
    save(tmp_path / "d.png", eight, "LA")
    expected = np.stack([eight / 255, sixteen / 65535, eight > 127, eight / 255])
    torch.testing.assert_close(
        data.folder(tmp_path, channels=1).inputs[:, 0], torch.from_numpy(expected).float(), atol=1e-6, rtol=0
    )


def test_sixteen_bits_stay_in_range_when_scaled(tmp_path):
    values = np.zeros((20, 20), dtype=np.uint16)
    values[:, 10:] = 65535
    save(tmp_path / "a.png", values)
    found = data.folder(tmp_path, size=7, channels=1).inputs
    assert found.min() == 0
    assert found.max() == 1


def test_colour_modes(tmp_path):
    values = colours(0)
    save(tmp_path / "a.png", values)
    save(tmp_path / "b.png", values, "RGBA")
    palette = Image.fromarray(values).quantize(256)
    palette.save(tmp_path / "c.png", transparency=bytes([255, 128]))
    found = data.folder(tmp_path).inputs
    assert torch.equal(found[0], found[1])
    # All 30 colours fit the palette, but quantising rounds a little.
    assert (found[0] - found[2]).abs().max() < 0.05


@pytest.mark.parametrize(("mode", "channels", "other"), [("L", 3, 1), ("1", 3, 1), ("RGB", 1, 3), ("RGBA", 1, 3)])
def test_the_other_kind_of_picture_is_refused(tmp_path, mode, channels, other):
    save(tmp_path / "a.png", colours(0), mode)
    kind = "grey" if channels == 3 else "colour"
    wanted = "3 channels" if channels == 3 else "1 channel"
    message = rf"got a {kind} picture \(mode {mode}\) in .*a\.png, expected {wanted}: pass channels={other} or convert"
    with pytest.raises(DataError, match=message):
        data.folder(tmp_path, channels=channels)
    assert data.folder(tmp_path, channels=other).inputs.shape[1] == other


def test_values_without_a_known_range_are_refused(tmp_path):
    Image.fromarray(np.ones((3, 3), dtype=np.float32)).save(tmp_path / "a.tif")
    with pytest.raises(DataError, match=r"a\.tif has mode F: expected 8-bit colour, or 8- or 16-bit grey"):
        data.folder(tmp_path, channels=1)


@pytest.mark.parametrize("extension", ["png", "jpg", "bmp", "tif", "webp", "ppm"])
def test_damaged_pictures_are_named(tmp_path, extension):
    whole = save(tmp_path / f"good.{extension}", colours(0, 40, 40))
    content = whole.read_bytes()
    for damage in (b"", b"not a picture", content[: len(content) // 2]):
        bad = tmp_path / "class" / f"bad.{extension}"
        bad.parent.mkdir(exist_ok=True)
        bad.write_bytes(damage)
        with pytest.raises(DataError, match=rf"cannot read .*bad\.{extension} as an image"):
            data.folder(bad.parent)


def test_missing_and_empty_folders(tmp_path):
    with pytest.raises(DataError, match="nowhere does not exist: expected a folder"):
        data.folder(tmp_path / "nowhere")
    (tmp_path / "empty" / "class").mkdir(parents=True)
    (tmp_path / "empty" / "class" / "notes.txt").write_text("")
    with pytest.raises(DataError, match=r"no images in .*empty: expected a subfolder of pictures for each class"):
        data.folder(tmp_path / "empty")
    with pytest.raises(DataError, match=r"notes\.txt is a file: expected a folder"):
        data.folder(tmp_path / "empty" / "class" / "notes.txt")


def test_pictures_beside_classes_are_not_passed_over(classes):
    save(classes / "loose.png", colours(9))
    with pytest.raises(DataError, match=r"\(loose\.png, \.\.\.\) and class folders \(ant, \.\.\.\)"):
        data.folder(classes)


def test_a_data_error_is_a_value_error():
    assert issubclass(DataError, ValueError)
