"""What a model must be so that its gradient can be recomputed, and what is taken off or refused."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from rgap import Target, Update, capture, losses
from rgap.attacks import IDLG, Bias, Closed
from rgap.auditing.findings import mode
from rgap.checks import changes_with_mode
from rgap.nn.models import exported_modes, in_mode, unwrapped

# torch's own, when what torch.export made is copied.
pytestmark = pytest.mark.filterwarnings("ignore:.isinstance.treespec:FutureWarning")


def plain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return nn.Sequential(nn.Linear(6, 9), nn.Tanh(), nn.Linear(9, 3)).eval()


class Kept(nn.Module):
    """A part that is computed again in the backward pass."""

    def __init__(self, reentrant: bool) -> None:
        super().__init__()
        self.first, *rest = plain()
        self.rest, self.reentrant = nn.Sequential(*rest), reentrant

    def forward(self, x: Tensor) -> Tensor:
        return checkpoint(self.rest, self.first(x), use_reentrant=self.reentrant)  # type: ignore[no-any-return]


class Listed(nn.Module):
    """Uses its parameters from a list, a dictionary or a function that has them."""

    def __init__(self, how: str) -> None:
        super().__init__()
        first, last = plain()[0], plain()[2]
        self.a, self.b = first.weight, last.weight
        kept = [self.a, self.b]
        self.use: Callable[[int], Tensor] = {
            "list": lambda at: kept[at],
            "one": lambda at: kept[0] if at == 0 else self.b,
            "module": lambda at: (first, last)[at].weight,
        }[how]

    def forward(self, x: Tensor) -> Tensor:
        return torch.tanh(x @ self.use(0).T) @ self.use(1).T


@pytest.mark.parametrize(
    "wrap",
    [
        nn.DataParallel,
        lambda model: torch.compile(model, backend="eager"),
        lambda model: nn.DataParallel(torch.compile(model, backend="eager")),
    ],
    ids=["DataParallel", "compile", "both"],
)
def test_a_wrapped_model_is_the_model_inside(wrap: Callable[[nn.Module], nn.Module]) -> None:
    model = wrap(plain()).eval()
    target = Target(model, losses.CrossEntropy(3), (6,), (0.0, 1.0))
    assert list(target.parameters) == ["0.weight", "0.bias", "2.weight", "2.bias"]
    x = torch.rand(1, 6)
    update = capture(target, x, torch.tensor([1.0]))
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), torch.tensor([1])), list(model.parameters()))
    for found, own in zip(update.gradients.values(), expected, strict=True):
        torch.testing.assert_close(found.float(), own)


@pytest.mark.parametrize("mode", ["evaluation", "training", "training but for a frozen batch norm"])
@pytest.mark.parametrize("wrap", [nn.DataParallel, lambda model: torch.compile(model, backend="eager")])
def test_a_wrapped_model_stays_in_its_mode(wrap: Callable[[nn.Module], nn.Module], mode: str) -> None:
    """Of every part, as what is in the wrapper computes in its own: a new wrapper says that it is in training mode."""
    model = nn.Sequential(nn.Linear(6, 9), nn.BatchNorm1d(9), nn.Tanh(), nn.Linear(9, 3)).train(mode != "evaluation")
    if "frozen" in mode:
        model[1].eval()
    modes = [part.training for part in model.modules()]
    target = Target(wrap(model), losses.CrossEntropy(3), (6,), (0.0, 1.0))
    assert [part.training for part in model.modules()] == modes
    assert [part.training for part in target.model.modules()] == modes


@pytest.mark.parametrize("reentrant", [True, False])
def test_parts_that_are_computed_again_are_computed_once(reentrant: bool) -> None:
    model = Kept(reentrant).eval()
    target = Target(model, losses.CrossEntropy(3), (6,), (0.0, 1.0))
    x = torch.rand(1, 6, generator=torch.Generator().manual_seed(0))
    nn.functional.cross_entropy(model(x), torch.tensor([1])).backward()
    sent = {name: parameter.grad for name, parameter in model.named_parameters() if parameter.grad is not None}
    update = Update(sent)
    for name, found in target.gradient(x, torch.tensor([1.0])).items():
        torch.testing.assert_close(found.float(), sent[name])
    for attack in (Closed(), Bias(), IDLG(iterations=40)):
        torch.testing.assert_close(attack(target, update).inputs.float(), x, rtol=0, atol=1e-2)


@pytest.mark.parametrize("how", ["list", "one"])
def test_parameters_past_their_names_are_refused(how: str) -> None:
    with pytest.raises(ValueError, match=r"the model uses a.* from a list.*nn.ParameterList"):
        Target(Listed(how).eval(), losses.CrossEntropy(3), (6,))


def meta() -> nn.Module:
    with torch.device("meta"):
        return nn.Linear(6, 3)


class Complex(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.w, self.f = nn.Parameter(torch.randn(4, dtype=torch.cfloat)), nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.f(torch.fft.irfft(torch.fft.rfft(x) * self.w, n=6))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (meta, "weight is on the meta device"),
        (Complex, "w holds complex numbers, expected real ones"),
        (lambda: torch.jit.script(plain()), "expected the one before torch.jit.script"),
        (lambda: torch.jit.trace(plain(), torch.rand(2, 6)), "expected the one before torch.jit.script"),
        (lambda: torch.export.export(plain(), (torch.rand(2, 6),)).module(), "export it with dynamic_shapes"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_what_has_no_real_weights_to_replace_is_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Target(make(), losses.CrossEntropy(3), (6,))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: torch.export.export(plain(), (torch.rand(2, 6),)),
            r"expected the model before torch.export, or .*\.module",
        ),
        (lambda: torch.jit.script(nn.functional.softsign), "got ScriptFunction, expected a torch.nn.Module"),
        (lambda: torch.tanh, "expected a torch.nn.Module"),
    ],
)
@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_what_is_no_module_is_refused(make: Callable[[], object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        unwrapped(make())


@pytest.mark.parametrize("loss", [None, "bce", "cross-entropy"])
def test_weights_without_values_are_refused_where_a_loss_is_chosen(loss: str | None) -> None:
    with torch.device("meta"):
        model = nn.Linear(4, 2)
    with pytest.raises(ValueError, match="weight is on the meta device, where it has no values"):
        losses.for_model(model, (4,), loss)


def test_what_torch_export_made_for_any_batch_is_attacked() -> None:
    """Of a model of its own: behind the tests above, one of the same operations was held to their batch size."""
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    plain = nn.Sequential(nn.Linear(5, 7), nn.Sigmoid(), nn.Linear(7, 4))
    made = torch.export.export(plain.eval(), (torch.rand(2, 5),), dynamic_shapes=dynamic).module()
    target = Target(in_mode(made, training=False), losses.CrossEntropy(4), (5,))
    x = torch.rand(1, 5)
    found = Closed()(target, capture(target, x, torch.tensor([1.0])))
    torch.testing.assert_close(found.inputs.float(), x, rtol=0, atol=1e-4)


@pytest.mark.filterwarnings("ignore:.cls.__new__:UserWarning")
@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize(
    ("part", "name"), [(nn.Dropout(), "dropout"), (nn.BatchNorm1d(9), "batch norm"), (nn.Tanh(), "")]
)
def test_what_torch_export_made_is_in_the_mode_it_was_made_in(part: nn.Module, name: str, training: bool) -> None:
    model = nn.Sequential(nn.Linear(6, 9), part, nn.Linear(9, 3)).train(training)
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    made = torch.export.export(model, (torch.rand(4, 6),), dynamic_shapes=dynamic).module()
    target = Target(made, losses.CrossEntropy(3), (6,), batch_size=2)
    assert target.mode == ("training" if training and name else "evaluation")
    assert changes_with_mode(made) == ((name,) if name else ())
    update = capture(target, torch.rand(2, 6), torch.tensor([1.0, 2.0]))
    assert update.header.training == (target.mode == "training")
    if name:
        assert f"audited in {target.mode} mode" in mode(target)


@pytest.mark.parametrize(
    "front",
    [
        (nn.Linear(6, 9), nn.BatchNorm1d(9)),
        (nn.Unflatten(1, (6, 1)), nn.Conv1d(6, 9, 1), nn.BatchNorm1d(9), nn.Flatten()),
        (nn.Unflatten(1, (1, 2, 3)), nn.Conv2d(1, 9, (2, 3)), nn.BatchNorm2d(9), nn.Flatten()),
    ],
)
def test_an_exported_model_that_trains_on_one_value_a_channel_is_followed_in_evaluation_mode(
    front: tuple[nn.Module, ...],
) -> None:
    model = nn.Sequential(*front, nn.Tanh(), nn.Linear(9, 3)).train()
    dynamic = ({0: torch.export.Dim.DYNAMIC},)
    made = torch.export.export(model, (torch.rand(4, 6),), dynamic_shapes=dynamic).module()
    target = Target(made, losses.CrossEntropy(3), (6,), batch_size=2)
    assert exported_modes(made) == {"aten::batch_norm": True}  # itself it stays as it was
    assert len(target.graph.uses) == 2
    assert "training mode: it divides by zero, as batch norm" in str(target.obstacles[0])
    assert "Export it in evaluation mode" in str(target.obstacles[0])


@pytest.mark.parametrize("size", [1, 3, 4])
def test_a_model_exported_for_one_batch_size_is_told_so(size: int) -> None:
    plain = nn.Sequential(nn.Linear(6, 10 + size), nn.Tanh(), nn.Linear(10 + size, 3))  # torch knows code again
    made = torch.export.export(plain, (torch.rand(size, 6),)).module()
    with pytest.raises(ValueError, match="export it with dynamic_shapes"):  # not taken for a model of one output
        Target(made, None, (6,), batch_size=size)
    if size > 1:
        target = Target(made, losses.CrossEntropy(3), (6,), batch_size=size)
        assert "export it with dynamic_shapes" in str(target.obstacles[0])


@pytest.mark.filterwarnings("ignore:.torch.jit.:DeprecationWarning")
def test_a_scripted_part_is_named() -> None:
    target = Target(nn.Sequential(torch.jit.script(nn.Linear(6, 6)), nn.Linear(6, 3)), losses.CrossEntropy(3), (6,))
    (obstacle,) = target.obstacles
    assert "0 is scripted" in str(obstacle)
    assert "before torch.jit.script" in str(obstacle)


class Particular(nn.Module):
    """Says in words of its own what it does not take."""

    def __init__(self, refuse: Callable[[Tensor], object]) -> None:
        super().__init__()
        self.refuse, self.f = refuse, nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        self.refuse(x)
        return self.f(x)


def asserts(x: Tensor) -> None:
    assert x.dim() == 4, "pictures, please"


def raises(x: Tensor) -> None:
    raise NotImplementedError


@pytest.mark.parametrize("loss", [None, "cross-entropy", losses.CrossEntropy(3)], ids=str)
@pytest.mark.parametrize(
    ("refuse", "said"),
    [
        (asserts, "pictures, please"),
        (raises, "NotImplementedError"),
        (lambda x: x.pixels, "has no attribute 'pixels'"),
        (lambda x: {}[len(x.shape)], "KeyError: 2"),
    ],
    ids=["assert", "raise", "attribute", "key"],
)
def test_a_model_may_refuse_a_shape_in_any_way(refuse: Callable[[Tensor], object], said: str, loss: object) -> None:
    with pytest.raises(ValueError, match=f"does not take an input of shape.*{said}.*input_shape is one sample's"):
        Target(Particular(refuse), loss, (6,))
