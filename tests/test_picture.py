"""Pictures for people: that the files open, and that each picture stands where it should in the colours it has."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from matplotlib.figure import Figure
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from rgap import Audit, Protocol, Target, losses
from rgap.attacks import Answer, Reconstruction, Status
from rgap.auditing import Case
from rgap.auditing.picture import ACROSS, side_by_side
from rgap.auditing.results import judge
from rgap.auditing.run import Ended
from rgap.checks import Preflight
from rgap.picture import is_picture, show, single


def opened(path: Path) -> NDArray[np.uint8]:
    """The RGB values of a PNG, (height, width, 3)."""
    with Image.open(path) as image:
        assert image.format == "PNG"
        image.load()
        return np.asarray(image.convert("RGB"))


def flat(colour: tuple[float, ...], size: int = 4) -> Tensor:
    return torch.tensor(colour)[:, None, None].expand(-1, size, size).clone()


def case(name: str, truth: Tensor, answer: Tensor | None) -> Case:
    answers = () if answer is None else (Answer(answer[None], torch.ones(1), 0.5, 1e-9, 1e-9),)
    status = Status.NOT_CONVERGED if answer is None else Status.EXACT
    found = Reconstruction("Some", status, "", answers, (), Preflight((), ()), 0.1)
    return Case(name, truth[None], 1.0, tuple(judge(found, truth[None], [1.0], (0.0, 1.0))))


def audit_of(cases: list[Case], shape: tuple[int, ...], value_range: tuple[float, float] | None = (0.0, 1.0)) -> Audit:
    model = nn.Sequential(nn.Flatten(), nn.Linear(torch.Size(shape).numel(), 1))
    target = Target(model, losses.Logistic(), shape, value_range)
    return Audit(target, Protocol(), {}, tuple(cases), (), (), None, (), Ended.WHOLE, False, None, (), 1.0)


def boxes(image: NDArray[np.uint8], colour: tuple[int, int, int]) -> tuple[float, float, int]:
    """Where the pixels of exactly this colour lie: mean row and column, and their number."""
    where = np.argwhere((image == np.array(colour)).all(-1))
    assert len(where) > 100, f"{colour} is not in the picture"
    row, column = where.mean(0)
    return float(row), float(column), len(where)


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((3, 32, 32), True), ((1, 28, 28), True), ((3, 2, 9), True), ((2, 8, 8), False), ((4, 8, 8), False),
        ((3, 1, 8), False), ((3, 8, 1), False), ((784,), False), ((28, 28), False), ((3, 8, 8, 8), False),
        ((), False),
    ],
)  # fmt: skip
def test_what_is_a_picture(shape: tuple[int, ...], expected: bool) -> None:
    assert is_picture(shape) is expected


# One picture.


def test_every_pixel_is_in_its_place_with_its_colour(tmp_path: Path) -> None:
    picture = torch.zeros(3, 2, 3)
    colours = {(0, 0): (255, 0, 0), (0, 2): (0, 255, 0), (1, 0): (0, 0, 255), (1, 1): (255, 255, 255)}
    for (row, column), colour in colours.items():
        picture[:, row, column] = torch.tensor(colour) / 255
    single(picture, (0.0, 1.0), tmp_path / "one.png")
    image = opened(tmp_path / "one.png")
    height, width = image.shape[:2]
    assert width / height == pytest.approx(3 / 2, rel=0.02)
    assert min(height, width) > 100, "enlarged to be seen"
    for row in range(2):
        for column in range(3):
            middle = image[(2 * row + 1) * height // 4, (2 * column + 1) * width // 6]
            assert tuple(middle) == colours.get((row, column), (0, 0, 0))
    # Nothing is between the pixels or around them: no blur, no frame.
    assert {tuple(value) for value in image.reshape(-1, 3)} == {*colours.values(), (0, 0, 0)}


@pytest.mark.parametrize("value_range", [(0.0, 1.0), (-1.0, 1.0), (-3.0, 5.0)])
def test_grey_values_are_scaled_to_the_range(value_range: tuple[float, float], tmp_path: Path) -> None:
    low, high = value_range
    fractions = torch.tensor([[0.0, 0.2], [0.6, 1.0]])
    single((low + (high - low) * fractions)[None], value_range, tmp_path / "grey.png")
    image = opened(tmp_path / "grey.png")
    height, width = image.shape[:2]
    for at, fraction in np.ndenumerate(fractions.numpy()):
        middle = image[(2 * at[0] + 1) * height // 4, (2 * at[1] + 1) * width // 4].astype(int)
        assert len(set(middle.tolist())) == 1
        assert abs(middle[0] - 255 * fraction) <= 1


@pytest.mark.parametrize("channels", [1, 3])
def test_values_outside_the_range_are_cut_off(channels: int, tmp_path: Path) -> None:
    picture = torch.tensor([[-5.0, 7.0], [float("-inf"), float("inf")]]).expand(channels, 2, 2)
    single(picture, (0.0, 1.0), tmp_path / "cut.png")
    image = opened(tmp_path / "cut.png")
    half = image.shape[1] // 2
    assert (image[:, : half - 2] == 0).all()
    assert (image[:, half + 2 :] == 255).all()


def test_nan_is_shown_as_the_lowest_value(tmp_path: Path) -> None:
    single(torch.full((1, 2, 2), float("nan")), (0.0, 1.0), tmp_path / "nan.png")
    assert (opened(tmp_path / "nan.png") == 0).all()


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64], ids=str)
def test_show_takes_what_an_attack_gives(dtype: torch.dtype) -> None:
    """Any type, and tensors that are part of a graph; the tensor stays as it was."""
    picture = torch.full((3, 2, 2), 2.0, dtype=dtype, requires_grad=True)
    axes = Figure().add_subplot()
    show(axes, picture, (0.0, 1.0))
    [image] = axes.images
    assert np.asarray(image.get_array()).shape == (2, 2, 3)
    assert float(np.asarray(image.get_array()).max()) == 1.0
    assert float(picture.detach().max()) == 2.0


# Originals above reconstructions.


@pytest.mark.parametrize("count", [1, 3, ACROSS, ACROSS + 2])
def test_each_original_stands_above_its_reconstruction(count: int, tmp_path: Path) -> None:
    shades = [(at + 1) / (count + 1) for at in range(count)]
    cases = [case(f"n{at}", flat((1.0, s, 0.0)), flat((0.0, s, 1.0))) for at, s in enumerate(shades)]
    side_by_side(audit_of(cases, (3, 4, 4)), tmp_path / "audit.png")
    image = opened(tmp_path / "audit.png")
    places = []
    for shade in shades:
        green = shown(shade)
        above, below = boxes(image, (255, green, 0)), boxes(image, (0, green, 255))
        assert above[0] < below[0]
        assert above[1] == pytest.approx(below[1], abs=2)
        assert above[2] == pytest.approx(below[2], rel=0.05)
        places.append((above[0], below[0], above[1]))
    for at in range(1, count):
        (above, _, column), (last_above, last_below, last_column) = places[at], places[at - 1]
        if at % ACROSS:
            assert column > last_column + 10
            assert above == pytest.approx(last_above, abs=2)
        else:
            assert above > last_below  # the next row of pairs is below the whole one before
            assert column == pytest.approx(places[0][2], abs=2)


def shown(value: float) -> int:
    """A value in [0, 1] as matplotlib writes it."""
    return int(np.float64(value) * 255)


def test_a_case_without_an_answer_leaves_its_place_empty(tmp_path: Path) -> None:
    cases = [case("a", flat((1.0, 0.0, 0.0)), None), case("b", flat((0.0, 1.0, 0.0)), flat((0.0, 0.0, 1.0)))]
    side_by_side(audit_of(cases, (3, 4, 4)), tmp_path / "audit.png")
    image = opened(tmp_path / "audit.png")
    first, second, answer = (boxes(image, colour) for colour in ((255, 0, 0), (0, 255, 0), (0, 0, 255)))
    assert first[1] < second[1]
    assert answer[1] == pytest.approx(second[1], abs=2)
    assert tuple(image[int(answer[0]), int(first[1])]) == (255, 255, 255)


def test_the_range_is_the_targets_or_else_the_samples(tmp_path: Path) -> None:
    truth = torch.zeros(1, 4, 4)
    truth[:, :, 2:] = 10.0
    pair = [case("a", truth, truth.clone())]
    side_by_side(audit_of(pair, (1, 4, 4), None), tmp_path / "own.png")
    side_by_side(audit_of(pair, (1, 4, 4), (0.0, 20.0)), tmp_path / "targets.png")
    own, targets = (opened(tmp_path / name) for name in ("own.png", "targets.png"))
    # The dark half is black in both; the light one is white (as the page is), or middle grey.
    black = boxes(own, (0, 0, 0))[2]
    assert boxes(targets, (0, 0, 0))[2] == pytest.approx(black, rel=0.01)
    greys = [int(((image >= 127) & (image <= 128)).all(-1).sum()) for image in (own, targets)]
    assert greys[0] < 100
    assert greys[1] == pytest.approx(black, rel=0.1)


@pytest.mark.parametrize("shape", [(16,), (2, 4, 4), (1, 1, 4)])
def test_inputs_that_are_no_pictures_are_refused(shape: tuple[int, ...], tmp_path: Path) -> None:
    audit = audit_of([case("a", torch.zeros(shape), None)], shape)
    with pytest.raises(ValueError, match="are no pictures: expected") as caught:
        side_by_side(audit, tmp_path / "audit.png")
    assert str(caught.value) == f"inputs of shape {shape} are no pictures: expected (1 or 3, height, width)"
    assert list(tmp_path.iterdir()) == []


def test_a_picture_replaces_the_one_before_whole(tmp_path: Path) -> None:
    path = tmp_path / "one.png"
    for value in (0.0, 1.0):
        single(torch.full((1, 4, 4), value), (0.0, 1.0), path)
    assert (opened(path) == 255).all()
    assert list(tmp_path.iterdir()) == [path]
