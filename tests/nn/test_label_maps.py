"""Labels that are maps: the loss against torch's own, and what an update tells with the masks known and without."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from rgap import Target, audit, capture, data, losses, score
from rgap.attacks import IDLG, class_shares
from rgap.auditing import Level
from rgap.losses import LabelMaps, for_model
from rgap.rank import rank_analysis
from rgap.tables import read, samples_of

CLASSES = {"two": 2, "three": 3, "yes": 1}


def head(classes: int, kernel: int = 1, scale: int = 1) -> nn.Sequential:
    """A network whose outputs are a map for each class; interpolated, as some return them."""
    with torch.random.fork_rng():
        torch.manual_seed(0)
        layers = [nn.Conv2d(1, 6, 3, scale, 1), nn.Tanh(), nn.Conv2d(6, classes, kernel, padding=kernel // 2)]
        return nn.Sequential(*layers, *[nn.Upsample(scale_factor=scale, mode="bilinear")] * (scale > 1)).eval()


def masks(classes: int, count: int = 3, size: int = 6) -> Tensor:
    generator = torch.Generator().manual_seed(1)
    return torch.randint(max(classes, 2), (count, size, size), generator=generator)


def torchs(outputs: Tensor, own: Tensor) -> Tensor:
    if outputs.shape[1] == 1:
        return nn.functional.binary_cross_entropy_with_logits(outputs[:, 0], own.to(outputs))
    return nn.functional.cross_entropy(outputs, own)


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_the_gradient_is_torchs(classes: int) -> None:
    model, maps, x = head(classes), masks(classes), torch.rand(2, 1, 6, 6)
    target = Target(model, LabelMaps(maps, classes), (1, 6, 6), batch_size=2)
    found = capture(target, x, torch.tensor([2.0, 0.0])).gradients
    own = torch.autograd.grad(torchs(model(x), maps[[2, 0]]), list(model.parameters()))
    for (name, _), expected in zip(model.named_parameters(), own, strict=True):
        torch.testing.assert_close(found[name], expected)


@pytest.mark.parametrize(("kernel", "scale"), [(1, 1), (3, 1), (1, 2)], ids=["pixel", "kernel", "interpolated"])
@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_the_shares_of_the_classes_are_read_off(classes: int, kernel: int, scale: int) -> None:
    """Exactly where the model is not sure of anything, as one whose head is zero."""
    model, maps = head(classes, kernel, scale), masks(classes)
    nn.init.zeros_(model[2].weight)
    nn.init.zeros_(model[2].bias)
    target = Target(model, LabelMaps(maps, classes), (1, 6, 6), (0.0, 1.0))
    for label, own in enumerate(maps):
        update = capture(target, torch.rand(1, 1, 6, 6), torch.tensor([float(label)]))
        expected = [float((own == each).double().mean()) for each in (range(classes) if classes > 1 else [1])]
        assert class_shares(target, update).tolist() == pytest.approx(expected, abs=1e-5)


def test_shares_need_label_maps_and_a_bias() -> None:
    model = nn.Sequential(nn.Conv2d(1, 2, 1, bias=False))
    target = Target(model, LabelMaps(masks(2), 2), (1, 6, 6))
    with pytest.raises(ValueError, match="gradient of a last layer's bias, which was not sent"):
        class_shares(target, capture(target, torch.rand(1, 1, 6, 6), torch.tensor([0.0])))
    plain = Target(nn.Linear(4, 2), "cross-entropy", (4,))
    with pytest.raises(ValueError, match="the cross-entropy loss has no label maps"):
        class_shares(plain, capture(plain, torch.rand(1, 4), torch.tensor([0.0])))


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_with_the_mask_known_the_picture_comes_back(classes: int) -> None:
    x = data.photographs(1, 4, channels=1).inputs
    target = Target(head(classes), LabelMaps(masks(classes, 1, 4), classes), (1, 4, 4), (0.0, 1.0))
    found = IDLG(iterations=100)(target, capture(target, x, torch.tensor([0.0])))
    assert score(found, truth=x).mean_psnr > 40
    assert any("label map is known to the attacker" in each for each in found.assumptions)


@pytest.mark.parametrize(
    ("maps", "classes", "message"),
    [
        (torch.zeros(2, 4, dtype=torch.long), 2, r"got masks of shape \(2, 4\), expected \(n, h, w\)"),
        (torch.full((1, 4, 4), 3), 3, "got class 3 in a mask, expected whole numbers from 0 to 2"),
        (torch.full((1, 4, 4), 0.5), 1, "got class 0.5 in a mask, expected whole numbers from 0 to 1"),
        (torch.full((1, 4, 4), -1), 2, "got class -1 in a mask"),
    ],
)
def test_masks_that_are_none_are_refused(maps: Tensor, classes: int, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        LabelMaps(maps, classes)


@pytest.mark.parametrize("shape", [(3, 6, 6), (3, 1, 6, 6)])
def test_masks_are_a_loss(shape: tuple[int, ...]) -> None:
    found = for_model(head(4), (1, 6, 6), masks(4).reshape(shape))
    assert isinstance(found, LabelMaps)
    assert (found.classes, len(found.masks)) == (4, 3)


@pytest.mark.parametrize(
    ("model", "maps", "message"),
    [
        (head(2), masks(2, size=5), r"got masks of shape \(5, 5\) for a model that returns \(2, 6, 6\)"),
        (nn.Sequential(nn.Flatten(), nn.Linear(36, 2)), masks(2), r"for a model that returns \(2,\)"),
        (nn.Conv2d(3, 2, 1), masks(2), "does not take an input of shape"),
    ],
    ids=["size", "vector", "channels"],
)
def test_masks_that_do_not_fit_are_refused(model: nn.Module, maps: Tensor, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        for_model(model, (1, 6, 6), maps)


@pytest.mark.parametrize("loss", [None, "cross-entropy", "bce", nn.CrossEntropyLoss()], ids=str)
@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_without_masks_it_is_said_what_to_give(classes: int, loss: object) -> None:
    with pytest.raises(ValueError, match=r"labels are masks: give them \(--data FILE.npz"):
        for_model(head(classes), (1, 6, 6), loss)


def test_a_sigmoid_at_the_end_is_told_of() -> None:
    target = Target(nn.Sequential(nn.Conv2d(1, 1, 1), nn.Sigmoid()), LabelMaps(masks(1, 1), 1), (1, 6, 6))
    found = audit(target, torch.rand(1, 1, 6, 6), attacks=IDLG(iterations=1))
    assert any("ends in sigmoid, and the label-maps loss takes what comes out" in each for each in found.findings)


def npz(x: Tensor, y: Tensor, folder: Path) -> object:
    np.savez(folder / "a.npz", x=x.numpy(), y=y.numpy())
    return read(folder / "a.npz")


@pytest.mark.parametrize("given", [lambda x, y, _: samples_of((x, y)), lambda x, y, _: samples_of((x.numpy(), y)), npz])
def test_masks_are_told_from_labels(given: Callable[[Tensor, Tensor, Path], losses.Loss], tmp_path: Path) -> None:
    x = torch.rand(3, 1, 6, 6)
    for y in (masks(2), masks(2)[:, None]):
        found = given(x, y, tmp_path)
        assert found.labels == (0.0, 1.0, 2.0)
        assert torch.equal(found.masks, y)
    for y in (torch.tensor([1, 0, 1]), torch.tensor([[1], [0], [1]])):
        found = given(x, y, tmp_path)
        assert found.labels == (1.0, 0.0, 1.0)
        assert found.masks is None


def test_an_audit_says_the_aid_and_never_that_labels_were_inferred() -> None:
    x = data.photographs(2, 4, channels=1).inputs
    target = Target(head(2), masks(2, 2, 4), (1, 4, 4), (0.0, 1.0))
    found = audit(target, x, attacks=IDLG(iterations=100))
    assert all(case.level is not Level.NOTHING for case in found.cases)
    assert "the label map is one of 2 that are known to the attacker" in str(found)
    assert "the classes' shares of the label maps (to " in str(found)
    assert "inferred" not in str(found)


@pytest.mark.parametrize("classes", CLASSES.values(), ids=CLASSES)
def test_ranks_of_convolutions_alone(classes: int) -> None:
    found = rank_analysis(Target(head(classes, 3), LabelMaps(masks(classes), classes), (1, 6, 6)))
    assert [layer.unknowns for layer in found.layers] == [36, 216]
