"""Losses as people name them, and models that have part of their loss inside."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional

from rgap import Target, capture, losses
from rgap.attacks import IDLG, Attack, Bias, Closed

SHAPE = (6,)


class Net(nn.Module):
    """Ends in what a test asks for."""

    def __init__(self, outputs: int, end: Callable[[Tensor], Any] = lambda z: z):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(0)
            self.a, self.b = nn.Linear(6, 9), nn.Linear(9, outputs)
        self.end = end
        self.double().eval()

    def forward(self, x: Tensor) -> Any:
        return self.end(self.b(torch.tanh(self.a(x))))


def logarithm(z: Tensor) -> Tensor:
    return functional.log_softmax(z, dim=1)


@pytest.mark.parametrize(
    ("model", "asked", "label", "reference"),
    [
        (Net(4, logarithm), "nll", 2.0, lambda o: functional.nll_loss(o, torch.tensor([2]))),
        (Net(4, logarithm), nn.NLLLoss(), 3.0, lambda o: functional.nll_loss(o, torch.tensor([3]))),
        (Net(4, logarithm), None, 1.0, lambda o: functional.nll_loss(o, torch.tensor([1]))),
        (Net(1, torch.sigmoid), "bce", 1.0, lambda o: functional.binary_cross_entropy(o, torch.ones(1, 1).double())),
        (Net(1, torch.sigmoid), None, 0.0, lambda o: functional.binary_cross_entropy(o, torch.zeros(1, 1).double())),
        (Net(3, torch.sigmoid), nn.BCELoss, 5.0,
         lambda o: functional.binary_cross_entropy(o, torch.tensor([[1.0, 0.0, 1.0]]).double())),
        (Net(1, lambda z: torch.sigmoid(z).squeeze(1)), nn.BCELoss(), 1.0,
         lambda o: functional.binary_cross_entropy(o, torch.ones(1).double())),
        (Net(4), nn.CrossEntropyLoss(label_smoothing=0.1), 0.0,
         lambda o: functional.cross_entropy(o, torch.tensor([0]), label_smoothing=0.1)),
        (Net(4, lambda z: {"logits": z}), "CrossEntropyLoss", 1.0,
         lambda o: functional.cross_entropy(o["logits"], torch.tensor([1]))),
        (Net(4, lambda z: (z, 2 * z)), functional.cross_entropy, 1.0,
         lambda o: functional.cross_entropy(o[0], torch.tensor([1]))),
        (Net(1), nn.MSELoss(), 0.25, lambda o: (o - 0.25).square().mean()),
        (Net(2), nn.BCEWithLogitsLoss(), 2.0,
         lambda o: functional.binary_cross_entropy_with_logits(o, torch.tensor([[0.0, 1.0]]).double())),
        (Net(1, lambda z: z.squeeze()), nn.BCEWithLogitsLoss(), 1.0,
         lambda o: functional.binary_cross_entropy_with_logits(o, torch.ones(()).double())),
        (Net(1, lambda z: {"out": z.view(-1).squeeze()}), "logistic", 1.0,
         lambda o: functional.softplus(-o["out"])),
        (Net(1), nn.SoftMarginLoss, -1.0, lambda o: functional.soft_margin_loss(o, torch.tensor([[-1.0]]).double())),
    ],
)  # fmt: skip
def test_a_loss_is_what_torch_computes_and_is_attacked_up_to_what_its_ending_takes(
    model: Net, asked: Any, label: float, reference: Callable[[Any], Tensor]
) -> None:
    target = Target(model, asked, SHAPE, (0.0, 1.0))
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(1), dtype=torch.float64)
    update = capture(target, x, torch.tensor([label]))
    expected = torch.autograd.grad(reference(model(x)), list(model.parameters()))
    for found, own in zip(update.gradients.values(), expected, strict=True):
        torch.testing.assert_close(found, own)
    attacks: list[Attack] = [Closed(), Bias()]
    for attack in attacks:
        assert attack.obstacle(target, 1) is None
        answer = attack(target, update)
        torch.testing.assert_close(answer.inputs, x, rtol=0, atol=1e-6)
        assert answer.labels.tolist() == pytest.approx([label])
    if target.loss.labels:
        assert IDLG().obstacle(target, 1) is None


@pytest.mark.parametrize(
    ("asked", "model", "message"),
    [
        (nn.GaussianNLLLoss(), Net(2), "got GaussianNLLLoss.*expected one of CrossEntropyLoss"),
        (nn.L1Loss(), Net(1), "got L1Loss.*or a function of outputs"),
        (nn.CrossEntropyLoss(reduction="sum"), Net(2), "reduction 'sum'.*summed"),
        (nn.CrossEntropyLoss(ignore_index=0), Net(2), "ignore_index"),
        (nn.BCEWithLogitsLoss(pos_weight=torch.ones(1)), Net(1), "pos_weight"),
        ("nll", Net(3), "expected a model that ends in log_softmax"),
        (nn.BCELoss(), Net(1, lambda z: 5 * z), "expected a model that ends in a sigmoid"),
        ("mine", Net(3), "unknown loss 'mine'"),
        (
            "cross-entropy",
            Net(12, lambda z: z.reshape(len(z), 3, 2, 2)),
            "returns .3, 2, 2. for a sample, classes",
        ),
        (None, Net(8, lambda z: z.reshape(len(z), 2, 4)), "labels are masks: give them"),
        (nn.CrossEntropyLoss(), Net(8, lambda z: z.reshape(len(z), 2, 4)), "labels are masks"),
    ],
)
def test_what_is_no_loss_of_this_model_is_refused_with_the_reason(asked: Any, model: Net, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(model, asked, SHAPE)


@pytest.mark.parametrize(
    ("asked", "kind"),
    [
        (losses.Hinge(), losses.Hinge),
        (losses.Hinge, losses.Hinge),
        ("hinge", losses.Hinge),
        (None, losses.Logistic),
        (nn.BCEWithLogitsLoss, losses.BinaryCrossEntropy),
        ("bce", losses.BinaryCrossEntropy),
    ],
)
def test_one_loss_by_many_names(asked: Any, kind: type[losses.Loss]) -> None:
    assert type(losses.for_model(Net(1), SHAPE, asked)) is kind


@pytest.mark.parametrize("asked", ["cross-entropy", "bce", "mse", nn.CrossEntropyLoss(), nn.MSELoss, None])
def test_a_wrong_shape_is_the_cause_that_is_named_whatever_the_loss(asked: Any) -> None:
    with pytest.raises(ValueError, match=r"does not take an input of shape \(\d, 7\): mat1 and mat2.*input_shape is"):
        Target(Net(3), asked, (7,))
